"""The quickstart as two ZeRO-3 ranks is the quickstart."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]


def report_of(config, folder):
    """Run a config of the repository; return its report."""
    words = ["-m", "lit_moe", "fit", f"--config={ROOT}/configs/{config}"]
    done = subprocess.run(
        [sys.executable, *words, f"--trainer.default_root_dir={folder}"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = [p for p in Path(folder).rglob("report.json") if p.parent.name != "model"]
    return json.loads(file.read_text())


def test_two_zero3_ranks_write_the_report_of_one_process(tmp_path):
    one = report_of("quickstart.yaml", tmp_path / "one")
    two = report_of("deepspeed/quickstart_zero3.yaml", tmp_path / "two")
    assert two["experts"] == one["experts"]
    assert two["parameters"] == one["parameters"]
    assert two["export"]["layout"] == one["export"]["layout"]
    assert list(two["quality"]) == list(one["quality"])
    for stage, quality in one["quality"].items():
        assert two["quality"][stage]["perplexity"] == pytest.approx(quality["perplexity"], rel=5e-3)
