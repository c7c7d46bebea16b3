"""Zeros stay zeros in training under every strategy, and training is that of one process."""

import pytest
import safetensors.torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_moe.callbacks import ExportModel, OneShotPruning, ReportWriter, WeightPruning
from lit_moe.sparsity import CubicSchedule
from tests.distributed.runs import MODES

pytestmark = pytest.mark.distributed
SHARED = [mode for mode in MODES if mode not in ("single", "zero3-sharded-load")]


def thinned(*more, keep=None, **fields):
    def callbacks():
        dropping = [] if keep is None else [OneShotPruning("reap", keep_ratio=keep)]
        pruning = WeightPruning(method="moe_pruner", **fields)
        return [ReportWriter(figures=False), *dropping, pruning, *[make() for make in more]]

    return callbacks


TASKS = {
    "2:4 behind dropping": {"keep": 0.5, "pattern": "2:4"},
    "half, little by little": {
        "ratio": 0.5,
        "schedule": CubicSchedule(end_step=8, every_n_steps=2),
    },
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("mode", SHARED)
def test_half_of_the_weights_are_zero_after_training(setup, mode, task):
    callbacks = thinned(ExportModel, **TASKS[task])
    one = setup.fit("single", callbacks=callbacks, max_steps=10)[0]
    assert setup.fit(mode, callbacks=callbacks, max_steps=10)[0] == pytest.approx(one, abs=1e-4)
    folders = [setup.folder / "run" / name / "model" for name in ("single", mode)]
    first, second = (
        safetensors.torch.load_file(folder / "model.safetensors") for folder in folders
    )
    experts = [name for name in first if ".experts." in name]
    assert experts
    for name in experts:
        share = (second[name] == 0).float().mean()
        assert share == pytest.approx(0.5, abs=1e-3), name
        same = ((first[name] == 0) == (second[name] == 0)).float().mean()
        assert same > 0.99, name


@pytest.mark.parametrize("mode", ["ddp", "zero3"])
def test_resumed_while_weights_are_pruned_little_by_little(setup, mode):
    options = {**TASKS["half, little by little"]}
    folder = setup.folder / "checkpoints"

    def keeping(path):
        def make():
            return ModelCheckpoint(
                dirpath=str(path), filename="{step}", every_n_train_steps=5, save_top_k=-1
            )

        return thinned(make, **options)

    run = {"max_steps": 10, "enable_checkpointing": True}
    losses = setup.fit(mode, callbacks=keeping(folder), **run)[0]
    resumed = setup.fit(
        mode,
        callbacks=keeping(setup.folder / "new"),
        resume=str(folder / "step=5.ckpt"),
        **run,
    )[0]
    assert resumed == pytest.approx(losses[5:], abs=1e-6)
