"""What is told of the rounds of dropping: ``rounds.json``, the report, a sentence on training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lightning import Trainer

from lit_moe.callbacks.report import report_writer
from lit_moe.callbacks.rounds import as_reported

ROUNDS_NAME = "rounds.json"


def write_rounds(trainer: Trainer, steps: Sequence[int], records: Sequence[dict[str, Any]]) -> None:
    """Write what each round kept into the report, and on rank 0 beside it.

    Args:
        trainer: of the run.
        steps: of training after each round.
        records: of the rounds that are done.
    """
    writer = report_writer(trainer)
    writer.report.rounds = [as_reported(record) for record in records]
    if trainer.is_global_zero:
        writer.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"steps": steps, "rounds": records}, indent=2)
        (writer.folder / ROUNDS_NAME).write_text(text + "\n", encoding="utf-8")


def training_sentence(
    steps: Sequence[int],
    done: int,
    tokens: int,
    *,
    left: int,
    name: str,
    one_pass: int | None = None,
) -> str:
    """Return how much training the rounds had in all.

    Args:
        steps: asked for after each round.
        done: optimizer steps in all.
        tokens: that all ranks were trained on.
        left: rounds that training ended before.
        name: of the criterion.
        one_pass: steps of one pass over the training text, if known.
    """
    sentence = (
        f"{len(steps)} rounds of dropping by {name}, fine-tuned on {tokens:,} tokens in total "
        f"({done:,} steps)"
    )
    if one_pass is not None and done > one_pass:
        sentence += f", which repeated the training text: {done / one_pass:.1f} passes"
    idle = sum(number == 0 for number in steps)
    if left or idle:
        sentence += f"; training ended early: {max(left, idle)} rounds had none after them"
    return sentence
