"""What a criterion is, and what it may look at."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.adapters.site import MoESite
from lit_moe.errors import LitMoEError
from lit_moe.stats.gradient_stats import GradientObservation, GradientStats
from lit_moe.stats.gradients import observe_gradients
from lit_moe.stats.observation import Gathered, LayerStats, Observation

T = TypeVar("T")
Need = Literal["routing", "weights", "forward", "pairs", "vocabulary", "outputs", "gradients"]
"""``pairs``, ``vocabulary`` and ``outputs`` are what ``routing`` must gather beside the usual."""


@dataclass(frozen=True)
class Evidence:
    """Everything that a criterion may read. Nothing here is ever written to.

    Attributes:
        observation: sums of one observed pass; for criteria that need ``routing``.
        gradients: of one pass forward and backward; for criteria that need ``gradients``.
        model: for criteria that need ``weights`` or ``forward``.
        sites: the MoE layers of ``model``.
        batches: keyword arguments of the model, for criteria that need ``forward``, or
            ``gradients`` that are not given.
        keep: layer name -> experts that will stay, for criteria that rate whole subsets.
        seed: of every random choice.
        alive: layer name -> experts that a router mask leaves, for criteria that compare an expert
            with all others; None if nothing is masked.
    """

    observation: Observation | None = None
    gradients: GradientObservation | None = None
    model: PreTrainedModel | None = None
    sites: tuple[MoESite, ...] = ()
    batches: Iterable[Mapping[str, Any]] | None = None
    keep: Mapping[str, int] | None = None
    seed: int = 0
    alive: Mapping[str, tuple[int, ...]] | None = None

    @property
    def num_experts(self) -> dict[str, int]:
        """Layer name -> number of routed experts, from the sites or else what was observed."""
        if self.sites:
            return {site.name: site.num_experts for site in self.sites}
        seen = self.observation or self.gradients
        return seen.num_experts if seen else {}

    def require_observation(self, criterion: str) -> Observation:
        """Return the observation, or say how to get one."""
        if self.observation is None:
            raise LitMoEError(
                f"criterion {criterion!r} scores what was observed, but no observation was given: "
                f"pass the result of lit_moe.observe(model, batches)"
            )
        return self.observation

    def require_gradients(self, criterion: str) -> GradientObservation:
        """Return the gradients, taking them if there are a model and batches. Collective then."""
        if self.gradients is not None:
            return self.gradients
        if self.model is None or self.batches is None:
            raise LitMoEError(
                f"criterion {criterion!r} scores gradients, which no observation holds: call "
                f"lit_moe.score(model, {criterion!r}, batches=...), or pass the result of "
                "lit_moe.stats.observe_gradients(model, batches)"
            )
        return observe_gradients(self.model, self.batches)

    def require_model(self, criterion: str) -> PreTrainedModel:
        """Return the model, or say that it is missing."""
        if self.model is None:
            raise LitMoEError(
                f"criterion {criterion!r} reads the model's weights, but no model was given: "
                f"call lit_moe.score(model, {criterion!r})"
            )
        return self.model

    def require_batches(self, criterion: str) -> Iterable[Mapping[str, Any]]:
        """Return the calibration batches, or say that they are missing."""
        if self.batches is None:
            raise LitMoEError(
                f"criterion {criterion!r} runs the model, but no calibration batches were given: "
                f"call lit_moe.score(model, {criterion!r}, batches=..., keep=...)"
            )
        return self.batches

    def require_keep(self, criterion: str) -> Mapping[str, int]:
        """Return the experts to keep per layer, or say which layer has no number."""
        missing = sorted(set(self.num_experts) - set(self.keep or {}))
        if self.keep is None or missing:
            raise LitMoEError(
                f"criterion {criterion!r} rates whole subsets, so it must know how many experts "
                f"stay, but `keep` has no number for {missing or 'any layer'}: "
                f"pass keep=... as an int or as layer name -> int"
            )
        return self.keep


class Criterion(ABC):
    """Scores every routed expert of every MoE layer; a HIGHER score means KEEP.

    To add one: write a subclass in a new file of ``lit_moe/criteria``, decorate it with
    ``@register("its_name")``, import that file in ``lit_moe/criteria/__init__.py``, and add a row
    to ``tests/criteria/test_table.py``. Fields are those of a dataclass, so that YAML can set them.

    Attributes:
        name: set by ``@register``; for a class that is not registered, its class name.
        needs: what must be in the evidence. Known before calibration, so that callers measure
            only what is wanted.
        takes_images: whether experts of image classifiers can be scored.
    """

    name: ClassVar[str] = ""
    needs: ClassVar[frozenset[Need]] = frozenset()
    takes_images: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.name = cls.__name__

    @abstractmethod
    def scores(self, evidence: Evidence) -> dict[str, Tensor]:
        """Return layer name -> scores of shape ``(E,)``, float64, on the CPU.

        Raises:
            LitMoEError: if the evidence lacks what the criterion needs.
        """


class RoutedCriterion(Criterion):
    """A criterion of the sums that one observed pass leaves behind; no forward pass of its own."""

    needs: ClassVar[frozenset[Need]] = frozenset({"routing"})

    @abstractmethod
    def layer_scores(self, stats: LayerStats) -> Tensor:
        """Return the scores of one layer, shape ``(E,)``, float64."""

    def scores(self, evidence: Evidence) -> dict[str, Tensor]:
        """Score each layer by itself; see :meth:`Criterion.scores`."""
        observation = evidence.require_observation(self.name)
        return {name: self.layer_scores(stats) for name, stats in observation.layers.items()}

    def require(self, value: T | None, gather: Gathered) -> T:
        """Return a sum that is not kept by every pass, or say how to have it gathered."""
        if value is None:
            raise LitMoEError(
                f"criterion {self.name!r} needs what the observed pass did not gather: "
                f"lit_moe.observe(model, batches, gather=[{gather!r}])"
            )
        return value


class GradientCriterion(Criterion):
    """A criterion of the numbers that one pass of gradients leaves behind."""

    needs: ClassVar[frozenset[Need]] = frozenset({"gradients"})

    @abstractmethod
    def layer_scores(self, stats: GradientStats) -> Tensor:
        """Return the scores of one layer, shape ``(E,)``, float64."""

    def scores(self, evidence: Evidence) -> dict[str, Tensor]:
        """Score each layer by itself; see :meth:`Criterion.scores`."""
        gradients = evidence.require_gradients(self.name)
        return {name: self.layer_scores(stats) for name, stats in gradients.layers.items()}


def routed_mean(total: Tensor, count: Tensor) -> Tensor:
    """Return ``total / count`` per expert; 0 for an expert without tokens.

    Args:
        total: sum over the tokens routed to each expert, shape ``(E,)``.
        count: tokens routed to each expert, shape ``(E,)``.

    All means here are of non-negative terms, so 0 puts an expert that was never used last. To
    treat such experts otherwise, see :func:`lit_moe.criteria.unrouted.apply_unrouted`.
    """
    return total.double() / count.double().clamp(min=1.0)
