"""Experts that leave memory in each round: the same training, in less of it."""

import re

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import Strategy

from lit_moe.adapters import find_sites
from lit_moe.callbacks import (
    ExpertMonitor,
    ExportModel,
    IterativePruning,
    ReportWriter,
    WeightPruning,
)
from lit_moe.callbacks.rewrapping import check_can_rewrap
from lit_moe.errors import LitMoEError
from tests.callbacks.conftest import Double
from tests.callbacks.lotteries import LAYERS, Watch, assert_same_weights, rounds_of, steps


class Sizes(L.Callback):
    """Notes experts in memory and parameters in the optimizer at each step."""

    def __init__(self):
        self.experts, self.trained = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.experts.append([site.num_experts for site in find_sites(pl_module.built_model)])
        groups = trainer.optimizers[0].param_groups
        self.trained.append(sum(p.numel() for group in groups for p in group["params"]))


def pruning(compact="each_round", **options):
    fields = {"keep_ratio": 0.5, "rounds": 4, "fine_tuning": steps(3)}
    return IterativePruning("ean", **{**fields, **options}, compact=compact)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_cut_in_each_round_trains_like_hidden_until_the_end(run, schedule):
    hidden, masked, first = run(pruning("end"), schedule=schedule, kind=Double)
    sizes = Sizes()
    cut, compact, second = run(pruning(), sizes, schedule=schedule, kind=Double)
    assert compact.plan == masked.plan
    assert rounds_of(cut)["rounds"] == rounds_of(hidden)["rounds"]
    assert_same_weights(compact.built_model, masked.built_model, 1e-4)
    assert first.report.warnings == second.report.warnings
    # the first round is done before any training, by cutting in either case
    assert sizes.experts == [[n, n] for n in (7, 6, 5, 4) for _ in range(3)]
    assert sizes.trained[0] > sizes.trained[3] > sizes.trained[6] > sizes.trained[9]
    whole = sum(p.numel() for p in compact.built_model.parameters())
    assert sizes.trained[-1] == whole


@pytest.mark.parametrize("save_at", [1, 3, 5, 8])
def test_resumed_within_and_between_rounds(run, tmp_path, save_at):
    saved = str(tmp_path / "some.ckpt")
    whole, straight, _ = run(pruning(), Watch(save_at, saved), schedule="cosine")
    again, resumed, _ = run(pruning(), resume_from=saved, schedule="cosine")
    assert again.global_step == whole.global_step == 12
    assert resumed.plan == straight.plan
    assert rounds_of(again)["rounds"] == rounds_of(whole)["rounds"]
    assert_same_weights(resumed.built_model, straight.built_model, 1e-4)


def test_a_checkpoint_holds_the_small_model(run, tmp_path):
    saved = tmp_path / "some.ckpt"
    run(pruning(), Watch(11, str(saved)))
    stored = torch.load(saved, weights_only=False)
    assert stored["callbacks"]["IterativePruning"]["mask"] is None
    experts = [t for name, t in stored["state_dict"].items() if "experts.down_proj" in name]
    assert [len(t) for t in experts] == [4, 4]


def test_the_monitor_counts_those_that_are_left_in_the_rows_they_had(run):
    monitor = ExpertMonitor(every_n_steps=1)
    trainer, _, _ = run(pruning(), monitor)
    kept = [record["kept"] for record in rounds_of(trainer)["rounds"]]
    for name in LAYERS:
        rows = kept[0][name]  # training began with these
        for step, column in enumerate(monitor._history[name]):
            used = {rows[row] for row in column.nonzero()[0]}
            assert used
            assert used <= set(kept[step // 3][name])
    assert not monitor._handles


@pytest.mark.parametrize("first", [True, False])
def test_the_export_is_the_small_model(run, first):
    callbacks = [ExportModel("model"), pruning()]
    writer = ReportWriter(figures=False)
    run(*(callbacks if first else callbacks[::-1]), writer=writer)
    report = writer.report.to_dict()
    assert report["export"]["max_abs_logit_difference"] == 0.0
    assert list(report["quality"]) == ["before", "pruned", "recovered"]


def test_a_strategy_that_wraps_only_once_is_refused():
    trainer = L.Trainer(accelerator="cpu", logger=False)
    trainer.strategy.__class__ = type("FSDPStrategy", (Strategy,), {})
    with pytest.raises(LitMoEError, match="which FSDPStrategy cannot; take one device, ddp"):
        check_can_rewrap(trainer)


def test_what_cannot_be_is_refused(run):
    with pytest.raises(LitMoEError, match="has no moments; set it to reset"):
        pruning(fine_tuning=steps(3, optimizer="keep"))
    with pytest.raises(LitMoEError, match="use end or each_round"):
        pruning("always")
    thin = WeightPruning("magnitude", ratio=0.5)
    with pytest.raises(LitMoEError, match=re.escape("WeightPruning keeps by place")):
        run(pruning(), thin)
