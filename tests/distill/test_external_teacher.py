"""A teacher that is not the model as it was loaded."""

import copy
import json

import lightning as L
import pytest
import torch
from transformers import AutoTokenizer

from lit_moe import MoEModule
from lit_moe.adapters import find_sites
from lit_moe.assets import model_folder
from lit_moe.callbacks import OneShotPruning, ReportWriter
from lit_moe.distill.pairing import Pairing
from lit_moe.distill.recovery import RecoveryLoss
from lit_moe.distill.step import Step
from lit_moe.distill.weights import LossWeights
from lit_moe.errors import LitMoEError
from lit_moe.export import export
from lit_moe.masking import masked
from lit_moe.models import frozen_copy
from lit_moe.module import OptimizerConfig, TeacherConfig
from lit_moe.plan import KeepPlan
from lit_moe.surgery import shrink
from lit_moe.testing import example_inputs, tiny_moe
from tests.distill.test_experts import changed

EXPERTS = {"experts": 1.0, "experts_lambda": 1.0, "router": 1.0, "distillation": 1.0}


def plan_of(model, *kept):
    sites = find_sites(model)
    counts = {site.name: site.num_experts for site in sites}
    return KeepPlan({s.name: k for s, k in zip(sites, kept, strict=True)}, counts)


class Losses(L.Callback):
    """Keeps the terms of each step."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, *_):
        names = ("experts", "router", "distillation")
        found = trainer.callback_metrics
        self.losses.append([float(found[f"train/{n}"]) for n in names if f"train/{n}" in found])


@pytest.fixture
def run(make_data, make_trainer):
    """Return a function that trains a student on a few blocks and returns losses and module."""

    def fit(student, teacher, *callbacks, max_steps=2, loss=EXPERTS):
        torch.manual_seed(0)
        seen = Losses()
        quiet = ReportWriter(measure_quality=False, figures=False)
        trainer = make_trainer(*callbacks, quiet, seen, max_steps=max_steps)
        module = MoEModule(
            str(student),
            optimizer=OptimizerConfig(learning_rate=1e-3),
            loss=LossWeights(**loss),
            teacher=teacher,
        )
        trainer.fit(module, datamodule=make_data())
        return seen.losses, module

    return fit


def saved(model, folder):
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("alignment", ["forced", "own", "dense"])
def test_a_loaded_student_is_compared_with_its_former_self(alignment):
    teacher = frozen_copy(tiny_moe("mixtral"))
    first, batch = plan_of(teacher, (1, 3, 4, 6), (0, 2, 5, 7)), example_inputs(teacher)
    student = changed(teacher)
    shrink(student, first)
    loss = RecoveryLoss(LossWeights(experts=1.0, experts_lambda=1.0, alignment=alignment))
    by_plan = loss(Step(student, teacher, batch, plan=first))
    by_origin = loss(Step(student, teacher, batch, origin=first))
    assert torch.equal(by_plan.total, by_origin.total)


def test_two_plans_in_a_row_lead_back_to_the_first_numbers():
    teacher = tiny_moe("mixtral")
    first = plan_of(teacher, (1, 3, 4, 6), (0, 2, 5, 7))
    student = copy.deepcopy(teacher)
    shrink(student, first)
    second = plan_of(student, (0, 2, 3), (1, 2, 3))
    with masked(student, second):
        hidden = Pairing.of(student, teacher, second, first)
    shrink(student, second)
    cut = Pairing.of(student, teacher, second, first)
    assert [layer.teacher_ids for layer in cut.layers] == [(1, 4, 6), (2, 5, 7)]
    assert [layer.student_ids for layer in cut.layers] == [(0, 1, 2)] * 2
    assert [layer.teacher_ids for layer in hidden.layers] == [(1, 4, 6), (2, 5, 7)]
    assert [layer.student_ids for layer in hidden.layers] == [(0, 2, 3), (1, 2, 3)]


def test_the_model_itself_as_a_folder_teaches_the_same(checkpoint, run):
    prune = OneShotPruning("weight_norm", keep_ratio=0.5)
    itself, module = run(checkpoint, None, prune)
    folder, other = run(checkpoint, TeacherConfig(str(checkpoint), "float32"), prune)
    assert folder == itself
    assert itself[0][0] >= 0
    placed, third = run(checkpoint, TeacherConfig(str(checkpoint), "float32", "cpu"), prune)
    assert placed == itself
    names = [{n.partition(".")[0] for n, _ in m.named_children()} for m in (module, other, third)]
    assert names == [{"model", "teacher"}, {"model", "teacher"}, {"model"}]
    assert all(p.grad is None for p in other.teacher.parameters())


def test_an_exported_student_learns_from_what_it_was_made_from(checkpoint, run, tmp_path):
    whole = MoEModule(str(checkpoint)).build()
    plan, kept = plan_of(whole, (1, 3, 4, 6), (0, 2, 5, 7)), copy.deepcopy(whole)
    shrink(kept, plan)
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    export(kept, tmp_path / "small", plan=plan, tokenizer=tokenizer)
    losses, module = run(tmp_path / "small", TeacherConfig(str(checkpoint)))
    again = OneShotPruning("weight_norm", keep_ratio=0.75)
    _, smaller = run(tmp_path / "small", TeacherConfig(str(checkpoint)), again)
    assert module.origin == plan
    assert losses[0][0] > 0
    pairs = Pairing.of(smaller.built_model, smaller.teacher, smaller.plan, smaller.origin)
    for layer in pairs.layers:
        ids = smaller.plan.kept[layer.name]
        assert layer.teacher_ids == tuple(plan.kept[layer.name][i] for i in ids)


def test_a_teacher_in_bf16_teaches_nearly_the_same(checkpoint, run):
    prune = OneShotPruning("weight_norm", keep_ratio=0.5)
    exact, _ = run(checkpoint, None, prune, max_steps=1)
    rounded, module = run(
        checkpoint, TeacherConfig(str(checkpoint), "bfloat16"), prune, max_steps=1
    )
    assert module.teacher.dtype == torch.bfloat16
    assert module.built_model.dtype == torch.float32
    assert rounded != exact
    assert rounded[0] == pytest.approx(exact[0], rel=0.2, abs=1e-3)


def test_only_logits_need_no_likeness_but_the_vocabulary(checkpoint, run, tmp_path):
    big = tiny_moe("qwen3_moe", vocab_size=1024, num_hidden_layers=3)
    teacher = TeacherConfig(str(saved(big, tmp_path / "big")))
    losses, _ = run(checkpoint, teacher, loss={"distillation": 1.0})
    assert losses[0][0] > 0
    with pytest.raises(LitMoEError, match=r"model_type is qwen3_moe in the teacher and mixtral"):
        run(checkpoint, teacher)
    small = tiny_moe("mixtral", vocab_size=512)
    with pytest.raises(LitMoEError, match="vocab_size is 512 in the teacher and 1024"):
        run(
            checkpoint, TeacherConfig(str(saved(small, tmp_path / "s"))), loss={"distillation": 1.0}
        )


def test_other_words_behind_the_same_ids_are_refused(checkpoint, run, tmp_path):
    folder = saved(tiny_moe("mixtral", vocab_size=1024), tmp_path / "other")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    with pytest.raises(LitMoEError, match=r"another vocabulary .*2 tokens differ"):
        run(checkpoint, TeacherConfig(str(folder)), loss={"distillation": 1.0})


def test_experts_that_do_not_correspond_are_refused(checkpoint, run, tmp_path):
    deep = saved(tiny_moe("mixtral", vocab_size=1024, num_hidden_layers=3), tmp_path / "deep")
    with pytest.raises(LitMoEError, match="2 MoE layers and the teacher 3"):
        run(checkpoint, TeacherConfig(str(deep)))
    fewer = saved(tiny_moe("mixtral", vocab_size=1024, num_experts=4), tmp_path / "fewer")
    with pytest.raises(LitMoEError, match="4 experts in the student and 8 in the teacher"):
        run(fewer, TeacherConfig(str(checkpoint)))
    whole = tiny_moe("mixtral", vocab_size=1024)
    plan = plan_of(whole, (0, 1, 2, 3), (0, 1, 2, 3))
    plan.save(fewer / "lit_moe_plan.json")
    more = saved(tiny_moe("mixtral", vocab_size=1024, num_experts=12), tmp_path / "more")
    with pytest.raises(LitMoEError, match=r"made from one with 8 experts .* teacher has 12"):
        run(fewer, TeacherConfig(str(more)))


@pytest.mark.parametrize(
    ("teacher", "loss", "words"),
    [
        (TeacherConfig("embedded"), {}, "no term of the loss asks it"),
        (TeacherConfig("/nowhere/at/all"), {"distillation": 1.0}, "does not exist"),
        (TeacherConfig("embedded", device="cuda:7"), {"distillation": 1.0}, "which is not here"),
    ],
)
def test_impossible_teachers_are_refused(checkpoint, run, teacher, loss, words):
    with pytest.raises(LitMoEError, match=words):
        run(checkpoint, teacher, loss=loss)
