"""kill -9 at any moment, then the same command again: the model that comes out is the same."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.runs import some

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]
CHECKPOINTS = "lightning.pytorch.callbacks.ModelCheckpoint"
STEPS = 24


def command(folder, checkpoint, text, *options):
    return [
        sys.executable,
        "-m",
        "lit_moe",
        "fit",
        f"--config={ROOT}/configs/one_shot/reap.yaml",
        f"--model.init_args.model_name_or_path={checkpoint}",
        "--model.init_args.loss.distillation=0.5",
        *(f"--data.init_args.{k}_files=[{text}]" for k in ("calibration", "train", "test")),
        "--data.init_args.sequence_length=32",
        "--data.init_args.batch_size=4",
        "--data.init_args.test_tokens=512",
        "--trainer.accelerator=cpu",
        "--trainer.devices=2",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_checkpointing=true",
        "--trainer.limit_train_batches=1.0",
        f"--trainer.max_steps={STEPS}",
        f"--trainer.callbacks+={CHECKPOINTS}",
        "--trainer.callbacks.every_n_train_steps=2",
        "--trainer.callbacks.save_last=true",
        f"--trainer.default_root_dir={folder}",
        f"--ExportModel.path={folder}/model",
        *options,
    ]


def start(*words):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
    )


def finish(process, timeout=200):
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def weights(folder):
    return (folder / "model" / "model.safetensors").read_bytes()


def ranks_of(process):
    """The process ids of the ranks above 0, which rank 0 started."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [
        pid for pid in map(int, children) if b"lit_moe" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def wait_for_checkpoint(folder, process):
    for _ in range(1200):
        if list(folder.rglob("last.ckpt")) or process.poll() is not None:
            break
        time.sleep(0.1)
    assert process.poll() is None, process.communicate()[0]


@pytest.fixture(scope="module")
def uninterrupted(restless, chapters, tmp_path_factory):
    """Strategy -> folder of a run that nobody stopped."""
    known = {}

    def run(strategy):
        if strategy not in known:
            folder = tmp_path_factory.mktemp(strategy)
            options = [f"--trainer.strategy={strategy}", "--ckpt_path=last"]
            code, output = finish(start(*command(folder, restless, chapters, *options)))
            assert code == 0, output
            assert "no checkpoint below" in output
            known[strategy] = folder
        return known[strategy]

    return run


def wait_for_a_save(folder, process):
    """Return while a checkpoint is being written, another one being there."""
    while process.poll() is None:
        if list(folder.rglob(".*.ckpt.partial")):
            return
        time.sleep(0.001)
    raise AssertionError(process.communicate()[0])


def wait_for_the_export(folder, process):
    """Return while the model is being written or compared, before it has its name."""
    while process.poll() is None:
        if list(folder.glob(".model*")):
            return
        time.sleep(0.001)
    raise AssertionError(process.communicate()[0])


def kill(process, who):
    victims = ranks_of(process) if who == "one" else []
    if who == "all":
        os.killpg(process.pid, signal.SIGKILL)
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    process.communicate(timeout=60)


@pytest.mark.parametrize(
    ("who", "moment"),
    [
        ("all", "between"),
        pytest.param("all", "saving", marks=pytest.mark.slow),
        pytest.param("one", "between", marks=pytest.mark.slow),
        pytest.param("one", "saving", marks=pytest.mark.slow),
        pytest.param("all", "exporting", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("strategy", some(["zero3"], ["ddp", "zero1", "zero2"]))
def test_killed_ranks_and_the_same_command_again(
    uninterrupted, restless, chapters, tmp_path, strategy, who, moment
):
    words = command(
        tmp_path, restless, chapters, f"--trainer.strategy={strategy}", "--ckpt_path=last"
    )
    process = start(*words)
    wait_for_checkpoint(tmp_path, process)
    if moment == "saving":
        wait_for_a_save(tmp_path, process)
    elif moment == "exporting":
        wait_for_the_export(tmp_path, process)
    else:
        time.sleep(0.3)
    kill(process, who)
    assert not (tmp_path / "model").exists()
    code, output = finish(start(*words))
    assert code == 0, output
    assert "Restoring states from the checkpoint" in output
    assert weights(tmp_path) == weights(uninterrupted(strategy))


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("strategy", some(["zero3"], ["ddp", "zero1", "zero2"]))
def test_a_dead_rank_takes_the_others_down(restless, chapters, tmp_path, victim, strategy):
    options = [f"--trainer.strategy={strategy}", "--trainer.max_steps=5000"]
    process = start(*command(tmp_path, restless, chapters, *options))
    wait_for_checkpoint(tmp_path, process)
    (other,) = ranks_of(process)
    os.kill(process.pid if victim == 0 else other, signal.SIGKILL)
    began = time.monotonic()
    code, output = finish(process, timeout=60)  # until the last holder of its output is gone
    assert code != 0
    assert time.monotonic() - began < 60
    if victim == 1:
        assert "rank 0 lost contact to another process of the run" in output, output
        assert "--ckpt_path last" in output


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_killed_before_anything_was_saved(uninterrupted, restless, chapters, tmp_path, strategy):
    options = (f"--trainer.strategy={strategy}", "--ckpt_path=last")
    process = start(*command(tmp_path, restless, chapters, *options))
    for _ in range(6000):  # its first file: the model is built, or being observed
        if list(tmp_path.rglob("*.*")) or process.poll() is not None:
            break
        time.sleep(0.01)
    assert not list(tmp_path.rglob("*.ckpt"))
    kill(process, "all")
    code, output = finish(start(*command(tmp_path, restless, chapters, *options)))
    assert code == 0, output
    assert weights(tmp_path) == weights(uninterrupted(strategy))
