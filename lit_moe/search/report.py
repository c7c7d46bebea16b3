"""What a search did, for the report of a run."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SplitPoints:
    """One model on one split, in points.

    Attributes:
        fitness: mean over samples of what was searched for.
        stderr: its standard error over samples.
        finer: mean of the finer measure.
    """

    fitness: float
    stderr: float
    finer: float


@dataclass
class SearchReport:
    """How a search went and what it found.

    Attributes:
        fitness: what was searched for.
        finer: what decided between equally fit candidates.
        groups: group -> its MoE layers.
        counts: group -> experts before and after.
        router_space: what router maps act on.
        top_k: experts per token afterwards, None if that was not changed.
        samples: split -> samples.
        evaluations: candidates evaluated.
        bounded: of them, those that were stopped because they could not count any more.
        on_record: evaluations that an earlier run had done.
        seconds: of evaluating, in this run.
        stages: ``before`` (the whole model), ``untouched`` (all experts, fewer active), ``pruned``
            (after the discrete phase), ``merged`` (after the continuous one), ``applied`` (the
            model that the run goes on with) -> split -> points.
        baselines: name -> split -> points of other ways to the same size.
        active_experts: experts per token under dynamic skipping, None without that baseline.
        regret: points per generation that racing missed, None without racing.
        history: file with one line per evaluation.
        projection: layer -> share of tokens that a plain router sends elsewhere, if routers were
            projected.
        notes: sentences that a reader of the numbers must know.
    """

    fitness: str
    finer: str
    groups: dict[str, list[str]] = field(default_factory=dict)
    counts: dict[str, list[int]] = field(default_factory=dict)
    router_space: str = "probabilities"
    top_k: int | None = None
    samples: dict[str, int] = field(default_factory=dict)
    evaluations: int = 0
    bounded: int = 0
    on_record: int = 0
    seconds: float = 0.0
    stages: dict[str, dict[str, SplitPoints]] = field(default_factory=dict)
    baselines: dict[str, dict[str, SplitPoints]] = field(default_factory=dict)
    active_experts: float | None = None
    regret: float | None = None
    history: str = ""
    projection: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[list[str]]:
        """Rows of a table: stage or baseline, then the points on each split."""
        found = []
        for name, splits in {**self.stages, **self.baselines}.items():
            cells = [_shown(splits.get(split)) for split in self.samples]
            found.append([name, *cells])
        return found


def _shown(points: SplitPoints | None) -> str:
    return "" if points is None else f"{points.fitness:.1f} +- {points.stderr:.1f}"
