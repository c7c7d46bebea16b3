"""A run of rounds as a function."""

import pytest
import torch

from lit_moe import MoEModule
from lit_moe.callbacks import ReportWriter
from lit_moe.module import OptimizerConfig
from tests.callbacks.lotteries import NO_QUALITY, RATE


class Double(MoEModule):
    """In float64: Adam's first steps have the size of the rate, whatever gradient rounding left."""

    def build(self):
        model = super().build()
        model.set_experts_implementation("eager")  # torch's grouped products know no float64
        return model.double()


@pytest.fixture
def run(checkpoint, make_data, make_trainer):
    """Return a function that fits with some callbacks; all blocks make one batch."""

    def fit(*callbacks, resume_from=None, schedule="constant", writer=None, kind=None, **options):
        torch.manual_seed(0)
        data = make_data(batch_size=len(make_data().blocks("train")))
        writer = writer or ReportWriter(**NO_QUALITY)
        defaults = {"max_steps": -1, "max_epochs": -1}
        trainer = make_trainer(*callbacks, writer, **{**defaults, **options})
        config = OptimizerConfig(learning_rate=RATE, schedule=schedule)
        module = (kind or MoEModule)(str(checkpoint), optimizer=config)
        module.resume_from = resume_from
        trainer.fit(module, datamodule=data, ckpt_path=resume_from)
        return trainer, module, writer

    return fit
