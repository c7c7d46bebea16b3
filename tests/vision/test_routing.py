"""Who gets room, by hand on six tokens; who chooses whom."""

import pytest
import torch
from torch.nn import functional as F

from lit_moe.testing.vision import example_images, tiny_vmoe
from lit_moe.vmoe import experts as experts_file
from lit_moe.vmoe.block import VMoEBlock
from lit_moe.vmoe.configuration import VMoEConfig
from lit_moe.vmoe.modeling import averaged
from lit_moe.vmoe.routing import (
    best_rows,
    capacity_of,
    choose_tokens,
    importance_loss,
    load_loss,
    only_own_rows,
    owners,
    slots_with_room,
)

# Six tokens, two choices each among three rows.
ROWS = torch.tensor([[0, 1], [0, 1], [0, 2], [1, 0], [0, 1], [2, 0]])
GATES = torch.tensor([0.5, 0.9, 0.6, 0.8, 0.7, 0.4])


def fits(rows, priority, capacity):
    """Which slots find room, as 0 and 1 by token and rank of choice."""
    tokens, ranks, found = slots_with_room(rows, priority, capacity)
    assert torch.equal(rows[tokens, ranks], found)
    assert torch.equal(found, found.sort().values)
    table = torch.zeros_like(rows)
    table[tokens, ranks] = 1
    return table.tolist()


def test_without_priority_early_tokens_and_first_choices_win():
    # Capacity 2. Row 0: first choices of tokens 0 and 1. Row 1: that of 3, then second of 0.
    # Row 2: that of 5, then second of 2.
    expected = [[1, 1], [1, 0], [0, 1], [1, 0], [0, 0], [1, 0]]
    assert fits(ROWS, None, 2) == expected


def test_with_priority_tokens_with_large_gates_win():
    # Order 1, 3, 4, 2, 0, 5. Row 0: tokens 1 and 4. Row 1: 3 first, then second choice of 1.
    # Row 2: 5 by its first choice, then 2.
    expected = [[0, 0], [1, 1], [0, 1], [1, 0], [1, 0], [1, 0]]
    assert fits(ROWS, GATES, 2) == expected


def test_second_choices_come_behind_all_first_ones_whatever_their_priority():
    rows = torch.tensor([[0, 1], [1, 0]])
    assert fits(rows, torch.tensor([0.99, 0.1]), 1) == [[1, 0], [1, 0]]
    assert fits(rows, None, None) == [[1, 1], [1, 1]]


def test_capacity_is_an_equal_share_times_the_factor():
    assert capacity_of(12, 3, 1.0) == 4
    assert capacity_of(12, 3, 1.05) == 4
    assert capacity_of(12, 8, 0.1) == 1


def test_a_token_without_room_is_zero_and_others_are_not_renormalised():
    config = VMoEConfig(hidden_size=4, intermediate_size=3, num_experts=2, num_experts_per_tok=1)
    config.eval_capacity_factor, config.num_hidden_layers = 0.5, 2
    config._experts_implementation = "eager"
    block = VMoEBlock(config, 1).eval()
    torch.manual_seed(0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(1, 6, 4)
    hidden[0] = hidden[0, :1] * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])[:, None]
    with torch.no_grad():
        out = block(hidden)[0]
        probabilities = torch.softmax(hidden[0] @ block.router.weight.T, dim=-1)
    expert = int(probabilities[0].argmax())
    # Six slots, two rows, factor one half: room for 2, all six want the same expert. The gates
    # grow with the scale of the token, so the last two have priority.
    assert out[:4].abs().max() == 0
    experts = block.experts
    inner = F.gelu(hidden[0, 4:] @ experts.up_proj[expert].T + experts.up_proj_bias[expert])
    outer = inner @ experts.down_proj[expert].T + experts.down_proj_bias[expert]
    torch.testing.assert_close(out[4:], outer * probabilities[4:, expert, None])


def test_experts_choose_tokens_of_each_image_and_know_nothing_of_each_other():
    logits = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    gates, rows, tokens = choose_tokens(logits, 2)
    fewer = choose_tokens(logits[:, :, [0, 2]], 2)
    assert gates.shape == rows.shape == tokens.shape == (12,)
    torch.testing.assert_close(gates[rows == 2], fewer[0][fewer[1] == 1], rtol=0, atol=0)
    assert tokens[rows == 2].tolist() == fewer[2][fewer[1] == 1].tolist()
    for row in range(3):
        mine = rows == row
        assert gates[mine].sum().item() == pytest.approx(2.0)
        for image in range(2):
            best = logits[image, :, row].topk(2).indices + 5 * image
            assert set(best.tolist()) <= set(tokens[mine].tolist())


def test_rows_of_an_ensemble_belong_to_members_in_blocks():
    assert owners(6, 4, 2, torch.device("cpu")).tolist() == [0, 0, 1, 1, 0, 1]
    logits = only_own_rows(torch.zeros(4, 6), 4, 2)
    assert (logits[0] == 0).tolist() == [True, True, False, False, True, False]
    assert (logits[3] == 0).tolist() == [False, False, True, True, False, True]


def test_members_average_probabilities():
    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    mean = (torch.softmax(logits[0], 0) + torch.softmax(logits[1], 0)) / 2
    torch.testing.assert_close(averaged(logits, 2).exp()[0], mean)


def test_an_ensemble_of_equal_members_is_one_of_them():
    one, two = tiny_vmoe("no_limit"), tiny_vmoe("no_limit", num_experts=16, num_members=2)
    state = one.state_dict()
    for name in two.state_dict():
        if state[name].shape != two.state_dict()[name].shape:
            state[name] = torch.cat([state[name], state[name]])
    two.load_state_dict(state)
    images = example_images(one)
    with torch.no_grad():
        alone, averaged_logits = one(**images).logits, two(**images).logits
    torch.testing.assert_close(alone.softmax(-1), averaged_logits.softmax(-1))


def test_auxiliary_losses_are_0_for_equal_rows_and_grow_with_imbalance():
    equal = torch.eye(4) * 3
    skewed = torch.eye(4) * 3 + torch.tensor([5.0, 0, 0, 0])
    assert importance_loss(equal).item() == pytest.approx(0, abs=1e-9)
    assert importance_loss(skewed) > 0.5
    assert load_loss(equal, equal, 1, 0.1).item() == pytest.approx(0, abs=1e-9)
    assert load_loss(skewed, skewed, 1, 0.1) > 0.5


def test_training_adds_the_losses_and_forgets_them():
    model = tiny_vmoe(importance_loss=0.0, load_loss=0.0, router_noise=0.0).train()
    labels = torch.tensor([0, 1, 2])
    plain = model(**example_images(model), labels=labels).loss
    twin = tiny_vmoe(importance_loss=1.0, load_loss=0.0, router_noise=0.0).train()
    assert twin(**example_images(twin), labels=labels).loss > plain
    assert all(getattr(module, "aux_loss", None) is None for module in twin.modules())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image_size": 9}, "images of 9 x 9 pixels cannot be cut into patches of 2 x 2"),
        ({"moe_layers": [7]}, "must name some of the layers 0 to 3"),
        ({"num_members": 2, "router_type": "expert_choice"}, "only router_type token_choice"),
        ({"router_type": "both"}, "router_type is 'both'; it can be token_choice or expert_choice"),
        ({"dropped_experts": "x"}, "dropped_experts is 'x'; it can be zero or delete"),
        ({"pooling": "max"}, "pooling is 'max'; it can be token or mean"),
        ({"patch_size": 0}, "patches of 0 x 0 pixels are none"),
        ({"moe_layers": [1.5]}, "must name some of the layers 0 to 3"),
        ({"num_experts": "8"}, "num_experts is '8'; it must be a number"),
        ({"num_experts": 0}, "num_experts is 0; it must be a number of at least 1"),
        ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0; it must be a number of at least 1"),
        ({"tokens_per_expert": 0}, "tokens_per_expert is 0; it must be a number of at least 1"),
        ({"capacity_factor": 0}, "capacity_factor is 0; it must be above 0, or null"),
        ({"eval_capacity_factor": -1.0}, "eval_capacity_factor is -1.0; it must be above 0"),
        ({"router_noise": -1.0}, "router_noise is -1.0; it must be a number of at least 0"),
    ],
)
def test_what_cannot_be_built_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        tiny_vmoe(**fields)


@pytest.mark.parametrize("small", [0, 2**30])
@pytest.mark.parametrize("slots", ["even", "uneven", "one", "unsorted"])
def test_both_ways_to_run_experts_are_the_sum_over_slots(small, slots, monkeypatch):
    monkeypatch.setattr(experts_file, "SMALL", small)
    experts = tiny_vmoe().get_submodule("vit.layers.1.mlp.experts")
    generator = torch.Generator().manual_seed(0)
    chosen = {
        "even": torch.arange(8).repeat_interleave(5),
        "uneven": torch.tensor([0] * 9 + [1] * 8 + [4] * 4 + [7] * 5).sort().values,
        "one": torch.tensor([3]),
        "unsorted": torch.randint(8, (40,), generator=generator),
    }[slots]
    hidden = torch.randn(len(chosen), 32, generator=generator, requires_grad=True)
    gates = torch.rand(len(chosen), 1, generator=generator)
    weights = [experts.get_parameter(name) for name in ("up_proj", "down_proj_bias")]
    out = experts(hidden, chosen[:, None], gates)
    expected = torch.stack(
        [
            gate * one_expert(experts, int(e), x)
            for e, x, gate in zip(chosen, hidden, gates, strict=True)
        ]
    )
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)
    found, wanted = (
        torch.autograd.grad(y.square().sum(), [hidden, *weights]) for y in (out, expected)
    )
    for gradient, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-3, atol=1e-3)


def one_expert(experts, e, hidden):
    inner = F.gelu(experts.up_proj[e] @ hidden + experts.up_proj_bias[e])
    return experts.down_proj[e] @ inner + experts.down_proj_bias[e]


@torch.no_grad()
@pytest.mark.parametrize("factor", [None, 1.05, 0.5])
def test_several_choices_are_added_up_as_one_by_one(factor):
    model = tiny_vmoe(eval_capacity_factor=factor, num_experts_per_tok=3)
    block, hidden = model.get_submodule("vit.layers.1.mlp"), torch.randn(4, 17, 32)
    flat, rows_of = hidden.reshape(-1, 32), block.get_parameter("router.weight")
    gates, rows = torch.softmax(flat @ rows_of.T, dim=-1).topk(3)
    capacity = None if factor is None else capacity_of(rows.numel(), 8, factor)
    room = torch.tensor(fits(rows, gates[:, 0], capacity))
    expected = torch.stack(
        [
            sum(
                g * r * one_expert(block.experts, int(e), x)
                for g, r, e in zip(gs, rs, es, strict=True)
            )
            for x, gs, rs, es in zip(flat, gates, room, rows, strict=True)
        ]
    )
    torch.testing.assert_close(block(hidden).view(-1, 32), expected, rtol=1e-4, atol=1e-4)


def test_the_best_row_is_that_of_topk_bit_for_bit_and_the_first_of_equals():
    generator = torch.Generator().manual_seed(0)
    probability = torch.rand(8, 500, generator=generator).softmax(dim=0).requires_grad_()
    gates, rows = best_rows(probability, 1)
    expected = torch.topk(probability.T, 1, dim=-1)
    assert torch.equal(gates, expected.values)
    assert torch.equal(rows, expected.indices)
    (found,) = torch.autograd.grad(gates.square().sum(), probability)
    (wanted,) = torch.autograd.grad(expected.values.square().sum(), probability)
    assert torch.equal(found, wanted)
    assert best_rows(torch.tensor([[0.2], [0.4], [0.4]]), 1)[1].tolist() == [[1]]
