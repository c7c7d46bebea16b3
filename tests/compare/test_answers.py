"""Questions beside the perplexity: what they depend on, and how they are told."""

import dataclasses
import json

import pytest

from lit_moe.compare.answers import answer_tables, answers_markdown
from lit_moe.compare.cells import settings_of
from lit_moe.compare.grid import Grid
from lit_moe.compare.options import Line, TaskOptions
from lit_moe.compare.run import compare
from lit_moe.compare.store import digest
from lit_moe.compare.summary import Row, Spread, Summary
from lit_moe.compare.text import ComparedText

LINE = Line("ean", "paper", "one_shot", "layer")


def cell(exact, chosen=None):
    quality = {"exact_match": exact, "f1": exact, "choice_accuracy": chosen}
    return {"perplexity": 2.0, "tasks": {"0-shot": quality, "5-shot": {**quality, "f1": 1.0}}}


def summary(whole, *cells):
    row = Row(LINE, {0.5: Spread((2.0,))}, {}, {0.5: cells})
    return Summary(Spread((2.0,)), (0.5, 0.25), (row,), (), (whole,))


def test_each_measure_and_number_of_shots_is_a_table_with_mean_and_spread():
    tables = answer_tables(summary(cell(0.75, 0.5), cell(0.25, 0.125), cell(0.5, 0.375)))
    assert [(t.measure, t.shots) for t in tables] == [
        (measure, shots)
        for measure in ("exact_match", "f1", "choice_accuracy")
        for shots in ("0-shot", "5-shot")
    ]
    assert tables[0].whole.values == (0.75,)
    assert tables[0].rows == {LINE: {0.5: Spread((0.25, 0.5))}}
    assert tables[3].rows == {LINE: {0.5: Spread((1.0, 1.0))}}
    assert tables[4].to_dict()["rows"][0]["values"]["0.5"]["mean"] == 0.25
    text = answers_markdown(summary(cell(0.75), cell(0.25), cell(0.5)))
    assert "### 5-shot: written answers that are right\n\n| kept | 100% | 50% | 25% |" in text
    assert "| one-shot ean | 0.75 | 0.38 (0.18) | failed |" in text
    assert "likeliest" not in text


def test_without_questions_there_is_no_table():
    found = summary({"perplexity": 2.0}, {"perplexity": 3.0})
    assert answer_tables(found) == []
    assert answers_markdown(found) == ""


def test_answers_are_in_both_reports(small_options, output):
    found = compare(small_options(tasks=TaskOptions(sequence_length=128), seeds=[0, 1]))
    report = json.loads((output / "report.json").read_text())
    (table,) = [t for t in report["questions"] if t["measure"] == "exact_match"]
    cells = [v["tasks"]["0-shot"]["exact_match"] for k, v in found.store.all("cell")]
    assert table["whole"]["num"] == 1
    (row,) = table["rows"]
    assert [row["values"][ratio]["num"] for ratio in ("0.75", "0.5")] == [2, 2]
    means = [row["values"][ratio]["mean"] for ratio in ("0.75", "0.5")]
    assert sum(means) / 2 == pytest.approx(sum(cells) / 4)
    assert "### 0-shot: written answers that are right" in (output / "report.md").read_text()


@pytest.fixture
def questions(tmp_path):
    """Return a function that writes questions with this answer and returns options for them."""

    def write(answer):
        lines = [json.dumps({"question": f"question {n}", "answer": answer}) for n in range(30)]
        (tmp_path / "questions.jsonl").write_text("\n".join(lines))
        return TaskOptions(train_files=[str(tmp_path / "questions.jsonl")])

    return write


def test_settings_know_other_questions_under_the_same_name(small_options, checkpoint, questions):
    text = ComparedText(small_options().text, str(checkpoint))
    yes, again, no = (
        settings_of(small_options(tasks=questions(a)), text) for a in ("yes", "yes", "no")
    )
    assert yes == again
    assert {name for name in yes["tasks"] if yes["tasks"][name] != no["tasks"][name]} == {
        "questions"
    }


def test_settings_know_another_chat_template_where_there_is_a_chat(small_options, checkpoint):
    for chat in (True, "auto", False):
        options = small_options(tasks=TaskOptions(chat=chat))
        found = []
        for template in ("{{ messages }}", "{{ messages[0] }}"):
            text = ComparedText(options.text, str(checkpoint))
            text.tokenizer.chat_template = template
            found.append(settings_of(options, text)["tasks"])
        assert (found[0] != found[1]) is bool(chat)


def test_results_with_what_comes_with_the_program_keep_their_names(small_options, checkpoint):
    options = small_options(tasks=TaskOptions(), procedures=["lottery"])
    text = ComparedText(options.text, str(checkpoint))
    assert set(settings_of(options, text)["tasks"]) == {
        *("task", "train_files", "test_files", "shots", "sequence_length", "batch_size")
    }
    options.text.train_files = None
    parts = [dataclasses.asdict(part) for part in (options.fine_tuning, options.optimizer)]
    key = next(Grid(options).keys("m"))
    assert key["training"] == digest([*parts, None, options.text.batch_size])


def test_a_lottery_on_other_text_under_the_same_name_is_another_cell(small_options, tmp_path):
    options = small_options(procedures=["one_shot", "lottery"], seeds=[0], keep_ratios=[0.5])
    options.text.train_files = [str(tmp_path / "text.txt")]
    keys = []
    for words in ("Some text of mine. ", "Some text of mine. ", "Quite another text! "):
        (tmp_path / "text.txt").write_text(words * 50)
        keys.append(list(Grid(options).keys("m")))
    assert keys[0] == keys[1]
    assert keys[0][0] == keys[2][0]
    assert keys[0][1]["training"] != keys[2][1]["training"]
