"""Checkpoint folders that all ranks write together, and that appear only when complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lit_moe.errors import LitMoEError
from lit_moe.resuming import CheckpointHeader, moved_aside, put_back


@contextmanager
def written_together(
    target: Path, *, is_first_rank: bool, barrier: Callable[[str], None]
) -> Iterator[Path]:
    """Yield a hidden folder to write to; it takes the place of ``target`` when all ranks are done.

    A run that is killed in between, or a disk that fills up, leaves ``target`` as it was.

    Args:
        target: the checkpoint.
        is_first_rank: whether this rank renames.
        barrier: waits for all ranks.

    Raises:
        LitMoEError: if writing failed; nothing of it is left.
    """
    partial, aside = target.with_name(f".{target.name}.partial"), moved_aside(target)
    try:
        if is_first_rank:
            put_back(target)
            _remove(aside)
            remove_partial(target.parent)
            _remove(partial)
            partial.mkdir(parents=True)
        barrier("checkpoint begins")
        yield partial
        barrier("checkpoint is written")
        if is_first_rank:
            if target.exists():
                target.rename(aside)
            partial.rename(target)
            _remove(aside)
    except (OSError, RuntimeError) as error:
        if is_first_rank:
            _remove(partial)
        raise LitMoEError(
            f"the checkpoint {target} could not be written: {_reason(error)}; what was there "
            "before is still there"
        ) from error
    barrier("checkpoint has its name")


def check_sharded(header: CheckpointHeader) -> None:
    """Refuse a checkpoint that no sharded run wrote.

    Raises:
        LitMoEError: saying how it can be resumed.
    """
    if not header.is_sharded:
        raise LitMoEError(
            f"{header.path} is a checkpoint in one file, as strategies without DeepSpeed write "
            "them; resume it with --trainer.strategy auto or ddp"
        )


def remove_partial(folder: Path) -> None:
    """Remove what runs that were killed while they saved left in a folder of checkpoints."""
    for partial in folder.glob(".*.ckpt.partial"):
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists() or path.is_symlink():
        os.unlink(path)


def _reason(error: BaseException) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    # torch's writer says only that it is not where it should be in the file.
    signs = ("No space left", "PytorchStreamWriter failed", "unexpected pos")
    full = any(sign in str(error) for sign in signs)
    return f"{text} (is the disk full?)" if full else text
