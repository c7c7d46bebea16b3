"""The controls of the refit: gradient descent on the same tokens, in the same time, and after it.

The recipe is the quickstart's: AdamW, a short warm-up, cosine to 0, gradients clipped at 1. All
parameters are trained.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, WeightedRandomSampler
from transformers import PreTrainedModel

from lit_moe.distill.losses import logits_distillation_loss, next_token_loss
from tests.benchmarks.refit_bench import CALIBRATION, calibration_blocks, text

STEP_ROWS = 8
"""Blocks per step: 1,024 tokens."""
DISTIL_STEPS, DISTIL_RATE = 60, 1e-3
WARMUP = 0.1
"""Fraction of the run over which the learning rate rises."""

Batch = dict[str, Tensor]
Progress = Callable[[int], float]


def tuned_on_tokens(student: PreTrainedModel, *, passes: int, rate: float) -> PreTrainedModel:
    """Return a copy that saw the calibration tokens so many times."""
    blocks = calibration_blocks(CALIBRATION)
    steps = passes * len(blocks) // STEP_ROWS
    loader = DataLoader(blocks, batch_size=STEP_ROWS, shuffle=True, generator=_generator())
    rows = (batch for _ in range(passes) for batch in loader)
    return _trained(student, rows, lambda step: step / steps, rate)


def tuned_for_seconds(student: PreTrainedModel, *, seconds: float, rate: float) -> PreTrainedModel:
    """Return a copy trained for so many CPU seconds on training text that it never sees twice."""
    rows = _training_rows()  # tokenized beforehand, which is not counted
    start = time.process_time()
    return _trained(student, rows, lambda _: (time.process_time() - start) / seconds, rate)


def distilled(student: PreTrainedModel, teacher: PreTrainedModel, rate: float) -> PreTrainedModel:
    """Return a copy after a short recovery: half next tokens, half the teacher's distribution."""
    return _trained(student, _training_rows(), lambda step: step / DISTIL_STEPS, rate, teacher)


def _trained(
    student: PreTrainedModel,
    rows: Iterable[Batch],
    progress: Progress,
    rate: float,
    teacher: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """Train until ``progress(steps done)`` reaches 1 or the rows end."""
    model = copy.deepcopy(student).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    for step, batch in enumerate(rows):
        done = progress(step)
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = rate * _schedule(done)
        _loss(model, teacher, batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def _schedule(done: float) -> float:
    # Measured at the start of a step: the small addition keeps the first one from being lost.
    rise = min((done + 0.01) / WARMUP, 1.0)
    return rise * 0.5 * (1 + math.cos(math.pi * done))


def _loss(model: PreTrainedModel, teacher: PreTrainedModel | None, batch: Batch) -> Tensor:
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits = model(input_ids=ids, attention_mask=mask).logits
    loss = next_token_loss(logits, ids, mask)
    if teacher is None:
        return loss
    with torch.no_grad():
        wanted = teacher(input_ids=ids, attention_mask=mask).logits
    return 0.5 * loss + 0.5 * logits_distillation_loss(logits, wanted, mask, temperature=1.0)


def _training_rows() -> Iterator[Batch]:
    """Return endless batches of training text, each domain equally often."""
    blocks = text().blocks("train")
    weights = (1.0 / torch.bincount(blocks.domain).double()[blocks.domain]).tolist()
    sampler = WeightedRandomSampler(weights, len(blocks), generator=_generator())
    return iter(DataLoader(blocks, batch_size=STEP_ROWS, sampler=sampler))


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
