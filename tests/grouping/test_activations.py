"""Neurons matched by what they do on text."""

import copy

import pytest
import torch

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.errors import LitMoEError
from lit_moe.grouping import MergeOptions, align_, apply, decide
from lit_moe.grouping.activations import correlations, features, orders_by_activations
from lit_moe.grouping.inputs import expert_inputs
from lit_moe.merging import merge
from lit_moe.testing import tiny_moe
from tests.grouping.models import copies, counts_of, logits_of, shuffled, text_for
from tests.grouping.test_align import pair_plan

FAMILIES = ("mixtral", "gpt_oss", "olmoe", "nemotron_h")


def orders_of(model, plan):
    sites, batches = find_sites(model), text_for(model, rows=16, length=24)
    hidden = expert_inputs(model, sites, batches, max_tokens=10**6)
    return {s.name: orders_by_activations(model, s, plan, hidden[s.name]) for s in sites}


@pytest.mark.parametrize("family", FAMILIES)
def test_permuting_the_neurons_of_an_expert_leaves_the_aligned_merge_unchanged(family):
    """Also where the experts are no copies, so that all matches are of neurons that differ."""
    model = tiny_moe(family)
    other = shuffled(copy.deepcopy(model), (3, 4, 6))
    plan = pair_plan(model)
    ours, theirs = orders_of(model, plan), orders_of(other, plan)
    assert all(not torch.equal(ours[layer], theirs[layer]) for layer in ours)
    align_(model, plan, ours)
    align_(other, plan, theirs)
    merge(model, plan)
    merge(other, plan)
    inputs = text_for(model)[0]
    torch.testing.assert_close(
        logits_of(other, inputs), logits_of(model, inputs), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_neurons_of_shuffled_copies_come_back_to_their_places(family):
    model = shuffled(copies(family), (4, 6))
    plan = pair_plan(model)
    align_(model, plan, orders_of(model, plan))
    for site in find_sites(model):
        weights = adapter_for(model.config).expert_weights(model, site)
        for tensor in weights.values():
            assert torch.equal(tensor[4], tensor[1])
            assert torch.equal(tensor[6], tensor[3])


def test_features_are_those_that_the_down_projection_reads():
    model = tiny_moe("mixtral")
    site = find_sites(model)[0]
    hidden = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    weights = adapter_for(model.config).expert_weights(model, site)
    with torch.no_grad():
        found = features(model, site, hidden, 5)
        gate, up = (hidden @ weights[name][5].T for name in ("gate", "up"))
        torch.testing.assert_close(found, torch.nn.functional.silu(gate) * up)


def test_correlations_are_those_of_numpy_and_dead_neurons_have_none():
    model = tiny_moe("mixtral")
    site = find_sites(model)[0]
    with torch.no_grad():
        weights = adapter_for(model.config).expert_weights(model, site)
        weights["up"][5, 7] = 0
        hidden = torch.randn(1500, 32, generator=torch.Generator().manual_seed(0))
        found = correlations(model, site, hidden, 2, 5)
        both = torch.cat([features(model, site, hidden, e) for e in (2, 5)], dim=1)
    width = found.shape[0]
    expected = torch.corrcoef(both.double().T)[:width, width:]
    assert found[:, 7].tolist() == [0] * width
    kept = [j for j in range(width) if j != 7]
    torch.testing.assert_close(found[:, kept], expected[:, kept], rtol=1e-4, atol=1e-5)


def test_a_recipe_may_ask_for_it():
    model = shuffled(copies(num_experts_per_tok=1), (4, 6))
    inputs = text_for(model)[0]
    before = logits_of(model, inputs)
    options = MergeOptions(align="activations")
    decision = decide(model, counts_of(model, 6), text_for(model), options)
    assert decision.plan.members("model.layers.0.mlp")[1] == (1, 4)
    assert (apply(model, decision) or 0) > 0
    torch.testing.assert_close(logits_of(model, inputs), before, rtol=1e-4, atol=1e-5)


def test_weights_are_compared_without_text_but_activations_need_some():
    assert not MergeOptions("weights", align="weights").needs_text
    assert MergeOptions("weights", align="activations").needs_text
    with pytest.raises(LitMoEError, match="align='outputs' is unknown; there are true, false, w"):
        MergeOptions(align="outputs")  # type: ignore[arg-type]
