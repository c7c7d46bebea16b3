"""Counts and sets of experts that routers can work with; literal numbers."""

import pytest

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.adapters.legality import check_keep, check_top_k, legal_counts
from lit_moe.adapters.site import MoESite
from lit_moe.errors import PlanError
from lit_moe.testing import tiny_moe


def site(num_experts, top_k, num_groups=1, top_k_groups=1):
    return MoESite("layers.0", 0, "e", "r", num_experts, top_k, num_groups, top_k_groups)


def test_without_groups_the_router_needs_top_k_experts():
    assert legal_counts(site(6, 2), None) == (2, 3, 4, 5, 6)


def test_groups_stay_equal_and_reachable_experts_suffice():
    assert legal_counts(site(16, 3, 4, 2), "top2") == (8, 12, 16)
    assert legal_counts(site(16, 5, 4, 2), "top2") == (12, 16)
    assert legal_counts(site(16, 2, 4, 2), "max") == (4, 8, 12, 16)


def test_a_group_scored_by_its_two_best_needs_two():
    assert legal_counts(site(8, 1), "top2") == (2, 3, 4, 5, 6, 7, 8)
    assert legal_counts(site(8, 1), "max") == (1, 2, 3, 4, 5, 6, 7, 8)


def test_too_few_names_the_numbers_and_the_nearest():
    with pytest.raises(PlanError, match=r"1 of 6 experts cannot stay \(its router picks 2\).*: 2"):
        check_keep(site(6, 2), [3], None)


def test_an_odd_count_names_both_neighbours():
    with pytest.raises(PlanError, match="multiples of 4; nearest possible: 8 or 12|: 8 or 12"):
        check_keep(site(16, 2, 4, 2), range(9), "top2")


def test_unequal_groups_are_refused_with_their_sizes():
    with pytest.raises(PlanError, match=r"\[3, 1\] per group, keep 2 of each"):
        check_keep(site(8, 2, 2, 1), [0, 1, 2, 7], "top2")


def test_equal_groups_pass():
    check_keep(site(8, 2, 2, 1), [0, 3, 5, 7], "top2")


def test_top_k_beyond_the_reachable_experts_is_refused():
    with pytest.raises(PlanError, match="top_k=5 but a token can reach 4 of its 8"):
        check_top_k(site(8, 2, 2, 1), 5, fixed=False)
    check_top_k(site(8, 2, 2, 1), 4, fixed=False)


@pytest.mark.parametrize("family", ["phimoe", "switch_transformers", "zaya", "jetmoe"])
def test_families_that_fix_top_k_refuse_another(family):
    model = tiny_moe(family)
    top_k = find_sites(model)[0].top_k
    with pytest.raises(PlanError, match=f"always uses {top_k} experts"):
        adapter_for(model.config).set_top_k(model, top_k + 1)


def test_longcat_refuses_the_one_top_k_its_code_cannot_run():
    model = tiny_moe("longcat_flash")
    adapter = adapter_for(model.config)
    with pytest.raises(PlanError, match="cannot run with top_k=1"):
        adapter.set_top_k(model, 1)
    adapter.set_top_k(model, 2)
    assert find_sites(model)[0].top_k == 2


def test_group_limits_are_read_from_the_config():
    limited = find_sites(tiny_moe("deepseek_v3", n_group=4, topk_group=2))[0]
    assert (limited.num_groups, limited.top_k_groups) == (4, 2)
    all_groups = find_sites(tiny_moe("deepseek_v3", n_group=4, topk_group=4))[0]
    assert (all_groups.num_groups, all_groups.top_k_groups) == (1, 1)
    greedy = find_sites(tiny_moe("deepseek_v2", topk_method="greedy"))[0]
    assert (greedy.num_groups, greedy.top_k_groups) == (1, 1)
    none = find_sites(tiny_moe("axk2", n_group=None, topk_group=None))[0]
    assert (none.num_groups, none.top_k_groups) == (1, 1)
