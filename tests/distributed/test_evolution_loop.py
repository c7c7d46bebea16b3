"""A search in validation loops under the strategies that can wrap a model twice."""

import warnings

import pytest
import torch
from lightning import Callback

from lit_moe import MoEModule
from lit_moe.adapters import count_experts, find_sites
from lit_moe.testing import run_distributed
from tests.callbacks.test_evolution import LAYERS, history_of, quiet, searching
from tests.callbacks.test_evolution import make_texts as make_texts
from tests.callbacks.test_evolution import texts as texts
from tests.distributed.runs import MODES, Losses, some, strategy_of

pytestmark = pytest.mark.distributed


class Saving(Callback):
    """Saves a checkpoint after one step."""

    def __init__(self, step, folder):
        self.step, self.path = step, folder / "saved.ckpt"

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.fixture
def search_in(checkpoint, make_texts, make_trainer, tmp_path):
    """Return a function that searches and trains for three steps, and what rank 0 found."""

    def run(mode, loop, *, resume=None, save_at=None):
        world_size = MODES[mode][1]

        def rank(_):
            warnings.simplefilter("ignore")  # those of deepspeed are not ours to mend
            torch.manual_seed(3)
            losses, folder = Losses(), tmp_path / mode
            trainer = make_trainer(
                searching(loop=loop, effort={"children": 4}),
                losses,
                Saving(save_at, tmp_path),
                quiet(),
                devices=world_size,
                strategy=strategy_of(mode),
                default_root_dir=str(folder),
                logger=False,
                max_steps=3,
                limit_val_batches=1.0,
            )
            module = MoEModule(str(checkpoint))
            module.resume_from = resume
            data = make_texts(batch_size=8 // world_size)
            trainer.fit(module, datamodule=data, ckpt_path=resume)
            assert module.plan is not None
            counts = count_experts(find_sites(module.built_model))
            return counts, module.plan.to_dict(), losses.values, history_of(folder / "search.jsonl")

        return run_distributed(rank, world_size, group=False)

    return run


@pytest.mark.parametrize("mode", some(["ddp", "zero2"], ["zero1"]))
def test_two_ranks_search_in_validation_loops_like_one_process_at_fit_start(search_in, mode):
    counts, plan, losses, history = search_in("single", "fit_start")[0]
    assert counts == dict.fromkeys(LAYERS, 4)
    for found in search_in(mode, "validation"):
        assert found[0] == counts
        assert found[1] == plan
        assert found[3] == history
        assert found[2] == pytest.approx(losses, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "zero2"])
def test_two_ranks_go_on_from_a_checkpoint_after_the_search(search_in, mode, tmp_path):
    whole = search_in(mode, "validation", save_at=1)[0]
    (tmp_path / mode / "search.jsonl").write_text("")
    resumed = search_in(mode, "validation", resume=str(tmp_path / "saved.ckpt"))[0]
    assert resumed[:2] == whole[:2]
    assert resumed[2] == pytest.approx(whole[2][1:], abs=1e-6)
    assert resumed[3] == []
