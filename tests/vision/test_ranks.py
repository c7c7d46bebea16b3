"""V-MoEs on two processes: the same choices, losses and exports as on one."""

import json
import warnings
from functools import partial

import lightning as L
import pytest

import lit_moe
from lit_moe.callbacks import (
    ExpertMonitor,
    ExportModel,
    OneShotPruning,
    Refit,
    TaskSpecificPruning,
)
from lit_moe.plan import KeepPlan
from lit_moe.testing import run_distributed
from tests.distributed.runs import MODES, Losses, some, strategy_of
from tests.vision.test_training import DIGITS, data, module, trainer

pytestmark = pytest.mark.distributed
GLOBAL_BATCH = 64
SHARED = ["ddp", "zero2"]
OTHERS = [("importance", "ddp"), ("obs", "ddp"), ("obs", "zero2")]
ALONE = {
    "capacity_factor": None,
    "eval_capacity_factor": None,
    "router_noise": 0.0,
    "importance_loss": 0.0,
    "load_loss": 0.0,
}
"""Settings under which no image's result depends on the others of its batch."""


def fit(mode, folder, callbacks, **fields):
    """Fit in one mode; return the losses of rank 0."""
    world_size = MODES[mode][1]

    def rank(_):
        warnings.simplefilter("ignore")  # those of deepspeed are not ours to mend
        L.seed_everything(1, verbose=False)
        losses = Losses()
        images = data()
        images.batch_size = GLOBAL_BATCH // world_size
        model = module(architecture={**DIGITS, **fields})
        options = {"devices": world_size, "strategy": strategy_of(mode), "max_steps": 6}
        run = trainer(folder / mode, [losses, *callbacks()], **options)
        run.fit(model, images)
        return losses.values

    ranks = run_distributed(rank, world_size, group=False)
    assert all(values == ranks[0] for values in ranks)
    return ranks[0]


def prune(criterion, more=()):
    pruning = OneShotPruning(criterion, keep_ratio=0.5)
    return [pruning, *more, ExpertMonitor(every_n_steps=2), ExportModel("model")]


@pytest.mark.parametrize(
    ("criterion", "mode"),
    [
        ("importance", "zero2"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS),
    ],
)
def test_a_pruned_classifier_trains_as_on_one_process(criterion, mode, tmp_path):
    one, two = (
        fit(m, tmp_path, lambda: prune(criterion), **ALONE, dropped_experts="delete")
        for m in ("single", mode)
    )
    assert two == pytest.approx(one, abs=1e-5)
    plans = [KeepPlan.load(tmp_path / m / "plan.json") for m in ("single", mode)]
    assert plans[0] == plans[1]
    first, second = (report(tmp_path, m) for m in ("single", mode))
    for stage in ("before", "pruned"):
        for key in ("accuracy", "images"):
            assert second["images"][stage][key] == first["images"][stage][key]
    assert second["calibration"] == first["calibration"]
    assert second["export"]["max_abs_logit_difference"] == 0


def report(folder, mode):
    return json.loads((folder / mode / "report.json").read_text())


@pytest.mark.parametrize("mode", some(["ddp"], ["zero2"]))
def test_a_refit_on_two_processes_is_that_on_one(mode, tmp_path):
    callbacks = partial(prune, "router_norm", [Refit()])
    one, two = (fit(m, tmp_path, callbacks, **ALONE) for m in ("single", mode))
    assert two == pytest.approx(one, abs=2e-4)
    first, second = (report(tmp_path, m)["refit"] for m in ("single", mode))
    assert second["loss_after"] == pytest.approx(first["loss_after"], rel=1e-2)
    assert second["tokens"] == first["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"router_type": "expert_choice"}, {"num_members": 2}])
def test_places_noise_and_balance_are_those_of_each_rank(fields, tmp_path):
    one, two = (fit(m, tmp_path, partial(prune, "importance"), **fields) for m in SHARED)
    assert two == pytest.approx(one, abs=1e-5)
    for mode in SHARED:
        assert list(report(tmp_path, mode)["images"]) == ["before", "pruned", "recovered"]
        assert lit_moe.load(tmp_path / mode / "model").config.num_experts == 4


@pytest.mark.parametrize("mode", some(["ddp"], ["zero2"]))
def test_experts_are_dropped_for_a_task_as_on_one_process(mode, tmp_path):
    def callbacks():
        return [TaskSpecificPruning(beta=0.9, window=2, eager=False), ExportModel("model")]

    one, two = (fit(m, tmp_path, callbacks, **ALONE) for m in ("single", mode))
    plans = [KeepPlan.load(tmp_path / m / "plan.json") for m in ("single", mode)]
    assert plans[0] == plans[1]
    assert any(len(ids) < 8 for ids in plans[0].kept.values())
    assert two == pytest.approx(one, abs=1e-5)
