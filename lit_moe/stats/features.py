"""What the down projections of routed experts are fed: the intermediate features of each slot.

An expert's output is ``W_e phi_e(x) + b_e`` in every family without a norm behind the down
projection, whatever its activation, gating or clamping. ``phi`` is read where the model holds it,
or asked for by putting an identity in the place of ``W``: no family's activation is written down
here a second time.

T tokens, S slots (token and chosen expert), E experts, H hidden, I expert width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_moe.adapters.base import MoEAdapter
from lit_moe.adapters.site import MoESite
from lit_moe.errors import UnsupportedModelError
from lit_moe.stats.slots import Slots, in_order_of, is_fused, routing_of, slots_of

_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}


@dataclass(frozen=True)
class FeatureSlots:
    """The slots of one call of one MoE block, in any order.

    Attributes:
        expert_ids: shape ``(S,)``.
        gates: the weight that the model gives each slot, shape ``(S,)``.
        features: inputs of the down projection, shape ``(S, I)``.
        token_ids: which token of the flattened batch, shape ``(S,)``.
    """

    expert_ids: Tensor
    gates: Tensor
    features: Tensor
    token_ids: Tensor


OnFeatures = Callable[[FeatureSlots], None]


@contextlib.contextmanager
def features_of(
    model: PreTrainedModel, adapter: MoEAdapter, site: MoESite, on_features: OnFeatures
) -> Iterator[None]:
    """Call ``on_features`` once per forward of one MoE block; its output stays what it was.

    Args:
        model: the model, in evaluation mode and without gradients.
        adapter: of its family.
        site: the MoE layer.
        on_features: called before the block returns.
    """

    def placed(slots: FeatureSlots) -> None:
        given = adapter.tokens_given(model, site)
        own = slots if given is None else replace(slots, token_ids=given[slots.token_ids])
        on_features(own)

    experts = model.get_submodule(site.experts)
    if adapter.tap_kind(site) == "contract" and is_fused(experts):
        with _inside_fused(experts, placed):
            yield
        return
    is_contract = adapter.tap_kind(site) == "contract"
    asked = model.get_submodule(site.experts if is_contract else site.name)
    hook = _Asking(model, adapter, site, placed)
    handle = asked.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def check_linear(
    model: PreTrainedModel, adapter: MoEAdapter, site: MoESite, run: Callable[[], object]
) -> None:
    """Make sure that an expert's output is linear in its features, as the refit assumes.

    Args:
        model: the model, in evaluation mode and without gradients.
        adapter: of its family.
        site: the MoE layer.
        run: makes the block run once, on few tokens.

    Raises:
        UnsupportedModelError: naming the layer, and by how much outputs and features disagree.
    """
    outputs: list[Slots] = []
    features: list[FeatureSlots] = []
    with _outputs_of(model, adapter, site, outputs.append):
        run()
    with features_of(model, adapter, site, features.append):
        run()
    if not outputs or len(outputs) != len(features):
        raise UnsupportedModelError(
            f"{site.name} of {type(model).__name__} cannot be refitted: its block was not run as a "
            "module of its own, so the inputs of its down projections are not to be seen"
        )
    difference = _disagreement(model, adapter, site, outputs, features)
    if difference > _TOLERANCE.get(outputs[0].outputs.dtype, 5e-2):
        raise UnsupportedModelError(
            f"{site.name} of {type(model).__name__} cannot be refitted: its experts' outputs "
            f"differ by {difference:.1e} (of the largest) from down projection times features, as "
            "where something nonlinear follows the down projection"
        )


@contextlib.contextmanager
def _inside_fused(experts: nn.Module, on_features: OnFeatures) -> Iterator[None]:
    """Stand behind the gating function, whose result is the features of the sorted slots."""
    name = "_apply_gate" if getattr(experts, "has_gate", True) else "act_fn"
    own: Any = getattr(experts, name)
    routing: list[tuple[Tensor, Tensor]] = []

    def remember(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        routing[:] = [routing_of(args, kwargs)]

    def look(projected: Tensor) -> Tensor:
        features: Tensor = own(projected)
        index_TK, weights_TK = routing.pop()
        slots = in_order_of(experts, index_TK, weights_TK, features)
        on_features(FeatureSlots(slots.expert_ids, slots.gates, slots.outputs, slots.token_ids))
        return features

    hook = experts.register_forward_pre_hook(remember, with_kwargs=True)
    # The instance dictionary wins over modules and class attributes of the same name.
    vars(experts)[name] = look
    try:
        yield
    finally:
        hook.remove()
        del vars(experts)[name]


class _Asking:
    """Runs the experts again with identities as down projections: their outputs are the features.

    In families with their own dispatch the whole block runs again. Where experts are wider than the
    hidden size, H columns of the features at a time.
    """

    def __init__(
        self, model: PreTrainedModel, adapter: MoEAdapter, site: MoESite, on_features: OnFeatures
    ) -> None:
        self._model, self._adapter, self._site = model, adapter, site
        self._on_features = on_features
        self._busy = False

    def __call__(self, asked: nn.Module, args: Any, kwargs: Any, _: Any) -> None:
        """Forward hook of the experts or the block."""
        if self._busy:
            return
        self._busy = True
        try:
            self._on_features(self._ask(asked, args, kwargs))
        finally:
            self._busy = False

    def _ask(self, asked: nn.Module, args: Any, kwargs: Any) -> FeatureSlots:
        weights = self._adapter.expert_weights(self._model, self._site)
        own = {k: v.clone() for k, v in weights.items() if k in ("down", "down_bias")}
        hidden, width = own["down"].shape[1:]
        seen: list[Slots] = []
        try:
            with _outputs_of(self._model, self._adapter, self._site, seen.append):
                for start in range(0, width, hidden):
                    self._adapter.set_expert_weights_(
                        self._model, self._site, _identities(own, start)
                    )
                    asked.forward(*args, **kwargs)  # not its hooks
        finally:
            self._adapter.set_expert_weights_(self._model, self._site, own)
        parts = [slots.outputs[:, : width - i * hidden] for i, slots in enumerate(seen)]
        first = seen[0]
        return FeatureSlots(first.expert_ids, first.gates, torch.cat(parts, dim=1), first.token_ids)


def _identities(own: dict[str, Tensor], start: int) -> dict[str, Tensor]:
    """Return down projections that copy features ``start, start + 1, ...``, and zero biases."""
    new = {name: torch.zeros_like(tensor) for name, tensor in own.items()}
    count = min(own["down"].shape[1], own["down"].shape[2] - start)
    rows = torch.arange(count, device=own["down"].device)
    new["down"][:, rows, start + rows] = 1
    return new


@contextlib.contextmanager
def _outputs_of(
    model: PreTrainedModel, adapter: MoEAdapter, site: MoESite, on_slots: Callable[[Slots], None]
) -> Iterator[None]:
    if adapter.tap_kind(site) == "contract":
        with slots_of(model.get_submodule(site.experts), on_slots):
            yield
        return
    handle = adapter.attach_slots(model, site, lambda *parts: on_slots(Slots(*parts)))
    try:
        yield
    finally:
        handle.remove()


def _disagreement(
    model: PreTrainedModel,
    adapter: MoEAdapter,
    site: MoESite,
    outputs: list[Slots],
    features: list[FeatureSlots],
) -> float:
    """Return the largest difference of outputs and linear prediction over the largest output."""
    weights = adapter.expert_weights(model, site)
    worst, largest = 0.0, 1e-12
    for made, fed in zip(outputs, features, strict=True):
        for expert in fed.expert_ids.unique().tolist():
            linear = fed.features[fed.expert_ids == expert].to(weights["down"].dtype)
            linear = linear @ weights["down"][expert].T
            if "down_bias" in weights:
                linear = linear + weights["down_bias"][expert]
            actual = made.outputs[made.expert_ids == expert]
            worst = max(worst, float((linear - actual).abs().max()))
            largest = max(largest, float(actual.abs().max()))
    return worst / largest
