"""The whole comparison: check, measure what is missing, write tables and figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lit_moe.compare.ablation import AblationMap
from lit_moe.compare.bench import ModelBench
from lit_moe.compare.cells import (
    Judge,
    check_same_shape,
    is_done,
    is_settled,
    model_digest,
    settings_of,
    task_data,
)
from lit_moe.compare.claims import Claims
from lit_moe.compare.findings import Found
from lit_moe.compare.grid import Grid
from lit_moe.compare.lottery import check_training
from lit_moe.compare.options import CompareOptions, Line, default_tokenizer
from lit_moe.compare.present import write_all
from lit_moe.compare.store import CellStore
from lit_moe.compare.summary import summarise
from lit_moe.compare.text import ComparedText
from lit_moe.errors import LitMoEError

STORE_NAME, LOCKS = "cells.jsonl", "locks"


def compare(options: CompareOptions, *, progress: bool = False) -> Found:
    """Measure every cell that is missing, and write tables and figures into the output folder.

    The same call goes on where a killed one ended, and the grid may grow from call to call. Several
    processes that make this call at the same time share the cells out and all return the whole;
    with as many threads each, the numbers are those of one process. First each takes a seed of its
    own, so that a calibration pass is repeated only by who would have nothing else to do.

    Args:
        options: what is compared.
        progress: show a bar.

    Raises:
        LitMoEError: for a request that cannot be met, before anything is observed. Cells that
            fail later are in the result, with a sentence each.
    """
    check_same_shape(options.models)
    text = ComparedText(options.text, default_tokenizer(options))
    grid = Grid(options, text)
    check_training(options, text, grid.ways.values())
    folder = Path(options.output)
    settings = settings_of(options, text)
    store = CellStore(folder / STORE_NAME, settings, when_other=options.when_changed)
    for name in options.models:
        _check_model(store, name)
    judge = _judge(options, text)
    claims = Claims(folder / LOCKS)
    with _bar(_missing(grid, store), progress) as on_cells:
        work = _Work(grid, text, store, judge=judge, claims=claims, on_cells=on_cells)
        work.do()
        ablation = work.ablation() if options.ablation else None
    found = Found(grid, store, summarise(grid, store), ablation)
    with claims.held(piece="report"):
        write_all(found, folder)
    return found


class _Work:
    """What this process does of a comparison, until nothing is left to anybody.

    A piece is a curve for one model and seed, or the whole model.
    """

    def __init__(
        self,
        grid: Grid,
        text: ComparedText,
        store: CellStore,
        *,
        judge: Judge,
        claims: Claims,
        on_cells: Callable[[str, int], None],
    ) -> None:
        self.grid, self.text, self.store = grid, text, store
        self.judge, self.claims, self.on_cells = judge, claims, on_cells
        self._bench: ModelBench | None = None

    def do(self) -> None:
        """Measure what nobody else does, and what others leave undone; return when all is there."""
        while missing := [name for name in self.grid.options.models if not self._is_settled(name)]:
            for name in missing:
                self._share(name)
            for name in missing:
                self._wait(name)

    def ablation(self) -> AblationMap:
        """Return what single experts of the first model are worth; one process measures it."""
        with self.claims.held(piece="ablation"):
            self._refresh()
            return self._bench_of(self.grid.options.models[0]).measure_ablation()

    def _share(self, name: str) -> None:
        """Measure seeds that nobody is at, then what is left of the others."""
        with self.claims.tried(model=name, piece="whole") as is_mine:
            if is_mine:
                self._refresh()
                self._bench_of(name).measure_whole()
        for helps in (False, True):
            for seed in self.grid.all_seeds:
                with self.claims.tried(model=name, seed=seed, piece="seed") as is_first:
                    if is_first or helps:
                        self._measure(name, seed)

    def _measure(self, name: str, seed: int) -> None:
        for line in self._lines(seed):
            with self.claims.tried(**_piece(name, seed, line)) as is_mine:
                self._refresh()
                if is_mine and not self._is_line_settled(name, seed, line):
                    self._bench_of(name).measure(line, seed)

    def _wait(self, name: str) -> None:
        """Return when nobody is at a piece of this model."""
        with self.claims.held(model=name, piece="whole"):
            pass
        for seed in self.grid.all_seeds:
            for line in self._lines(seed):
                with self.claims.held(**_piece(name, seed, line)):
                    self._refresh()

    def _lines(self, seed: int) -> list[Line]:
        return [line for line in self.grid.lines if seed in self.grid.seeds(line)]

    def _is_settled(self, name: str) -> bool:
        is_judged = self.store.get("whole", model=name) is not None
        return is_judged and all(is_settled(self.store, key) for key in self.grid.keys(name))

    def _is_line_settled(self, name: str, seed: int, line: Line) -> bool:
        keys = (self.grid.key(line, name, seed, ratio) for ratio in self.grid.ratios)
        return all(is_settled(self.store, key) for key in keys)

    def _refresh(self) -> None:
        num_cells = self.store.refresh()
        if num_cells:
            self.on_cells("by another process", num_cells)

    def _bench_of(self, name: str) -> ModelBench:
        """Return the model, loaded; the one before it is let go."""
        if self._bench is None or self._bench.name != name:
            self._bench = None
            self._bench = ModelBench(
                name,
                self.grid,
                text=self.text,
                judge=self.judge,
                store=self.store,
                on_cell=lambda text: self.on_cells(text, 1),
            )
        return self._bench


def _piece(name: str, seed: int, line: Line) -> dict[str, Any]:
    return {"model": name, "seed": seed, **dataclasses.asdict(line)}


def _missing(grid: Grid, store: CellStore) -> int:
    """Return the cells to measure, single experts included."""
    models = grid.options.models
    cells = sum(not is_done(store, key) for model in models for key in grid.keys(model))
    if not grid.options.ablation:
        return cells
    known = sum(key["model"] == models[0] for key, _ in store.all("ablation"))
    return cells + sum(site.num_experts for site in grid.sites) - known


def _judge(options: CompareOptions, text: ComparedText) -> Judge:
    batches, domains = text.evaluation()
    if options.tasks is None:
        return Judge(batches, domains)
    return Judge(batches, domains, task_data(options.tasks, default_tokenizer(options)))


def _check_model(store: CellStore, name: str) -> None:
    """Refuse a checkpoint that is no longer the one that was measured.

    Raises:
        LitMoEError: naming both.
    """
    found, now = store.get("model", name=name), {"digest": model_digest(name)}
    if found is None:
        store.put("model", now, name=name)
    elif found != now:
        raise LitMoEError(
            f"{store.path} holds results of another checkpoint at {name} (fingerprint "
            f"{found['digest']}, now {now['digest']}); take another `output`"
        )


@contextmanager
def _bar(total: int, shown: bool) -> Iterator[Callable[[str, int], None]]:
    """Show cells done, cells left, and the time that they will take."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not shown) as bar:
        task = bar.add_task("calibrating", total=total)
        yield lambda text, num: bar.update(task, advance=num, description=text)
