"""A job that SLURM is about to end keeps its last step, and is asked for again."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

from lit_moe.errors import LitMoEError

_LOG = logging.getLogger(__name__)
NOTHING, SAVE, REQUEUE = range(3)


class Requeue(L.Callback):
    """Saves at the end of the step in which SLURM's signal came, and requeues the job.

    Lightning's own answer to the signal saves at once, in the middle of a step and on each rank at
    another point of it: several ranks then wait for each other in different collectives. Here the
    ranks agree after each optimizer step whether one of them was told.

    Between steps nobody looks: in calibration, ``Refit``, a search, the evaluations of the report,
    a validation or the export the signal waits for the next step. If the time of the job is over
    before, or no step follows, nothing is kept and nothing requeued. The signal must come early
    enough for the longest such phase, one step and the checkpoint.

    ``SIGUSR1`` (``#SBATCH --signal=USR1@600``) comes before the time of the job is over: the job is
    requeued. ``SIGTERM`` comes when it is preempted, requeued or cancelled: it only saves. The
    checkpoint is ``hpc_ckpt_N.ckpt`` in ``trainer.default_root_dir``, of which the newest is kept;
    ``--ckpt_path last`` goes on from it.

    ``lit-moe fit`` adds it under SLURM by itself, as the last callback, so that the checkpoint
    holds what the others did in that step.
    """

    def __init__(self) -> None:
        self.asked = NOTHING
        self._step = 0
        self._before: Any = signal.SIG_DFL

    def setup(self, trainer: L.Trainer, _: L.LightningModule, stage: str) -> None:
        """When a fit begins. Takes the signal before lightning does; it may come any time now."""
        if stage == "fit":
            self._before = signal.signal(_requeue_signal(trainer), self._save_and_requeue)

    def on_train_start(self, trainer: L.Trainer, _: L.LightningModule) -> None:
        """When training begins. Takes SIGTERM from lightning, which would answer collectively."""
        self._step = trainer.global_step
        signal.signal(signal.SIGTERM, self._save)  # lightning gives it back

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """After each optimizer step. Collective.

        Raises:
            LitMoEError: to end the run, whose last step is kept.
        """
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        mine = torch.tensor(self.asked, device=trainer.strategy.root_device)
        asked = int(trainer.strategy.reduce(mine, reduce_op="max"))
        if asked != NOTHING:
            self.asked = NOTHING
            _keep(trainer, requeue=asked == REQUEUE)

    def teardown(self, trainer: L.Trainer, _: L.LightningModule, stage: str) -> None:
        """When a fit ends. Gives the signal back."""
        if stage == "fit":
            signal.signal(_requeue_signal(trainer), self._before)

    def _save(self, *_: Any) -> None:
        self.asked = max(self.asked, SAVE)

    def _save_and_requeue(self, *_: Any) -> None:
        self.asked = REQUEUE


def add_requeue(trainer: L.Trainer) -> None:
    """Let a run under SLURM keep its last step, unless its SLURM environment is not to requeue."""
    environment = _environment(trainer)
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        trainer.callbacks.append(Requeue())  # type: ignore[attr-defined]


def _environment(trainer: L.Trainer) -> Any:
    return trainer._accelerator_connector.cluster_environment


def _requeue_signal(trainer: L.Trainer) -> signal.Signals:
    return getattr(_environment(trainer), "requeue_signal", None) or signal.SIGUSR1


def _keep(trainer: L.Trainer, *, requeue: bool) -> None:
    """Save, requeue, and end the run; where the job is not requeued, let it go on. Collective."""
    next_path = trainer._checkpoint_connector.hpc_save_path(trainer.default_root_dir)
    path = Path(trainer.strategy.broadcast(next_path))
    trainer.save_checkpoint(path)
    kept = f"SLURM is about to end this job: step {trainer.global_step} is kept in {path}"
    go_on = "the same command with --ckpt_path last goes on from it"
    refusal = None
    if trainer.is_global_zero:
        _remove_older(path)
        refusal = _requeue_job() if requeue else None
    refusal = trainer.strategy.broadcast(refusal)
    if refusal is None:
        how = "the job is requeued, and " if requeue else ""
        raise LitMoEError(f"{kept}; {how}{go_on}")
    if trainer.is_global_zero:
        _LOG.warning(
            "%s, but the job is not requeued (%s): submit it again, %s", kept, refusal, go_on
        )


def _remove_older(newest: Path) -> None:
    for path in newest.parent.glob("hpc_ckpt_*.ckpt"):
        if path != newest:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _requeue_job() -> str | None:
    """Ask SLURM for this job again; return what it said if it refused."""
    job, array = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_ARRAY_JOB_ID")
    if array is not None:
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        words = ["scontrol", "requeue", job]
        answer = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"scontrol: {error}"
    if answer.returncode <= 0:  # below: SLURM already ends all processes of the job, this one too
        return None
    return " ".join(answer.stderr.split()) or "scontrol failed"
