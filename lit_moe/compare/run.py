"""The whole comparison: check, measure what is missing, write tables and figures."""

from __future__ import annotations

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

from lit_moe.compare.bench import ModelBench
from lit_moe.compare.cells import (
    Judge,
    check_same_shape,
    is_done,
    model_digest,
    settings_of,
    task_data,
)
from lit_moe.compare.grid import Grid
from lit_moe.compare.options import CompareOptions, default_tokenizer
from lit_moe.compare.present import Found, write_all
from lit_moe.compare.store import CellStore
from lit_moe.compare.summary import summarise
from lit_moe.compare.text import ComparedText
from lit_moe.errors import LitMoEError

STORE_NAME = "cells.jsonl"


def compare(options: CompareOptions, *, progress: bool = False) -> Found:
    """Measure every cell that is missing, and write tables and figures into the output folder.

    The same call goes on where a killed one ended, and the grid may grow from call to call.

    Args:
        options: what is compared.
        progress: show a bar.

    Raises:
        LitMoEError: for a request that cannot be met, before anything is observed. Cells that
            fail later are in the result, with a sentence each.
    """
    check_same_shape(options.models)
    grid = Grid(options)
    text = ComparedText(options.text, default_tokenizer(options))
    folder = Path(options.output)
    settings = settings_of(options, text)
    store = CellStore(folder / STORE_NAME, settings, when_other=options.when_changed)
    for name in options.models:
        _check_model(store, name)
    judge = _judge(options, text)
    ablation = None
    with _bar(_missing(grid, store), progress) as on_cell:
        for name in options.models:
            bench = _bench(name, grid, text=text, judge=judge, store=store, on_cell=on_cell)
            if bench is None:
                continue
            _measure(bench, grid)
            if options.ablation and name == options.models[0]:
                ablation = bench.measure_ablation()
    found = Found(grid, store, summarise(grid, store), ablation)
    write_all(found, folder)
    return found


def _bench(name: str, grid: Grid, **options: Any) -> ModelBench | None:
    """Return the model, loaded, if anything of it is missing."""
    store: CellStore = options["store"]
    is_asked = grid.options.ablation and name == grid.options.models[0]
    done = all(is_done(store, key) for key in grid.keys(name))
    if done and not is_asked and store.get("whole", model=name) is not None:
        return None
    return ModelBench(name, grid, **options)


def _measure(bench: ModelBench, grid: Grid) -> None:
    bench.measure_whole()
    for line in grid.lines:
        for seed in grid.seeds(line):
            bench.measure(line, seed)


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
def _bar(total: int, shown: bool) -> Iterator[Callable[[str], None]]:
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
        yield lambda text: bar.update(task, advance=1, description=text)
