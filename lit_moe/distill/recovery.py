"""The recovery loss: the weighted sum of its terms, from one forward of each model."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.distill.experts import ExpertDistillation
from lit_moe.distill.logits_cache import LogitsCache
from lit_moe.distill.pairing import PairingMemory
from lit_moe.distill.step import Step
from lit_moe.distill.terms import (
    LoadBalance,
    LogitsDistillation,
    NextToken,
    RouterDistillation,
    Term,
)
from lit_moe.distill.weights import LossWeights


@dataclass(frozen=True)
class Recovery:
    """The loss of one step.

    Attributes:
        total: what is minimised.
        values: of the terms, before they are weighted, by name.
        details: what else is worth a line in a log, by name.
    """

    total: Tensor
    values: dict[str, Tensor]
    details: dict[str, Tensor | float]


class RecoveryLoss:
    """Weighted sum of terms; the next-token loss is always computed, and logged.

    Args:
        weights: a term of weight 0 is left out.
    """

    def __init__(self, weights: LossWeights) -> None:
        self.terms = terms_of(weights)
        self._pairings = PairingMemory()

    @property
    def needs_teacher(self) -> bool:
        """Whether a copy of the unpruned model must be kept."""
        return any(term.needs_teacher for term in self.terms)

    def read_logits_from(self, cache: LogitsCache) -> None:
        """Let the distillation take the teacher's logits from a cache."""
        for term in self.terms:
            if isinstance(term, LogitsDistillation):
                term.cache = cache

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model that some term cannot be computed for."""
        for term in self.terms:
            term.check(model)

    def __call__(self, step: Step) -> Recovery:
        """Run both models, the teacher first and without gradients. Collective."""
        step.pairings = self._pairings
        if any(term.runs_teacher for term in self.terms):
            self._run_teacher(step)
        with ExitStack() as stack:
            for term in self.terms:
                stack.enter_context(term.watching_student(step))
            step.logits = _logits(step.student, step)
        for term in self.terms:
            step.values[term.name] = term.value(step)
        weighted = [t.weight * t.factor * step.values[t.name] for t in self.terms]
        details = {name: value for term in self.terms for name, value in term.details().items()}
        return Recovery(torch.stack(weighted).sum(), step.values, details)

    @torch.no_grad()
    def _run_teacher(self, step: Step) -> None:
        assert step.teacher is not None
        step.teacher.eval()
        with ExitStack() as stack:
            for term in self.terms:
                if term.runs_teacher:
                    stack.enter_context(term.watching_teacher(step))
            logits = _logits(step.teacher, step)
        step.teacher_logits = logits.to(step.batch["input_ids"].device)

    def state(self) -> dict[str, Any]:
        """Return what a resumed run must know, as plain values."""
        return {term.name: state for term in self.terms if (state := term.state())}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave."""
        for term in self.terms:
            term.load_state(state.get(term.name, {}))


def terms_of(weights: LossWeights) -> tuple[Term, ...]:
    """Return the terms of the loss, the next-token loss first."""
    terms = (
        LogitsDistillation(
            weights.distillation,
            temperature=weights.temperature,
            top_k=weights.top_k,
            cached=weights.cache is not None,
        ),
        LoadBalance(weights.load_balance),
        ExpertDistillation(
            weights.experts, factor=weights.experts_lambda, alignment=weights.alignment
        ),
        RouterDistillation(weights.router),
    )
    return (NextToken(weights.next_token), *[term for term in terms if term.weight > 0])


def _logits(model: PreTrainedModel, step: Step) -> Tensor:
    ids, mask = (step.batch[name].to(model.device) for name in ("input_ids", "attention_mask"))
    outputs = model(input_ids=ids, attention_mask=mask)
    logits: Tensor = outputs.logits
    return logits
