"""What one rank holds in memory, as frozen values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lit_moe.errors import LitMoEError

Offload = Literal["none", "optimizer", "parameters", "both"]
Precision = Literal["bf16", "fp32"]


@dataclass(frozen=True)
class RankRequest:
    """Asks for the memory of one rank.

    Attributes:
        ranks: processes on all machines together, one per device.
        stage: of ZeRO: 1 shards the optimizer's state, 2 gradients too, 3 parameters too.
        offload: what lies on the host instead of the device.
        precision: of parameters and gradients; the optimizer works in fp32 either way.
        keep_ratio: fraction of the experts of each layer that stays, in (0, 1].
        teacher: whether the unpruned model is kept for distillation.
        tokens_per_rank: of one forward, for the estimate of activations; None leaves them out.

    Raises:
        LitMoEError: for numbers that no run could have, or an offload that the stage does not know.
    """

    ranks: int
    stage: int = 3
    offload: Offload = "none"
    precision: Precision = "bf16"
    keep_ratio: float = 0.5
    teacher: bool = False
    tokens_per_rank: int | None = None

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise LitMoEError(f"ranks={self.ranks}: there must be at least 1")
        if self.stage not in (1, 2, 3):
            raise LitMoEError(f"stage={self.stage} is no ZeRO stage; there are 1, 2 and 3")
        for name, kind in (("offload", Offload), ("precision", Precision)):
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise LitMoEError(f"{name}={getattr(self, name)!r} is unknown; known: {known}")
        if self.offloads_parameters and self.stage != 3:
            raise LitMoEError(
                f"offload={self.offload} moves parameters to the host, which only stage 3 does; "
                f"stage {self.stage} knows offload=optimizer"
            )
        if not 0 < self.keep_ratio <= 1:
            raise LitMoEError(f"keep_ratio={self.keep_ratio} must be in (0, 1]")
        if self.tokens_per_rank is not None and self.tokens_per_rank < 1:
            raise LitMoEError(f"tokens_per_rank={self.tokens_per_rank}: there must be at least 1")

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer's state lies on the host."""
        return self.offload in ("optimizer", "both")

    @property
    def offloads_parameters(self) -> bool:
        """Whether shards of parameters lie on the host."""
        return self.offload in ("parameters", "both")


@dataclass(frozen=True)
class Held:
    """Bytes that one rank holds, on its device and on the host."""

    device: int = 0
    host: int = 0

    def __add__(self, other: Held) -> Held:
        return Held(self.device + other.device, self.host + other.host)


@dataclass(frozen=True)
class Training:
    """What one rank holds while it trains, by part.

    Attributes:
        experts: smallest and largest number per layer.
        trained: parameters that take gradients, of the whole model.
        lasting: part -> bytes that are there all the time (gradients: from backward to step).
        backward: part -> bytes while forward and backward run.
        step: part -> bytes while the optimizer steps.
    """

    experts: tuple[int, int]
    trained: int
    lasting: dict[str, Held]
    backward: dict[str, Held]
    step: dict[str, Held]

    @property
    def parts(self) -> dict[str, Held]:
        """All parts; those of backward and of the step are never there together."""
        return {**self.lasting, **self.backward, **self.step}

    @property
    def peak(self) -> Held:
        """Most bytes at any time: what lasts, with the more of backward and step."""
        lasting, backward, step = (
            sum(parts.values(), Held()) for parts in (self.lasting, self.backward, self.step)
        )
        return lasting + Held(max(backward.device, step.device), max(backward.host, step.host))


@dataclass(frozen=True)
class Loading:
    """What one rank holds before training: while it loads (host) and observes (device).

    Attributes:
        shard_on_load: as in :class:`lit_moe.sharding.MoEDeepSpeed`.
        host: bytes of each rank; with ``shard_on_load`` those of rank 0, mapped from the checkpoint
            files, which the others do not read.
        device: bytes while the unpruned model runs over the calibration text.
    """

    shard_on_load: bool
    host: int
    device: int


@dataclass(frozen=True)
class RankNeeds:
    """The answer to a :class:`RankRequest`."""

    request: RankRequest
    whole: Training
    pruned: Training
    loading: tuple[Loading, ...]
