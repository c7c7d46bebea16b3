"""One training step through Trainer and MoEModule against a bare PyTorch loop of the same work."""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings
from itertools import pairwise

import lightning as L
import torch

from lit_moe.data import TextDataModule
from lit_moe.distill.losses import next_token_loss
from lit_moe.models import build_model
from lit_moe.module import MoEModule, OptimizerConfig
from tests.benchmarks.timing import markdown

STEPS, PAIRS = 6, 5


class StepClock(L.Callback):
    """Notes when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: object) -> None:
        self.ends.append(time.perf_counter())


def run() -> str:
    torch.set_num_threads(2)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    data = TextDataModule(sequence_length=128, batch_size=16)
    data.blocks("train")
    rows = []
    for turn in range(PAIRS):
        order = (_bare, _ours) if turn % 2 == 0 else (_ours, _bare)
        seconds = {work: _median_step(work(data)) for work in order}
        rows.append((seconds[_bare], seconds[_ours]))
    bare, ours = (statistics.median(column) for column in zip(*rows, strict=True))
    ratio = statistics.median(b / a for a, b in rows)
    return markdown(
        ["one step of 16 x 128 tokens", "seconds", "ratio"],
        [
            ["bare PyTorch loop", f"{bare:.3f}", ""],
            ["Trainer + MoEModule", f"{ours:.3f}", f"{ratio:.3f}"],
        ],
    )


def _median_step(ends: list[float]) -> float:
    """Median time of a step, the first one left out."""
    return statistics.median(b - a for a, b in pairwise(ends))


def _bare(data: TextDataModule) -> list[float]:
    model = build_model("embedded", dtype="float32").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95))
    ends = []
    for _, batch in zip(range(STEPS), data.train_dataloader(), strict=False):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        loss = next_token_loss(model(input_ids=ids, attention_mask=mask).logits, ids, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ends.append(time.perf_counter())
    return ends


def _ours(data: TextDataModule) -> list[float]:
    clock = StepClock()
    module = MoEModule("embedded", optimizer=OptimizerConfig(schedule="constant"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=STEPS,
            limit_val_batches=0,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
            default_root_dir=folder,
            callbacks=[clock],
        )
        trainer.fit(module, datamodule=data)
    return clock.ends
