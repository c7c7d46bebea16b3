"""The tables of what a refit costs."""

from __future__ import annotations

from tests.benchmarks.refit_numbers import MEMORY, MEMORY_SHAPE, NAME, SOLVED, TIMED
from tests.benchmarks.refit_store import Store
from tests.benchmarks.timing import markdown


def passes(store: Store) -> str:
    """Parallel refit of all layers against a forward over the same tokens."""
    rows = []
    for shape in TIMED:
        cell = store.get(NAME, "passes", shape=shape)
        if cell is not None:
            seconds = (f"{cell[key]:.2f} s" for key in ("plain", "refit", "solves"))
            trained = shape == "embedded"
            penalty = "chosen" if trained else "given"
            rows.append([shape, penalty, *seconds, f"{cell['ratio']:.2f}", cell["solver"]])
    header = [
        "16,384 tokens, half of the experts",
        "penalty",
        "plain forward",
        "parallel refit",
        "of it solves",
        "refit without solves / forward",
        "solver",
    ]
    return markdown(header, rows)


def solves(store: Store) -> str:
    """One joint solve against the same operations at the speed of a matrix product."""
    rows = []
    for features, hidden in SOLVED:
        for dtype in ("float32", "float64"):
            cell = store.get(NAME, "solve", features=features, hidden=hidden, dtype=dtype)
            if cell is not None:
                times = (f"{1000 * cell[key]:.0f} ms" for key in ("solve", "bound"))
                rows.append([f"{features} x {hidden}", dtype, *times, f"{cell['ratio']:.2f}"])
    header = ["features x hidden", "dtype", "one solve", "at the speed of a product", "ratio"]
    return markdown(header, rows)


def memory(store: Store) -> str:
    """Peak memory beyond the models."""
    rows = []
    for mode, budget in MEMORY:
        cell = store.get(NAME, "peak", mode=mode, gib=budget)
        if cell is not None:
            more = cell["peak"] - cell["plain"]
            sizes = (cell["plain"], cell["peak"], more, cell["stated"])
            ratio = f"{more / cell['stated']:.2f}"
            rows.append([mode, f"{budget:g} GiB", *(f"{n / 2**30:.2f} GiB" for n in sizes), ratio])
    header = [
        f"{MEMORY_SHAPE}, hidden 512, 16,384 tokens",
        "memory_gib",
        "peak of a plain forward",
        "peak of the refit",
        "more",
        "stated by inspect",
        "more / stated",
    ]
    return markdown(header, rows)
