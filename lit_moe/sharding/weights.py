"""The weights of a sharded checkpoint, without optimizer, also for other ranks and stages."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch
from torch import Tensor, nn

from lit_moe.errors import LitMoEError
from lit_moe.resuming import TAG, CheckpointHeader, read_stored
from lit_moe.sharding.partitions import whole_shape


def stored_parameters(header: CheckpointHeader) -> dict[str, Any]:
    """Return the parameters of a checkpoint by name, whole, each read when it is asked for.

    Those that were trained are the float32 master weights; frozen ones are as the model had them.
    """
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()):
        found = get_fp32_state_dict_from_zero_checkpoint(str(header.path), TAG, lazy_mode=True)
    if header.stage == 1:  # whose frozen parameters are nowhere but in the module
        stored: dict[str, Any] = read_stored(header.path)["module"]
        found = {**{n: t for n, t in stored.items() if n not in found}, **found}
    return dict(found)


def put_whole(parameter: Tensor, values: Tensor) -> None:
    """Give a parameter the values that rank 0 has, partitioned or not. Collective."""
    from deepspeed import zero

    sharded = [parameter] if hasattr(parameter, "ds_tensor") else []
    with zero.GatheredParameters(sharded, modifier_rank=0):
        if parameter.numel():
            parameter.data.copy_(values)


def checked(values: Any, name: str, parameter: Tensor, header: CheckpointHeader) -> Tensor:
    """Return the stored values of a parameter in its shape.

    Raises:
        LitMoEError: if the checkpoint lacks it or has another shape of it.
    """
    shape = whole_shape(parameter)
    if values is None or torch.Size(values.shape) != shape:
        raise LitMoEError(
            f"checkpoint {header.path} has no {name} of shape {tuple(shape)}; it is of another "
            "model"
        )
    whole: Tensor = values.contiguous().view(shape)
    return whole


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
    found = stored_parameters(header)
    for name, parameter in module.named_parameters():
        if not name.startswith("teacher."):
            put_whole(parameter, checked(found.get(name), name, parameter, header))
    stored = read_stored(header.path)
    for name, buffer in module.named_buffers():
        if name in stored["module"]:
            buffer.copy_(stored["module"][name])
    return stored
