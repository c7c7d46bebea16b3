"""What a training checkpoint says of itself: one file, or the folder of a sharded run."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lit_moe.errors import LitMoEError
from lit_moe.plans import Plan, plan_from_dict

_LOG = logging.getLogger(__name__)

TAG = "checkpoint"
"""Folder within a sharded checkpoint that lightning and DeepSpeed agree on."""

_STALE = 3600.0
"""Seconds after which nobody is writing a checkpoint any more."""

OURS = "lit_moe"
"""Key of what lit-moe puts into a checkpoint."""


@dataclass(frozen=True)
class CheckpointHeader:
    """A checkpoint without its tensors.

    Attributes:
        path: the file or folder.
        plan: how the experts of the model were made of those before; None if nothing was done.
        stage: ZeRO stage of the run that wrote it; None for a file.
        world_size: ranks of that run; None for a file.
        step: optimizer steps that had been taken.
        precision: of a sharded run: ``bf16``, ``fp16`` or ``fp32``; None for a file.
    """

    path: Path
    plan: Plan | None
    stage: int | None = None
    world_size: int | None = None
    step: int | None = None
    precision: str | None = None

    @property
    def is_sharded(self) -> bool:
        """Whether it is a folder with a share of each rank."""
        return self.world_size is not None


def precision_in(config: Mapping[str, Any]) -> str:
    """Return ``bf16``, ``fp16`` or ``fp32``, whichever a DeepSpeed configuration trains in."""
    lower = (kind for kind in ("bf16", "fp16") if config.get(kind, {}).get("enabled") is True)
    return next(lower, "fp32")


def read_header(path: str | Path) -> CheckpointHeader:
    """Read what a checkpoint says of itself, without its tensors.

    Raises:
        LitMoEError: if it is missing, incomplete or unreadable.
    """
    path = Path(path)
    if not path.exists():
        raise LitMoEError(f"checkpoint {path} does not exist")
    if not path.is_dir():
        stored = _load(path)
        return CheckpointHeader(path, _plan(stored), step=stored.get("global_step"))
    stored = read_stored(path)
    stage = stored.get("ds_config", {}).get("zero_optimization", {}).get("stage", 0)
    world_size, step = int(stored["dp_world_size"]), stored.get("global_step")
    precision = precision_in(stored.get("ds_config", {}))
    header = CheckpointHeader(path, _plan(stored), int(stage), world_size, step, precision)
    _check_complete(header)
    return header


def read_stored(folder: Path) -> dict[str, Any]:
    """Return what the first rank stored beside the optimizer; tensors stay on the disk."""
    return _load(_first_file(folder))


def _first_file(folder: Path) -> Path:
    found = sorted((folder / TAG).glob("*mp_rank_00_model_states.pt"))
    if not found:
        raise LitMoEError(
            f"{folder} is no complete checkpoint: {folder / TAG} holds no model states of rank 0; "
            "take an older checkpoint of the run"
        )
    return found[0]


def _check_complete(header: CheckpointHeader) -> None:
    """Refuse a folder in which the share of a rank is missing or half-written."""
    assert header.world_size is not None
    kinds = {0: (), 3: ("model", "optim")}.get(header.stage or 0, ("optim",))
    shares = [
        f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt"
        for kind in kinds
        for rank in range(header.world_size)
    ]
    files = {file.name.removeprefix("bf16_"): file for file in (header.path / TAG).iterdir()}
    absent = [name for name in shares if name not in files]
    broken = [name for name in shares if name in files and not zipfile.is_zipfile(files[name])]
    for names, what in ((absent, "missing"), (broken, "half-written")):
        if names:
            raise LitMoEError(
                f"checkpoint {header.path} was written by {header.world_size} ranks, but "
                f"{names[0]} {_and_more(len(names) - 1)}is {what}; copy it from the machine that "
                "wrote it, or take another checkpoint"
            )


def _and_more(number: int) -> str:
    return "" if number == 0 else f"(with {number} more) "


def _load(file: Path) -> dict[str, Any]:
    try:
        return torch.load(file, mmap=True, map_location="cpu", weights_only=False)
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LitMoEError(
            f"checkpoint file {file} cannot be read ({said}); it may be half-written or no "
            "checkpoint at all: take an older one"
        ) from error


def _plan(stored: dict[str, Any]) -> Plan | None:
    data = stored.get(OURS, {}).get("plan")
    return None if data is None else plan_from_dict(data)


def put_back(target: Path) -> None:
    """Give an older checkpoint its name again that a killed run had just moved aside."""
    aside = moved_aside(target)
    if not target.exists():
        with contextlib.suppress(FileNotFoundError):  # another rank was faster
            aside.rename(target)


def moved_aside(target: Path) -> Path:
    """Return where a checkpoint waits while a new one takes its name."""
    return target.with_name(f".{target.name}.replaced")


def newest_checkpoint(places: Iterable[Path]) -> Path | None:
    """Return the newest complete checkpoint in or below some folders, None if there is none.

    One that cannot be read is passed over with a warning. One that a killed run had moved aside
    counts while nothing has taken its name. What killed runs had begun to write more than an hour
    ago is removed.
    """
    folders = [place for place in places if place.is_dir()]
    for folder in folders:
        _remove_stale(folder)
    found = {path for folder in folders for path in folder.rglob("*.ckpt") if _has_a_name(path)}
    for folder in folders:
        for aside in folder.rglob(".*.ckpt.replaced"):
            if not aside.with_name(aside.name[1:].removesuffix(".replaced")).exists():
                found.add(aside)
    for path in sorted(found, key=_written_at, reverse=True):
        try:
            read_header(path)
        except LitMoEError as error:
            _LOG.warning("passed over: %s", error)
        else:
            return path
    return None


def _remove_stale(folder: Path) -> None:
    """Remove checkpoints that nobody writes to any more, whatever other ranks remove meanwhile."""
    for partial in folder.rglob(".*.ckpt.partial"):
        with contextlib.suppress(OSError):
            times = [file.stat().st_mtime for file in (partial, *partial.rglob("*"))]
            if time.time() - max(times) < _STALE:
                continue
            if partial.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
            else:
                partial.unlink()


def _has_a_name(path: Path) -> bool:
    return not any(part.startswith(".") and ".ckpt." in part for part in path.parts)


def _written_at(path: Path) -> tuple[int, str]:
    first = path / TAG if (path / TAG).is_dir() else path
    return first.stat().st_mtime_ns, path.name


def complete_epoch(fit_loop: dict[str, Any]) -> None:
    """Mend, in place, the counters of a checkpoint that was written when an epoch had just ended.

    Lightning would run one more batch of that epoch in a run whose end is a number of steps.

    Args:
        fit_loop: ``checkpoint["loops"]["fit_loop"]``; any other state is left alone.
    """
    epochs = fit_loop["epoch_progress"]
    now = epochs["current"]
    if not now["ready"] == now["started"] == now["processed"] == now["completed"] + 1:
        return
    for counts in (epochs["current"], epochs["total"]):
        counts["completed"] += 1
    _forget_current(fit_loop["epoch_loop.batch_progress"])
    fit_loop["epoch_loop.batch_progress"]["is_last_batch"] = False
    _forget_current(fit_loop["epoch_loop.scheduler_progress"])
    for progress in fit_loop["epoch_loop.automatic_optimization.optim_progress"][
        "optimizer"
    ].values():
        _forget_current(progress)


def _forget_current(progress: dict[str, Any]) -> None:
    progress["current"] = dict.fromkeys(progress["current"], 0)
