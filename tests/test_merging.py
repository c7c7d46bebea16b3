"""What a merge makes of weights, routers and configs, over all layouts in memory."""

import copy

import pytest
import torch

from lit_moe.adapters import adapter_for, count_experts, find_sites
from lit_moe.errors import PlanError
from lit_moe.masking import masked
from lit_moe.merge_plan import MergePlan
from lit_moe.merging import merge
from lit_moe.models import sharing_copy
from lit_moe.plan import KeepPlan
from lit_moe.surgery import shrink
from lit_moe.testing import FAMILIES, example_inputs, random_plan, tiny_moe

LAYOUTS = (
    "mixtral",  # fused, (out, in)
    "olmoe",  # not renormalised
    "gpt_oss",  # transposed, interleaved, biases
    "dbrx",  # experts one under the other
    "switch_transformers",  # a module per expert
    "deepseek_v3",  # groups and a selection bias
    "longcat_flash",  # identity experts behind the routed ones
    "jetmoe",
    "llama4",
    "gemma4",  # a scale per expert
    "diffusion_gemma",  # encoder and decoder share experts
    "zaya",  # an MLP as router
)
layouts = pytest.mark.parametrize("family", [f for f in LAYOUTS if f in FAMILIES])
others = pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(LAYOUTS)))


def uniform_pairs(model):
    """Return a plan that averages experts 2n and 2n + 1."""
    maps = {}
    for site in find_sites(model):
        maps[site.name] = torch.eye(site.num_experts // 2).repeat_interleave(2, dim=1) / 2
    return MergePlan(maps, maps)


@torch.no_grad()
def logits_of(model, inputs):
    return model(**inputs).logits


def assert_equal_states(one, other):
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def check_one_hot(family):
    model = tiny_moe(family)
    plan = random_plan(model)
    cut, merged = copy.deepcopy(model), model
    report = shrink(cut, plan)
    assert merge(merged, MergePlan.from_keep_plan(plan)) == report
    assert_equal_states(cut, merged)
    assert merged.config.to_dict() == cut.config.to_dict()
    inputs = example_inputs(model)
    assert torch.equal(logits_of(cut, inputs), logits_of(merged, inputs))


def check_pairs(family, folder):
    """Averages, their places and the reload; a sharing copy of the model stays whole."""
    model = tiny_moe(family)
    inputs = example_inputs(model)
    if any(site.rows("id_table") for site in find_sites(model)):
        with pytest.raises(PlanError, match="a table of token ids"):
            merge(model, uniform_pairs(model))
        return
    whole, full = sharing_copy(model), logits_of(model, inputs)
    adapter = adapter_for(model.config)
    before = {s.name: weights_and_router(model, adapter, s) for s in find_sites(model)}
    merge(model, uniform_pairs(model))
    for site in find_sites(model):
        for name, value in weights_and_router(model, adapter, site).items():
            old = before[site.name][name]
            expected = ((old[::2].double() + old[1::2].double()) / 2).to(old.dtype)
            assert torch.equal(value, expected), name
    assert torch.equal(logits_of(whole, inputs), full)
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder).eval()
    theirs = model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in again.state_dict().items())
    # Equal tensors at other addresses: some processors' matrix products round differently there.
    torch.testing.assert_close(
        logits_of(again, inputs), logits_of(model, inputs), rtol=0, atol=1e-5
    )


def weights_and_router(model, adapter, site):
    weights = adapter.expert_weights(model, site)
    copies = {name: tensor.detach().clone() for name, tensor in weights.items()}
    return {**copies, "router": adapter.router_weight(model, site).detach().clone()}


@layouts
def test_a_one_hot_plan_is_a_shrink_bit_for_bit(family):
    check_one_hot(family)


@layouts
def test_new_experts_are_averages_in_their_places(family, tmp_path):
    check_pairs(family, tmp_path)


@pytest.mark.slow
@others
def test_a_one_hot_plan_is_a_shrink_bit_for_bit_in_every_family(family):
    check_one_hot(family)


@pytest.mark.slow
@others
def test_new_experts_are_averages_in_every_family(family, tmp_path):
    check_pairs(family, tmp_path)


@layouts
def test_the_identity_changes_nothing(family):
    model = tiny_moe(family)
    before, config = copy.deepcopy(model), copy.deepcopy(model.config.to_dict())
    report = merge(
        model, MergePlan.from_keep_plan(KeepPlan.identity(count_experts(find_sites(model))))
    )
    assert_equal_states(before, model)
    assert model.config.to_dict() == config
    assert report.params_before == report.params_after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_duplicating_an_expert_and_merging_the_pair_gives_the_original(dtype):
    original = tiny_moe("gpt_oss", num_experts=6)
    doubled = tiny_moe("gpt_oss", num_experts=8, seed=1)
    for model in (original, doubled):
        torch.nn.Module.to(model, dtype)
    sources = (0, 1, 1, 2, 3, 4, 4, 5)
    state = doubled.state_dict()
    axes = {a.name: a.dim for site in find_sites(original) for a in site.axes}
    for name, tensor in original.state_dict().items():
        ids = torch.tensor(sources)
        state[name].copy_(tensor.index_select(axes[name], ids) if name in axes else tensor)
    maps = torch.zeros(6, 8)
    for old, new in enumerate(sources):
        maps[new, old] = 1 / sources.count(new)
    plan = {site.name: maps for site in find_sites(doubled)}
    merge(doubled, MergePlan(plan, plan))
    assert_equal_states(original, doubled)
    inputs = example_inputs(original)
    assert torch.equal(logits_of(original, inputs), logits_of(doubled, inputs))


def test_experts_and_router_rows_follow_maps_of_their_own():
    model = tiny_moe("mixtral")
    rows = model.model.layers[0].mlp.gate.weight.detach().clone()
    plan = uniform_pairs(model)
    first = torch.zeros(4, 8)
    first[range(4), range(0, 8, 2)] = 1.0
    merge(model, MergePlan(plan.experts, dict.fromkeys(plan, first)))
    assert torch.equal(model.model.layers[0].mlp.gate.weight, rows[::2])


def test_groups_in_any_order_and_overlapping_rows_are_possible():
    model = tiny_moe("mixtral")
    down = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    rows = torch.zeros(3, 8)
    rows[0, 7], rows[1, [0, 7]], rows[2, 3] = 1.0, torch.tensor([0.5, -0.5]), 1.0
    plan = dict.fromkeys(count_experts(find_sites(model)), rows)
    merge(model, MergePlan(plan, plan))
    new = model.model.layers[0].mlp.experts.down_proj
    assert torch.equal(new[0], down[7])
    assert torch.equal(new[2], down[3])
    torch.testing.assert_close(new[1], (down[0] - down[7]) / 2)


def test_sums_are_taken_in_float64():
    model = tiny_moe("mixtral")
    torch.nn.Module.to(model, torch.bfloat16)
    down = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    rows = torch.full((2, 8), 1 / 8)
    plan = dict.fromkeys(count_experts(find_sites(model)), rows)
    merge(model, MergePlan(plan, plan))
    new = model.model.layers[0].mlp.experts.down_proj
    assert new.dtype == torch.bfloat16
    assert torch.equal(new[0], down.double().mean(0).to(torch.bfloat16))


def test_a_layer_can_keep_its_experts_while_others_are_merged():
    model = tiny_moe("mixtral")
    down = model.model.layers[1].mlp.experts.down_proj.detach().clone()
    maps = {"model.layers.0.mlp": torch.eye(4).repeat_interleave(2, 1) / 2}
    maps["model.layers.1.mlp"] = torch.eye(8)
    merge(model, MergePlan(maps, maps))
    assert count_experts(find_sites(model)) == {"model.layers.0.mlp": 4, "model.layers.1.mlp": 8}
    assert torch.equal(model.model.layers[1].mlp.experts.down_proj, down)


def test_requires_grad_stays():
    model = tiny_moe("mixtral")
    model.model.layers[0].mlp.experts.down_proj.requires_grad_(False)
    merge(model, uniform_pairs(model))
    assert not model.model.layers[0].mlp.experts.down_proj.requires_grad
    assert model.model.layers[0].mlp.experts.gate_up_proj.requires_grad


def refused(model, plan, message, error=PlanError):
    before = copy.deepcopy(model)
    with pytest.raises(error, match=message):
        merge(model, plan)
    assert_equal_states(before, model)


def test_fewer_experts_than_the_router_picks_are_refused():
    model = tiny_moe("mixtral")
    plan = dict.fromkeys(count_experts(find_sites(model)), torch.full((1, 8), 1 / 8))
    refused(model, MergePlan(plan, plan), r"1 of 8 experts cannot stay \(its router picks 2\)")


def test_experts_of_different_routing_groups_are_not_merged():
    model = tiny_moe("deepseek_v3")
    rows = torch.zeros(4, 8)
    for new, members in enumerate([(0, 4), (1, 5), (2, 6), (3, 7)]):
        rows[new, list(members)] = 0.5
    plan = dict.fromkeys(count_experts(find_sites(model)), rows)
    refused(model, MergePlan(plan, plan), "groups of 4 experts")


def test_a_plan_of_another_family_is_refused():
    model = tiny_moe("mixtral")
    refused(model, uniform_pairs(model).made_for(family="olmoe"), "family is 'olmoe'")


def test_a_masked_router_is_refused():
    model = tiny_moe("mixtral")
    with masked(model, random_plan(model)):
        refused(model, uniform_pairs(model), "a router mask is attached", RuntimeError)


def test_offloaded_experts_are_refused():
    model = tiny_moe("mixtral")
    plan = uniform_pairs(model)
    model.model.layers[1].mlp.experts.to("meta")
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp\.experts.* is offloaded"):
        merge(model, plan)


def test_experts_of_different_shapes_are_refused():
    model = tiny_moe("switch_transformers")
    plan = uniform_pairs(model)
    expert = model.get_submodule(f"{find_sites(model)[0].experts}.expert_3")
    expert.register_module("wi", torch.nn.Linear(32, 30, bias=False))
    refused(model, plan, r"expert_3 has matrices of shape .* only experts of one shape")
