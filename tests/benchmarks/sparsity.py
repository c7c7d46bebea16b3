"""``python -m tests.benchmarks.sparsity [PART ... | tables]``: what weight pruning costs and saves.

Perplexities are cells of ``$LIT_MOE_CACHE/bench/sparsity.jsonl``, fp32 on 32,768 held-out tokens; a
part that was stopped goes on where it was. Costs are measured anew each time.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.models import sharing_copy
from lit_moe.sparsity import SparsityOptions, observe_inputs, sparsify
from lit_moe.sparsity.layers import matrices_of, thin_layer
from lit_moe.sparsity.layout import zero_matrices
from lit_moe.sparsity.patterns import parse_pattern
from tests.benchmarks.calibration import SHAPES, TOKENS, _inputs, _model, _plain
from tests.benchmarks.models import cache_folder
from tests.benchmarks.refit_bench import BLOCK, CALIBRATION, Bench, model_names, timed
from tests.benchmarks.refit_store import Result, Store
from tests.benchmarks.refit_tables import count_seeds, families, spread
from tests.benchmarks.timing import interleaved, markdown

METHODS = ("magnitude", "wanda", "moe_pruner", "sparsegpt")
AMOUNTS = ("0.5", "2:4", "0.6", "0.7", "0.1", "0.2", "0.3", "0.4")
"""The most telling first."""
DROPPED = ("ean_sum", "reap", "obs")
"""Criteria by which half of the experts is dropped, to set beside 2:4 (MC-Suite, figure 1)."""
FEW = 2 * BLOCK
RESULTS = Path(__file__).parent / "results"
BATCHES = 1


def perplexities(store: Store) -> None:
    """Every method and amount."""
    for bench in map(_bench, model_names()):
        store.measure(bench.whole, bench.name, "whole")
    for amount in AMOUNTS:
        for bench in map(_bench, model_names()):
            for method in METHODS:
                _cell(store, bench, method, amount, CALIBRATION)


def few_tokens(store: Store) -> None:
    """Two calibration sequences in the place of 128."""
    for bench in map(_bench, model_names()):
        for method in METHODS[1:]:
            _cell(store, bench, method, "0.5", FEW)


def dense(store: Store) -> None:
    """Statistics with dense earlier layers."""
    for bench in map(_bench, model_names()):
        for method in METHODS[1:]:
            for amount in ("0.5", "2:4"):
                _cell(store, bench, method, amount, CALIBRATION, earlier="dense")


def controls(store: Store) -> None:
    """Zeros that are drawn, and half of the experts gone instead of half of the weights."""
    for bench in map(_bench, model_names()):
        store.measure(partial(_drawn, bench), bench.name, "random", amount="2:4")
        for criterion in DROPPED:
            work = partial(_half_dropped, bench, criterion)
            store.measure(work, bench.name, "dropped", criterion=criterion)


def _drawn(bench: Bench) -> Result:
    """Lose two drawn weights of every four; one draw per model."""
    student, adapter = sharing_copy(bench.model), adapter_for(bench.model.config)
    generator, pattern = torch.Generator().manual_seed(bench.seed), parse_pattern("2:4", None)
    for site in find_sites(student):
        weights = adapter.expert_weights(student, site)
        keep = {
            name: pattern.keep(torch.rand(weights[name].shape, generator=generator))
            for name in matrices_of(weights)
        }
        zero_matrices(student, adapter, site, keep)
    return bench.quality(student)


def _half_dropped(bench: Bench, criterion: str) -> Result:
    return bench.quality(bench.dropped(criterion, 0.5))


def _cell(store: Store, bench: Bench, method: str, amount: str, tokens: int, **more: Any) -> None:
    def work() -> Result:
        student = sharing_copy(bench.model)
        budget = {"pattern": amount} if ":" in amount else {"ratio": float(amount)}
        batches = bench.calibration(tokens)
        _, seconds = timed(lambda: sparsify(student, batches, method=method, **budget, **more))
        return {**bench.quality(student), "seconds": seconds}

    settings = {"method": method, "amount": amount, "tokens": tokens, **more}
    store.measure(work, bench.name, "sparse", **settings)


@lru_cache
def _bench(name: str) -> Bench:
    return Bench(name)


def statistics_cost() -> str:
    """One pass with statistics against a plain forward."""
    rows = []
    for shape in SHAPES:
        for dtype in ("fp32", "bf16"):
            model, batches = _model(shape, dtype), [_inputs()] * BATCHES
            rows.append([shape, dtype, *_statistics(model, batches)])
    tokens = BATCHES * TOKENS[0] * TOKENS[1]
    header = [
        f"hidden 512, 6 layers; {tokens:,} tokens",
        "dtype",
        "plain",
        "statistics in one pass",
        "ratio",
        "pruned layer by layer, masking included",
        "ratio",
    ]
    return markdown(header, rows)


def _statistics(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]]) -> list[str]:
    def plain() -> None:
        _plain(model, batches)

    def observe() -> None:
        observe_inputs(model, batches, method="moe_pruner")

    def walk() -> None:
        sparsify(sharing_copy(model), batches, pattern="2:4")

    plain_s, observe_s, ratio = interleaved(plain, observe, pairs=3)
    _, walk_s, walked = interleaved(plain, walk, pairs=2)
    return [
        f"{plain_s:.2f} s",
        *(f"{observe_s:.2f} s", f"{ratio:.2f}"),
        f"{walk_s:.2f} s",
        f"{walked:.2f}",
    ]


def masking_cost() -> str:
    """Scoring and masking one layer against reading and writing its weights six times."""
    rows = []
    for shape in SHAPES:
        for dtype in ("fp32", "bf16"):
            model = _model(shape, dtype)
            for budget in ({"pattern": "2:4"}, {"pattern": "4:8"}, {"ratio": 0.5}):
                options = SparsityOptions(**budget)
                rows.append([shape, dtype, str(options.parsed), *_masking(model, options)])
    header = ["one layer", "dtype", "budget", "copied 6 times", "scored and masked", "ratio"]
    return markdown(header, rows)


def _masking(model: PreTrainedModel, options: SparsityOptions) -> list[str]:
    adapter, site = adapter_for(model.config), find_sites(model)[0]
    moments = observe_inputs(model, [_inputs()], method="moe_pruner")[site.name]
    weights = adapter.expert_weights(model, site)
    matrices = [weights[name].detach() for name in matrices_of(weights)]

    def copy_six_times() -> None:
        for _ in range(6):
            for matrix in matrices:
                matrix.clone()

    def mask() -> None:
        keep = thin_layer(site.name, weights, moments, options).keep
        zero_matrices(model, adapter, site, keep)

    copy_s, mask_s, ratio = interleaved(copy_six_times, mask, pairs=5)
    return [f"{1000 * copy_s:.0f} ms", f"{1000 * mask_s:.0f} ms", f"{ratio:.2f}"]


def table(store: Store, tokens: int = CALIBRATION, **more: Any) -> str:
    """Perplexity by amount and method."""
    found = families()
    rows = [["nothing", "", *(_row(store, found, "whole"))]]
    for amount in sorted(AMOUNTS, key=lambda a: a.replace("2:4", "0.55")):
        for method in METHODS:
            settings = {"method": method, "amount": amount, "tokens": tokens, **more}
            row = _row(store, found, "sparse", **settings)
            if any(cell != "-" for cell in row):
                said = amount if ":" in amount else f"{float(amount):.0%}"
                rows.append([said, method, *row])
    if tokens == CALIBRATION and not more:
        rows.append(["2:4", "drawn at random", *_row(store, found, "random", amount="2:4")])
        for criterion in DROPPED:
            row = _row(store, found, "dropped", criterion=criterion)
            rows.append(["half of the experts", criterion, *row])
    heads = [f"{name} ({count_seeds(len(models))})" for name, models in found.items()]
    return markdown(["zeros", "method", *heads], rows)


def _row(store: Store, found: dict[str, list[str]], part: str, **settings: Any) -> list[str]:
    cells = []
    for models in found.values():
        results = [store.get(model, part, **settings) for model in models]
        values = [result["perplexity"] for result in results if result is not None]
        cells.append(spread(values, len(models), "{:.2f}"))
    return cells


def advantages(store: Store) -> str:
    """How much lower the loss of MoE-Pruner is than that of others, seeds and models together."""
    rows = []
    for amount in AMOUNTS:
        cells = []
        for other in ("wanda", "magnitude", "sparsegpt"):
            ratios = [
                mine["perplexity"] / theirs["perplexity"]
                for model in model_names()
                if (mine := _get(store, model, "moe_pruner", amount)) is not None
                and (theirs := _get(store, model, other, amount)) is not None
            ]
            won = sum(ratio < 1 for ratio in ratios)
            mean = f"{statistics.geometric_mean(ratios):.4f}" if ratios else "-"
            cells.append(f"{mean} ({won} of {len(ratios)} lower)")
        rows.append([amount, *cells])
    rows.sort(key=lambda row: row[0].replace("2:4", "0.55"))
    return markdown(["zeros", "over wanda", "over magnitude", "over sparsegpt"], rows)


def _get(store: Store, model: str, method: str, amount: str) -> Result | None:
    return store.get(model, "sparse", method=method, amount=amount, tokens=CALIBRATION)


def render(store: Store) -> dict[str, str]:
    """Write the tables of the cells that are there; return them by name."""
    tables = {
        "sparsity": table(store),
        "sparsity_few_tokens": table(store, FEW),
        "sparsity_dense": table(store, earlier="dense"),
        "sparsity_advantage": advantages(store),
    }
    RESULTS.mkdir(exist_ok=True)
    for name, text in tables.items():
        (RESULTS / f"{name}.md").write_text(text + "\n")
    return tables


def costs() -> None:
    """Measure and write both tables of costs."""
    for name, measure in (
        ("sparsity_statistics", statistics_cost),
        ("sparsity_masking", masking_cost),
    ):
        text = measure()
        (RESULTS / f"{name}.md").write_text(text + "\n")
        print(text, flush=True)


def run() -> str:
    """Measure everything that is missing; return the main table."""
    torch.set_num_threads(1)
    costs()
    store = _store()
    for part in PARTS.values():
        part(store)
    return render(store)["sparsity"]


PARTS: dict[str, Callable[[Store], None]] = {
    "perplexities": perplexities,
    "few_tokens": few_tokens,
    "dense": dense,
    "controls": controls,
}


def _store() -> Store:
    return Store(cache_folder().parent / "bench" / "sparsity.jsonl")


def main() -> None:
    """Measure the parts named, or all; ``costs`` and ``tables`` are parts too."""
    torch.set_num_threads(1)
    for name in sys.argv[1:] or ("costs", *PARTS, "tables"):
        print(f"== {name}", flush=True)
        if name == "costs":
            costs()
        elif name == "tables":
            print("\n\n".join(f"{k}\n{v}" for k, v in render(_store()).items()))
        else:
            PARTS[name](_store())


if __name__ == "__main__":
    main()
