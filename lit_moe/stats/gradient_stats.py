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
        count: tokens routed to each expert, predicted or not, shape ``(E,)``.
    """

    gram: Tensor
    deviation: Tensor
    outlier_count: Tensor
    count: Tensor

    @property
    def num_experts(self) -> int:
        """Routed experts of the layer."""
        return len(self.gram)

    @property
    def unrouted(self) -> tuple[int, ...]:
        """Ids of the experts that saw no token."""
        return tuple((self.count == 0).nonzero().flatten().tolist())


@dataclass(frozen=True)
class GradientObservation:
    """What one pass of gradients left behind.

    Attributes:
        layers: layer name -> :class:`GradientStats`, in the order of the model's layers.
        tokens: seen, over all ranks, padding excluded; with an encoder, of the longer side.
        predicted: tokens among them that the loss is on; with labels those that have one.
    """

    layers: Mapping[str, GradientStats]
    tokens: int
    predicted: int

    @property
    def num_experts(self) -> dict[str, int]:
        """Layer name -> number of routed experts."""
        return {name: stats.num_experts for name, stats in self.layers.items()}

    @property
    def unrouted(self) -> dict[str, tuple[int, ...]]:
        """Layer name -> experts that saw no token, only for layers that have some.

        One that served prompts alone is not among them, though its gradient may be 0.
        """
        return {name: s.unrouted for name, s in self.layers.items() if s.unrouted}


def layer_stats(
    model: PreTrainedModel, site: MoESite, gradients: Mapping[str, Tensor], count: Tensor
) -> GradientStats:
    """Reduce the gradients of one layer's experts to a few numbers of each.

    Args:
        model: the model; what it holds is the same afterwards.
        site: the MoE layer.
        gradients: parameter name -> gradient, for all parameters of the layer's experts.
        count: tokens routed to each expert, shape ``(E,)``.
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
        gram_of_experts(views).cpu(),
        torch.stack(deviation).cpu(),
        torch.stack(outliers).cpu(),
        count.cpu(),
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
