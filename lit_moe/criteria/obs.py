"""The selection that knows the refit: what an expert costs once the others have made up for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_moe.adapters import adapter_for
from lit_moe.adapters.site import MoESite
from lit_moe.criteria.base import Criterion, Evidence, Need
from lit_moe.criteria.registry import register
from lit_moe.criteria.surgeon import Removal, as_scores, eliminate, eliminate_alone
from lit_moe.errors import LitMoEError
from lit_moe.inference import body_inputs, evaluating, run_body
from lit_moe.stats.features import FeatureSlots, check_linear, features_of
from lit_moe.stats.grams import Gram, Piece, gated_features, relative_weights
from lit_moe.stats.layers import first_tensor, layer_of
from lit_moe.stats.tap import TokenMask

_PROBED = 16


@register("obs")
@dataclass
class OBS(Criterion):
    """Optimal brain surgeon on whole experts, greedy and backward; ours (made for the refit).

    The score of an expert is what its removal adds to the squared error of the residual stream,
    relative to the stream, when the down projections of all others are re-fitted; experts are
    removed one by one, each time the cheapest. Scores are costs in one unit for all layers, so that
    a global budget with ``normalise: false`` spends experts where they save most.

    Routing is taken as it is in the whole model: that tokens of a dropped expert go to another one
    is not foreseen.

    Attributes:
        joint: count on help between experts, ``(E D)^2`` numbers per layer; False for each expert's
            own energy; None for joint where it fits.
        lam: ridge penalty in units of the mean square feature, above 0.
        memory_gib: for the matrices, in GiB; layers are done in several passes if need be.
        progress: show a progress bar.
        curves_: after scoring, layer name -> removals in order with their costs, as fractions of
            the stream's energy. Not a field to set.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"forward"})

    joint: bool | None = None
    lam: float = 1e-2
    memory_gib: float = 4.0
    progress: bool = False
    curves_: dict[str, list[Removal]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("lam", "memory_gib"):
            if getattr(self, name) <= 0:
                raise LitMoEError(f"obs: {name}={getattr(self, name)} must be positive")

    @torch.no_grad()
    def scores(self, evidence: Evidence) -> dict[str, Tensor]:
        """Observe, eliminate; fills ``curves_``. See :meth:`Criterion.scores`.

        Raises:
            LitMoEError: without model or batches, or if the joint matrix of one layer is asked for
                and does not fit.
        """
        model = evidence.require_model(self.name)
        batches = list(evidence.require_batches(self.name))
        self.curves_ = {}
        _check_linear(model, evidence.sites, batches)
        passes = self._passes(model, evidence.sites)
        for sites in track(passes, "eliminating experts", disable=not self.progress):
            moments = _observe(model, sites, batches, self._is_joint(model, sites[0]))
            for site in sites:
                self.curves_[site.name] = self._eliminate(model, site, *moments.pop(site.name))
        return {site.name: as_scores(self.curves_[site.name]) for site in evidence.sites}

    def _eliminate(
        self, model: PreTrainedModel, site: MoESite, gram: Gram, num_tokens: float
    ) -> list[Removal]:
        weights = _down(model, site)
        penalty = self.lam * (gram.mean_diagonal or 1.0)
        method = eliminate if gram.joint else eliminate_alone
        removals = method(gram.matrix, weights, penalty)
        # Each token's weight is H over the energy of its stream.
        whole = num_tokens * weights.shape[2]
        return [Removal(expert, cost / max(whole, 1.0)) for expert, cost in removals]

    def _passes(
        self, model: PreTrainedModel, sites: Sequence[MoESite]
    ) -> list[tuple[MoESite, ...]]:
        """Return layers in groups whose matrices fit together, with room for one inverse."""
        limit = self.memory_gib * 2**30
        groups: list[list[MoESite]] = []
        used = limit
        for site in sites:
            size = _bytes(model, site, joint=self._is_joint(model, site))
            joint = self._is_joint(model, site)
            if used + size > limit or joint != self._is_joint(model, groups[-1][0]):
                groups.append([])
                used = 2 * size  # inverse and factor of the one at work
            groups[-1].append(site)
            used += size
        return [tuple(group) for group in groups]

    def _is_joint(self, model: PreTrainedModel, site: MoESite) -> bool:
        needed = 3 * _bytes(model, site, joint=True)
        fits = needed <= self.memory_gib * 2**30
        if self.joint and not fits:
            raise LitMoEError(
                f"obs: the joint matrix of {site.name} needs {needed / 2**30:.3g} GiB, memory_gib "
                f"is {self.memory_gib:g}: raise it, or leave joint to null"
            )
        return fits if self.joint is None else self.joint


def _check_linear(
    model: PreTrainedModel, sites: Sequence[MoESite], batches: Sequence[Mapping[str, Any]]
) -> None:
    """Refuse families whose experts' outputs are not linear in their features."""
    adapter, accepted = adapter_for(model.config), body_inputs(model)
    given = {k: v for k, v in batches[0].items() if k in accepted}
    if set(given) == {"pixel_values"}:  # all tokens of one image may go where no expert is
        few = {"pixel_values": given["pixel_values"][:_PROBED].to(model.device)}
    else:
        few = {
            k: v[:1].to(model.device) if k == "pixel_values" else v[:1, :_PROBED].to(model.device)
            for k, v in given.items()
        }
    with evaluating(model):
        for site in sites:
            check_linear(model, adapter, site, lambda: run_body(model, few))


def _down(model: PreTrainedModel, site: MoESite) -> Tensor:
    """Return down projections with their biases as a last feature, shape ``(E, D, H)``."""
    weights = adapter_for(model.config).expert_weights(model, site)
    down = weights["down"].detach().transpose(1, 2)
    if "down_bias" in weights:
        down = torch.cat([down, weights["down_bias"].detach()[:, None]], dim=1)
    return down


def _bytes(model: PreTrainedModel, site: MoESite, *, joint: bool) -> int:
    num_experts, width, _ = _down(model, site).shape
    return 8 * ((num_experts * width) ** 2 if joint else num_experts * width**2)


def _observe(
    model: PreTrainedModel,
    sites: Sequence[MoESite],
    batches: Iterable[Mapping[str, Any]],
    joint: bool,
) -> dict[str, tuple[Gram, float]]:
    """Return the second moments of each layer and the tokens they are of. Collective."""
    mask = TokenMask()
    accepted = body_inputs(model)
    with evaluating(model), ExitStack() as stack:
        watchers = {site.name: _Watcher(model, site, mask, joint, stack) for site in sites}
        for batch in batches:
            inputs = {k: v.to(model.device) for k, v in batch.items() if k in accepted}
            mask.set(inputs)
            run_body(model, inputs)
    return {name: watcher.result() for name, watcher in watchers.items()}


class _Watcher:
    """Adds up what one layer does, weighing tokens by one over the size of their stream."""

    def __init__(
        self, model: PreTrainedModel, site: MoESite, mask: TokenMask, joint: bool, stack: ExitStack
    ) -> None:
        num_experts, self._width, _ = _down(model, site).shape
        self._site, self._mask = site, mask
        self._slots: FeatureSlots | None = None
        self._bias = "down_bias" in adapter_for(model.config).expert_weights(model, site)
        self._gram = Gram(num_experts, self._width, 0, joint=joint, device=model.device)
        self._tokens = torch.zeros((), dtype=torch.float64, device=model.device)
        adapter = adapter_for(model.config)
        layer = model.get_submodule(layer_of(model, site) or site.name)
        stack.enter_context(features_of(model, adapter, site, self._keep))
        stack.callback(layer.register_forward_hook(self._on_layer).remove)

    def _keep(self, slots: FeatureSlots) -> None:
        self._slots = slots

    def _on_layer(self, _: nn.Module, __: Any, output: Any) -> None:
        assert self._slots is not None
        stream = first_tensor(output).float()
        ids, tokens, features = gated_features(self._slots, bias=self._bias)
        self._slots = None
        stream_TH = stream.reshape(-1, stream.shape[-1])
        weight = relative_weights(stream_TH)
        mask = self._mask.of(self._site)
        if mask is not None:
            weight = weight * mask
        empty = features.new_zeros(len(weight), 0)
        self._gram.add(Piece(ids, tokens, features, empty, weight, torch.zeros_like(weight)))
        self._tokens += (weight > 0).sum()

    def result(self) -> tuple[Gram, float]:
        """Return the sums over all ranks."""
        self._gram.reduce()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(self._tokens)
        return self._gram, float(self._tokens)
