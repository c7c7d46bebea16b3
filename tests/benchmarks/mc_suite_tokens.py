"""``python -m tests.benchmarks.mc_suite_tokens``: how far a lottery gets on how many tokens.

A quarter of the experts kept in six rounds, as ``configs/mc_suite/compare.yaml`` has it, with twice
the fine-tuning from row to row (claim of MC-Suite, arXiv 2504.05586, table 4: about 1 M tokens
saturate). Finished cells are kept, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from lit_moe.callbacks.rounds import FineTuning
from lit_moe.compare.options import CompareOptions, TextOptions
from lit_moe.compare.run import compare
from lit_moe.optimization import OptimizerConfig
from tests.benchmarks.models import SEEDS, cache_folder, model_folder
from tests.benchmarks.timing import markdown

RESULTS = Path(__file__).parent / "results"
FIRST = (1024, 2048, 4096, 8192, 16384, 32768)
"""Tokens after the first of six rounds; 22 times as many in all."""
KEEP, CRITERION = 0.25, "ege"


def options(first: int, models: list[str], seeds: list[int]) -> CompareOptions:
    """Return the lottery of one row; several models of a recipe count like seeds."""
    folder = f"compare_tokens_{Path(models[0]).name}"
    return CompareOptions(
        models=models,
        criteria=[CRITERION],
        keep_ratios=[KEEP],
        procedures=["lottery"],
        seeds=seeds,
        random_draws=0,
        rounds=6,
        fine_tuning=FineTuning(first=first, growth=1.5, when_data_ends="repeat"),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=2, schedule="cosine"),
        text=TextOptions(calibration_tokens=8192, evaluation_tokens=16384),
        output=str(cache_folder().parent / "bench" / folder / str(first)),
        figures=False,
    )


def table(kinds: dict[str, tuple[list[str], list[int]]]) -> str:
    """Return total tokens x models: perplexity, mean (deviation) over seeds."""
    rows = []
    for first in FIRST:
        cells, tokens = [], 0.0
        for models, seeds in kinds.values():
            (row,) = compare(options(first, models, seeds)).summary.rows
            tokens = row.tokens[KEEP]
            cells.append(row.perplexity[KEEP].text)
        rows.append([f"{tokens:,.0f}", *cells])
        print(*rows[-1], flush=True)
    return markdown(["tokens in six rounds", *kinds], rows)


def main() -> None:
    """Measure what is missing of the models named, or of all, and write the table."""
    torch.set_num_threads(1)
    kinds: dict[str, tuple[list[str], list[int]]] = {"embedded": (["embedded"], [0, 1, 2])}
    for recipe in ("mixtral_8x2", "olmoe_16x4"):
        folders = [str(model_folder(recipe, seed)) for seed in SEEDS]
        kinds[recipe] = (folders, [0])
    kinds = {name: kind for name, kind in kinds.items() if name in (sys.argv[1:] or kinds)}
    text = table(kinds)
    print(text)
    (RESULTS / "mc_suite_tokens.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
