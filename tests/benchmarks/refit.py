"""``python -m tests.benchmarks.refit [PART ... | tables]``: what the closed-form refit is worth.

Cells that were measured before are read from ``$LIT_MOE_CACHE/bench/refit.jsonl``; a part that was
stopped goes on where it was.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from tests.benchmarks import (
    refit_costs,
    refit_more_tokens,
    refit_numbers,
    refit_parts,
    refit_robustness,
    refit_smollm2,
)
from tests.benchmarks.models import cache_folder
from tests.benchmarks.refit_store import Store
from tests.benchmarks.refit_tables import Tables

NEEDED = {
    "refit_sizes": "sizes",
    "refit_solvers": "solvers",
    "refit_thinned": "thinned",
    "refit_wider": "wider",
    "refit_other_domains": "other_domains",
    "refit_smollm2": "smollm2",
    "refit_passes": "passes",
    "refit_solves": "solve",
    "refit_memory": "peak",
    "refit_more_tokens": refit_more_tokens.PART,
}
"""Tables that are not written before something of this part is measured."""
VERSION = 2
RESULTS = Path(__file__).parent / "results"

PARTS: dict[str, Callable[[Store], None]] = {
    "repairs": refit_parts.repairs,
    "thinned": refit_parts.thinned,
    "other_domains": refit_parts.other_domains,
    "sizes": refit_parts.sizes,
    "more_tokens": refit_more_tokens.more_tokens,
    "solvers": refit_parts.solvers,
    "controls": refit_parts.controls,
    "cost": refit_numbers.cost,
    "smollm2": refit_smollm2.smollm2,
    "wider": refit_parts.wider,
}


def run() -> str:
    """Measure what is missing, write every table, and return the overview."""
    torch.set_num_threads(1)
    store = _store()
    for part in PARTS.values():
        part(store)
    return render(store)["refit"]


def render(store: Store) -> dict[str, str]:
    """Write the tables of the cells that are there; return them by name."""
    tables = {
        **Tables(store).all(),
        "refit_other_domains": refit_robustness.other_domains(store),
        "refit_smollm2": refit_robustness.smollm2(store),
        "refit_passes": refit_costs.passes(store),
        "refit_solves": refit_costs.solves(store),
        "refit_memory": refit_costs.memory(store),
        "refit_more_tokens": refit_more_tokens.table(store),
    }
    tables["refit"] += "\n\n" + refit_robustness.never_worse(store)
    RESULTS.mkdir(exist_ok=True)
    there = {part for _, part, _, _ in store.cells()}
    tables = {k: v for k, v in tables.items() if NEEDED.get(k, "repairs") in there}
    for name, table in tables.items():
        (RESULTS / f"{name}.md").write_text(table + "\n")
    return tables


def _store() -> Store:
    return Store(cache_folder().parent / "bench" / "refit.jsonl", version=VERSION)


def main() -> None:
    """Measure the parts named, or all; with ``tables`` only write the tables."""
    torch.set_num_threads(1)
    store = _store()
    for name in sys.argv[1:] or PARTS:
        print(f"== {name}", flush=True)
        if name == "tables":
            print("\n\n".join(f"{k}\n{v}" for k, v in render(store).items()))
        else:
            PARTS[name](store)
    if sys.argv[1:] != ["tables"]:
        render(store)


if __name__ == "__main__":
    main()
