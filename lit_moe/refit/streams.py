"""Where a block's output enters the residual stream, found out by asking the model.

In most decoder layers ``layer output = residual + block output``, so the difference of two layer
outputs is what the smaller block has to make up for. Some families scale the block's output by a
constant, and some put a norm or a mixing between them; what holds is measured on a few tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_moe.adapters.site import MoESite
from lit_moe.inference import run_body
from lit_moe.stats.layers import first_tensor, layer_of, with_first_tensor

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}


@dataclass(frozen=True)
class Stream:
    """How one block's output reaches the stream.

    Attributes:
        module: dotted name of the layer whose output is the stream behind the block.
        scale: ``d layer output / d block output``, a constant.
    """

    module: str
    scale: float


def find_stream(
    model: PreTrainedModel, site: MoESite, inputs: Mapping[str, Tensor]
) -> Stream | None:
    """Return how a block's output reaches the stream, None where it does so in no simple way.

    Runs the body of the model twice on ``inputs``, which should be few tokens.
    """
    name = layer_of(model, site)
    if name is None:
        return None
    plain, block = _layer_output(model, site, name, inputs, None)
    if block is None or plain.numel() != block.numel():
        return None
    generator = torch.Generator().manual_seed(0)
    # As large as the stream, so that rounding of bf16 streams stays small beside it.
    noise = torch.randn(block.shape, generator=generator).to(block) * plain.std().to(block)
    nudged, _ = _layer_output(model, site, name, inputs, noise)
    response, noise = (nudged - plain).double().flatten(), noise.double().flatten()
    scale = float((response * noise).sum() / noise.square().sum())
    error = float((response - scale * noise).norm() / response.norm().clamp(min=1e-30))
    if error > _TOLERANCE.get(plain.dtype, 5e-2) or scale == 0:
        return None
    return Stream(name, scale)


def _layer_output(
    model: PreTrainedModel,
    site: MoESite,
    layer: str,
    inputs: Mapping[str, Tensor],
    noise: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Return layer output and block output, with ``noise`` added to the latter.

    The block output is None for the few blocks that are not run as modules of their own.
    """
    seen: dict[str, Tensor] = {}

    def on_block(_: nn.Module, __: Any, output: Any) -> Any:
        seen["block"] = first_tensor(output)
        return None if noise is None else with_first_tensor(output, seen["block"] + noise)

    def on_layer(_: nn.Module, __: Any, output: Any) -> None:
        seen["layer"] = first_tensor(output)

    hooks = [
        model.get_submodule(site.name).register_forward_hook(on_block),
        model.get_submodule(layer).register_forward_hook(on_layer),
    ]
    try:
        run_body(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen["layer"], seen.get("block")
