"""What is built is what works: the wheel, installed elsewhere, run from another folder."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    words = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        f"--outdir={out}",
        str(ROOT),
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_wheel_carries_callbacks_assets_and_templates_and_nothing_at_top_level(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "lit_moe/callbacks/one_shot.py",
        "lit_moe/assets/tiny_moe/model.safetensors",
        "lit_moe/assets/text/train.parquet",
        "lit_moe/assets/NOTICE",
        "lit_moe/export/modeling.tmpl",
        "lit_moe/py.typed",
    ):
        assert needed in names
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"lit_moe"}


def test_installed_wheel_prunes_from_another_folder(wheel, pages, tmp_path):
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    site = next((home / "lib").glob("python*")) / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # Dependencies come from this environment; the wheel's own files stand before them.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run = [str(home / "bin" / "python"), "-m", "lit_moe"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def call(*words):
        return subprocess.run(
            [*run, *words], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    assert "inspect" in call("--help").stdout
    where = subprocess.run(
        [run[0], "-c", "import lit_moe.callbacks as c; print(c.__file__)"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert where.stdout.startswith(str(site))
    done = call(
        "fit",
        f"--config={ROOT}/configs/one_shot/frequency.yaml",
        f"--data.init_args.calibration_files=[{pages}]",
        f"--data.init_args.test_files=[{pages}]",
        "--data.init_args.sequence_length=64",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    )
    assert done.returncode == 0, done.stderr
    (exported,) = (tmp_path / "runs").glob("*/lightning_logs/version_0/model")
    assert (exported / "model.safetensors").is_file()
