"""Exact match and F1 of short answers, as SQuAD v1.1 counts them (arXiv 1606.05250, section 6.1).

Both compare an answer with every gold answer and keep the best. Unlike ``exact_match``, which asks
for one answer and keeps articles and drops accents, this follows the benchmark to the letter.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_moe.evaluate.multiple_choice import Accuracy

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation, ""))
_ROWS = ("num", "exact", "f1", "f1_f1", "asked", "chosen", "chance")


def squad_normalised(text: str) -> str:
    """Return text in lower case without ASCII punctuation, English articles and extra spaces."""
    plain = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def squad_exact_match(written: str, answers: Sequence[str]) -> bool:
    """Whether what was written is one of the answers, after :func:`squad_normalised`."""
    return squad_normalised(written) in {squad_normalised(answer) for answer in answers}


def squad_f1(written: str, answers: Sequence[str]) -> float:
    """Best harmonic mean of precision and recall over words, in [0, 1].

    A word counts as often as it stands in both texts; 0 if they share none, also if both are empty.
    """
    return max(_f1(written, answer) for answer in answers)


def _f1(written: str, answer: str) -> float:
    ours, gold = squad_normalised(written).split(), squad_normalised(answer).split()
    shared = (Counter(ours) & Counter(gold)).total()
    return 2 * shared / (len(ours) + len(gold)) if shared else 0.0


class AnswerScores(Metric):
    """Accumulates exact match, F1 and choices by likelihood; torchmetrics reduces over ranks."""

    full_state_update = False
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        zeros = torch.zeros(len(_ROWS), dtype=torch.float64)
        self.add_state("sums", zeros, dist_reduce_fx="sum")

    def update(self, written: Sequence[str], answers: Sequence[Sequence[str]]) -> None:
        """Add what was written to each question and the answers that are right."""
        pairs = list(zip(written, answers, strict=True))
        exact = sum(squad_exact_match(text, gold) for text, gold in pairs)
        f1s = [squad_f1(text, gold) for text, gold in pairs]
        self._add(num=len(pairs), exact=exact, f1=sum(f1s), f1_f1=sum(f1 * f1 for f1 in f1s))

    def update_choices(self, accuracy: Accuracy) -> None:
        """Add questions that were answered by choosing."""
        num = accuracy.questions
        self._add(asked=num, chosen=round(accuracy.accuracy * num), chance=accuracy.chance * num)

    def compute(self) -> Tensor:
        """Return the sums over ranks, shape ``(7,)``."""
        return self.sums

    def totals(self) -> dict[str, float]:
        """Return the sums over ranks by name. Collective: every rank must call it."""
        return dict(zip(_ROWS, self.compute().tolist(), strict=True))

    def _add(self, **values: float) -> None:
        row = [values.get(name, 0.0) for name in _ROWS]
        self.sums += torch.tensor(row, dtype=torch.float64, device=self.sums.device)


def mean_and_error(total: float, squares: float, num: float) -> tuple[float, float]:
    """Return the mean of ``num`` values and its standard error, from their sum and squares.

    The variance is divided by ``num``, so that of zeros and ones is the binomial one.
    """
    mean = total / max(num, 1)
    return mean, math.sqrt(max(squares / max(num, 1) - mean * mean, 0.0) / max(num, 1))
