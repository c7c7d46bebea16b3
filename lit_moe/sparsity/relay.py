"""Many forwards of one model in turns: no batch enters a layer before all have left the last."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lit_moe.errors import CalibrationError
from lit_moe.heap import give_back_memory
from lit_moe.held_forward import HeldForward

_END = "the end"


class Relay:
    """The forwards of all batches.

    Args:
        runs: one forward each; called in a thread of its own, without gradients.
    """

    def __init__(self, runs: Sequence[Callable[[], object]]) -> None:
        self._runs = runs
        self._forwards: list[HeldForward] = []
        self.index = 0
        """Which batch is running now; for hooks."""

    def run(self) -> None:
        """Run all forwards to their ends.

        Raises:
            CalibrationError: if the batches meet different layers at the same time.
        """
        self._forwards = [HeldForward(run) for run in self._runs]
        try:
            while (work := self._next_meeting()) is not None:
                work()
                give_back_memory()
        finally:
            for forward in self._forwards:
                forward.abandon()

    def meet(self, point: str, work: Callable[[], None]) -> None:
        """Wait until all forwards are here and ``work`` was called once. Called from a hook."""
        self._forwards[self.index].hold(point, work)

    def _next_meeting(self) -> Callable[[], None] | None:
        """Let each forward run to its next point, and return what is to be done there."""
        events: list[tuple[str, Any] | None] = []
        for index, forward in enumerate(self._forwards):
            self.index = index
            events.append(forward.advance())
        points = {_END if event is None else event[0] for event in events}
        if len(points) > 1:
            raise CalibrationError(
                "calibration batches meet different layers at the same time: "
                f"{sorted(points)}; give batches of one kind of input"
            )
        last = events[-1]
        return None if last is None else last[1]
