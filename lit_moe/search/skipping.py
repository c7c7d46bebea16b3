"""Dynamic skipping of NAEE (arXiv 2402.14800): tokens that use the second expert only if it counts.

The baseline for fewer active experts. A token skips its second expert where its weight is less than
``beta`` times that of the first; ``beta`` is the median of this ratio on calibration text, per
layer, so about half of the tokens use one expert. T tokens, K = 2 experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.adapters.site import MoESite
from lit_moe.errors import LitMoEError, UnsupportedModelError
from lit_moe.inference import evaluating, run_body
from lit_moe.stats.observe import model_inputs


def skipping_thresholds(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, float]:
    """Return MoE layer name -> median over tokens of the second weight over the first.

    Args:
        model: with two experts per token.
        batches: calibration text; padding does not count.

    Raises:
        LitMoEError: for another number of experts per token, or without text.
    """
    sites = check_skippable(model)
    ratios: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    mask: list[Tensor | None] = [None]

    def watch(site: MoESite) -> Callable[[Tensor, Tensor], Tensor]:
        def note(_: Tensor, weights_TK: Tensor) -> Tensor:
            ratio_T = _ratio(weights_TK).float().cpu()
            real = mask[0]
            kept = ratio_T if real is None or len(real) != len(ratio_T) else ratio_T[real]
            ratios[site.name].append(kept)
            return weights_TK

        return note

    with _weights_through(model, sites, watch), evaluating(model):
        for batch in batches:
            inputs = model_inputs(batch, model.device)
            given = inputs.get("attention_mask")
            mask[0] = None if given is None else given.reshape(-1).bool().cpu()
            run_body(model, inputs)
    if not all(ratios.values()):
        raise LitMoEError("dynamic skipping needs calibration text, but there is none")
    return {name: float(torch.cat(parts).median()) for name, parts in ratios.items()}


class Skipped:
    """How often second experts were skipped while a model ran.

    Attributes:
        tokens: token and layer pairs that were seen.
        skipped: those that used one expert.
    """

    def __init__(self) -> None:
        self.tokens = self.skipped = 0

    @property
    def active_experts(self) -> float:
        """Mean experts per token and layer, from 1 to 2."""
        return 2.0 - self.skipped / max(self.tokens, 1)


@contextmanager
def skipping(model: PreTrainedModel, thresholds: Mapping[str, float]) -> Iterator[Skipped]:
    """Within it, tokens skip their second expert where it counts too little.

    Weights that are left are divided by their sum where the model does so.

    Raises:
        LitMoEError: for a model with another number of experts per token.
    """
    seen = Skipped()

    def skip(site: MoESite) -> Callable[[Tensor, Tensor], Tensor]:
        def weights_of(_: Tensor, weights_TK: Tensor) -> Tensor:
            goes_T = _ratio(weights_TK) < thresholds[site.name]
            seen.tokens += goes_T.numel()
            seen.skipped += int(goes_T.sum())
            first_T1 = weights_TK.argmax(dim=-1, keepdim=True)
            keeps_TK = torch.zeros_like(weights_TK).scatter_(-1, first_T1, 1.0)
            kept_TK = weights_TK * keeps_TK
            if site.renormalised:
                kept_TK = keeps_TK * weights_TK.sum(dim=-1, keepdim=True)
            return torch.where(goes_T[:, None], kept_TK, weights_TK)

        return weights_of

    with _weights_through(model, check_skippable(model), skip):
        yield seen


@contextmanager
def _weights_through(
    model: PreTrainedModel,
    sites: Iterable[MoESite],
    make: Callable[[MoESite], Callable[[Tensor, Tensor], Tensor]],
) -> Iterator[None]:
    """Let functions of (ids, weights) change the weights that experts are called with."""
    handles = []
    try:
        for site in sites:
            experts = model.get_submodule(site.experts)
            hook = _on_weights(make(site))
            handles.append(experts.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _on_weights(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    def hook(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(args) > 2:
            return (*args[:2], change(args[1], args[2]), *args[3:]), kwargs
        ids = args[1] if len(args) > 1 else kwargs["top_k_index"]
        return args, {**kwargs, "top_k_weights": change(ids, kwargs["top_k_weights"])}

    return hook


def _ratio(weights_TK: Tensor) -> Tensor:
    """Return the smaller weight over the larger, shape ``(T,)``."""
    return weights_TK.min(dim=-1).values / weights_TK.max(dim=-1).values


def check_skippable(model: PreTrainedModel) -> tuple[MoESite, ...]:
    """Return the MoE layers of a model whose tokens can skip their second expert.

    Raises:
        LitMoEError: if tokens do not use two experts.
        UnsupportedModelError: if weights of experts cannot be reached.
    """
    sites, adapter = find_sites(model), adapter_for(model.config)
    for site in sites:
        if site.top_k != 2:
            raise LitMoEError(
                f"dynamic skipping is defined for 2 experts per token, {site.name} uses "
                f"{site.top_k}; compare with another baseline"
            )
        if adapter.tap_kind(site) == "custom":
            raise UnsupportedModelError(
                f"experts of {site.name} are called in a way of their own; dynamic skipping cannot "
                "reach their weights"
            )
    return sites
