"""Neurons in one order: no expert computes anything else, and averages mean something."""

import copy

import pytest
import torch

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.errors import UnsupportedModelError
from lit_moe.grouping import align_
from lit_moe.grouping.align import matching
from lit_moe.merge_plan import MergePlan
from lit_moe.merging import merge
from lit_moe.models import sharing_copy
from lit_moe.testing import FAMILIES, example_inputs, tiny_moe
from tests.grouping.models import copies, logits_of, shuffled

LAYOUTS = ("mixtral", "gpt_oss", "dbrx", "switch_transformers", "nemotron_h", "diffusion_gemma")


def pair_plan(model, pairs=((1, 4), (3, 6))):
    maps = {}
    for site in find_sites(model):
        alone = [(e,) for e in range(site.num_experts) if not any(e in pair for pair in pairs)]
        groups = sorted([*pairs, *alone])
        maps[site.name] = torch.zeros(len(groups), site.num_experts)
        for row, members in zip(maps[site.name], groups, strict=True):
            row[list(members)] = 1 / len(members)
    return MergePlan(maps, maps)


def states_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("family", [f for f in LAYOUTS if f in FAMILIES])
def test_permuting_the_neurons_of_an_expert_leaves_the_aligned_merge_unchanged(family):
    model = copies(family)
    other = shuffled(copy.deepcopy(model), (4, 6))
    plan = pair_plan(model)
    assert align_(model, plan) == 0
    assert align_(other, plan) > 0
    merge(model, plan)
    merge(other, plan)
    theirs = other.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name


def test_without_alignment_the_same_merge_is_another_model():
    model = copies()
    other = shuffled(copy.deepcopy(model), (4, 6))
    plan, inputs = pair_plan(model), example_inputs(model)
    merge(model, plan)
    merge(other, plan)
    assert float((logits_of(model, inputs) - logits_of(other, inputs)).abs().max()) > 1e-2


@pytest.mark.parametrize("family", [f for f in LAYOUTS if f in FAMILIES])
def test_alignment_alone_changes_no_logits_and_no_sharing_copy(family):
    model = tiny_moe(family)
    shared, inputs = sharing_copy(model), example_inputs(model)
    before, weights = logits_of(model, inputs), states_of(shared)
    assert align_(model, pair_plan(model)) > 0
    torch.testing.assert_close(logits_of(model, inputs), before, rtol=1e-4, atol=1e-5)
    for name, tensor in shared.state_dict().items():
        assert torch.equal(tensor, weights[name])


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(LAYOUTS) - {"jetmoe"}))
def test_alignment_alone_changes_no_logits_in_any_family(family):
    model = tiny_moe(family)
    inputs = example_inputs(model)
    before = logits_of(model, inputs)
    assert align_(model, pair_plan(model, pairs=((0, 1), (4, 5)))) > 0
    torch.testing.assert_close(logits_of(model, inputs), before, rtol=1e-3, atol=1e-4)


def test_the_matching_finds_a_permutation():
    model = shuffled(copies(), (4,), seed=5)
    weights = adapter_for(model.config).expert_weights(model, find_sites(model)[0])
    order = matching(weights, 1, 4)
    assert torch.equal(weights["up"][4][order], weights["up"][1])
    assert matching(weights, 2, 2).tolist() == list(range(24))


def test_the_member_with_the_largest_coefficient_is_followed():
    model = shuffled(copies(), (4,))
    kept = adapter_for(model.config).expert_weights(model, find_sites(model)[0])["up"][4].clone()
    plan = pair_plan(model)
    maps = {
        name: m * torch.where(torch.arange(8) == 4, 3.0, 1.0) for name, m in plan.experts.items()
    }
    align_(model, MergePlan(maps, maps))
    weights = adapter_for(model.config).expert_weights(model, find_sites(model)[0])
    assert torch.equal(weights["up"][4], kept)
    assert torch.equal(weights["up"][1], kept)


def test_experts_with_fixed_places_are_refused():
    model = tiny_moe("jetmoe")
    with pytest.raises(UnsupportedModelError, match="jetmoe's attention experts make queries"):
        align_(model, pair_plan(model))
