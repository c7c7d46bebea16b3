"""The layer around an MoE block, and the hidden states among what modules return."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lit_moe.adapters.site import MoESite


def first_tensor(output: Any) -> Tensor:
    """Return the hidden states from what a block or layer returned."""
    return output if isinstance(output, Tensor) else first_tensor(output[0])


def with_first_tensor(output: Any, hidden: Tensor) -> Any:
    """Return ``output`` with its hidden states replaced."""
    if isinstance(output, Tensor):
        return hidden
    return type(output)([with_first_tensor(output[0], hidden), *output[1:]])


def layer_of(model: nn.Module, site: MoESite) -> str | None:
    """Return the innermost list item around a block, for instance ``model.layers.3``."""
    parts = site.name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if isinstance(model.get_submodule(".".join(parts[: end - 1])), nn.ModuleList):
            return ".".join(parts[:end])
    return None
