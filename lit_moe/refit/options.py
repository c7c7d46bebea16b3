"""What a user may ask of a refit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lit_moe.errors import LitMoEError

Mode = Literal["sequential", "parallel"]
Kind = Literal["stream", "block"]
Weighting = Literal["relative", "equal"]
Solver = Literal["auto", "joint", "jacobi", "gauss_seidel"]


@dataclass(frozen=True)
class RefitOptions:
    """How a refit goes about it; the defaults suit most models.

    Attributes:
        mode: ``sequential`` corrects each layer on what the refitted layers before it give, and
            corrects their errors too; ``parallel`` fits every layer on the unpruned model's own
            inputs, from one pass, and is faster.
        target: ``stream`` makes the residual stream behind each layer equal to the teacher's,
            ``block`` the output of the block by itself; ``stream`` needs ``sequential`` and gives
            way to ``block`` in layers whose output is no plain sum.
        solver: ``joint`` over all experts, ``jacobi`` or ``gauss_seidel`` expert by expert;
            ``auto`` takes the best that fits ``memory_gib``.
        lam: ridge penalty in units of the mean square feature, or ``auto``: chosen per layer on
            held-out tokens.
        token_weights: ``relative`` weighs each token by one over the mean square of its stream, as
            the norm of the next layer does (in layers fitted to the block's output: of that
            output); ``equal`` lets tokens of extreme size decide.
        held_out: fraction of the calibration rows that is not fitted on, in (0, 0.5]; one in a
            whole number of rows, so 0.4 means one in two.
        bias: refit the biases of down projections too, in families that have them.
        router: refit the routers' rows to the teacher's logits before the experts (``sequential``
            only).
        keep_zeros: in down projections with at least 2 % zeros (N:M or unstructured pruning) the
            zeros stay.
        memory_gib: in GiB: half for Gram matrices and solutions, a quarter for features, an eighth
            for copies of the old weights (both go to disk beyond that), the rest for the hidden
            states of waiting forwards, whose size the calibration tokens decide.
    """

    mode: Mode = "sequential"
    target: Kind = "stream"
    solver: Solver = "auto"
    lam: float | Literal["auto"] = "auto"
    token_weights: Weighting = "relative"
    held_out: float = 0.125
    bias: bool = True
    router: bool = False
    keep_zeros: bool = True
    memory_gib: float = 4.0

    def __post_init__(self) -> None:
        self._check_kinds()
        if self.lam != "auto" and not self.lam >= 0:
            raise LitMoEError(f"lam={self.lam:g} is negative; give a number >= 0 or auto")
        if not 0 < self.held_out <= 0.5:
            raise LitMoEError(f"held_out={self.held_out:g} must be in (0, 0.5], for instance 0.125")
        if self.memory_gib <= 0:
            raise LitMoEError(f"memory_gib={self.memory_gib:g} must be above 0")
        if self.router and self.mode == "parallel":
            raise LitMoEError(
                "router: true needs mode: sequential, since routers are refitted to the inputs "
                "that the refitted layers before them give"
            )

    def _check_kinds(self) -> None:
        for name, kind in (
            ("mode", Mode),
            ("target", Kind),
            ("solver", Solver),
            ("token_weights", Weighting),
        ):
            if getattr(self, name) not in get_args(kind):
                known = ", ".join(get_args(kind))
                raise LitMoEError(f"{name}={getattr(self, name)!r} is unknown; known: {known}")
        for name in ("lam", "held_out", "memory_gib"):
            value = getattr(self, name)
            if not isinstance(value, int | float) and (name, value) != ("lam", "auto"):
                raise LitMoEError(f"{name}={value!r} is not a number")

    @property
    def matrix_bytes(self) -> int:
        """Bytes for Gram matrices, factors and solutions."""
        return int(self.memory_gib * 2**29)

    @property
    def feature_bytes(self) -> int:
        """Bytes of features to hold in memory."""
        return int(self.memory_gib * 2**28)

    @property
    def undo_bytes(self) -> int:
        """Bytes of old weights to hold in memory."""
        return int(self.memory_gib * 2**27)
