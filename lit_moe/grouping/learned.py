"""Coefficients that are learned: gradient descent on what the merged layer gets wrong.

E experts, N groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from lit_moe.adapters.site import ExpertAxis, MoESite
from lit_moe.criteria.replay import BlockCall, capture_calls
from lit_moe.errors import LitMoEError, UnsupportedModelError
from lit_moe.grouping.coefficients import weighted_map
from lit_moe.grouping.inputs import Batch, first_rows
from lit_moe.grouping.mixed_text import mixed, pairs_of
from lit_moe.grouping.partition import Groups
from lit_moe.inference import evaluating
from lit_moe.merge_plan import MergePlan
from lit_moe.merging import merge
from lit_moe.models import sharing_copy

_JUDGED = 4  # every fourth row tells when to stop


@dataclass(frozen=True)
class LearnOptions:
    """Descent on the coefficients of one layer.

    Attributes:
        learning_rate: of SGD on logits of the coefficients; the loss is a fraction of the layer's
            energy.
        momentum: of SGD.
        epochs: at most; each is one step over all rows.
        patience: epochs without a better loss on the judged rows, after which it stops.
        mixed_rows: rows of mixed text per fitted row, see
            :func:`lit_moe.grouping.mixed_text.pairs_of`; the judged rows stay pure.
        mixing: concentration of the Beta distribution of the share of each row; the smaller, the
            purer. Read only where there are mixed rows.
    """

    learning_rate: float = 3.0
    momentum: float = 0.9
    epochs: int = 50
    patience: int = 5
    mixed_rows: int = 0
    mixing: float = 0.5

    def __post_init__(self) -> None:
        whole = isinstance(self.mixed_rows, int) and self.mixed_rows >= 0
        if not whole or not 0 < self.mixing < math.inf:
            raise LitMoEError(
                f"learned coefficients: mixed_rows={self.mixed_rows} must be a whole number from 0 "
                f"and mixing={self.mixing:g} positive"
            )
        for name in ("learning_rate", "epochs", "patience"):
            if not 0 < getattr(self, name) < math.inf:
                raise LitMoEError(f"learned coefficients: {name} must be positive")


def learn_coefficients(
    model: PreTrainedModel,
    groups: Mapping[str, Groups],
    batches: Iterable[Batch],
    sites: Sequence[MoESite],
    *,
    max_tokens: int,
    options: LearnOptions,
) -> dict[str, Tensor]:
    """Return layer name -> ``(N, E)`` with rows >= 0 that sum to 1. Collective.

    Coefficients are a softmax over the members of a group, begin uniform, and minimise
    ``|| MoE(x) - merged(x) ||^2``, router rows merged alike, on the inputs of the unmerged model.
    Three rows of four are fitted; the coefficients with the least loss on the fourth win (arXiv
    2407.09590, which also learns a scale).

    Args:
        model: unmerged, stays as it is.
        groups: layer name -> groups.
        batches: this rank's rows.
        sites: the MoE layers.
        max_tokens: of all ranks.
        options: of the descent.

    Raises:
        UnsupportedModelError: if the experts are modules of their own.
        LitMoEError: if there are fewer than four rows.
    """
    if not all(site.rows("expert") for site in sites):
        raise UnsupportedModelError(
            f"coefficients cannot be learned for {model.config.model_type}: each of its experts is "
            "a module of its own; take uniform or frequency"
        )
    rows = [
        {k: v[i : i + 1] for k, v in batch.items()}
        for batch in first_rows(batches, max_tokens)
        for i in range(len(next(iter(batch.values()))))
    ]
    _check_rows(len(rows), model.device)
    num_rows, pairs = len(rows), []
    if options.mixed_rows:
        per_row, mixing = options.mixed_rows, options.mixing
        pairs = pairs_of(rows, per_row=per_row, mixing=mixing, judged=_JUDGED)
    calls = capture_calls(model, sites, chain(rows, mixed(model, pairs)))
    uniform = {k: weighted_map(g, torch.ones(sum(map(len, g)))) for k, g in groups.items()}
    merged = sharing_copy(model)
    merge(merged, MergePlan(uniform, uniform))
    found = {}
    with evaluating(model), evaluating(merged):
        for site in sites:
            layer = _Layer(model, merged, site, calls.pop(site.name), num_rows)
            found[site.name] = _descend(layer, uniform[site.name], options)
    return found


class _Layer:
    """The squared error of one merged block as a function of its coefficients."""

    def __init__(
        self,
        model: PreTrainedModel,
        merged: PreTrainedModel,
        site: MoESite,
        calls: list[BlockCall],
        num_rows: int,
    ) -> None:
        block = model.get_submodule(site.name)
        self._block = merged.get_submodule(site.name)
        self._axes = {axis.name.removeprefix(f"{site.name}."): axis for axis in site.axes}
        self._old = {k: _tensor(model, axis.name).detach() for k, axis in self._axes.items()}
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        rank = dist.get_rank() if world > 1 else 0
        judged = [
            i < num_rows and (i * world + rank) % _JUDGED == _JUDGED - 1 for i in range(len(calls))
        ]
        self._rows: dict[bool, list[tuple[BlockCall, Tensor]]] = {True: [], False: []}
        for call, is_judged in zip(calls, judged, strict=True):
            self._rows[is_judged].append((call, call.run(block)))

    def loss(self, map_NE: Tensor, *, judged: bool) -> Tensor:
        """Return the error over the energy; differentiable on each rank's share of the rows."""
        tensors = {
            name: combine_rows(old, self._axes[name], map_NE) for name, old in self._old.items()
        }
        error, energy = 0 * map_NE.sum(), map_NE.new_zeros(())  # a rank may have no such row
        for call, target in self._rows[judged]:
            error = error + (_run(self._block, tensors, call) - target).double().square().sum()
            energy = energy + target.double().square().sum()
        return error / _summed(energy).clamp(min=1e-30)


def combine_rows(old: Tensor, axis: ExpertAxis, map_NE: Tensor) -> Tensor:
    """Return the new tensor as a differentiable function of the coefficients."""
    rows = axis.real * axis.rows_per_expert
    real = old.narrow(axis.dim, 0, rows).unflatten(axis.dim, (axis.real, axis.rows_per_expert))
    first = real.movedim(axis.dim, 0)
    new = torch.einsum("ne,e...->n...", map_NE.to(old.dtype), first)
    new = new.movedim(0, axis.dim).flatten(axis.dim, axis.dim + 1)
    tail = old.narrow(axis.dim, rows, old.shape[axis.dim] - rows)
    return torch.cat([new, tail], dim=axis.dim)


def _descend(layer: _Layer, start_NE: Tensor, options: LearnOptions) -> Tensor:
    member_NE = start_NE > 0
    logits_NE = nn.Parameter(torch.zeros_like(start_NE))
    descent = torch.optim.SGD([logits_NE], lr=options.learning_rate, momentum=options.momentum)
    best, best_loss, waited = start_NE, _judge(layer, start_NE), 0
    for _ in range(options.epochs):
        with torch.enable_grad():
            map_NE = torch.softmax(logits_NE.masked_fill(~member_NE, float("-inf")), dim=1)
            descent.zero_grad()
            layer.loss(map_NE, judged=False).backward()
        assert logits_NE.grad is not None
        logits_NE.grad = _summed(logits_NE.grad)
        descent.step()
        map_NE = torch.softmax(logits_NE.detach().masked_fill(~member_NE, float("-inf")), dim=1)
        loss = _judge(layer, map_NE)
        waited = 0 if loss < best_loss else waited + 1
        if loss < best_loss:
            best, best_loss = map_NE, loss
        if waited >= options.patience:
            break
    return best.clone()


@torch.no_grad()
def _judge(layer: _Layer, map_NE: Tensor) -> float:
    return float(_summed(layer.loss(map_NE, judged=True)))


def _run(block: nn.Module, tensors: dict[str, Tensor], call: BlockCall) -> Tensor:
    class Replaced(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return functional_call(block, tensors, args, kwargs)

    return call.run(Replaced())


def _tensor(model: PreTrainedModel, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), last)
    return tensor


def _summed(tensor: Tensor) -> Tensor:
    """Return the sum over ranks, detached. Collective."""
    total = tensor.detach().clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    return total


def _check_rows(num_rows: int, device: torch.device) -> None:
    total = int(_summed(torch.tensor(num_rows, device=device)))
    if total < _JUDGED:
        raise LitMoEError(
            f"learned coefficients need at least {_JUDGED} calibration rows, there are {total}; "
            "give more text or take uniform"
        )
