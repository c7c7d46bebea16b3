"""Held-out perplexity of the embedded model by experts kept: good, random and worst choices."""

from __future__ import annotations

import copy
import statistics
from pathlib import Path

import matplotlib as mpl
import torch
from torch import Tensor
from transformers import PreTrainedModel

import lit_moe
from lit_moe.data import TextDataModule
from lit_moe.evaluate import evaluate_perplexity
from lit_moe.models import build_model
from tests.benchmarks.timing import markdown

RATIOS = (0.75, 0.5, 0.25)
CRITERIA = (
    "reap",
    "weighted_ean_sum",
    "ean_sum",
    "frequency",
    "soft_count",
    "msan",
    "aimer",
    "naee",
)
SEEDS = range(5)
FIGURE = Path(__file__).parent / "results" / "pruning_curves.png"


def run() -> str:
    torch.set_num_threads(2)
    model = build_model("embedded", dtype="float32")
    data = TextDataModule(sequence_length=128, batch_size=32, calibration_tokens=16384)
    batches = list(data.calibration_dataloader())
    stats = lit_moe.observe(model, batches)
    base = _perplexity(model, data)
    rows: dict[str, list[float]] = {}
    spread: dict[str, list[tuple[float, float]]] = {}
    for name in CRITERIA:
        rows[name] = [
            _pruned(model, data, _scores(name, stats, model, batches, r), r) for r in RATIOS
        ]
    reverse = {k: -v for k, v in lit_moe.score(stats, "weighted_ean_sum").items()}
    rows["worst (weighted_ean_sum reversed)"] = [_pruned(model, data, reverse, r) for r in RATIOS]
    draws = [
        [_pruned(model, data, lit_moe.score(stats, "random", seed=s), r) for s in SEEDS]
        for r in RATIOS
    ]
    rows["random (mean of 5)"] = [statistics.mean(d) for d in draws]
    spread["random (mean of 5)"] = [(min(d), max(d)) for d in draws]
    _draw(base, rows, draws)
    table = [[name, *(f"{v:.1f}" for v in values)] for name, values in rows.items()]
    for row in table:
        if row[0] in spread:
            row[1:] = [
                f"{v} [{low:.0f}, {high:.0f}]"
                for v, (low, high) in zip(row[1:], spread[row[0]], strict=True)
            ]
    header = [f"perplexity (unpruned {base:.2f})", *(f"keep {r:.0%}" for r in RATIOS)]
    return markdown(header, table)


def _scores(name, stats, model, batches, ratio: float) -> dict[str, Tensor]:
    if name in ("aimer", "weight_norm", "router_norm"):
        return lit_moe.score(model, name)
    if name == "naee":
        inputs = [{k: b[k] for k in ("input_ids", "attention_mask")} for b in batches[:1]]
        keep = round(ratio * 16)
        return lit_moe.score(stats, name, model=model, batches=inputs, keep=keep)
    return lit_moe.score(stats, name)


def _pruned(model: PreTrainedModel, data: TextDataModule, scores, ratio: float) -> float:
    smaller = copy.deepcopy(model)
    lit_moe.shrink(smaller, lit_moe.select(scores, keep_ratio=ratio))
    return _perplexity(smaller, data)


def _perplexity(model: PreTrainedModel, data: TextDataModule) -> float:
    loader, domains = data.test_share(rank=0, world_size=2)
    return evaluate_perplexity(model, loader, domains).perplexity


def _draw(base: float, rows: dict[str, list[float]], draws: list[list[float]]) -> None:
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    x = [100, *(100 * r for r in RATIOS)]
    figure, axes = plt.subplots(figsize=(6, 3.6), constrained_layout=True)
    for name, label, colour in (
        ("weighted_ean_sum", "good criterion (gate-weighted activation norm)", "#2a6f97"),
        ("random (mean of 5)", "random choice, 5 seeds (band: min to max)", "#6b7280"),
        ("worst (weighted_ean_sum reversed)", "worst choice (criterion reversed)", "#c0583f"),
    ):
        axes.plot(x, [base, *rows[name]], marker="o", label=label, color=colour)
    low, high = ([base, *(f(d) for d in draws)] for f in (min, max))
    axes.fill_between(x, low, high, color="#6b7280", alpha=0.15, linewidth=0)
    axes.set(xlabel="experts kept per layer (%)", ylabel="held-out perplexity", yscale="log")
    axes.set_xticks(x)
    axes.invert_xaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    FIGURE.parent.mkdir(exist_ok=True)
    figure.savefig(FIGURE, dpi=150)
    plt.close(figure)
