"""A fit of four steps with a prune before it, for one process or for two, and its losses."""

from __future__ import annotations

import ctypes
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Callback, LightningModule, Trainer

import lit_moe.callbacks
import lit_moe.commands
import lit_moe.sharding  # noqa: F401 - forks find all of it imported
from lit_moe import cli

ROOT = Path(__file__).parents[2]
STEPS = 4
ROWS = 8
TIMEOUT = 120.0
"""Seconds after which a run that has not ended is taken for one that hangs."""


class LossFile(Callback):
    """Writes the loss of each step, mean over ranks, as the last thing that rank 0 does.

    Args:
        path: JSON file to write: the losses and how many processes took part.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, _: LightningModule, outputs: Any, *__: Any
    ) -> None:
        """After each step. Collective."""
        mean = trainer.strategy.reduce(outputs["loss"].detach().double(), reduce_op="mean")
        self.losses.append(float(torch.as_tensor(mean)))

    def on_fit_end(self, trainer: Trainer, *_: Any) -> None:
        """After the fit. Writes the file on rank 0."""
        if trainer.is_global_zero:
            found = {"losses": self.losses, "world_size": trainer.world_size}
            Path(self.path).write_text(json.dumps(found))


class StepFile(Callback):
    """Adds a line for each step of rank 0: its number and its loss.

    Args:
        path: file to add to, also in a run that goes on.
        seconds: what each step takes longer, so that there is time to disturb it.
    """

    def __init__(self, path: str, seconds: float = 0.0) -> None:
        self.path = path
        self.seconds = seconds

    def on_train_batch_end(
        self, trainer: Trainer, _: LightningModule, outputs: Any, *__: Any
    ) -> None:
        """After each step."""
        time.sleep(self.seconds)
        if trainer.is_global_zero:
            with Path(self.path).open("a") as stream:
                stream.write(f"{trainer.global_step} {float(outputs['loss'])}\n")


class Stumbles(Callback):
    """Ends one rank in the middle of a run.

    Args:
        rank: which.
        how: ``raise`` an error, be ``kill``-ed, ``hang`` for some time, or raise ``early``, when
            the model has just been built.
    """

    def __init__(self, rank: int, how: str) -> None:
        self.rank = rank
        self.how = how

    def on_model_built(self, trainer: Trainer, _: LightningModule) -> None:
        """Before the strategy wraps the model."""
        if self.how == "early" and trainer.global_rank == self.rank:
            raise OSError("the disk of this machine went away")

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Before the third step, while the others begin it."""
        if trainer.global_rank != self.rank or trainer.global_step != 2:
            return
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "hang":
            time.sleep(12)
            return
        raise OSError("the disk of this machine went away")


def write_config(folder: Path, checkpoint: Path, pages: str, *, stage: int | None) -> Path:
    """Write a config whose steps see the same ``ROWS`` blocks on one process and on two.

    Args:
        folder: where the config goes, and the losses afterwards.
        checkpoint: of the model.
        pages: text.
        stage: of ZeRO, on two processes; None for one process without any strategy.
    """
    world_size = 1 if stage is None else 2
    files = {f"{name}_files": [pages] for name in ("calibration", "train", "test")}
    data = {**files, "sequence_length": 32, "batch_size": ROWS // world_size}
    data |= {"calibration_tokens": 256, "test_tokens": 64}
    optimizer = {"learning_rate": 3.0e-3, "warmup_steps": 2}
    callbacks = [
        _entry("lit_moe.callbacks.OneShotPruning", keep_ratio=0.5),
        _entry("tests.distributed.tiny_fit.LossFile", path=str(folder / "losses.json")),
    ]
    trainer = {
        "accelerator": "cpu",
        "max_steps": STEPS,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "log_every_n_steps": 1,
        "default_root_dir": str(folder / "run"),
        "callbacks": callbacks,
    }
    if stage is not None:
        trainer["strategy"] = _entry("lit_moe.sharding.MoEDeepSpeed", stage=stage)
    model = {"model_name_or_path": str(checkpoint), "optimizer": optimizer}
    config = {
        "seed_everything": 1,
        "model": _entry("lit_moe.MoEModule", **model),
        "data": _entry("lit_moe.data.TextDataModule", **data),
        "trainer": trainer,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def environment(**more: str) -> dict[str, str]:
    """Return variables for a process of its own: one thread, this checkout, no launcher's words."""
    launchers = ("RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_", "LOCAL_", "GROUP_", "CROSS_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith((*launchers, "SLURM_"))}
    programs = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PATH": programs, **more}


def start(words: list[str], log: Path, **variables: str) -> subprocess.Popen[bytes]:
    """Start a program in a process of its own, which writes what it says to ``log``."""
    with log.open("wb") as stream:
        return subprocess.Popen(
            words, env=environment(**variables), cwd=ROOT, stdout=stream, stderr=stream
        )


def finish(*started: tuple[subprocess.Popen[bytes], Path]) -> None:
    """Wait for programs; those still there after ``TIMEOUT`` are ended, and any failure is told."""
    deadline = time.monotonic() + TIMEOUT
    try:
        for process, _ in started:
            process.wait(timeout=max(1.0, deadline - time.monotonic()))
    finally:
        for process, _ in started:
            if process.poll() is None:
                process.kill()
                process.wait()
    for process, log in started:
        assert process.returncode == 0, log.read_text()[-3000:]


def fork_fit(
    words: list[str], log: Path, *, namespace: str | None = None, **variables: str
) -> BaseProcess:
    """Start ``lit-moe fit`` in a fork of this process, which has imported everything already.

    Args:
        words: after ``fit``.
        log: file for what it says.
        namespace: network namespace to enter first, by its name.
        **variables: of the environment, beside those that are there.
    """
    process = multiprocessing.get_context("fork").Process(
        target=_fit, args=(words, log, namespace, variables)
    )
    process.start()
    return process


def finish_forks(*started: tuple[BaseProcess, Path], code: int = 0) -> None:
    """Wait for forks that return ``code``; those still there after ``TIMEOUT`` are ended."""
    deadline = time.monotonic() + TIMEOUT
    for process, _ in started:
        process.join(max(1.0, deadline - time.monotonic()))
    for process, _ in started:
        if process.is_alive():
            process.kill()
            process.join()
    for process, log in started:
        assert process.exitcode == code, log.read_text()[-3000:]


def _fit(words: list[str], log: Path, namespace: str | None, variables: dict[str, str]) -> None:
    fresh = environment(**variables)
    os.environ.clear()
    os.environ.update(fresh)
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        sys.stdout = sys.stderr = stream
        code = 1
        try:
            if namespace is not None:
                _enter(namespace)
            torch.set_num_threads(1)
            warnings.simplefilter("ignore")
            code = cli.main(["fit", *words])
        except BaseException:  # noqa: BLE001 - whatever it was, the log must tell
            traceback.print_exc()
    os._exit(code)


def _enter(namespace: str) -> None:
    """Move this process into a network namespace, on a machine that has its name.

    ``os.setns`` and ``os.unshare`` are newer than Python 3.11.
    """
    new_network, new_name = 0x40000000, 0x04000000
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/run/netns/{namespace}").open() as handle:
        if libc.setns(handle.fileno(), new_network):
            raise OSError(ctypes.get_errno(), f"cannot enter the namespace {namespace}")
    if libc.unshare(new_name):
        raise OSError(ctypes.get_errno(), "cannot have a host name of its own")
    socket.sethostname(namespace)


def losses(folder: Path) -> list[float]:
    """Return the losses that a fit left in ``folder``."""
    found: list[float] = json.loads((folder / "losses.json").read_text())["losses"]
    assert len(found) == STEPS
    return found


def world_size(folder: Path) -> int:
    """Return how many processes took part in the fit that left its losses in ``folder``."""
    return int(json.loads((folder / "losses.json").read_text())["world_size"])


def _entry(class_path: str, **init_args: Any) -> dict[str, Any]:
    return {"class_path": class_path, "init_args": init_args}
