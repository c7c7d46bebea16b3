"""What is asked of an evaluator."""

from __future__ import annotations

from dataclasses import dataclass

from lit_moe.search.genome import Genome


@dataclass(frozen=True)
class Floor:
    """Points that a candidate must come to.

    Attributes:
        points: an evaluation may stop once it is certain to end below them.
        by_finer: of the finer measure instead of the fitness.
    """

    points: float
    by_finer: bool = False


@dataclass(frozen=True)
class Request:
    """One evaluation that is wanted.

    Attributes:
        genome: the candidate.
        split: ``search``, ``dev`` or ``test``.
        samples: so many samples of the split, the first ones.
        floor: below it a bound will do; None asks for the score in any case.
    """

    genome: Genome
    split: str
    samples: int
    floor: Floor | None = None
