"""Multiple choice by log-likelihood, from a local JSONL file.

C choices, S tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moe.distill.losses import next_token_nll
from lit_moe.errors import LitMoEError
from lit_moe.evaluate.chat import ChatFormat
from lit_moe.evaluate.encoding import answer_ids, begun_prompt_ids
from lit_moe.inference import evaluating


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        prompt: text before the answer.
        choices: at least two texts, of which one is right.
        answer: index of the right one.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Accuracy:
    """Share of questions answered right, with the binomial standard error.

    Attributes:
        accuracy: by the likelihood per byte of each choice (insensitive to length).
        stderr: of ``accuracy``.
        accuracy_sum: by the likelihood of the whole choice.
        questions: how many.
        chance: what guessing would reach.
    """

    accuracy: float
    stderr: float
    accuracy_sum: float
    questions: int
    chance: float


def load_questions(path: str | Path) -> list[Question]:
    """Read a JSONL file with ``prompt``, ``choices`` and ``answer`` (an index) per line.

    Raises:
        LitMoEError: naming file and line of the first record that is malformed.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise LitMoEError(f"question file {path} does not exist") from error
    records = [_question(path, i, line) for i, line in enumerate(lines, 1) if line.strip()]
    if not records:
        raise LitMoEError(f"question file {path} holds no question")
    return records


def evaluate_multiple_choice(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    chat: ChatFormat | None = None,
) -> Accuracy:
    """Answer each question by the choice that the model finds most likely after the prompt.

    Choices are scored in one padded batch per question, in evaluation mode.

    Args:
        model: a language model.
        tokenizer: its own.
        questions: what is asked.
        chat: the format that the prompts are in; the end of the turn then belongs to each choice,
            but its bytes do not count. None for running text.
    """
    right_per_byte = right_sum = 0
    with evaluating(model):
        for question in questions:
            nll_C = _choice_nll(model, tokenizer, question, chat)
            length_C = torch.tensor([len(c.encode()) for c in question.choices])
            right_per_byte += int((nll_C / length_C).argmin()) == question.answer
            right_sum += int(nll_C.argmin()) == question.answer
    num = len(questions)
    accuracy = right_per_byte / num
    return Accuracy(
        accuracy=accuracy,
        stderr=math.sqrt(accuracy * (1 - accuracy) / num),
        accuracy_sum=right_sum / num,
        questions=num,
        chance=sum(1 / len(q.choices) for q in questions) / num,
    )


def _choice_nll(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    question: Question,
    chat: ChatFormat | None = None,
) -> Tensor:
    """Return the nats of each choice after the prompt, shape ``(C,)``."""
    (prompt,) = begun_prompt_ids(tokenizer, [question.prompt], chat)
    prompts = [question.prompt] * len(question.choices)
    answers = answer_ids(tokenizer, prompts, question.choices, chat)
    rows = [prompt + answer for answer in answers]
    width = max(map(len, rows))
    ids_CS = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)
    mask_CS = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows]).to(model.device)
    logits = model(input_ids=ids_CS, attention_mask=mask_CS).logits
    return next_token_nll(logits, ids_CS, mask_CS)[:, len(prompt) - 1 :].sum(dim=1).cpu()


def _question(path: str | Path, number: int, line: str) -> Question:
    try:
        record: Any = json.loads(line)
        question = Question(record["prompt"], tuple(record["choices"]), int(record["answer"]))
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise LitMoEError(
            f"{path}, line {number}: expected an object with prompt, choices and answer ({error!r})"
        ) from error
    problem = next(_problems(question), None)
    if problem:
        raise LitMoEError(f"{path}, line {number}: {problem}")
    return question


def _problems(question: Question) -> Iterator[str]:
    if len(question.choices) < 2:
        yield f"a question needs at least 2 choices, this has {len(question.choices)}"
    if not 0 <= question.answer < len(question.choices):
        yield f"answer={question.answer} is no index into {len(question.choices)} choices"
    if not all(question.choices):
        yield "a choice is empty"
