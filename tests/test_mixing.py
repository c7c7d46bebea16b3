"""Routers that mix the probabilities of experts before the top-k are taken."""

import copy

import pytest
import torch

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.errors import PlanError
from lit_moe.masking import RouterMask
from lit_moe.merge_plan import MergePlan
from lit_moe.merging import merge
from lit_moe.mixed_routing import CONFIG_KEY, Mixing, mixed
from lit_moe.mixing import mixed_layers, mixed_routing, mixings
from lit_moe.plan import KeepPlan
from lit_moe.surgery import shrink
from lit_moe.testing import example_inputs, random_plan, tiny_moe

MIXED = (
    "mixtral",
    "olmoe",  # not renormalised
    "gpt_oss",  # softmax after the top-k, biases
    "ernie4_5_moe",  # softmax, selection bias in a module of its own
    "glm4_moe",  # sigmoid, selection bias, scaled
    "granitemoe",
    "qwen3_next",
    "flint",
)
REFUSED = {
    "deepseek_v2": "limited to",
    "phimoe": "no softmax or sigmoid",
    "longcat_flash": "no routed ones",
    "minimax_m2": "outside its router",
}
mixable = pytest.mark.parametrize("family", MIXED)


def eyes(model):
    return {s.name: torch.eye(s.num_experts, dtype=torch.float64) for s in find_sites(model)}


def halves(model, seed=0):
    """Return random maps from all experts to half of them, near one-hot ones."""
    generator = torch.Generator().manual_seed(seed)
    maps = {}
    for site in find_sites(model):
        noise = torch.randn(site.num_experts // 2, site.num_experts, generator=generator)
        maps[site.name] = torch.eye(site.num_experts)[1::2] + 0.1 * noise
    return maps


@torch.no_grad()
def logits_of(model):
    return model(**example_inputs(model)).logits


def test_mixed_probabilities_by_hand():
    mixing = Mixing(router="", num_experts=3, routing="softmax", renormalised=True, scale=2.0)
    probs = torch.tensor([[0.5, 0.3, 0.2]])
    maps = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])  # mixed: 0.5 and 0.5
    maps[1, 1] = 1.5  # mixed: 0.5 and 0.65
    weights, index = torch.ones(1, 2), torch.tensor([[0, 1]])
    logits, gates, ids = mixed(mixing, maps, probs.log(), weights, index, None)
    assert ids.tolist() == [[1, 0]]
    torch.testing.assert_close(gates, 2 * torch.tensor([[0.65, 0.5]]) / 1.15)
    torch.testing.assert_close(logits.softmax(-1), torch.tensor([[0.5, 0.65]]) / 1.15)


def test_a_selection_bias_steers_the_choice_and_not_the_weights():
    mixing = Mixing(router="", num_experts=2, routing="sigmoid", renormalised=False)
    scores = torch.tensor([[0.6, 0.4]])
    bias = torch.tensor([0.0, 0.5])
    weights, index = torch.ones(1, 1), torch.tensor([[0]])
    _, gates, ids = mixed(mixing, torch.eye(2), scores.logit(), weights, index, bias)
    assert ids.tolist() == [[1]]
    torch.testing.assert_close(gates, torch.tensor([[0.4]]))


def test_weights_that_do_not_sum_to_something_positive_are_not_divided():
    mixing = Mixing(router="", num_experts=2, routing="softmax", renormalised=True)
    probs, maps = torch.tensor([[0.75, 0.25]]), -torch.eye(2)
    weights, index = torch.ones(1, 2), torch.tensor([[0, 1]])
    _, gates, _ = mixed(mixing, maps, probs.log(), weights, index, None)
    torch.testing.assert_close(gates, torch.tensor([[-0.25, -0.75]]))


@mixable
def test_identity_maps_change_nothing_and_leave_nothing(family):
    model = tiny_moe(family)
    before, keys = logits_of(model), list(model.state_dict())
    with mixed_routing(model, eyes(model)):
        torch.testing.assert_close(logits_of(model), before, rtol=1e-5, atol=1e-5)
        assert list(model.state_dict()) == keys
    assert torch.equal(logits_of(model), before)
    assert mixed_layers(model) == ()


@mixable
def test_merged_model_with_old_routers_computes_what_live_mixing_does(family):
    model = tiny_moe(family)
    maps = halves(model)
    experts = {name: torch.eye(m.shape[1])[1::2] for name, m in maps.items()}
    merged = copy.deepcopy(model)
    merge(merged, MergePlan(experts, maps, router_space="probabilities"))
    # Live: new expert n is old expert 2n + 1, so ids are spread by rows of zeros that never win.
    spread = {}
    for name, map_NE in maps.items():
        spread[name] = torch.full((map_NE.shape[1], map_NE.shape[1]), -1e3)
        spread[name][1::2] = map_NE
    with mixed_routing(model, spread):
        expected = logits_of(model)
    torch.testing.assert_close(logits_of(merged), expected, rtol=1e-5, atol=1e-5)
    assert set(mixed_layers(merged)) == set(maps)
    assert set(getattr(merged.config, CONFIG_KEY)) == set(maps)


@mixable
def test_one_hot_maps_drop_experts_where_weights_are_divided_by_their_sum(family):
    model = tiny_moe(family)
    plan = random_plan(model)
    cut = copy.deepcopy(model)
    shrink(cut, plan)
    one_hot = MergePlan.from_keep_plan(plan)
    merge(model, MergePlan(one_hot.experts, one_hot.routers, router_space="probabilities"))
    is_exact = family not in ("olmoe",)
    assert torch.equal(logits_of(model), logits_of(cut)) == is_exact
    assert bool(mixed_layers(model)) != is_exact


def test_one_expert_less_per_token():
    model = tiny_moe("mixtral")
    expected = copy.deepcopy(model)
    plan = MergePlan(eyes(model), eyes(model), router_space="probabilities", top_k=1)
    merge(model, plan)
    adapter_for(expected.config).set_top_k(expected, 1)
    assert torch.equal(logits_of(model), logits_of(expected))
    assert {site.top_k for site in find_sites(model)} == {1}


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_routers_that_cannot_be_mixed_are_refused_with_the_reason(family):
    with pytest.raises(PlanError, match=REFUSED[family]):
        mixings(tiny_moe(family))


def test_gradients_reach_old_rows_and_no_likeness():
    model = tiny_moe("mixtral").train()
    maps = halves(model)
    merge(model, MergePlan(maps, maps, router_space="probabilities"))
    model(**example_inputs(model)).logits.square().mean().backward()
    router = model.get_submodule(find_sites(model)[0].router)
    assert router.get_parameter("mixed_weight").grad.abs().sum() > 0
    assert not router.weight.requires_grad


def test_a_mixed_model_is_not_cut_merged_or_masked_again():
    model = tiny_moe("mixtral")
    maps = halves(model)
    merge(model, MergePlan(maps, maps, router_space="probabilities"))
    sites = find_sites(model)
    keep = KeepPlan({s.name: (0, 1) for s in sites}, {s.name: s.num_experts for s in sites})
    with pytest.raises(RuntimeError, match="mixes probabilities"):
        shrink(model, keep)
    with pytest.raises(RuntimeError, match="mixes probabilities"):
        merge(model, MergePlan.from_keep_plan(keep))
    with pytest.raises(RuntimeError, match="mixes probabilities"):
        RouterMask(model, keep).attach()
