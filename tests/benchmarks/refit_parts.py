"""Parts 1 to 5 of the refit's benchmark: which cells there are, and how each is measured."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

import lit_moe
from lit_moe.adapters import adapter_for, count_experts, find_sites
from lit_moe.plan import KeepPlan
from tests.benchmarks.refit_bench import Bench, model_names, timed
from tests.benchmarks.refit_store import Result, Store
from tests.benchmarks.refit_training import (
    DISTIL_RATE,
    distilled,
    tuned_for_seconds,
    tuned_on_tokens,
)

RATIOS = (0.75, 0.5, 0.25)
CRITERIA = ("reap", "obs", "obs (global budget)", "frequency", "random")
TRAINED = (
    ("reap", 0.5),
    ("reap", 0.75),
    ("reap", 0.25),
    ("obs", 0.5),
    ("obs", 0.75),
    ("obs", 0.25),
)
"""Plans that are also trained, the most telling first; others are only dropped and refitted."""
CONTROLS = ("tune_tokens", "tune_seconds", "distil", "refit_distil")
RATES = (3e-4, 1e-3)
TRIES = tuple((passes, rate) for passes in (1, 3) for rate in RATES)
WIDER = ("tune_tokens", "distil", "refit_distil")
WIDER_TRIES, WIDER_RATE = ((3, 3e-3), (10, 1e-3), (10, 3e-3)), 2e-3
PAIRS = (("code", "scripture"), ("dictionary", "manual"), ("german", "french"))
SIZES = (1024, 4096, 16384, 65536, 104192)
SIZED = (*((0.5, tokens) for tokens in SIZES), *((0.75, tokens) for tokens in SIZES[2:]))
VARIANTS: tuple[dict[str, Any], ...] = (
    *({"mode": "sequential", "solver": s} for s in ("joint", "jacobi", "gauss_seidel")),
    *({"mode": "parallel", "solver": s} for s in ("joint", "jacobi", "gauss_seidel")),
    {"mode": "sequential", "solver": "joint", "target": "block"},
    {"mode": "sequential", "solver": "joint", "token_weights": "equal"},
    {"mode": "parallel", "solver": "joint", "token_weights": "equal"},
)
THINNED = ("merge pairs", "2:4 masks", "half the active experts")


def repairs(store: Store) -> None:
    """Part 1: every criterion and ratio, dropped and refitted."""
    for bench in _benches():
        store.measure(bench.whole, bench.name, "whole")
    for criterion in CRITERIA:
        for bench in _benches():
            for keep in RATIOS:
                for repair in ("drop", "refit"):
                    _repair(store, bench, criterion, keep, repair)


def controls(store: Store) -> None:
    """Part 1, the columns that train."""
    for criterion, keep in TRAINED:
        for bench in _benches():
            for repair in CONTROLS:
                _repair(store, bench, criterion, keep, repair)


def wider(store: Store) -> None:
    """Part 1, beyond the rates and passes of the controls: were those starved?"""
    for bench in _benches():
        for what in WIDER:

            def work(b: Bench = bench, w: str = what) -> Result:
                student = b.dropped("reap", 0.5)
                if w == "tune_tokens":
                    return _best_of_tokens(b, student, WIDER_TRIES)
                if w == "refit_distil":
                    b.refitted(student)
                return _distilled(b, student, WIDER_RATE)

            store.measure(work, bench.name, "wider", repair=what)


def other_domains(store: Store) -> None:
    """Part 1, calibrated on two of six domains: plan and refit see only those."""
    for bench in _benches():
        for pair in PAIRS:
            for repair in ("drop", "refit"):
                settings = {"domains": list(pair), "repair": repair, "keep": 0.5}

                def work(b: Bench = bench, p: Any = pair, r: str = repair) -> Result:
                    student = b.dropped("reap", 0.5, p)
                    if r == "drop":
                        return b.quality(student)
                    return b.refitted(student, b.calibration(domains=p))

                store.measure(work, bench.name, "other_domains", **settings)


def sizes(store: Store) -> None:
    """Part 2: the same plan, refitted on 1 k to 100 k tokens."""
    for bench in _benches():
        for keep, tokens in SIZED:

            def work(b: Bench = bench, k: float = keep, n: int = tokens) -> Result:
                return b.refitted(b.dropped("reap", k), b.calibration(n))

            store.measure(work, bench.name, "sizes", keep=keep, tokens=tokens)


def solvers(store: Store) -> None:
    """Part 3: solvers, modes, targets and weights of tokens."""
    for bench in _benches():
        for options in VARIANTS:

            def work(b: Bench = bench, o: dict[str, Any] = options) -> Result:
                return b.refitted(b.dropped("reap", 0.5), **o)

            store.measure(work, bench.name, "solvers", **options)


def thinned(store: Store) -> None:
    """Part 4: what else than dropping can be refitted."""
    for bench in _benches():
        for what in THINNED:
            for repair in ("before", "refit"):

                def work(b: Bench = bench, w: str = what, r: str = repair) -> Result:
                    student = _thinned(b.model, w)
                    return b.quality(student) if r == "before" else b.refitted(student)

                store.measure(work, bench.name, "thinned", what=what, repair=repair)


def _benches() -> Iterator[Bench]:
    return map(_bench, model_names())


@lru_cache
def _bench(name: str) -> Bench:
    return Bench(name)


def _repair(store: Store, bench: Bench, criterion: str, keep: float, repair: str) -> None:
    refit = store.get(bench.name, "repairs", criterion=criterion, keep=keep, repair="refit")
    work: dict[str, Callable[[PreTrainedModel], Result]] = {
        "drop": bench.quality,
        "refit": bench.refitted,
        "tune_tokens": lambda student: _best_of_tokens(bench, student),
        "tune_seconds": lambda student: _best_of_seconds(bench, student, refit),
        "distil": lambda student: _distilled(bench, student),
        "refit_distil": lambda student: _refit_distilled(bench, student),
    }
    store.measure(
        lambda: work[repair](bench.dropped(criterion, keep)),
        bench.name,
        "repairs",
        criterion=criterion,
        keep=keep,
        repair=repair,
    )


def _best_of_tokens(
    bench: Bench, student: PreTrainedModel, tries: Sequence[tuple[int, float]] = TRIES
) -> Result:
    tried = []
    for passes, rate in tries:
        model, seconds = timed(partial(tuned_on_tokens, student, passes=passes, rate=rate))
        settings = {"passes": passes, "rate": rate, "seconds": seconds}
        tried.append({**bench.quality(model), **settings})
    return _best(tried)


def _best_of_seconds(bench: Bench, student: PreTrainedModel, refit: Result | None) -> Result:
    assert refit is not None, "measure the refit first, its time is needed"
    seconds, tried = refit["seconds"], []
    for rate in RATES:
        model = tuned_for_seconds(student, seconds=seconds, rate=rate)
        tried.append({**bench.quality(model), "rate": rate, "seconds": seconds})
    return _best(tried)


def _best(tried: list[Result]) -> Result:
    """Return the best by the test text itself, which is generous, with all that were tried."""
    best = min(tried, key=lambda result: result["perplexity"])
    others = [{k: v for k, v in result.items() if k != "domains"} for result in tried]
    return {**best, "tried": others}


def _distilled(bench: Bench, student: PreTrainedModel, rate: float = DISTIL_RATE) -> Result:
    model, seconds = timed(lambda: distilled(student, bench.model, rate))
    return {**bench.quality(model), "seconds": seconds}


def _refit_distilled(bench: Bench, student: PreTrainedModel) -> Result:
    lit_moe.refit(student, bench.model, bench.calibration())
    return _distilled(bench, student)


def _thinned(model: PreTrainedModel, what: str) -> PreTrainedModel:
    student = copy.deepcopy(model)
    if what == "merge pairs":
        return _with_merged_pairs(student)
    if what == "2:4 masks":
        return _with_two_of_four(student)
    adapter_for(student.config).set_top_k(student, find_sites(student)[0].top_k // 2)
    return student


def _with_merged_pairs(student: PreTrainedModel) -> PreTrainedModel:
    """Average, in place, the experts and router rows of pairs with the most similar rows."""
    adapter, kept = adapter_for(student.config), {}
    sites = find_sites(student)
    for site in sites:
        router_EH = adapter.router_weight(student, site)
        pairs = nearest_pairs(router_EH)
        kept[site.name] = tuple(sorted(first for first, _ in pairs))
        merged = {}
        for name, tensor in adapter.expert_weights(student, site).items():
            merged[name] = tensor.clone()
            for first, second in pairs:
                merged[name][first] = (tensor[first] + tensor[second]) / 2
        adapter.set_expert_weights_(student, site, merged)
        for first, second in pairs:
            router_EH[first] = (router_EH[first] + router_EH[second]) / 2
    lit_moe.shrink(student, KeepPlan(kept, count_experts(sites)))
    return student


def nearest_pairs(rows_EH: Tensor) -> list[tuple[int, int]]:
    """Return disjoint pairs, greedily those with the largest cosine first."""
    unit = F.normalize(rows_EH.float(), dim=1)
    cosine = (unit @ unit.T).fill_diagonal_(-torch.inf)
    pairs = []
    for _ in range(len(rows_EH) // 2):
        first, second = divmod(int(cosine.argmax()), len(rows_EH))
        pairs.append((min(first, second), max(first, second)))
        cosine[[first, second]] = -torch.inf
        cosine[:, [first, second]] = -torch.inf
    return pairs


def _with_two_of_four(student: PreTrainedModel) -> PreTrainedModel:
    """Zero, in place, the two smallest of each four neighbouring inputs of down projections."""
    adapter = adapter_for(student.config)
    for site in find_sites(student):
        down_EHI = adapter.expert_weights(student, site)["down"].clone()
        rank = down_EHI.unflatten(2, (-1, 4)).abs().argsort(dim=3).argsort(dim=3)
        down_EHI *= (rank >= 2).flatten(2)
        adapter.set_expert_weights_(student, site, {"down": down_EHI})
    return student
