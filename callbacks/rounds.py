"""How many experts go in each round, which, and how much training follows. No trainer here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from lit_moe.adapters.site import MoESite
from lit_moe.errors import LitMoEError
from lit_moe.plan import KeepPlan
from lit_moe.report import RoundReport
from lit_moe.selection import Budget, keep_top_per_group, select
from lit_moe.stats import Observation

Unit = Literal["tokens", "steps", "epochs"]


@dataclass
class FineTuning:
    """Training after each round of dropping.

    The setting of the paper: AdamW, cosine schedule, 0.2 M tokens after the first round, doubled
    each round, and the optimizer reset in each (MC-Suite, arXiv 2504.05586). Doubling from there
    over 6 rounds makes 12.6 M tokens, while it also says that about 1 M in all suffice: hence both
    numbers are fields, and the run reports the total.

    Attributes:
        first: amount after the first round.
        growth: factor from one round to the next.
        unit: of ``first``. Tokens are counted as a step holds them on all ranks, padding included,
            and rounded up to whole steps.
        optimizer: ``reset`` begins each round with empty moments and a learning-rate schedule of
            its own; ``keep`` has one schedule over all rounds.
        when_data_ends: if the rounds want more than one pass over the training text: ``error``,
            ``repeat`` it, or ``stop`` training (what is left of the rounds then only drops).
    """

    first: int = 200_000
    growth: float = 2.0
    unit: Unit = "tokens"
    optimizer: Literal["reset", "keep"] = "reset"
    when_data_ends: Literal["error", "repeat", "stop"] = "error"

    def __post_init__(self) -> None:
        if self.first < 1 or self.growth <= 0:
            raise LitMoEError(
                f"fine_tuning: first={self.first} and growth={self.growth:g} must be above 0; "
                "leave fine_tuning out for rounds without training"
            )
        for name, known in (
            ("unit", ("tokens", "steps", "epochs")),
            ("optimizer", ("reset", "keep")),
            ("when_data_ends", ("error", "repeat", "stop")),
        ):
            if getattr(self, name) not in known:
                raise LitMoEError(
                    f"fine_tuning: {name}={getattr(self, name)!r} is unknown; use one of "
                    f"{', '.join(known)}"
                )

    def amounts(self, rounds: int) -> list[int]:
        """Return the amount after each round, in ``unit``."""
        return [max(1, round(self.first * self.growth**r)) for r in range(rounds)]


@dataclass(frozen=True)
class TrainingData:
    """What one pass over the training text is.

    Attributes:
        tokens_per_step: on all ranks, padding included; None if it cannot be told beforehand.
        steps_per_epoch: None if it cannot be told beforehand.
        max_epochs: passes that the trainer allows; -1 for any number.
    """

    tokens_per_step: int | None
    steps_per_epoch: int | None
    max_epochs: int = -1


def steps_per_round(
    fine_tuning: FineTuning | None, rounds: int, data: TrainingData | None
) -> list[int]:
    """Return the optimizer steps after each round; zeros without fine-tuning.

    Args:
        fine_tuning: how much training is wanted.
        rounds: number of rounds.
        data: what there is; not looked at without fine-tuning.

    Raises:
        LitMoEError: if the text does not suffice and ``when_data_ends`` is ``error``, the trainer
            ends before the rounds do, or an amount cannot be turned into steps.
    """
    if fine_tuning is None or data is None:
        return [0] * rounds
    steps = [_in_steps(amount, fine_tuning.unit, data) for amount in fine_tuning.amounts(rounds)]
    one_pass, wanted = data.steps_per_epoch, sum(steps)
    if one_pass is None:
        return steps
    if fine_tuning.when_data_ends == "stop" and fine_tuning.unit != "epochs":
        return _cut_off(steps, one_pass)
    passes = math.ceil(wanted / one_pass)
    if passes > 1 and fine_tuning.when_data_ends == "error" and fine_tuning.unit != "epochs":
        raise LitMoEError(
            f"{rounds} rounds of fine-tuning want {_show(wanted, data)}, but one pass over the "
            f"training text has {_show(one_pass, data)}: lower fine_tuning.first or growth, or set "
            "fine_tuning.when_data_ends to 'repeat' or 'stop'"
        )
    if 0 <= data.max_epochs < passes:
        raise LitMoEError(
            f"{rounds} rounds of fine-tuning want {_show(wanted, data)}, {passes} passes over the "
            f"training text, but trainer.max_epochs is {data.max_epochs}: set it to -1"
        )
    return steps


def counts_per_round(
    sites: Sequence[MoESite], final: Mapping[str, int], rounds: int | None
) -> list[dict[str, int]]:
    """Return layer name -> experts that stay, after each round; equally many go in each.

    Args:
        sites: the MoE layers before the first round.
        final: layer name -> experts that stay after the last.
        rounds: how many; None for one expert per layer (and group) and round, as the paper does,
            or, where layers drop different numbers, as many rounds as divide them all.

    Raises:
        LitMoEError: if the rounds do not divide what a layer drops.
    """
    going = {site.name: (site.num_experts - final[site.name]) // site.num_groups for site in sites}
    common = math.gcd(*going.values())
    number = common if rounds is None else rounds
    if number < 1 or common % number:
        site = max(sites, key=lambda s: going[s.name])
        fits = [n for n in range(1, common + 1) if common % n == 0]
        raise LitMoEError(
            f"rounds={rounds} does not divide what goes: {site.name!r} drops "
            f"{site.num_experts - final[site.name]} experts ({site.num_experts} -> "
            f"{final[site.name]}{_groups(site)}); rounds can be {', '.join(map(str, fits))}"
        )
    return [
        {s.name: s.num_experts - r * going[s.name] // number * s.num_groups for s in sites}
        for r in range(1, number + 1)
    ]


def totals_per_round(everyone: int, final: int, rounds: int | None) -> list[int]:
    """Return the experts that stay in all layers together, after each round of a global ranking.

    Raises:
        LitMoEError: if the rounds do not divide what goes, or no number is given.
    """
    going = everyone - final
    if rounds is None or rounds < 1 or going % rounds:
        fits = [n for n in range(1, min(going, 64) + 1) if going % n == 0]
        said = "is no number of rounds for" if rounds is None else "does not divide"
        raise LitMoEError(
            f"rounds={rounds} {said} the {going} of {everyone} experts that a global ranking "
            f"drops; rounds can be {', '.join(map(str, fits))}"
        )
    return [everyone - going * r // rounds for r in range(1, rounds + 1)]


def select_round(
    scores: Mapping[str, Tensor],
    sites: Sequence[MoESite],
    keep: Mapping[str, int] | int,
    budget: Budget | None,
    protected: Mapping[str, frozenset[int]],
) -> KeepPlan:
    """Return which of the experts that are left stay, numbered among themselves.

    Args:
        scores: layer name -> scores of the experts that are left.
        sites: the MoE layers, with as many experts as are left.
        keep: experts that stay per layer, or in all layers together for a global ranking.
        budget: says how a global ranking compares layers; not looked at otherwise.
        protected: layer name -> places that stay among the experts that are left.
    """
    if not isinstance(keep, int):
        groups = {site.name: site.num_groups for site in sites}
        return keep_top_per_group(scores, keep, groups, protected=protected)
    assert budget is not None
    everyone = sum(site.num_experts for site in sites)
    amount = Budget(
        keep_ratio=keep / everyone,
        scope="global",
        floor=budget.floor,
        normalise=budget.normalise,
    )
    return select(scores, budget=amount, sites=sites, protect=protected)


def mean_load_cv(
    observation: Observation | None, alive: Mapping[str, tuple[int, ...]]
) -> float | None:
    """Return how unevenly the experts that are left are used; None if that was not observed.

    Returns:
        Standard deviation over mean of the tokens per expert, mean over layers.
    """
    if observation is None:
        return None
    loads = [stats.count[list(alive[name])] for name, stats in observation.layers.items()]
    return float(sum(load.std(unbiased=False) / load.mean() for load in loads) / len(loads))


def as_reported(record: Mapping[str, Any]) -> RoundReport:
    """Return a line of ``rounds.json`` as the report shows it."""
    return RoundReport(
        round=record["round"],
        step=record["step"],
        tokens_before=record["tokens_before"],
        experts=sum(map(len, record["kept"].values())),
        load_cv=record.get("load_cv"),
    )


def _in_steps(amount: int, unit: Unit, data: TrainingData) -> int:
    if unit == "steps":
        return amount
    size = data.tokens_per_step if unit == "tokens" else data.steps_per_epoch
    if size is None:
        raise LitMoEError(
            f"fine_tuning.unit={unit!r} cannot be turned into steps, since the training data do "
            "not say how long they are; use unit: steps"
        )
    return math.ceil(amount / size) if unit == "tokens" else amount * size


def _cut_off(steps: Sequence[int], limit: int) -> list[int]:
    """Return the steps of each round until ``limit`` are spent."""
    left, kept = limit, []
    for wanted in steps:
        kept.append(min(wanted, left))
        left -= kept[-1]
    return kept


def _show(steps: int, data: TrainingData) -> str:
    if data.tokens_per_step is None:
        return f"{steps:,} steps"
    return f"{steps * data.tokens_per_step:,} tokens ({steps:,} steps)"


def _groups(site: MoESite) -> str:
    return f", in {site.num_groups} groups" if site.num_groups > 1 else ""
