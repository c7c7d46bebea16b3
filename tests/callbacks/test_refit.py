import gc
import json
import weakref
from pathlib import Path

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_moe import MoEModule
from lit_moe.adapters import find_sites
from lit_moe.callbacks import ExportModel, OneShotPruning, Refit, ReportWriter
from lit_moe.callbacks.refit import PROGRESS_FOLDER
from lit_moe.errors import LitMoEError
from lit_moe.module import LossWeights, OptimizerConfig
from lit_moe.refit import RefitOptions, api
from lit_moe.refit.layer import LayerProblem
from lit_moe.testing import tiny_moe

LAYERS = ["model.layers.0.mlp", "model.layers.1.mlp"]
QUIET = {"figures": False}


@pytest.fixture
def no_judge(monkeypatch):
    """Take every refit: the loss of a random model says nothing about its teacher."""
    monkeypatch.setattr(api, "held_out_loss", lambda *_: 0.0)


@pytest.fixture
def solved(monkeypatch):
    """A list that grows by one with every layer that is solved."""
    counts: list[int] = []
    solve = LayerProblem.solve

    def counted(self):
        counts.append(1)
        return solve(self)

    monkeypatch.setattr(LayerProblem, "solve", counted)
    return counts


def pruning():
    return OneShotPruning("reap", keep_ratio=0.5)


def fit(trainer, module, data, **options):
    trainer.fit(module, datamodule=data, **options)
    return module


def report_of(trainer):
    return json.loads((Path(trainer.log_dir) / "report.json").read_text())


def same_weights(one, other):
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


class Witness(L.Callback):
    """Keeps a weak reference to the unpruned model, and the weights at this point of the list."""

    def on_model_built(self, _, module):
        self.unpruned = weakref.ref(module.unpruned)
        self.experts_of_unpruned = find_sites(module.unpruned)[0].num_experts
        self.weights = {k: v.clone() for k, v in module.built_model.state_dict().items()}


def test_half_of_the_experts_go_the_rest_is_refitted_and_exported(
    checkpoint, make_data, make_trainer, no_judge
):
    witness = Witness()
    trainer = make_trainer(pruning(), witness, Refit(), ExportModel("model"), ReportWriter(**QUIET))
    module = fit(trainer, MoEModule(str(checkpoint)), make_data(calibration_tokens=1024))
    report = report_of(trainer)
    assert list(report["quality"]) == ["before", "pruned", "refitted"]
    assert report["quality"]["refitted"] != report["quality"]["pruned"]
    assert sorted(report["refit"]["layers"]) == LAYERS
    assert report["refit"]["tokens"] + report["refit"]["held_out_tokens"] == 1024
    for layer in report["refit"]["layers"].values():
        assert layer["kept"]
        assert layer["target"] == "stream"
        assert layer["held_out_after"] < layer["held_out_before"]
        assert layer["lam"] > 0
    assert report["seconds"]["refit"] > 0
    assert report["export"]["max_abs_logit_difference"] == 0.0
    assert json.loads((Path(trainer.log_dir) / "model" / "report.json").read_text()) == report
    card = (Path(trainer.log_dir) / "model" / "README.md").read_text()
    assert "experts in 2 layers were re-fitted in closed form on" in card
    assert "towards the model before it was changed" in card
    state = module.built_model.state_dict()
    changed = [
        name for name, tensor in witness.weights.items() if not torch.equal(tensor, state[name])
    ]
    assert changed == [f"{layer}.experts.down_proj" for layer in LAYERS]
    exported = AutoModelForCausalLM.from_pretrained(Path(trainer.log_dir) / "model")
    assert same_weights(exported, module.built_model)
    assert not (Path(trainer.default_root_dir) / PROGRESS_FOLDER).exists()


def test_the_unpruned_model_is_there_while_callbacks_act_and_gone_afterwards(
    checkpoint, make_data, make_trainer
):
    witness = Witness()
    trainer = make_trainer(
        pruning(), witness, Refit(), ReportWriter(measure_quality=False, **QUIET)
    )
    module = fit(trainer, MoEModule(str(checkpoint)), make_data())
    assert witness.experts_of_unpruned == 8
    assert find_sites(module.built_model)[0].num_experts == 4
    assert module.unpruned is None
    gc.collect()
    assert witness.unpruned() is None
    assert not [name for name, _ in module.named_modules() if "unpruned" in name]


def test_a_pruned_folder_is_refitted_by_itself_towards_a_teacher_on_disk(
    checkpoint, make_data, make_trainer, tmp_path, no_judge
):
    witness = Witness()
    writer = ReportWriter(measure_quality=False, **QUIET)
    together = make_trainer(pruning(), witness, Refit(), writer)
    module = fit(together, MoEModule(str(checkpoint)), make_data())
    pruned = tmp_path / "pruned"
    make_pruned = make_trainer(pruning(), ExportModel(str(pruned)), ReportWriter(**QUIET))
    fit(make_pruned, MoEModule(str(checkpoint)), make_data())

    trainer = make_trainer(Refit(teacher=str(checkpoint)), ReportWriter(**QUIET))
    alone = fit(trainer, MoEModule(str(pruned)), make_data())
    report = report_of(trainer)
    assert list(report["quality"]) == ["before", "refitted"]
    assert sorted(report["refit"]["layers"]) == LAYERS
    assert same_weights(alone.built_model, module.built_model)
    assert alone.keep_unpruned is False


def test_the_teacher_of_distillation_is_the_teacher_of_the_refit_and_stays_as_it_was(
    checkpoint, make_data, make_trainer, no_judge
):
    original = AutoModelForCausalLM.from_pretrained(checkpoint)
    witness = Witness()
    trainer = make_trainer(pruning(), witness, Refit(), ReportWriter(**QUIET), max_steps=2)
    loss = LossWeights(next_token=0.5, distillation=0.5)
    module = fit(trainer, MoEModule(str(checkpoint), loss=loss), make_data())
    assert module.teacher is not None
    assert witness.unpruned() is module.teacher
    assert same_weights(module.teacher, original)
    assert list(report_of(trainer)["quality"]) == ["before", "pruned", "refitted", "recovered"]


def test_a_resumed_run_takes_the_refitted_weights_and_the_record_of_its_checkpoint(
    checkpoint, make_data, make_trainer, tmp_path, solved, no_judge
):
    def run(max_steps, resume_from=None, save=None, **data_options):
        torch.manual_seed(0)
        writer = ReportWriter(**QUIET)
        trainer = make_trainer(pruning(), Refit(), writer, max_steps=max_steps)
        optimizer = OptimizerConfig(learning_rate=1e-3, schedule="constant")
        module = MoEModule(str(checkpoint), optimizer=optimizer)
        module.resume_from = resume_from
        data = make_data(batch_size=len(make_data().blocks("train")), **data_options)
        fit(trainer, module, data, ckpt_path=resume_from)
        if save:
            trainer.save_checkpoint(save)
        return module, writer.report

    straight, whole = run(2)
    run(1, save=tmp_path / "half.ckpt")
    assert len(solved) == 4
    # Were it to calibrate again, it would not find the text.
    resumed, report = run(
        2, resume_from=str(tmp_path / "half.ckpt"), calibration_files=["/gone.txt"]
    )
    assert len(solved) == 4
    assert list(report.quality) == ["before", "pruned", "refitted", "recovered"]
    assert report.refit == whole.refit
    assert report.quality["refitted"].perplexity == whole.quality["refitted"].perplexity
    for name, tensor in straight.built_model.state_dict().items():
        other = resumed.built_model.state_dict()[name]
        torch.testing.assert_close(other, tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_validation_and_test_refit_nothing(stage, checkpoint, make_data, make_trainer, solved):
    module = MoEModule(str(checkpoint))
    trainer = make_trainer(pruning(), Refit())
    getattr(trainer, stage)(module, datamodule=make_data(), verbose=False)
    assert not solved
    assert module.keep_unpruned is False
    assert same_weights(module.built_model, AutoModelForCausalLM.from_pretrained(checkpoint))
    assert not (Path(trainer.log_dir) / "report.json").exists()


def test_a_refit_that_was_undone_is_a_warning_in_the_report(
    checkpoint, make_data, make_trainer, monkeypatch
):
    losses = iter([1.0, 2.0])
    monkeypatch.setattr(api, "held_out_loss", lambda *_: next(losses))
    witness = Witness()
    trainer = make_trainer(pruning(), witness, Refit(), ReportWriter(**QUIET))
    module = fit(trainer, MoEModule(str(checkpoint)), make_data())
    report = report_of(trainer)
    assert report["refit"]["kept"] is False
    assert any("undone: it raised the held-out loss from 1 to 2" in w for w in report["warnings"])
    same = ("perplexity", "bits_per_byte", "domains")
    pruned, refitted = (report["quality"][stage] for stage in ("pruned", "refitted"))
    assert [pruned[k] for k in same] == [refitted[k] for k in same]
    state = module.built_model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in witness.weights.items())


@pytest.mark.parametrize("order", ["alone", "first"])
def test_nothing_to_correct_is_refused_with_what_would_work(
    order, checkpoint, make_data, make_trainer
):
    callbacks = [Refit()] if order == "alone" else [Refit(), pruning()]
    trainer = make_trainer(*callbacks, ReportWriter(measure_quality=False, **QUIET))
    message = r"Refit has nothing to correct: .* behind a callback that prunes.*--Refit\.teacher"
    with pytest.raises(LitMoEError, match=message):
        trainer.fit(MoEModule(str(checkpoint)), datamodule=make_data())


def test_a_teacher_that_is_not_there_is_refused(checkpoint, make_data, make_trainer):
    trainer = make_trainer(Refit("/no/such/folder"), ReportWriter(measure_quality=False, **QUIET))
    with pytest.raises(LitMoEError, match="/no/such/folder"):
        trainer.fit(MoEModule(str(checkpoint)), datamodule=make_data())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"options": RefitOptions(memory_gib=1e-6)}, "memory_gib=1e-06 leaves .* set memory_gib"),
        ({"teacher": "stranger"}, "no relatives: hidden_size is 48 in the teacher"),
    ],
)
def test_what_cannot_end_well_is_refused_before_anything_is_observed(
    fields, message, checkpoint, make_data, make_trainer, tmp_path
):
    if "teacher" in fields:
        fields = {"teacher": str(tmp_path / "stranger")}
        tiny_moe("mixtral", hidden_size=48).save_pretrained(fields["teacher"])
    writer = ReportWriter(measure_quality=False, **QUIET)
    trainer = make_trainer(pruning(), Refit(**fields), writer)
    with pytest.raises(LitMoEError, match=message):
        fit(trainer, MoEModule(str(checkpoint)), make_data(calibration_files=["/gone.txt"]))


def test_a_killed_refit_leaves_progress_below_the_root_that_the_next_run_takes(
    checkpoint, make_data, make_trainer, solved, monkeypatch, no_judge
):
    solve = LayerProblem.solve

    def solve_first_only(self):
        if len(solved) == 1:
            raise KeyboardInterrupt
        return solve(self)

    with monkeypatch.context() as patch:
        patch.setattr(LayerProblem, "solve", solve_first_only)
        first = make_trainer(pruning(), Refit(), ReportWriter(measure_quality=False, **QUIET))
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            fit(first, MoEModule(str(checkpoint)), make_data())
    progress = Path(first.default_root_dir) / PROGRESS_FOLDER
    assert [path.stem for path in progress.rglob("*.safetensors")] == LAYERS[:1]
    second = make_trainer(pruning(), Refit(), ReportWriter(measure_quality=False, **QUIET))
    fit(second, MoEModule(str(checkpoint)), make_data())
    assert len(solved) == 2
    assert not progress.exists()


def test_options_reach_the_refit(checkpoint, make_data, make_trainer, no_judge):
    options = RefitOptions(mode="parallel", solver="jacobi", lam=0.5, held_out=0.25)
    writer = ReportWriter(measure_quality=False, **QUIET)
    trainer = make_trainer(pruning(), Refit(options=options), writer)
    fit(trainer, MoEModule(str(checkpoint)), make_data())
    record = writer.report.refit
    assert record is not None
    assert (record.mode, record.solver) == ("parallel", "jacobi: asked for")
    assert record.held_out_tokens == 64
    assert {layer.lam for layer in record.layers.values()} == {0.5}
