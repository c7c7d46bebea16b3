"""A whole run from the command line: two processes under DDP refit what one process does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_with_half_the_text_each_export_the_model_of_one(checkpoint, pages, tmp_path):
    one = run_config(tmp_path / "one", checkpoint, pages)
    two = run_config(
        tmp_path / "two", checkpoint, pages, "--trainer.devices=2", "--trainer.strategy=ddp"
    )
    assert (one / "plan.json").read_text() == (two / "plan.json").read_text()
    reports = [json.loads((run / "report.json").read_text()) for run in (one, two)]
    records = [report["refit"] for report in reports]
    for key in ("mode", "tokens", "held_out_tokens", "solver", "kept"):
        assert records[0][key] == records[1][key], key
    models = [AutoModelForCausalLM.from_pretrained(run / "model") for run in (one, two)]
    for (name, mine), theirs in zip(
        models[0].state_dict().items(), models[1].state_dict().values(), strict=True
    ):
        torch.testing.assert_close(theirs, mine, rtol=1e-3, atol=1e-4, msg=name)


def run_config(folder, checkpoint, pages, *options):
    words = [
        sys.executable,
        "-m",
        "lit_moe",
        "fit",
        f"--config={ROOT}/configs/refit/reap_refit.yaml",
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
