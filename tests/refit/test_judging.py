"""A refit that does not help on held-out tokens is not taken, and that is said."""

import copy
from typing import Any

import pytest
import torch

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.errors import CalibrationError
from lit_moe.refit import LayerRefit, RefitOptions, RefitReport, refit
from lit_moe.refit.judge import held_out_loss
from lit_moe.testing import tiny_moe
from tests.refit.models import (
    assert_same_state,
    downs_of,
    half_of,
    halved,
    held_rows,
    logits_of,
    scrambled,
    state_of,
    text_for,
)

MODES = ("sequential", "parallel")


@pytest.mark.parametrize("mode", MODES)
def test_a_layer_that_would_only_learn_by_heart_is_left_bit_identical_and_named(mode, no_judge):
    teacher, student = half_of("mixtral")
    state = state_of(student)
    # 84 tokens for 96 features without a penalty worth the name: noise is fitted.
    few = text_for(teacher, rows=8, length=12, batches=1)
    report: Any = refit(student, teacher, few, RefitOptions(mode=mode, lam=1e-6))
    assert_same_state(student, state)
    for name, layer in report.layers.items():
        assert not layer.kept
        assert layer.held_out_after > layer.held_out_before
        if mode == "sequential":
            assert layer.residual_after < 0.1 * layer.residual_before
        assert (
            f"refit left {name} as it was: the residual on held-out tokens did not fall "
            f"({layer.held_out_before:.4g} before, {layer.held_out_after:.4g} after)"
        ) in report.sentences()
    assert len(report.layers) == 2


def test_a_layer_that_was_left_does_not_stop_the_next(no_judge):
    teacher = tiny_moe("mixtral")
    student = scrambled(teacher, find_sites(teacher)[1:])
    state = state_of(student)
    report: Any = refit(
        student, teacher, text_for(teacher, rows=96, length=24), RefitOptions(lam=1e-8)
    )
    first, second = report.layers.values()
    assert (first.reason, first.lam) == ("nothing to correct", None)
    assert second.held_out_after < 1e-8
    assert_same_state(student, state, but=("layers.1.mlp.experts.down_proj",))


@torch.no_grad()
def spoken_by(model, *, rows, length):
    """Text that a model predicts well: each token is the likeliest one."""
    ids = torch.randint(3, 64, (rows, 1), generator=torch.Generator().manual_seed(0))
    for _ in range(length - 1):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_refit_that_raises_the_held_out_loss_is_undone_bit_for_bit_and_says_so(family, mode):
    teacher, student = half_of(family)
    state = state_of(student)
    text = spoken_by(student, rows=32, length=16)
    report: Any = refit(student, teacher, text, RefitOptions(mode=mode))
    assert any(layer.kept for layer in report.layers.values())
    assert report.loss_after > report.loss_before
    assert not report.kept
    assert_same_state(student, state)
    assert report.sentences()[-1] == (
        f"the refit was undone: it raised the held-out loss from {report.loss_before:.4g} to "
        f"{report.loss_after:.4g}; give more calibration tokens or text closer to the test"
    )


@pytest.mark.parametrize("mode", MODES)
def test_a_refit_that_lowers_the_held_out_loss_is_taken(mode):
    teacher, student = half_of("mixtral")
    text = spoken_by(teacher, rows=64, length=16)
    held = [{k: v[held_rows(64)] for k, v in text[0].items()}]
    before = held_out_loss(student, teacher, held)
    report: Any = refit(student, teacher, text, RefitOptions(mode=mode))
    assert report.kept
    assert report.loss_before == pytest.approx(before, rel=1e-6)
    assert report.loss_after == pytest.approx(held_out_loss(student, teacher, held), rel=1e-6)
    assert report.loss_after < report.loss_before
    assert not report.sentences()


def test_the_loss_of_text_is_nats_per_next_token_without_padding():
    model = tiny_moe("mixtral")
    (batch,) = text_for(model, rows=3, batches=1)
    batch["attention_mask"][1, 10:] = 0
    log_p = torch.log_softmax(logits_of(model, batch), dim=-1)
    nats = [
        -float(log_p[row, i - 1, batch["input_ids"][row, i]])
        for row, length in enumerate((16, 10, 16))
        for i in range(1, length)
    ]
    expected = sum(nats) / len(nats)
    assert held_out_loss(model, model, [batch]) == pytest.approx(expected, rel=1e-5)
    split = [{k: v[:1] for k, v in batch.items()}, {k: v[1:] for k, v in batch.items()}]
    assert held_out_loss(model, model, split) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("family", ["switch_transformers", "openai_privacy_filter"])
def test_the_loss_of_other_models_is_the_divergence_from_the_teacher(family):
    teacher = tiny_moe(family)
    student = halved(teacher)
    (batch,) = text_for(teacher, rows=3, batches=1)
    p, q = (torch.log_softmax(logits_of(m, batch).double(), -1) for m in (teacher, student))
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert held_out_loss(student, teacher, [batch]) == pytest.approx(expected, rel=1e-6)
    assert held_out_loss(teacher, teacher, [batch]) == 0


@pytest.mark.parametrize("family", ["switch_transformers", "openai_privacy_filter"])
def test_padding_and_idle_rows_count_for_nothing_in_the_divergence(family):
    teacher = tiny_moe(family)
    student = halved(teacher)
    (batch,) = text_for(teacher, rows=3, batches=1)
    batch["attention_mask"][1, 10:] = 0
    p, q = (torch.log_softmax(logits_of(m, batch).double(), -1) for m in (teacher, student))
    divergence = (p.exp() * (p - q)).sum(-1)
    counted = batch["attention_mask"].bool()
    if "decoder_input_ids" in batch:  # the mask is the encoder's
        counted = torch.ones_like(counted)
    expected = float(divergence[counted].mean())
    found = held_out_loss(student, teacher, [batch])
    assert found == pytest.approx(expected, rel=1e-6)
    idle = {name: torch.cat([rows, rows[:1]]) for name, rows in batch.items()}
    idle["attention_mask"][-1] = 0
    assert held_out_loss(student, teacher, [idle]) == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize("solver", ["joint", "jacobi", "gauss_seidel"])
@pytest.mark.parametrize("mode", MODES)
def test_experts_that_see_no_token_are_left_bit_identical_and_listed(mode, solver, no_judge):
    teacher = tiny_moe("gpt_oss")
    for layer in teacher.model.layers:
        layer.mlp.router.bias.data[[2, 5]] = -1e4
    student = scrambled(teacher)
    before = downs_of(student)
    options = RefitOptions(mode=mode, solver=solver)
    report = refit(student, teacher, text_for(teacher), options)
    for name, tensors in downs_of(student).items():
        assert report.layers[name].unrouted == [2, 5]
        sentence = f"experts [2, 5] of {name} saw no token of the fit and were left as they were"
        assert sentence in report.sentences()
        for key, tensor in tensors.items():
            assert torch.equal(tensor[[2, 5]], before[name][key][[2, 5]])
            assert not torch.equal(tensor[[0, 1]], before[name][key][[0, 1]])


def test_layers_that_cannot_be_refitted_are_named_with_the_reason(no_judge):
    teacher, student = half_of("jetmoe")
    state = state_of(student)
    report = refit(student, teacher, text_for(teacher))
    assert sorted(report.skipped) == [f"model.layers.{i}.self_attention.experts" for i in (0, 1)]
    for name, why in report.skipped.items():
        assert f"{name} was not refitted: {why}" in report.sentences()
    assert_same_state(student, state, but=("mlp.output_linear",))


def test_activations_that_are_not_finite_are_refused_and_nothing_is_changed(no_judge):
    teacher = tiny_moe("mixtral")
    student = copy.deepcopy(teacher)
    adapter_for(student.config).set_top_k(student, 1)
    with torch.no_grad():
        teacher.model.layers[1].mlp.experts.down_proj[:, 0, 0] = float("inf")
    state = state_of(student)
    with pytest.raises(CalibrationError, match="not finite on the calibration text"):
        refit(student, teacher, text_for(teacher))
    assert_same_state(student, state)


def test_the_report_says_nothing_of_layers_that_went_well():
    report = RefitReport("sequential", layers={"a": LayerRefit(kept=True)})
    assert report.sentences() == []
