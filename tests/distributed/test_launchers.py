"""Every way to start two ranks gives the losses of one process.

The files in launch/ are what is run, as they stand; only variables that they read are set.
"""

import re
from pathlib import Path

import pytest
import yaml

from tests.distributed.slurm_stand_in import free_port, job_variables
from tests.distributed.tiny_fit import (
    ROOT,
    finish,
    finish_forks,
    fork_fit,
    losses,
    start,
    world_size,
    write_config,
)

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
LAUNCH = ROOT / "launch"


@pytest.fixture(scope="module")
def one(checkpoint, pages, tmp_path_factory):
    """Losses of one process without any strategy."""
    folder = tmp_path_factory.mktemp("one")
    config = write_config(folder, checkpoint, pages, stage=None)
    log = folder / "log"
    finish_forks((fork_fit([f"--config={config}"], log), log))
    assert world_size(folder) == 1
    return losses(folder)


@pytest.fixture
def two(checkpoint, pages, tmp_path):
    """Return a function that writes the config of two ranks of a ZeRO stage."""
    return lambda stage: write_config(tmp_path, checkpoint, pages, stage=stage)


def agrees(folder: Path, one: list[float]) -> None:
    assert world_size(folder) == 2
    assert losses(folder) == pytest.approx(one, abs=1e-5)


def test_local_sh(one, two, tmp_path):
    words = [str(LAUNCH / "local.sh"), str(two(1)), "--trainer.devices=2"]
    log = tmp_path / "log"
    finish((start(words, log), log))
    agrees(tmp_path, one)


def test_torchrun_sh(one, two, tmp_path):
    log = tmp_path / "log"
    words = [str(LAUNCH / "torchrun.sh"), str(two(3))]
    variables = {"NODES": "1", "DEVICES": "2", "MASTER_PORT": free_port()}
    finish((start(words, log, **variables), log))
    agrees(tmp_path, one)


def test_deepspeed_sh_without_ssh(one, two, tmp_path):
    hostfile, log = tmp_path / "hostfile", tmp_path / "log"
    hostfile.write_text("localhost slots=2\n")
    words = [str(LAUNCH / "deepspeed.sh"), str(two(2))]
    variables = {"NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    variables |= {"HOSTFILE": str(hostfile), "DEVICES": "2"}
    finish((start(words, log, **variables), log))
    agrees(tmp_path, one)


def test_plain_variables_two_nodes_of_one_rank(one, two, tmp_path):
    config = two(2)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    words = [f"--config={config}", "--trainer.num_nodes=2", "--trainer.devices=1"]
    started = [
        (fork_fit(words, log, NODE_RANK=str(rank), **common), log)
        for rank, log in enumerate((tmp_path / "log0", tmp_path / "log1"))
    ]
    finish_forks(*started)
    agrees(tmp_path, one)


def test_slurm_sbatch_under_two_tasks(one, two, tmp_path):
    """``srun`` is a stand-in: it starts the tasks with the variables that SLURM would set."""
    variables = {**job_variables(tmp_path), "MASTER_PORT": free_port()}
    log = tmp_path / "log"
    finish((start(["bash", str(LAUNCH / "slurm.sbatch"), str(two(1))], log, **variables), log))
    agrees(tmp_path, one)


def test_the_command_of_k8s_yaml_in_two_pods(one, two, tmp_path):
    job = list(yaml.safe_load_all((LAUNCH / "k8s.yaml").read_text()))[1]
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["bash", "-c"]
    script = re.sub(r"29500", free_port(), container["args"][0])
    script += f" --trainer.default_root_dir {tmp_path / 'run'}"
    variables = {"CONFIG": str(two(2)), "NODES": "2", "DEVICES": "1", "MASTER_ADDR": "127.0.0.1"}
    assert set(variables) == {entry["name"] for entry in container["env"]}
    logs = [tmp_path / f"log{index}" for index in (0, 1)]
    pods = [
        start(["bash", "-c", script], log, JOB_COMPLETION_INDEX=str(index), **variables)
        for index, log in enumerate(logs)
    ]
    finish(*zip(pods, logs, strict=True))
    agrees(tmp_path, one)
