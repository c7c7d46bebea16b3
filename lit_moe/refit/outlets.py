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
from transformers import PreTrainedModel

from lit_moe.adapters.base import MoEAdapter
from lit_moe.adapters.site import MoESite
from lit_moe.errors import UnsupportedModelError
from lit_moe.stats.features import FeatureSlots, features_of
from lit_moe.stats.grams import gated_features
from lit_moe.stats.layers import first_tensor

_CHANGED = 16
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
    with _changed(model, adapter, site) as change, _outputs_of(model, names) as after:
        run()
    expected_TR = _expected(slots[0], change.values)
    for name in names:
        if name not in before or before[name].numel() < len(expected_TR) * change.hidden:
            continue
        tolerance = _TOLERANCE.get(before[name].dtype, 5e-2)
        moved = after[name].double() - before[name].double()
        gain = _gain(moved, expected_TR, change, tolerance)
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


@dataclass(frozen=True)
class _Change:
    """A change of a few rows of the down projections, made to see where it comes out.

    Attributes:
        rows: which of the hidden dimensions, shape ``(R,)``.
        values: what was added to them, shape ``(E, R, I)``.
        hidden: hidden size.
    """

    rows: Tensor
    values: Tensor
    hidden: int


@contextlib.contextmanager
def _changed(model: PreTrainedModel, adapter: MoEAdapter, site: MoESite) -> Iterator[_Change]:
    """Hold random numbers in a few rows of the down projections."""
    own = adapter.expert_weights(model, site)["down"].clone()
    hidden = own.shape[1]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(hidden, generator=generator)[:_CHANGED].to(own.device)
    noise = torch.randn((len(own), len(rows), own.shape[2]), generator=generator).to(own)
    before = own[:, rows]
    other = own.clone()
    other[:, rows] = noise * before.float().std().to(own)
    change = other[:, rows].double() - before.double()
    adapter.set_expert_weights_(model, site, {"down": other})
    del other
    try:
        yield _Change(rows, change, hidden)
    finally:
        adapter.set_expert_weights_(model, site, {"down": own})


def _expected(slots: FeatureSlots, change_ERI: Tensor) -> Tensor:
    """Return what a change of the down projections ought to add to each token, ``(T, R)``."""
    expert_ids, token_ids, features = gated_features(slots, bias=False)
    added = change_ERI.new_zeros(int(token_ids.max()) + 1, change_ERI.shape[1])
    for expert in expert_ids.unique().tolist():
        mine = expert_ids == expert
        added.index_add_(0, token_ids[mine], features[mine].double() @ change_ERI[expert].T)
    return added


def _gain(moved: Tensor, expected_TR: Tensor, change: _Change, tolerance: float) -> float | None:
    """Return what moved over what was expected to, None if that is no constant."""
    if moved.numel() % change.hidden:
        return None
    moved_TH = moved.reshape(-1, change.hidden)
    # Tokens at the end that no routed expert serves have no slot.
    expected_TH = torch.zeros_like(moved_TH)
    expected_TH[: len(expected_TR), change.rows] = expected_TR
    gain = float((moved_TH * expected_TH).sum() / expected_TH.square().sum().clamp(min=1e-300))
    error = float((moved_TH - gain * expected_TH).norm() / moved_TH.norm().clamp(min=1e-300))
    return gain if error < tolerance and gain != 0 else None
