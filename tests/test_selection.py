"""Which experts stay: uniform, grouped, global, protected, tied."""

import itertools

import pytest
import torch

from lit_moe.adapters.site import MoESite
from lit_moe.errors import LitMoEError
from lit_moe.plan import KeepPlan
from lit_moe.selection import (
    Budget,
    ModelBytes,
    keep_top_overall,
    keep_top_per_group,
    keep_top_per_layer,
    layer_rules,
    select,
)

INF = float("inf")


def site(name, num_experts, top_k=1, num_groups=1, top_k_groups=1):
    return MoESite(name, 0, "", "", num_experts, top_k, num_groups, top_k_groups)


def scores(**layers):
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in layers.items()}


def test_expert_never_routed_to_is_dropped_first():
    plan = keep_top_per_layer(scores(mlp=[5.0, 0.0, 2.0]), keep=2)
    assert plan == KeepPlan({"mlp": (0, 2)}, {"mlp": 3})


def test_five_line_call_keeps_the_best_half_of_each_layer():
    plan = select(scores(a=[1.0, 4.0, 3.0, 2.0], b=[9.0, 8.0, 7.0, 6.0]), keep_ratio=0.5)
    assert plan.kept == {"a": (1, 2), "b": (0, 1)}
    assert plan.keep_ratio == 0.5


def test_layers_may_keep_different_numbers():
    plan = keep_top_per_layer(scores(a=[1.0, 2.0], b=[3.0, 2.0, 1.0]), keep={"a": 1, "b": 2})
    assert plan.kept == {"a": (1,), "b": (0, 1)}


def test_ties_are_broken_by_the_lower_id():
    assert select(scores(a=[2.0] * 6), keep_experts=3).kept == {"a": (0, 1, 2)}
    assert select(scores(a=[1.0, 2.0, 1.0, 2.0, 1.0]), keep_experts=3).kept == {"a": (0, 1, 3)}


def test_ratio_rounds_to_the_nearest_count_halves_up_and_plan_tells_the_effective_ratio():
    nine = scores(a=[float(e) for e in range(9)])
    assert select(nine, keep_ratio=0.5).counts == {"a": 5}
    assert select(nine, keep_ratio=0.49).counts == {"a": 4}
    assert select(nine, keep_ratio=0.5).keep_ratio == 5 / 9
    ten = scores(a=[float(e) for e in range(10)])
    assert select(ten, keep_ratio=0.35).counts == {"a": 4}


def test_groups_keep_equal_numbers_of_their_own_best():
    grouped = site("mlp", 8, top_k=2, num_groups=2, top_k_groups=1)
    values = scores(mlp=[8.0, 7.0, 6.0, 5.0, 1.0, 2.0, 3.0, 4.0])
    assert select(values, keep_ratio=0.5, sites=[grouped]).kept == {"mlp": (0, 1, 6, 7)}
    assert keep_top_per_group(values, 4, 2).kept == {"mlp": (0, 1, 6, 7)}
    assert keep_top_per_layer(values, 4).kept == {"mlp": (0, 1, 2, 3)}


def test_ratio_rounds_to_whole_rows_of_groups():
    grouped = site("mlp", 16, top_k=2, num_groups=4, top_k_groups=2)
    values = scores(mlp=[float(e) for e in range(16)])
    assert select(values, keep_ratio=0.7, sites=[grouped]).counts == {"mlp": 12}


def test_layer_that_is_small_already_keeps_what_it_has():
    values = scores(a=[1.0, 2.0, 3.0], b=[1.0, 2.0, 3.0, 4.0, 5.0])
    assert select(values, keep_experts=4).kept == {"a": (0, 1, 2), "b": (1, 2, 3, 4)}


def test_protected_experts_stay_whatever_they_score():
    values = scores(a=[1.0, 2.0, 3.0, 4.0], b=[1.0, 2.0, 3.0, 4.0])
    plan = select(values, keep_ratio=0.5, protect=["a:0"])
    assert plan.kept == {"a": (0, 3), "b": (2, 3)}
    assert select(values, keep_ratio=0.5, protect={"a": [0]}) == plan


def test_protected_experts_count_within_their_group():
    grouped = site("mlp", 8, top_k=2, num_groups=2, top_k_groups=1)
    values = scores(mlp=[8.0, 7.0, 6.0, 5.0, 1.0, 2.0, 3.0, 4.0])
    plan = select(values, keep_ratio=0.5, sites=[grouped], protect=["mlp:3,4"])
    assert plan.kept == {"mlp": (0, 3, 4, 7)}


def test_protected_layers_keep_everything_on_top_of_the_ratio():
    values = scores(**{"layers.0.mlp": [1.0, 2.0, 3.0, 4.0], "layers.1.mlp": [1.0, 2.0, 3.0, 4.0]})
    plan = select(values, keep_ratio=0.5, protect=["layers.0.*"])
    assert plan.counts == {"layers.0.mlp": 4, "layers.1.mlp": 2}


def test_protection_beats_even_infinite_scores():
    plan = select(scores(a=[INF, INF, INF, -INF]), keep_experts=2, protect=["a:3"])
    assert plan.kept == {"a": (0, 3)}


def test_infinite_scores_force_the_order_not_the_count():
    assert select(scores(a=[INF, 5.0, -INF, 6.0]), keep_experts=2).kept == {"a": (0, 3)}
    assert select(scores(a=[-INF, -INF, -INF, 6.0]), keep_experts=2).kept == {"a": (0, 3)}


def test_one_ranking_over_all_layers_gives_unequal_counts():
    values = scores(a=[10.0, 9.0, 8.0, 1.0], b=[7.0, 2.0, 1.0, 0.0])
    budget = Budget(keep_ratio=0.5, scope="global", normalise=False)
    assert select(values, budget=budget).kept == {"a": (0, 1, 2), "b": (0,)}


def test_global_ranking_leaves_each_layer_its_floor_and_its_top_k():
    values = scores(a=[10.0, 9.0, 8.0, 7.0], b=[4.0, 3.0, 2.0, 1.0])
    plain = Budget(keep_ratio=0.5, scope="global", normalise=False)
    assert select(values, budget=plain).counts == {"a": 3, "b": 1}
    floored = Budget(keep_ratio=0.5, scope="global", normalise=False, floor=2)
    assert select(values, budget=floored).kept == {"a": (0, 1), "b": (0, 1)}
    sites = [site("a", 4, top_k=2), site("b", 4, top_k=2)]
    assert select(values, budget=plain, sites=sites).counts == {"a": 2, "b": 2}


def test_standardised_layers_are_compared_by_shape_not_size():
    values = scores(a=[1000.0, 1001.0, 1002.0, 2000.0], b=[1.0, 2.0, 3.0, 4.0])
    raw = Budget(keep_experts=2, scope="global", normalise=False)
    assert select(values, budget=raw).counts == {"a": 3, "b": 1}
    # a: -0.58 -0.578 -0.576 1.73; b: -1.34 -0.45 0.45 1.34
    even = Budget(keep_experts=2, scope="global")
    assert select(values, budget=even).kept == {"a": (3,), "b": (1, 2, 3)}


def test_standardising_ignores_infinite_scores_and_layers_without_spread():
    values = scores(a=[INF, 1.0, 2.0, -INF], b=[3.0, 3.0, 3.0, 3.0])
    budget = Budget(keep_experts=2, scope="global")
    assert select(values, budget=budget).kept == {"a": (0, 2), "b": (0, 1)}


def test_global_ranking_takes_groups_row_by_row():
    grouped, plain = site("a", 4, top_k=1, num_groups=2), site("b", 4)
    values = scores(a=[9.0, 1.0, 5.0, 1.0], b=[8.0, 6.0, 0.0, 0.0])
    # Two per group are the least that group-limited routing works with, so a keeps all four.
    budget = Budget(keep_experts=3, scope="global", normalise=False)
    assert select(values, budget=budget, sites=[grouped, plain]).kept == {
        "a": (0, 1, 2, 3),
        "b": (0, 1),
    }
    rules = layer_rules([site("a", 6, 1, 2, 1), plain])
    values = scores(a=[9.0, 7.0, 1.0, 5.0, 3.0, 4.0], b=[8.0, 2.4, 2.6, 0.0])
    # Rows of a: (0, 3), (1, 5) are needed, (2, 4) scores 2.0.
    assert keep_top_overall(values, 6, rules).kept == {"a": (0, 1, 3, 5), "b": (0, 2)}
    assert keep_top_overall(values, 9, rules).kept == {"a": (0, 1, 2, 3, 4, 5), "b": (0, 1, 2)}


def test_global_ranking_counts_protected_layers_and_experts():
    values = scores(a=[0.0, 0.1, 0.2, 0.3], b=[9.0, 8.0, 7.0, 6.0])
    budget = Budget(keep_ratio=0.5, scope="global", normalise=False)
    plan = select(values, budget=budget, protect=["a:0,1"])
    assert plan.kept == {"a": (0, 1), "b": (0, 1)}


def test_byte_budget_keeps_the_most_experts_that_fit():
    sizes = ModelBytes(fixed=100, per_expert={"a": 10, "b": 10})
    values = scores(a=[1.0, 2.0, 3.0, 4.0], b=[8.0, 7.0, 6.0, 5.0])
    assert select(values, budget=Budget(max_bytes=165, sizes=sizes)).counts == {"a": 3, "b": 3}
    assert select(values, budget=Budget(max_bytes=160, sizes=sizes)).counts == {"a": 3, "b": 3}
    assert select(values, budget=Budget(max_bytes=159, sizes=sizes)).counts == {"a": 2, "b": 2}
    overall = Budget(max_bytes=159, sizes=sizes, scope="global", normalise=False)
    assert select(values, budget=overall).kept == {"a": (3,), "b": (0, 1, 2, 3)}


def test_byte_budget_passes_over_an_expert_that_no_longer_fits():
    sizes = ModelBytes(fixed=0, per_expert={"a": 50, "b": 10})
    values = scores(a=[9.0, 8.0, 7.0], b=[3.0, 2.0, 1.0])
    budget = Budget(max_bytes=95, sizes=sizes, scope="global", normalise=False)
    assert select(values, budget=budget).kept == {"a": (0,), "b": (0, 1, 2)}


def test_smaller_budget_keeps_a_subset():
    generator = torch.Generator().manual_seed(0)
    values = {f"l{i}": torch.rand(16, generator=generator) for i in range(4)}
    for scope in ("layer", "global"):
        plans = [select(values, budget=Budget(keep_experts=n, scope=scope)) for n in range(1, 16)]
        for small, large in itertools.pairwise(plans):
            assert all(set(small.kept[name]) <= set(large.kept[name]) for name in values)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_permuting_experts_permutes_the_plan(scope):
    generator = torch.Generator().manual_seed(1)
    values = {f"l{i}": torch.rand(12, generator=generator) for i in range(3)}
    order = torch.randperm(12, generator=generator)
    budget = Budget(keep_ratio=0.4, scope=scope)
    plan = select(values, budget=budget)
    moved = select({name: v[order] for name, v in values.items()}, budget=budget)
    for name in values:
        assert {int(order[e]) for e in moved.kept[name]} == set(plan.kept[name])


def test_plan_follows_the_order_of_the_sites():
    values = scores(b=[1.0, 2.0], a=[1.0, 2.0])
    plan = select(values, keep_experts=1, sites=[site("a", 2), site("b", 2)])
    assert list(plan) == ["a", "b"]


def test_budget_and_shortcut_together_are_refused():
    with pytest.raises(LitMoEError, match="either a budget or keep_ratio"):
        select(scores(a=[1.0, 2.0]), keep_ratio=0.5, budget=Budget(keep_experts=1))


def test_no_amount_at_all_is_refused():
    with pytest.raises(LitMoEError, match=r"exactly one of keep_ratio.*got none"):
        select(scores(a=[1.0, 2.0]))


def test_scores_of_another_model_are_refused():
    with pytest.raises(LitMoEError, match="layer 'b' has no scores and 4 experts"):
        select(scores(a=[1.0, 2.0]), keep_experts=1, sites=[site("a", 2), site("b", 4)])
    with pytest.raises(LitMoEError, match="layer 'a' has 2 scores and 4 experts"):
        select(scores(a=[1.0, 2.0]), keep_experts=1, sites=[site("a", 4)])
    with pytest.raises(LitMoEError, match="layer 'z' has 2 scores and no experts"):
        select(scores(a=[1.0, 2.0], z=[1.0, 2.0]), keep_experts=1, sites=[site("a", 2)])


def test_nan_scores_name_their_layer():
    with pytest.raises(LitMoEError, match="layer 'b' has NaN"):
        select(scores(a=[1.0, 2.0], b=[1.0, float("nan")]), keep_experts=1)


def test_no_scores_are_refused():
    with pytest.raises(LitMoEError, match="no scores"):
        select({}, keep_ratio=0.5)
