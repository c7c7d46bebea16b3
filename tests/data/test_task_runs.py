"""Questions in runs: dealt to ranks, gone on with, evaluated, written in configs."""

import sys

import pytest
import torch
import yaml
from lightning import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from transformers import AutoModelForCausalLM

from lit_moe import MoEModule
from lit_moe.callbacks import OneShotPruning, Refit
from lit_moe.callbacks.report import report_writer
from lit_moe.data import SplitFractions, TaskDataModule
from lit_moe.data.task_rows import IGNORED
from lit_moe.errors import LitMoEError
from lit_moe.evaluate import GenerationOptions, PromptTemplate
from lit_moe.report import RunReport
from lit_moe.report.markdown import to_markdown
from tests.data.questions import PLAIN, data_of, numbered, on_rank, rows_of, spelt


def test_two_ranks_train_on_what_one_rank_trains_on():
    one = TaskDataModule(tokenizer="embedded", batch_size=8, seed=5)
    halves = [
        on_rank(TaskDataModule(tokenizer="embedded", batch_size=4, seed=5), rank, 2)
        for rank in range(2)
    ]
    steps = list(zip(one.train_dataloader(), *(h.train_dataloader() for h in halves), strict=True))
    assert len(steps) == 7
    for whole, *parts in steps:
        together = torch.cat([part["labels"] for part in parts])
        assert sorted(whole["labels"].tolist()) == sorted(together.tolist())
    first = steps[0][0]["input_ids"]
    assert first.tolist() != one.blocks("train").input_ids[:8].tolist(), "it is shuffled"


def test_training_goes_on_in_the_middle_of_an_epoch():
    def module():
        return TaskDataModule(tokenizer="embedded", shots=[0, 1], seed=2)

    whole = [batch["input_ids"] for batch in module().train_dataloader()]
    stopped = module()
    for _ in zip(range(3), stopped.train_dataloader(), strict=False):
        state = stopped.state_dict()
    resumed = module()
    resumed.load_state_dict(state)
    rest = [batch["input_ids"] for batch in resumed.train_dataloader()]
    assert len(rest) == len(whole) - 3
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[3:], strict=True))


def test_ranks_share_calibration_questions_and_a_filler_counts_for_nothing(write):
    data = data_of(write("odd", *numbered(range(25))), fractions=SplitFractions(calibration=0.2))
    assert len(data.items("calibration")) == 5
    shares = [list(data.calibration_dataloader(rank=rank, world_size=2)) for rank in range(2)]
    assert [sum(len(batch["input_ids"]) for batch in share) for share in shares] == [3, 3]
    filler = {key: value[-1] for key, value in shares[1][-1].items()}
    assert not filler["attention_mask"].any()
    assert (filler["labels"] == IGNORED).all()
    assert int(filler["num_bytes"]) == 0
    seen = [text for share in shares for batch in share for text in spelt(data, batch) if text]
    assert sorted(seen) == sorted(
        PLAIN.question_text(q) + f" {q.answers[0]}" + data.tokenizer.eos_token
        for q in data.items("calibration")
    )


def test_ranks_validate_on_all_questions_and_equally_often():
    whole = TaskDataModule(tokenizer="embedded")
    counts = []
    for rank in range(2):
        data = on_rank(TaskDataModule(tokenizer="embedded"), rank, 2)
        batches = list(data.val_dataloader())
        counts.append([len(batch["labels"]) for batch in batches])
        assert spelt(whole, batches[0]).count("") == rank, "the last row of rank 1 is a filler"
    assert counts == [[8], [8]]
    assert len(whole.items("validation")) == 15


def test_excerpts_are_told_apart_by_their_kind():
    data = TaskDataModule("domains", tokenizer="embedded")
    kinds = {"scripture", "code", "manual", "dictionary", "german", "french"}
    sizes = {}
    for split in ("train", "calibration", "validation", "test"):
        questions = data.items(split)
        sizes[split] = len(questions)
        counts = {kind: sum(q.answers == (kind,) for q in questions) for kind in kinds}
        assert len(set(counts.values())) == 1, "all kinds are equally frequent"
        assert all(set(question.choices) == kinds for question in questions)
    assert sizes == {"train": 6000, "calibration": 240, "validation": 120, "test": 240}


def test_pruning_refit_and_report_work_on_questions_unchanged(checkpoint, make_trainer):
    data = TaskDataModule(
        batch_size=8,
        evaluated_shots=[0],
        template=PromptTemplate("{question}"),
        generation=GenerationOptions(max_new_tokens=2),
    )
    trainer = make_trainer(OneShotPruning(keep_ratio=0.5), Refit(), max_steps=2)
    trainer.fit(MoEModule(str(checkpoint)), datamodule=data)
    report = report_writer(trainer).report
    assert list(report.quality) == ["before", "pruned", "refitted", "recovered"]
    assert list(report.tasks) == list(report.quality)
    assert {name for tasks in report.tasks.values() for name in tasks} == {"0-shot"}
    assert "0-shot: written right" in to_markdown(report)
    assert RunReport.from_dict(report.to_dict()) == report
    seen = sum(int(row["attention_mask"].sum()) for row in rows_of(data, "calibration"))
    assert report.calibration.tokens == seen


def test_gradients_of_questions_are_those_of_their_answers(checkpoint, make_trainer):
    data = TaskDataModule(
        batch_size=8,
        evaluated_shots=[0],
        template=PromptTemplate("{question}"),
        generation=GenerationOptions(max_new_tokens=2),
    )
    trainer = make_trainer(OneShotPruning(criterion="ege", keep_ratio=0.5), max_steps=0)
    trainer.fit(MoEModule(str(checkpoint)), datamodule=data)
    learnt = sum(int((row["labels"] != IGNORED).sum()) for row in rows_of(data, "calibration"))
    seen = sum(int(row["attention_mask"].sum()) for row in rows_of(data, "calibration"))
    report = report_writer(trainer).report
    assert (report.calibration.tokens, report.calibration.predicted) == (seen, learnt)
    assert 0 < learnt < seen
    told = to_markdown(report)
    assert f"observed on {seen:,} tokens\n- gradients of {learnt:,} predicted tokens" in told


def test_evaluation_knows_every_number_of_examples_and_refuses_before_the_first(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    runs: list[int] = []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    with pytest.raises(LitMoEError, match=r"longest prompt has \d+ tokens"):
        TaskDataModule(tokenizer="embedded", evaluated_shots=[0, 5]).evaluate(model)
    assert not runs
    quality = TaskDataModule(
        tokenizer="embedded", evaluated_shots=[0, 1], template=PromptTemplate("{question}")
    ).evaluate(model)
    assert {name: (q.num_shots, q.num_items) for name, q in quality.items()} == {
        "0-shot": (0, 45),
        "1-shot": (1, 45),
    }


@pytest.mark.parametrize("chat", [True, False, "auto"])
def test_every_option_can_be_written_in_a_config(tmp_path, monkeypatch, chat):
    options = {
        "task": "domains",
        "fractions": {"test": 0.4},
        "template": {"question": "{text}\n>", "instruction": "Which kind?\n"},
        "generation": {"max_new_tokens": 3, "stop": ["\n", "."]},
        "shots": [0, 2],
        "evaluated_shots": [1],
        "chat": chat,
    }
    config = {
        "seed_everything": 0,
        "model": {"class_path": "lit_moe.MoEModule"},
        "data": {"class_path": "lit_moe.data.TaskDataModule", "init_args": options},
    }
    file = tmp_path / "task.yaml"
    file.write_text(yaml.safe_dump(config))
    monkeypatch.setattr(sys, "argv", ["lit-moe"])
    built = LightningCLI(
        MoEModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        run=False,
        save_config_callback=None,
        args=["--config", str(file), f"--trainer.default_root_dir={tmp_path}"],
    ).datamodule
    assert built.fractions == SplitFractions(test=0.4)
    assert built.template == PromptTemplate("{text}\n>", instruction="Which kind?\n")
    assert built.generation == GenerationOptions(3, ("\n", "."))
    assert (built.shots, built.evaluated_shots) == ((0, 2), (1,))
    assert built.chat == chat
    assert type(built.chat) is type(chat)
