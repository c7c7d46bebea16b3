"""Short answers by greedy decoding, right only if they are exactly the expected one.

The model sees some solved examples, then a line ``Question: ...`` and the word ``Answer:``; the
first line of what it writes is compared with the answer.

B questions in a batch, S prompt tokens, G generated tokens.
"""

from __future__ import annotations

import json
import math
import string
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lit_moe.assets import capitals_file
from lit_moe.errors import LitMoEError
from lit_moe.inference import evaluating

_SPARE_TOKENS = 2


@dataclass(frozen=True)
class Fact:
    """A question with one short answer.

    Attributes:
        question: the whole question, without "Question:".
        answer: the words expected, on one line.
    """

    question: str
    answer: str


@dataclass(frozen=True)
class ExactMatch:
    """Share of questions answered exactly, with the binomial standard error.

    Attributes:
        accuracy: in [0, 1].
        stderr: of ``accuracy``.
        num: questions asked.
    """

    accuracy: float
    stderr: float
    num: int


class MatchRate(Metric):
    """Counts right answers and questions, summed over ranks by torchmetrics."""

    full_state_update = False
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, written: Sequence[str], expected: Sequence[str]) -> None:
        """Add answers: the first line of each text written, compared after ``normalised``."""
        pairs = zip(written, expected, strict=True)
        right = sum(normalised(text) == normalised(answer) for text, answer in pairs)
        self.counts += torch.tensor([right, len(expected)], device=self.counts.device)

    def compute(self) -> Tensor:
        """Return right answers and questions over ranks, shape ``(2,)``."""
        return self.counts

    def result(self) -> ExactMatch:
        """Return the accuracy with its error. Collective: every rank must call it."""
        right, num = self.compute().tolist()
        accuracy = right / max(num, 1)
        return ExactMatch(accuracy, math.sqrt(accuracy * (1 - accuracy) / max(num, 1)), num)


def exact_match(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Fact],
    *,
    shots: Sequence[Fact] = (),
    batch_size: int = 16,
) -> ExactMatch:
    """Ask each question after the solved examples and compare the answers, in evaluation mode.

    Prompts of one length are decoded together, so no token is padding. With a process group each
    rank passes its own share of the questions; all ranks must call this and all get the result
    over all shares.

    Args:
        model: a language model that transformers can generate with.
        tokenizer: its own.
        questions: what is asked.
        shots: solved examples before each question; none of them should be asked.
        batch_size: most prompts that are decoded together.

    Raises:
        LitMoEError: if there is no question or the model cannot generate.
    """
    if not questions:
        raise LitMoEError("exact match needs at least one question, none was given")
    if not isinstance(model, GenerationMixin):
        raise LitMoEError(f"{type(model).__name__} cannot generate text, so it cannot be asked")
    examples = "".join(_prompt(fact.question) + f" {fact.answer}\n\n" for fact in shots)
    prompts = tokenizer([examples + _prompt(fact.question) for fact in questions])["input_ids"]
    answers = tokenizer([f" {fact.answer}" for fact in questions], add_special_tokens=False)
    longest = max(len(answer) for answer in answers["input_ids"])
    metric = MatchRate().to(model.device)
    with evaluating(model):
        for batch in _batches(prompts, batch_size):
            prompt_BS = torch.tensor([prompts[i] for i in batch], device=model.device)
            answer_BG = _greedy(model, prompt_BS, longest + _SPARE_TOKENS)
            written = tokenizer.batch_decode(answer_BG, skip_special_tokens=True)
            metric.update(written, [questions[i].answer for i in batch])
    return metric.result()


def load_facts(path: str | Path, *, question: str, answer: str) -> list[Fact]:
    """Read a JSONL file of records.

    Args:
        path: one JSON object per line.
        question: format string over the fields of a record, ``"What is {name}?"``.
        answer: the same for the answer, ``"{definition}"``.

    Raises:
        LitMoEError: naming file and line of the first record that is malformed.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise LitMoEError(f"question file {path} does not exist") from error
    facts = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            facts.append(_fact(f"{path}, line {number}", line, question, answer))
    if not facts:
        raise LitMoEError(f"question file {path} holds no question")
    return facts


def load_capitals(num_shots: int = 5) -> tuple[list[Fact], list[Fact]]:
    """Return solved examples and questions: the capitals of 151 countries.

    The file begins with the examples: Paris, Tokyo, Nairobi, Lima, Canberra. With fewer of them
    SmolLM2 often answers with the name of the country.
    """
    facts = load_facts(
        capitals_file(), question="What is the capital of {country}?", answer="{capital}"
    )
    return facts[:num_shots], facts[num_shots:]


def normalised(text: str) -> str:
    """Return the first line in lower case without accents, punctuation and extra spaces.

    As for SQuAD (Rajpurkar et al., arXiv 1606.05250), except that articles stay.
    """
    first = text.strip().partition("\n")[0]
    plain = "".join(c for c in unicodedata.normalize("NFKD", first) if not unicodedata.combining(c))
    return " ".join(plain.casefold().translate(_NO_PUNCTUATION).split())


_NO_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, ""))


def _fact(place: str, line: str, question: str, answer: str) -> Fact:
    try:
        record = json.loads(line)
        fact = Fact(question.format_map(record), answer.format_map(record))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise LitMoEError(
            f"{place}: expected an object with the fields of {question!r} and {answer!r} "
            f"({error!r})"
        ) from error
    if not normalised(fact.answer):
        raise LitMoEError(f"{place}: the answer {fact.answer!r} holds no word")
    return fact


def _prompt(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def _batches(prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Yield indices of at most ``size`` prompts of one length, short prompts first."""
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    for length in sorted(by_length):
        same = by_length[length]
        yield from (same[start : start + size] for start in range(0, len(same), size))


def _greedy(model: Any, prompt_BS: Tensor, num_tokens: int) -> Tensor:
    """Return the most likely continuation, shape ``(B, G)`` with ``G <= num_tokens``."""
    end = getattr(model.config.get_text_config(), "eos_token_id", None)
    settings = GenerationConfig(
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end[0] if isinstance(end, list) else end or 0,
    )
    ids_BS = model.generate(
        prompt_BS, attention_mask=torch.ones_like(prompt_BS), generation_config=settings
    )
    return ids_BS[:, prompt_BS.shape[1] :]
