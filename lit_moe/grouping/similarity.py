"""How alike the experts of one layer are: one class per similarity, found by its name.

E experts, I expert width, H hidden, M matrices.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from lit_moe.errors import LitMoEError
from lit_moe.grouping.likeness import OutputSums
from lit_moe.stats.matrices import at_least_float32, cosines, gram_of_experts, matrices_of
from lit_moe.stats.observation import LayerStats

Need = Literal["outputs", "kernels", "cosines", "routing"]


@dataclass(frozen=True)
class LayerEvidence:
    """What is known of one layer.

    Attributes:
        weights: as ``MoEAdapter.expert_weights`` names them.
        router: router rows, shape ``(E, H)``.
        outputs: sums of all experts' outputs on the same tokens; None if not asked for.
        stats: what routing sent to each expert, with ``pair_count``; None if not asked for.
        memory_gib: that the similarity may take.
    """

    weights: Mapping[str, Tensor]
    router: Tensor
    outputs: OutputSums | None = None
    stats: LayerStats | None = None
    memory_gib: float = 2.0


class Similarity(ABC):
    """Rates pairs of experts; higher = more alike. Scale and offset do not matter.

    ``needs`` says what has to be gathered: all experts' ``outputs`` on the same tokens (and their
    ``kernels`` or ``cosines``), or what ``routing`` does.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    name: ClassVar[str] = ""

    @abstractmethod
    def of(self, evidence: LayerEvidence) -> Tensor:
        """Return shape ``(E, E)``, float64, symmetric, on the CPU."""


S = TypeVar("S", bound=type[Similarity])
_SIMILARITIES: dict[str, type[Similarity]] = {}


def register(name: str) -> Callable[[S], S]:
    """Give a class a name by which configs find it."""

    def add(similarity: S) -> S:
        similarity.name = name
        _SIMILARITIES[name] = similarity
        return similarity

    return add


def get_similarity(name: str) -> Similarity:
    """Return the similarity of a name.

    Raises:
        LitMoEError: if there is none, naming those that there are.
    """
    if name not in _SIMILARITIES:
        raise LitMoEError(f"similarity={name!r} is unknown; there are {', '.join(available())}")
    return _SIMILARITIES[name]()


def available() -> tuple[str, ...]:
    """Return the names of all similarities."""
    return tuple(sorted(_SIMILARITIES))


@register("cka")
class CKA(Similarity):
    """Linear centred kernel alignment of outputs on the same tokens, in [0, 1]; arXiv 2407.09590.

    Estimated without bias, see :func:`lit_moe.grouping.likeness.kernel_alignment`. Root mean square
    errors on three models against the exact value on 16,384 tokens (mean .12 to .16, spread over
    pairs .02 to .03): .006 to .010 on 2,048 tokens, .010 to .015 on 768, .016 to .021 on 384.
    Blind to rotation and scale of the outputs, so that two alike experts need not average well.
    """

    needs = frozenset({"outputs", "kernels"})

    def of(self, evidence: LayerEvidence) -> Tensor:
        """Return the alignments, see the base class."""
        return _outputs(evidence, self.name).cka


@register("output_cosine")
class OutputCosine(Similarity):
    """Mean over tokens of the cosine between two experts' outputs, in [-1, 1]."""

    needs = frozenset({"outputs", "cosines"})

    def of(self, evidence: LayerEvidence) -> Tensor:
        """Return the mean cosines, see the base class."""
        return _outputs(evidence, self.name).mean_cosine


@register("mean_output")
class MeanOutput(Similarity):
    """Minus the Euclidean distance of the mean outputs, as in HC-SMoE (arXiv 2410.08589)."""

    needs = frozenset({"outputs"})

    def of(self, evidence: LayerEvidence) -> Tensor:
        """Return the negative distances, see the base class."""
        mean_EH = _outputs(evidence, self.name).mean_output
        return -torch.cdist(mean_EH, mean_EH, compute_mode="donot_use_mm_for_euclid_dist")


@register("weights")
class WeightDistance(Similarity):
    """Minus the mean squared difference of all matrices of an expert, one after the other."""

    def of(self, evidence: LayerEvidence) -> Tensor:
        """Return the negative distances, see the base class."""
        numbers = sum(matrix[0].numel() for matrix in matrices_of(evidence.weights))
        return _minus_squares(gram_of_experts(evidence.weights)) / numbers


@register("surrogate")
class Surrogate(Similarity):
    """Minus the mean squared difference of ``W_down (W_gate * W_up)``, one matrix per expert.

    The product in brackets is elementwise. Experts without a gate: ``W_down W_up``. A data-free
    stand-in for what an expert does, arXiv 2407.09590 (section A.2 of our notes on it).
    """

    def of(self, evidence: LayerEvidence) -> Tensor:
        """Return the negative distances, see the base class."""
        up_EIH, down_EHI = evidence.weights["up"], evidence.weights["down"]
        num_experts, _, hidden = up_EIH.shape
        gram = torch.zeros(num_experts, num_experts, dtype=torch.float64, device=up_EIH.device)
        for columns in torch.arange(hidden).split(_surrogate_columns(evidence)):
            block_EHC = _surrogate_block(evidence.weights, slice(columns[0], columns[-1] + 1))
            flat = block_EHC.flatten(1)
            gram += (flat @ flat.T).double()
            del block_EHC, flat
        return _minus_squares(gram) / (down_EHI.shape[1] * hidden)


@register("router")
class RouterCosine(Similarity):
    """Cosine of router rows, in [-1, 1]: experts that are asked by the same tokens."""

    def of(self, evidence: LayerEvidence) -> Tensor:
        """Return the cosines, see the base class."""
        rows_EH = evidence.router.detach().double()
        return cosines(rows_EH @ rows_EH.T).cpu()


@register("coactivation")
class Coactivation(Similarity):
    """Tokens sent to both experts over tokens sent to either, in [0, 1]."""

    needs = frozenset({"routing"})

    def of(self, evidence: LayerEvidence) -> Tensor:
        """Return the overlaps, see the base class."""
        stats = evidence.stats
        if stats is None or stats.pair_count is None:
            raise LitMoEError("similarity 'coactivation' needs an observation that gathers pairs")
        both = stats.pair_count
        either = stats.count[:, None] + stats.count[None, :] - both
        return torch.where(either > 0, both / either, torch.zeros_like(both)).fill_diagonal_(1)


@register("ream")
class OutputAndRouter(Similarity):
    """Mean of the cosines of outputs and of router rows: alike in what they do and when."""

    needs = frozenset({"outputs", "cosines"})

    def of(self, evidence: LayerEvidence) -> Tensor:
        """Return the means, see the base class."""
        return (OutputCosine().of(evidence) + RouterCosine().of(evidence)) / 2


def _surrogate_columns(evidence: LayerEvidence) -> int:
    """Return how many columns of the surrogates of all experts the budget holds.

    Beside them, copies of one expert's matrices may be needed.

    Raises:
        LitMoEError: if it holds none, naming what it takes.
    """
    num_experts, width, hidden = evidence.weights["up"].shape
    each = 8 if evidence.weights["up"].dtype == torch.float64 else 4
    column, copies = each * (num_experts * hidden + hidden + 3 * width), each * 2 * width * hidden
    fixed = copies + 40 * num_experts**2
    if evidence.memory_gib * 2**30 < fixed + column:
        raise LitMoEError(
            f"memory_gib={evidence.memory_gib:g} does not hold the surrogates of {num_experts} "
            f"experts, not even one column of each; give at least {(fixed + column) / 2**30:.3g}"
        )
    return min(hidden, int((evidence.memory_gib * 2**30 - fixed) / column))


def _surrogate_block(weights: Mapping[str, Tensor], columns: slice) -> Tensor:
    """Return some columns C of each expert's surrogate, shape ``(E, H, C)``."""
    down_EHI = weights["down"]
    block_EHC: Tensor | None = None
    for expert, down_HI in enumerate(down_EHI):
        inner_IC = at_least_float32(weights["up"][expert][:, columns])
        if "gate" in weights:
            inner_IC = inner_IC * at_least_float32(weights["gate"][expert][:, columns])
        product_HC = at_least_float32(down_HI) @ inner_IC
        if block_EHC is None:
            block_EHC = product_HC.new_empty(len(down_EHI), *product_HC.shape)
        block_EHC[expert] = product_HC
    assert block_EHC is not None
    return block_EHC


def _minus_squares(gram_EE: Tensor) -> Tensor:
    """Return minus the squared distances of vectors from their inner products."""
    square_E = gram_EE.diagonal()
    distance = square_E[:, None] + square_E[None, :] - gram_EE - gram_EE.T
    return -distance.clamp(min=0).fill_diagonal_(0).cpu()


def _outputs(evidence: LayerEvidence, name: str) -> OutputSums:
    if evidence.outputs is None:
        raise LitMoEError(f"similarity {name!r} needs the outputs of all experts on some text")
    return evidence.outputs
