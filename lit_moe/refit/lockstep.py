"""Many forwards of one model that stop at the same points and wait for each other.

Sequential refitting must know what *all* calibration tokens look like behind a layer before any of
them may enter the next one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.held_forward import HeldForward as HeldForward
from lit_moe.inference import run_body


class Lockstep:
    """The forwards of all batches through one model, side by side.

    Args:
        model: in evaluation mode.
        batches: keyword arguments of the model's body, one forward each.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> None:
        self._forwards = [HeldForward(_runner(model, inputs)) for inputs in batches]
        self._current = self._forwards[0]
        self.index = 0
        """Which batch is running now; for hooks."""

    def __len__(self) -> int:
        return len(self._forwards)

    def advance(self, index: int, answer: object = None) -> tuple[str, Any] | None:
        """Let one batch run to its next point, see :meth:`HeldForward.advance`."""
        self._current, self.index = self._forwards[index], index
        return self._current.advance(answer)

    def hold(self, point: str, payload: object) -> Any:
        """Stop the batch that is running, from a hook; see :meth:`HeldForward.hold`."""
        return self._current.hold(point, payload)

    def close(self) -> None:
        """End all forwards that are still on their way."""
        for forward in self._forwards:
            forward.abandon()


def _runner(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Callable[[], object]:
    def run() -> object:
        # The current GPU, like grad mode, belongs to the thread.
        on_gpu = model.device.type == "cuda"
        with torch.cuda.device(model.device) if on_gpu else contextlib.nullcontext():
            return run_body(model, inputs)

    return run
