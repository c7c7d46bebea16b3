"""What a closed-form refit would hold in memory, from the config alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedModel

from lit_moe.adapters import MoESite, adapter_for
from lit_moe.errors import LitMoEError
from lit_moe.inspection.findings import Layer, RefitNeeds, RefitRequest, nearest
from lit_moe.refit import RefitOptions
from lit_moe.refit.memory import LayerSize, choose_solver

_KEEP_RATIOS = (0.75, 0.5, 0.25)
_MODES = ("sequential", "parallel")
_HELD_PER_SIDE = 3
"""Vectors that a waiting forward holds per token: stream, block output, normed input."""


def refit_needs(
    model: PreTrainedModel,
    sites: Sequence[MoESite],
    layers: Sequence[Layer],
    request: RefitRequest,
    dtype: torch.dtype,
) -> Iterator[RefitNeeds]:
    """Yield the needs of both modes at three keep ratios.

    Args:
        model: on the meta device.
        sites: its MoE layers.
        layers: the same as findings, with their legal counts.
        request: calibration tokens and memory budget.
        dtype: of the weights.
    """
    adapter = adapter_for(model.config)
    shapes = [tuple(adapter.expert_weights(model, site)["down"].shape) for site in sites]
    for mode in _MODES:
        for ratio in _KEEP_RATIOS:
            kept = [nearest(layer.legal_counts, ratio * layer.num_experts) for layer in layers]
            sizes = [
                LayerSize(count, width, hidden)
                for count, (_, hidden, width) in zip(kept, shapes, strict=True)
            ]
            yield _needs(mode, ratio, sizes, max(s.top_k for s in sites), request, dtype)


def _needs(
    mode: str,
    ratio: float,
    sizes: Sequence[LayerSize],
    top_k: int,
    request: RefitRequest,
    dtype: torch.dtype,
) -> RefitNeeds:
    options = RefitOptions(mode=mode, memory_gib=request.memory_gib)  # type: ignore[arg-type]
    largest = max(sizes, key=lambda s: s.num_experts * s.width)
    at_once = len(sizes) if mode == "parallel" else 1
    weights = sum(s.num_experts * s.width * s.hidden for s in sizes) * dtype.itemsize
    tokens = request.tokens
    streams = tokens * largest.hidden * 4
    if mode == "sequential":
        streams += 2 * _HELD_PER_SIDE * tokens * largest.hidden * dtype.itemsize
    try:
        choice = choose_solver(largest, options, at_once=at_once)
    except LitMoEError as error:
        return RefitNeeds(mode, ratio, "none", 0, 0, 0, streams, 0, str(error))
    kept_share = 1.0 if mode == "sequential" or choice.name == "gauss_seidel" else options.held_out
    features = int(tokens * top_k * largest.width * 4 * at_once * kept_share)
    in_memory = min(features, options.feature_bytes)
    undo = weights if weights <= options.undo_bytes else 0
    return RefitNeeds(
        mode,
        ratio,
        choice.name,
        choice.bytes,
        in_memory,
        features - in_memory + weights - undo,
        streams,
        undo,
        choice.reason,
    )
