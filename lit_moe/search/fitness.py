"""What a candidate is worth, in points per sample; larger is better.

A point is a percent of right answers, or a hundredth of a nat: margins of the search are counted in
points. B rows, S tokens, V vocabulary, N samples of a batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moe.errors import LitMoEError
from lit_moe.evaluate.chat import ChatFormat
from lit_moe.evaluate.generation import GenerationOptions, generate_answers
from lit_moe.evaluate.prompts import TaskItem
from lit_moe.evaluate.squad import squad_exact_match, squad_f1
from lit_moe.search.rows import RowBatch

RowKind = Literal["answers", "choices"]


class Fitness:
    """A measure of candidates; subclasses are named in YAML files."""

    rows: ClassVar[RowKind | None] = None
    """What is run: ``answers`` (question and answer, or text), ``choices`` (a row per choice);
    None for a measure that lets the model write."""

    @property
    def name(self) -> str:
        """What it is called in reports and in the history."""
        return type(self).__name__

    @property
    def most(self) -> float:
        """Points that no sample can be above; infinity if that is not known."""
        return math.inf


class RowFitness(Fitness, ABC):
    """A measure of the logits on rows that are the same for all candidates."""

    rows: ClassVar[RowKind | None] = "answers"
    needs_whole: ClassVar[bool] = False
    """Whether it compares with the model that nothing was done to."""

    @abstractmethod
    def points(self, logits_BSV: Tensor, batch: RowBatch, whole: Compressed | None) -> Tensor:
        """Return the points of each sample, shape ``(N,)``, float64.

        Args:
            logits_BSV: of the candidate.
            batch: what it was run on.
            whole: what the whole model said there; None unless ``needs_whole``.
        """

    def compress(self, logits_BSV: Tensor, batch: RowBatch) -> Compressed:
        """Return what is kept of the whole model's logits.

        Raises:
            LitMoEError: for a measure that ``needs_whole`` and does not say what of it.
        """
        del logits_BSV, batch
        raise LitMoEError(
            f"fitness {self.name} compares with the whole model (needs_whole), but does not say "
            "what of its logits is kept; give it a method compress(logits_BSV, batch)"
        )


class NegativeLoss(RowFitness):
    """Minus a hundred times the nats per predicted token, of the right rows."""

    @property
    def most(self) -> float:
        """See :class:`Fitness`."""
        return 0.0

    def points(self, logits_BSV: Tensor, batch: RowBatch, whole: Compressed | None) -> Tensor:
        """See :meth:`RowFitness.points`."""
        del whole
        nats_B, tokens_B = batch.nats(logits_BSV)
        return -100.0 * (nats_B / tokens_B.clamp(min=1))[batch.is_right]


class AnswerTokens(RowFitness):
    """100 where each token of the answer and its end is the likeliest one after those before it.

    What a model writes greedily is then that answer, to the letter; answers that other tokens could
    spell do not count. It needs one forward where :class:`WrittenAnswers` needs one per token.
    """

    @property
    def most(self) -> float:
        """See :class:`Fitness`."""
        return 100.0

    def points(self, logits_BSV: Tensor, batch: RowBatch, whole: Compressed | None) -> Tensor:
        """See :meth:`RowFitness.points`."""
        del whole
        row_P, place_P = batch.predicting
        likeliest_P = batch.predictions(logits_BSV).argmax(dim=-1).cpu()
        missed_P = likeliest_P != batch.labels[row_P, place_P + 1]
        is_all = torch.bincount(row_P[missed_P], minlength=len(batch.labels)) == 0
        return 100.0 * is_all[batch.is_right].double()


class ChoiceAccuracy(RowFitness):
    """100 where the right choice is the likeliest per byte, as multiple choice is evaluated."""

    rows = "choices"

    @property
    def most(self) -> float:
        """See :class:`Fitness`."""
        return 100.0

    def points(self, logits_BSV: Tensor, batch: RowBatch, whole: Compressed | None) -> Tensor:
        """See :meth:`RowFitness.points`."""
        del whole
        nats_B, _ = batch.nats(logits_BSV)
        per_byte_B = nats_B / batch.num_bytes
        points = torch.zeros(batch.num_samples, dtype=torch.float64)
        for sample in range(batch.num_samples):
            mine = batch.sample == sample
            points[sample] = 100.0 * bool(batch.is_right[mine][per_byte_B[mine].argmin()])
        return points


class Compressed:
    """Next-token distributions at the predicted places, by their likeliest tokens.

    Args:
        ids: the likeliest tokens, shape ``(P, M)``.
        shares: their probabilities, shape ``(P, M)``, float32.
        row: row of each place, shape ``(P,)``.
    """

    def __init__(self, ids: Tensor, shares: Tensor, row: Tensor) -> None:
        self.ids, self.shares, self.row = ids, shares, row


class Agreement(RowFitness):
    """How much a candidate says what the whole model says, on the same tokens.

    Needs no labels. The whole model's distributions are kept by their likeliest tokens; all others
    count as one more token, in both models.

    Args:
        measure: ``acceptance``: a hundred times ``sum_v min(p_v, q_v)``, the share of drafted
            tokens that speculative decoding would accept; ``kl``: minus a hundred times
            ``KL(whole || candidate)`` in nats.
        tokens: likeliest tokens that are kept per place.
    """

    needs_whole = True

    def __init__(
        self, measure: Literal["acceptance", "kl"] = "acceptance", tokens: int = 32
    ) -> None:
        if measure not in ("acceptance", "kl") or tokens < 1:
            raise LitMoEError(
                f"agreement: measure={measure!r} must be acceptance or kl, tokens={tokens} at "
                "least 1"
            )
        self.measure, self.tokens = measure, tokens

    @property
    def name(self) -> str:
        """See :class:`Fitness`."""
        return f"{type(self).__name__}({self.measure}, {self.tokens})"

    def compress(self, logits_BSV: Tensor, batch: RowBatch) -> Compressed:
        """See :meth:`RowFitness.compress`."""
        log_PV, row = _predicting(logits_BSV, batch)
        kept = log_PV.topk(min(self.tokens, log_PV.shape[1]), dim=-1)
        return Compressed(kept.indices, kept.values.exp(), row)

    @property
    def most(self) -> float:
        """See :class:`Fitness`."""
        return 100.0 if self.measure == "acceptance" else 0.0

    def points(self, logits_BSV: Tensor, batch: RowBatch, whole: Compressed | None) -> Tensor:
        """See :meth:`RowFitness.points`."""
        assert whole is not None
        log_PV, row = _predicting(logits_BSV, batch)
        ours = _with_rest(log_PV.gather(1, whole.ids).exp()).double()
        theirs = _with_rest(whole.shares).double()
        if self.measure == "acceptance":
            value_P = torch.minimum(ours, theirs).sum(dim=1)
        else:
            least = torch.finfo(torch.float32).tiny
            ratio = (theirs.clamp(min=least) / ours.clamp(min=least)).log()
            value_P = -(theirs * ratio).sum(dim=1)
        total_B = torch.zeros(len(batch.sample), dtype=torch.float64)
        total_B.index_add_(0, row, value_P.cpu())
        return (
            100.0
            * (total_B / torch.bincount(row, minlength=len(total_B)).clamp(min=1))[batch.is_right]
        )


class WrittenAnswers(Fitness):
    """What the model writes, scored as SQuAD does: percent of exact matches, or F1.

    Args:
        measure: ``exact_match`` or ``f1``.
    """

    def __init__(self, measure: Literal["exact_match", "f1"] = "exact_match") -> None:
        if measure not in ("exact_match", "f1"):
            raise LitMoEError(f"answers: measure={measure!r} is unknown; use exact_match or f1")
        self.measure = measure

    @property
    def name(self) -> str:
        """See :class:`Fitness`."""
        return f"{type(self).__name__}({self.measure})"

    @property
    def most(self) -> float:
        """See :class:`Fitness`."""
        return 100.0

    def written(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        questions: Sequence[tuple[str, TaskItem]],
        options: GenerationOptions,
        *,
        chat: ChatFormat | None = None,
    ) -> Tensor:
        """Return the points of each question, shape ``(N,)``, float64.

        Args:
            model: as the candidate says.
            tokenizer: its own.
            questions: prompts and what would be right.
            options: lengths, stop texts, batch size.
            chat: the format that the prompts are in; None for running text.
        """
        prompts = [prompt for prompt, _ in questions]
        texts = generate_answers(model, tokenizer, prompts, options, chat=chat)
        pairs = [(text, item.answers) for text, (_, item) in zip(texts, questions, strict=True)]
        if self.measure == "f1":
            return torch.tensor([100.0 * squad_f1(*pair) for pair in pairs]).double()
        return torch.tensor([100.0 * squad_exact_match(*pair) for pair in pairs]).double()


def _predicting(logits_BSV: Tensor, batch: RowBatch) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of all places that predict something, and their rows."""
    row_P, _ = batch.predicting
    return batch.predictions(logits_BSV).float().log_softmax(dim=-1), row_P


def _with_rest(shares_PM: Tensor) -> Tensor:
    """Return shares with what they leave to all other tokens, shape ``(P, M + 1)``."""
    rest = (1.0 - shares_PM.sum(dim=1, keepdim=True)).clamp(min=0.0)
    return torch.cat([shares_PM, rest], dim=1)
