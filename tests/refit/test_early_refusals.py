"""Refusals that come before anything is observed."""

import pytest

from lit_moe.errors import CalibrationError, LitMoEError
from lit_moe.plan import KeepPlan
from lit_moe.refit import check_expert_ids, check_num_rows


def plan_of(*ids, experts=8, layer="layers.0"):
    return KeepPlan({layer: ids}, {layer: experts})


def test_a_teacher_without_an_expert_of_the_student_is_no_relative():
    with pytest.raises(LitMoEError, match=r"experts \[0, 3\] of layers.0 .* without \[3\]"):
        check_expert_ids(plan_of(0, 1, 2), plan_of(0, 3))
    check_expert_ids(plan_of(0, 1, 3), plan_of(0, 3))


def test_plans_of_other_models_or_layers_are_not_compared():
    check_expert_ids(plan_of(0, 1, experts=16), plan_of(0, 3))
    check_expert_ids(plan_of(0, 1, layer="layers.1"), plan_of(0, 3))


@pytest.mark.parametrize(("held_out", "least"), [(0.25, 4), (0.1, 10), (0.9, 2)])
def test_too_few_rows_are_refused_with_the_number_that_is_needed(held_out, least):
    assert check_num_rows(least, held_out) == least
    with pytest.raises(CalibrationError, match=f"more rows, {least} at least"):
        check_num_rows(least - 1, held_out)
