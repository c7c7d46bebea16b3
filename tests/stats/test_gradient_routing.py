"""A pass of gradients tells experts that nothing was sent to from those that served prompts."""

import pytest
import torch

from lit_moe.adapters import find_sites
from lit_moe.criteria import apply_unrouted
from lit_moe.errors import LitMoEError
from lit_moe.stats import observe, observe_gradients
from lit_moe.testing import example_inputs, run_distributed, tiny_moe
from tests.stats.test_gradients import LAYOUTS, with_labels

PROMPT, ANSWER = 5, 7
"""Ids of tokens; each is sent to one expert of the last layer, and to another one."""


def prompts_apart(num_prompt=6, num_answer=2):
    """A model of one layer whose router looks at the token, and rows of prompt and answer."""
    torch.manual_seed(0)
    model = tiny_moe("mixtral", num_hidden_layers=1, num_experts_per_tok=1).eval()
    (site,) = find_sites(model)
    states = []
    hook = model.get_submodule(site.router).register_forward_hook(
        lambda _, inputs, __: states.append(inputs[0].reshape(-1, inputs[0].shape[-1]))
    )
    ids = torch.tensor([[PROMPT] * num_prompt + [ANSWER] * num_answer])
    with torch.no_grad():
        model(ids)
        hook.remove()
        before, after = states[0][0], states[0][num_prompt]
        directions = torch.stack([before / before.norm(), after / after.norm()])
        router = model.get_parameter(f"{site.router}.weight")
        router.zero_()
        router[1:3] = 50 * (directions - directions.flip(0))
    labels = ids.clone()
    # The last prompt token predicts the first answer: its own output is in the loss too.
    labels[:, : num_prompt + 1] = -100
    return model, {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("family", LAYOUTS)
def test_tokens_are_counted_as_in_an_observed_pass(family):
    model = tiny_moe(family)
    batches = [
        with_labels(model, example_inputs(model, seed=1), (1, 3)),
        with_labels(model, example_inputs(model, batch=3, length=7, seed=2), (0, 0, 0)),
    ]
    if "decoder_input_ids" not in batches[0]:
        batches[0]["attention_mask"][0, -3:] = 0
    seen, expected = observe_gradients(model, batches), observe(model, batches)
    assert seen.unrouted == expected.unrouted
    assert seen.tokens == expected.tokens
    for name, stats in seen.layers.items():
        assert torch.equal(stats.count, expected.layers[name].count)
        assert float(stats.count.sum()) > 0


def test_experts_of_prompts_are_not_called_unrouted():
    model, batch = prompts_apart()
    seen = observe_gradients(model, [batch])
    ((name, stats),) = seen.layers.items()
    assert stats.count.tolist() == [0, 6, 2, 0, 0, 0, 0, 0]
    assert float(stats.gram[1, 1]) == 0 < float(stats.gram[2, 2])
    assert seen.unrouted == {name: (0, 3, 4, 5, 6, 7)}
    assert (seen.tokens, seen.predicted) == (8, 1)
    scores = {name: torch.zeros(8)}
    dropped = apply_unrouted(scores, seen, "drop")[name]
    assert dropped.isinf().nonzero().flatten().tolist() == [0, 3, 4, 5, 6, 7]
    with pytest.raises(LitMoEError, match=r"6 experts saw none of the 8 calibration tokens"):
        apply_unrouted(scores, seen, "error")


def test_batches_without_any_label_are_counted_too():
    model, batch = prompts_apart()
    silent = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    once, both = observe_gradients(model, [batch]), observe_gradients(model, [batch, silent])
    assert (both.tokens, both.predicted) == (16, 1)
    for name, stats in once.layers.items():
        assert torch.equal(both.layers[name].count, 2 * stats.count)
        assert torch.equal(both.layers[name].gram, stats.gram)


def test_experts_without_a_token_are_named_and_have_no_gradient():
    model = tiny_moe("gpt_oss")
    for site in find_sites(model):
        model.get_parameter(f"{site.router}.bias").data[2] = -1e4
    seen = observe_gradients(model, [example_inputs(model)])
    assert set(seen.unrouted) == set(seen.layers)
    for name, ids in seen.unrouted.items():
        assert 2 in ids, name
        assert not seen.layers[name].gram[list(ids)].any()


def test_nothing_of_the_counting_stays_on_the_model():
    for family in LAYOUTS:
        model = tiny_moe(family)
        observe_gradients(model, [example_inputs(model)])
        for name, module in model.named_modules():
            assert not module._forward_pre_hooks, (family, name)
            assert not module._forward_hooks, (family, name)


@pytest.mark.distributed
def test_an_expert_that_only_the_other_rank_meets_is_not_unrouted():
    model, batch = prompts_apart()
    prompt = {key: value[:, :6] for key, value in batch.items()}
    answer = {key: value[:, 5:] for key, value in batch.items()}
    alone = observe_gradients(model, [prompt, answer])
    shares = [[prompt], [answer]]
    for seen in run_distributed(lambda rank: observe_gradients(model, shares[rank])):
        assert seen.unrouted == alone.unrouted
        assert (seen.tokens, seen.predicted) == (alone.tokens, alone.predicted) == (9, 1)
