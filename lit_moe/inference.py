"""Running a model only to look at it, and leaving it as it was."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from lit_moe.errors import CalibrationError
from lit_moe.sharding.partitions import gathering


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients inside the block.

    One that is partitioned over ranks is gathered layer by layer while it runs; all ranks must run
    it equally often. Afterwards every module has its own mode back, also when the block raises.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad(), gathering(model):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def body_inputs(model: PreTrainedModel) -> frozenset[str]:
    """Return the names of what the model's body (the model without its head) takes."""
    return frozenset(inspect.signature(model.base_model.forward).parameters)


def check_readable(model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    """Refuse inputs that a model cannot begin with.

    Raises:
        CalibrationError: naming what it reads.
    """
    names = {"input_ids", model.main_input_name}
    if not names & inputs.keys():
        raise CalibrationError(
            f"{type(model).__name__} reads {' or '.join(sorted(names))}, but a batch has only "
            f"{sorted(inputs)} of what is passed on"
        )


def run_body(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Any:
    """Run the model without its head, and without keeping keys and values for a generation."""
    check_readable(model, inputs)
    options = {"use_cache": False} if "use_cache" in body_inputs(model) else {}
    return model.base_model(**inputs, **options)
