"""Two ways to do the same work, timed in turns, so that a noisy machine hits both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence


def interleaved(
    first: Callable[[], object], second: Callable[[], object], *, pairs: int = 7
) -> tuple[float, float, float]:
    """Return median seconds of both and the median of the pairwise ratios second / first.

    One untimed round of each warms up; the order within a pair alternates.
    """
    first(), second()
    rows = []
    for turn in range(pairs):
        order = (first, second) if turn % 2 == 0 else (second, first)
        times = {work: _seconds(work) for work in order}
        rows.append((times[first], times[second]))
    ratio = statistics.median(b / a for a, b in rows)
    return statistics.median(a for a, _ in rows), statistics.median(b for _, b in rows), ratio


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
