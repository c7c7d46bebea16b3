"""The terms of the recovery loss: each has a name, a weight, and a value for every step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.adapters import find_sites
from lit_moe.distill.logits_cache import LogitsCache
from lit_moe.distill.losses import (
    load_balancing_loss,
    logits_distillation_loss,
    next_token_loss,
    router_distillation_loss,
)
from lit_moe.distill.routers import recorded_routers
from lit_moe.distill.step import Step
from lit_moe.distill.top_logits import TopLogits, top_logits, top_logits_loss
from lit_moe.errors import LitMoEError


class Term(ABC):
    """One term of the loss.

    Attributes:
        name: in the configuration and in logs.
        needs_teacher: whether it needs a copy of the unpruned model.
        runs_teacher: whether it needs that copy's own forward.
        weight: what the value is multiplied by.
        factor: what it is multiplied by beside that, known from the first step on.
    """

    name: ClassVar[str]
    needs_teacher: bool = False
    runs_teacher: bool = False
    factor: float = 1.0

    def __init__(self, weight: float) -> None:
        self.weight = weight

    def check(self, model: PreTrainedModel) -> None:
        """Refuse a model that this term cannot be computed for."""
        del model  # most can be computed for every model

    @contextmanager
    def watching_teacher(self, step: Step) -> Iterator[None]:
        """Look at the teacher's forward, which runs inside the block."""
        del step
        yield

    @contextmanager
    def watching_student(self, step: Step) -> Iterator[None]:
        """Look at the student's forward, which runs inside the block, after the teacher's."""
        del step
        yield

    @abstractmethod
    def value(self, step: Step) -> Tensor:
        """Return the term before it is weighted, a scalar."""

    def details(self) -> dict[str, Tensor | float]:
        """Return what is logged of the last step beside the value."""
        return {}

    def state(self) -> dict[str, Any]:
        """Return what a resumed run must know, as plain values."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state` gave."""
        del state  # most remember nothing


class NextToken(Term):
    """Cross-entropy of the text, in nats per predicted token."""

    name = "next_token"

    def value(self, step: Step) -> Tensor:
        """Return the mean over the tokens that count."""
        assert step.logits is not None
        targets = step.targets
        return next_token_loss(
            step.logits,
            targets.ids,
            targets.counted,
            num_tokens=step.num_tokens(targets.counted[:, 1:]),
        )


class LogitsDistillation(Term):
    """KL from the teacher's next-token distribution.

    Args:
        weight: of the term.
        temperature: both distributions are softened by it.
        top_k: compare with so many likeliest tokens; None for all.
        cached: whether they are read from ``cache``, which must be set before the first step.
    """

    name = "distillation"

    def __init__(
        self, weight: float, *, temperature: float, top_k: int | None = None, cached: bool = False
    ) -> None:
        super().__init__(weight)
        self.temperature, self.top_k = temperature, top_k
        self.cached = cached
        self.needs_teacher = self.runs_teacher = not cached
        self.cache: LogitsCache | None = None

    def check(self, model: PreTrainedModel) -> None:
        """Refuse to keep more logits than there are."""
        vocabulary = model.config.get_text_config().vocab_size
        if self.top_k is not None and self.top_k > vocabulary:
            raise LitMoEError(
                f"loss.top_k is {self.top_k}, but {type(model).__name__} has only {vocabulary} "
                "tokens; null takes all"
            )

    def value(self, step: Step) -> Tensor:
        """Return the mean over the predictions that count.

        Raises:
            LitMoEError: if the cache lacks a block of the batch.
        """
        assert step.logits is not None
        mask_BS = step.targets.predicting
        num_tokens = step.num_tokens(mask_BS)
        if self.top_k is not None:
            return top_logits_loss(
                step.logits,
                self._top_logits(step),
                mask_BS,
                temperature=self.temperature,
                num_tokens=num_tokens,
            )
        assert step.teacher_logits is not None
        return logits_distillation_loss(
            step.logits,
            step.teacher_logits,
            mask_BS,
            temperature=self.temperature,
            num_tokens=num_tokens,
        )

    def _top_logits(self, step: Step) -> TopLogits:
        if self.cached:
            assert self.cache is not None, "the cache is opened before the first step"
            return self.cache.read(step.batch)
        assert self.top_k is not None
        assert step.teacher_logits is not None
        return top_logits(step.teacher_logits, self.top_k)


class LoadBalance(Term):
    """Switch auxiliary loss, mean over layers."""

    name = "load_balance"

    @contextmanager
    def watching_student(self, step: Step) -> Iterator[None]:
        """Record the routers."""
        self._sites = find_sites(step.student)
        with recorded_routers(step.student, self._sites) as self._routers:
            yield

    def value(self, step: Step) -> Tensor:
        """Return the mean over the layers that ran."""
        del step
        seen = [site for site in self._sites if site.name in self._routers]
        return load_balancing_loss(
            [self._routers[site.name] for site in seen], [site.top_k for site in seen]
        )


class RouterDistillation(Term):
    """KL from the teacher's router probabilities over the experts that the student kept.

    Mean over layers. Each router reads the hidden states of its own model; what the teacher gave to
    experts that are gone is shared out over the others in proportion. With
    ``optimizer.trained: routers`` this is Router-KD.
    """

    name = "router"
    needs_teacher = True
    runs_teacher = True

    @contextmanager
    def watching_teacher(self, step: Step) -> Iterator[None]:
        """Record the teacher's routers."""
        assert step.teacher is not None
        sites = [layer.teacher for layer in step.pairing.layers]
        with recorded_routers(step.teacher, sites) as self._teachers:
            yield

    @contextmanager
    def watching_student(self, step: Step) -> Iterator[None]:
        """Record the student's routers."""
        sites = [layer.student for layer in step.pairing.layers]
        with recorded_routers(step.student, sites) as self._students:
            yield

    def value(self, step: Step) -> Tensor:
        """Return the mean over the layers that ran."""
        self._layers = {}
        for layer in step.pairing.layers:
            if layer.name not in self._students:
                continue
            student_TE = self._students[layer.name][:, list(layer.student_ids)]
            teacher_TE = self._teachers[layer.name][:, list(layer.teacher_ids)]
            teacher_TE = teacher_TE.to(student_TE.device)
            mask_T = step.token_mask.of(layer.student)
            if mask_T is None:
                mask_T = torch.ones_like(student_TE[:, 0])
            self._layers[layer.name] = router_distillation_loss(student_TE, teacher_TE, mask_T)
        return torch.stack(list(self._layers.values())).mean()

    def details(self) -> dict[str, Tensor | float]:
        """Return the value of each layer."""
        return {f"router/{name}": value.detach() for name, value in self._layers.items()}
