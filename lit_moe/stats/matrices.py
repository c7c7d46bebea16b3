"""An expert's matrices as one object: inner products between experts, rows by hidden dimension.

E experts, I expert width, H hidden, M matrices (gate where there is one, up, down).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

MATRICES = ("gate", "up", "down")

# Elements cast to float64 at a time: bounds the extra memory to 32 MiB whatever the model.
CHUNK = 1 << 22
PRODUCTS = 1 << 13  # terms of an inner product that are added up in float32


def matrices_of(weights: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the matrices among what ``MoEAdapter.expert_weights`` names, without biases."""
    return [weights[key] for key in MATRICES if key in weights]


def gram_of_experts(weights: Mapping[str, Tensor]) -> Tensor:
    """Return inner products of the flattened, concatenated matrices, shape ``(E, E)``, float64.

    Args:
        weights: any of ``gate``, ``up``, ``down``, each ``(E, ., .)``; other keys are ignored.
            Products of float32 or less are taken in float32, a few thousand at a time, and added
            up in float64.

    >>> gram_of_experts({"up": torch.tensor([[[3.0]], [[1.0]]])}).tolist()
    [[9.0, 3.0], [3.0, 1.0]]
    """
    matrices = matrices_of(weights)
    num_experts = len(matrices[0])
    gram = torch.zeros(num_experts, num_experts, dtype=torch.float64, device=matrices[0].device)
    for matrix in matrices:
        rows = max(1, PRODUCTS // matrix.shape[2])
        for piece in matrix.split(rows, dim=1):
            flat = at_least_float32(piece.reshape(num_experts, -1))
            gram += flat @ flat.T
    return gram


def cosines(gram_EE: Tensor) -> Tensor:
    """Return cosines from inner products, shape ``(E, E)``; 0 where a vector is 0."""
    lengths = gram_EE.diagonal().sqrt()
    products = lengths[:, None] * lengths[None, :]
    return torch.where(products > 0, gram_EE / products, torch.zeros_like(gram_EE))


def neuron_rows(weights: Mapping[str, Tensor], expert: int) -> Tensor:
    """Return gate, up and transposed down of one expert, shape ``(M I, H)``, float32 or float64.

    Row by row what each neuron reads or writes; column by column what belongs to one hidden
    dimension.
    """
    parts = [weights[key][expert] for key in MATRICES if key in weights]
    return torch.cat([at_least_float32(part) for part in (*parts[:-1], parts[-1].T)])


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a tensor in float64 if it is, else in float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
