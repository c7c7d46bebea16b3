"""What one merged layer gets wrong, and how that changes with its coefficients.

T tokens, H hidden, E experts, N groups.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from lit_moe.adapters.site import ExpertAxis, MoESite
from lit_moe.criteria.replay import BlockCall
from lit_moe.plan import KeepPlan
from lit_moe.surgery import shrink

Kind = Literal["fitted", "mixed", "judged"]
Row = tuple[BlockCall, Tensor]


def outline_of(
    model: PreTrainedModel, sites: Sequence[MoESite], counts: Mapping[str, int]
) -> PreTrainedModel:
    """Return the model with fewer experts and without values: all tensors are on ``meta``.

    Args:
        model: stays as it is.
        sites: all of its MoE layers.
        counts: layer name -> experts that there will be.
    """
    kept = {}
    for site in sites:
        size, each = site.num_experts // site.num_groups, counts[site.name] // site.num_groups
        starts = range(0, site.num_experts, size)
        kept[site.name] = tuple(start + i for start in starts for i in range(each))
    outline = _without_values(model)
    shrink(outline, KeepPlan(kept, {site.name: site.num_experts for site in sites}))
    return outline


def _without_values(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy on ``meta`` in which tensors that are shared stay shared."""
    memo: dict[int, object] = {id(b): b.detach().to("meta") for b in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
    return copy.deepcopy(model, memo).eval()


class MergedLayer:
    """The squared error of a merged block, over the energy of what the unmerged one puts out.

    Holds the block's outputs on this rank's rows beside the inputs that it is given.

    Args:
        model: unmerged.
        outline: see :func:`outline_of`.
        site: the layer.
        calls: of the block, one per row.
        kinds: of the rows: coefficients are ``fitted`` on them or on ``mixed`` text, or ``judged``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        outline: PreTrainedModel,
        site: MoESite,
        calls: Sequence[BlockCall],
        kinds: Sequence[Kind],
    ) -> None:
        block = model.get_submodule(site.name)
        self._outline = outline.get_submodule(site.name)
        self._axes = {axis.name.removeprefix(f"{site.name}."): axis for axis in site.axes}
        self._old = {k: _tensor(model, axis.name).detach() for k, axis in self._axes.items()}
        own = (*block.named_parameters(), *block.named_buffers())
        self._rest = {name: tensor.detach() for name, tensor in own if name not in self._old}
        self._rows: dict[Kind, list[Row]] = {"fitted": [], "mixed": [], "judged": []}
        for call, kind in zip(calls, kinds, strict=True):
            self._rows[kind].append((call, call.run(block)))

    @property
    def num_tokens(self) -> int:
        """Tokens of this rank's rows, without padding and mixed text."""
        return sum(len(target) for kind in ("fitted", "judged") for _, target in self._rows[kind])

    @torch.no_grad()
    def loss(self, map_NE: Tensor) -> float:
        """Return the error over the energy of the judged rows of all ranks. Collective."""
        tensors, error = self._combined(map_NE), map_NE.new_zeros(())
        for call, target_TH in self._rows["judged"]:
            error = error + self._error(tensors, call, target_TH)
        return float(summed(error / _energy(self._rows["judged"], map_NE)))

    def gradient(self, map_NE: Tensor) -> Tensor:
        """Return this rank's part of the gradient of the loss on the fitted rows. Collective.

        Rows are run back one after the other, so that no more than one row's activations are held.
        """
        rows = self._rows["fitted"] + self._rows["mixed"]
        energy = _energy(rows, map_NE)
        with torch.enable_grad():
            map_NE = map_NE.detach().requires_grad_()
            tensors = self._combined(map_NE)
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
            for call, target_TH in reversed(rows):  # the order in which one graph of all would
                (self._error(leaves, call, target_TH) / energy).backward()
        grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        if grads:  # a rank may have no such row
            torch.autograd.backward([tensors[name] for name in grads], list(grads.values()))
        return torch.zeros_like(map_NE) if map_NE.grad is None else map_NE.grad

    def _combined(self, map_NE: Tensor) -> dict[str, Tensor]:
        return {
            name: combine_rows(old, self._axes[name], map_NE) for name, old in self._old.items()
        }

    def _error(self, tensors: dict[str, Tensor], call: BlockCall, target_TH: Tensor) -> Tensor:
        output_TH = call.run(_Filled(self._outline, {**self._rest, **tensors}))
        return (output_TH - target_TH).double().square().sum()


def combine_rows(old: Tensor, axis: ExpertAxis, map_NE: Tensor) -> Tensor:
    """Return the new tensor as a differentiable function of the coefficients."""
    rows = axis.real * axis.rows_per_expert
    real = old.narrow(axis.dim, 0, rows).unflatten(axis.dim, (axis.real, axis.rows_per_expert))
    first = real.movedim(axis.dim, 0)
    new = torch.einsum("ne,e...->n...", map_NE.to(old.dtype), first)
    new = new.movedim(0, axis.dim).flatten(axis.dim, axis.dim + 1)
    tail = old.narrow(axis.dim, rows, old.shape[axis.dim] - rows)
    return torch.cat([new, tail], dim=axis.dim)


def summed(tensor: Tensor) -> Tensor:
    """Return the sum over ranks, detached. Collective."""
    total = tensor.detach().clone()
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(total)
    return total


def _energy(rows: Sequence[Row], map_NE: Tensor) -> Tensor:
    """Return the sum of squares of the targets of all ranks."""
    energy = map_NE.new_zeros(())
    for _, target_TH in rows:
        energy = energy + target_TH.double().square().sum()
    return summed(energy).clamp(min=1e-30)


class _Filled(nn.Module):
    """A block without values of its own, run with given ones."""

    def __init__(self, block: nn.Module, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self._block, self._values = block, tensors

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self._block, self._values, args, kwargs)


def _tensor(model: PreTrainedModel, name: str) -> Tensor:
    path, _, last = name.rpartition(".")
    tensor: Tensor = getattr(model.get_submodule(path), last)
    return tensor
