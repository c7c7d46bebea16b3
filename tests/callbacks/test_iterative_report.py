"""What rounds leave in the report, and when a round is over."""

import json
from itertools import pairwise

import pytest

from lit_moe import MoEModule
from lit_moe.callbacks import IterativePruning, ReportWriter
from lit_moe.callbacks.rounds import FineTuning, as_reported, mean_load_cv
from lit_moe.masking import masked
from lit_moe.models import build_model
from lit_moe.module import OptimizerConfig
from lit_moe.report import RoundReport, read_json
from lit_moe.stats import observe
from lit_moe.testing import random_plan


class Watched(IterativePruning):
    """Notes what is left, and how far training is, at the end of each round."""

    def __init__(self, **options):
        super().__init__(**options)
        self.ends = []

    def on_round_end(self, trainer, module, number):
        tokens = self.tokens_trained(trainer)
        self.ends.append((number, trainer.global_step, tokens, self.kept(module)))


@pytest.fixture
def run(checkpoint, make_data, make_trainer):
    """Return a function that drops in rounds, and the folder of the run."""

    def fit(fine_tuning, **options):
        pruning = Watched(criterion="ean", keep_ratio=0.5, rounds=4, fine_tuning=fine_tuning)
        writer = ReportWriter(measure_quality=False, figures=False)
        trainer = make_trainer(pruning, writer, max_epochs=-1, **options)
        module = MoEModule(str(checkpoint), optimizer=OptimizerConfig(learning_rate=1e-3))
        trainer.fit(module, datamodule=make_data())
        return pruning, module, writer

    return fit


def test_a_round_is_over_when_its_training_is(run):
    pruning, module, _ = run(
        FineTuning(first=2, growth=1.0, unit="steps", when_data_ends="repeat"), max_steps=-1
    )
    assert [number for number, *_ in pruning.ends] == [1, 2, 3, 4]
    assert [step for _, step, *_ in pruning.ends] == [2, 4, 6, 8]
    assert [tokens for _, _, tokens, _ in pruning.ends] == [2 * 8 * 32 * n for n in (1, 2, 3, 4)]
    counts = [set(plan.counts.values()) for *_, plan in pruning.ends]
    assert counts == [{7}, {6}, {5}, {4}]
    for (*_, before), (*_, after) in pairwise(pruning.ends):
        assert all(set(after.kept[name]) < set(before.kept[name]) for name in before)
    assert pruning.ends[-1][-1] == module.plan


def test_without_training_a_round_is_over_at_once(run):
    pruning, module, _ = run(None, max_steps=0, limit_train_batches=0)
    assert [(number, step) for number, step, *_ in pruning.ends] == [(n, 0) for n in (1, 2, 3, 4)]
    assert pruning.ends[-1][-1] == module.plan


def test_the_report_has_a_line_for_each_round(run, checkpoint, make_data):
    training = FineTuning(first=2, growth=1.0, unit="steps", when_data_ends="repeat")
    _, _, writer = run(training, max_steps=-1)
    rounds = read_json(writer.folder / "report.json").rounds
    assert [(r.round, r.step, r.experts) for r in rounds] == [
        (1, 0, 14),
        (2, 2, 12),
        (3, 4, 10),
        (4, 6, 8),
    ]
    assert [r.tokens_before for r in rounds] == [0, 512, 1024, 1536]
    batches = list(make_data().calibration_dataloader())
    model = build_model(str(checkpoint), dtype="float32")
    stats = observe(model, batches).layers.values()
    assert rounds[0].load_cv == pytest.approx(sum(s.load_cv for s in stats) / 2)
    lines = json.loads((writer.folder / "rounds.json").read_text())["rounds"]
    assert [as_reported(line) for line in lines] == rounds
    text = (writer.folder / "report.md").read_text()
    assert "| 4 | 8 | 6 | 1,536 |" in text


def test_only_experts_that_are_left_count_in_the_load(checkpoint, make_data):
    model = build_model(str(checkpoint), dtype="float32")
    batches = list(make_data().calibration_dataloader())
    plan = random_plan(model)
    with masked(model, plan):
        seen = observe(model, batches)
    expected = []
    for name, ids in plan.kept.items():
        load = seen.layers[name].count[list(ids)]
        expected.append(float(load.std(unbiased=False) / load.mean()))
    found = mean_load_cv(seen, plan.kept)
    everyone = mean_load_cv(seen, {name: tuple(range(8)) for name in plan})
    assert found == pytest.approx(sum(expected) / len(expected))
    assert everyone is not None
    assert found is not None
    assert everyone > found
    assert mean_load_cv(None, plan.kept) is None


def test_a_line_of_an_older_run_has_no_load():
    line = {"round": 2, "step": 5, "tokens_before": 9, "kept": {"a": [0, 1], "b": [3]}}
    assert as_reported(line) == RoundReport(2, 5, 9, 3, None)
