"""What a merge did, for the report of a run."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LayerMerge:
    """The new experts of one layer.

    Attributes:
        before: experts that there were.
        groups: ids of the old experts that each new one is made of, ascending.
        coefficients: of those, in the same order; for DERN the part of the segments that arrived.
    """

    before: int
    groups: list[list[int]] = field(default_factory=list)
    coefficients: list[list[float]] = field(default_factory=list)


@dataclass
class MergeReport:
    """How experts were merged.

    Attributes:
        recipe: similarity, partition and coefficients in a few words.
        router: what became of the router rows.
        tokens: of text that experts were compared or coefficients learned on; 0 without text.
        neurons_moved: places that alignment changed, None if it was not asked for.
        layers: layer -> its new experts.
        figures: files of similarities and dendrograms, beside the report.
    """

    recipe: str
    router: str = "merge"
    tokens: int = 0
    neurons_moved: int | None = None
    layers: dict[str, LayerMerge] = field(default_factory=dict)
    figures: list[str] = field(default_factory=list)
