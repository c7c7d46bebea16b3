"""Fill layers up to one expert count with dead experts, so that plain transformers loads them.

A dead expert has zero weights and a bias so low that its router never picks it. That is exact only
where such a bias exists and dead experts take no probability from the living.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lit_moe.adapters import adapter_for
from lit_moe.adapters.site import ExpertAxis, MoESite
from lit_moe.errors import ExportError

DEAD_BIAS = -1e4
"""Low enough never to be chosen; not -inf, which other runtimes turn into NaN."""


def padded(
    model: PreTrainedModel, sites: Sequence[MoESite], weights: Mapping[str, Tensor]
) -> tuple[dict[str, Callable[[Tensor], Tensor]], PreTrainedConfig]:
    """Return how to fill up weights, and the config for as many experts as the largest layer has.

    Args:
        model: whose layers keep different numbers of experts; not changed.
        sites: its MoE layers.
        weights: its state dict; not changed.

    Returns:
        For each tensor with an entry per expert what makes the filled one of it; and the config.

    Raises:
        ExportError: if the family has no bias that makes this exact.
    """
    for site in sites:
        _check_exact(site, weights, model.config.model_type)
    largest = max(site.num_experts for site in sites)
    fill: dict[str, Callable[[Tensor], Tensor]] = {}
    for site in sites:
        for axis in site.axes:
            one = partial(_filled, axis=axis, site=site, largest=largest)
            fill[axis.name] = one if axis.name not in fill else _both(fill[axis.name], one)
    config = copy.deepcopy(model.config)
    adapter_for(config).update_config(config, {site.name: largest for site in sites})
    return fill, config


def _both(
    first: Callable[[Tensor], Tensor], second: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    return lambda tensor: second(first(tensor))


def _check_exact(site: MoESite, weights: Mapping[str, Tensor], family: str) -> None:
    kinds = {axis.kind for axis in site.axes}
    logit_bias = any(_is_logit_bias(axis, weights[axis.name]) for axis in site.axes)
    if "id_table" in kinds or any(a.rows_per_expert != 1 for a in site.axes):
        reason = "its experts are not simply stacked"
    elif logit_bias or ("select_bias" in kinds and site.routing == "sigmoid"):
        return
    elif "select_bias" in kinds:
        reason = "dead experts would take probability from the living ones in its softmax"
    else:
        reason = "its router has no bias that could rule out an expert"
    raise ExportError(
        f"{family} cannot be exported padded: {reason}; layout='per_layer_config' works"
    )


def _is_logit_bias(axis: ExpertAxis, tensor: Tensor) -> bool:
    return axis.kind == "router" and tensor.ndim == 1 and axis.name.endswith("bias")


def _filled(tensor: Tensor, axis: ExpertAxis, site: MoESite, largest: int) -> Tensor:
    """Insert dead rows at the end of each routing group, before rows that are no experts."""
    real, tail = tensor.split([axis.real, tensor.shape[axis.dim] - axis.real], axis.dim)
    missing = (largest - axis.real) // site.num_groups
    rules_out = axis.kind == "select_bias" or _is_logit_bias(axis, tensor)
    value = DEAD_BIAS if rules_out else 0.0
    parts = []
    for group in real.chunk(site.num_groups, axis.dim):
        shape = (*group.shape[: axis.dim], missing, *group.shape[axis.dim + 1 :])
        parts += [group, torch.full(shape, value, dtype=tensor.dtype, device=tensor.device)]
    return torch.cat([*parts, tail], axis.dim)
