"""What the best-known peer does: every expert on every token, statistics by boolean masks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.adapters.site import MoESite
from lit_moe.stats.slots import raw_outputs


@torch.no_grad()
def all_experts_statistics(
    model: PreTrainedModel, inputs: dict[str, Tensor]
) -> dict[str, dict[str, Tensor | int]]:
    """Return layer -> statistics, from an (E, T, H) buffer per layer. Contract families only."""
    adapter = adapter_for(model.config)
    captured: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    hooks = []
    sites = [site for site in find_sites(model) if adapter.tap_kind(site) == "contract"]
    for site in sites:
        experts = model.get_submodule(site.experts)
        hooks.append(experts.register_forward_pre_hook(_capture(captured, site), with_kwargs=True))
    model.base_model(**inputs)
    for hook in hooks:
        hook.remove()
    seen = [site for site in sites if site.name in captured]  # text leaves vision experts idle
    return {site.name: _statistics(model, site, *captured[site.name]) for site in seen}


def _capture(captured: dict, site: MoESite):
    def hook(_: nn.Module, args: tuple, kwargs: dict) -> None:
        captured[site.name] = tuple(args) if len(args) == 3 else (args[0], *kwargs.values())

    return hook


def _statistics(
    model: PreTrainedModel, site: MoESite, hidden: Tensor, index: Tensor, weights: Tensor
) -> dict[str, Tensor | int]:
    forward = model.get_submodule(site.experts).forward
    tokens = hidden.shape[0]
    outputs_ETH = torch.stack(
        [
            raw_outputs(forward, hidden, torch.full((tokens,), e), weights.dtype)
            for e in range(site.num_experts)
        ]
    ).double()
    rows: dict[str, list[Tensor]] = {}
    for expert in range(site.num_experts):
        chosen = index == expert
        gates = (weights.double() * chosen).sum(dim=1)[chosen.any(dim=1)]
        mine = outputs_ETH[expert][chosen.any(dim=1)]
        norms = mine.norm(dim=1)
        peak = mine.abs().max() if mine.numel() else torch.zeros((), dtype=torch.float64)
        for key, value in (
            ("count", torch.tensor(float(chosen.sum()), dtype=torch.float64)),
            ("gate_sum", gates.sum()),
            ("norm_sum", norms.sum()),
            ("weighted_norm_sum", (gates * norms).sum()),
            ("squared_norm_sum", (norms**2).sum()),
            ("max_abs", peak),
        ):
            rows.setdefault(key, []).append(value)
    return {"tokens": tokens, **{key: torch.stack(values) for key, values in rows.items()}}
