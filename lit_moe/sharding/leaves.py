"""Blocks that DeepSpeed's stage 3 gathers in one piece, whose inputs take no gradient.

Of the MoE blocks that it knows by name it hands over all gradients at once, in a backward hook of
the block. Torch calls such a hook when the gradient of the block's input is there, or, where no
input takes one, before the block's own backward pass: zeros are handed over then. So it is in front
of the first router when everything but the routers is frozen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def let_inputs_take_gradients(model: nn.Module) -> list[RemovableHandle]:
    """Let blocks that are gathered in one piece and train anything ask for their input's gradient.

    It costs the memory and time of that one gradient, and only where nothing in front of the block
    is trained. Values do not change.

    Args:
        model: managed by an engine already; its own hooks run after these.

    Returns:
        What takes the hooks off again.
    """
    from deepspeed.utils import z3_leaf_module

    blocks = [module for module in model.modules() if z3_leaf_module(module)]
    trained = [b for b in blocks if any(p.requires_grad for p in b.parameters())]
    return [b.register_forward_pre_hook(_ask_for_gradient, prepend=True) for b in trained]


def _ask_for_gradient(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Before the block runs. Gives it its inputs as tensors that take a gradient, if none does."""
    if not torch.is_grad_enabled() or any(_takes_gradient(value) for value in inputs):
        return None
    return tuple(_asking(value) for value in inputs)


def _takes_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _asking(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().requires_grad_()
    return value
