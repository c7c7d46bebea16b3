"""``python -m tests.benchmarks.recovery [tables]``: what brings a thinned model back, and how far.

Every cell is a run of ``configs/moe_pruner/distill.yaml`` (expert-wise distillation) or of
``finetune_control.yaml`` (the text alone), as a user would start it: 2:4 zeros by MoE-Pruner, then
the same steps on the same batches. Cells lie in ``$LIT_MOE_CACHE/bench/recovery.jsonl``; a run that
was stopped goes on with the next cell.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path

from tests.benchmarks.models import ROOT, SEEDS, cache_folder, model_folder
from tests.benchmarks.refit_store import Result, Store
from tests.benchmarks.timing import markdown

RECIPES = {"finetune_control": "next token alone", "distill": "with expert-wise distillation"}
FAMILIES = ("embedded", "mixtral_8x2", "olmoe_16x4")
RATES = (1e-3, 3e-4)
STEPS, BLOCKS = 60, 16
"""Of 128 tokens: 123 k tokens."""
TABLE = Path(__file__).parent / "results" / "recovery.md"


def main() -> None:
    """Run what is missing, then write the table; ``tables`` only writes."""
    store = Store(cache_folder().parent / "bench" / "recovery.jsonl")
    store.measures = sys.argv[1:] != ["tables"]
    for rate, seed, family in product(RATES, SEEDS, FAMILIES):
        for recipe in RECIPES:
            work = partial(recovered, recipe, family, seed, rate)
            store.measure(work, family, recipe, seed=seed, rate=rate)
    TABLE.write_text(table(store) + "\n")
    print(TABLE.read_text())


def recovered(recipe: str, family: str, seed: int, rate: float) -> Result:
    """Run one config; return perplexities of the whole, the thinned and the recovered model.

    The embedded model is one; its seeds draw the order of the training text.
    """
    model = family if family == "embedded" else str(model_folder(family, seed))
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "seed_everything": seed,
            "model.init_args.model_name_or_path": model,
            "model.init_args.optimizer.learning_rate": rate,
            "data.init_args.batch_size": BLOCKS,
            "data.init_args.seed": seed if model == family else 0,
            "trainer.max_steps": STEPS,
            "trainer.default_root_dir": folder,
        }
        config = ROOT / "configs" / "moe_pruner" / f"{recipe}.yaml"
        words = [f"--{name}={value}" for name, value in settings.items()]
        command = [sys.executable, "-m", "lit_moe", "fit", "--config", str(config), *words]
        subprocess.run(command, check=True, capture_output=True, text=True)
        report = next(Path(folder).rglob("lightning_logs/version_0/report.json"))
        quality = json.loads(report.read_text())["quality"]
    return {stage: quality[stage]["perplexity"] for stage in ("before", "pruned", "recovered")}


def table(store: Store) -> str:
    """Mean over seeds, smallest and largest in brackets."""
    rows = []
    for family, rate in product(FAMILIES, RATES):
        found = [_both(store, family, seed, rate) for seed in SEEDS]
        pairs = [pair for pair in found if pair is not None]
        if pairs:
            rows.append([family, f"{rate:g}", str(len(pairs)), *_cells(pairs)])
    heads = ["whole", "2:4", *RECIPES.values(), "distilled is lower in", "gap closed by each"]
    return markdown(["model", "learning rate", "seeds", *heads], rows)


def _both(store: Store, family: str, seed: int, rate: float) -> tuple[Result, Result] | None:
    tuned, distilled = (store.get(family, r, seed=seed, rate=rate) for r in RECIPES)
    return None if tuned is None or distilled is None else (tuned, distilled)


def _cells(pairs: list[tuple[Result, Result]]) -> list[str]:
    tuned, distilled = ([pair[i] for pair in pairs] for i in (0, 1))
    lower = sum(d["recovered"] < t["recovered"] for t, d in pairs)
    closed = " / ".join(f"{statistics.mean(map(_closed, one)):.0%}" for one in (tuned, distilled))
    return [
        _spread([r["before"] for r in tuned]),
        _spread([r["pruned"] for r in tuned]),
        _spread([r["recovered"] for r in tuned]),
        _spread([r["recovered"] for r in distilled]),
        f"{lower} of {len(pairs)}",
        closed,
    ]


def _closed(result: Result) -> float:
    gap = float(result["pruned"]) - float(result["before"])
    return (float(result["pruned"]) - float(result["recovered"])) / gap


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


if __name__ == "__main__":
    main()
