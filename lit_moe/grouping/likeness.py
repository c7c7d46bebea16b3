"""How alike the outputs of a layer's experts are on the same tokens, in bounded memory.

T tokens, E experts, H hidden; a window is a run of tokens between which kernels are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lit_moe.errors import CalibrationError
from lit_moe.grouping.memory import WINDOW, Blocks

FEWEST = 4  # tokens that an unbiased estimate between kernels needs


@dataclass
class OutputSums:
    """Sums over the tokens of one layer, float64.

    Attributes:
        tokens: that were looked at.
        alignment: sum over windows of :func:`kernel_alignment`, shape ``(E, E)``.
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

    def add_(
        self,
        outputs_ETH: Tensor,
        windows: Sequence[int] | None = None,
        *,
        kernels: bool = True,
        cosines: bool = True,
        rows: int = 64,
    ) -> None:
        """Add the outputs on T tokens, which are overwritten.

        Args:
            outputs_ETH: float32.
            windows: lengths that sum to T; None: one window.
            kernels: whether alignments are wanted; else they stay 0.
            cosines: whether cosines are wanted; else they stay 0.
            rows: of all kernels that are held at a time.
        """
        self.tokens += outputs_ETH.shape[1]
        self.output += outputs_ETH.sum(dim=1, dtype=torch.float64)
        if cosines:
            length_ET1 = torch.linalg.vector_norm(outputs_ETH, dim=2, keepdim=True)
            length_ET1.clamp_(min=1e-30)
            outputs_ETH /= length_ET1
            flat = outputs_ETH.view(len(outputs_ETH), -1)
            self.cosine += (flat @ flat.T).double()
            if kernels:
                outputs_ETH *= length_ET1
        if kernels:
            for window_ETH in outputs_ETH.split(windows or [outputs_ETH.shape[1]], dim=1):
                self.alignment += _kernel_alignment_(window_ETH, rows)

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


def kernel_alignment(outputs_ETH: Tensor, *, rows: int = 64) -> Tensor:
    """Return ``T (T - 3)`` times the unbiased HSIC of linear kernels, shape ``(E, E)``, float64.

    ``tr(K L) + 1'K1 1'L1 / ((T - 1) (T - 2)) - 2 / (T - 2) 1'KL1`` of the kernels ``K_i = Phi_i
    Phi_i'`` with their diagonals set to 0 (Song et al. 2012, equation 4). Its mean does not depend
    on T, so that sums over short windows estimate what all tokens at once would give (arXiv
    2010.15327, which compares layers so): a window of 128 tokens costs ``128 E H`` operations per
    token instead of ``T E H``. The biased estimate is too large on few tokens.

    Args:
        outputs_ETH: float32, T at least 4.
        rows: of all kernels that are held at a time.
    """
    return _kernel_alignment_(outputs_ETH.clone(), rows)


def linear_cka(alignment_EE: Tensor) -> Tensor:
    """Return ``A_ij / sqrt(A_ii A_jj)`` clamped to [0, 1], shape ``(E, E)``, symmetric.

    An expert whose outputs do not vary is like itself only.

    Source: Kornblith et al., arXiv 1905.00414; as a similarity of experts, arXiv 2407.09590.

    Args:
        alignment_EE: see :class:`OutputSums`.
    """
    lengths = alignment_EE.diagonal().clamp(min=0).sqrt()
    products = lengths[:, None] * lengths[None, :]
    ratio = torch.where(products > 0, alignment_EE / products, torch.zeros_like(products))
    return ((ratio + ratio.T) / 2).clamp(0, 1).fill_diagonal_(1)


@torch.no_grad()
def observe_outputs(
    hidden_TH: Tensor,
    outputs_of: Callable[[Tensor], Tensor],
    *,
    num_experts: int,
    blocks: Blocks | None = None,
    kernels: bool = True,
    cosines: bool = True,
) -> OutputSums:
    """Return the sums over all tokens.

    Collective: ranks share the windows. Where memory holds 128 tokens, windows are the same
    whatever the memory and the number of ranks; shorter ones make ``cka`` a little noisier.

    Args:
        hidden_TH: the same on every rank.
        outputs_of: ``(T, H) -> (E, T, H)``, float32.
        num_experts: E.
        blocks: how much is held at a time.
        kernels: whether alignments are wanted.
        cosines: whether cosines are wanted.

    Raises:
        CalibrationError: if alignments are wanted of fewer than four tokens.
    """
    blocks, (num_tokens, hidden) = blocks or Blocks(), hidden_TH.shape
    if kernels and num_tokens < FEWEST:
        raise CalibrationError(
            f"cka compares experts on at least {FEWEST} tokens, there are {num_tokens}; give more "
            "calibration text"
        )
    sums = OutputSums.zeros(num_experts, hidden, hidden_TH.device)
    rank, world_size = 0, 1
    if dist.is_available() and dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
    windows = _window_lengths(num_tokens, min(WINDOW, blocks.tokens))
    pieces = hidden_TH.split(windows)
    each = min(max(1, blocks.tokens // max(windows)), -(-len(windows) // world_size))
    for run in _runs(len(windows), each, rank, world_size):
        outputs_ETH = outputs_of(torch.cat(pieces[run]))
        sums.add_(outputs_ETH, windows[run], kernels=kernels, cosines=cosines, rows=blocks.rows)
        del outputs_ETH
    return sums.reduce()


def _window_lengths(num_tokens: int, most: int) -> list[int]:
    """Return lengths that differ by one at most and sum to ``num_tokens``.

    >>> _window_lengths(300, 128)
    [100, 100, 100]
    """
    count = -(-num_tokens // most)
    return [num_tokens // count + (i < num_tokens % count) for i in range(count)]


def _runs(count: int, each: int, rank: int, world_size: int) -> Iterator[slice]:
    """Yield this rank's runs of ``each`` neighbours among ``count`` windows."""
    for start in range(rank * each, count, world_size * each):
        yield slice(start, start + each)


def _kernel_alignment_(outputs_ETH: Tensor, rows: int) -> Tensor:
    """As :func:`kernel_alignment`, of outputs that are overwritten."""
    num_experts, num_tokens = outputs_ETH.shape[:2]
    outputs_ETH -= outputs_ETH.mean(dim=1, keepdim=True)
    # Experts may differ in scale by orders of magnitude; products are taken in float32.
    scale_E = torch.linalg.vector_norm(outputs_ETH, dim=(1, 2)) / num_tokens**0.5
    scale_E = scale_E.clamp(min=1e-30)
    outputs_ETH /= scale_E[:, None, None]
    total = torch.zeros(num_experts, num_experts, dtype=torch.float64, device=scale_E.device)
    for start in range(0, num_tokens, rows):
        rows_ERH = outputs_ETH[:, start : start + rows]
        # Kernels are symmetric: what lies right of the diagonal counts twice.
        kernel_ERT = torch.bmm(rows_ERH, outputs_ETH[:, start:].transpose(1, 2))
        kernel_ERT[:, :, rows_ERH.shape[1] :] *= 2**0.5
        flat = kernel_ERT.view(num_experts, -1)
        total += (flat @ flat.T).double()
        del kernel_ERT, flat
    # Rows of a centred kernel sum to 0, so without the diagonal they sum to minus the diagonal.
    diagonal_ET = torch.linalg.vector_norm(outputs_ETH, dim=2).double().square()
    trace_E = diagonal_ET.sum(dim=1)
    total -= (1 + 2 / (num_tokens - 2)) * diagonal_ET @ diagonal_ET.T
    total += trace_E[:, None] * trace_E[None, :] / ((num_tokens - 1) * (num_tokens - 2))
    square_E = scale_E.double().square()
    return total * square_E[:, None] * square_E[None, :]
