import copy
import json
from pathlib import Path

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_moe import MoEModule
from lit_moe.adapters import find_sites
from lit_moe.callbacks import ExportModel, OneShotPruning, Refit, ReportWriter, WeightPruning
from lit_moe.errors import LitMoEError, PlanError
from lit_moe.module import OptimizerConfig
from lit_moe.refit import api
from lit_moe.sparsity import (
    CubicSchedule,
    WeightMasks,
    measure_sparsity,
    parameter_zeros,
    sparsify,
    weight_masks,
)

LAYERS = ["model.layers.0.mlp", "model.layers.1.mlp"]
HALF = {layer: dict.fromkeys(("gate", "up", "down"), 0.5) for layer in LAYERS}
QUIET = {"figures": False}
HARSH = OptimizerConfig(learning_rate=1e-2, weight_decay=0.5, schedule="constant")


def fit(trainer, module, data, **options):
    trainer.fit(module, datamodule=data, **options)
    return module


def report_of(trainer):
    return json.loads((Path(trainer.log_dir) / "report.json").read_text())


def quiet():
    return ReportWriter(measure_quality=False, **QUIET)


def same_weights(one, other):
    theirs = other.state_dict()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())


class ZerosSeen(L.Callback):
    """Notes the fraction of zeros after each step."""

    def __init__(self):
        self.zeros = []

    def on_train_batch_end(self, _, module, *__):
        found = measure_sparsity(module.built_model)
        self.zeros.append(round(sum(found[LAYERS[0]].values()) / 3, 6))


@pytest.mark.parametrize("method", ["magnitude", "wanda", "moe_pruner", "sparsegpt"])
def test_weights_are_zeroed_measured_exported_and_reported(
    method, checkpoint, make_data, make_trainer
):
    original = AutoModelForCausalLM.from_pretrained(checkpoint)
    callbacks = [WeightPruning(method, "2:4"), ExportModel("model"), ReportWriter(**QUIET)]
    trainer = make_trainer(*callbacks)
    module = fit(trainer, MoEModule(str(checkpoint)), make_data())
    report = report_of(trainer)
    assert list(report["quality"]) == ["before", "pruned"]
    assert report["quality"]["pruned"]["perplexity"] != report["quality"]["before"]["perplexity"]
    assert report["sparsity"]["zeros"] == HALF
    assert (report["sparsity"]["method"], report["sparsity"]["pattern"]) == (method, "2:4")
    assert report["calibration"]["tokens"] == (0 if method == "magnitude" else 256)
    assert report["seconds"]["prune_weights"] > 0
    assert report["export"]["max_abs_logit_difference"] == 0.0
    exported = AutoModelForCausalLM.from_pretrained(Path(trainer.log_dir) / "model")
    assert measure_sparsity(exported) == HALF
    assert same_weights(exported, module.built_model)
    masks = WeightMasks.load(Path(trainer.log_dir) / "masks.safetensors")
    assert masks.sparsity() == HALF
    text = (Path(trainer.log_dir) / "report.md").read_text()
    assert "| `model.layers.0.mlp` | 50.00% | 50.00% | 50.00% |" in text
    for name, tensor in original.state_dict().items():
        if ".experts." not in name:
            assert torch.equal(tensor, module.built_model.state_dict()[name]), name


def test_the_callback_does_what_the_call_does(checkpoint, make_data, make_trainer):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    data = make_data(tokenizer=str(checkpoint))
    sparsify(model, data.calibration_dataloader(), ratio=0.5, earlier="dense")
    trainer = make_trainer(WeightPruning(ratio=0.5, earlier="dense"), quiet())
    module = fit(trainer, MoEModule(str(checkpoint)), make_data())
    assert same_weights(module.built_model, model)


def test_zeros_stay_through_fifty_steps_of_adamw_with_decay(checkpoint, make_data, make_trainer):
    witness = ZerosSeen()
    pruning = WeightPruning(pattern="2:4")
    trainer = make_trainer(
        pruning, witness, ReportWriter(**QUIET), max_steps=50, gradient_clip_val=1.0
    )
    module = fit(trainer, MoEModule(str(checkpoint), optimizer=HARSH), make_data())
    masks = pruning.masks
    assert masks is not None
    assert witness.zeros == [0.5] * 50
    zeros = parameter_zeros(module.built_model, masks)
    assert len(zeros) == 4
    optimizer = trainer.optimizers[0]
    for name, where in zeros.items():
        parameter = module.built_model.get_parameter(name)
        assert torch.equal(parameter == 0, where)
        state = optimizer.state[parameter]
        assert not state["exp_avg"][where].any()
        assert not state["exp_avg_sq"][where].any()
        assert state["exp_avg_sq"][~where].any()
    report = report_of(trainer)
    assert list(report["quality"]) == ["before", "pruned", "recovered"]
    assert report["sparsity"]["steps"] == 50
    assert report["sparsity"]["zeros"] == HALF
    assert not any(p._backward_hooks for p in module.built_model.parameters())


def test_zeros_are_set_again_after_an_optimizer_that_revives_them(
    checkpoint, make_data, make_trainer
):
    class Reviving(MoEModule):
        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            with torch.no_grad():
                for parameter in self.built_model.parameters():
                    parameter.add_(1e-3)

    trainer = make_trainer(WeightPruning("magnitude", ratio=0.5), quiet(), max_steps=2)
    module = fit(trainer, Reviving(str(checkpoint), optimizer=HARSH), make_data())
    assert measure_sparsity(module.built_model) == HALF


def test_accumulated_gradients_count_as_one_step(checkpoint, make_data, make_trainer):
    pruning = WeightPruning("magnitude", pattern="2:4")
    trainer = make_trainer(pruning, quiet(), max_steps=2, accumulate_grad_batches=2)
    module = fit(trainer, MoEModule(str(checkpoint), optimizer=HARSH), make_data(batch_size=4))
    assert report_of(trainer)["sparsity"]["steps"] == 2
    assert measure_sparsity(module.built_model) == HALF


@pytest.mark.parametrize("order", ["experts first", "weights first"])
def test_it_combines_with_dropped_experts_in_either_order(
    order, checkpoint, make_data, make_trainer
):
    dropping = OneShotPruning("reap", keep_ratio=0.5)
    pruning = WeightPruning(pattern="2:4")
    both = [dropping, pruning] if order == "experts first" else [pruning, dropping]
    trainer = make_trainer(*both, ReportWriter(**QUIET), max_steps=2)
    module = fit(trainer, MoEModule(str(checkpoint), optimizer=HARSH), make_data())
    assert find_sites(module.built_model)[0].num_experts == 4
    assert measure_sparsity(module.built_model) == HALF
    assert pruning.masks is not None
    assert pruning.masks.shapes[LAYERS[0]]["down"][0] == 4
    stages = list(report_of(trainer)["quality"])
    middle = ["pruned", "thinned"] if order == "experts first" else ["pruned"]
    assert stages == ["before", *middle, "recovered"]


def test_a_refit_behind_it_keeps_the_zeros(checkpoint, make_data, make_trainer, monkeypatch):
    monkeypatch.setattr(api, "held_out_loss", lambda *_: 0.0)
    pruning = WeightPruning(pattern="2:4")
    trainer = make_trainer(pruning, Refit(), ReportWriter(**QUIET))
    data = make_data(calibration_tokens=1024)
    module = fit(trainer, MoEModule(str(checkpoint)), data)
    assert list(report_of(trainer)["quality"]) == ["before", "pruned", "refitted"]
    assert measure_sparsity(module.built_model) == HALF
    assert pruning.masks is not None
    zeros = parameter_zeros(module.built_model, pruning.masks)
    assert all(bool((module.built_model.get_parameter(n)[z] == 0).all()) for n, z in zeros.items())


def test_a_schedule_zeroes_more_and_more(checkpoint, make_data, make_trainer):
    schedule = CubicSchedule(start_step=1, end_step=9, every_n_steps=2)
    witness, pruning = ZerosSeen(), WeightPruning(ratio=0.5, schedule=schedule)
    trainer = make_trainer(pruning, witness, ReportWriter(**QUIET), max_steps=11)
    module = fit(trainer, MoEModule(str(checkpoint), optimizer=HARSH), make_data())
    assert witness.zeros[:2] == [0.0, 0.0]
    assert witness.zeros == sorted(witness.zeros)
    changes = [i + 1 for i in range(1, 11) if witness.zeros[i] != witness.zeros[i - 1]]
    assert changes == [3, 5, 7]  # at 9 the rest of the way is less than a weight of a row
    assert witness.zeros[-1] == 0.5
    assert witness.zeros[4] == pytest.approx(0.5 * schedule.progress(5), abs=0.02)
    assert measure_sparsity(module.built_model) == HALF
    assert list(report_of(trainer)["quality"]) == ["before", "recovered"]


def test_a_schedule_that_training_does_not_reach_is_noted(checkpoint, make_data, make_trainer):
    schedule = CubicSchedule(end_step=100, every_n_steps=1)
    callbacks = [WeightPruning("magnitude", "2:4", schedule=schedule), quiet()]
    trainer = make_trainer(*callbacks, max_steps=2)
    fit(trainer, MoEModule(str(checkpoint), optimizer=HARSH), make_data())
    notes = report_of(trainer)["warnings"]
    assert any("ended after 2 steps, before end_step=100" in note for note in notes)


@pytest.mark.parametrize("gradual", [False, True])
def test_a_resumed_run_goes_on_with_the_masks_of_its_checkpoint(
    gradual, checkpoint, make_data, make_trainer, tmp_path
):
    schedule = CubicSchedule(end_step=4, every_n_steps=1) if gradual else None

    def run(max_steps, resume_from=None, save=None, **data_options):
        torch.manual_seed(0)
        pruning = WeightPruning(pattern="2:4", schedule=schedule)
        trainer = make_trainer(pruning, quiet(), max_steps=max_steps)
        module = MoEModule(str(checkpoint), optimizer=HARSH)
        module.resume_from = resume_from
        data = make_data(batch_size=len(make_data().blocks("train")), **data_options)
        fit(trainer, module, data, ckpt_path=resume_from)
        if save:
            trainer.save_checkpoint(save)
        return module, pruning, report_of(trainer)

    straight, whole, _ = run(4)
    run(2, save=tmp_path / "half.ckpt")
    stored = torch.load(tmp_path / "half.ckpt", weights_only=False)["callbacks"]
    (bits,) = [s["masks"]["bits"] for s in stored.values() if "masks" in s]
    assert bits[LAYERS[0]]["up"].dtype == torch.uint8
    assert bits[LAYERS[0]]["up"].shape == (8, 24, 4)
    # Were it to calibrate again, it would not find the text.
    resumed, pruning, report = run(
        4, resume_from=str(tmp_path / "half.ckpt"), calibration_files=["/gone.txt"]
    )
    assert report["sparsity"]["zeros"] == HALF
    assert report["sparsity"]["steps"] == 4
    assert measure_sparsity(resumed.built_model) == HALF
    if not gradual:
        assert pruning.masks == whole.masks
    for name, tensor in straight.built_model.state_dict().items():
        other = resumed.built_model.state_dict()[name]
        torch.testing.assert_close(other, tensor, rtol=1e-3, atol=1e-4, msg=name)


def test_masks_are_replayed_from_a_file(checkpoint, make_data, make_trainer, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    weight_masks(model, method="magnitude", ratio=0.5).save(tmp_path / "masks.safetensors")
    pruning = WeightPruning(masks=str(tmp_path / "masks.safetensors"))
    trainer = make_trainer(pruning, quiet())
    module = fit(trainer, MoEModule(str(checkpoint)), make_data(calibration_files=["/gone.txt"]))
    assert measure_sparsity(module.built_model) == HALF
    assert report_of(trainer)["sparsity"]["method"] == "replayed magnitude"


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_validation_and_test_prune_nothing(stage, checkpoint, make_data, make_trainer):
    module = MoEModule(str(checkpoint))
    trainer = make_trainer(WeightPruning(pattern="2:4"))
    getattr(trainer, stage)(module, datamodule=make_data(), verbose=False)
    assert same_weights(module.built_model, AutoModelForCausalLM.from_pretrained(checkpoint))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (WeightPruning, "give one of them"),
        (lambda: WeightPruning(pattern="4:4"), "N must be at least 1 and below M"),
        (lambda: WeightPruning(ratio=1.0), "ratio=1.0 must be"),
        (lambda: WeightPruning(masks="/none.safetensors"), "/none.safetensors does not exist"),
        (lambda: CubicSchedule(end_step=0), "0 <= start_step < end_step"),
        (lambda: CubicSchedule(end_step=5, start_step=5), "start_step=5 and end_step=5"),
        (lambda: CubicSchedule(end_step=5, every_n_steps=0), "every_n_steps=0 must be at least 1"),
        (
            lambda: WeightPruning("sparsegpt", "2:4", schedule=CubicSchedule(end_step=5)),
            "sparsegpt .* cannot follow a schedule",
        ),
    ],
)
def test_nonsense_is_refused_at_once(make, message):
    with pytest.raises(LitMoEError, match=message):
        make()


def test_what_does_not_fit_the_model_is_refused_before_any_evaluation(
    checkpoint, make_data, make_trainer, tmp_path
):
    def run(*callbacks, **data):
        writer = ReportWriter(**QUIET)
        trainer = make_trainer(*callbacks, writer)
        trainer.fit(MoEModule(str(checkpoint)), datamodule=make_data(**data))

    with pytest.raises(LitMoEError, match="whose length 5 divides, but the gate projections"):
        run(WeightPruning(pattern="2:5"))
    with pytest.raises(LitMoEError, match="2 WeightPruning callbacks are given"):
        run(WeightPruning(pattern="2:4"), _Twin(pattern="2:4"))
    other = AutoModelForCausalLM.from_pretrained(checkpoint)
    masks = weight_masks(other, method="magnitude", ratio=0.5)
    fewer = {layer: {m: bits[:4] for m, bits in masks.bits[layer].items()} for layer in masks}
    WeightMasks(fewer, masks.widths).save(tmp_path / "masks.safetensors")
    with pytest.raises(PlanError, match="masks were made for another model"):
        run(WeightPruning(masks=str(tmp_path / "masks.safetensors")))


class _Twin(WeightPruning):
    """A second one; lightning itself refuses two of one class with a state."""


def test_asking_twice_for_the_same_gives_the_same(checkpoint, make_data):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    batches = list(make_data(tokenizer=str(checkpoint)).calibration_dataloader())
    masks = [weight_masks(copy.deepcopy(model), batches, pattern="2:4") for _ in range(2)]
    assert masks[0] == masks[1]
