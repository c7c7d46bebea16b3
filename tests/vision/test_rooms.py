"""Merging, sparsity, weights, sharing and export work on V-MoEs as on language models."""

import copy

import pytest
import torch

import lit_moe
from lit_moe.adapters import count_experts, find_sites
from lit_moe.errors import LitMoEError
from lit_moe.masking import masked
from lit_moe.merge_plan import MergePlan
from lit_moe.merging import merge
from lit_moe.plan import KeepPlan
from lit_moe.sparsity import measure_sparsity, sparsify
from lit_moe.surgery import shrink
from lit_moe.testing import random_plan
from lit_moe.testing.vision import VARIANTS, example_images, tiny_vmoe

every_variant = pytest.mark.parametrize("variant", VARIANTS)


@torch.no_grad()
def logits_of(model):
    return model(**example_images(model)).logits


@pytest.mark.parametrize("variant", ["delete", "expert_choice", "ensemble_delete"])
def test_a_one_hot_merge_is_a_drop(variant):
    model = tiny_vmoe(variant)
    plan, cut = random_plan(model), copy.deepcopy(model)
    shrink(cut, plan)
    merge(model, MergePlan.from_keep_plan(plan))
    assert torch.equal(logits_of(model), logits_of(cut))


@every_variant
def test_merged_pairs_are_averages_and_leave_no_rows_behind(variant, tmp_path):
    model = tiny_vmoe(variant)
    name = "vit.layers.1.mlp.experts.up_proj"
    expected = model.get_parameter(name).detach().unflatten(0, (4, 2)).mean(dim=1)
    pairs = torch.eye(4).repeat_interleave(2, dim=1) / 2
    maps = {site.name: pairs for site in find_sites(model)}
    merge(model, MergePlan(maps, maps))
    torch.testing.assert_close(model.get_parameter(name).detach(), expected)
    assert model.get_parameter("vit.layers.1.mlp.router.weight").shape == (4, 32)
    assert model.config.num_null_experts == 0
    assert lit_moe.export(model, tmp_path / "out").max_abs_logit_difference == 0


@every_variant
@pytest.mark.parametrize("method", ["wanda", "moe_pruner"])
def test_weights_are_thinned(variant, method):
    model = tiny_vmoe(variant)
    sparsify(model, [example_images(model)], method=method, pattern="2:4")
    for matrices in measure_sparsity(model).values():
        assert set(matrices.values()) == {0.5}


@every_variant
def test_unequal_layers_are_exported_and_load_plainly(variant, tmp_path):
    model = tiny_vmoe(variant)
    first, second = find_sites(model)
    kept = {first.name: tuple(range(8)), second.name: (0, 5)}
    shrink(model, KeepPlan(kept, {first.name: 8, second.name: 8}))
    result = lit_moe.export(model, tmp_path / "out")
    assert (result.layout, result.max_abs_logit_difference) == ("plain", 0.0)
    again = lit_moe.load(tmp_path / "out")
    assert count_experts(find_sites(again)) == {first.name: 8, second.name: 2}
    assert torch.equal(logits_of(again), logits_of(model))


def test_a_dead_slot_gives_nothing_and_others_keep_their_gates():
    model = tiny_vmoe("zero", num_experts_per_tok=1, eval_capacity_factor=None)
    block, hidden = model.get_submodule("vit.layers.1.mlp"), torch.randn(2, 17, 32)
    with torch.no_grad():
        whole = block(hidden)
        chosen = block.get_submodule("router")(hidden)[2].view(2, 17)
    dead = chosen == chosen[0, 0]
    sites = count_experts(find_sites(model))
    kept = tuple(e for e in range(8) if e != int(chosen[0, 0]))
    plan = KeepPlan(dict.fromkeys(sites, kept), sites)
    with masked(model, plan), torch.no_grad():
        hidden_out = block(hidden)
    shrink(model, plan)
    with torch.no_grad():
        out = block(hidden)
    for result in (hidden_out, out):
        assert result[dead].abs().max() == 0
        torch.testing.assert_close(result[~dead], whole[~dead], rtol=0, atol=1e-6)


def test_expert_choice_loses_exactly_the_contribution_of_the_dropped():
    model = tiny_vmoe("expert_choice")
    block, hidden = model.get_submodule("vit.layers.1.mlp"), torch.randn(2, 17, 32)
    sites = count_experts(find_sites(model))
    parts = []
    for kept in ((0, 1, 2), (3, 4, 5, 6, 7), tuple(range(8))):
        small = copy.deepcopy(model)
        shrink(small, KeepPlan(dict.fromkeys(sites, kept), sites))
        with torch.no_grad():
            parts.append(small.get_submodule("vit.layers.1.mlp")(hidden))
    torch.testing.assert_close(parts[0] + parts[1], parts[2], rtol=0, atol=1e-5)
    assert torch.equal(parts[2], block(hidden).detach())


def test_unknown_experts_of_an_ensemble_are_refused():
    with pytest.raises((LitMoEError, ValueError), match="9 experts cannot be shared out equally"):
        tiny_vmoe("ensemble", num_experts=9)


def test_a_member_of_an_ensemble_can_be_left_with_one_expert():
    model = tiny_vmoe("ensemble", num_experts_per_tok=1)
    scores = lit_moe.score(model, "router_norm")
    plan = lit_moe.select(scores, keep_ratio=0.25, sites=find_sites(model))
    for kept in plan.kept.values():
        assert [e // 4 for e in kept] == [0, 1]
