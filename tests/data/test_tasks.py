"""Questions as training data: what is masked, drawn, split and refused."""

import itertools

import pytest
import torch
from torch.utils.data import default_collate

from lit_moe.assets import Split
from lit_moe.data import SplitFractions, TaskDataModule
from lit_moe.data.task_items import check_disjoint, cut, load_items
from lit_moe.data.task_rows import IGNORED
from lit_moe.errors import LitMoEError
from lit_moe.evaluate import GenerationOptions, Prompting, PromptTemplate
from tests.data.questions import PLAIN, data_of, item, numbered, rows_of, spelt


def test_only_the_answer_and_the_end_of_text_are_learnt():
    data = TaskDataModule(tokenizer="embedded", shots=[2])
    end = data.tokenizer.eos_token_id
    questions = data.items("train")
    for row, question in zip(rows_of(data, "train"), questions, strict=True):
        learnt = row["labels"] != IGNORED
        answer = data.tokenizer(" " + question.answers[0], add_special_tokens=False).input_ids
        assert row["input_ids"][learnt].tolist() == [*answer, end]
        assert torch.equal(row["labels"][learnt], row["input_ids"][learnt])
        prompt = row["input_ids"][: int(learnt.int().argmax())]
        assert data.tokenizer.decode(prompt) == data.prompting(2).prompt(question)
        assert int(row["attention_mask"].sum()) == len(prompt) + len(answer) + 1
        assert int(row["num_bytes"]) == len(f" {question.answers[0]}".encode())


def test_padding_is_neither_seen_nor_learnt():
    rows = rows_of(TaskDataModule(tokenizer="embedded"), "train")[:30]
    assert len({int(row["attention_mask"].sum()) for row in rows}) > 1, "some rows are padded"
    for row in rows:
        padding = row["attention_mask"] == 0
        assert (row["labels"][padding] == IGNORED).all()
        assert padding.tolist() == sorted(padding.tolist()), "padding is on the right"


def test_rows_take_turns_between_numbers_of_examples():
    data = TaskDataModule(tokenizer="embedded", shots=[0, 2])
    rows = default_collate(rows_of(data, "test"))
    counts = [text.count("Question:") for text in spelt(data, rows)]
    assert counts == [1 + 2 * (row % 2) for row in range(len(counts))]


def test_examples_come_from_training_and_never_from_the_question_itself():
    data = TaskDataModule(tokenizer="embedded")
    trained = {question.place for question in data.items("train")}
    splits: tuple[Split, ...] = ("train", "test", "calibration")
    for split, num_shots in itertools.product(splits, (1, 5)):
        for question in data.items(split):
            shots = [shot.place for shot in data.prompting(num_shots).shots(question)]
            assert len(set(shots)) == num_shots
            assert set(shots) <= trained - {question.place}


def test_a_question_that_differs_in_case_and_spaces_only_is_no_example():
    pool = [item("is it  SO?", "leak"), item("and this?"), item("or that?")]
    for seed in range(20):
        prompting = Prompting(PLAIN, pool, 2, seed)
        shots = {shot.place for shot in prompting.shots(item("Is it so?"))}
        assert shots == {"<and this?>", "<or that?>"}
        assert "leak" not in prompting.prompt(item("Is it so?"))


def test_examples_depend_on_the_seed_and_the_question_only():
    pool = [item(f"{n}?") for n in range(50)]
    drawn = {
        (seed, asked): tuple(s.place for s in Prompting(PLAIN, pool, 3, seed).shots(item(asked)))
        for seed, asked in itertools.product((0, 1), ("x", "y"))
    }
    assert len(set(drawn.values())) == 4
    again = Prompting(PLAIN, pool, 3, 0)
    again.shots(item("y"))
    assert tuple(s.place for s in again.shots(item("x"))) == drawn[0, "x"]


def test_a_prompt_is_instruction_examples_and_question():
    template = PromptTemplate(
        "Q: {question}\nA:", " {answer}.", "\n--\n", "Answer {}!".format("{{")
    )
    prompting = Prompting(template, [item("one?", "1", "uno")], 1)
    assert prompting.prompt(item("two?")) == "Answer {{!Q: one?\nA: 1.\n--\nQ: two?\nA:"


def test_braces_and_choices_in_a_template():
    template = PromptTemplate("{{{question}}} of {choices}:")
    asked = item("which", "b", choices=("a", "b"))
    assert template.question_text(asked) == "{which} of a, b:"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"question": "{question.__class__}"}, "no plain field name"),
        ({"question": "{question!r}"}, "no plain field name"),
        ({"question": "{question:>9}"}, "no plain field name"),
        ({"question": "{}"}, "no plain field name"),
        ({"question": "{question"}, "brace without a partner"),
        ({"question": "{question} {answer}"}, "names the answer"),
        ({"answer": " {question}"}, r"must name \{answer\} and nothing else"),
    ],
)
def test_templates_that_would_evaluate_or_tell_are_refused(options, message):
    with pytest.raises(LitMoEError, match=message):
        PromptTemplate(**options)


def test_a_template_that_names_a_missing_field_says_which_there_are(write):
    file = write("words", *numbered(range(9)))
    data = data_of(file, template=PromptTemplate("{passage} {question}"))
    with pytest.raises(
        LitMoEError, match=r"names \{passage\}, but .*words.jsonl, line 1 has only question"
    ):
        data.items("train")


def test_records_of_every_form_are_read(write):
    file = write(
        "forms",
        {"question": "a?", "answer": "one", "page": 3},
        {"question": "b?", "answers": ["two", "deux"], "domain": "french"},
        {"question": "c?", "answer": 1, "choices": ["no", "yes"]},
        {"question": "d?", "answer": "no", "choices": ["no", "yes"]},
    )
    first, second, third, fourth = load_items(file)
    assert (first.answers, first.fields["page"], first.domain) == (("one",), "3", "forms")
    assert (second.answers, second.domain) == (("two", "deux"), "french")
    assert (third.answers, fourth.answers) == (("yes",), ("no",))
    assert third.choices == ("no", "yes")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: expected an object"),
        ("3", "line 1: expected an object"),
        ('{"question": "a?"}', "KeyError"),
        ('{"answers": []}', "answers is empty"),
        ('{"answer": " "}', "must be a text with a word"),
        ('{"answer": 3}', "must be a text with a word"),
        ('{"answer": "a", "choices": ["a"]}', "at least 2 different choices, this has 1"),
        ('{"answer": "c", "choices": ["a", "b"]}', "'c' is none of the choices"),
        ('{"answer": 2, "choices": ["a", "b"]}', "IndexError"),
        ("", "holds no question"),
    ],
)
def test_malformed_records_name_file_and_line(line, message, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text(line)
    with pytest.raises(LitMoEError, match=message):
        load_items(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(LitMoEError, match=r"no\.jsonl does not exist"):
        load_items(tmp_path / "no.jsonl")


def test_splits_cover_everything_once_and_change_with_the_seed(write):
    file = write("all", *numbered(range(40)))
    splits = {
        seed: {
            split: {question.place for question in data_of(file, seed=seed).items(split)}
            for split in ("train", "calibration", "validation", "test")
        }
        for seed in (0, 1)
    }
    assert {split: len(places) for split, places in splits[0].items()} == {
        "train": 16,
        "calibration": 8,
        "validation": 4,
        "test": 12,
    }
    assert len(set.union(*splits[0].values())) == 40
    assert splits[0]["test"] != splits[1]["test"]


def test_questions_that_are_worded_alike_go_to_one_split():
    doubled = [item(f"{n} or {case}?".lower()) for n in range(20) for case in ("X", "x")]
    dealt = cut(doubled, {"test": 0.4}, PLAIN, seed=3)
    assert (len(dealt["train"]), len(dealt["test"])) == (24, 16)
    check_disjoint(dealt, PLAIN)


def test_files_of_a_split_are_taken_and_the_others_are_cut(write):
    data = data_of(
        write("a", *numbered(range(20))), test_files=[write("b", *numbered(range(50, 53)))]
    )
    assert [question.answers for question in data.items("test")] == [
        ("number 50",),
        ("number 51",),
        ("number 52",),
    ]
    assert len(data.items("train")) == 14


def test_overlapping_splits_are_refused_with_both_places(write):
    train = write("a", *numbered(range(20)))
    test = write("b", {"question": "what  is 7?", "answer": "seven"})
    with pytest.raises(LitMoEError, match=r"splits overlap: .*b\.jsonl, line 1 .*a\.jsonl, line 8"):
        data_of(train, test_files=[test], fractions=SplitFractions(0, 0, 0)).items("train")


def test_an_empty_split_is_refused_when_it_is_needed(write):
    file = write("few", *numbered(range(10)))
    data = data_of(file, fractions=SplitFractions(validation=0.0))
    assert len(data.items("test")) == 3
    with pytest.raises(LitMoEError, match="the validation split has no question"):
        data.val_dataloader()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fractions": {"test": 0.9}}, "less than 1 together"),
        ({"fractions": {"test": -0.1}}, "at least 0 each"),
        ({"shots": [-1]}, r"shots=\[-1\] must be"),
        ({"evaluated_shots": []}, r"evaluated_shots=\[\] must be"),
        ({"test_files": ["x"]}, "test_files are given without train_files"),
        ({"generation": {"max_new_tokens": 0}}, "max_new_tokens=0"),
        ({"generation": {"stop": ("",)}}, "an empty stop text"),
    ],
)
def test_options_that_cannot_work_are_refused_at_construction(options, message):
    kinds = {"fractions": SplitFractions, "generation": GenerationOptions}
    with pytest.raises(LitMoEError, match=message):
        TaskDataModule(**{k: kinds[k](**v) if k in kinds else v for k, v in options.items()})


def test_too_few_questions_to_split_and_to_draw_from(write):
    file = write("few", *numbered(range(3)))
    with pytest.raises(LitMoEError, match="3 different questions are too few to be split"):
        data_of(file).items("train")
    file = write("some", *numbered(range(6)))
    with pytest.raises(LitMoEError, match="9 examples before .* only 2 other questions"):
        data_of(file, shots=[9]).blocks("train")


def test_a_prompt_longer_than_the_context_says_how_many_examples_fit(write):
    file = write("long", *numbered(range(100, 130), prefix="In other words, what exactly is"))
    data = data_of(file, shots=[8], sequence_length=100)
    with pytest.raises(LitMoEError, match=r"8 examples takes \d+ tokens, but .* is 100") as caught:
        data.blocks("train")
    fitting = int(str(caught.value).split("would fit")[0].split()[-2])
    assert 0 < fitting < 8
    assert (
        data_of(file, shots=[fitting], sequence_length=100).blocks("train").input_ids.shape[1]
        <= 100
    )
    with pytest.raises(LitMoEError, match="not even the question alone fits"):
        data_of(file, shots=[8], sequence_length=10).blocks("train")
