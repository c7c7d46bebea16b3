"""The refit on up to 721 k tokens, which only the training text of the embedded model has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial

import torch
from torch.utils.data import DataLoader

from tests.benchmarks.refit_bench import BLOCK, ROWS, Batches, Bench, text
from tests.benchmarks.refit_store import Result, Store
from tests.benchmarks.timing import markdown

NAME, PART = "embedded", "more_tokens"
SIZES = (98304, 196608, 393216, 720896)
RECIPES = ("obs (global budget)", "obs", "reap, routers too", "reap, refitted twice")
RECIPE_TOKENS = 196608
DROPPED = (("reap", 0.75), ("reap", 0.5), *((recipe, 0.75) for recipe in RECIPES[:2]))
DRAWS = (1, 2, 3)
NOTE = (
    "Gap closed: (dropped by reap - this) / (dropped by reap - whole), in perplexity on 32,768 "
    "tokens of the test text; with obs a part of it is the choice of experts, not the refit. Plans "
    "from 16,384 tokens of the calibration text, refitted on training text, which the whole model "
    "was trained on; a draw takes random blocks of it, equally many of each domain. Penalties are "
    "chosen on held-out calibration rows."
)


@dataclass(frozen=True)
class Cell:
    """One refit: fraction of experts kept, calibration tokens, seed of the draw, recipe."""

    keep: float
    tokens: int
    draw: int = DRAWS[0]
    recipe: str = "reap"


def cells() -> Iterator[Cell]:
    """Yield what is measured: the target first, what takes longest last."""
    yield from (Cell(0.75, tokens) for tokens in SIZES[:-1])
    yield from (Cell(0.75, RECIPE_TOKENS, recipe=recipe) for recipe in RECIPES[:-1])
    yield from (Cell(0.75, SIZES[2], draw, RECIPES[0]) for draw in DRAWS)
    yield Cell(0.75, RECIPE_TOKENS, recipe=RECIPES[-1])
    yield from (Cell(0.5, tokens) for tokens in SIZES[:-1])
    yield from (Cell(keep, SIZES[-1]) for keep in (0.75, 0.5))
    yield from (Cell(0.75, SIZES[-1], draw) for draw in DRAWS[1:])


def more_tokens(store: Store) -> None:
    """Part 2, continued: the embedded model, refitted on training text."""
    bench = Bench(NAME)
    store.measure(bench.whole, NAME, PART, recipe="whole")
    for recipe, keep in DROPPED:
        work = partial(_dropped, bench, recipe, keep)
        store.measure(work, NAME, PART, recipe=f"{recipe}, dropped", keep=keep)
    for cell in cells():
        store.measure(partial(_refitted, bench, cell), NAME, PART, **asdict(cell))


def drawn(num_tokens: int, draw: int) -> Batches:
    """Return batches of random blocks of the training text, equally many of each domain."""
    blocks = text().blocks("train")
    generator = torch.Generator().manual_seed(draw)
    mixed = blocks.take(torch.randperm(len(blocks), generator=generator))
    loader = DataLoader(mixed.spread(num_tokens // BLOCK), batch_size=ROWS)
    return [{key: batch[key] for key in ("input_ids", "attention_mask")} for batch in loader]


def table(store: Store) -> str:
    """Perplexity, share of the gap closed, and CPU seconds, cell by cell."""
    rows = [
        [f"{keep:.0%}", recipe, "0 (dropped)", "", *_numbers(store, keep, found)]
        for recipe, keep in DROPPED
        if (found := store.get(NAME, PART, recipe=f"{recipe}, dropped", keep=keep))
    ]
    for cell in sorted(cells(), key=lambda c: (-c.keep, c.recipe != "reap", c.tokens, c.draw)):
        found = store.get(NAME, PART, **asdict(cell))
        if found is not None:
            said = [f"{cell.keep:.0%}", cell.recipe, f"{cell.tokens:,}", str(cell.draw)]
            rows.append([*said, *_numbers(store, cell.keep, found)])
    header = ["kept", "recipe", "calibration tokens", "draw", "perplexity", "gap closed", "CPU"]
    whole = store.get(NAME, PART, recipe="whole")
    start = "" if whole is None else f"Whole: {whole['perplexity']:.2f}. "
    return f"{markdown(header, rows)}\n\n{start}{NOTE}"


def _numbers(store: Store, keep: float, found: Result) -> list[str]:
    """Return perplexity, gap closed and CPU seconds as they stand in the table."""
    closed = gap_closed(store, keep, found["perplexity"])
    seconds = f"{found['seconds']:.0f} s" if "seconds" in found else ""
    return [f"{found['perplexity']:.2f}", f"{closed:.0f} %", seconds]


def gap_closed(store: Store, keep: float, perplexity: float) -> float:
    """Return percent of the gap that dropping by reap opens."""
    dropped = _known(store, recipe="reap, dropped", keep=keep)
    whole = _known(store, recipe="whole")
    return 100 * (dropped - perplexity) / (dropped - whole)


def _known(store: Store, **settings: object) -> float:
    found = store.get(NAME, PART, **settings)
    assert found is not None, f"measure {settings} first"
    return float(found["perplexity"])


def _dropped(bench: Bench, criterion: str, keep: float) -> Result:
    return bench.quality(bench.dropped(criterion, keep))


def _refitted(bench: Bench, cell: Cell) -> Result:
    criterion, _, how = cell.recipe.partition(", ")
    student = bench.dropped(criterion, cell.keep)
    batches = drawn(cell.tokens, cell.draw)
    first = bench.refitted(student, batches, router=how == "routers too")
    if how != "refitted twice":
        return first
    second = bench.refitted(student, batches)
    return {**second, "seconds": first["seconds"] + second["seconds"]}
