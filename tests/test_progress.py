"""Progress bars: none for what is done in a moment, and no epoch that never comes."""

import sys
import time

import pytest
from transformers.utils import logging as hf_logging

from lit_moe import cli
from lit_moe.checkpoints import load
from lit_moe.export import export
from lit_moe.progress import late_progress_bars
from lit_moe.testing import tiny_moe


def test_a_quick_load_and_a_quick_export_show_no_bar(tmp_path, capfd):
    tiny_moe("mixtral").save_pretrained(tmp_path / "model")
    assert "Writing model shards" in capfd.readouterr().err
    export(load(tmp_path / "model"), tmp_path / "export")
    assert capfd.readouterr().err == ""


def test_work_that_takes_longer_shows_its_bar(capfd):
    with late_progress_bars(0.05):
        for _ in hf_logging.tqdm(range(3), desc="slow work"):
            time.sleep(0.1)
    assert "slow work: 100%" in capfd.readouterr().err


def test_a_hook_of_somebody_else_is_called_and_is_there_again_afterwards():
    seen = []

    def hook(bar, args, options):
        seen.append(options)
        return bar(*args, **options)

    earlier = hf_logging.set_tqdm_hook(hook)
    try:
        with late_progress_bars(5):
            list(hf_logging.tqdm([1], desc="work"))
        list(hf_logging.tqdm([1], desc="later", disable=True))
    finally:
        hf_logging.set_tqdm_hook(earlier)
    assert seen == [{"delay": 5, "desc": "work"}, {"desc": "later", "disable": True}]


@pytest.mark.parametrize(
    ("option", "shown"),
    [
        ("--trainer.enable_progress_bar=true", "Epoch 0 "),
        ("--trainer.enable_progress_bar=false", None),
        ("--trainer.callbacks+=lightning.pytorch.callbacks.TQDMProgressBar", "Epoch 0:"),
    ],
)
def test_a_run_that_ends_by_steps_names_no_last_epoch(
    option, shown, checkpoint, pages, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(sys, "argv", ["lit-moe"])
    words = [
        "--config=configs/one_shot/random.yaml",
        f"--model.init_args.model_name_or_path={checkpoint}",
        f"--data.init_args.calibration_files=[{pages}]",
        f"--data.init_args.train_files=[{pages}]",
        f"--data.init_args.test_files=[{pages}]",
        "--data.init_args.sequence_length=32",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=2",
        "--trainer.limit_train_batches=2",
        "--trainer.log_every_n_steps=1",
        option,
        f"--trainer.default_root_dir={tmp_path}",
    ]
    assert cli.main(["fit", *words]) == 0
    output = "".join(capfd.readouterr())
    assert ("Epoch" in output) == (shown is not None)
    assert shown is None or shown in output
    assert "/-2" not in output
    assert "Loading weights" not in output
    assert "Writing model shards" not in output
