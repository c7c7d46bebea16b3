"""What all parts of the refit's benchmark share: models, text, plans, and the refit of one cell.

All perplexities are fp32 on the same 32,768 tokens of the embedded test text, in blocks of 128. The
times are seconds of one CPU core, so that other work on the machine hardly shows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

import lit_moe
from lit_moe.adapters import find_sites
from lit_moe.data import TextDataModule
from lit_moe.data.blocks import Blocks
from lit_moe.evaluate import evaluate_perplexity
from lit_moe.models import build_model, sharing_copy
from lit_moe.plan import KeepPlan
from lit_moe.refit import RefitOptions, RefitReport, refit
from lit_moe.selection import Budget
from tests.benchmarks.models import RECIPES, SEEDS, model_folder
from tests.benchmarks.refit_store import Result

CALIBRATION, TEST, BLOCK, ROWS = 16384, 32768, 128, 32
"""Tokens for calibration, for the test, per block; blocks per batch."""

Batches = Sequence[dict[str, Tensor]]
T = TypeVar("T")


def model_names() -> list[str]:
    """Return the models that are there, the embedded one first."""
    trained = [f"{recipe}-seed{seed}" for seed in SEEDS for recipe in RECIPES]
    there = {
        f"{recipe}-seed{seed}": model_folder(recipe, seed) for seed in SEEDS for recipe in RECIPES
    }
    return ["embedded", *(name for name in trained if there[name].exists())]


@lru_cache
def text() -> TextDataModule:
    """The embedded text, with all of its calibration split, in the embedded tokenizer."""
    return TextDataModule(
        sequence_length=BLOCK,
        batch_size=ROWS,
        calibration_tokens=1 << 30,
        test_tokens=TEST,
        tokenizer="embedded",
    )


def calibration_blocks(num_tokens: int, domains: tuple[str, ...] | None = None) -> Blocks:
    """Return so many tokens, an equal share of each domain while it lasts."""
    blocks = text().blocks("calibration")
    if domains is not None:
        wanted = torch.tensor([blocks.domains.index(name) for name in domains])
        blocks = blocks.take(torch.isin(blocks.domain, wanted).nonzero().flatten())
    return blocks.spread(num_tokens // BLOCK)


class Bench:
    """One model with its plans and scores, each computed when first needed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.seed = int(name[-1]) if "-seed" in name else 0
        self._scores: dict[str, dict[str, Tensor]] = {}

    @cached_property
    def model(self) -> PreTrainedModel:
        path = self.name
        if path != "embedded":
            path = str(model_folder(path.split("-seed")[0], self.seed))
        return build_model(path, dtype="float32").requires_grad_(False)

    def calibration(self, num_tokens: int = CALIBRATION, domains: Any = None) -> Batches:
        """Return batches of the calibration text."""
        blocks = calibration_blocks(num_tokens, domains)
        return [
            {key: batch[key] for key in ("input_ids", "attention_mask")}
            for batch in DataLoader(blocks, batch_size=ROWS)
        ]

    def plan(self, criterion: str, keep: float, domains: Any = None) -> KeepPlan:
        """Return a plan from 16,384 tokens; criteria may be given as ``obs (global budget)``."""
        name = criterion.split()[0]
        key = f"{name} {domains}"
        if key not in self._scores:
            self._scores[key] = self._score(name, self.calibration(domains=domains))
        if "global" not in criterion:
            return lit_moe.select(self._scores[key], keep_ratio=keep)
        budget = Budget(keep_ratio=keep, scope="global", normalise=False)
        return lit_moe.select(self._scores[key], budget=budget, sites=find_sites(self.model))

    def dropped(self, criterion: str, keep: float, domains: Any = None) -> PreTrainedModel:
        """Return a smaller model; it shares all but its experts with the whole one."""
        student = sharing_copy(self.model)
        lit_moe.shrink(student, self.plan(criterion, keep, domains))
        return student

    def quality(self, model: PreTrainedModel) -> Result:
        """Return the perplexity over all test blocks and of each domain."""
        loader, domains = text().test_share(rank=0, world_size=1)
        measured = evaluate_perplexity(model, loader, domains)
        return {"perplexity": measured.perplexity, "domains": measured.domains}

    def whole(self) -> Result:
        return self.quality(self.model)

    def refitted(
        self, student: PreTrainedModel, batches: Batches | None = None, **options: Any
    ) -> Result:
        """Refit the student in place and return its quality, the time, and what was undone."""
        rows = self.calibration() if batches is None else batches
        report, seconds = timed(lambda: refit(student, self.model, rows, RefitOptions(**options)))
        return {**self.quality(student), "seconds": seconds, **summary(report)}

    def _score(self, name: str, batches: Batches) -> dict[str, Tensor]:
        if name == "obs":
            return lit_moe.score(self.model, name, batches=batches)
        options: dict[str, Any] = {"seed": self.seed} if name == "random" else {}
        return lit_moe.score(lit_moe.observe(self.model, batches), name, **options)


def summary(report: RefitReport) -> Result:
    """Return what the tables and a reader of the cells want to know of a report."""
    layers = report.layers.values()
    return {
        "kept": report.kept,
        "layers_left": sum(not layer.kept for layer in layers),
        "loss": [report.loss_before, report.loss_after],
        "lam": [layer.lam for layer in layers],
        "solver": report.solver.split(":")[0],
    }


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """Return what the work returns, and CPU seconds."""
    start = time.process_time()
    return work(), time.process_time() - start
