"""One expert-wise distillation step against both forwards and the backward run bare.

The student is the embedded or a trained benchmark model with 2:4 zeros, so that it routes some
tokens to other experts than its teacher: what those cost is in the ratio.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.data import TextDataModule
from lit_moe.distill.losses import next_token_loss
from lit_moe.distill.recovery import RecoveryLoss
from lit_moe.distill.step import Step
from lit_moe.distill.weights import Alignment, LossWeights
from lit_moe.models import build_model, frozen_copy
from lit_moe.sparsity import sparsify
from tests.benchmarks.models import model_folder
from tests.benchmarks.timing import interleaved, markdown

PAIRS = 7
ALIGNMENTS: tuple[Alignment, ...] = ("forced",)
"""``own`` costs less; ``dense`` runs every expert on every token, three to four times the work."""
Batch = dict[str, Tensor]


def run() -> str:
    torch.set_num_threads(1)
    rows = []
    for name in ("embedded", *(str(model_folder(r, 1)) for r in ("mixtral_8x2", "olmoe_16x4"))):
        teacher = build_model(name, dtype="float32")
        student = copy.deepcopy(teacher).train()
        sparsify(student, method="magnitude", pattern="2:4")
        batch = next(iter(_data(name).train_dataloader()))
        for alignment in ALIGNMENTS:
            cells = _measured(student, frozen_copy(teacher), batch, alignment)
            rows.append([name.rpartition("/")[2], alignment, *cells])
    return markdown(["16 x 128 tokens", "alignment", "bare", "with experts", "ratio"], rows)


def _data(name: str) -> TextDataModule:
    return TextDataModule(sequence_length=128, batch_size=16, tokenizer=name)


def _measured(
    student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, alignment: Alignment
) -> list[str]:
    ours = _step(student, teacher, batch, alignment)
    bare, step, ratio = interleaved(_bare(student, teacher, batch), ours, pairs=PAIRS)
    return [f"{bare:.3f} s", f"{step:.3f} s", f"{ratio:.3f}"]


def _bare(student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch) -> Callable[[], object]:
    ids, mask = batch["input_ids"], batch["attention_mask"]

    def work() -> None:
        with torch.no_grad():
            teacher(input_ids=ids, attention_mask=mask)
        logits = student(input_ids=ids, attention_mask=mask).logits
        student.zero_grad()
        next_token_loss(logits, ids, mask).backward()

    return work


def _step(
    student: PreTrainedModel, teacher: PreTrainedModel, batch: Batch, alignment: Alignment
) -> Callable[[], object]:
    loss = RecoveryLoss(LossWeights(experts=1.0, experts_lambda=1.0, alignment=alignment))

    def work() -> None:
        recovery = loss(Step(student, teacher, batch))
        student.zero_grad()
        recovery.total.backward()

    return work
