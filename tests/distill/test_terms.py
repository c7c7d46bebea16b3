"""Labels, and the terms that compare routers, by hand."""

import copy
import math
from typing import Any, cast

import pytest
import torch

from lit_moe.distill.losses import router_distillation_loss
from lit_moe.distill.recovery import RecoveryLoss
from lit_moe.distill.step import Ranks, Step, targets_of
from lit_moe.distill.terms import LogitsDistillation, NextToken
from lit_moe.distill.weights import LossWeights
from lit_moe.models import frozen_copy
from lit_moe.surgery import shrink
from lit_moe.testing import example_inputs, random_plan, tiny_moe


def step_of(logits, batch, teacher_logits=None, ranks=None):
    step = Step(cast(Any, None), None, batch)
    if ranks is not None:
        step.ranks = ranks
    step.logits, step.teacher_logits = logits, teacher_logits
    return step


@pytest.fixture
def batch():
    ids = torch.tensor([[0, 1, 2, 3]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_only_tokens_with_a_label_are_to_be_predicted(batch):
    torch.manual_seed(0)
    logits = torch.randn(1, 4, 5)
    labels = torch.tensor([[-100, -100, 2, 3]])
    log_p = torch.log_softmax(logits, dim=-1)[0]
    by_hand = -(log_p[1, 2] + log_p[2, 3]) / 2
    value = NextToken(1.0).value(step_of(logits, {**batch, "labels": labels}))
    torch.testing.assert_close(value, by_hand)
    padded = {**batch, "labels": labels, "attention_mask": torch.tensor([[1, 1, 1, 0]])}
    torch.testing.assert_close(NextToken(1.0).value(step_of(logits, padded)), -log_p[1, 2])


def test_labels_for_all_tokens_change_nothing(batch):
    torch.manual_seed(0)
    logits = torch.randn(1, 4, 5)
    with_labels = {**batch, "labels": batch["input_ids"]}
    first = NextToken(1.0).value(step_of(logits, batch))
    torch.testing.assert_close(NextToken(1.0).value(step_of(logits, with_labels)), first)


def test_distillation_compares_the_predictions_of_tokens_with_a_label(batch):
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 4, 5), torch.randn(1, 4, 5)
    term = LogitsDistillation(1.0, temperature=1.0)
    p, q = torch.softmax(teacher, -1)[0], torch.softmax(student, -1)[0]
    kl_S = (p * (p / q).log()).sum(-1)
    labelled = {**batch, "labels": torch.tensor([[-100, -100, 2, -100]])}
    torch.testing.assert_close(term.value(step_of(student, labelled, teacher)), kl_S[1])
    torch.testing.assert_close(term.value(step_of(student, batch, teacher)), kl_S.mean())


def test_ranks_with_unequal_numbers_of_labels_average_to_the_mean_over_all_tokens(batch):
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 5)
    labels = torch.tensor([[-100, 1, 2, 3], [-100, -100, -100, 3]])
    rows = [{**batch, "labels": labels[i : i + 1]} for i in range(2)]
    both = {k: torch.cat([row[k] for row in rows]) for k in rows[0]}
    whole = NextToken(1.0).value(step_of(logits, both))
    ranks = Ranks(2, lambda count: torch.full_like(count, 4))
    shares = [
        NextToken(1.0).value(step_of(logits[i : i + 1], rows[i], None, ranks)) for i in (0, 1)
    ]
    torch.testing.assert_close(torch.stack(shares).mean(), whole)


def test_a_batch_without_any_label_costs_nothing(batch):
    logits = torch.randn(1, 4, 5, requires_grad=True)
    value = NextToken(1.0).value(step_of(logits, {**batch, "labels": torch.full((1, 4), -100)}))
    value.backward()
    assert float(value.detach()) == 0.0
    assert logits.grad is not None
    assert not bool(logits.grad.any())


def test_the_first_token_needs_no_prediction(batch):
    targets = targets_of({**batch, "labels": torch.tensor([[0, -100, 2, -100]])})
    assert targets.predicting.tolist() == [[0, 1, 0, 0]]


def test_router_distillation_is_the_kl_divergence_of_normalised_scores():
    teacher = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
    student = torch.tensor([[0.25, 0.5, 0.25], [0.3, 0.3, 0.4]])
    first = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    mask = torch.tensor([1.0, 0.0])
    assert float(router_distillation_loss(student, teacher, mask)) == pytest.approx(first)
    scores = router_distillation_loss(0.3 * student, 0.7 * teacher, mask)
    assert float(scores) == pytest.approx(first)
    assert abs(float(router_distillation_loss(teacher, teacher, torch.ones(2)))) < 1e-7


def test_a_router_never_asked_for_an_expert_gives_a_finite_loss():
    teacher, student = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]], requires_grad=True)
    loss = router_distillation_loss(student, teacher, torch.ones(1))
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    assert student.grad is not None
    assert bool(student.grad.isfinite().all())


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen3_moe"])
def test_routers_of_survivors_agree_before_anything_else_differs(family):
    model = tiny_moe(family)
    teacher, batch = frozen_copy(model), example_inputs(model)
    loss = RecoveryLoss(LossWeights(router=1.0))
    same = loss(Step(copy.deepcopy(model), teacher, batch))
    assert abs(float(same.values["router"].detach())) < 1e-6
    student, plan = copy.deepcopy(model), random_plan(model)
    shrink(student, plan)
    recovery = loss(Step(student, teacher, batch, plan=plan))
    layers = [value for name, value in recovery.details.items() if name.startswith("router/")]
    assert abs(float(layers[0])) < 1e-6  # it reads what the teacher reads
    recovery.total.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
