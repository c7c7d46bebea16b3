"""What an inspection finds, as frozen values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lit_moe.inspection.ranks import RankNeeds


@dataclass(frozen=True)
class Layer:
    """One MoE layer.

    Attributes:
        name: dotted path of the block.
        num_experts: routed experts.
        top_k: experts per token.
        num_groups: groups of group-limited routing, 1 if there are none.
        top_k_groups: groups that a token may use.
        num_shared: experts that every token uses.
        routing: ``softmax``, ``sigmoid`` or ``custom``.
        renormalised: whether the chosen weights are divided by their sum; None if it depends.
        legal_counts: expert counts that the router can work with, ascending.
    """

    name: str
    num_experts: int
    top_k: int
    num_groups: int
    top_k_groups: int
    num_shared: int
    routing: str
    renormalised: bool | None
    legal_counts: tuple[int, ...]


@dataclass(frozen=True)
class Size:
    """Parameters (with persistent buffers) and their bytes in the dtype of the config."""

    parameters: int
    bytes: int


@dataclass(frozen=True)
class Saving:
    """What keeping about ``keep_ratio`` of the experts of every layer would leave.

    Attributes:
        keep_ratio: asked for.
        experts: smallest and largest legal number per layer that is nearest to it.
        parameters: of the whole model.
        bytes: of the whole model.
        saved_bytes: compared with now.
        size_ratio: bytes then over bytes now.
    """

    keep_ratio: float
    experts: tuple[int, int]
    parameters: int
    bytes: int
    saved_bytes: int
    size_ratio: float


@dataclass(frozen=True)
class RefitRequest:
    """Asks for the memory of a closed-form refit.

    Attributes:
        tokens: calibration tokens.
        memory_gib: as in :class:`lit_moe.refit.RefitOptions`.
    """

    tokens: int = 65536
    memory_gib: float = 4.0


@dataclass(frozen=True)
class RefitNeeds:
    """What a closed-form refit would hold beside teacher and student; bytes, of the largest layer.

    Attributes:
        mode: ``sequential`` or ``parallel``.
        keep_ratio: of the experts of each layer.
        solver: that would be taken, ``none`` if none fits.
        matrices: Gram matrices, factors and solutions.
        features: in memory.
        on_disk: features and copies in the system's temporary folder.
        streams: hidden states of all calibration tokens, about. A sequential refit on a CPU holds
            some 10 MB more for each batch and model: buffers of the math library, and fragments.
        undo: copies of the weights that change, until the refit is judged.
        reason: why this solver, or what would have to change.
    """

    mode: str
    keep_ratio: float
    solver: str
    matrices: int
    features: int
    on_disk: int
    streams: int
    undo: int
    reason: str

    @property
    def memory(self) -> int:
        """Bytes in memory at the same time."""
        return self.matrices + self.features + self.streams + self.undo


@dataclass(frozen=True)
class Inspection:
    """What ``inspect_model`` found.

    Attributes:
        name: folder or hub id.
        family: model type.
        architecture: class that loads it.
        dtype: of the weights, as the config says.
        layers: the MoE layers.
        dense_layers: layers of the same stack without experts.
        parameters: of the whole model, shared ones once.
        active_parameters: that one token meets; embeddings and head count in full.
        parts: part -> size; sums up to the whole.
        savings: one for each keep ratio.
        notes: sentences that a reader of the numbers must know.
        refit: what closed-form refits would need, if that was asked for.
        ranks: what one rank of a sharded run would hold, if that was asked for.
    """

    name: str
    family: str
    architecture: str
    dtype: str
    layers: tuple[Layer, ...]
    dense_layers: int
    parameters: int
    active_parameters: int
    parts: Mapping[str, Size]
    savings: tuple[Saving, ...]
    notes: tuple[str, ...] = ()
    refit: tuple[RefitNeeds, ...] = ()
    ranks: RankNeeds | None = None

    @property
    def bytes(self) -> int:
        """Bytes of the whole model."""
        return sum(size.bytes for size in self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        values = {**dataclasses.asdict(self), "bytes": self.bytes}
        if self.ranks is not None:
            for moment in ("whole", "pruned"):
                peak = getattr(self.ranks, moment).peak
                values["ranks"][moment]["peak"] = dataclasses.asdict(peak)
        return values


def nearest(legal: Sequence[int], wanted: float) -> int:
    """Return the legal count nearest to ``wanted``, of two equally near the larger."""
    return min(legal, key=lambda count: (abs(count - wanted), -count))
