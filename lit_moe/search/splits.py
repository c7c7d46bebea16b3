"""The samples of a search.

Splits: ``search`` is what the search sees, ``dev`` chooses among its best, ``test`` is for the
report.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_moe.errors import LitMoEError
from lit_moe.evaluate.generation import GenerationOptions
from lit_moe.evaluate.prompts import Prompting, TaskItem
from lit_moe.search.fitness import RowKind
from lit_moe.search.rows import RowBatch, choice_batches, text_batches

SPLITS = ("search", "dev", "test")


@dataclass
class SplitData:
    """The samples of one split.

    Attributes:
        rows: ``input_ids``, ``attention_mask``, maybe ``labels``, each ``(S,)``; one per sample.
        items: the questions behind them, in the same order; empty for plain text.
        prompting: their wording; None for plain text.
        generation: how answers are written.
    """

    rows: Sequence[Mapping[str, Tensor]]
    items: Sequence[TaskItem] = ()
    prompting: Prompting | None = None
    generation: GenerationOptions = field(default_factory=GenerationOptions)

    def batches(
        self, kind: RowKind, tokenizer: PreTrainedTokenizerBase | None, batch_size: int
    ) -> list[RowBatch]:
        """Return what is run.

        Raises:
            LitMoEError: for choices where there are none.
        """
        if kind == "answers":
            return text_batches(self.rows, batch_size)
        if not self.items or not all(item.choices for item in self.items):
            raise LitMoEError(
                "accuracy of choices needs questions that all have choices; take AnswerTokens or "
                "WrittenAnswers, or a task with choices"
            )
        assert self.prompting is not None
        assert tokenizer is not None
        return choice_batches(self.items, self.prompting, tokenizer, batch_size)

    def reordered(self, order: Sequence[int]) -> SplitData:
        """Return the same samples in another order."""
        items = [self.items[index] for index in order] if self.items else ()
        return replace(self, rows=[self.rows[index] for index in order], items=items)

    def identities(self) -> list[str]:
        """Return what two samples share if they are the same."""
        if self.prompting is not None:
            return [self.prompting.template.identity(item) for item in self.items]
        return [row["input_ids"].numpy().tobytes().hex() for row in self.rows]


def check_splits(splits: Mapping[str, SplitData]) -> None:
    """Refuse splits that are empty, or that share a sample.

    Raises:
        LitMoEError: naming the split, or both.
    """
    seen: dict[str, str] = {}
    for name, data in splits.items():
        if not data.rows:
            raise LitMoEError(
                f"the {name} split of the search has no sample: give more text or questions, or "
                "larger fractions"
            )
        for identity in data.identities():
            other = seen.setdefault(identity, name)
            if other != name:
                raise LitMoEError(
                    f"the {other} and the {name} split of the search share a sample; the choice on "
                    f"{name} would only confirm the search: use different files"
                )
