"""From a model and text to a merged model."""

import copy
import math
import warnings
from typing import Any

import pytest
import torch

from lit_moe.adapters import count_experts, find_sites
from lit_moe.errors import CalibrationError, LitMoEError, NoEffectWarning, UnsupportedModelError
from lit_moe.grouping import (
    LearnOptions,
    MergeOptions,
    SegmentOptions,
    apply,
    available,
    decide,
    report_of,
)
from lit_moe.merge_plan import MergePlan
from lit_moe.merging import merge
from lit_moe.report.coding import from_plain, to_plain
from lit_moe.stats import observe
from lit_moe.testing import example_inputs, run_distributed, tiny_moe
from tests.grouping.models import copies, counts_of, logits_of, shuffled, text_for

RECIPES: dict[str, dict[str, Any]] = {
    **{name: {"similarity": name} for name in available()},
    "average": {"partition": "average", "coefficients": "frequency"},
    "spectral": {"partition": "spectral", "coefficients": "reap"},
    "centroids": {"partition": "centroids", "coefficients": "reap", "align": True},
    "learned": {"coefficients": "learned", "learn": LearnOptions(epochs=2)},
    "max_visited": {"coefficients": "max_visited", "router": "keep"},
    "dern": {"segments": SegmentOptions(tau=0.2)},
}
LIKENESS = [name for name in available() if name != "coactivation"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_makes_so_many_experts(recipe):
    model = tiny_moe("mixtral")
    before = copy.deepcopy(model)
    decision = decide(model, counts_of(model, 5), text_for(model), MergeOptions(**RECIPES[recipe]))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before.state_dict()[name])
    for layer, map_NE in decision.plan.experts.items():
        assert map_NE.shape == (5, 8)
        torch.testing.assert_close(map_NE.sum(1), torch.ones(5, dtype=torch.float64))
        assert (map_NE >= 0).all()
        assert decision.plan.counts[layer] == 5
    assert decision.plan.family == "mixtral"
    apply(model, decision)
    assert set(count_experts(find_sites(model)).values()) == {5}
    assert logits_of(model, example_inputs(model)).isfinite().all()


@pytest.mark.parametrize("similarity", LIKENESS)
def test_copies_fall_into_one_group_and_merging_them_gives_the_model_back(similarity):
    """With one expert per token, a renormalised gate is 1 whichever of two copies is asked."""
    model = copies(num_experts_per_tok=1)
    inputs = example_inputs(model)
    before = logits_of(model, inputs)
    options = MergeOptions(similarity=similarity)
    decision = decide(model, counts_of(model, 6), text_for(model), options)
    for layer in decision.plan:
        assert decision.plan.members(layer) == ((0,), (1, 4), (2,), (3, 6), (5,), (7,))
    apply(model, decision)
    torch.testing.assert_close(logits_of(model, inputs), before, rtol=1e-5, atol=1e-6)


def test_shuffled_copies_need_alignment():
    model = shuffled(copies(num_experts_per_tok=1), (4, 6))
    inputs = example_inputs(model)
    before = logits_of(model, inputs)
    off = {}
    for align in (False, True):
        merged = copy.deepcopy(model)
        decision = decide(merged, counts_of(merged, 6), text_for(merged), MergeOptions(align=align))
        assert decision.plan.members("model.layers.0.mlp")[1] == (1, 4)
        moved = apply(merged, decision)
        assert (moved is None) == (not align)
        off[align] = float((logits_of(merged, inputs) - before).abs().max())
    assert off[True] < 1e-5 < 1e-2 < off[False]


def test_dern_takes_copies_up_and_gives_the_model_back():
    model = copies(num_experts_per_tok=1)
    inputs = example_inputs(model)
    before = logits_of(model, inputs)
    options = MergeOptions(segments=SegmentOptions(tau=0.99))
    protected = {site.name: (0, 1, 2, 3, 5, 7) for site in find_sites(model)}
    decision = decide(model, counts_of(model, 6), text_for(model), options, protected=protected)
    for layer, merged in report_of(decision, options).layers.items():
        assert merged.groups == [[0], [1, 4], [2], [3, 6], [5], [7]], layer
        assert merged.coefficients[1] == [1.0, 1.0]
    apply(model, decision)
    torch.testing.assert_close(logits_of(model, inputs), before, rtol=1e-4, atol=1e-5)


def test_what_is_merged_by_frequency_weighs_the_tokens():
    model = tiny_moe("mixtral")
    options = MergeOptions(similarity="weights", coefficients="frequency")
    decision = decide(model, counts_of(model, 2), text_for(model), options)
    count = observe(model, text_for(model)).layers["model.layers.0.mlp"].count
    for row, members in zip(
        decision.plan.experts["model.layers.0.mlp"],
        decision.plan.members("model.layers.0.mlp"),
        strict=True,
    ):
        ids = list(members)
        torch.testing.assert_close(row[ids], count[ids] / count[ids].sum())


def test_router_rows_are_merged_or_kept():
    model = tiny_moe("mixtral")
    for router in ("merge", "keep"):
        options = MergeOptions(similarity="weights", router=router)
        plan = decide(model, counts_of(model, 4), (), options).plan
        for layer in plan:
            rows = plan.routers[layer]
            assert torch.equal(rows, plan.experts[layer]) == (router == "merge")
            assert (rows.sum(1) - 1).abs().max() < 1e-12
            assert ((rows > 0) <= (plan.experts[layer] > 0)).all()
            if router == "keep":
                assert ((rows > 0).sum(1) == 1).all()


def test_protected_experts_stay_alone_and_routing_groups_apart():
    model = tiny_moe("deepseek_v3")
    sites = find_sites(model)
    protected = {site.name: (0, 5) for site in sites}
    plan = decide(
        model, counts_of(model, 4), (), MergeOptions(similarity="router"), protected=protected
    ).plan
    for site in sites:
        members = plan.members(site.name)
        assert (0,) in members
        assert (5,) in members
        assert all(len({e // 4 for e in ids}) == 1 for ids in members)
    merge(model, plan)
    assert logits_of(model, example_inputs(model)).isfinite().all()


def test_groups_of_one_everywhere_are_a_warning_and_change_nothing():
    model = tiny_moe("mixtral")
    with pytest.warns(NoEffectWarning, match="nothing is merged; ask for fewer groups than 8"):
        decision = decide(model, counts_of(model, 8))
    assert decision.plan.is_identity


def test_one_layer_may_keep_all_of_its_experts():
    model = tiny_moe("mixtral")
    counts = {**counts_of(model, 5), "model.layers.1.mlp": 8}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply(model, decide(model, counts, (), MergeOptions(similarity="weights")))
    assert count_experts(find_sites(model)) == counts


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (1, r"8 experts of which its router picks 2; they cannot become 1, but 2 to 8"),
        (9, "they cannot become 9, but 2 to 8"),
        (0, "they cannot become 0"),
    ],
)
def test_impossible_numbers_are_refused_before_anything_runs(count, message):
    model = tiny_moe("mixtral")
    with pytest.raises(LitMoEError, match=message):
        decide(model, counts_of(model, count), None)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"similarity": "weights"}, {"segments": SegmentOptions()}])
def test_more_protected_experts_than_there_will_be_are_refused(options):
    model = tiny_moe("mixtral")
    protected = {"model.layers.1.mlp": (0, 1, 2, 3, 4)}
    message = "5 of the 8 experts of model.layers.1.mlp are protected, so that they cannot become 4"
    with pytest.raises(LitMoEError, match=message):
        decide(model, counts_of(model, 4), (), MergeOptions(**options), protected=protected)


def test_a_layer_that_is_not_named_is_refused():
    with pytest.raises(LitMoEError, match=r"do not say how many experts 'model.layers.1.mlp'"):
        decide(tiny_moe("mixtral"), {"model.layers.0.mlp": 4})


@pytest.mark.parametrize("options", [{}, {"similarity": "weights", "coefficients": "frequency"}])
def test_missing_text_is_refused(options):
    model = tiny_moe("mixtral")
    with pytest.raises(CalibrationError, match="no calibration"):
        decide(model, counts_of(model, 4), [], MergeOptions(**options))


def test_experts_that_cannot_be_asked_are_refused_with_what_would_work():
    model = tiny_moe("switch_transformers")
    with pytest.raises(UnsupportedModelError, match="take a similarity of weights or router rows"):
        decide(model, counts_of(model, 4), text_for(model))
    apply(model, decide(model, counts_of(model, 4), (), MergeOptions(similarity="weights")))
    assert set(count_experts(find_sites(model)).values()) == {4}


def test_damaged_weights_are_found():
    model = tiny_moe("mixtral")
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj[0] = float("nan")
    with pytest.raises(LitMoEError, match="not finite|NaN"):
        decide(model, counts_of(model, 4), text_for(model))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"similarity": "cosine"}, "similarity='cosine' is unknown"),
        ({"partition": "kmeans"}, "partition='kmeans' is unknown; there are auto, exh"),
        ({"coefficients": "mean"}, "coefficients='mean' is unknown; there are uniform"),
        ({"router": "drop"}, "router='drop' is unknown; there are merge, keep"),
        ({"max_tokens": 0}, "max_tokens=0 must be a positive number"),
        ({"memory_gib": math.nan}, "memory_gib=nan must be a positive number"),
        ({"memory_gib": math.inf}, "memory_gib=inf must be a positive number"),
        ({"effort": math.nan}, "effort=nan must be a positive number"),
        ({"partition": "centroids"}, "take frequency, reap or max_visited"),
        ({"align": True, "coefficients": "learned"}, "take uniform, frequency or reap"),
    ],
)
def test_options_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(LitMoEError, match=message):
        MergeOptions(**fields)


@pytest.mark.distributed
@pytest.mark.parametrize("recipe", ["cka", "average", "coactivation", "learned", "dern"])
def test_two_ranks_with_half_of_the_rows_decide_as_one(recipe):
    model = tiny_moe("mixtral")
    batches = text_for(model, rows=16, batches=2)
    options = MergeOptions(**RECIPES[recipe], max_tokens=150)
    one = decide(model, counts_of(model, 4), batches, options)

    def work(rank):
        rows = {k: torch.cat([b[k] for b in batches])[rank::2] for k in batches[0]}
        share = [{k: v[i : i + 3] for k, v in rows.items()} for i in range(0, 8, 3)]
        mine = decide(tiny_moe("mixtral"), counts_of(model, 4), share, options)
        return mine.plan.to_dict(), dict(mine.similarity), mine.tokens

    first, second = run_distributed(work)
    assert first[0] == second[0]
    assert first[2] == one.tokens
    plan = MergePlan.from_dict(first[0])
    for layer in one.plan:
        assert plan.members(layer) == one.plan.members(layer)
        torch.testing.assert_close(
            plan.experts[layer], one.plan.experts[layer], rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            plan.routers[layer], one.plan.routers[layer], rtol=1e-4, atol=1e-5
        )
    for layer, similarity in one.similarity.items():
        torch.testing.assert_close(first[1][layer], similarity, rtol=1e-5, atol=1e-6)


def test_a_report_says_what_was_merged_and_comes_back_from_json():
    model = tiny_moe("mixtral")
    options = MergeOptions(similarity="router", coefficients="uniform")
    decision = decide(model, counts_of(model, 6), (), options)
    report = report_of(decision, options)
    assert report.recipe == "router, auto partition, uniform"
    layer = report.layers["model.layers.0.mlp"]
    assert layer.before == 8
    assert len(layer.groups) == 6
    assert [sum(values) for values in layer.coefficients] == pytest.approx([1] * 6)
    assert from_plain(type(report), to_plain(report), "merging") == report
