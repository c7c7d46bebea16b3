"""Write a folder next to its final place and rename it there only when it is complete."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.utils import CONFIG_NAME

from lit_moe.errors import ExportError

_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OS_ERROR = re.compile(r"os error (\d+)")


def check_target(path: str | Path, *, overwrite: bool = False) -> Path:
    """Return the absolute path to export to, or refuse it. Call before the expensive part.

    First clears away what killed exports to this path left behind.

    Args:
        path: where the exported folder shall be.
        overwrite: accept a path that holds an older model folder; it is replaced only once the
            new one is complete.

    Raises:
        ExportError: if the path is taken, or its parent folder cannot be written to.
    """
    target = Path(path).expanduser().resolve()
    parent = next(p for p in target.parents if p.exists())
    if parent == target.parent and parent.is_dir():
        _recover(target)
    _check_replaceable(target, overwrite=overwrite)
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ExportError(f"cannot export to {target}: no permission to write in {parent}")
    return target


def check_space(target: Path, bytes_needed: int) -> None:
    """Refuse an export that the disk has no room for.

    An older export at the target counts as occupied: it stays until the new one is complete.

    Raises:
        ExportError: with the bytes needed and free.
    """
    free = _free_bytes(target)
    if bytes_needed > free:
        raise _disk_full(target, bytes_needed, free)


@contextmanager
def staged(target: Path, bytes_needed: int, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a hidden folder beside ``target``; on success it takes the place of ``target``.

    On any error nothing of it remains and an older folder at ``target`` is untouched.

    Raises:
        ExportError: if the disk fills up or writing fails.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = _sibling(target, "partial", os.getpid())
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir()
        yield staging
        _settle(staging)
        _check_replaceable(target, overwrite=overwrite)
        _swap_in(staging, target)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if _is_out_of_space(error):
            raise _disk_full(target, bytes_needed, _free_bytes(target)) from error
        if isinstance(error, OSError | SafetensorError):
            raise ExportError(f"export to {target} failed while writing: {error}") from error
        raise


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Yield a hidden folder beside ``target`` that is gone afterwards."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = _sibling(target, "gathered", os.getpid())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _recover(target: Path) -> None:
    """Drop the partial folders of killed exports and put back a folder they had moved aside."""
    for old in _siblings(target, "replaced"):
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)
    for left in (*_siblings(target, "partial"), *_siblings(target, "gathered")):
        shutil.rmtree(left, ignore_errors=True)


def _check_replaceable(target: Path, *, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise ExportError(f"export target {target} exists; choose another or set overwrite=True")
    # Replacing means deleting: never a folder that merely happens to be named.
    if not target.is_dir() or (any(target.iterdir()) and not (target / CONFIG_NAME).is_file()):
        raise ExportError(
            f"export target {target} is no model folder (it has no {CONFIG_NAME}), "
            f"so overwrite=True does not replace it"
        )


def _swap_in(staging: Path, target: Path) -> None:
    """Give ``staging`` its final name; an older ``target`` steps aside until that is done."""
    aside = _sibling(target, "replaced", os.getpid())
    if target.exists():
        target.rename(aside)
    try:
        staging.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise
    _sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _sibling(target: Path, kind: str, pid: int) -> Path:
    return target.with_name(f".{target.name}.lit-moe-{kind}-{pid}")


def _siblings(target: Path, kind: str) -> list[Path]:
    """Leftovers of dead processes; the folder of a live one is its own business."""
    start = f".{target.name}.lit-moe-{kind}-"
    found = [p for p in target.parent.iterdir() if p.name.startswith(start)]
    return [p for p in found if not _is_alive(p.name.removeprefix(start))]


def _is_alive(pid: str) -> bool:
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _settle(folder: Path) -> None:
    """Put everything on the disk, readable for whom new files are readable."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            path.chmod(mode)  # safetensors makes its files private
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_bytes(target: Path) -> int:
    return shutil.disk_usage(next(p for p in target.parents if p.exists())).free


def _is_out_of_space(error: BaseException) -> bool:
    """Whether a write failed for want of space, in Python or inside a Rust library."""
    if isinstance(error, OSError) and error.errno in _OUT_OF_SPACE:
        return True
    code = _OS_ERROR.search(str(error))
    return code is not None and int(code[1]) in _OUT_OF_SPACE


def _disk_full(target: Path, needed: int, free: int) -> ExportError:
    return ExportError(
        f"disk full: the export to {target} needs {needed:,} bytes and {free:,} are free; "
        f"nothing was left behind"
    )
