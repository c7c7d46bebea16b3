"""NAEE: the subset of experts that changes the layer's output least."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.adapters import MoEAdapter, adapter_for
from lit_moe.adapters.site import MoESite
from lit_moe.criteria.base import Criterion, Evidence, Need
from lit_moe.criteria.chance import layer_generator
from lit_moe.criteria.registry import register
from lit_moe.criteria.replay import (
    BlockCall,
    cached_experts,
    capture_calls,
    small_batches,
)
from lit_moe.criteria.subsets import Subset, all_subsets, num_subsets, sampled_subsets
from lit_moe.errors import LitMoEError
from lit_moe.inference import evaluating
from lit_moe.stats.observe import observe


@register("naee")
@dataclass
class NAEE(Criterion):
    """1 for the members of the best subset of each layer, 0 for the other experts.

    The best subset ``S`` of ``keep`` experts has the least ``|| F(X) - F_S(X) ||_F``, where ``X``
    are the inputs of the MoE block on the calibration tokens (padding excluded), ``F`` the block
    of the unpruned model, and ``F_S`` the block whose router knows only the experts in ``S``.
    Layers are treated one by one, all on the inputs of the unpruned model.

    Source: Lu et al., arXiv 2402.14800. Their code adds up one Frobenius norm per batch; here the
    norm is over all tokens, so that the loss does not depend on the batch size.

    With a process group, every rank tries the same subsets on its own share of the tokens, and the
    losses are those of all ranks together.

    Attributes:
        max_tokens: calibration tokens used on each rank, in whole rows.
        max_subsets: with more possible subsets than this, that many are tried: the one of the
            most used experts and distinct random ones.
        cache_gib: memory for the outputs of all experts of one layer.
        progress: show a progress bar.
        losses_: after scoring, layer name -> subset -> loss. Not a field to set.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"forward"})
    takes_images: ClassVar[bool] = False

    max_tokens: int = 4096
    max_subsets: int = 2000
    cache_gib: float = 1.0
    progress: bool = False
    losses_: dict[str, dict[Subset, float]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("max_tokens", "max_subsets", "cache_gib"):
            if getattr(self, name) <= 0:
                raise LitMoEError(f"naee: {name}={getattr(self, name)} must be positive")

    @torch.no_grad()
    def scores(self, evidence: Evidence) -> dict[str, Tensor]:
        """Try the subsets; fills ``losses_``. See :meth:`Criterion.scores`.

        Raises:
            LitMoEError: without model, batches or keep, or if keep is impossible for a layer.
        """
        model = evidence.require_model(self.name)
        keep = evidence.require_keep(self.name)
        batches = evidence.require_batches(self.name)
        adapter = adapter_for(model.config)
        for site in evidence.sites:
            _check_keep(site, keep[site.name], adapter.legal_counts(site))
        room = self._tokens_per_call(adapter, model, evidence.sites)
        pieces = list(small_batches(batches, max_tokens=self.max_tokens, tokens_per_call=room))
        subsets = self._subsets(replace(evidence, batches=pieces))
        calls = capture_calls(model, evidence.sites, pieces)
        self.losses_ = {}
        with evaluating(model):
            for site in track(evidence.sites, "trying subsets", disable=not self.progress):
                self.losses_[site.name] = subset_losses(
                    model, site, calls.pop(site.name), subsets[site.name]
                )
        return {site.name: _membership(site, self.losses_[site.name]) for site in evidence.sites}

    def _tokens_per_call(
        self, adapter: MoEAdapter, model: PreTrainedModel, sites: Iterable[MoESite]
    ) -> int:
        """Return of how many tokens the outputs of all experts fit: E x H numbers each."""
        rows = [adapter.router_weight(model, site) for site in sites]
        token_bytes = max(w.numel() * w.element_size() for w in rows)
        return int(self.cache_gib * 2**30) // token_bytes

    def _subsets(self, evidence: Evidence) -> dict[str, list[Subset]]:
        keep = evidence.require_keep(self.name)
        crowded = [site for site in evidence.sites if self._is_crowded(site, keep[site.name])]
        seen = evidence.observation
        if crowded and seen is None:
            seen = observe(evidence.require_model(self.name), evidence.require_batches(self.name))
        result = {}
        for site in evidence.sites:
            num = keep[site.name]
            if site in crowded and seen is not None:
                generator = layer_generator(evidence.seed, site.name)
                usage = seen.layers[site.name].count
                result[site.name] = sampled_subsets(
                    usage, num, site.num_groups, self.max_subsets, generator
                )
            else:
                result[site.name] = list(all_subsets(site.num_experts, num, site.num_groups))
        return result

    def _is_crowded(self, site: MoESite, keep: int) -> bool:
        return num_subsets(site.num_experts, keep, site.num_groups) > self.max_subsets


@torch.no_grad()
def subset_losses(
    model: PreTrainedModel, site: MoESite, calls: Iterable[BlockCall], subsets: Iterable[Subset]
) -> dict[Subset, float]:
    """Return subset -> ``|| F(X) - F_S(X) ||_F`` over all tokens of all calls of one block.

    The router is the block's own, under a mask. The experts run once per call, on all tokens, and
    every subset gathers from their outputs. Families whose experts cannot be asked one by one, or
    that route to null experts too, run the whole block for every subset instead.

    With a process group, the tokens of all ranks count, and every rank must call this.
    """
    adapter = adapter_for(model.config)
    block, experts = model.get_submodule(site.name), model.get_submodule(site.experts)
    tried = list(subsets)
    squares = torch.zeros(len(tried), dtype=torch.float64, device=model.device)
    reusable = adapter.tap_kind(site) == "contract" and site.router_tail == 0
    for call in calls:
        with cached_experts(experts, site.num_experts) if reusable else nullcontext():
            full = call.run(block)
            for i, subset in enumerate(tried):
                handle = adapter.mask_(model, site, subset)
                try:
                    squares[i] += (call.run(block) - full).double().square().sum()
                finally:
                    handle.remove()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(squares)
    return dict(zip(tried, squares.sqrt().tolist(), strict=True))


def _membership(site: MoESite, losses: Mapping[Subset, float]) -> Tensor:
    """Return 1 for the experts of the subset with the least loss (the first, if equal), else 0."""
    best = min(losses, key=lambda subset: losses[subset])
    return torch.zeros(site.num_experts, dtype=torch.float64).index_fill(0, torch.tensor(best), 1.0)


def _check_keep(site: MoESite, keep: int, legal: tuple[int, ...]) -> None:
    if keep not in legal and keep != site.num_experts:
        raise LitMoEError(
            f"naee: keep={keep} is impossible in {site.name!r} with its {site.num_experts} experts "
            f"and top-{site.top_k} routing; legal counts are {', '.join(map(str, legal))}"
        )
