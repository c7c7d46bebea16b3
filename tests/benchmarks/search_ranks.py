"""The same evolutionary search on one process and on two, each with one thread.

``python -m tests.benchmarks.search_ranks``, on a quiet machine with two free cores: prints the
seconds of both on the clock and their ratio, and fails if the histories are not the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from lit_moe.search import Effort
from lit_moe.testing import run_distributed
from tests.benchmarks import search
from tests.benchmarks.search_memory import large_model
from tests.benchmarks.timing import markdown

HIDDEN, TURNS = 128, 2
EFFORT = Effort(initial=32, discrete=64, total=224, children=16, rerank=16)


def work(setting: search.Setting) -> Callable[[int], tuple[float, list[Any]]]:
    """Return what a rank does: its seconds from the first candidate to the result, its history."""

    def one(_: int) -> tuple[float, list[Any]]:
        model = large_model(HIDDEN)
        dist.barrier()
        begin = time.perf_counter()
        found = search.ours(model, setting, EFFORT)
        seconds = time.perf_counter() - begin
        return seconds, [(line.split, line.genome, line.score) for line in found.lines]

    return one


def row_of(setting: search.Setting) -> list[object]:
    """Return a row: seconds are the least of the turns, of the slower rank."""
    walls: dict[int, list[float]] = {1: [], 2: []}
    histories = []
    for _ in range(TURNS):
        for ranks, found in walls.items():
            answers = run_distributed(work(setting), ranks)
            found.append(max(seconds for seconds, _ in answers))
            histories += [lines for _, lines in answers]
    assert all(lines == histories[0] for lines in histories), "other histories"
    one, two = min(walls[1]), min(walls[2])
    return [setting.name, f"{one:.1f}", f"{two:.1f}", f"{one / two:.2f}"]


def run() -> str:
    rows = []
    for setting in (search.SETTINGS[0], search.SETTINGS[3]):
        rows.append(row_of(setting))
        print(*rows[-1], sep=" | ", flush=True)
    return markdown(["search", "one rank, s", "two ranks, s", "ratio"], rows)


if __name__ == "__main__":
    print(run())
