"""Prompts and answers as tokens, running text or turns of a chat.

The one place that decides about special tokens. A chat's prompt spells out its own, so that nothing
is added to it; to running text the tokenizer adds what it is used to.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lit_moe.evaluate.chat import ChatFormat


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], chat: ChatFormat | None = None
) -> list[list[int]]:
    """Return the tokens of each prompt, without an end-of-text that a tokenizer may append."""
    if chat is not None:
        return _plain_ids(tokenizer, prompts)
    rows: list[list[int]] = tokenizer(list(prompts), verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    return [row[:-1] if len(row) > 1 and row[-1] == end else row for row in rows]


def begun_prompt_ids(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], chat: ChatFormat | None = None
) -> list[list[int]]:
    """Return the tokens of each prompt behind the begin of text, also where none is usual.

    A chat begins as its template begins it.
    """
    start = tokenizer.bos_token_id
    rows = _plain_ids(tokenizer, prompts)
    return rows if chat is not None or start is None else [[start, *row] for row in rows]


def answer_ids(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    answers: Sequence[str],
    chat: ChatFormat | None = None,
) -> list[list[int]]:
    """Return the tokens of each answer behind its prompt; in a chat with the end of the turn.

    Running text is tokenized apart from its prompt. In a chat the tokens are those of the whole
    conversation, unless its first tokens differ from those of the prompt.
    """
    if chat is None:
        return _plain_ids(tokenizer, answers)
    pairs = [
        (prompt, answer + chat.ending) for prompt, answer in zip(prompts, answers, strict=True)
    ]
    starts = prompt_ids(tokenizer, prompts, chat)
    wholes = _plain_ids(tokenizer, ["".join(pair) for pair in pairs])
    apart = _plain_ids(tokenizer, [answer for _, answer in pairs])
    return [
        whole[len(start) :] if whole[: len(start)] == start else alone
        for start, whole, alone in zip(starts, wholes, apart, strict=True)
    ]


def _plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    rows: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)[
        "input_ids"
    ]
    return rows
