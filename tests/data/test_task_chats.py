"""Questions in the chat format of the tokenizer: rows, labels, examples, and when it is used."""

import logging
from typing import Any, cast

import pytest
import torch

from lit_moe.data import TaskDataModule
from lit_moe.data.task_rows import IGNORED, TaskRows
from lit_moe.errors import LitMoEError
from lit_moe.evaluate import GenerationOptions, PromptTemplate
from lit_moe.testing import tiny_moe
from tests.data.questions import data_of, numbered, rows_of
from tests.evaluate.chats import CHATML, LLAMA, VOCABULARY, beginning, chatting

WORDING = PromptTemplate("{question}", " {answer}", instruction="Be short.\n")


@pytest.fixture
def folder(tmp_path):
    """Return a function that saves a tokenizer and returns its folder."""

    def saved(tokenizer):
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        return str(tmp_path / "tokenizer")

    return saved


@pytest.mark.parametrize("make", [lambda: chatting(CHATML), lambda: beginning(LLAMA)])
def test_only_the_last_answer_and_the_end_of_its_turn_are_learnt(make, folder):
    end = "<|eot|>" if make().bos_token else "<|im_end|>"
    data = TaskDataModule(tokenizer=folder(make()), template=WORDING, shots=[0, 2], chat=True)
    tokenizer, items = data.tokenizer, data.items("train")
    shots = [(0, 2)[n % 2] for n in range(len(items))]
    for row, item, num in zip(rows_of(data, "train"), items, shots, strict=True):
        learnt = row["labels"] != IGNORED
        assert tokenizer.decode(row["input_ids"][learnt]) == item.answers[0] + end
        assert torch.equal(row["labels"][learnt], row["input_ids"][learnt])
        seen = row["input_ids"][row["attention_mask"].bool()]
        assert tokenizer.decode(seen) == data.prompting(num).prompt(item) + item.answers[0] + end
        assert int((seen == tokenizer.convert_tokens_to_ids(end)).sum()) == 2 * num + 3
        assert int(row["num_bytes"]) == len(item.answers[0].encode())


def test_examples_are_turns_with_their_answers(folder):
    data = TaskDataModule(tokenizer=folder(chatting(CHATML)), template=WORDING, chat="auto")
    item = data.items("test")[0]
    prompting = data.prompting(2)
    turns = [
        f"<|im_start|>user\n{shot.fields['question']}<|im_end|>\n"
        f"<|im_start|>assistant\n{shot.answers[0]}<|im_end|>\n"
        for shot in prompting.shots(item)
    ]
    assert prompting.prompt(item) == (
        "<|im_start|>system\nBe short.<|im_end|>\n"
        + "".join(turns)
        + f"<|im_start|>user\n{item.fields['question']}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_without_being_asked_for_a_chat_template_changes_nothing(folder, caplog):
    with caplog.at_level(logging.INFO):
        plain = TaskDataModule(tokenizer=folder(chatting(None)), shots=[0, 1]).blocks("train")
        assert "chat template" not in caplog.text
        silent = TaskDataModule(tokenizer=folder(chatting(CHATML)), shots=[0, 1]).blocks("train")
    assert "an instruct model should be asked with chat: true" in caplog.text
    assert torch.equal(silent.input_ids, plain.input_ids)
    assert isinstance(silent, TaskRows)
    assert isinstance(plain, TaskRows)
    assert torch.equal(silent.start, plain.start)


def test_auto_asks_in_running_text_where_there_is_no_template(folder):
    plain = TaskDataModule(tokenizer="embedded")
    auto = TaskDataModule(tokenizer="embedded", chat="auto")
    assert auto.chat_format is None
    assert torch.equal(auto.blocks("train").input_ids, plain.blocks("train").input_ids)


def test_a_chat_without_a_template_and_an_unknown_word_are_refused():
    with pytest.raises(LitMoEError, match=r"of '.*' has no chat template; use chat: false"):
        TaskDataModule(tokenizer="embedded", chat=True).blocks("calibration")
    with pytest.raises(LitMoEError, match="chat='yes' is unknown; use auto, true or false"):
        TaskDataModule(chat=cast("Any", "yes"))


def test_a_conversation_that_is_too_long_says_how_many_examples_fit(write, folder):
    file = write("long", *numbered(range(100, 130), prefix="In other words, what exactly is"))
    options = {"tokenizer": folder(chatting(CHATML)), "chat": True, "sequence_length": 120}
    with pytest.raises(LitMoEError, match=r"8 examples takes \d+ tokens, but .* is 120") as caught:
        data_of(file, shots=[8], **options).blocks("train")
    fitting = int(str(caught.value).split("would fit")[0].split()[-2])
    assert 0 < fitting < 8
    width = data_of(file, shots=[fitting], **options).blocks("train").input_ids.shape[1]
    assert width <= 120


def test_written_and_chosen_answers_are_asked_for_in_the_chat(folder):
    asked = []
    model = tiny_moe("mixtral", vocab_size=VOCABULARY, max_position_embeddings=512)
    model.register_forward_pre_hook(
        lambda _, __, inputs: asked.append(inputs["input_ids"]), with_kwargs=True
    )
    data = TaskDataModule(
        "domains",
        tokenizer=folder(beginning(LLAMA)),
        chat="auto",
        evaluated_shots=[1],
        generation=GenerationOptions(max_new_tokens=2, batch_size=240),
    )
    data.items("test")[:] = data.items("test")[:4]
    (quality,) = data.evaluate(model).values()
    assert (quality.num_items, quality.num_shots) == (4, 1)
    begin, turn = (data.tokenizer.convert_tokens_to_ids(t) for t in ("<|begin|>", "<|head|>"))
    written, *_, chosen = asked
    for ids in (written, chosen):
        assert ((ids == begin).sum(dim=1) == 1).all()
        assert ((ids == turn).sum(dim=1) == 4).all(), "user, assistant, user, assistant"
