"""Checkpoints for another number of ranks or another ZeRO stage than they were written by.

DeepSpeed's universal format holds each parameter and its optimizer state whole, in files of their
own. The folder is made by the first rank beside the checkpoint, and is gone when all have read it.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from argparse import Namespace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lit_moe.resuming import TAG, CheckpointHeader

_NAMES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
_SOURCE = "source.json"


def universal_folder(header: CheckpointHeader) -> Path:
    """Return where the universal form of a checkpoint is kept."""
    return header.path.with_name(f".{header.path.name}.universal")


def make_universal(header: CheckpointHeader) -> Path:
    """Convert a checkpoint, unless that has been done already. Call on one rank.

    Returns:
        The folder to load from.
    """
    folder = universal_folder(header)
    identity = _identity(header)
    if (folder / _SOURCE).is_file() and json.loads((folder / _SOURCE).read_text()) == identity:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    _convert(header.path / TAG, folder / TAG)
    _serve_every_stage(folder / TAG / "zero")
    _write_model_states(header, folder / TAG)
    (folder / _SOURCE).write_text(json.dumps(identity), encoding="utf-8")
    return folder


def _identity(header: CheckpointHeader) -> dict[str, int]:
    files = sorted((header.path / TAG).iterdir())
    return {file.name: file.stat().st_mtime_ns for file in files}


def _convert(source: Path, target: Path) -> None:
    from deepspeed.checkpoint import ds_to_universal

    target.mkdir(parents=True)
    options = Namespace(
        input_folder=str(source),
        output_folder=str(target),
        num_extract_workers=1,
        num_merge_workers=1,
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        ds_to_universal.main(options)


def _serve_every_stage(folder: Path) -> None:
    """Give the files the one form that the loaders of all stages read.

    DeepSpeed's conversion from stage 3 leaves bare tensors and one step count for all, that from
    stages 1 and 2 dictionaries and a step count for each; each loader wants its own kind.
    """
    file = folder / "optimizer_state.pt"
    common: dict[str, Any] = torch.load(file, weights_only=False)
    by_number = common.pop("optimizer_state_dict", {}).get("state", {})
    step = by_number[0]["step"] if by_number else None
    for part in sorted(path for path in folder.iterdir() if path.is_dir()):
        if not (part / "exp_avg.pt").is_file():  # frozen: read from the checkpoint itself
            shutil.rmtree(part)
            continue
        for name in ("fp32", "exp_avg", "exp_avg_sq"):
            values = torch.load(part / f"{name}.pt", weights_only=False)
            if not isinstance(values, dict):
                torch.save({"param": values}, part / f"{name}.pt")
        if (part / "step.pt").is_file():
            step = torch.load(part / "step.pt", weights_only=False)
        else:
            torch.save(step, part / "step.pt")
    common.pop("fp32_flat_groups", None)
    common["ds_version"] = version("deepspeed")
    common["optimizer_state_dict"] = {
        "state": {0: {"step": step}},
        "param_groups": common["param_groups"],
    }
    torch.save(common, file)


def keep_groups_apart(optimizer: torch.optim.Optimizer, own: list[dict[str, Any]]) -> None:
    """Undo what the loader of stage 3 does to several parameter groups.

    It lets them share one step count, which each of them then advances, and gives all of them the
    options of the first.

    Args:
        optimizer: torch's, below DeepSpeed's.
        own: options of each group before the checkpoint was loaded; the learning rate in force is
            the checkpoint's.
    """
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.as_tensor(state["step"]).clone()
    for group, options in zip(optimizer.param_groups, own, strict=True):
        group.update({k: v for k, v in options.items() if k not in ("params", "lr")})


def _write_model_states(header: CheckpointHeader, folder: Path) -> None:
    """Leave the loops, callbacks and buffers; parameters come from elsewhere.

    Trained ones come from files of their own, frozen ones from the checkpoint itself.
    """
    (first,) = sorted((header.path / TAG).glob("*mp_rank_00_model_states.pt"))[:1]
    stored: dict[str, Any] = torch.load(first, mmap=True, map_location="cpu", weights_only=False)
    buffers = set(stored["buffer_names"])
    stored["module"] = {name: t for name, t in stored["module"].items() if name in buffers}
    stored["frozen_param_shapes"] = stored["frozen_param_fragments"] = None
    for old in folder.glob("*_model_states.pt"):
        old.unlink()
    for name in _NAMES:
        torch.save(stored, folder / name)
