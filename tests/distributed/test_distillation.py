"""Distillation of experts and routers: the losses of one process, lambda of all ranks, resumed."""

from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_moe.callbacks import OneShotPruning, ReportWriter, WeightPruning
from lit_moe.distill.recovery import RecoveryLoss
from lit_moe.module import LossWeights
from tests.distributed.runs import some

pytestmark = pytest.mark.distributed
MODES = some(["ddp", "zero2", "zero3"], ["zero1"])


class Recipe(L.Callback):
    """Gives the module another loss, or trains its routers alone, before the model is built."""

    def __init__(self, loss, trained="all"):
        self.loss, self.trained = loss, trained

    def setup(self, _, pl_module, stage):  # noqa: ARG002
        pl_module.recovery = RecoveryLoss(LossWeights(**self.loss))
        pl_module.optimizer_config.trained = self.trained


def recipe(*more, keep=None, trained="all", **loss):
    def callbacks():
        weights = WeightPruning(method="moe_pruner", pattern="2:4")
        pruning = weights if keep is None else OneShotPruning("reap", keep_ratio=keep)
        return [
            Recipe(loss, trained),
            ReportWriter(figures=False, measure_quality=False),
            pruning,
            *[make() for make in more],
        ]

    return callbacks


TASKS: dict[str, dict[str, Any]] = {
    "2:4, forced": {"experts": 1.0},
    "2:4, own, routers too": {"experts": 0.5, "alignment": "own", "router": 0.5},
    "half, dense": {"keep": 0.5, "experts": 1.0, "alignment": "dense", "distillation": 0.5},
    "routers alone": {"keep": 0.5, "next_token": 0.0, "router": 1.0, "trained": "routers"},
}
KNOWN: dict[str, list[float]] = {}


def alone(setup, task):
    if task not in KNOWN:
        KNOWN[task] = setup.fit("single", callbacks=recipe(**TASKS[task]), max_steps=6)[0]
    return KNOWN[task]


def cases(modes, tasks):
    """Every mode with every task but the one that ZeRO-3 refuses, which has a test of its own."""
    marked = [
        (*case.values, case.marks) if hasattr(case, "values") else (case, ()) for case in modes
    ]
    return [
        pytest.param(mode, task, marks=marks)
        for mode, marks in marked
        for task in tasks
        if (mode, task) != ("zero3", "routers alone")
    ]


@pytest.mark.parametrize(("mode", "task"), cases(MODES, TASKS))
def test_six_steps_have_the_losses_of_one_process(setup, mode, task):
    ranks = setup.fit(mode, callbacks=recipe(**TASKS[task]), max_steps=6)
    assert ranks[0] == ranks[1]
    assert len(ranks[0]) == 6
    assert ranks[0] == pytest.approx(alone(setup, task), rel=1e-4)


@pytest.mark.parametrize("mode", ["ddp", *some(["zero3"], ["zero2"])])
def test_lambda_is_that_of_all_ranks(setup, mode):
    def measured(_, module):
        return module.loss_state()["experts"]["lambda"]

    options = {"callbacks": recipe(experts=1.0), "max_steps": 1, "look": measured}
    (one,) = setup.fit("single", **options)
    first, second = setup.fit(mode, **options)
    assert first == second == pytest.approx(one, rel=1e-4)


def keeping(path):
    return lambda: ModelCheckpoint(
        dirpath=str(path), filename="{step}", every_n_train_steps=3, save_top_k=-1
    )


@pytest.mark.parametrize(
    ("mode", "task"),
    cases(some(["single", "zero3"], ["ddp", "zero2"]), ["2:4, forced", "routers alone"]),
)
def test_a_resumed_run_goes_on_with_the_same_losses(setup, mode, task):
    folder, run = setup.folder / "checkpoints", {"max_steps": 6, "enable_checkpointing": True}
    losses = setup.fit(mode, callbacks=recipe(keeping(folder), **TASKS[task]), **run)[0]
    resumed = setup.fit(
        mode,
        callbacks=recipe(keeping(setup.folder / "new"), **TASKS[task]),
        resume=str(folder / "step=3.ckpt"),
        **run,
    )[0]
    assert resumed == pytest.approx(losses[3:], rel=1e-5)


def test_routers_alone_are_not_trained_under_stage_3(setup):
    with pytest.raises(RuntimeError, match="not gather in the backward pass; take strategy"):
        setup.fit("zero3", callbacks=recipe(**TASKS["routers alone"]), max_steps=1)
