"""Samples as rows of tokens that stay the same for all candidates.

B rows in a batch, S tokens, V vocabulary, N samples in a batch, P places that predict something.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_moe.distill.step import IGNORED
from lit_moe.evaluate.encoding import answer_ids, begun_prompt_ids
from lit_moe.evaluate.prompts import Prompting, TaskItem


@dataclass(frozen=True)
class RowBatch:
    """Some samples, each of one row or of one row per choice.

    Attributes:
        input_ids: shape ``(B, S)``, padded on the right.
        attention_mask: 1 where a token is no padding.
        labels: tokens that are to be predicted, -100 elsewhere.
        sample: index of the row's sample in the batch, ascending, shape ``(B,)``.
        is_right: whether the row is what should be likely, shape ``(B,)``; one per sample.
        num_bytes: of the text that is to be predicted, shape ``(B,)``.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    sample: Tensor
    is_right: Tensor
    num_bytes: Tensor

    @property
    def num_samples(self) -> int:
        """N."""
        return int(self.sample[-1]) + 1

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model is given."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    @property
    def last(self) -> int:
        """How many places at the end, the same for all rows, all predictions are made at."""
        used = (self.labels[:, 1:] != IGNORED).any(dim=0).nonzero()
        width = self.input_ids.shape[1]
        return width - int(used[0]) if len(used) else width

    @property
    def end(self) -> RowBatch:
        """The same samples from the first place on that something is predicted at."""
        num = self.last
        parts = (self.input_ids, self.attention_mask, self.labels)
        ids, mask, labels = (part[:, -num:] for part in parts)
        return replace(self, input_ids=ids, attention_mask=mask, labels=labels)

    def nats(self, logits_BSV: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nats of each row and its predicted tokens, shape ``(B,)``, float64."""
        row_P, place_P = self.predicting
        logits_PV = self.predictions(logits_BSV).float()
        ids_P = self.input_ids[row_P, place_P + 1].to(logits_PV.device)
        nll_P = F.cross_entropy(logits_PV, ids_P, reduction="none").double().cpu()
        nll_BS = torch.zeros(self.labels[:, 1:].shape, dtype=torch.float64)
        nll_BS[row_P, place_P] = nll_P
        return nll_BS.sum(dim=1), torch.bincount(row_P, minlength=len(self.labels)).double()

    @cached_property
    def predicting(self) -> tuple[Tensor, Tensor]:
        """Row and place of all P places that predict a token that counts, each shape ``(P,)``."""
        row_P, place_P = (self.labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        return row_P, place_P

    def predictions(self, logits_BSV: Tensor) -> Tensor:
        """Return the logits at :attr:`predicting`, shape ``(P, V)``."""
        row_P, place_P = self.predicting
        at_P = (row_P * logits_BSV.shape[1] + place_P).to(logits_BSV.device)
        return logits_BSV.flatten(0, 1).index_select(0, at_P)


def text_batches(rows: Sequence[Mapping[str, Tensor]], batch_size: int) -> list[RowBatch]:
    """Return rows as batches, one sample each, cut to the longest of their batch.

    Args:
        rows: ``input_ids`` and ``attention_mask`` of shape ``(S,)``, optionally ``labels`` and
            ``num_bytes``. Without labels every token is to be predicted.
        batch_size: rows per batch.
    """
    return [
        _text_batch(rows[begin : begin + batch_size]) for begin in range(0, len(rows), batch_size)
    ]


def choice_batches(
    items: Sequence[TaskItem],
    prompting: Prompting,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
) -> list[RowBatch]:
    """Return one row per question and choice, as ``evaluate_multiple_choice`` runs them.

    Args:
        items: questions with choices.
        prompting: the wording.
        tokenizer: of the model.
        batch_size: about so many rows per batch; the choices of a question stay together.
    """
    per_question = max(len(item.choices) for item in items)
    step = max(1, batch_size // per_question)
    return [
        _choice_batch(items[begin : begin + step], prompting, tokenizer)
        for begin in range(0, len(items), step)
    ]


def _text_batch(rows: Sequence[Mapping[str, Tensor]]) -> RowBatch:
    mask = torch.stack([row["attention_mask"] for row in rows])
    width = max(2, int(mask.sum(dim=1).max()))
    mask = mask[:, :width]
    ids = torch.stack([row["input_ids"] for row in rows])[:, :width]
    given = [row.get("labels") for row in rows]
    if any(labels is None for labels in given):
        labels = torch.where(mask > 0, ids, IGNORED)
    else:
        labels = torch.stack([row["labels"] for row in rows])[:, :width]
    num = len(rows)
    num_bytes = torch.tensor([int(row.get("num_bytes", torch.tensor(1))) for row in rows])
    right = torch.ones(num, dtype=torch.bool)
    return RowBatch(ids, mask, labels, torch.arange(num), right, num_bytes)


def _choice_batch(
    items: Sequence[TaskItem], prompting: Prompting, tokenizer: PreTrainedTokenizerBase
) -> RowBatch:
    rows, answered, sample, right, sizes = [], [], [], [], []
    for number, item in enumerate(items):
        asked = prompting.prompt(item)
        (prompt,) = begun_prompt_ids(tokenizer, [asked], prompting.chat)
        texts = [prompting.answer(choice) for choice in item.choices]
        encoded = answer_ids(tokenizer, [asked] * len(texts), texts, prompting.chat)
        for choice, text, ids in zip(item.choices, texts, encoded, strict=True):
            rows.append(prompt + ids)
            answered.append([IGNORED] * len(prompt) + ids)
            sample.append(number)
            right.append(choice == item.answers[0])
            sizes.append(len(text.encode()))
    width = max(map(len, rows))
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return RowBatch(
        torch.tensor([row + [0] * (width - len(row)) for row in rows]),
        mask,
        torch.tensor([row + [IGNORED] * (width - len(row)) for row in answered]),
        torch.tensor(sample),
        torch.tensor(right),
        torch.tensor(sizes),
    )
