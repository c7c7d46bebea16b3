"""How alike the outputs of a layer's experts are on the same tokens, in bounded memory.

T tokens, E experts, H hidden; a window is the run of tokens whose outputs are held at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

_ROWS = 64  # rows of the kernels of all experts at a time


@dataclass
class OutputSums:
    """Sums over the tokens of one layer, float64.

    Attributes:
        tokens: that were looked at.
        alignment: sum over windows of ``<H K_i H, H K_j H>``, shape ``(E, E)``, where ``K_i`` is
            the linear kernel of the window's outputs of expert ``i`` and ``H`` centres it.
        cosine: sum over tokens of the cosine between two experts' outputs, shape ``(E, E)``.
        output: sum over tokens of each expert's output, shape ``(E, H)``.
    """

    tokens: Tensor
    alignment: Tensor
    cosine: Tensor
    output: Tensor

    @classmethod
    def zeros(cls, num_experts: int, hidden: int, device: torch.device) -> OutputSums:
        """Return the sums over no token."""
        shapes = ((), (num_experts, num_experts), (num_experts, num_experts), (num_experts, hidden))
        return cls(*(torch.zeros(s, dtype=torch.float64, device=device) for s in shapes))

    def add(self, outputs_ETH: Tensor, *, kernels: bool = True) -> None:
        """Add one window; without ``kernels`` the alignment, which costs most, stays 0."""
        self.tokens += outputs_ETH.shape[1]
        self.output += outputs_ETH.sum(dim=1, dtype=torch.float64)
        if kernels:
            self.alignment += kernel_alignment(outputs_ETH)
        unit_ETH = torch.nn.functional.normalize(outputs_ETH, dim=2)
        flat = unit_ETH.reshape(len(unit_ETH), -1)
        self.cosine += (flat @ flat.T).double()

    def reduce(self) -> OutputSums:
        """Return the sums over all ranks, on the CPU. Collective."""
        for tensor in (self.tokens, self.alignment, self.cosine, self.output):
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(tensor)
        return OutputSums(
            self.tokens.cpu(), self.alignment.cpu(), self.cosine.cpu(), self.output.cpu()
        )

    @property
    def cka(self) -> Tensor:
        """Linear centred kernel alignment, shape ``(E, E)``, see :func:`linear_cka`."""
        return linear_cka(self.alignment)

    @property
    def mean_cosine(self) -> Tensor:
        """Mean cosine of the outputs, shape ``(E, E)``, in [-1, 1]."""
        mean = (self.cosine / self.tokens.clamp(min=1)).clamp(-1, 1)
        return ((mean + mean.T) / 2).fill_diagonal_(1)

    @property
    def mean_output(self) -> Tensor:
        """Mean output of each expert, shape ``(E, H)``."""
        return self.output / self.tokens.clamp(min=1)


def kernel_alignment(outputs_ETH: Tensor) -> Tensor:
    """Return ``<H K_i H, H K_j H>`` of the linear kernels over T tokens, shape ``(E, E)``, float64.

    Equals ``|| Phi_i^T Phi_j ||_F^2`` of the centred outputs, but costs ``E T^2 H`` instead of
    ``E^2 T H^2`` operations and no ``(H, H)`` matrix for each pair; kernels are made some rows at
    a time.
    """
    centred_ETH = outputs_ETH - outputs_ETH.mean(dim=1, keepdim=True)
    # Experts may differ in scale by orders of magnitude; products are taken in float32.
    scale_E = centred_ETH.square().mean(dim=(1, 2)).sqrt().clamp(min=1e-30)
    centred_ETH = centred_ETH / scale_E[:, None, None]
    num_experts = len(centred_ETH)
    total = torch.zeros(num_experts, num_experts, dtype=torch.float64, device=scale_E.device)
    for start in range(0, centred_ETH.shape[1], _ROWS):
        rows_ERH = centred_ETH[:, start : start + _ROWS]
        # Kernels are symmetric: what lies right of the diagonal counts twice.
        kernel_ERT = torch.bmm(rows_ERH, centred_ETH[:, start:].transpose(1, 2))
        kernel_ERT[:, :, rows_ERH.shape[1] :] *= 2**0.5
        flat = kernel_ERT.flatten(1)
        total += (flat @ flat.T).double()
    square_E = scale_E.double().square()
    return total * square_E[:, None] * square_E[None, :]


def linear_cka(alignment_EE: Tensor) -> Tensor:
    """Return ``A_ij / sqrt(A_ii A_jj)``, shape ``(E, E)``, symmetric, in [0, 1].

    An expert whose outputs do not vary is like itself only.

    Source: Kornblith et al., arXiv 1905.00414; as a similarity of experts, arXiv 2407.09590.

    Args:
        alignment_EE: see :class:`OutputSums`.
    """
    lengths = alignment_EE.diagonal().clamp(min=0).sqrt()
    products = lengths[:, None] * lengths[None, :]
    ratio = torch.where(products > 0, alignment_EE / products, torch.zeros_like(products))
    return ((ratio + ratio.T) / 2).clamp(0, 1).fill_diagonal_(1)


def observe_outputs(
    hidden_TH: Tensor,
    outputs_of: Callable[[Tensor], Tensor],
    *,
    num_experts: int,
    memory_gib: float,
    kernels: bool = True,
) -> OutputSums:
    """Return the sums over all tokens; one window if the budget allows, else several.

    Collective: ranks take turns at the windows. More windows mean kernels between fewer tokens:
    alignments are then sums over windows that are centred each by itself.

    Args:
        hidden_TH: the same on every rank.
        outputs_of: ``(T, H) -> (E, T, H)``, float32.
        num_experts: E.
        memory_gib: for the outputs and what is computed of them.
        kernels: whether alignments are wanted.
    """
    num_tokens, hidden = hidden_TH.shape
    sums = OutputSums.zeros(num_experts, hidden, hidden_TH.device)
    size = window_size(num_tokens, num_experts, hidden, memory_gib)
    rank, world_size = 0, 1
    if dist.is_available() and dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
    for window in hidden_TH.split(size)[rank::world_size]:
        sums.add(outputs_of(window), kernels=kernels)
    return sums.reduce()


def window_size(num_tokens: int, num_experts: int, hidden: int, memory_gib: float) -> int:
    """Return how many tokens can be held at once, in windows of about one size.

    Outputs, their centred and their normalised copy: 12 bytes per expert, token and dimension.
    """
    most = int(memory_gib * 2**30 / (12 * num_experts * hidden + 4 * num_experts * _ROWS))
    windows = -(-num_tokens // max(2, most))
    return -(-num_tokens // windows)
