"""Two processes under DDP decide and export what one process does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lit_moe.plan import KeepPlan

ROOT = Path(__file__).parents[2]


def fit(folder, checkpoint, pages, *options):
    words = [
        sys.executable,
        "-m",
        "lit_moe",
        "fit",
        f"--config={ROOT}/configs/one_shot/reap.yaml",
        f"--model.init_args.model_name_or_path={checkpoint}",
        f"--data.init_args.calibration_files=[{pages}]",
        f"--data.init_args.test_files=[{pages}]",
        "--data.init_args.sequence_length=32",
        "--data.init_args.batch_size=4",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={folder}",
        *options,
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "lightning_logs").iterdir()
    return run


@pytest.mark.distributed
def test_two_ranks_with_half_the_text_each_make_the_same_plan_and_the_same_export(
    checkpoint, pages, tmp_path
):
    one = fit(tmp_path / "one", checkpoint, pages)
    two = fit(tmp_path / "two", checkpoint, pages, "--trainer.devices=2", "--trainer.strategy=ddp")
    assert KeepPlan.load(two / "plan.json") == KeepPlan.load(one / "plan.json")
    for file in ("model.safetensors", "config.json"):
        assert (two / "model" / file).read_bytes() == (one / "model" / file).read_bytes()
    reports = [json.loads((run / "report.json").read_text()) for run in (one, two)]
    assert reports[0]["calibration"] == reports[1]["calibration"]
    assert reports[0]["quality"]["pruned"]["tokens"] == reports[1]["quality"]["pruned"]["tokens"]
    before = [report["quality"]["before"]["perplexity"] for report in reports]
    assert before[0] == pytest.approx(before[1], rel=1e-6)
