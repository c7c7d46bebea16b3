"""The ways down: how many experts are left after each round, and where the ratios lie on it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from lit_moe.adapters.site import MoESite
from lit_moe.callbacks.base import composed
from lit_moe.callbacks.rounds import counts_per_round, select_round, totals_per_round
from lit_moe.compare.calibration import Calibration, Scores
from lit_moe.compare.options import Scope
from lit_moe.criteria import Criterion, UnroutedRule
from lit_moe.errors import LitMoEError
from lit_moe.masking import masked
from lit_moe.plan import KeepPlan
from lit_moe.selection import Budget, check_budget, layer_counts, layer_rules, select
from lit_moe.selection.counts import total_experts

Keep = Mapping[str, int] | int


@dataclass(frozen=True)
class Way:
    """Rounds from all experts down to the smallest ratio.

    Attributes:
        keep: experts per layer (or in all layers together) that stay after each round.
        stations: round, from 1 -> the ratio that it has come to.
    """

    keep: tuple[Keep, ...]
    stations: Mapping[int, float]

    @property
    def per_round(self) -> int:
        """Experts of all layers that go in one round."""
        return _total(self.keep[-2]) - _total(self.keep[-1]) if len(self.keep) > 1 else 0

    def to(self, ratios: Collection[float]) -> Way:
        """Return the part that leads to the last of these ratios, with only these as stations."""
        stations = {number: r for number, r in self.stations.items() if r in ratios}
        return Way(self.keep[: max(stations)], stations)


def budget_of(ratio: float, scope: Scope) -> Budget:
    """Return a ratio as a budget."""
    return Budget(keep_ratio=ratio, scope=scope)


def check_ratios(
    sites: Sequence[MoESite], ratios: Sequence[float], scopes: Sequence[Scope]
) -> None:
    """Refuse ratios that the routers cannot meet.

    Raises:
        LitMoEError: in the words of the budget.
    """
    for scope in scopes:
        for ratio in ratios:
            check_budget(budget_of(ratio, scope), sites, ())


def find_way(
    sites: Sequence[MoESite], ratios: Sequence[float], scope: Scope, rounds: int | None
) -> Way:
    """Return the rounds that come by all ratios.

    Raises:
        LitMoEError: if the rounds do not divide the way, or miss a ratio; names numbers that do.
    """
    lowest = min(ratios)
    final = layer_counts(budget_of(lowest, "layer"), sites)
    per_layer = counts_per_round(sites, final, rounds)
    keep: list[Keep] = [*per_layer]
    if scope == "global":
        rules = layer_rules(sites)
        everyone = sum(site.num_experts for site in sites)
        total = total_experts(budget_of(lowest, "global"), rules)
        keep = [*totals_per_round(everyone, total, len(per_layer))]
    wanted = {ratio: _kept(sites, ratio, scope) for ratio in ratios}
    missed = [ratio for ratio, there in wanted.items() if there not in keep]
    if missed:
        raise LitMoEError(
            f"{len(keep)} rounds from all experts to keep_ratio={lowest:g} miss "
            f"{', '.join(f'{ratio:g}' for ratio in missed)}: leave `rounds` out for one expert per "
            "layer and round, or take other keep_ratios"
        )
    return Way(tuple(keep), {keep.index(there) + 1: ratio for ratio, there in wanted.items()})


def one_shot_plan(
    scores: Mapping[str, Tensor], sites: Sequence[MoESite], ratio: float, scope: Scope
) -> KeepPlan:
    """Return what stays if all that goes goes at once."""
    return select(scores, budget=budget_of(ratio, scope), sites=sites)


def iterate(
    calibration: Calibration,
    criterion: Criterion,
    way: Way,
    *,
    first: Scores,
    scope: Scope,
    unrouted: UnroutedRule,
) -> Iterator[tuple[float, KeepPlan]]:
    """Yield ratio and plan at each station, scoring the masked model anew before each round.

    Args:
        calibration: of the whole model.
        criterion: that scores.
        way: the rounds.
        first: scores of the whole model.
        scope: of the ranking.
        unrouted: rule for experts that saw no token.

    Raises:
        LitMoEError: for a criterion that masks the model itself.
    """
    if "forward" in criterion.needs and len(way.keep) > 1:
        raise LitMoEError(
            f"criterion {criterion.name!r} uses masks of its own, so it cannot score a masked model"
        )
    sites = calibration.sites
    alive = KeepPlan.identity({site.name: site.num_experts for site in sites})
    scores = first
    for number, keep in enumerate(way.keep, start=1):
        if number > 1:
            scores = _scores_again(calibration, criterion, alive, unrouted, number - 1)
        stay = select_round(
            {name: values[list(alive.kept[name])] for name, values in scores.items()},
            [replace(site, num_experts=len(alive.kept[site.name])) for site in sites],
            keep,
            budget_of(min(way.stations.values()), scope),
            {},
        )
        alive = composed(alive, stay)
        if number in way.stations:
            yield way.stations[number], alive


def _scores_again(
    calibration: Calibration,
    criterion: Criterion,
    alive: KeepPlan,
    unrouted: UnroutedRule,
    rounds_before: int,
) -> Scores:
    again = Calibration(
        calibration.model,
        calibration.sites,
        calibration.batches,
        needs=criterion.needs,
        seed=calibration.seed + rounds_before,
        alive=alive.kept,
    )
    with masked(calibration.model, alive):
        return again.scores(criterion, unrouted=unrouted)


def _total(keep: Keep) -> int:
    return keep if isinstance(keep, int) else sum(keep.values())


def _kept(sites: Sequence[MoESite], ratio: float, scope: Scope) -> Keep:
    if scope == "layer":
        return layer_counts(budget_of(ratio, "layer"), sites)
    return total_experts(budget_of(ratio, "global"), layer_rules(sites))
