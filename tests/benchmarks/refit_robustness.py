"""Tables of where a refit hurts, and of what it does to a model that was not trained here."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from tests.benchmarks.refit_parts import PAIRS
from tests.benchmarks.refit_smollm2 import NAME, PLANS
from tests.benchmarks.refit_store import Result, Store
from tests.benchmarks.refit_tables import count_seeds, families, spread
from tests.benchmarks.timing import markdown


def other_domains(store: Store) -> str:
    """Perplexity in domains that the calibration saw and in those it did not."""
    rows: list[list[str]] = []
    ratios: list[float] = []
    for family, models in families().items():
        row = [f"{family} ({count_seeds(len({m for m, *_ in _runs(store, models)}))})"]
        mine: list[float] = []
        for seen in (True, False):
            runs = list(_runs(store, models, seen=seen))
            before = [_mean(dropped, domains) for _, dropped, _, domains in runs]
            after = [_mean(refit, domains) for _, _, refit, domains in runs]
            row += [spread(means, len(means)) for means in (before, after)]
            mine = [new["domains"][d] / old["domains"][d] for _, old, new, ds in runs for d in ds]
            row.append(f"{sum(ratio > 1 for ratio in mine)} of {len(mine)}")
        rows.append(row)
        ratios += mine
    columns = ("dropped", "+ refit", "worse")
    header = ["50% kept", *(f"{what}: {c}" for what in ("seen", "unseen") for c in columns)]
    worst = (
        f"The worst unseen domain became {max(ratios):.2f} times its perplexity." if ratios else ""
    )
    return f"{markdown(header, rows)}\n\n{worst}".rstrip()


def _runs(
    store: Store, models: Sequence[str], *, seen: bool = True
) -> Iterator[tuple[str, Result, Result, list[str]]]:
    """Yield model, dropped, refitted, and the domains asked for, per pair of domains seen."""
    for model in models:
        for pair in PAIRS:
            settings: dict[str, Any] = {"domains": list(pair), "keep": 0.5}
            dropped = store.get(model, "other_domains", **settings, repair="drop")
            refit = store.get(model, "other_domains", **settings, repair="refit")
            if dropped is not None and refit is not None:
                yield model, dropped, refit, [d for d in dropped["domains"] if (d in pair) == seen]


def _mean(result: Result, domains: Sequence[str]) -> float:
    """Return the geometric mean of the perplexities of some domains."""
    return math.exp(sum(math.log(result["domains"][d]) for d in domains) / len(domains))


def smollm2(store: Store) -> str:
    """The split of SmolLM2: text and the capitals of countries."""
    cells: list[tuple[str, str, dict[str, Any]]] = [("dense", "", {"keep": "dense"})]
    for keep in (1.0, 0.75, 0.5):
        before = {"keep": keep, "teacher": None}
        cells.append((f"{keep:.0%}", "before", before))
        cells += [
            (
                f"{keep:.0%}",
                f"refit towards the {teacher} model, {tokens:,} tokens",
                {"keep": keep, "teacher": teacher, "tokens": tokens},
            )
            for one, teacher, tokens in PLANS
            if one == keep
        ]
    rows = []
    for kept, what, settings in cells:
        cell = store.get(NAME, "smollm2", **settings)
        if cell is not None:
            capitals = f"{cell['capitals']:.1%} +- {cell['capitals_stderr']:.1%}"
            left = f"{cell['layers_left']} of {len(cell['lam'])}" if "lam" in cell else ""
            seconds = f"{cell['seconds']:.0f}" if "seconds" in cell else ""
            rows.append([kept, what, f"{cell['perplexity']:.1f}", capitals, left, seconds])
    header = ["experts kept", "", "perplexity", "capitals", "layers left as they were", "seconds"]
    return markdown(header, rows)


def never_worse(store: Store) -> str:
    """Count, over everything measured in-domain, the cells where the refit raised perplexity."""
    pairs = list(_in_domain(store))
    worse = [(before, after, name) for before, after, name in pairs if after > before]
    said = (
        f"The refit raised the perplexity in {len(worse)} of {len(pairs)} cells measured in-domain"
    )
    if not worse:
        return f"{said}."
    return f"{said}: " + ", ".join(f"{name} {b:.1f} to {a:.1f}" for b, a, name in worse) + "."


def _in_domain(store: Store) -> Iterator[tuple[float, float, str]]:
    for model, part, settings, result in store.cells():
        if settings.get("repair") == "refit" and part in ("repairs", "thinned"):
            other = "drop" if part == "repairs" else "before"
            before = store.get(model, part, **{**settings, "repair": other})
        elif part in ("sizes", "solvers"):
            plan = {"criterion": "reap", "keep": settings.get("keep", 0.5), "repair": "drop"}
            before = store.get(model, "repairs", **plan)
        else:
            continue
        if before is not None:
            yield before["perplexity"], result["perplexity"], f"{model} {part} {settings}"
