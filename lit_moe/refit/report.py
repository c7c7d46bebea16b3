"""What a refit did, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class LayerRefit:
    """The refit of one layer. Residuals are fractions of what the teacher wrote.

    Attributes:
        solver: which one ran.
        target: ``stream`` or ``block``.
        lam: ridge penalty in units of the mean square feature; None if nothing was solved.
        residual_before: weighted square error over the fitted tokens, relative to the target.
        residual_after: the same with the refit, None where it could not be told.
        held_out_before: the same over held-out tokens.
        held_out_after: and with the refit.
        kept: whether the refit was taken; a layer is left as it was when held-out tokens disagree.
        reason: why it was left as it was.
        unrouted: experts that saw no token of the fit; left as they were.
        tokens: of the fit, on all ranks.
        features: unknowns per output: of all experts together, or of one where experts are solved
            one by one without each other.
        sweeps: over all experts, of the solve that was taken; 0 for solvers without.
        converged: whether those sweeps had come to rest.
        resumed: whether an earlier run that was killed had solved it.
    """

    solver: str = ""
    target: str = ""
    lam: float | None = None
    residual_before: float | None = None
    residual_after: float | None = None
    held_out_before: float | None = None
    held_out_after: float | None = None
    kept: bool = False
    reason: str = ""
    unrouted: list[int] = field(default_factory=list)
    tokens: int = 0
    features: int = 0
    sweeps: int = 0
    converged: bool = True
    resumed: bool = False


@dataclass
class RefitReport:
    """The refit of a model.

    Attributes:
        mode: ``sequential`` or ``parallel``.
        teacher: what was imitated.
        tokens: fitted on, padding excluded.
        held_out_tokens: kept apart to choose penalties and to judge.
        solver: which one and why.
        layers: layer name -> what was done there.
        loss_before: on the held-out rows: next-token loss in nats, or for other models the
            divergence from the teacher.
        loss_after: the same with the refit.
        kept: whether the refit as a whole was taken; it is undone when the held-out loss rises.
        skipped: layer name -> why it cannot be refitted at all.
    """

    mode: str
    teacher: str = "the model before it was changed"
    tokens: int = 0
    held_out_tokens: int = 0
    solver: str = ""
    layers: dict[str, LayerRefit] = field(default_factory=dict)
    loss_before: float | None = None
    loss_after: float | None = None
    kept: bool = True
    skipped: dict[str, str] = field(default_factory=dict)

    def sentences(self) -> list[str]:
        """Return what a reader of the numbers must know."""
        said = [f"{name} was not refitted: {why}" for name, why in self.skipped.items()]
        said += [
            f"refit left {name} as it was: {layer.reason}"
            for name, layer in self.layers.items()
            if not layer.kept
        ]
        said += [
            f"experts {layer.unrouted} of {name} saw no token of the fit and were left as they were"
            for name, layer in self.layers.items()
            if layer.unrouted
        ]
        moving = [layer for layer in self.layers.values() if not layer.converged]
        if moving:
            said.append(
                f"Gauss-Seidel was still moving after {max(s.sweeps for s in moving)} sweeps in "
                f"{len(moving)} layers, so that they are not the joint solution yet; a larger "
                "memory_gib lets the joint solver run, a larger lam converges faster"
            )
        resumed = [layer for layer in self.layers.values() if layer.resumed]
        if resumed:
            said.append(f"{len(resumed)} layers had been solved by a run that was stopped")
        short = [layer for layer in self.layers.values() if layer.tokens < layer.features]
        if short:
            said.append(
                f"{len(short)} layers have more features (up to {max(s.features for s in short)}) "
                f"than tokens to fit them on ({min(s.tokens for s in short)}); the penalty decides "
                "what the tokens leave open, and more calibration text would help"
            )
        if not self.kept:
            said.append(
                f"the refit was undone: it raised the held-out loss from {self.loss_before:.4g} to "
                f"{self.loss_after:.4g}; give more calibration tokens or text closer to the test"
            )
        return said
