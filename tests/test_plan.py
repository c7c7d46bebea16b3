"""A plan as a value: what makes two equal, what a file holds, which model it may be applied to."""

import json

import pytest

from lit_moe.adapters import count_experts, find_sites
from lit_moe.errors import PlanError
from lit_moe.masking import RouterMask
from lit_moe.plan import KeepPlan
from lit_moe.surgery import shrink
from lit_moe.testing import random_plan, tiny_moe

PLAN = KeepPlan({"a": (0, 2), "b": (1,)}, {"a": 3, "b": 2})
NAMED = PLAN.made_for(family="mixtral", source="somebody/mixtral")


def test_a_plan_of_a_file_is_the_plan_that_was_saved(tmp_path):
    NAMED.save(tmp_path / "plan.json")
    again = KeepPlan.load(tmp_path / "plan.json")
    assert again == NAMED
    assert (again.family, again.source) == ("mixtral", "somebody/mixtral")
    assert json.loads((tmp_path / "plan.json").read_text()) == {
        "format": "lit-moe/keep-plan/1",
        "model": {"family": "mixtral", "source": "somebody/mixtral"},
        "layers": {"a": {"num_experts": 3, "kept": [0, 2]}, "b": {"num_experts": 2, "kept": [1]}},
    }


def test_the_same_decision_is_the_same_plan_whatever_it_was_made_for():
    assert NAMED == PLAN
    assert PLAN.made_for(family="olmoe") == NAMED


def test_a_file_that_names_no_model_still_loads():
    old = {key: value for key, value in NAMED.to_dict().items() if key != "model"}
    again = KeepPlan.from_dict(old)
    assert again == PLAN
    assert (again.family, again.source) == (None, None)


@pytest.mark.parametrize("model", [["mixtral"], {"family": 7}, {"source": ["a", "b"]}])
def test_a_model_that_is_no_name_is_a_damaged_plan(model):
    with pytest.raises(PlanError, match="damaged"):
        KeepPlan.from_dict({**PLAN.to_dict(), "model": model})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"format": "lit-moe/keep-plan/0"}, "expected format 'lit-moe/keep-plan/1', found"),
        ({"layers": {"a": {"kept": [0]}}}, "'num_experts'.* is missing"),
        ({"layers": {"a": {"num_experts": 2, "kept": []}}}, "keeps no expert in layer 'a'"),
        ({"layers": {"a": {"num_experts": 2, "kept": [2]}}}, "has experts 0 to 1, plan keeps"),
        ({"layers": {"a": {"num_experts": 2, "kept": [1, 0]}}}, "must ascend without repeats"),
    ],
)
def test_a_damaged_plan_is_explained(damage, message):
    with pytest.raises(PlanError, match=message):
        KeepPlan.from_dict({**PLAN.to_dict(), **damage})


def test_a_plan_of_another_family_is_refused_though_all_shapes_agree():
    model = tiny_moe("mixtral")
    counts = count_experts(find_sites(model))
    plan = random_plan(model).made_for(family="olmoe")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for apply in (shrink, RouterMask):
        with pytest.raises(PlanError, match="its family is 'olmoe', this model is 'mixtral'"):
            apply(model, plan)
    assert all((tensor == before[name]).all() for name, tensor in model.state_dict().items())
    assert count_experts(find_sites(model)) == counts


def test_a_plan_of_the_same_family_or_of_none_is_applied():
    for family in ("mixtral", None):
        model = tiny_moe("mixtral")
        plan = random_plan(model).made_for(family=family, source="a sibling")
        report = shrink(model, plan)
        assert {kept for _, kept in report.layers.values()} == {4}


def test_a_family_that_neither_side_names_is_not_compared():
    PLAN.check_fits({"a": 3, "b": 2}, family="mixtral")
    NAMED.check_fits({"a": 3, "b": 2})
    with pytest.raises(PlanError, match="layer 'a' has 3 experts in the plan and 4 experts"):
        NAMED.check_fits({"a": 4, "b": 2}, family="mixtral")
