"""Checkpoints in one file that are complete, or are not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lit_moe.errors import LitMoEError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's own, which on local disks writes beside the target and then renames.

    Lightning's writes elsewhere and moves: across file systems that is a copy over the old
    checkpoint, and a disk that fills up in between leaves neither.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint; an older one of that name stays until the new one is complete.

        Raises:
            LitMoEError: if it could not be written.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        try:
            for left in target.parent.glob(".*.ckpt.partial"):  # of runs killed while they saved
                if left.is_file():
                    left.unlink()
            with partial.open("wb") as stream:
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(target)
        except (OSError, RuntimeError) as error:
            partial.unlink(missing_ok=True)
            raise LitMoEError(
                f"the checkpoint {target} could not be written: {str(error).splitlines()[0]}; what "
                "was there before is still there"
            ) from error


def keep_whole(strategy: Any) -> None:
    """Let a strategy write checkpoints by :class:`AtomicCheckpointIO` where it used lightning's."""
    if type(getattr(strategy, "_checkpoint_io", None)) in (TorchCheckpointIO, type(None)):
        strategy._checkpoint_io = AtomicCheckpointIO()
