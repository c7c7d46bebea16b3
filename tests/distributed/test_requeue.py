"""SLURM ends a job in the middle of a fit; started again it goes on as if nothing had happened.

``srun`` and ``scontrol`` are stand-ins: the first starts two tasks with the variables that SLURM
would set, the second writes down what it is asked for.
"""

import os
import signal
import time

import pytest

from lit_moe.sharding.requeue import _requeue_job
from tests.distributed.slurm_stand_in import free_port, job_variables
from tests.distributed.tiny_fit import (
    TIMEOUT,
    finish_forks,
    fork_fit,
    start,
    write_config,
)
from tests.distributed.two_hosts import LAUNCH

pytestmark = pytest.mark.distributed
STEPS = 10
REFUSED = 2


@pytest.fixture
def allocation(tmp_path):
    return job_variables(tmp_path)


@pytest.fixture
def job(allocation, checkpoint, pages, tmp_path):
    """Return a function that starts two tasks, which srun would start, in a folder."""

    def tasks(strategy, name, *, seconds=0.0, **more):
        words = [*prepare(tmp_path / name, checkpoint, pages, strategy, seconds=seconds)]
        variables = {**allocation, "MASTER_PORT": free_port(), **more}
        logs = [tmp_path / name / f"log{task}" for task in (0, 1)]
        return [
            (
                fork_fit(words, log, SLURM_PROCID=str(task), SLURM_LOCALID=str(task), **variables),
                log,
            )
            for task, log in enumerate(logs)
        ]

    return tasks


def prepare(folder, checkpoint, pages, strategy, *, seconds):
    """Write a config; return the options of a fit of ``STEPS`` steps that notes each of them."""
    stage = int(strategy[-1]) if strategy.startswith("zero") else 1
    config = write_config(folder, checkpoint, pages, stage=stage)
    steps = {"path": folder / "steps", "seconds": seconds}
    words = [f"--config={config}", "--trainer.callbacks+=tests.distributed.tiny_fit.StepFile"]
    words += [f"--trainer.callbacks.{name}={value}" for name, value in steps.items()]
    words += ["--trainer.devices=2", f"--trainer.max_steps={STEPS}", "--ckpt_path=last"]
    return words if strategy.startswith("zero") else [*words, f"--trainer.strategy={strategy}"]


def steps_of(folder):
    """Number and loss of the steps that were taken, in their order, as text: all digits count."""
    path = folder / "steps"
    return path.read_text().splitlines() if path.exists() else []


def wait_for_step(folder, number):
    deadline = time.monotonic() + TIMEOUT
    while len(steps_of(folder)) < number:
        assert time.monotonic() < deadline, [log.read_text() for log in folder.glob("log*")]
        time.sleep(0.02)


def signal_all(processes, number):
    """What slurmd does to the tasks of a job."""
    for process in processes:
        os.kill(process, number)


@pytest.mark.parametrize(
    "strategy",
    ["ddp", "zero3", *[pytest.param(s, marks=pytest.mark.slow) for s in ("zero1", "zero2")]],
)
def test_a_requeued_job_takes_the_steps_of_an_uninterrupted_one(job, tmp_path, strategy):
    finish_forks(*job(strategy, "whole"))
    tasks = job(strategy, "parts", seconds=0.1)
    wait_for_step(tmp_path / "parts", 3)
    signal_all([task.pid for task, _ in tasks], signal.SIGUSR1)
    finish_forks(*tasks, code=REFUSED)
    kept = len(steps_of(tmp_path / "parts"))
    assert 3 <= kept < STEPS
    checkpoint = tmp_path / "parts" / "run" / "hpc_ckpt_1.ckpt"
    assert checkpoint.is_dir() == strategy.startswith("zero")
    for _, log in tasks:
        assert f"step {kept} is kept in {checkpoint}; the job is requeued" in log.read_text()
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    finish_forks(*job(strategy, "parts"))
    assert steps_of(tmp_path / "parts") == steps_of(tmp_path / "whole")
    assert len(steps_of(tmp_path / "whole")) == STEPS


def test_a_job_told_at_different_moments_keeps_one_step(job, tmp_path):
    """One task hears of it a step later than the other; lightning's own handler hangs there."""
    tasks = job("ddp", "parts", seconds=0.3)
    wait_for_step(tmp_path / "parts", 2)
    signal_all([tasks[1][0].pid], signal.SIGUSR1)
    time.sleep(0.4)
    finish_forks(*tasks, code=REFUSED)
    kept = len(steps_of(tmp_path / "parts"))
    said = [log.read_text() for _, log in tasks]
    assert all(f"step {kept} is kept in " in text for text in said), said


def test_a_preempted_job_keeps_its_step_and_asks_for_nothing(job, tmp_path):
    tasks = job("ddp", "parts", seconds=0.1)
    wait_for_step(tmp_path / "parts", 2)
    signal_all([task.pid for task, _ in tasks], signal.SIGTERM)
    finish_forks(*tasks, code=REFUSED)
    said = tasks[0][1].read_text()
    assert f"step {len(steps_of(tmp_path / 'parts'))} is kept in " in said
    assert "requeued" not in said
    assert not (tmp_path / "asked").exists()


def test_of_the_steps_that_were_kept_the_last_one_stays(job, tmp_path):
    (tmp_path / "asked.refuse").touch()
    tasks = job("ddp", "parts", seconds=0.2)
    for step in (2, 6):
        wait_for_step(tmp_path / "parts", step)
        signal_all([task.pid for task, _ in tasks], signal.SIGUSR1)
    finish_forks(*tasks)
    assert (tmp_path / "asked").read_text() == "requeue 7\nrequeue 7\n"
    assert len(steps_of(tmp_path / "parts")) == STEPS
    kept = [path.name for path in (tmp_path / "parts" / "run").glob("*.ckpt")]
    assert kept == ["hpc_ckpt_2.ckpt"]


@pytest.mark.parametrize(
    ("script", "refusal"),
    [
        ("exit 0", None),
        ("kill -TERM $$", None),  # by SLURM, which has begun to end the job
        ("echo 'Invalid job id' >&2; exit 1", "Invalid job id"),
        ("exit 1", "scontrol failed"),
    ],
)
def test_what_scontrol_answers(tmp_path, monkeypatch, script, refusal):
    (tmp_path / "scontrol").write_text(f"#!/usr/bin/env bash\n{script}\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert _requeue_job() == refusal


@pytest.mark.slow
def test_slurm_sbatch_started_again_goes_on(allocation, checkpoint, pages, tmp_path):
    """Refused at first: the run goes on; then requeued, and started once more."""
    folder, refuse = tmp_path / "parts", tmp_path / "asked.refuse"
    words = prepare(folder, checkpoint, pages, "zero2", seconds=0.3)
    script = ["bash", str(LAUNCH / "slurm.sbatch"), str(folder / "config.yaml"), *words[1:-1]]
    refuse.touch()
    process = start(script, folder / "log", MASTER_PORT=free_port(), **allocation)
    for step in (2, 5):
        wait_for_step(folder, step)
        signal_all(map(int, (tmp_path / "tasks").read_text().split()), signal.SIGUSR1)
        wait_for_step(folder, 4)
        refuse.unlink(missing_ok=True)
    assert process.wait(TIMEOUT) == REFUSED, (folder / "log").read_text()[-3000:]
    said = (folder / "log").read_text()
    assert said.count("but the job is not requeued (Job can not be requeued): submit it") == 1
    assert "hpc_ckpt_2.ckpt; the job is requeued" in said
    process = start(script, folder / "log", MASTER_PORT=free_port(), **allocation)
    assert process.wait(TIMEOUT) == 0, (folder / "log").read_text()[-3000:]
    assert "Restoring states from the checkpoint path at" in (folder / "log").read_text()
    assert [int(line.split()[0]) for line in steps_of(folder)] == list(range(1, STEPS + 1))
