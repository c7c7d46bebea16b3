from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning import Callback
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    RichProgressBar,
    TQDMProgressBar,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lit_moe.search.scoring
from lit_moe import MoEModule
from lit_moe.adapters import count_experts, find_sites
from lit_moe.callbacks import Refit, WeightPruning
from lit_moe.callbacks.evolution_loop import is_in_validation
from lit_moe.callbacks.report import report_writer
from lit_moe.errors import LitMoEError, PlanError
from lit_moe.sharding import MoEDeepSpeed
from tests.callbacks.test_evolution import LAYERS, fit, history_of, quiet, searching
from tests.callbacks.test_evolution import make_texts as make_texts
from tests.callbacks.test_evolution import texts as texts

TRAINING = {"max_steps": 4, "limit_val_batches": 1.0, "val_check_interval": 2}


class Watching(Callback):
    """What another callback sees of a run."""

    def __init__(self):
        self.losses: list[float] = []
        self.experts: list[int] = []
        self.before_training: dict = {}

    def on_validation_end(self, _, pl_module):
        sites = find_sites(pl_module.built_model)
        self.experts.append(sum(count_experts(sites).values()))
        torch.rand(3)  # loops of a search leave the random numbers of training alone

    def on_train_start(self, trainer, _):
        progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
        self.before_training = {
            "metrics": dict(trainer.callback_metrics),
            "validated": progress.total.ready,
            "training": trainer.training,
        }
        self.random = torch.get_rng_state()

    def on_train_batch_end(self, _, __, outputs, *___):
        self.losses.append(float(outputs["loss"]))


@pytest.fixture
def run(checkpoint, make_texts, make_trainer, tmp_path):
    """Return a function that searches in one kind of loop and trains for four steps."""

    def make(loop, *callbacks, name=None, resume=None, search=None, val_dataloader=None, **options):
        torch.manual_seed(3)
        folder = tmp_path / (name or loop)
        watching = Watching()
        trainer = make_trainer(
            search or searching(loop=loop),
            watching,
            *callbacks,
            quiet(),
            default_root_dir=str(folder),
            **{**TRAINING, **options},
        )
        module, data = MoEModule(str(checkpoint)), make_texts(batch_size=4)
        data.val_dataloader = val_dataloader or data.val_dataloader
        module.resume_from = resume
        trainer.fit(module, datamodule=data, ckpt_path=resume)
        return trainer, module, watching

    return make


def history(trainer):
    return history_of(trainer.default_root_dir + "/search.jsonl")


def test_validation_loops_find_and_train_what_a_search_at_fit_start_does(run):
    first, before, seen_before = run("fit_start")
    second, within, seen_within = run("validation")
    assert history(first) == history(second)
    assert before.plan == within.plan
    assert count_experts(find_sites(within.built_model)) == dict.fromkeys(LAYERS, 4)
    assert seen_before.losses == seen_within.losses
    for name, tensor in before.state_dict().items():
        assert torch.equal(within.state_dict()[name], tensor)
    generations = {line["generation"] for line in history(first)[1:] if line["split"] == "search"}
    trained = seen_before.experts
    assert set(trained) == {8}
    assert seen_within.experts == [16] * len(generations) + trained
    assert second.global_step == 4
    assert torch.equal(seen_before.random, seen_within.random)
    nothing = {"metrics": {}, "validated": 0, "training": True}
    assert seen_within.before_training == seen_before.before_training == nothing


def test_each_generation_validates_the_best_so_far(run, checkpoint, make_texts, make_trainer):
    search = searching(loop="validation", effort={"rerank": 0})
    trainer, module, _ = run("validation", search=search, max_steps=0)
    events = EventAccumulator(trainer.log_dir).Reload()
    shown = events.Scalars("search/validation/loss")
    assert [point.step for point in shown] == [p.step for p in events.Scalars("search/best")]
    assert "validation/loss" not in events.Tags()["scalars"]
    assert len({point.value for point in shown}) > 1
    (found,) = make_trainer(limit_val_batches=1.0, logger=False).validate(
        module, datamodule=make_texts(batch_size=4), verbose=False
    )
    assert shown[-1].value == pytest.approx(found["validation/loss"], rel=1e-5)


def test_who_monitors_a_metric_begins_with_the_reduced_model(run):
    states = []
    for loop in ("fit_start", "validation"):
        stopping = EarlyStopping("validation/loss", patience=9)
        keeping = ModelCheckpoint(monitor="validation/loss", save_top_k=-1)
        run(loop, stopping, keeping, enable_checkpointing=True)
        states.append((stopping.state_dict(), keeping.current_score, len(keeping.best_k_models)))
    assert states[0] == states[1]
    assert states[0][2] == 2


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_progress_bars_show_the_loops(run, bar, capsys, caplog):
    caplog.set_level("INFO")
    trainer, _, seen = run("validation", bar(), enable_progress_bar=True, max_steps=1)
    assert len(seen.losses) == 1
    if bar is TQDMProgressBar:  # rich draws on terminals only
        assert "Validation" in "".join(capsys.readouterr())
    bests = [line for line in caplog.text.splitlines() if "of 20 candidates evaluated" in line]
    fitness = [line["fitness"] for line in history(trainer)[1:] if line["split"] == "search"]
    assert f"best {max(fitness):.2f}" in bests[-1]


def test_a_killed_search_goes_on_where_it_was(run, monkeypatch):
    whole, expected, seen_whole = run("validation", name="whole")
    scorer = lit_moe.search.scoring.SplitScorer
    original, calls = scorer.score, []

    def breaking(self, genome, samples=None, **options):
        calls.append(1)
        if len(calls) == 13:
            raise KeyboardInterrupt
        return original(self, genome, samples, **options)

    with monkeypatch.context() as patch:
        patch.setattr(scorer, "score", breaking)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run("validation", name="broken")
    again, module, seen = run("validation", name="broken")
    assert module.plan == expected.plan
    assert history(again) == history(whole)
    assert 2 < len(seen.experts) < len(seen_whole.experts)  # what is on record needs no loop
    complete, _, seen = run("validation", name="broken")
    assert history(complete) == history(whole)
    assert set(seen.experts) == {8}


def test_a_checkpoint_after_the_search_is_gone_on_from_without_one(run, tmp_path):
    path = tmp_path / "second.ckpt"

    class Keeping(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 2:
                trainer.save_checkpoint(path)

    whole, expected, seen = run("validation", Keeping())
    number = len(history(whole))
    Path(whole.default_root_dir, "search.jsonl").unlink()
    again, module, seen_again = run("validation", resume=str(path))
    assert module.plan == expected.plan
    assert seen_again.losses == seen.losses[2:]
    assert not Path(again.default_root_dir, "search.jsonl").exists()
    assert number > 20
    first, second = (report_writer(trainer).report for trainer in (whole, again))
    assert first.parameters.after not in (None, first.parameters.before)
    assert second.parameters == first.parameters
    for name, tensor in expected.state_dict().items():
        assert torch.equal(module.state_dict()[name], tensor)


@pytest.mark.filterwarnings("ignore:Total length of")
def test_what_rules_validation_loops_out_is_said_and_auto_goes_around_it(run):
    assert run("auto", max_steps=0)[2].experts
    _, module, seen = run("auto", name="blind", limit_val_batches=0, max_steps=0)
    assert seen.experts == []
    assert count_experts(find_sites(module.built_model)) == dict.fromkeys(LAYERS, 4)
    cases: list = [
        ({"limit_val_batches": 0}, (), "the trainer does not validate .limit_val_batches is 0"),
        ({}, (WeightPruning(ratio=0.5),), "WeightPruning would act before the search"),
        ({}, (Refit(),), "Refit would act before the search"),
        ({"val_dataloader": lambda: []}, (), "the validation data has no batch"),
    ]
    for options, callbacks, said in cases:
        with pytest.raises(LitMoEError, match=f"{said}.*loop: fit_start"):
            run("validation", *callbacks, name="refused", **options)
    sharded: Any = SimpleNamespace(strategy=MoEDeepSpeed(stage=3), enable_validation=True)
    assert not is_in_validation("auto", sharded)
    with pytest.raises(LitMoEError, match=r"under ZeRO stage 3 no rank .*; take loop: fit_start"):
        is_in_validation("validation", sharded)
    with pytest.raises(LitMoEError, match="loop='epochs' is unknown; use auto, validation, fit_"):
        run("epochs")


def test_weights_of_a_checkpoint_without_a_search_would_come_too_late(
    run, checkpoint, make_trainer, make_texts, tmp_path
):
    trainer = make_trainer(quiet(), max_steps=1)
    fit(trainer, checkpoint, make_texts())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(PlanError, match="of a run that searched for nothing"):
        run("validation", resume=str(tmp_path / "plain.ckpt"))
