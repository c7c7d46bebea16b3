"""Rounds under DDP: two ranks with half of each batch do what one rank does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


def fit(folder, checkpoint, pages, batch_size, *options):
    words = [
        *(sys.executable, "-m", "lit_moe", "fit"),
        f"--config={ROOT}/configs/mc_suite/lottery.yaml",
        f"--model.init_args.model_name_or_path={checkpoint}",
        f"--data.init_args.calibration_files=[{pages}]",
        f"--data.init_args.train_files=[{pages}]",
        f"--data.init_args.test_files=[{pages}]",
        "--data.init_args.sequence_length=32",
        "--data.init_args.calibration_tokens=256",
        f"--data.init_args.batch_size={batch_size}",
        "--IterativePruning.keep_ratio=0.5",
        "--IterativePruning.rounds=2",
        "--IterativePruning.criterion=egn",
        "--IterativePruning.fine_tuning.first=256",
        "--IterativePruning.fine_tuning.growth=1",
        "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={folder}",
        *options,
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "lightning_logs").iterdir()
    return run


@pytest.mark.slow
@pytest.mark.distributed
def test_two_ranks_with_half_of_each_batch_do_what_one_rank_does(checkpoint, pages, tmp_path):
    one = fit(tmp_path / "one", checkpoint, pages, 8)
    two = fit(
        tmp_path / "two", checkpoint, pages, 4, "--trainer.devices=2", "--trainer.strategy=ddp"
    )
    first, second = (json.loads((run / "rounds.json").read_text()) for run in (one, two))
    assert first == second
    assert first["steps"] == [1, 1]
    assert first["rounds"][1]["tokens_before"] == 256
    mine, theirs = (load_file(run / "model" / "model.safetensors") for run in (one, two))
    for name, tensor in mine.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-4, msg=name)
