"""A forward in a thread of its own that stops where a hook says so, until it is told to go on.

Some methods must know what *all* calibration tokens look like at a layer before any of them may go
on. Instead of taking the model apart into layers and calling them one by one (which every family
does in its own way), each batch's own forward runs in a thread and is held up by hooks. Only one
thread runs at a time, so the order of events is fixed and hooks may attach whatever they like.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from lit_moe.heap import free_buffers_of_thread, join, share_heap


class _Abandoned(BaseException):
    """Raised inside a forward that nobody waits for any more."""


class HeldForward:
    """One forward that runs until :meth:`hold` is called from inside it.

    Args:
        run: the forward; called in a thread of its own, without gradients.
    """

    def __init__(self, run: Callable[[], object]) -> None:
        self._run = run
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._event: tuple[str, Any] | None = None
        self._answer: Any = None
        self._error: BaseException | None = None
        self._abandoned = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        share_heap()
        self._thread.start()

    def advance(self, answer: object = None) -> tuple[str, Any] | None:
        """Let the forward go on until it is held up again.

        Args:
            answer: what :meth:`hold` returns inside the forward that waits there.

        Returns:
            The point and the payload that :meth:`hold` was called with; None at the end.
        """
        self._answer = answer
        self._go.release()
        self._back.acquire()
        event, self._event = self._event, None  # payloads are large, and not ours any more
        if event is None:
            join(self._thread)
        if self._error is not None:
            raise self._error
        return event

    def hold(self, point: str, payload: object) -> Any:
        """Stop here, called from inside the forward; returns the answer of :meth:`advance`.

        Called from anywhere else, by a hook that outlived its run, it does nothing.
        """
        if threading.current_thread() is not self._thread:
            return None
        self._event = (point, payload)
        free_buffers_of_thread()
        self._wait()
        answer, self._answer = self._answer, None
        return answer

    def abandon(self) -> None:
        """End the forward where it is; it must not be advanced any more."""
        self._abandoned = True
        self._go.release()
        join(self._thread)

    def _wait(self) -> None:
        self._back.release()
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned

    def _work(self) -> None:
        self._go.acquire()
        try:
            if not self._abandoned:
                with torch.no_grad():  # grad mode belongs to the thread
                    self._run()
        except _Abandoned:
            return
        except BaseException as error:  # noqa: BLE001 - raised again by advance()
            self._error = error
        self._back.release()
