"""What a merge is asked to do."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lit_moe.errors import LitMoEError
from lit_moe.grouping.coefficients import Coefficients, Router
from lit_moe.grouping.learned import LearnOptions
from lit_moe.grouping.partition import Partition
from lit_moe.grouping.segments import SegmentOptions
from lit_moe.grouping.similarity import Need, get_similarity

Align = bool | Literal["weights", "activations"]


@dataclass(frozen=True)
class MergeOptions:
    """Similarity -> partition -> coefficients.

    Attributes:
        similarity: ``cka``, ``output_cosine``, ``mean_output``, ``ream``, ``coactivation`` (these
            need text), ``weights``, ``surrogate``, ``router`` (these do not).
        partition: see :func:`lit_moe.grouping.partition`.
        coefficients: ``uniform``; by ``frequency`` or ``reap``; only the most used member
            (``max_visited``); ``learned``.
        router: ``merge``: router rows with the same coefficients; ``keep``: the row of the member
            with the largest one.
        align: bring neurons of one group into one order before they are averaged: by what they read
            and write (``weights``, or True), or by what they do on the text (``activations``).
        segments: if given, experts are not averaged: the ones with the largest gates stay and take
            over segments of the others (DERN); similarity, partition and coefficients do not count.
        max_tokens: that the model reads to compare the outputs of all experts, and to learn
            coefficients.
        effort: calls of experts for those outputs, in multiples of what a plain forward of these
            tokens makes. Where asking all experts about each token would be more (by E / top-k),
            they are asked about a random part of the tokens of each row; ``cka`` says how much
            coarser that is. None: about each token.
        memory_gib: for those outputs and the hidden states before them, for surrogates, and for the
            inputs and outputs of layers that coefficients are learned on; beside the model, the
            forward of one batch and, while coefficients of a layer are learned, its merged experts
            and what the gradient of one row takes. Less of it takes more steps for the same result.
        learn: options of ``coefficients: learned``.

    Raises:
        LitMoEError: for names that do not exist, or a combination that means nothing.
    """

    similarity: str = "cka"
    partition: Partition = "auto"
    coefficients: Coefficients = "uniform"
    router: Router = "merge"
    align: Align = False
    segments: SegmentOptions | None = None
    max_tokens: int = 2048
    effort: float | None = 3.0
    memory_gib: float = 2.0
    learn: LearnOptions | None = None

    def __post_init__(self) -> None:
        get_similarity(self.similarity)
        kinds = {"partition": Partition, "coefficients": Coefficients, "router": Router}
        for name, kind in kinds.items():
            value = getattr(self, name)
            if value not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise LitMoEError(f"{name}={value!r} is unknown; there are {known}")
        for name in ("max_tokens", "effort", "memory_gib"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise LitMoEError(f"{name}={value} must be a positive number")
        if self.align not in (True, False, "weights", "activations"):
            raise LitMoEError(
                f"align={self.align!r} is unknown; there are true, false, weights, activations"
            )
        if self.partition == "centroids" and self.coefficients in ("uniform", "learned"):
            raise LitMoEError(
                "partition='centroids' gathers around the experts that matter most, but "
                f"coefficients={self.coefficients!r} do not say which; take frequency, reap or "
                "max_visited"
            )
        if self.align and self.coefficients in ("learned", "max_visited"):
            raise LitMoEError(
                f"align with coefficients={self.coefficients!r}: take uniform, frequency or reap"
            )

    @property
    def needs(self) -> frozenset[Need]:
        """What has to be observed."""
        if self.segments is not None:
            return frozenset({"routing"})
        found = set(get_similarity(self.similarity).needs)
        if self.coefficients in ("frequency", "reap", "max_visited"):
            found.add("routing")
        return frozenset(found)

    @property
    def readers(self) -> tuple[str, ...]:
        """What of the recipe looks at text, for messages."""
        if self.segments is not None:
            return ("segments",)
        found = {
            f"similarity={self.similarity!r}": bool(get_similarity(self.similarity).needs),
            f"coefficients={self.coefficients!r}": self.coefficients != "uniform",
            f"align={self.align!r}": self.align == "activations",
        }
        return tuple(name for name, reads in found.items() if reads)

    @property
    def needs_text(self) -> bool:
        """Whether the model has to run."""
        return bool(self.readers)

    @property
    def reads_part(self) -> bool:
        """Whether something looks at no more than the first ``max_tokens`` of the text."""
        learns = self.coefficients == "learned" or self.align == "activations"
        return self.segments is None and (learns or "outputs" in self.needs)
