"""What a merge is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from lit_moe.errors import LitMoEError
from lit_moe.grouping.coefficients import Coefficients, Router
from lit_moe.grouping.learned import LearnOptions
from lit_moe.grouping.partition import Partition
from lit_moe.grouping.segments import SegmentOptions
from lit_moe.grouping.similarity import Need, get_similarity


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
        align: bring neurons of one group into one order before they are averaged.
        segments: if given, experts are not averaged: the ones with the largest gates stay and take
            over segments of the others (DERN); similarity, partition and coefficients do not count.
        max_tokens: on which the outputs of all experts are compared, and coefficients learned.
        memory_gib: for those outputs and the hidden states before them. Less of it compares fewer
            tokens at a time, which also makes ``cka`` cheaper and a little coarser.
        learn: options of ``coefficients: learned``.

    Raises:
        LitMoEError: for names that do not exist, or a combination that means nothing.
    """

    similarity: str = "cka"
    partition: Partition = "auto"
    coefficients: Coefficients = "uniform"
    router: Router = "merge"
    align: bool = False
    segments: SegmentOptions | None = None
    max_tokens: int = 2048
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
        for name in ("max_tokens", "memory_gib"):
            if getattr(self, name) <= 0:
                raise LitMoEError(f"{name}={getattr(self, name)} must be positive")
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
    def needs_text(self) -> bool:
        """Whether the model has to run."""
        return bool(self.needs) or (self.coefficients == "learned" and self.segments is None)
