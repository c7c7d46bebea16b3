"""The same losses, plan and export from one process, DDP, and every ZeRO stage."""

import json

import numpy as np
import pytest
import safetensors.torch
import torch

from lit_moe.callbacks import ExpertMonitor, ExportModel, OneShotPruning, Refit, ReportWriter
from lit_moe.plan import KeepPlan
from lit_moe.refit import RefitOptions
from lit_moe.sharding import MoEDeepSpeed
from tests.distributed.runs import MODES, some

pytestmark = pytest.mark.distributed
SHARED = [mode for mode in MODES if mode != "single"]


def prune(**options):
    return lambda: [
        ReportWriter(figures=False),
        OneShotPruning("reap", keep_ratio=0.5),
        *options.get("more", []),
    ]


def prune_and_refit():
    refit = Refit(options=RefitOptions(mode="parallel"))
    return lambda: [*prune()(), refit]


TASKS = {
    "plain": {},
    "distilled": {"distillation": 0.5},
    "pruned": {"distillation": 0.5, "callbacks": prune()},
    "accumulated and clipped": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
}


@pytest.fixture(scope="module")
def alone(request, checkpoint, chapters, tmp_path_factory):
    """Task -> losses of one process, computed once."""
    from tests.distributed.runs import Setup

    setup = Setup(checkpoint, chapters, tmp_path_factory.mktemp("alone"))
    known = {}

    def losses(task):
        if task not in known:
            known[task] = setup.fit("single", **TASKS[task])[0]
        return known[task]

    return losses


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("mode", SHARED)
def test_twenty_steps_have_the_losses_of_one_process(setup, alone, mode, task):
    ranks = setup.fit(mode, **TASKS[task])
    assert ranks[0] == ranks[1]
    assert len(ranks[0]) == len(alone(task))
    assert ranks[0] == pytest.approx(alone(task), abs=1e-5)


@pytest.mark.parametrize("mode", some(["zero3"], ["ddp", "zero1", "zero2"]))
def test_refitted_experts_train_with_the_losses_of_one_process(setup, mode):
    options = {"max_steps": 5, "callbacks": prune_and_refit()}
    (alone,) = setup.fit("single", **options)
    for rank in setup.fit(mode, **options):
        assert rank == pytest.approx(alone, abs=2e-4)


@pytest.mark.parametrize("mode", some(["zero2", "zero3"], ["ddp", "zero1", "zero3-sharded-load"]))
@pytest.mark.parametrize("task", some(["plain"], [name for name in TASKS if name != "plain"]))
def test_bf16_follows_one_process_in_bf16(setup, mode, task):
    steps = {**TASKS[task], "max_steps": 8}
    options = {**steps, "precision": "bf16-mixed"}
    one, two = setup.fit("single", **options)[0], setup.fit(mode, **options)[0]
    assert two == pytest.approx(one, abs=0.02)
    assert two != setup.fit(mode, **steps)[0]


@pytest.mark.parametrize("mode", some(["zero3"], ["ddp", "zero1", "zero2", "zero3-sharded-load"]))
def test_the_load_that_training_shows_is_that_of_one_process(setup, mode):
    def monitored(trainer, _):
        (monitor,) = (c for c in trainer.callbacks if isinstance(c, ExpertMonitor))
        return {name: np.stack(columns).tolist() for name, columns in monitor._history.items()}

    options = {"max_steps": 6, "accumulate_grad_batches": 2, "look": monitored}
    callbacks = prune(more=[ExpertMonitor(every_n_steps=2)])
    (alone,) = setup.fit("single", callbacks=callbacks, **options)
    shared = setup.fit(mode, callbacks=callbacks, **options)[0]
    assert {len(columns) for columns in alone.values()} == {3}
    for name, columns in alone.items():
        np.testing.assert_allclose(shared[name], columns, atol=0.02)


@pytest.fixture(scope="module")
def exported(checkpoint, chapters, tmp_path_factory):
    """Mode -> folder of a run that observes, drops half, exports, and takes no step."""
    from tests.distributed.runs import Setup

    setup = Setup(checkpoint, chapters, tmp_path_factory.mktemp("exports"))
    for mode in MODES:
        # 17 blocks: two ranks have unequal shares
        setup.fit(
            mode,
            callbacks=prune(more=[ExpertMonitor(), ExportModel()]),
            max_steps=0,
            calibration_tokens=17 * 32,
        )
    return {mode: setup.folder / "run" / mode for mode in MODES}


@pytest.mark.parametrize("mode", SHARED)
def test_plan_and_export_are_those_of_one_process(exported, mode):
    one, two = exported["single"], exported[mode]
    assert KeepPlan.load(two / "plan.json") == KeepPlan.load(one / "plan.json")
    for file in ("model.safetensors", "config.json"):
        assert (two / "model" / file).read_bytes() == (one / "model" / file).read_bytes(), file
    first, second = (json.loads((run / "report.json").read_text()) for run in (one, two))
    assert second["calibration"] == first["calibration"]
    for stage in ("before", "pruned"):
        expected = first["quality"][stage]
        for key in ("tokens", "perplexity", "stderr", "bits_per_byte"):
            assert second["quality"][stage][key] == pytest.approx(expected[key], rel=1e-6), key
    for key in ("parameters", "active_parameters", "bytes"):
        assert second[key] == first[key], key
    assert second["export"]["max_abs_logit_difference"] < 1e-5
    assert not list((two).glob(".model.*")), "scratch files are left"


def test_a_deepspeed_file_decides_the_stage(setup, tmp_path):
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    stages = setup.fit(
        "zero3",
        max_steps=1,
        strategy=lambda: MoEDeepSpeed(stage=3, config=str(file)),
        look=lambda trainer, _: trainer.strategy.deepspeed_engine.zero_optimization_stage(),
    )
    assert stages == [1, 1]


@pytest.mark.parametrize(
    ("stage", "offloaded"),
    [
        (3, "optimizer"),
        (3, "both"),
        pytest.param(1, "optimizer", marks=pytest.mark.slow),
        pytest.param(2, "optimizer", marks=pytest.mark.slow),
    ],
)
def test_an_offloaded_optimizer_takes_the_same_steps_without_a_compiler(
    setup, alone, stage, offloaded
):
    def strategy():
        both = offloaded == "both"
        return MoEDeepSpeed(stage=stage, offload_optimizer=True, offload_parameters=both)

    losses = setup.fit("zero3", strategy=strategy)[0]
    assert losses == pytest.approx(alone("plain"), abs=1e-5)


def test_zero3_holds_half_of_everything(setup):
    """Parameters, gradients and Adam's moments of student and teacher, counted where they lie."""

    def held(trainer, module):
        if not hasattr(trainer.strategy, "stage"):
            tensors = list(module.parameters())
            tensors += [torch.empty_like(p) for p in tensors if p.requires_grad]  # gradients
            tensors += [t for s in trainer.optimizers[0].state.values() for t in s.values()]
            return _bytes_of(tensors)
        zero = trainer.strategy.deepspeed_engine.optimizer
        tensors = [t for p in module.parameters() for t in (p.data, p.ds_tensor)]
        tensors += [*zero.fp32_partitioned_groups_flat, zero.grad_partitions_flat_buffer]
        tensors += [t for s in zero.optimizer.state.values() for t in s.values()]
        return _bytes_of(tensors)

    options = {"distillation": 0.5, "max_steps": 2, "look": held}
    (one,) = setup.fit("single", **options)
    for mode in ("zero3", "zero3-sharded-load"):
        assert all(share <= 0.55 * one for share in setup.fit(mode, **options))


def _bytes_of(tensors):
    """Bytes of the storages behind some tensors, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


@pytest.mark.parametrize("mode", some(["ddp", "zero3"], ["zero1", "zero2", "zero3-sharded-load"]))
def test_validation_and_prediction_do_not_depend_on_the_number_of_ranks(setup, mode):
    """13 blocks on two ranks: one idle block keeps them in step and counts for nothing."""

    def measured(trainer, module):
        data = trainer.datamodule
        data._blocks["test"] = data._blocks["validation"] = data.blocks("test").spread(13)
        (metrics,) = trainer.validate(module, datamodule=data, verbose=False)
        rows = trainer.predict(module, datamodule=data)
        total = torch.cat(rows).double().sum()
        count = torch.tensor(sum(len(row) for row in rows))
        reduced = [float(trainer.strategy.reduce(x, reduce_op="sum")) for x in (total, count)]
        return metrics["validation/loss"], *reduced

    options = {"max_steps": 2, "look": measured, "limit_val_batches": 1.0}
    (alone,) = setup.fit("single", **options)
    for rank in setup.fit(mode, **options):
        assert rank == pytest.approx(alone, rel=1e-5)
    assert alone[2] == 13


@pytest.mark.parametrize("mode", some(["zero2", "zero3"], ["ddp", "zero1", "zero3-sharded-load"]))
def test_an_export_after_bf16_training_has_the_digits_of_the_master_weights(setup, mode):
    def exported(trainer, module):
        return str(setup.folder / "run" / mode / "model")

    options = {"precision": "bf16-mixed", "max_steps": 3, "look": exported}
    callbacks = prune(more=[ExportModel(dtype="float32")])
    folder = setup.fit(mode, callbacks=callbacks, **options)[0]
    weights = safetensors.torch.load_file(f"{folder}/model.safetensors")
    exact = [n for n, w in weights.items() if not torch.equal(w, w.bfloat16().float())]
    assert len(exact) > len(weights) / 2
