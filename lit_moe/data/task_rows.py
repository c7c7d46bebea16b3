"""Prompts with their answers as rows of tokens, of which only the answers are to be learnt.

N rows, L tokens per row, padding included.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_moe.data.blocks import Blocks
from lit_moe.errors import LitMoEError
from lit_moe.evaluate.encoding import answer_ids, prompt_ids
from lit_moe.evaluate.prompts import Prompting, TaskItem

IGNORED = -100
"""The label of a token that counts for no loss."""


@dataclass(frozen=True, kw_only=True)
class TaskRows(Blocks):
    """Blocks that are padded on the right and have labels.

    Attributes:
        start: where the answer begins, shape ``(N,)``.
        length: tokens of the row that are no padding, shape ``(N,)``.
    """

    start: Tensor
    length: Tensor

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = super().__getitem__(index)
        place = torch.arange(self.input_ids.shape[1])
        mask = row["attention_mask"] * (place < self.length[index])
        is_answer = (mask > 0) & (place >= self.start[index])
        labels = torch.where(is_answer, row["input_ids"], IGNORED)
        return {**row, "attention_mask": mask, "labels": labels}

    def take(self, indices: Tensor) -> TaskRows:
        """Return the rows with these indices, in this order."""
        names = ("input_ids", "domain", "num_bytes", "start", "length")
        return replace(self, idle=0, **{name: getattr(self, name)[indices] for name in names})


def task_rows(
    items: Sequence[TaskItem],
    tokenizer: PreTrainedTokenizerBase,
    promptings: Sequence[Prompting],
    *,
    sequence_length: int,
    ending: str,
) -> TaskRows:
    """Tokenize prompts and answers; the rows are as long as the longest of them.

    Prompt and answer are tokenized as they are when the model is asked. The answer ends with the
    tokenizer's end of text, which is learnt as well; without one, with ``ending``; in a chat with
    what ends a turn there.

    Args:
        items: at least one.
        tokenizer: of the model.
        promptings: wordings with one template and chat format, dealt to the items in turn.
        sequence_length: most tokens of a row.
        ending: for tokenizers without an end of text.

    Raises:
        LitMoEError: if a row is longer than ``sequence_length``, with the most examples that fit.
    """
    dealt = list(zip(items, itertools.cycle(promptings), strict=False))
    asked = [prompting.prompt(item) for item, prompting in dealt]
    texts = [prompting.answer(item.answers[0]) for item, prompting in dealt]
    chat = promptings[0].chat
    prompts = prompt_ids(tokenizer, asked, chat)
    if chat is not None and chat.ending:
        answers = answer_ids(tokenizer, asked, texts, chat)
    else:
        answers = _ended_ids(texts, tokenizer, ending)
    rows = [(*prompt, *answer) for prompt, answer in zip(prompts, answers, strict=True)]
    length = torch.tensor([len(row) for row in rows])
    width = int(length.max())
    if width > sequence_length:
        _refuse(*dealt[int(length.argmax())], tokenizer, (width, sequence_length))
    domains = tuple(dict.fromkeys(item.domain for item in items))
    return TaskRows(
        torch.tensor([row + (0,) * (width - len(row)) for row in rows]),
        torch.tensor([domains.index(item.domain) for item in items]),
        torch.tensor([len(text.encode()) for text in texts]),
        domains,
        start=torch.tensor([len(prompt) for prompt in prompts]),
        length=length,
    )


def _ended_ids(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, ending: str
) -> list[list[int]]:
    end = tokenizer.eos_token_id
    finished = [text + ending for text in texts] if end is None else list(texts)
    rows: list[list[int]] = tokenizer(finished, add_special_tokens=False)["input_ids"]
    return rows if end is None else [[*row, end] for row in rows]


def _refuse(
    item: TaskItem,
    prompting: Prompting,
    tokenizer: PreTrainedTokenizerBase,
    length_and_room: tuple[int, int],
) -> None:
    """Say how much too long a row is, and how many examples would fit."""
    length, room = length_and_room
    prompts = [
        replace(prompting, num_shots=shots).prompt(item) for shots in range(prompting.num_shots + 1)
    ]
    sizes = [len(prompt) for prompt in prompt_ids(tokenizer, prompts, prompting.chat)]
    fitting = [shots for shots, size in enumerate(sizes) if size + length - sizes[-1] <= room]
    advice = f"{fitting[-1]} examples would fit" if fitting else "not even the question alone fits"
    raise LitMoEError(
        f"{item.place} with {prompting.num_shots} examples takes {length} tokens, but "
        f"sequence_length is {room}: {advice}; use fewer shots or a larger sequence_length"
    )
