from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest

from lit_moe.checkpoints import load
from lit_moe.errors import ExportError
from lit_moe.export import check_target, export
from lit_moe.testing import tiny_moe


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def model():
    return tiny_moe("mixtral")


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 2 MiB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)]
    if shutil.which("mount") is None or _fails(command):
        pytest.skip("cannot mount a small file system here")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_an_existing_target_is_refused_before_anything_is_done(model, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match="exists; choose another or set overwrite=True"):
        check_target(tmp_path / "out")
    with pytest.raises(ExportError, match="exists"):
        export(model, tmp_path / "out")


def test_overwrite_replaces_a_model_folder_but_nothing_else(model, tmp_path):
    export(model, tmp_path / "out")
    (tmp_path / "out" / "old").touch()
    export(model, tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "old").exists()
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.tex").touch()
    with pytest.raises(ExportError, match="is no model folder"):
        export(model, tmp_path / "precious", overwrite=True)
    assert names(tmp_path) == ["out", "precious"]


def test_a_disk_too_small_is_seen_before_writing(model, small_disk):
    (small_disk / "ballast").write_bytes(bytes(1_900_000))
    with pytest.raises(ExportError, match=r"disk full: .* needs [\d,]+ bytes and [\d,]+ are free"):
        export(model, small_disk / "out")
    assert names(small_disk) == ["ballast"]


@pytest.mark.parametrize("file_that_fails", ["model.safetensors", "README.md"])
def test_a_disk_that_fills_up_leaves_nothing_and_spares_the_older_export(
    file_that_fails, model, small_disk, monkeypatch
):
    export(model, small_disk / "out")
    older = {path.name: path.read_bytes() for path in (small_disk / "out").iterdir()}
    pages = {name: -(-len(content) // 4096) for name, content in older.items()}
    enough_until_then = sum(pages.values()) - pages[file_that_fails]
    # Somebody else's file takes the space after the check for free space.
    free = shutil.disk_usage(small_disk).free
    monkeypatch.setattr(shutil, "disk_usage", _generous(shutil.disk_usage))
    (small_disk / "ballast").write_bytes(bytes(free - 4096 * enough_until_then))
    with pytest.raises(ExportError, match=r"disk full.*nothing was left behind"):
        export(model, small_disk / "out", overwrite=True, verify=False)
    assert names(small_disk) == ["ballast", "out"]
    assert {p.name: p.read_bytes() for p in (small_disk / "out").iterdir()} == older
    load(small_disk / "out")


def _fails(command):
    return subprocess.run(command, check=False, capture_output=True).returncode != 0


def _generous(disk_usage):
    return lambda path: disk_usage(path)._replace(free=1 << 40)


KILLED = """
import os, signal, sys, threading
from lit_moe.export import export, verification
from lit_moe.testing import tiny_moe

# Stop inside the verification: all weights are written, nothing is renamed yet.
def reached(model):
    print("written", flush=True)
    threading.Event().wait()
verification.probe_inputs = reached
export(tiny_moe("mixtral", seed=1), sys.argv[1], overwrite=True)
"""


def kill_while_exporting(target):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_a_killed_export_leaves_only_a_hidden_folder_that_the_next_one_removes(model, tmp_path):
    kill_while_exporting(tmp_path / "out")
    (left,) = names(tmp_path)
    assert left.startswith(".out.lit-moe-partial-")
    export(model, tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_a_killed_export_spares_the_older_one(model, tmp_path):
    export(model, tmp_path / "out")
    older = (tmp_path / "out" / "model.safetensors").read_bytes()
    kill_while_exporting(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == older


def test_a_kill_between_the_two_renames_is_mended_by_the_next_export(model, tmp_path):
    export(model, tmp_path / "out")
    dead = _pid_of_a_dead_process()
    (tmp_path / "out").rename(tmp_path / f".out.lit-moe-replaced-{dead}")
    (tmp_path / f".out.lit-moe-partial-{dead}").mkdir()
    with pytest.raises(ExportError, match="exists"):
        export(model, tmp_path / "out")
    assert names(tmp_path) == ["out"]
    load(tmp_path / "out")


def test_the_folder_of_a_running_export_is_left_alone(model, tmp_path):
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        (tmp_path / f".out.lit-moe-partial-{sleeper.pid}").mkdir()
        export(model, tmp_path / "out", verify=False)
        assert len(names(tmp_path)) == 2
    finally:
        sleeper.kill()
        sleeper.wait()


def test_a_folder_without_permission_is_refused_before_anything_is_done(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(ExportError, match="no permission to write"):
        check_target(tmp_path / "out")


def _pid_of_a_dead_process():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid
