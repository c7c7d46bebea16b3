"""The weights of a sharded checkpoint, without optimizer, for runs that only evaluate."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from torch import nn

from lit_moe.errors import LitMoEError
from lit_moe.resuming import TAG, CheckpointHeader, read_stored


@torch.no_grad()
def load_weights(module: nn.Module, header: CheckpointHeader) -> dict[str, Any]:
    """Copy the master weights of a checkpoint into a module, one parameter at a time.

    Any number of ranks and any ZeRO stage can load what any other wrote. Collective.

    Args:
        module: the lightning module; parameters may be partitioned. The frozen teacher, which no
            checkpoint holds, is left alone.
        header: of the checkpoint.

    Returns:
        Everything in the checkpoint that is no tensor of the model.

    Raises:
        LitMoEError: if the checkpoint lacks a parameter or has another shape of it.
    """
    from deepspeed import zero
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()):
        found = get_fp32_state_dict_from_zero_checkpoint(str(header.path), TAG, lazy_mode=True)
    for name, parameter in module.named_parameters():
        if name.startswith("teacher."):
            continue
        values = found.get(name)
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
        if values is None or tuple(values.shape) != shape:
            raise LitMoEError(
                f"checkpoint {header.path} has no {name} of shape {shape}; it is of another model"
            )
        sharded = [parameter] if hasattr(parameter, "ds_tensor") else []
        with zero.GatheredParameters(sharded, modifier_rank=0):
            if parameter.numel():
                parameter.data.copy_(values.contiguous().view(shape))
    stored = read_stored(header.path)
    for name, buffer in module.named_buffers():
        if name in stored["module"]:
            buffer.copy_(stored["module"][name])
    return stored
