"""The knobs of the search. Defaults are those of the released search, where it has them.

"Released" is ``configs/search/search.yml`` and ``search.py`` of EEP (arXiv 2407.00945), "paper" its
text. Fitness is in points: percent of right answers, hundredths of a nat.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from lit_moe.errors import LitMoEError
from lit_moe.search.groups import Grouping


@dataclass(frozen=True)
class Rates:
    """Chances and sizes of variation; chances in [0, 1].

    Attributes:
        group: that a group's expert map is touched, and separately its router map; drawn again
            until one is (released: 0.25).
        row: discrete phase: that a row of a touched map moves to an unused expert (released: 0.15).
        element: continuous phase: that an element of a touched map gets noise (released: 0.25).
        noise: standard deviation of that noise (released: 0.065).
        normalise: continuous phase: that all rows of expert maps are divided by their sum
            (released: 0.1).
        crossover: continuous phase: that a child has two parents (released: 0.3). It is mutated
            too.
        discrete_crossover: the same for the discrete phase (released: never; the paper crosses in
            both).
        first_row: that a row of a touched map comes from the first parent (released: 0.6).
        first_map: that an untouched map comes from the first parent (released: 0.6).
        crossover_margin: both parents are within so many points of the best (released: 1.0).
        crossover_least: but at least so many individuals can be drawn (released: 6).
        mutation_margin: a single parent is within so many points of the best (released: 3.0).
        mutation_extra: and so many more individuals can be drawn (released: 1).
        count: non-uniform counts: that an expert of one group is given to another (ours: 0.5).
        touch: ``uniform`` draws every group alike (released). ``by_cost`` draws the one group that
            changes with a chance inverse to what runs from its first layer on (ours): late groups
            are tried more often, since the hidden states before them are known. A crossing then
            mixes rows of that same group.
    """

    group: float = 0.25
    row: float = 0.15
    element: float = 0.25
    noise: float = 0.065
    normalise: float = 0.1
    crossover: float = 0.3
    discrete_crossover: float = 0.0
    first_row: float = 0.6
    first_map: float = 0.6
    crossover_margin: float = 1.0
    crossover_least: int = 6
    mutation_margin: float = 3.0
    mutation_extra: int = 1
    count: float = 0.5
    touch: Literal["uniform", "by_cost"] = "uniform"

    def __post_init__(self) -> None:
        margins = ("noise", "crossover_margin", "crossover_least", "mutation_margin")
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name == "touch":
                continue
            if item.name in (*margins, "mutation_extra"):
                if value < 0:
                    raise LitMoEError(f"rates.{item.name}={value:g} must be at least 0")
            elif not 0 <= value <= 1:
                raise LitMoEError(f"rates.{item.name}={value:g} is a chance, from 0 to 1")
        if self.group == 0 or self.row == 0 or self.element == 0:
            raise LitMoEError(
                "rates.group, rates.row and rates.element must be above 0: nothing would ever vary"
            )
        if self.touch not in ("uniform", "by_cost"):
            raise LitMoEError(f"rates.touch={self.touch!r} is unknown; use uniform or by_cost")


@dataclass(frozen=True)
class Racing:
    """Successive halving over samples within a generation: the worse half stops early.

    Every child is first evaluated on a few samples; those that are behind stop there and become no
    parents, the others go on to more samples, in the end to all.

    Attributes:
        first: samples of the first heat.
        keep: share of the children that goes on after each heat, in (0, 1).
        growth: factor of the samples from one heat to the next, above 1.
        audit_every: in every so many generations the stopped children are evaluated fully too; what
            racing missed there is reported as its regret. 0 for never.
    """

    first: int = 32
    keep: float = 0.5
    growth: float = 2.0
    audit_every: int = 10

    def __post_init__(self) -> None:
        if self.first < 1 or self.growth <= 1 or not 0 < self.keep < 1 or self.audit_every < 0:
            raise LitMoEError(
                f"racing: first={self.first} must be at least 1, keep={self.keep:g} in (0, 1), "
                f"growth={self.growth:g} above 1, audit_every={self.audit_every} at least 0"
            )

    def heats(self, num_samples: int) -> list[int]:
        """Return how many samples each heat has; the last has all."""
        sizes = [min(self.first, num_samples)]
        while sizes[-1] < num_samples:
            sizes.append(min(max(sizes[-1] + 1, round(sizes[-1] * self.growth)), num_samples))
        return sizes


@dataclass(frozen=True)
class Effort:
    """How long the search goes on.

    Attributes:
        initial: random individuals at the start, warm starts included (released: about 30).
        discrete: evaluations until maps may become continuous (released: 100; paper: 40 iterations
            of an unstated size). 0 skips the discrete phase.
        total: evaluations in all (released: 400; paper: 160 more iterations). Not above
            ``discrete``: there is no continuous phase.
        children: made per generation from one population; they can be shared among ranks, and the
            history depends on this number, not on the ranks (released: 1, steady state).
        rerank: so many of the best are evaluated on the dev split, where the choice falls
            (released: 20). 0 takes the best of the search split.
        bound: stop evaluating a candidate as soon as it can neither become a parent nor be listed,
            whatever it does on the samples left (ours). The search comes to the same candidates
            and the same result, and questions that four random candidates do worst on are asked
            first. It can stop between batches only: give ``samples.batch_size`` a fraction of the
            samples. Without effect under racing.
        seed: of everything that is drawn (released: 11450).
    """

    initial: int = 30
    discrete: int = 100
    total: int = 400
    children: int = 1
    rerank: int = 20
    bound: bool = True
    seed: int = 11450

    def __post_init__(self) -> None:
        if self.total < 1:
            raise LitMoEError(
                f"effort.total={self.total} evaluations leave nothing to search with; give at "
                "least 1"
            )
        for name, least in (("initial", 1), ("discrete", 0), ("children", 1), ("rerank", 0)):
            if getattr(self, name) < least:
                raise LitMoEError(f"effort.{name}={getattr(self, name)} must be at least {least}")


@dataclass
class SearchSpace:
    """What is searched for.

    Attributes:
        keep_ratio: experts after over experts before, in (0, 1]; 1 merges without dropping.
        keep_experts: instead: experts that each layer will have.
        top_k: experts per token afterwards; None leaves it as it is.
        groups: layers that share their maps: a number of groups by depth (paper: 4), ``per_layer``
            (paper: for RTE, ReCoRD, DROP), or patterns such as ``layers.[0-7]``.
        router_space: ``probabilities`` mixes routing probabilities over all experts, then takes the
            top-k (the paper); the result needs a router that can do it. ``rows`` mixes router rows,
            which plain transformers loads.
        router: ``free`` maps become continuous too; ``one_hot`` ones only ever choose.
        non_uniform: groups may keep different numbers under the same total.
        floor: least experts of a layer then; None for what its router needs.
    """

    keep_ratio: float | None = None
    keep_experts: int | None = None
    top_k: int | None = None
    groups: Grouping = 4
    router_space: Literal["probabilities", "rows"] = "probabilities"
    router: Literal["free", "one_hot"] = "free"
    non_uniform: bool = False
    floor: int | None = None

    def __post_init__(self) -> None:
        if (self.keep_ratio is None) == (self.keep_experts is None):
            raise LitMoEError(
                f"space: give keep_ratio or keep_experts, and only one of them; they are "
                f"{self.keep_ratio} and {self.keep_experts}"
            )
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise LitMoEError(f"space.keep_ratio={self.keep_ratio:g} must be above 0 and at most 1")
        known = {"router_space": ("probabilities", "rows"), "router": ("free", "one_hot")}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise LitMoEError(
                    f"space.{name}={getattr(self, name)!r} is unknown; use {' or '.join(values)}"
                )
