import math

import pytest
import torch

from lit_moe.compare.agreement import agreement_map, jaccard, rank_correlations
from lit_moe.errors import PlanError
from lit_moe.plan import KeepPlan

SIZES = {"a": 4, "b": 3}


def plan(a, b):
    return KeepPlan({"a": a, "b": b}, SIZES)


def test_jaccard_counts_experts_that_both_drop():
    one, other = plan((0, 1), (0, 1)), plan((1, 2), (0, 1))
    assert jaccard(one, one) == 1
    assert jaccard(one, other) == (1 + 1) / (3 + 1)
    assert jaccard(one, other, ["a"]) == 1 / 3
    assert jaccard(one, other, ["b"]) == 1
    assert jaccard(plan((0, 1, 2), (0, 1, 2)), plan((0, 1, 2, 3), (0, 1, 2))) == 0
    whole = plan((0, 1, 2, 3), (0, 1, 2))
    assert math.isnan(jaccard(whole, whole))


def test_plans_of_different_models_are_refused():
    with pytest.raises(PlanError, match="different models"):
        jaccard(plan((0,), (0,)), KeepPlan({"a": (0,)}, {"a": 4}))


def test_the_map_is_symmetric_with_ones_on_its_diagonal():
    plans = {"x": plan((0, 1), (0,)), "y": plan((2, 3), (0,)), "z": plan((0, 3), (1,))}
    found = agreement_map(plans)
    assert found.names == ("x", "y", "z")
    assert torch.equal(found.overall, found.overall.T)
    assert torch.equal(found.overall.diagonal(), torch.ones(3, dtype=torch.float64))
    assert found.overall[0, 1] == 2 / 6
    assert found.layers["a"][0, 1] == 0
    assert found.layers["b"][0, 1] == 1


def test_ranks_are_compared_within_layers_and_averaged():
    scores = {
        "up": {"a": torch.tensor([1.0, 2, 3, 4]).double(), "b": torch.tensor([1.0, 2, 3]).double()},
        "mixed": {
            "a": torch.tensor([10.0, 20, 30, 40]).double(),
            "b": torch.tensor([3.0, 2, float("-inf")]).double(),
        },
        "flat": {"a": torch.ones(4).double(), "b": torch.tensor([0.0, 5, 9]).double()},
    }
    found = rank_correlations(scores)
    assert found.layers["a"][0, 1] == pytest.approx(1)
    assert found.layers["b"][0, 1] == pytest.approx(-1)
    assert found.overall[0, 1] == pytest.approx(0)
    assert found.layers["a"][0, 2].isnan()
    assert found.overall[0, 2] == pytest.approx(1)
