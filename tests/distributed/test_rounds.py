"""Rounds of dropping and fine-tuning under every strategy."""

import pytest
import safetensors.torch
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_moe.callbacks import ExportModel, IterativePruning, ReportWriter
from lit_moe.callbacks.rounds import FineTuning
from lit_moe.plan import KeepPlan
from tests.distributed.runs import some

pytestmark = pytest.mark.distributed
OPTIONS = {"max_steps": -1, "max_epochs": -1, "enable_checkpointing": True}


def rounds(folder=None, every=100, compact="end"):
    def callbacks():
        training = FineTuning(first=2, growth=1.5, unit="steps", when_data_ends="repeat")
        return [
            ReportWriter(figures=False),
            IterativePruning(
                "ean", keep_ratio=0.5, rounds=4, fine_tuning=training, compact=compact
            ),
            ExportModel(),
            ModelCheckpoint(
                dirpath=None if folder is None else str(folder),
                filename="{step}",
                every_n_train_steps=every,
                save_top_k=-1,
            ),
        ]

    return callbacks


@pytest.mark.parametrize("compact", ["end", "each_round"])
@pytest.mark.parametrize("mode", some(["zero2", "zero3"], ["ddp", "zero1", "zero3-sharded-load"]))
def test_rounds_under_deepspeed_are_those_of_one_process(setup, mode, compact):
    one = setup.fit("single", callbacks=rounds(), **OPTIONS)[0]
    two = setup.fit(mode, callbacks=rounds(compact=compact), **OPTIONS)[0]
    assert two == pytest.approx(one, abs=1e-4)
    folders = [setup.folder / "run" / name for name in ("single", mode)]
    plans = [KeepPlan.load(folder / "plan.json") for folder in folders]
    assert plans[0] == plans[1]
    assert set(plans[0].counts.values()) == {4}
    first, second = (
        safetensors.torch.load_file(folder / "model" / "model.safetensors") for folder in folders
    )
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=1e-3)


@pytest.mark.parametrize("compact", ["end", pytest.param("each_round", marks=pytest.mark.slow)])
def test_resumed_in_the_middle_of_a_round_under_zero3(setup, compact):
    folder = setup.folder / "checkpoints"
    losses = setup.fit("zero3", callbacks=rounds(folder, every=4, compact=compact), **OPTIONS)[0]
    resumed = setup.fit(
        "zero3",
        "again",
        callbacks=rounds(setup.folder / "new", compact=compact),
        resume=str(folder / "step=4.ckpt"),
        **OPTIONS,
    )[0]
    assert resumed == pytest.approx(losses[4:], abs=1e-5)
    assert KeepPlan.load(setup.folder / "again" / "zero3" / "plan.json") == KeepPlan.load(
        setup.folder / "run" / "zero3" / "plan.json"
    )
