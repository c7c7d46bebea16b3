"""Training through Trainer and MoEModule against a bare PyTorch loop of the same work."""

from __future__ import annotations

import logging
import tempfile

import lightning as L
import torch

from lit_moe.data import TextDataModule
from lit_moe.distill.losses import next_token_loss
from lit_moe.models import build_model
from lit_moe.module import MoEModule, OptimizerConfig
from tests.benchmarks.timing import interleaved, markdown

STEPS = 12


def run() -> str:
    torch.set_num_threads(2)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    data = TextDataModule(sequence_length=128, batch_size=32)
    data.blocks("train")
    bare_s, ours_s, ratio = interleaved(lambda: _bare(data), lambda: _ours(data), pairs=5)
    header = ["loop", f"{STEPS} steps of 32 x 128 tokens", "ratio"]
    rows = [
        ["bare PyTorch", f"{bare_s:.2f} s", ""],
        ["Trainer + MoEModule", f"{ours_s:.2f} s", f"{ratio:.3f}"],
    ]
    return markdown(header, rows)


def _bare(data: TextDataModule) -> None:
    model = build_model("embedded", dtype="float32").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95))
    for step, batch in enumerate(data.train_dataloader()):
        if step == STEPS:
            break
        ids, mask = batch["input_ids"], batch["attention_mask"]
        loss = next_token_loss(model(input_ids=ids, attention_mask=mask).logits, ids, mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _ours(data: TextDataModule) -> None:
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
        )
        trainer.fit(module, datamodule=data)
