"""Cached and external teachers on two ranks: the losses of one process with a live teacher."""

import warnings

import lightning as L
import pytest

from lit_moe import MoEModule
from lit_moe.data import TextDataModule
from lit_moe.module import LossWeights, OptimizerConfig, TeacherConfig
from lit_moe.testing import run_distributed
from tests.distributed.runs import GLOBAL_BATCH, MODES, Losses, some, strategy_of

pytestmark = pytest.mark.distributed
TOP = {"next_token": 0.5, "distillation": 0.5, "top_k": 16}
EXPERTS = {"experts": 1.0, "experts_lambda": 1.0, "router": 1.0}
STEPS = 4


@pytest.fixture
def fit(checkpoint, chapters):
    """Return a function that fits in one mode; gives losses and whether there was a teacher."""

    def run(mode, loss, teacher=None):
        world_size = MODES[mode][1]

        def rank(_):
            warnings.simplefilter("ignore")  # those of deepspeed are not ours to mend
            L.seed_everything(1, verbose=False)
            files = [chapters]
            data = TextDataModule(
                *(files, files, files, files),
                sequence_length=32,
                batch_size=GLOBAL_BATCH // world_size,
            )
            module = MoEModule(
                str(checkpoint),
                optimizer=OptimizerConfig(learning_rate=3e-3),
                loss=LossWeights(**loss),
                teacher=teacher,
            )
            losses = Losses()
            trainer = L.Trainer(
                accelerator="cpu",
                strategy=strategy_of(mode),
                devices=world_size,
                max_steps=STEPS,
                limit_val_batches=0,
                enable_checkpointing=False,
                enable_model_summary=False,
                enable_progress_bar=False,
                logger=False,
                callbacks=[losses],
            )
            trainer.fit(module, datamodule=data)
            return losses.values, module.teacher is not None

        return run_distributed(rank, world_size, group=False)[0]

    return run


@pytest.mark.parametrize("mode", some(["ddp", "zero3-sharded-load"], ["zero2", "zero3"]))
def test_ranks_fill_one_cache_together_and_need_no_teacher(fit, mode, tmp_path):
    live, had_teacher = fit("single", TOP)
    cached, has_teacher = fit(mode, {**TOP, "cache": str(tmp_path / "cache")})
    assert (had_teacher, has_teacher) == (True, False)
    assert cached == pytest.approx(live, abs=1e-4)  # float16 on disk may round otherwise
    alone, _ = fit("single", {**TOP, "cache": str(tmp_path / "cache")})
    assert alone == pytest.approx(live, abs=1e-4)


@pytest.mark.parametrize("mode", some(["zero3-sharded-load"], ["ddp", "zero2", "zero3"]))
def test_an_external_teacher_gives_the_losses_of_one_process(fit, checkpoint, mode):
    teacher = TeacherConfig(str(checkpoint), "float32")
    live, _ = fit("single", EXPERTS)
    assert fit("single", EXPERTS, teacher)[0] == live
    assert fit(mode, EXPERTS, teacher)[0] == pytest.approx(live, abs=1e-4)
