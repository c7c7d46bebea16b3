import json

import pytest
import torch

from lit_moe.errors import PlanError
from lit_moe.merge_plan import MergePlan
from lit_moe.merging import apply_plan
from lit_moe.plan import KeepPlan
from lit_moe.plans import load_plan, only_drops, plan_from_dict
from lit_moe.testing import random_plan, tiny_moe

PAIRS = {"a": torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 1.0, 0]])}
KEEP, MERGE = KeepPlan({"a": (0, 2)}, {"a": 4}), MergePlan(PAIRS, PAIRS)


@pytest.mark.parametrize("plan", [KEEP, MERGE], ids=["keep", "merge"])
def test_a_plan_comes_back_as_what_it_was(plan, tmp_path):
    assert plan_from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    plan.save(tmp_path / "plan.json")
    assert load_plan(tmp_path / "plan.json") == plan


def test_what_is_no_plan_is_refused(tmp_path):
    with pytest.raises(PlanError, match="expected a format of .*keep-plan/1.*found 'x'"):
        plan_from_dict({"format": "x"})
    with pytest.raises(PlanError, match="does not exist"):
        load_plan(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(PlanError, match="is not JSON"):
        load_plan(tmp_path / "broken.json")


def test_only_a_plan_that_drops_says_which_experts_are_left():
    assert only_drops(None, purpose="x") is None
    assert only_drops(KEEP, purpose="x") is KEEP
    assert only_drops(MergePlan.from_keep_plan(KEEP), purpose="x") == KEEP
    with pytest.raises(PlanError, match=r"pairing needs .* expert 0 of a is made of \[0, 1\]"):
        only_drops(MERGE, purpose="pairing")


def test_both_kinds_name_what_experts_are_made_of():
    assert KEEP.members("a") == ((0,), (2,))
    assert MERGE.members("a") == ((0, 1), (2,))


def test_both_kinds_are_applied():
    one, other = tiny_moe("mixtral"), tiny_moe("mixtral")
    plan = random_plan(one)
    assert apply_plan(one, plan) == apply_plan(other, MergePlan.from_keep_plan(plan))
    theirs = other.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())
