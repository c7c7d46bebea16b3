"""The cache holds what training reads, however many steps that turns out to be."""

import pytest
import torch

from lit_moe import MoEModule
from lit_moe.callbacks import IterativePruning, ReportWriter
from lit_moe.module import LossWeights, OptimizerConfig
from lit_moe.teachers import training_batches
from tests.callbacks.lotteries import Watch as Saver
from tests.callbacks.lotteries import steps
from tests.distill.test_cached_runs import LOSS, Watch


def lottery(checkpoint, data, make_trainer, cache, **options):
    torch.manual_seed(1)
    watch = Watch()
    pruning = IterativePruning(
        "weight_norm", keep_ratio=0.5, rounds=2, fine_tuning=steps(first=4, optimizer="reset")
    )
    quiet = ReportWriter(measure_quality=False, figures=False)
    trainer = make_trainer(pruning, quiet, watch, **{"max_steps": -1, "max_epochs": -1, **options})
    module = MoEModule(
        str(checkpoint),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        loss=LossWeights(**LOSS, cache=cache),
    )
    trainer.fit(module, datamodule=data)
    return watch.losses


@pytest.mark.parametrize("balanced", [False, True])
def test_rounds_that_repeat_the_text_find_all_of_it(
    balanced, checkpoint, make_data, make_trainer, tmp_path
):
    def data():
        return make_data(balance_domains=balanced, batch_size=7)

    blocks = len(data().blocks("train"))
    assert blocks % 7  # each epoch leaves other blocks out
    assert blocks // 7 < 8  # and the rounds take more than one
    live = lottery(checkpoint, data(), make_trainer, None)
    cached = lottery(checkpoint, data(), make_trainer, str(tmp_path / "cache"))
    assert len(live) == 8
    assert cached == pytest.approx(live, abs=1e-5)  # float16 logits of other batches


def test_a_resumed_run_may_be_longer(checkpoint, make_data, make_trainer, tmp_path):
    saved = tmp_path / "second.ckpt"

    def fit(max_steps, cache, resume=None):
        torch.manual_seed(1)
        watch, saver = Watch(), Saver(save_at=2, path=saved)
        trainer = make_trainer(watch, saver, max_steps=max_steps)
        module = MoEModule(str(checkpoint), loss=LossWeights(**LOSS, cache=cache))
        module.resume_from = resume
        trainer.fit(module, datamodule=make_data(batch_size=3), ckpt_path=resume)
        return watch.losses

    cache = str(tmp_path / "cache")
    live = fit(3, None) + fit(7, None, str(saved))
    cached = fit(3, cache) + fit(7, cache, str(saved))
    assert len(cached) == 3 + 5
    assert cached == pytest.approx(live, abs=1e-5)


def blocks_of(batches):
    return [tuple(row.tolist()) for batch in batches for row in batch["input_ids"]]


def test_a_short_run_asks_for_its_own_batches_only(make_data, make_trainer):
    data = make_data(batch_size=2)
    trainer = make_trainer(max_steps=3, accumulate_grad_batches=2)
    trainer.datamodule = data
    data.trainer = trainer
    found = blocks_of(training_batches(trainer))
    assert len(found) == 3 * 2 * 2
    trainer.fit_loop.epoch_loop.max_steps = -1
    trainer.fit_loop.max_epochs = -1
    everything = blocks_of(training_batches(trainer))
    expected = {tuple(row.tolist()) for row in data.blocks("train").input_ids}
    assert set(everything) == expected
    assert set(found) < expected


def test_ranks_that_do_not_divide_the_text_share_all_of_it(make_data, make_trainer, monkeypatch):
    data = make_data(batch_size=2)
    trainer = make_trainer(max_steps=-1, max_epochs=-1)
    trainer.datamodule = data
    data.trainer = trainer
    count = len(data.blocks("train"))
    world_size = next(n for n in (2, 3, 5) if count % n)
    monkeypatch.setattr(type(trainer), "world_size", world_size)
    shares = []
    for rank in range(world_size):
        monkeypatch.setattr(type(trainer), "global_rank", rank)
        shares.append(blocks_of(training_batches(trainer)))
    assert len({len(share) for share in shares}) == 1
    assert set().union(*shares) == {tuple(row.tolist()) for row in data.blocks("train").input_ids}


def test_the_second_lottery_asks_no_teacher(
    checkpoint, make_data, make_trainer, tmp_path, monkeypatch
):
    cache = str(tmp_path / "cache")
    first = lottery(checkpoint, make_data(), make_trainer, cache)

    def never(*_, **__):
        raise AssertionError("the teacher was asked again")

    monkeypatch.setattr("lit_moe.teachers.top_logits", never)
    assert lottery(checkpoint, make_data(), make_trainer, cache) == first
