"""The cells of a comparison are those of the library and the callbacks, measured once each."""

import copy
import json

import pytest
import torch

import lit_moe
from lit_moe.callbacks import IterativePruning, ReportWriter
from lit_moe.callbacks.rounds import FineTuning
from lit_moe.compare import calibration
from lit_moe.compare import cells as cells_module
from lit_moe.compare.cells import plan_of, settings_of, task_data
from lit_moe.compare.options import TaskOptions
from lit_moe.compare.run import compare
from lit_moe.compare.text import ComparedText
from lit_moe.criteria.base import Criterion
from lit_moe.errors import LitMoEError
from lit_moe.evaluate import evaluate_perplexity
from lit_moe.models import build_model
from lit_moe.stats import GATHERABLE

ALL = ["one_shot", "iterative", "lottery"]


class Broken(Criterion):
    """Cannot score anything."""

    def scores(self, evidence):  # noqa: ARG002
        raise LitMoEError("this model has no such thing")


BROKEN = f"{__name__}.Broken"


def cells(found, **wanted):
    """Return the cells whose key has these values, by ratio."""
    return {
        key["keep_ratio"]: value
        for key, value in found.store.all("cell")
        if all(key[name] == value for name, value in wanted.items())
    }


def test_a_one_shot_cell_is_what_the_library_gives(small_options, checkpoint):
    options = small_options(criteria=["ean", "ege"], directions=["paper", "opposite"])
    found = compare(options)
    text = ComparedText(options.text, str(checkpoint)).drawn(1)
    model = build_model(str(checkpoint), dtype="float32")
    stats = lit_moe.observe(model, text.calibration(), gather=GATHERABLE)
    batches, domains = text.evaluation()
    whole = evaluate_perplexity(model, batches, domains)
    assert found.summary.whole.values == (whole.perplexity,)
    scores = lit_moe.score(stats, "ean")
    for direction, sign in (("paper", 1), ("opposite", -1)):
        for ratio in (0.75, 0.5):
            plan = lit_moe.select({k: sign * v for k, v in scores.items()}, keep_ratio=ratio)
            smaller = copy.deepcopy(model)
            lit_moe.shrink(smaller, plan)
            expected = evaluate_perplexity(smaller, batches, domains).perplexity
            cell = cells(found, criterion="ean", seed=1, direction=direction)[ratio]
            assert plan_of(cell) == plan
            assert cell["perplexity"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_rounds_without_training_are_those_of_the_callback(
    small_options, checkpoint, make_trainer, scope
):
    options = small_options(procedures=["iterative"], seeds=[3], scopes=[scope])
    (cell,) = cells(compare(options), keep_ratio=0.5).values()
    text = ComparedText(options.text, str(checkpoint)).drawn(3)
    budget = lit_moe.selection.Budget(keep_ratio=0.5, scope=scope)
    pruning = IterativePruning(criterion="ean", budget=budget, rounds=2)
    module = lit_moe.MoEModule(model_name_or_path=str(checkpoint))
    trainer = make_trainer(
        pruning, ReportWriter(measure_quality=False, figures=False), limit_train_batches=0
    )
    trainer.fit(module, datamodule=text)
    assert module.plan == plan_of(cell)


def test_a_lottery_to_a_larger_ratio_is_on_the_way_to_a_smaller_one(small_options, tmp_path):
    both = compare(small_options(procedures=["lottery"], seeds=[0]))
    alone = compare(
        small_options(
            procedures=["lottery"],
            seeds=[0],
            keep_ratios=[0.75],
            rounds=1,
            output=str(tmp_path / "alone"),
        )
    )
    first, second = cells(both)[0.75], cells(both)[0.5]
    (same,) = cells(alone).values()
    assert {k: v for k, v in first.items() if "second" not in k} == {
        k: v for k, v in same.items() if "second" not in k
    }
    assert (first["trained_tokens"], second["trained_tokens"]) == (2 * 4 * 32, 4 * 4 * 32)
    for cell in (first, second):
        for layer, load in cell["load"].items():
            assert len(load["before"]) == len(load["after"]) == len(cell["kept"][layer])
            assert sum(load["before"]) == sum(load["after"]) == 2 * 256


def test_training_helps_and_reaches_no_other_cell(small_options, cells_of, tmp_path):
    """Neither the order of the cells nor their neighbours change a number."""
    training = FineTuning(first=8, growth=1.0, unit="steps", when_data_ends="repeat")
    fields = {"procedures": ALL, "criteria": ["ean", "rwn"]}
    found = compare(small_options(**fields, fine_tuning=training))
    turned = {
        "procedures": ALL[::-1],
        "criteria": ["rwn", "ean"],
        "seeds": [1, 0],
        "keep_ratios": [0.5, 0.75],
        "output": str(tmp_path / "turned"),
    }
    again = compare(small_options(**turned, fine_tuning=training))
    assert len(cells_of(found)) == 3 * 2 * 2 * 2
    assert cells_of(found) == cells_of(again)
    by_procedure = {row.line.procedure: row for row in found.summary.rows}
    trained, untrained = (by_procedure[p].perplexity[0.5].mean for p in ("lottery", "iterative"))
    assert trained < untrained


def test_one_pass_serves_all_criteria_and_ratios(small_options, monkeypatch):
    calls = []

    def counted(name, real):
        def call(*words, **more):
            calls.append(name)
            return real(*words, **more)

        return call

    for name in ("observe", "observe_gradients"):
        monkeypatch.setattr(calibration, name, counted(name, getattr(calibration, name)))
    criteria = ["reap", "ean", "ecc", "ets", "ege", "egn", "rwn"]
    compare(small_options(criteria=criteria))
    assert sorted(calls) == ["observe"] * 2 + ["observe_gradients"] * 2


def test_a_grid_grows_without_measuring_anything_twice(small_options, monkeypatch, output):
    compare(small_options())
    before = (output / "cells.jsonl").read_text()
    found = compare(small_options(criteria=["rwn", "ean"], seeds=[0, 1, 2]))
    after = (output / "cells.jsonl").read_text()
    assert after.startswith(before)
    assert after.count('"kind": "cell"') == 2 * 3 * 2
    assert len(found.summary.rows) == 2

    def refuse(*_, **__):
        raise AssertionError("nothing is missing")

    monkeypatch.setattr(cells_module, "build_model", refuse)
    again = compare(small_options(criteria=["rwn", "ean"], seeds=[0, 1, 2]))
    assert [row.perplexity for row in again.summary.rows] == [
        row.perplexity for row in found.summary.rows
    ]


def test_a_cell_that_fails_says_why_and_the_rest_goes_on(small_options, output):
    options = small_options(criteria=[BROKEN, "ean", "naee"], procedures=ALL[:2], seeds=[0])
    found = compare(options)
    assert not found.is_complete
    assert {row.line.criterion for row in found.summary.rows} == {"ean", "naee"}
    said = {(f.line.criterion, f.line.procedure): f.sentence for f in found.summary.failures}
    assert said[BROKEN, "one_shot"] == "this model has no such thing"
    assert "uses masks of its own" in said["naee", "iterative"]
    report = json.loads((output / "report.json").read_text())
    assert {entry["criterion"] for entry in report["failed"]} == {BROKEN, "naee"}
    assert "no such thing" in (output / "report.md").read_text()


def test_random_has_as_many_draws_as_asked_and_others_one_per_seed(small_options):
    found = compare(small_options(random_draws=4))
    control, other = found.summary.rows
    assert control.line.criterion == "random"
    assert len(control.perplexity[0.5].values) == 4
    assert len(set(control.perplexity[0.5].values)) == 4
    assert len(other.perplexity[0.5].values) == 2


def test_several_runs_of_one_model_count_like_seeds(small_options, tmp_path):
    from lit_moe.testing import tiny_moe

    other = tmp_path / "other"
    tiny_moe("mixtral", vocab_size=1024, seed=5).save_pretrained(other)
    models = [*small_options().models, str(other)]
    found = compare(small_options(models=models))
    assert len(found.summary.whole.values) == 2
    assert len(found.summary.rows[0].perplexity[0.5].values) == 4
    shapes = tmp_path / "shapes"
    tiny_moe("mixtral", vocab_size=1024, num_experts=4).save_pretrained(shapes)
    with pytest.raises(LitMoEError, match="num_local_experts is 8 in .* and 4 in"):
        compare(small_options(models=[models[0], str(shapes)]))


def test_another_checkpoint_at_the_same_place_is_refused(small_options, tmp_path):
    from lit_moe.testing import tiny_moe

    folder = tmp_path / "model"
    text = small_options().text
    text.tokenizer = small_options().models[0]
    tiny_moe("mixtral", vocab_size=1024).save_pretrained(folder)
    compare(small_options(models=[str(folder)], text=text))
    tiny_moe("mixtral", vocab_size=1024, seed=9).save_pretrained(folder)
    with pytest.raises(LitMoEError, match="results of another checkpoint"):
        compare(small_options(models=[str(folder)], text=text))


def test_questions_are_asked_of_every_cell(small_options):
    options = small_options(tasks=TaskOptions(task="capitals", sequence_length=128), seeds=[0])
    options.text.tokenizer = None
    found = compare(options)
    for cell in cells(found).values():
        assert 0 <= cell["tasks"]["0-shot"]["exact_match"] <= 1
        assert cell["tasks"]["0-shot"]["num_items"] > 10


@pytest.mark.parametrize("chat", [False, True, "auto"])
def test_only_results_of_a_chat_say_how_questions_were_asked(small_options, checkpoint, chat):
    tasks = TaskOptions(chat=chat)
    options = small_options(tasks=tasks)
    settings = settings_of(options, ComparedText(options.text, str(checkpoint)))["tasks"]
    assert settings.get("chat", False) == chat
    assert ("chat" in settings) is bool(chat)
    assert settings["task"] == "capitals"
    assert task_data(tasks, str(checkpoint)).chat == chat


def test_the_live_model_is_what_it_was(small_options, checkpoint, monkeypatch):
    built = []

    def build(*words, **more):
        built.append(build_model(*words, **more))
        return built[-1]

    monkeypatch.setattr(cells_module, "build_model", build)
    compare(small_options(procedures=ALL, criteria=["ege"], ablation=True))
    (model,) = built
    fresh = build_model(str(checkpoint), dtype="float32").state_dict()
    assert all(torch.equal(fresh[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
