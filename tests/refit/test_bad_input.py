"""Requests that cannot be met: one sentence each, and nothing is changed."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lit_moe.errors import CalibrationError, LitMoEError, NotAnMoEError, UnsupportedModelError
from lit_moe.models import check_unwritten, sharing_copy
from lit_moe.refit import RefitOptions, refit
from lit_moe.testing import tiny_moe
from tests.refit.models import assert_same_state, half_of, state_of, text_for


def refused(student, teacher, error, match, *, batches=None, **options):
    """Assert that a refit raises and leaves both models as they were."""
    states = [state_of(model) for model in (student, teacher)]
    given = text_for(teacher) if batches is None else batches
    with pytest.raises(error, match=match) as caught:
        refit(student, teacher, given, RefitOptions(**options))
    assert "\n" not in str(caught.value)
    for model, state in zip((student, teacher), states, strict=True):
        assert_same_state(model, state)


def test_a_student_that_is_its_own_teacher():
    model = tiny_moe("mixtral")
    refused(
        model, model, LitMoEError, "the same model, so there is nothing to correct; keep a copy"
    )


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size"])
def test_a_teacher_of_other_sizes(key):
    _, student = half_of("mixtral")
    other = tiny_moe("mixtral", **{key: 48})
    ours = getattr(student.config, key)
    sizes = rf"{key} is 48 in the teacher \(mixtral\) and {ours} in the student"
    refused(student, other, LitMoEError, f"no relatives: {sizes}; give the model that")


def test_a_teacher_with_too_few_layers():
    deep = tiny_moe("mixtral", num_hidden_layers=3)
    shallow = copy.deepcopy(deep)
    del shallow.model.layers[2]
    _, student = half_of("mixtral", num_hidden_layers=3)
    match = r"the teacher \(mixtral\) has no module 'model\.layers\.2\.mlp'; give the model that"
    refused(student, shallow, LitMoEError, match)


def test_a_teacher_of_another_family():
    student = tiny_moe("deepseek_v2")
    teacher = tiny_moe("granitemoe")
    match = r"the teacher \(granitemoe\) has no module 'model\.layers\.0\.mlp'"
    refused(student, teacher, LitMoEError, match)


def test_a_stranger_of_the_same_sizes():
    _, student = half_of("mixtral")
    stranger = tiny_moe("mixtral", seed=1)
    match = r"sizes agree, but the cosine between their embeddings is -?0\.\d\d; give the model"
    refused(student, stranger, LitMoEError, match)


def test_a_dense_student():
    teacher = tiny_moe("mixtral")
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")
    config = LlamaConfig(num_hidden_layers=2, **{k: getattr(teacher.config, k) for k in fields})
    student = LlamaForCausalLM(config)
    with pytest.raises(NotAnMoEError, match="llama is a dense model"):
        refit(student, teacher, text_for(teacher))


def test_a_student_none_of_whose_layers_can_be_refitted():
    teacher, student = half_of("muse_spark")
    match = r"layers\.1\.mlp of MuseSpark\w+ cannot be refitted: .*something nonlinear follows"
    refused(student, teacher, UnsupportedModelError, match)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lam": -0.1}, r"lam=-0\.1 is negative; give a number >= 0 or auto"),
        ({"held_out": 0.0}, r"held_out=0 must be in \(0, 0\.5\], for instance 0\.125"),
        ({"held_out": 0.75}, r"held_out=0\.75 must be in \(0, 0\.5\]"),
        ({"memory_gib": 0.0}, "memory_gib=0 must be above 0"),
        ({"router": True, "mode": "parallel"}, "router: true needs mode: sequential"),
    ],
)
def test_options_that_mean_nothing(options, match):
    with pytest.raises(LitMoEError, match=match):
        RefitOptions(**options)


@pytest.mark.parametrize("solver", ["joint", "jacobi", "gauss_seidel"])
@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_no_penalty_and_fewer_tokens_than_features(mode, solver):
    teacher, student = half_of("mixtral")
    few = text_for(teacher, rows=8, length=3, batches=1)
    refused(
        student,
        teacher,
        LitMoEError,
        r"Gram matrix of \d+ features is singular with lam=0: give a larger lam, more calibration",
        batches=few,
        lam=0.0,
        mode=mode,
        solver=solver,
    )


@pytest.mark.parametrize("solver", ["auto", "joint"])
def test_a_budget_too_small_for_anything(solver):
    teacher, student = half_of("mixtral")
    match = r"memory_gib=1e-06 leaves .* needs at least .* 4 experts of width 24: set memory_gib to"
    refused(student, teacher, LitMoEError, match, memory_gib=1e-6, solver=solver)


def test_no_batch():
    teacher, student = half_of("mixtral")
    refused(student, teacher, CalibrationError, "there is no calibration batch", batches=[])


@pytest.mark.parametrize(("rows", "held_out", "every"), [(7, 0.125, 8), (1, 0.5, 2)])
def test_too_few_rows_to_hold_one_out(rows, held_out, every):
    teacher, student = half_of("mixtral")
    refused(
        student,
        teacher,
        CalibrationError,
        rf"{rows} calibration rows are too few to hold out one in {every}: give more rows",
        batches=text_for(teacher, rows=rows, batches=1),
        held_out=held_out,
    )


def test_just_enough_rows_are_enough(no_judge):
    teacher, student = half_of("mixtral")
    report = refit(student, teacher, text_for(teacher, rows=8, batches=1))
    assert (report.tokens, report.held_out_tokens) == (7 * 16, 16)
    assert all(torch.isfinite(p).all() for p in student.parameters())


def test_a_teacher_that_shares_tensors_written_in_place_is_refused():
    student = tiny_moe("mixtral")
    teacher = sharing_copy(student)
    check_unwritten(teacher)
    with torch.no_grad():
        student.model.layers[1].mlp.experts.down_proj.mul_(0.5)
    with pytest.raises(LitMoEError, match=r"layers.1.mlp.experts.down_proj was written in place"):
        refit(student, teacher, text_for(student))
