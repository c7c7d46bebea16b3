"""What each single expert is worth: the loss of the model without it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.adapters.router_mask import is_masked
from lit_moe.adapters.site import MoESite
from lit_moe.errors import LitMoEError
from lit_moe.prefix import PrefixCache

OnLoss = Callable[[str, int, float], None]
Known = Mapping[tuple[str, int], float]


@dataclass(frozen=True)
class AblationMap:
    """Loss of the model without one expert, for every expert.

    Attributes:
        whole: nats per predicted token with all experts.
        losses: layer -> nats per predicted token without each of its experts, ``(E,)``, float64.
        tokens: predicted tokens.
    """

    whole: float
    losses: Mapping[str, Tensor]
    tokens: int

    @property
    def perplexities(self) -> dict[str, Tensor]:
        """Layer -> perplexity without each expert, ``(E,)``."""
        return {layer: loss_E.exp() for layer, loss_E in self.losses.items()}

    @property
    def increases(self) -> dict[str, Tensor]:
        """Layer -> nats per token that each expert is worth, ``(E,)``; below 0 if it harms."""
        return {layer: loss_E - self.whole for layer, loss_E in self.losses.items()}


def ablation_map(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    budget: int | str = "1GiB",
    known: Known | None = None,
    on_loss: OnLoss | None = None,
    progress: bool = False,
) -> AblationMap:
    """Return the loss without each routed expert, one at a time.

    An expert is hidden from its router, which is what removing it does. In routers that limit
    groups it is hidden from its group, though such an expert could not be removed alone. Hidden
    states in front of each layer's experts are kept, so that the layers before run once.

    The single-expert drop of MC-Suite (arXiv 2504.05586, figure 2), which shows super-experts.

    Args:
        model: left as it was.
        batches: dictionaries with ``input_ids`` (B, S), maybe ``attention_mask`` and ``labels``.
        budget: bytes of hidden states; one layer's are ``2 x tokens x hidden`` numbers.
        known: (layer, expert) -> loss, of an earlier run that did not end.
        on_loss: called with layer, expert and loss as soon as it is known.
        progress: show a progress bar.

    Raises:
        LitMoEError: if a router picks all experts that there are, or the model is masked.
    """
    sites = find_sites(model)
    check_ablation(sites)
    if any(is_masked(model.get_submodule(site.router)) for site in sites):
        raise LitMoEError("some experts are hidden by a mask already; detach it first")
    cache = PrefixCache(model, batches, budget=budget)
    nats, tokens = cache.losses(remember=cache.places)
    known = dict(known or {})
    losses = {site.name: torch.empty(site.num_experts, dtype=torch.float64) for site in sites}
    for site, expert in _shown(_in_order(sites, cache), progress):
        if (site.name, expert) not in known:
            known[site.name, expert] = _loss_without(model, site, expert, cache)
            if on_loss is not None:
                on_loss(site.name, expert, known[site.name, expert])
        losses[site.name][expert] = known[site.name, expert]
    return AblationMap(float(nats.sum() / tokens.sum()), losses, int(tokens.sum()))


def check_ablation(sites: Sequence[MoESite]) -> None:
    """Refuse models whose routers need all their experts.

    Raises:
        LitMoEError: naming the first layer.
    """
    for site in sites:
        if site.num_experts <= site.top_k:
            raise LitMoEError(
                f"{site.name} has {site.num_experts} experts and its router picks {site.top_k}, so "
                "none can be left out"
            )


def stand_outs(values: Mapping[str, Tensor], *, fences: float = 3.0) -> dict[str, list[int]]:
    """Return layer -> experts whose value is far above those of all others; layers with some.

    Far is Tukey's outer fence: more than ``fences`` interquartile ranges above the third quartile
    of all experts of all layers. Values that are not finite are left out of the quartiles.

    >>> stand_outs({"a": torch.tensor([1.0, 1.1, 0.9, 9.0]), "b": torch.tensor([1.0, 1.2])})
    {'a': [3]}
    """
    everyone = torch.cat([value.double() for value in values.values()])
    low, high = torch.quantile(everyone[everyone.isfinite()], torch.tensor([0.25, 0.75]).double())
    fence = float(high + fences * (high - low))
    found = {name: (v > fence).nonzero().flatten().tolist() for name, v in values.items()}
    return {name: experts for name, experts in found.items() if experts}


def _loss_without(model: PreTrainedModel, site: MoESite, expert: int, cache: PrefixCache) -> float:
    keep = [e for e in range(site.num_experts) if e != expert]
    mask = adapter_for(model.config).mask_(model, site, keep)
    try:
        loss = cache.loss({site.name: expert})
    finally:
        mask.remove()
    return loss if math.isfinite(loss) else math.inf


def _in_order(sites: Sequence[MoESite], cache: PrefixCache) -> list[tuple[MoESite, int]]:
    """Return all experts, those of the first layer that runs first."""
    order = {layer: place for place, layer in enumerate(cache.layers)}

    def place(site: MoESite) -> int:
        return next((i for name, i in order.items() if f"{site.name}.".startswith(f"{name}.")), 0)

    return [(s, e) for s in sorted(sites, key=place) for e in range(s.num_experts)]


def _shown(items: list[tuple[MoESite, int]], progress: bool) -> Iterable[tuple[MoESite, int]]:
    return track(items, description="leaving out single experts") if progress else items
