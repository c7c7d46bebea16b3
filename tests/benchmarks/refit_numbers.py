"""What a refit costs: its passes against a forward, its solves against matrix products, its memory.

One thread; times are CPU seconds, medians of rounds in which both sides take turns.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

import lit_moe
from lit_moe.adapters import count_experts, find_sites
from lit_moe.inspection import RefitRequest, inspect_model
from lit_moe.models import sharing_copy
from lit_moe.plan import KeepPlan
from lit_moe.refit import RefitOptions, refit
from lit_moe.refit.layer import LayerProblem
from lit_moe.refit.ridge import solve_joint
from lit_moe.stats.grams import Gram
from tests.benchmarks import calibration
from tests.benchmarks.refit_bench import Batches, Bench
from tests.benchmarks.refit_store import Result, Store

NAME = "cost"
TIMED = ("embedded", *calibration.SHAPES)
SOLVED = ((1024, 576), (1536, 160), (4096, 512))
"""Features and hidden sizes: the SmolLM2 split with all experts, the embedded model with half, a
layer of 4 experts as wide as 1024."""
MEMORY = (("sequential", 1.0), ("sequential", 0.5), ("parallel", 1.0), ("parallel", 0.5))
MEMORY_SHAPE = "8 experts, top-2"
ROUNDS = {"embedded": 3}


def cost(store: Store) -> None:
    for shape in TIMED:
        store.measure(partial(_passes, shape), NAME, "passes", shape=shape)
    for features, hidden in SOLVED:
        for dtype in ("float32", "float64"):
            store.measure(
                partial(_solve, features, hidden, getattr(torch, dtype)),
                *(NAME, "solve"),
                features=features,
                hidden=hidden,
                dtype=dtype,
            )
    for mode, budget in MEMORY:
        store.measure(partial(_memory, mode, budget), NAME, "peak", mode=mode, gib=budget)


def _passes(shape: str) -> Result:
    """Time a parallel refit of half of the experts, with its solves and without."""
    model, batches = _model(shape)
    student = _half(model)
    with torch.no_grad():
        model.base_model(**batches[0])
    # Held-out tokens cannot choose a penalty for weights that were never trained.
    options: dict[str, Any] = {"mode": "parallel", "lam": "auto" if shape == "embedded" else 1e-2}
    rounds = [
        _round(model, student, batches, RefitOptions(**options))
        for _ in range(ROUNDS.get(shape, 1))
    ]
    times = ("plain", "refit", "solves", "ratio")
    medians = {key: statistics.median(r[key] for r in rounds) for key in times}
    return {**medians, "solver": rounds[0]["solver"]}


def _round(
    model: PreTrainedModel, student: PreTrainedModel, batches: Batches, options: RefitOptions
) -> Result:
    start = time.process_time()
    with torch.no_grad():
        for batch in batches:
            model.base_model(**batch)
    plain = time.process_time() - start
    own = sharing_copy(student)
    start = time.process_time()
    with _counting_solves() as solves:
        report = refit(own, model, batches, options)
    whole = time.process_time() - start
    return {
        "solver": report.solver.split(":")[0],
        "plain": plain,
        "refit": whole,
        "solves": sum(solves),
        "ratio": (whole - sum(solves)) / plain,
    }


@contextmanager
def _counting_solves() -> Iterator[list[float]]:
    """Note the seconds of each layer's solve, the search of its penalty included."""
    seconds: list[float] = []
    original = LayerProblem.solve

    def solve(problem: LayerProblem) -> Any:
        start = time.process_time()
        try:
            return original(problem)
        finally:
            seconds.append(time.process_time() - start)

    with patch.object(LayerProblem, "solve", solve):
        yield seconds


def _solve(features: int, hidden: int, dtype: torch.dtype) -> Result:
    """Time one joint solve against a product of square matrices, per floating-point operation."""
    generator = torch.Generator().manual_seed(0)
    gram = Gram(1, features, hidden, joint=True, dtype=dtype)
    rows = torch.randn(2 * features, features, generator=generator, dtype=dtype)
    gram.matrix.copy_(rows.T @ rows)
    gram.cross.copy_(torch.randn(1, features, hidden, generator=generator, dtype=dtype))
    square = gram.matrix.clone()
    operations = features**3 / 3 + 2 * features**2 * hidden
    pairs = [
        (_cpu(lambda: square @ square), _cpu(lambda: solve_joint(gram, 1e-2))) for _ in range(6)
    ]
    product, solved = (statistics.median(times) for times in zip(*pairs[1:], strict=True))
    bound = operations * product / (2 * features**3)
    ratio = statistics.median(s / (operations * p / (2 * features**3)) for p, s in pairs[1:])
    return {"solve": solved, "bound": bound, "ratio": ratio}


def _cpu(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def _memory(mode: str, budget: float) -> Result:
    plain, peak = _peak("plain", budget), _peak(mode, budget)
    return {"plain": plain, "peak": peak, "stated": _stated(mode, budget)}


def _stated(mode: str, budget: float) -> int:
    """Return the bytes that ``lit-moe inspect --refit`` says of the same refit."""
    model, batches = _model(MEMORY_SHAPE)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        found = inspect_model(folder, refit=RefitRequest(tokens, budget))
    (needs,) = (n for n in found.refit if (n.mode, n.keep_ratio) == (mode, 0.5))
    return needs.memory


def _peak(what: str, budget: float) -> int:
    """Return the peak resident bytes of a process that does only this."""
    words = [sys.executable, "-m", "tests.benchmarks.refit_numbers", what, str(budget)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def _model(shape: str) -> tuple[PreTrainedModel, Batches]:
    if shape == "embedded":
        bench = Bench("embedded")
        return bench.model, bench.calibration()
    model = calibration._model(shape, "fp32").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 1024, calibration.TOKENS, generator=generator) for _ in range(8)]
    return model, [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids]


def _half(model: PreTrainedModel) -> PreTrainedModel:
    student = sharing_copy(model)
    sites = find_sites(model)
    kept = {site.name: tuple(range(0, site.num_experts, 2)) for site in sites}
    lit_moe.shrink(student, KeepPlan(kept, count_experts(sites)))
    return student


def _only(what: str, budget: float) -> None:
    model, batches = _model(MEMORY_SHAPE)
    student = _half(model)
    if what == "plain":
        with torch.no_grad():
            for batch in batches:
                model.base_model(**batch)
        return
    options: dict[str, Any] = {"mode": what, "memory_gib": budget}
    refit(student, model, batches, RefitOptions(**options))


if __name__ == "__main__":
    torch.set_num_threads(1)
    _only(sys.argv[1], float(sys.argv[2]))
    # Not getrusage: its peak is at least what the parent held when it started this process.
    status = Path("/proc/self/status").read_text()
    print(1024 * int(status.split("VmHWM:")[1].split()[0]))
