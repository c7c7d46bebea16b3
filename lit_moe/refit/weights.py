"""Reads and writes the down projections of one layer as one tensor of solutions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
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
    def weights(self) -> Weights:
        """What the layer's problem must know; looks at every weight for fixed zeros."""
        down_EHI = self._adapter.expert_weights(self._model, self._site)["down"]
        return Weights(self.size, self._site.top_k, self._support(down_EHI, self._options))

    def add_(self, update_EDH: Tensor) -> None:
        """Add an update ``(E, D, H)``; the sum is rounded once, to the weights' dtype."""
        values = self.read()
        width = values["down"].shape[2]
        new = {"down": values["down"] + update_EDH[:, :width].transpose(1, 2).to(torch.float64)}
        if self.has_bias:
            new["down_bias"] = values["down_bias"] + update_EDH[:, width].to(torch.float64)
        self.write_(new)

    def read(self) -> dict[str, Tensor]:
        """Return copies of the refitted tensors, in float64."""
        weights = self._adapter.expert_weights(self._model, self._site)
        names = ("down", "down_bias") if self.has_bias else ("down",)
        return {name: weights[name].detach().to(torch.float64, copy=True) for name in names}

    def write_(self, values: dict[str, Tensor]) -> None:
        """Write tensors as :meth:`read` gives them."""
        self._adapter.set_expert_weights_(self._model, self._site, values)

    def _support(self, down_EHI: Tensor, options: RefitOptions) -> Tensor | None:
        zeros = float((down_EHI == 0).double().mean())
        if not options.keep_zeros or zeros < _SPARSE:
            return None
        support = (down_EHI != 0).transpose(1, 2)
        if self.has_bias:
            support = torch.cat([support, torch.ones_like(support[:, :1])], dim=1)
        return support


class Snapshot:
    """The weights that a refit may change, as they are now."""

    def __init__(
        self, model: PreTrainedModel, sites: Sequence[MoESite], options: RefitOptions
    ) -> None:
        adapter = adapter_for(model.config)
        self._down = [DownProjections(model, site, options) for site in sites]
        self._values = [down.read() for down in self._down]
        self._rows = [adapter.router_weight(model, s) for s in sites] if options.router else []
        self._row_values = [rows.detach().clone() for rows in self._rows]

    @torch.no_grad()
    def restore_(self) -> None:
        """Put them back."""
        for down, values in zip(self._down, self._values, strict=True):
            down.write_(values)
        for rows, own in zip(self._rows, self._row_values, strict=True):
            rows.copy_(own)


def own_down_projections(
    student: PreTrainedModel, teacher: PreTrainedModel, sites: Sequence[MoESite]
) -> None:
    """Give the student memory of its own for what will change, where it shares the teacher's."""
    shared = {parameter.data_ptr() for parameter in teacher.parameters()}
    for site in sites:
        for parameter in student.get_submodule(site.name).parameters():
            if parameter.data_ptr() in shared and parameter.ndim >= 2:
                parameter.data = parameter.data.clone()
