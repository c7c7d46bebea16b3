"""How much fine-tuning changed the router's row of each expert."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from lit_moe.adapters import adapter_for
from lit_moe.adapters.pairing import layer_index
from lit_moe.criteria.base import Criterion, Evidence, Need
from lit_moe.criteria.registry import register
from lit_moe.criteria.router_rows import (
    CheckpointTensors,
    router_names,
    rows_without_expert,
    same_elsewhere,
)
from lit_moe.errors import LitMoEError, NoEffectWarning
from lit_moe.sharding.partitions import gathered, whole_shape

Measure = Literal["signed", "absolute", "difference"]


@register("router_change")
@dataclass(frozen=True)
class RouterChange(Criterion):
    """Change of the norm of the expert's router row in fine-tuning: ``||w_e(T)|| - ||w_e(0)||``.

    ``w_e(T)`` is the row of the model at hand, ``w_e(0)`` that of the checkpoint that it was
    fine-tuned from. A row that shrank counts as less important than one that stayed. No data, no
    forward pass; of the ancestor only the routers are read.

    Source: Chowdhury et al., arXiv 2405.16646.

    Attributes:
        ancestor: folder of the checkpoint before fine-tuning, with the same routers.
        measure: ``signed`` as in the paper; ``absolute`` value of it; ``difference``: norm of the
            difference, ``||w_e(T) - w_e(0)||``.
        inverse: drop the largest instead, as a control.
    """

    ancestor: str
    measure: Measure = "signed"
    inverse: bool = False

    needs: ClassVar[frozenset[Need]] = frozenset({"weights"})

    def __post_init__(self) -> None:
        _check_measure(self.measure)

    @torch.no_grad()
    def scores(self, evidence: Evidence) -> dict[str, Tensor]:
        """Score each layer by itself; see :meth:`Criterion.scores`.

        Raises:
            LitMoEError: if the ancestor is missing, only an adapter, or has other routers, or its
                rows in another order.
        """
        model, before = evidence.require_model(self.name), CheckpointTensors(self.ancestor)
        _check_order(before, model.config.to_dict(), "the model")
        adapter = adapter_for(model.config)
        found = {}
        for site in evidence.sites:
            rows = site.rows("router")[0].name
            name = _name_in(before, rows)
            shape = tuple(whole_shape(model.get_parameter(rows)))
            _check_shapes(name, before.shapes[name], shape, before.folder)
            with gathered(model.get_submodule(site.router)):
                now_EH = adapter.router_weight(model, site).cpu()
            found[site.name] = change(now_EH, before.read(name)[: len(now_EH)], self.measure)
        _warn_if_nothing_changed(found, f"{before.folder} and the model")
        return {name: -values if self.inverse else values for name, values in found.items()}


def router_changes(
    ancestor: str | Path, descendant: str | Path, measure: Measure = "signed"
) -> dict[str, Tensor]:
    """Return router name -> change of each row's norm between two checkpoint folders.

    Reads headers and routers only, whatever the size of the folders. Router names are those in the
    files.

    Args:
        ancestor: folder of the checkpoint before fine-tuning.
        descendant: and after it.
        measure: see :class:`RouterChange`.

    Returns:
        Float64 tensors of shape ``(R,)``, in the order of the layers.

    Raises:
        LitMoEError: if a folder cannot be read, or their routers differ in name or shape.
    """
    _check_measure(measure)
    before, after = CheckpointTensors(ancestor), CheckpointTensors(descendant)
    names, others = router_names(before), router_names(after)
    if names != others:
        odd = sorted(set(names) ^ set(others))
        raise LitMoEError(
            f"{before.folder} and {after.folder} have different routers ({odd[0]} is in one only); "
            "take the checkpoint that the other one was fine-tuned from"
        )
    _check_order(before, after.config, str(after.folder))
    found = {}
    for name in names:
        _check_shapes(name, before.shapes[name], after.shapes[name], before.folder)
        found[name] = change(after.read(name), before.read(name), measure)
    if not any(bool(values.any()) for values in found.values()):
        elsewhere = "; so are all others" if same_elsewhere(before, after) else ""
        _warn_if_nothing_changed(found, f"{before.folder} and {after.folder}", elsewhere)
    return found


def change(now_EH: Tensor, before_EH: Tensor, measure: Measure = "signed") -> Tensor:
    """Return the change of each row, ``(E,)``, float64.

    >>> change(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[0.0, 4.0], [0.0, 2.0]]))
    tensor([ 1., -1.], dtype=torch.float64)
    """
    now, before = now_EH.double(), before_EH.double()
    if measure == "difference":
        return torch.linalg.vector_norm(now - before, dim=1)
    signed = torch.linalg.vector_norm(now, dim=1) - torch.linalg.vector_norm(before, dim=1)
    return signed.abs() if measure == "absolute" else signed


def _check_measure(measure: str) -> None:
    if measure not in get_args(Measure):
        raise LitMoEError(f"measure={measure!r} is unknown; use {', '.join(get_args(Measure))}")


def _check_shapes(name: str, before: tuple[int, ...], after: tuple[int, ...], folder: Path) -> None:
    if before != after:
        raise LitMoEError(
            f"router {name} is {before[0]} x {before[-1]} in {folder}, but {after[0]} x "
            f"{after[-1]} after fine-tuning; rows can be compared only expert by expert, so take "
            "the checkpoint that was fine-tuned, with all its experts"
        )


def _check_order(before: CheckpointTensors, after: Mapping[str, Any], name: str) -> None:
    old, now = rows_without_expert(before.config), rows_without_expert(after)
    if old != now:
        raise LitMoEError(
            f"{before.folder} and {name} differ in router rows without an expert ({_listed(old)} "
            f"and {_listed(now)}): dropping experts moves such rows behind the others, so that the "
            "same row is no longer the same expert; take the checkpoint that was fine-tuned, "
            "without the experts that it lacked"
        )


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{key}={count}" for key, count in counts.items()) or "none"


def _name_in(tensors: CheckpointTensors, name: str) -> str:
    """Return the name that a router has in a folder: its own, or that of its layer's router."""
    if name in tensors.shapes:
        return name
    routers = router_names(tensors)
    same = [r for r in routers if layer_index(r) == layer_index(name)]
    if len(same) != 1:
        raise LitMoEError(
            f"{tensors.folder} has no router for {name}: its routers are {', '.join(routers[:3])}; "
            "take the checkpoint that this model was fine-tuned from"
        )
    return same[0]


def _warn_if_nothing_changed(
    found: Mapping[str, Tensor], between: str, elsewhere: str | None = None
) -> None:
    if any(bool(values.any()) for values in found.values()):
        return
    reason = (
        "they are one checkpoint"
        if elsewhere
        else "they were frozen, or fine-tuned by LoRA, or this is the same checkpoint"
        if elsewhere is None
        else "they were frozen, or fine-tuned by LoRA"
    )
    warnings.warn(
        f"no router row changed between {between}, so that nothing tells experts apart: {reason}",
        NoEffectWarning,
        stacklevel=3,
    )
