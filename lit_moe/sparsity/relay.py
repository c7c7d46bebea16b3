"""Many forwards of one model, run in turns: no batch enters a layer before all have left the last.

Each batch's forward has a thread of its own, of which exactly one runs at a time. At a meeting
point a runner hands over to the next one; the last to arrive does the work that all were waiting
for, and the round begins again with the first.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from lit_moe.errors import CalibrationError

_END = "the end"


class _Stopped(BaseException):
    """Ends a forward whose fellows have failed."""


class Relay:
    """The forwards of all batches.

    Args:
        runs: one forward each; called in a thread of its own.
    """

    def __init__(self, runs: Sequence[Callable[[], object]]) -> None:
        self._runs = runs
        self._turns = [threading.Semaphore(0) for _ in runs]
        self._points = [""] * len(runs)
        self._error: BaseException | None = None
        self.index = 0
        """Which batch is running now; for hooks."""

    def run(self) -> None:
        """Run all forwards to their ends.

        Raises:
            CalibrationError: if the batches meet different layers at the same time.
        """
        threads = [
            threading.Thread(target=self._work, args=(index,), daemon=True)
            for index in range(len(self._runs))
        ]
        for thread in threads:
            thread.start()
        self._turns[0].release()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:  # an interrupt from the keyboard reaches only this thread
            self._stop(error)
            raise
        if self._error is not None:
            raise self._error

    def meet(self, point: str, work: Callable[[], None]) -> None:
        """Wait until all forwards are here; the last one calls ``work``. Called from a hook."""
        mine = self.index
        self._arrive(mine, point, work)
        self._turns[mine].acquire()
        if self._error is not None:
            raise _Stopped
        self.index = mine

    def _arrive(self, mine: int, point: str, work: Callable[[], None]) -> None:
        self._points[mine] = point
        if mine == len(self._runs) - 1:
            if set(self._points) != {point}:
                raise CalibrationError(
                    "calibration batches meet different layers at the same time: "
                    f"{sorted(set(self._points))}; give batches of one kind of input"
                )
            work()
        self._turns[(mine + 1) % len(self._turns)].release()

    def _work(self, index: int) -> None:
        self._turns[index].acquire()
        self.index = index
        try:
            if self._error is None:
                self._runs[index]()
                self._arrive(index, _END, lambda: None)
        except _Stopped:
            return
        except BaseException as error:  # noqa: BLE001 - raised again by run()
            self._stop(error)

    def _stop(self, error: BaseException) -> None:
        self._error = error
        for turn in self._turns:
            turn.release()
