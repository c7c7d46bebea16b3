"""Where the sum of the experts' outputs can be seen, found out by asking the model.

In most blocks it is the block's own output, up to shared experts and a constant factor that some
families apply behind the sum. Where the block puts a norm or a projection behind it, the output
of the experts module is taken. What holds is measured on a few tokens: the down projections are
changed, and what comes out is compared with what their features say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lit_moe.adapters.base import MoEAdapter
from lit_moe.adapters.site import MoESite
from lit_moe.errors import UnsupportedModelError
from lit_moe.stats.features import FeatureSlots, features_of
from lit_moe.stats.grams import gated_features
from lit_moe.stats.layers import first_tensor

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-5}


@dataclass(frozen=True)
class Outlet:
    """A module whose output is linear in the down projections.

    Attributes:
        module: dotted name: the block, or its experts.
        gain: output over gated features times down projections, a constant.
    """

    module: str
    gain: float


def find_outlet(
    model: PreTrainedModel, adapter: MoEAdapter, site: MoESite, run: Callable[[], object]
) -> Outlet:
    """Return where a change of the down projections shows as it is, up to a constant.

    Args:
        model: the model, in evaluation mode and without gradients; left as it was.
        adapter: of its family.
        site: the MoE layer.
        run: makes the block run once, on few tokens.

    Raises:
        UnsupportedModelError: naming the layer, if there is no such place.
    """
    names = tuple(dict.fromkeys((site.name, site.experts)))
    slots: list[FeatureSlots] = []
    with features_of(model, adapter, site, slots.append), _outputs_of(model, names) as before:
        run()
    with _changed(model, adapter, site) as change_EHI, _outputs_of(model, names) as after:
        run()
    expected_TH = _expected(slots[0], change_EHI)
    for name in names:
        if name not in before or before[name].numel() < expected_TH.numel():
            continue
        tolerance = _TOLERANCE.get(before[name].dtype, 5e-2)
        gain = _gain(after[name].double() - before[name].double(), expected_TH, tolerance)
        if gain is not None:
            return Outlet(name, gain)
    raise UnsupportedModelError(
        f"{site.name} of {type(model).__name__} cannot be refitted: neither its output nor that of "
        "its experts is a constant times the sum of what the down projections give"
    )


@contextlib.contextmanager
def _outputs_of(model: PreTrainedModel, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    seen: dict[str, Tensor] = {}

    def hook_for(name: str) -> Callable[..., None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            seen.setdefault(name, first_tensor(output).detach().clone())

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(hook_for(name)) for name in names]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _changed(model: PreTrainedModel, adapter: MoEAdapter, site: MoESite) -> Iterator[Tensor]:
    """Hold random numbers in the place of the down projections; gives the change ``(E, H, I)``."""
    own = adapter.expert_weights(model, site)["down"].clone()
    generator = torch.Generator().manual_seed(0)
    other = torch.randn(own.shape, generator=generator).to(own) * own.float().std().to(own)
    adapter.set_expert_weights_(model, site, {"down": other})
    try:
        yield other.double() - own.double()
    finally:
        adapter.set_expert_weights_(model, site, {"down": own})


def _expected(slots: FeatureSlots, change_EHI: Tensor) -> Tensor:
    """Return what a change of the down projections ought to add to each token, ``(T, H)``."""
    expert_ids, token_ids, features = gated_features(slots, bias=False)
    added = change_EHI.new_zeros(int(token_ids.max()) + 1, change_EHI.shape[1])
    for expert in expert_ids.unique().tolist():
        mine = expert_ids == expert
        added.index_add_(0, token_ids[mine], features[mine].double() @ change_EHI[expert].T)
    return added


def _gain(change: Tensor, expected_TH: Tensor, tolerance: float) -> float | None:
    """Return ``change / expected``, None if that is no constant."""
    tokens, hidden = expected_TH.shape
    if change.numel() % hidden:
        return None
    change_TH = change.reshape(-1, hidden)
    # Tokens at the end that no routed expert serves have no slot.
    expected_TH = F.pad(expected_TH, (0, 0, 0, len(change_TH) - tokens))
    gain = float((change_TH * expected_TH).sum() / expected_TH.square().sum().clamp(min=1e-300))
    error = float((change_TH - gain * expected_TH).norm() / change_TH.norm().clamp(min=1e-300))
    return gain if error < tolerance and gain != 0 else None
