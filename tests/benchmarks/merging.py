"""Merging against dropping, before and after the closed-form refit; resumable cell by cell.

``python -m tests.benchmarks merging`` goes through all models that are there, also upcycled ones
(``python -m tests.benchmarks.upcycling``); ``python -m tests.benchmarks.merging MODEL ...``
measures only these. Text, tokens and clocks are those of the refit's benchmark.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import product
from statistics import mean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import lit_moe
from lit_moe.adapters import adapter_for, find_sites
from lit_moe.grouping import LearnOptions, MergeOptions, SegmentOptions, apply, decide
from lit_moe.models import sharing_copy
from lit_moe.stats.matrices import cosines, gram_of_experts
from tests.benchmarks.models import SEEDS, cache_folder, model_folder
from tests.benchmarks.refit_bench import Bench, model_names, timed
from tests.benchmarks.refit_store import Result, Store
from tests.benchmarks.upcycling import UPCYCLED

STORE = cache_folder().parent / "bench" / "merging.jsonl"
RATIOS = (0.75, 0.5)
RECIPES: dict[str, dict[str, Any]] = {
    "cka": {},
    "surrogate": {"similarity": "surrogate"},
    "weights": {"similarity": "weights"},
    "hc_smoe": {
        "similarity": "mean_output",
        "partition": "average",
        "coefficients": "frequency",
    },
    "m_smoe": {
        "similarity": "router",
        "partition": "centroids",
        "coefficients": "frequency",
        "align": True,
    },
    "ream": {
        "similarity": "ream",
        "partition": "centroids",
        "coefficients": "reap",
        "align": True,
    },
    "dern": {"segments": SegmentOptions(tau=0.6)},
}
FAST, SLOW = ("frequency", "reap"), "naee"
DROPPING = (*FAST, SLOW)
ABLATIONS: dict[str, dict[str, Any]] = {
    "cka, most visited only": {"coefficients": "max_visited"},
    "cka, by frequency": {"coefficients": "frequency"},
    "cka, learned": {"coefficients": "learned"},
    "cka, learned on 512 tokens": {"coefficients": "learned", "max_tokens": 512},
    "cka, learned on 512 tokens and mixtures": {
        "coefficients": "learned",
        "max_tokens": 512,
        "learn": LearnOptions(mixed_rows=4),
    },
    "cka, aligned": {"align": True},
    "cka, aligned by activations": {"align": "activations"},
    "cka, router rows of one member": {"router": "keep"},
    "surrogate, router rows of one member": {"similarity": "surrogate", "router": "keep"},
    "hc_smoe, router rows of one member": {**RECIPES["hc_smoe"], "router": "keep"},
    "hc_smoe, aligned": {**RECIPES["hc_smoe"], "align": True},
    "hc_smoe, aligned by activations": {**RECIPES["hc_smoe"], "align": "activations"},
    "m_smoe, aligned by activations": {**RECIPES["m_smoe"], "align": "activations"},
    "m_smoe, not aligned": {**RECIPES["m_smoe"], "align": False},
    "ream, not aligned": {**RECIPES["ream"], "align": False},
    "ream, router rows of one member": {**RECIPES["ream"], "router": "keep"},
    **{f"dern, tau {t:g}": {"segments": SegmentOptions(tau=t)} for t in (0.0, 0.2, 0.4, 0.8)},
    "dern, nothing handed on": {"segments": SegmentOptions(tau=1.0)},
    "dern, router rows kept": {**RECIPES["dern"], "router": "keep"},
}


def run() -> str:
    measure(names())
    return "\n\n".join((table(), ablations(), likeness()))


def names() -> list[str]:
    """Return the models that are there, upcycled ones last."""
    upcycled = [f"{UPCYCLED}-seed{seed}" for seed in SEEDS if model_folder(UPCYCLED, seed).exists()]
    return [*model_names(), *upcycled]


def measure(models: Iterable[str]) -> None:
    """Fill the store, what tells most first; cells that are there are not measured again."""
    store, benches = Store(STORE), [Bench(name) for name in models]
    for bench in benches:
        store.measure(bench.whole, bench.name, "whole")
        store.measure(partial(_likeness, bench), bench.name, "likeness")
    for repair, keep in product(("plain", "refit"), RATIOS):
        for bench, recipe in product(benches, (*FAST, *RECIPES)):
            cell(store, bench, recipe, keep, repair)
    for keep, bench, recipe in product(RATIOS, benches, ABLATIONS):
        cell(store, bench, recipe, keep, "plain")
    for bench, keep, repair in product(benches, RATIOS, ("plain", "refit")):
        cell(store, bench, SLOW, keep, repair)


def cell(store: Store, bench: Bench, recipe: str, keep: float, repair: str) -> None:
    def work() -> Result:
        (student, facts), seconds = timed(lambda: smaller(bench, recipe, keep))
        if repair == "refit":
            return {**facts, **bench.refitted(student)}
        return {**facts, **bench.quality(student), "seconds": seconds}

    store.measure(work, bench.name, "merging", recipe=recipe, keep=keep, repair=repair)


def smaller(bench: Bench, recipe: str, keep: float) -> tuple[PreTrainedModel, Result]:
    """Return a model with fewer experts, and how large its groups are."""
    if recipe == SLOW:
        return _by_naee(bench, keep), {}
    if recipe in DROPPING:
        return bench.dropped(recipe, keep), {}
    student = sharing_copy(bench.model)
    counts = {s.name: round(s.num_experts * keep) for s in find_sites(student)}
    options = MergeOptions(**{**RECIPES, **ABLATIONS}[recipe])
    decision = decide(student, counts, bench.calibration(), options)
    apply(student, decision)
    sizes = {k: [len(g) for g in decision.plan.members(k)] for k in decision.plan}
    return student, {"groups": sizes}


def table() -> str:
    """Return perplexities by recipe and ratio, a column per kind of model."""
    store, kinds = Store(STORE, measures=False), _kinds()
    lines = [
        f"| kept | recipe |  | {' | '.join(kinds)} |",
        "| --- | --- | --- |" + " --- |" * len(kinds),
        f"| 100% | whole |  | {' | '.join(_shown(store, k, 'whole') for k in kinds)} |",
    ]
    for keep in RATIOS:
        for recipe in (*DROPPING, *RECIPES):
            for repair in ("plain", "refit"):
                label = f"drop by {recipe}" if recipe in DROPPING else f"merge: {recipe}"
                settings = {"recipe": recipe, "keep": keep, "repair": repair}
                values = [_shown(store, kind, "merging", **settings) for kind in kinds]
                after = "+ refit" if repair == "refit" else ""
                lines.append(f"| {keep:.0%} | {label} | {after} | {' | '.join(values)} |")
    return "\n".join(lines)


def ablations() -> str:
    """Return what one change of a recipe does, without a refit."""
    store, kinds = Store(STORE, measures=False), _kinds()
    lines = [f"| kept | recipe | {' | '.join(kinds)} |", "| --- | --- |" + " --- |" * len(kinds)]
    for keep in RATIOS:
        for recipe in sorted([*RECIPES, *ABLATIONS]):
            settings = {"recipe": recipe, "keep": keep, "repair": "plain"}
            values = [_shown(store, kind, "merging", **settings) for kind in kinds]
            lines.append(f"| {keep:.0%} | {recipe} | {' | '.join(values)} |")
    return "\n".join(lines)


def likeness() -> str:
    """Return how alike the experts of each kind of model are: mean over pairs and layers."""
    store, kinds = Store(STORE, measures=False), _kinds()
    lines = [f"| similarity | {' | '.join(kinds)} |", "| --- |" + " --- |" * len(kinds)]
    for field in ("cka", "output_cosine", "weight_cosine"):
        found = [list(_values(store, kind, "likeness", field)) for kind in kinds]
        shown = [f"{mean(values):.3f}" if values else "-" for values in found]
        lines.append(f"| {field} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _likeness(bench: Bench) -> Result:
    """Return means over pairs of experts and layers, each in [-1, 1]."""
    sites = find_sites(bench.model)
    counts = {site.name: site.top_k for site in sites}
    found: dict[str, list[float]] = {"cka": [], "output_cosine": [], "weight_cosine": []}
    for name in ("cka", "output_cosine"):
        options = MergeOptions(similarity=name, effort=None)
        decision = decide(bench.model, counts, bench.calibration(), options)
        found[name] = [_mean_of_pairs(pairs_EE) for pairs_EE in decision.similarity.values()]
    adapter = adapter_for(bench.model.config)
    for site in sites:
        gram_EE = gram_of_experts(adapter.expert_weights(bench.model, site))
        found["weight_cosine"].append(_mean_of_pairs(cosines(gram_EE)))
    return {name: mean(values) for name, values in found.items()}


def _mean_of_pairs(pairs_EE: Tensor) -> float:
    return float(pairs_EE[~torch.eye(len(pairs_EE), dtype=torch.bool)].mean())


def _kinds() -> list[str]:
    return list(dict.fromkeys(name.split("-seed")[0] for name in names()))


def _shown(store: Store, kind: str, part: str, **settings: Any) -> str:
    """Return the mean over seeds with the range, and how many they are unless three."""
    values = list(_values(store, kind, part, **settings))
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.1f}" + ("" if kind == "embedded" else " (1 seed)")
    few = "" if len(values) == 3 else f" ({len(values)} seeds)"
    return f"{mean(values):.1f} [{min(values):.1f}, {max(values):.1f}]{few}"


def _values(
    store: Store, kind: str, part: str, field: str = "perplexity", **settings: Any
) -> Iterator[float]:
    for name in names():
        found = store.get(name, part, **settings)
        if found is not None and name.split("-seed")[0] == kind:
            yield found[field]


def _by_naee(bench: Bench, keep: float) -> PreTrainedModel:
    student = sharing_copy(bench.model)
    counts = {s.name: round(s.num_experts * keep) for s in find_sites(student)}
    scores = lit_moe.score(bench.model, "naee", keep=counts, batches=bench.calibration())
    lit_moe.shrink(student, lit_moe.select(scores, keep_ratio=keep))
    return student


if __name__ == "__main__":
    measure(sys.argv[1:] or names())
    print(table(), ablations(), likeness(), sep="\n\n")
