"""Pruning little by little while training goes on."""

from __future__ import annotations

from dataclasses import dataclass

from lit_moe.errors import LitMoEError


@dataclass(frozen=True)
class CubicSchedule:
    """Zhu and Gupta (arXiv 1710.01878): fast at first, when there is most to spare, then slower.

    Attributes:
        end_step: optimizer step from which on the whole pattern holds.
        start_step: last step without any zero.
        every_n_steps: steps between two decisions.
    """

    end_step: int
    start_step: int = 0
    every_n_steps: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.start_step < self.end_step:
            raise LitMoEError(
                f"start_step={self.start_step} and end_step={self.end_step}: the schedule needs "
                "0 <= start_step < end_step"
            )
        if self.every_n_steps < 1:
            raise LitMoEError(f"every_n_steps={self.every_n_steps} must be at least 1")

    def progress(self, step: int) -> float:
        """Return how much of the pattern holds after ``step`` steps, in [0, 1]."""
        share = (step - self.start_step) / (self.end_step - self.start_step)
        return 1 - (1 - min(max(share, 0.0), 1.0)) ** 3

    def decides(self, step: int) -> bool:
        """Whether zeros are chosen anew after ``step`` steps."""
        if step == self.end_step:
            return True
        since = step - self.start_step
        return self.start_step < step < self.end_step and since % self.every_n_steps == 0
