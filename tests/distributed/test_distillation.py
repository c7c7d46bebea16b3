"""Distillation of experts and routers: the losses of one process, lambda of all ranks, resumed."""

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoTokenizer

from lit_moe.assets import model_folder
from lit_moe.callbacks import OneShotPruning, ReportWriter, WeightPruning
from lit_moe.distill.recovery import RecoveryLoss
from lit_moe.module import LossWeights
from lit_moe.sharding.partitions import stream_whole
from lit_moe.testing import tiny_moe
from tests.distributed.runs import Losses, Setup, some, strategy_of

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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("task", TASKS)
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


@pytest.mark.parametrize("mode", some(["single", "zero3"], ["ddp", "zero2"]))
@pytest.mark.parametrize("task", ["2:4, forced", "routers alone"])
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


class Untouched(L.Callback):
    """Keeps the weights as they are before the first step."""

    def on_train_start(self, _, module):
        self.weights = whole_weights(module)


def whole_weights(module):
    """Every tensor of the student by name, on every rank. Collective."""
    return {name: tensor.detach().clone() for name, tensor in stream_whole(module.model)}


def trained_routers(setup, mode, **options):
    """Three steps of the routers alone: losses, names of what changed, weights afterwards."""

    def look(trainer, module):
        (losses,) = [c.values for c in trainer.callbacks if isinstance(c, Losses)]
        (before,) = [c.weights for c in trainer.callbacks if isinstance(c, Untouched)]
        after = whole_weights(module)
        changed = [name for name in after if not torch.equal(before[name], after[name])]
        return losses, changed, after

    callbacks = recipe(Untouched, **TASKS["routers alone"])
    return setup.fit(mode, callbacks=callbacks, max_steps=3, look=look, **options)


def check_routers_alone(setup, mode, **options):
    """Compare a run on ranks with one process, and see that it changed every router, no more."""
    ((losses, changed, weights),) = trained_routers(setup, "single")
    assert changed
    assert all("gate" in name or "router" in name for name in changed)
    for rank in trained_routers(setup, mode, **options):
        assert rank[0] == pytest.approx(losses, rel=1e-5)
        assert rank[1] == changed
        for name in changed:
            torch.testing.assert_close(rank[2][name], weights[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", some(["zero3"], ["ddp", "zero1", "zero2", "zero3-sharded-load"]))
def test_routers_alone_change_as_in_one_process_and_nothing_else_does(setup, mode):
    check_routers_alone(setup, mode)


def keeping_small_weights_whole():
    strategy = strategy_of("zero3")
    del strategy._content["zero_optimization"]["stage3_param_persistence_threshold"]
    return strategy


@pytest.mark.slow
def test_the_first_router_learns_where_stage_3_keeps_it_whole(setup):
    check_routers_alone(setup, "zero3", strategy=keeping_small_weights_whole)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "gpt_oss"])
def test_routers_alone_change_in_other_families(family, chapters, tmp_path):
    tiny_moe(family, vocab_size=1024).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(tmp_path / "model")
    check_routers_alone(Setup(tmp_path / "model", chapters, tmp_path), "zero3")
