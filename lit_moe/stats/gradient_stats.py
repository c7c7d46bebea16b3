"""The few numbers per expert that remain of the gradients of a pass.

E experts, I expert width, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_moe.adapters import adapter_for
from lit_moe.adapters.site import MoESite
from lit_moe.stats.gathered import outliers_per_row
from lit_moe.stats.matrices import gram_of_experts, neuron_rows


@dataclass(frozen=True)
class GradientStats:
    """One MoE layer; tensors are float64, on the CPU.

    ``G_e`` is the gradient of the mean next-token loss with respect to the matrices of expert
    ``e``; in its rows by neuron each row has H entries, as many rows as matrices times width.

    Attributes:
        gram: inner products of the flattened ``G_e``, shape ``(E, E)``.
        deviation: (population) standard deviation of the entries of ``G_e`` that belong to one
            hidden dimension, shape ``(E, H)``.
        outlier_count: entries further from the mean of their row by neuron than three of its
            standard deviations, shape ``(E,)``.
    """

    gram: Tensor
    deviation: Tensor
    outlier_count: Tensor

    @property
    def num_experts(self) -> int:
        """Routed experts of the layer."""
        return len(self.gram)


@dataclass(frozen=True)
class GradientObservation:
    """What one pass of gradients left behind.

    Attributes:
        layers: layer name -> :class:`GradientStats`, in the order of the model's layers.
        tokens: predicted tokens, over all ranks; with labels those that have one.
    """

    layers: Mapping[str, GradientStats]
    tokens: int

    @property
    def num_experts(self) -> dict[str, int]:
        """Layer name -> number of routed experts."""
        return {name: stats.num_experts for name, stats in self.layers.items()}

    @property
    def unrouted(self) -> dict[str, tuple[int, ...]]:
        """Layer name -> experts without any gradient, as those are that saw no token."""
        found = {
            name: tuple((stats.gram.diagonal() == 0).nonzero().flatten().tolist())
            for name, stats in self.layers.items()
        }
        return {name: ids for name, ids in found.items() if ids}


def layer_stats(
    model: PreTrainedModel, site: MoESite, gradients: Mapping[str, Tensor]
) -> GradientStats:
    """Reduce the gradients of one layer's experts to a few numbers of each.

    Args:
        model: the model; what it holds is the same afterwards.
        site: the MoE layer.
        gradients: parameter name -> gradient, for all parameters of the layer's experts.
    """
    adapter = adapter_for(model.config)
    with _standing_in(model, gradients), torch.no_grad():
        views = adapter.expert_weights(model, site)
    deviation, outliers = [], []
    for expert in range(site.num_experts):
        rows_NH = neuron_rows(views, expert)
        deviation.append(_deviation_of_columns(rows_NH))
        outliers.append(outliers_per_row(rows_NH).sum(dtype=torch.float64))
    return GradientStats(
        gram_of_experts(views).cpu(), torch.stack(deviation).cpu(), torch.stack(outliers).cpu()
    )


def _deviation_of_columns(rows_NH: Tensor) -> Tensor:
    """Return the population standard deviation of each column, shape ``(H,)``, float64."""
    centred = rows_NH - rows_NH.mean(dim=0)
    return centred.square_().mean(dim=0).double().sqrt()


@contextmanager
def _standing_in(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Put tensors in the place of the parameters of the same names, for an adapter to read."""
    places = []
    for name, tensor in tensors.items():
        path, _, last = name.rpartition(".")
        owner = model.get_submodule(path)
        places.append((owner, last, owner._parameters[last]))
        owner._parameters[last] = nn.Parameter(tensor, requires_grad=False)
    try:
        yield
    finally:
        for owner, last, own in places:
            owner._parameters[last] = own
