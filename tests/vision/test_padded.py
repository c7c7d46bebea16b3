"""The quick way through a block in evaluation gives what a call of the experts gives."""

import pytest
import torch

from lit_moe.testing.vision import example_images, tiny_vmoe
from lit_moe.vmoe.experts import VMoEExperts
from lit_moe.vmoe.routing import places_with_room, slots_with_room


@pytest.mark.parametrize("capacity", [1, 3, 40])
@pytest.mark.parametrize("by_priority", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_places_are_those_of_the_slots_with_room(top_k, by_priority, capacity):
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(30, 7, generator=generator).topk(top_k).indices
    # Experts 0 to 3, rows 4 and 5 have none, a mask leads to the row 6 behind them all.
    gates = torch.randint(3, (30,), generator=generator) / 4  # with equals
    priority = gates if by_priority else None
    token_at, places = places_with_room(rows, priority, capacity, 4, 6)
    tokens, ranks, found = slots_with_room(rows, priority, capacity)
    served = found < 4
    first = torch.searchsorted(found, found)
    expected = torch.full((top_k, 30), 4 * capacity)
    turns = torch.arange(len(found)) - first
    expected[ranks[served], tokens[served]] = (found * capacity + turns)[served]
    assert torch.equal(places, expected)
    assert torch.equal(token_at[expected[ranks[served], tokens[served]]], tokens[served])
    assert token_at.shape == (4 * capacity + 1,)


def by_calls(block, hidden):
    """Run a block whose experts somebody watches; return the output, and how often they ran."""
    calls = []
    hook = block.experts.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        return block(hidden), len(calls)
    finally:
        hook.remove()


@torch.no_grad()
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_experts_per_tok": 1},
        {"num_experts_per_tok": 3},
        {"batch_priority": False},
        {"eval_capacity_factor": 0.4},
        {"num_null_experts": 4},
        {"num_members": 2},
        {"num_members": 4, "num_experts_per_tok": 3},  # more choices than rows: some have gate 0
    ],
)
def test_watched_experts_give_the_same(fields, monkeypatch):
    model = tiny_vmoe(**fields)
    model.set_experts_implementation("eager")
    block = model.get_submodule("vit.layers.1.mlp")
    hidden = torch.randn(4, 17, 32, generator=torch.Generator().manual_seed(0))
    expected, count = by_calls(block, hidden)
    assert count == 1
    monkeypatch.setattr(VMoEExperts, "forward", None)
    found = block(hidden)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
    assert torch.equal(found == 0, expected == 0)


def test_gradients_autocast_and_other_implementations_go_through_the_call(monkeypatch):
    model = tiny_vmoe()
    block, hidden = model.get_submodule("vit.layers.1.mlp"), torch.randn(4, 17, 32)

    def padded(*_):
        raise AssertionError

    monkeypatch.setattr(VMoEExperts, "padded", padded)
    model.set_experts_implementation("eager")
    assert block(hidden).requires_grad
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert block(hidden).isfinite().all()
        with pytest.raises(AssertionError):
            block(hidden)
        model.set_experts_implementation("batched_mm")
        assert block(hidden).isfinite().all()


@torch.no_grad()
def test_the_implementation_is_chosen_as_in_any_model():
    model = tiny_vmoe()
    assert model.get_experts_implementation() == {"": "grouped_mm"}
    logits = [
        [model.set_experts_implementation(name), model(**example_images(model)).logits][1]
        for name in ("grouped_mm", "eager", "batched_mm")
    ]
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=1e-5, atol=1e-5)
