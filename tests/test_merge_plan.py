import json
from dataclasses import replace

import pytest
import torch

from lit_moe.errors import PlanError
from lit_moe.merge_plan import MergePlan
from lit_moe.plan import KeepPlan

PAIRS = torch.tensor([[0.25, 0.75, 0, 0], [0, 0, 1 / 3, 2 / 3]])
SINGLE = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1.0]])


def plan_of(**layers):
    return MergePlan(layers, layers)


@pytest.mark.parametrize("suffix", ["json", "safetensors"])
def test_a_plan_comes_back_from_a_file_to_the_last_digit(tmp_path, suffix):
    thirds = torch.tensor([[1 / 3, 2 / 3, 0, 0], [0, 0, 0.1, -0.7]], dtype=torch.float64)
    plan = MergePlan({"b": thirds, "a": SINGLE}, {"b": SINGLE, "a": SINGLE}, "mixtral", "folder")
    plan.save(tmp_path / f"plan.{suffix}")
    again = MergePlan.load(tmp_path / f"plan.{suffix}")
    assert again == plan
    assert list(again) == ["b", "a"]
    assert (again.family, again.source) == ("mixtral", "folder")
    assert again.experts["b"][0, 0] == 1 / 3
    mixed = replace(plan, router_space="probabilities", top_k=1, replayable=False)
    mixed.save(tmp_path / f"mixed.{suffix}")
    again = MergePlan.load(tmp_path / f"mixed.{suffix}")
    assert again == mixed
    assert again != plan
    assert not again.replayable


def test_a_router_map_equal_to_the_expert_map_is_not_written_twice():
    data = plan_of(a=PAIRS).to_dict()
    assert list(data["layers"]["a"]) == ["num_experts", "experts"]
    assert data["layers"]["a"]["experts"][0] == {"0": 0.25, "1": 0.75}
    assert data["format"] == "lit-moe/merge-plan/1"


def test_a_keep_plan_is_the_one_hot_case():
    keep = KeepPlan({"a": (0, 3), "b": (1, 2, 3)}, {"a": 4, "b": 4}, "mixtral", "folder")
    plan = MergePlan.from_keep_plan(keep)
    assert plan.experts["a"].tolist() == SINGLE.tolist()
    assert plan.as_keep_plan() == keep
    assert plan.members("b") == ((1,), (2,), (3,))
    assert not plan.is_identity
    assert MergePlan.from_keep_plan(KeepPlan.identity({"a": 4})).is_identity


@pytest.mark.parametrize(
    ("experts", "router"), [(PAIRS, PAIRS), (SINGLE, PAIRS), (SINGLE.flip(0), SINGLE.flip(0))]
)
def test_a_plan_that_does_more_than_drop_is_no_keep_plan(experts, router):
    assert MergePlan({"a": experts}, {"a": router}).as_keep_plan() is None


def test_a_plan_knows_its_numbers():
    plan = plan_of(a=PAIRS, b=SINGLE)
    assert plan.num_experts == {"a": 4, "b": 4}
    assert plan.counts == {"a": 2, "b": 2}
    assert plan.keep_ratio == 0.5
    assert plan.members("a") == ((0, 1), (2, 3))


def test_where_a_plan_comes_from_is_not_what_it_is():
    assert plan_of(a=PAIRS).made_for(family="mixtral") == plan_of(a=PAIRS)
    assert plan_of(a=PAIRS) != plan_of(a=SINGLE)
    assert plan_of(a=PAIRS) != plan_of(b=PAIRS)
    assert MergePlan({"a": PAIRS}, {"a": SINGLE}) != plan_of(a=PAIRS)


def test_later_changes_of_the_tensors_given_do_not_change_the_plan():
    mine = PAIRS.double().clone()
    plan = plan_of(a=mine)
    mine.zero_()
    assert plan.experts["a"][0, 1] == 0.75


@pytest.mark.parametrize(
    ("experts", "routers", "message"),
    [
        ({"a": PAIRS}, {"b": PAIRS}, r"layers \['a', 'b'\] in only one"),
        ({"a": PAIRS}, {"a": PAIRS[:1]}, r"must have one shape .* \(2, 4\) and \(1, 4\)"),
        ({"a": PAIRS[0]}, {"a": PAIRS[0]}, "must have one shape"),
        ({"a": PAIRS.T}, {"a": PAIRS.T}, "2 experts cannot become 4; 1 to 2"),
        ({"a": PAIRS[:0]}, {"a": PAIRS[:0]}, "4 experts cannot become 0"),
        ({"a": PAIRS / 0}, {"a": PAIRS}, "not finite"),
        ({"a": PAIRS}, {"a": PAIRS / 0}, "not finite"),
        ({"a": PAIRS * torch.tensor([[1.0], [0.0]])}, {"a": PAIRS}, "expert 1 is made of no old"),
    ],
)
def test_a_malformed_plan_is_refused(experts, routers, message):
    with pytest.raises(PlanError, match=message):
        MergePlan(experts, routers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "lit-moe/keep-plan/1"}, "not a merge plan"),
        ({"router_space": "logits"}, "act on rows or probabilities here; .* act on 'logits"),
        ({"top_k": 3}, "top_k=3 of 2 experts"),
        ({"layers": {"a": {"experts": []}}}, "damaged"),
        ({"layers": {"a": {"num_experts": 2, "experts": [{"2": 1.0}]}}}, "expert '2' of 2"),
        ({"layers": {"a": {"num_experts": 2, "experts": [{"-1": 1.0}]}}}, "expert '-1' of 2"),
        ({"layers": 3}, "damaged"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change, message):
    data = {**plan_of(a=PAIRS).to_dict(), **change}
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match=message):
        MergePlan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("name", ["plan.json", "plan.safetensors"])
def test_a_file_that_is_missing_or_no_plan_is_refused(tmp_path, name):
    with pytest.raises(PlanError, match="does not exist"):
        MergePlan.load(tmp_path / name)
    (tmp_path / name).write_text("not a plan")
    with pytest.raises(PlanError, match="is not JSON|no safetensors file"):
        MergePlan.load(tmp_path / name)


def test_a_plan_of_another_model_is_refused():
    plan = plan_of(a=PAIRS).made_for(family="mixtral")
    plan.check_fits({"a": 4}, family="mixtral")
    with pytest.raises(PlanError, match="'a' has 4 experts in the plan and 8 experts in the model"):
        plan.check_fits({"a": 8})
    with pytest.raises(PlanError, match="family is 'mixtral', this model is 'olmoe'"):
        plan.check_fits({"a": 4}, family="olmoe")
