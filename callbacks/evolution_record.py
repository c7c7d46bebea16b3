"""What an evolutionary search puts on record: its history on all ranks, and its report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning import Trainer

from lit_moe.callbacks.evolution_parts import Search
from lit_moe.errors import LitMoEError
from lit_moe.module import MoEModule
from lit_moe.search.genome import Genome, one_hot
from lit_moe.search.history import History, Line
from lit_moe.search.problem import Problem
from lit_moe.search.report import SearchReport
from lit_moe.search.run import Outcome
from lit_moe.search.space import fingerprint


def open_history(
    trainer: Trainer, module: MoEModule, search: Search, path: Path, options: Mapping[str, str]
) -> History:
    """Return what is on record, the same on all ranks; only the first writes. Collective.

    Args:
        trainer: of the run.
        module: whose model is searched on.
        search: what is searched for, and on what.
        path: of the history.
        options: what else the numbers depend on.

    Raises:
        LitMoEError: if the file is of another search.
    """
    starts = {"start": [genome.key for genome in search.problem.start]}
    samples = {name: data.identities() for name, data in search.splits.items()}
    key = fingerprint(module.built_model, {**options, **starts}, samples)
    opened: Any = None
    if trainer.is_global_zero:
        try:
            opened = History.open(path, key)
        except LitMoEError as error:
            opened = error
    lines = opened.lines if isinstance(opened, History) else opened
    plain = [line.to_dict() for line in lines] if isinstance(lines, list) else lines
    agreed = trainer.strategy.broadcast(plain)
    if isinstance(agreed, LitMoEError):
        raise agreed
    if isinstance(opened, History):
        return opened
    return History(key, [Line.from_dict(line) for line in agreed])


def finish_report(
    report: SearchReport, search: Search, outcome: Outcome, *, top_k: int | None
) -> None:
    """Tell what was found, measured on all splits."""
    problem = search.problem
    stages = {"merged": outcome.best} if search.merges else {}
    if outcome.pruned is not None and not problem.drops_nothing:
        stages = {"pruned": outcome.pruned, **stages}
    with search.live.active(top_k):
        if top_k is not None:
            report.stages["untouched"] = search.points(_everyone(problem))
        for name, individual in stages.items():
            report.stages[name] = search.points(individual.genome)
    counts = zip(problem.groups, outcome.best.genome.counts, strict=True)
    report.counts = {group.name: [group.num_experts, n] for group, n in counts}
    report.evaluations, report.bounded = outcome.evaluations, outcome.bounded
    report.regret = outcome.mean_regret
    report.notes = list(outcome.notes)


def _everyone(problem: Problem) -> Genome:
    return Genome(tuple(one_hot(range(g.num_experts), g.num_experts) for g in problem.groups))
