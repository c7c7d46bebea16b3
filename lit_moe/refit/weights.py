"""Reads and writes the down projections of one layer as one tensor of solutions."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.adapters import adapter_for
from lit_moe.adapters.site import MoESite
from lit_moe.refit.layer import Weights
from lit_moe.refit.memory import LayerSize
from lit_moe.refit.options import RefitOptions

_SPARSE = 0.02
"""Fraction of zeros from which on a matrix counts as pruned; stray zeros come from rounding."""


class DownProjections:
    """The part of a layer that a refit changes.

    Args:
        model: the smaller model.
        site: the MoE layer.
        options: whether biases are refitted and zeros kept.
    """

    def __init__(self, model: PreTrainedModel, site: MoESite, options: RefitOptions) -> None:
        self._model, self._site = model, site
        self._adapter = adapter_for(model.config)
        weights = self._adapter.expert_weights(model, site)
        down_EHI = weights["down"]
        self.has_bias = options.bias and "down_bias" in weights
        self._options = options
        self.size = LayerSize(len(down_EHI), down_EHI.shape[2] + self.has_bias, down_EHI.shape[1])

    @property
    def bytes(self) -> int:
        """Bytes of the refitted tensors."""
        weights = self._adapter.expert_weights(self._model, self._site)
        return weights["down"].numel() * weights["down"].element_size()

    @property
    def weights(self) -> Weights:
        """What the layer's problem must know; looks at every weight for fixed zeros."""
        down_EHI = self._adapter.expert_weights(self._model, self._site)["down"]
        return Weights(self.size, self._site.top_k, self._support(down_EHI, self._options))

    def add_(self, update_EDH: Tensor) -> None:
        """Add an update ``(E, D, H)``; the sum is rounded once, to the weights' dtype."""
        values = self.read()
        width = values["down"].shape[2]
        for expert, own_DH in enumerate(update_EDH):
            down = values["down"][expert]
            update_DH = own_DH.to(down.device, torch.float64)
            down.copy_(down.double() + update_DH[:width].T)
            if self.has_bias:
                bias = values["down_bias"][expert]
                bias.copy_(bias.double() + update_DH[width])
        self.write_(values)

    def read(self) -> dict[str, Tensor]:
        """Return copies of the refitted tensors, in their own dtype."""
        weights = self._adapter.expert_weights(self._model, self._site)
        names = ("down", "down_bias") if self.has_bias else ("down",)
        return {name: weights[name].detach().clone() for name in names}

    def write_(self, values: dict[str, Tensor]) -> None:
        """Write tensors as :meth:`read` gives them."""
        self._adapter.set_expert_weights_(self._model, self._site, values)

    def _support(self, down_EHI: Tensor, options: RefitOptions) -> Tensor | None:
        zeros = 1 - int(torch.count_nonzero(down_EHI)) / down_EHI.numel()
        if not options.keep_zeros or zeros < _SPARSE:
            return None
        support = (down_EHI != 0).transpose(1, 2)
        if self.has_bias:
            support = torch.cat([support, torch.ones_like(support[:, :1])], dim=1)
        return support


class Snapshot:
    """The weights that a refit may change, as they are now; on disk where they are large.

    Args:
        model: the smaller model.
        sites: its layers that are refitted.
        options: what may be held in memory.
        folder: for what may not; None for the system's temporary folder.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Sequence[MoESite],
        options: RefitOptions,
        folder: Path | None = None,
    ) -> None:
        adapter = adapter_for(model.config)
        self._rows = [adapter.router_weight(model, s) for s in sites] if options.router else []
        self._row_values = [rows.detach().clone() for rows in self._rows]
        self._down = {site.name: DownProjections(model, site, options) for site in sites}
        self._values: dict[str, dict[str, Tensor]] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        if sum(down.bytes for down in self._down.values()) > options.undo_bytes:
            self._folder = tempfile.TemporaryDirectory(prefix="lit-moe-refit-", dir=folder)
        for name, down in self._down.items():
            if self._folder is None:
                self._values[name] = down.read()
            else:
                values = {k: v.cpu().contiguous() for k, v in down.read().items()}
                save_file(values, self._file(name))

    @torch.no_grad()
    def restore_(self) -> None:
        """Put them back."""
        for name, down in self._down.items():
            on_disk = self._folder is not None
            down.write_(load_file(self._file(name)) if on_disk else self._values[name])
        for rows, own in zip(self._rows, self._row_values, strict=True):
            rows.copy_(own)

    def _file(self, name: str) -> str:
        assert self._folder is not None
        return f"{self._folder.name}/{name}.safetensors"


def own_down_projections(
    student: PreTrainedModel, teacher: PreTrainedModel, sites: Sequence[MoESite]
) -> None:
    """Give the student memory of its own for what will change, where it shares the teacher's."""
    adapter = adapter_for(student.config)
    shared = {_memory(parameter) for parameter in teacher.parameters()}
    for site in sites:
        weights = adapter.expert_weights(student, site)
        changing = {_memory(weights[n]) for n in ("down", "down_bias") if n in weights}
        changing.add(_memory(adapter.router_weight(student, site)))
        stacked = changing & shared
        for module in {student.get_submodule(site.experts), student.get_submodule(site.router)}:
            for parameter in module.parameters():
                # Families with a module per expert give copies, so all their matrices count.
                if _memory(parameter) in (stacked or shared):
                    parameter.data = parameter.data.clone()


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
