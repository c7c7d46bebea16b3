import math

import torch

from lit_moe.distill.losses import (
    load_balancing_loss,
    logits_distillation_loss,
    next_token_loss,
    next_token_nll,
)

ONES = torch.ones(1, 3, dtype=torch.long)


def test_uniform_logits_cost_log_vocabulary_per_token():
    logits = torch.zeros(1, 3, 5)
    ids = torch.tensor([[0, 1, 2]])
    torch.testing.assert_close(next_token_nll(logits, ids, ONES), torch.full((1, 2), math.log(5)))
    assert math.isclose(float(next_token_loss(logits, ids, ONES)), math.log(5), rel_tol=1e-6)


def test_each_token_is_predicted_from_the_one_before():
    logits = torch.full((1, 3, 4), -50.0)
    ids = torch.tensor([[3, 1, 2]])
    logits[0, 0, 1] = logits[0, 1, 2] = 50.0
    assert float(next_token_loss(logits, ids, ONES)) < 1e-6


def test_padding_neither_costs_nor_dilutes():
    torch.manual_seed(0)
    logits, ids = torch.randn(1, 3, 4), torch.tensor([[0, 1, 2]])
    mask = torch.tensor([[1, 1, 0]])
    nll = next_token_nll(logits, ids, ONES)
    torch.testing.assert_close(next_token_loss(logits, ids, mask), nll[0, 0])


def test_distillation_is_zero_for_equal_logits_and_the_kl_divergence_otherwise():
    teacher = torch.log(torch.tensor([[[0.5, 0.25, 0.25]]]))
    student = torch.log(torch.tensor([[[0.25, 0.5, 0.25]]]))
    mask = torch.ones(1, 1)
    same = logits_distillation_loss(teacher, teacher, mask, temperature=1.0)
    assert abs(float(same)) < 1e-7
    other = logits_distillation_loss(student, teacher, mask, temperature=1.0)
    expected = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.5)
    assert math.isclose(float(other), expected, rel_tol=1e-5)


def test_distillation_gradient_scale_does_not_vanish_with_temperature():
    torch.manual_seed(0)
    teacher, mask = torch.randn(1, 1, 8) * 0.1, torch.ones(1, 1)
    norms = []
    for temperature in (1.0, 10.0):
        student = torch.zeros(1, 1, 8, requires_grad=True)
        logits_distillation_loss(student, teacher, mask, temperature=temperature).backward()
        assert student.grad is not None
        norms.append(float(student.grad.norm()))
    assert math.isclose(norms[0], norms[1], rel_tol=0.2)


def test_load_balance_is_one_when_even_and_up_to_experts_over_k_when_collapsed():
    even = torch.eye(4)
    assert math.isclose(float(load_balancing_loss([even], [1])), 1.0)
    collapsed = torch.zeros(6, 4)
    collapsed[:, 2] = 1.0
    assert math.isclose(float(load_balancing_loss([collapsed], [1])), 4.0)


def test_load_balance_takes_layers_of_different_widths():
    layers = [torch.eye(4), torch.eye(3)]
    assert math.isclose(float(load_balancing_loss(layers, [1, 1])), 1.0)
