"""Rounds of dropping: one-shot, iterative and lottery by one driver, exact against plain loops."""

from pathlib import Path

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM

import lit_moe
from lit_moe import MoEModule
from lit_moe.adapters import find_sites
from lit_moe.adapters.router_mask import is_masked
from lit_moe.callbacks import ExportModel, OneShotPruning, ReportWriter
from lit_moe.callbacks.base import composed
from lit_moe.callbacks.iterative import IterativePruning
from lit_moe.callbacks.rounds import FineTuning
from lit_moe.distill.losses import next_token_loss
from lit_moe.errors import LitMoEError
from lit_moe.plan import KeepPlan
from tests.callbacks.conftest import Double
from tests.callbacks.lotteries import (
    LAYERS,
    NO_QUALITY,
    RATE,
    Watch,
    assert_same_weights,
    rounds_of,
    steps,
)


def by_hand(checkpoint, data, keeps, batches, criterion, dtype=torch.float32):
    """Cut, train with a new optimizer, cut again; return the model and the plan of all rounds."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).eval()
    if dtype == torch.float64:
        model.set_experts_implementation("eager")
    plan = None
    for turn, keep in enumerate(keeps):
        stats = lit_moe.observe(model, data.calibration_dataloader(), gather=["outputs", "pairs"])
        step = lit_moe.select(lit_moe.score(stats, criterion), keep_experts=keep)
        lit_moe.shrink(model, step)
        plan = step if plan is None else composed(plan, step)
        model.train()
        adam = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0)
        num_steps = len(batches) // len(keeps)
        for ids in batches[turn * num_steps : (turn + 1) * num_steps]:
            next_token_loss(model(ids).logits, ids, torch.ones_like(ids)).backward()
            adam.step()
            adam.zero_grad()
        model.eval()
    return model, plan


@pytest.mark.parametrize("criterion", ["ean", "ecc", "reap"])
def test_rounds_without_training_are_a_loop_of_observe_score_select_shrink(
    criterion, run, checkpoint, make_data
):
    pruning = IterativePruning(criterion, keep_ratio=0.5, rounds=2)
    trainer, module, writer = run(pruning, max_steps=0)
    model, plan = by_hand(checkpoint, make_data(), (6, 4), [], criterion)
    assert module.plan == plan
    assert_same_weights(module.built_model, model, 0)
    assert [len(r["kept"][LAYERS[0]]) for r in rounds_of(trainer)["rounds"]] == [6, 4]
    assert writer.report.experts[LAYERS[0]].kept == list(plan.kept[LAYERS[0]])
    assert KeepPlan.load(Path(trainer.log_dir) / "plan.json") == plan


def test_one_round_is_one_shot(run):
    _, iterative, _ = run(IterativePruning("ean", keep_ratio=0.5, rounds=1), max_steps=0)
    _, one_shot, _ = run(OneShotPruning("ean", keep_ratio=0.5), max_steps=0)
    assert iterative.plan == one_shot.plan


def test_scores_are_estimated_anew_in_each_round(run):
    differ = []
    for criterion in ("ean", "ecc", "ets", "eas"):
        plans = [
            run(IterativePruning(criterion, keep_ratio=0.25, rounds=n), max_steps=0)[1].plan
            for n in (6, 1)
        ]
        assert all(plan.counts == dict.fromkeys(LAYERS, 2) for plan in plans)
        differ.append(plans[0] != plans[1])
    assert any(differ)


def test_a_lottery_ends_in_the_weights_of_a_model_cut_and_trained_in_turns(
    run, checkpoint, make_data
):
    watch = Watch()
    pruning = IterativePruning("ean", keep_ratio=0.5, rounds=4, fine_tuning=steps(2))
    trainer, module, writer = run(pruning, watch, kind=Double)
    keeps, dtype = (7, 6, 5, 4), torch.float64
    model, plan = by_hand(checkpoint, make_data(), keeps, watch.batches, "ean", dtype)
    assert trainer.global_step == 8
    assert module.plan == plan
    assert_same_weights(module.built_model, model, 2e-4)
    assert watch.empty == [True, False] * 4
    assert rounds_of(trainer)["steps"] == [2, 2, 2, 2]
    assert [r["step"] for r in rounds_of(trainer)["rounds"]] == [0, 2, 4, 6]
    tokens = 8 * make_data().blocks("train").input_ids.numel()
    sentence = f"4 rounds of dropping by ean, fine-tuned on {tokens:,} tokens in total (8 steps)"
    assert f"{sentence}, which repeated the training text: 8.0 passes" in writer.report.warnings


@pytest.mark.parametrize("criterion", ["ets", "eas", "ege", "ews", "random"])
def test_criteria_of_all_kinds_score_a_masked_model(criterion, run):
    pruning = IterativePruning(criterion, keep_ratio=0.5, rounds=4, fine_tuning=steps(1))
    trainer, module, _ = run(pruning)
    kept = [set(r["kept"][LAYERS[1]]) for r in rounds_of(trainer)["rounds"]]
    assert [len(ids) for ids in kept] == [7, 6, 5, 4]
    assert kept[0] > kept[1] > kept[2] > kept[3]
    assert set(module.plan.kept[LAYERS[1]]) == kept[3]
    assert not any(is_masked(m) for m in module.built_model.modules())


def test_the_schedule_begins_anew_with_each_round_or_goes_on(run):
    anew, on = Watch(), Watch()
    run(
        IterativePruning("euf", keep_ratio=0.75, rounds=2, fine_tuning=steps(3)),
        anew,
        schedule="linear",
    )
    keep = steps(3, optimizer="keep")
    run(IterativePruning("euf", keep_ratio=0.75, rounds=2, fine_tuning=keep), on, schedule="linear")
    third = [RATE, RATE * 2 / 3, RATE / 3]
    assert anew.rates == pytest.approx(third + third)
    assert on.rates == pytest.approx([RATE * k / 6 for k in (6, 5, 4, 3, 2, 1)])
    assert anew.empty == [True, False, False] * 2
    assert on.empty == [True, False, False, False, False, False]


@pytest.mark.parametrize("save_at", [1, 2, 3, 5])
def test_a_run_resumed_within_and_between_rounds_equals_one_that_was_not_stopped(
    save_at, run, tmp_path
):
    def pruning():
        return IterativePruning("ean", keep_ratio=0.5, rounds=2, fine_tuning=steps(3))

    saved = str(tmp_path / "some.ckpt")
    whole, straight, first = run(pruning(), Watch(save_at, saved), schedule="cosine")
    trainer, resumed, second = run(pruning(), resume_from=saved, schedule="cosine")
    assert trainer.global_step == whole.global_step == 6
    assert resumed.plan == straight.plan
    assert_same_weights(resumed.built_model, straight.built_model, 1e-4)
    assert rounds_of(trainer)["rounds"] == rounds_of(whole)["rounds"]
    assert second.report.warnings == first.report.warnings


def test_hidden_experts_are_not_reported_as_unrouted_after_a_resume(run, tmp_path):
    def pruning():
        return IterativePruning("ean", keep_ratio=0.25, rounds=3, fine_tuning=steps(2))

    saved = str(tmp_path / "middle.ckpt")
    run(pruning(), Watch(3, saved))
    hidden = torch.load(saved, weights_only=False)["callbacks"]["IterativePruning"]["mask"]
    assert KeepPlan.from_dict(hidden).counts == dict.fromkeys(LAYERS, 4)
    _, _, writer = run(pruning(), resume_from=saved)
    assert writer.report.calibration.tokens > 0  # round 3 was estimated in this process
    assert writer.report.unrouted == {}
    assert not any("saw none" in warning for warning in writer.report.warnings)


def test_a_checkpoint_of_the_end_resumes_and_tests_as_the_small_model(
    run, tmp_path, checkpoint, make_data, make_trainer
):
    pruning = IterativePruning("ean", keep_ratio=0.5, rounds=2, fine_tuning=steps(2))
    trainer, module, _ = run(pruning)
    saved = str(tmp_path / "end.ckpt")
    trainer.save_checkpoint(saved)
    again = IterativePruning("ean", keep_ratio=0.5, rounds=2, fine_tuning=steps(2))
    _, resumed, _ = run(again, resume_from=saved)
    assert resumed.plan == module.plan
    assert_same_weights(resumed.built_model, module.built_model, 0)


def test_a_checkpoint_from_within_the_rounds_is_tested_under_its_mask(
    run, tmp_path, checkpoint, make_data, make_trainer
):
    saved = str(tmp_path / "middle.ckpt")
    fields = {"keep_ratio": 0.25, "rounds": 3, "fine_tuning": steps(2)}
    run(IterativePruning("ean", **fields), Watch(5, saved))
    stored = torch.load(saved, weights_only=False)["callbacks"]["IterativePruning"]
    assert stored["round"] == 3
    mask = KeepPlan.from_dict(stored["mask"])
    assert mask.counts == dict.fromkeys(LAYERS, 2)
    pruning = IterativePruning("ean", **fields)
    trainer = make_trainer(pruning, ReportWriter(**NO_QUALITY))
    module = MoEModule(str(checkpoint))
    (tested,) = trainer.test(module, datamodule=make_data(), ckpt_path=saved, verbose=False)
    assert any(is_masked(m) for m in module.built_model.modules())
    pruning._hidden.show()
    model = module.built_model.eval()
    lit_moe.shrink(model, mask)
    total, num_rows = 0.0, 0
    with torch.no_grad():
        for batch in make_data().test_dataloader():
            logits = model(batch["input_ids"]).logits
            loss = next_token_loss(logits, batch["input_ids"], batch["attention_mask"])
            total, num_rows = total + float(loss) * len(logits), num_rows + len(logits)
    assert tested["test/loss"] == pytest.approx(total / num_rows, rel=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_the_export_has_the_experts_of_the_last_round_wherever_it_stands_in_the_list(first, run):
    pruning = IterativePruning("ean", keep_ratio=0.5, rounds=2, fine_tuning=steps(1))
    exporter = ExportModel("model")
    callbacks = [exporter, pruning] if first else [pruning, exporter]
    writer = ReportWriter(figures=False)
    trainer, module, _ = run(*callbacks, writer=writer)
    exported = AutoModelForCausalLM.from_pretrained(Path(trainer.log_dir) / "model")
    assert exported.config.num_local_experts == 4
    assert_same_weights(exported, module.built_model, 0)
    assert list(writer.report.quality) == ["before", "pruned", "recovered"]
    report = writer.report.to_dict()
    assert report["parameters"]["after"] < report["parameters"]["before"]
    assert report["export"]["max_abs_logit_difference"] == 0.0


def test_a_global_ranking_lets_layers_differ(run):
    budget = lit_moe.selection.Budget(keep_ratio=0.5, scope="global")
    pruning = IterativePruning("ean", budget=budget, rounds=4, fine_tuning=steps(1))
    trainer, module, _ = run(pruning)
    totals = [sum(len(ids) for ids in r["kept"].values()) for r in rounds_of(trainer)["rounds"]]
    assert totals == [14, 12, 10, 8]
    assert [site.num_experts for site in find_sites(module.built_model)] == [
        len(module.plan.kept[name]) for name in LAYERS
    ]


def test_protected_experts_stay_through_all_rounds(run):
    protect = ["model.layers.0.mlp:0,7", "super-experts"]
    pruning = IterativePruning(
        "ean", keep_ratio=0.5, rounds=4, protect=protect, fine_tuning=steps(1)
    )
    _, module, writer = run(pruning)
    protected = writer.report.protected[LAYERS[0]]
    assert len(protected) == 3, "the two that are named, and the one of extreme outputs"
    assert set(protected) < set(module.plan.kept[LAYERS[0]])
    assert module.plan.counts == dict.fromkeys(LAYERS, 4)


def test_text_that_ends_early_leaves_rounds_without_training(run):
    stop = steps(1, unit="tokens", when_data_ends="stop")
    trainer, module, writer = run(
        IterativePruning("ean", keep_ratio=0.5, rounds=4, fine_tuning=stop)
    )
    assert trainer.global_step == 1
    assert module.plan.counts == dict.fromkeys(LAYERS, 4)
    assert "training ended early: 3 rounds had none after them" in writer.report.warnings[-1]


def test_training_after_rounds_without_training_is_the_users_own(run):
    trainer, module, _ = run(IterativePruning("ean", keep_ratio=0.5, rounds=2), max_steps=2)
    assert trainer.global_step == 2
    assert module.plan.counts == dict.fromkeys(LAYERS, 4)


def test_an_error_in_training_leaves_no_mask_behind(run, checkpoint):
    class Break(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            self.model = module.built_model
            if trainer.global_step == 2:
                raise OSError("the disk went away")

    breaking = Break()
    with pytest.raises(OSError, match="went away"):
        run(IterativePruning("ean", keep_ratio=0.5, rounds=4, fine_tuning=steps(1)), breaking)
    assert not any(is_masked(m) for m in breaking.model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of keep_ratio, keep_experts, max_bytes"),
        ({"keep_ratio": 0.5, "rounds": 0}, "rounds=0 must be at least 1"),
        ({"keep_ratio": 0.5, "criterion": "eann"}, "unknown criterion 'eann'"),
        (
            {"budget": lit_moe.selection.Budget(max_bytes="1MB", scope="global")},
            "max_bytes with a global ranking",
        ),
        (
            {"keep_ratio": 0.5, "criterion": "naee", "fine_tuning": steps(1)},
            "'naee' uses masks of its own",
        ),
    ],
)
def test_bad_fields_are_refused_at_construction(options, message):
    with pytest.raises(LitMoEError, match=message):
        IterativePruning(**options)


@pytest.mark.parametrize(
    ("options", "trainer_options", "message"),
    [
        ({"rounds": 3}, {}, r"rounds=3 does not divide .* drops 4 .* rounds can be 1, 2, 4"),
        ({"keep_ratio": 0.1}, {}, r"keep_ratio=0\.1 leaves 1 of 8"),
        ({"fine_tuning": FineTuning()}, {}, r"want 3,\d\d\d,\d\d\d tokens .*'repeat' or 'stop'"),
        (
            {"fine_tuning": steps(4)},
            {"max_steps": 3},
            r"takes 16 steps, but trainer\.max_steps is 3: set it to -1",
        ),
        (
            {"fine_tuning": steps(4)},
            {"max_epochs": 2},
            r"16 passes over the training text, but trainer\.max_epochs is 2",
        ),
        (
            {"fine_tuning": steps(4)},
            {"limit_train_batches": 0},
            "the run has no training text",
        ),
    ],
)
def test_impossible_rounds_are_refused_before_any_evaluation(
    options, trainer_options, message, checkpoint, make_data, make_trainer
):
    data = make_data(batch_size=len(make_data().blocks("train")), test_files=["/no/such/file.txt"])
    pruning = IterativePruning("euf", **{"keep_ratio": 0.5, **options})
    trainer = make_trainer(pruning, **{"max_steps": -1, "max_epochs": -1, **trainer_options})
    with pytest.raises(LitMoEError, match=message):
        trainer.fit(MoEModule(str(checkpoint)), datamodule=data)
