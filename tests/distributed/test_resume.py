"""A run that goes on from a checkpoint is the run that was never stopped."""

import os
import shutil
import time

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_moe.callbacks import OneShotPruning
from lit_moe.checkpoint_io import AtomicCheckpointIO
from lit_moe.errors import LitMoEError
from lit_moe.resuming import newest_checkpoint, put_back
from lit_moe.sharding.checkpoints import written_together
from tests.distributed.runs import Setup, some

pytestmark = pytest.mark.distributed


def keeping(folder, **options):
    """Callbacks that prune and keep every checkpoint."""

    def callbacks():
        checkpoints = ModelCheckpoint(
            dirpath=str(folder), filename="{step}", save_top_k=-1, save_last=True, **options
        )
        return [OneShotPruning("reap", keep_ratio=0.5), checkpoints]

    return callbacks


TASK = {"distillation": 0.5, "max_steps": 14, "enable_checkpointing": True}


@pytest.fixture(scope="module")
def original(restless, chapters, tmp_path_factory):
    """Mode -> losses and checkpoints (every 4 steps) of an uninterrupted run of two epochs."""
    setup = Setup(restless, chapters, tmp_path_factory.mktemp("original"))
    known = {}

    def run(mode):
        if mode not in known:
            folder = setup.folder / "checkpoints" / mode
            losses = setup.fit(mode, callbacks=keeping(folder, every_n_train_steps=4), **TASK)
            known[mode] = losses[0], folder
        return known[mode]

    return run


@pytest.fixture
def quiet(restless, chapters, tmp_path):
    return Setup(restless, chapters, tmp_path)


@pytest.mark.parametrize("step", [4, 12])
@pytest.mark.parametrize(
    "mode", some(["single", "zero2", "zero3"], ["ddp", "zero1", "zero3-sharded-load"])
)
def test_resumed_within_an_epoch(quiet, original, mode, step):
    losses, folder = original(mode)
    callbacks = keeping(quiet.folder / "new", every_n_train_steps=100)
    resumed = quiet.fit(mode, callbacks=callbacks, resume=str(folder / f"step={step}.ckpt"), **TASK)
    assert resumed[0] == losses[step:]


@pytest.mark.parametrize(
    "mode", some(["single", "zero3"], ["ddp", "zero1", "zero2", "zero3-sharded-load"])
)
@pytest.mark.parametrize(
    ("ends", "validation"),
    [
        ({"max_steps": 20}, 0),
        ({"max_steps": -1, "max_epochs": 2}, 1),
        pytest.param({"max_steps": 20}, 1, marks=pytest.mark.slow),
        pytest.param({"max_steps": -1, "max_epochs": 2}, 0, marks=pytest.mark.slow),
    ],
)
def test_resumed_at_the_end_of_an_epoch(quiet, mode, ends, validation):
    options = {**TASK, **ends, "limit_val_batches": validation}
    at_the_end = {} if validation else {"save_on_train_epoch_end": True}
    folder = quiet.folder / "checkpoints"
    losses = quiet.fit(mode, callbacks=keeping(folder, **at_the_end), **options)[0]
    steps = min(int(path.stem.partition("=")[2]) for path in folder.glob("step=*"))
    assert 5 < steps < 20, "of an epoch"
    again = keeping(quiet.folder / "new")
    first = str(folder / f"step={steps}.ckpt")
    resumed = quiet.fit(mode, callbacks=again, resume=first, **options)
    assert resumed[0] == losses[steps:]
    assert len(losses) == (20 if ends["max_steps"] == 20 else 2 * steps)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("zero2", "zero3"),
        ("zero3", "zero2"),
        pytest.param("zero1", "zero2", marks=pytest.mark.slow),
        ("zero3", "zero3 on 1"),
        pytest.param("zero2", "zero1 on 1", marks=pytest.mark.slow),
        pytest.param("zero3", "zero3 on 4", marks=pytest.mark.slow),
    ],
)
def test_another_stage_or_another_number_of_ranks(checkpoint, chapters, tmp_path, before, after):
    setup = Setup(checkpoint, chapters, tmp_path)
    folder = tmp_path / "checkpoints"
    task = {**TASK, "max_steps": 10}
    losses = setup.fit(before, callbacks=keeping(folder, every_n_train_steps=4), **task)[0]
    mode, _, ranks = after.partition(" on ")
    resumed = setup.fit(
        mode,
        callbacks=keeping(tmp_path / "new", every_n_train_steps=100),
        resume=str(folder / "step=4.ckpt"),
        ranks=int(ranks or 2),
        **task,
    )
    assert resumed[0] == pytest.approx(losses[4:], abs=1e-5)


@pytest.mark.parametrize("limit", [3, 5])
def test_resumed_behind_an_epoch_that_a_limit_had_ended(quiet, limit):
    options = {**TASK, "max_steps": 2 * limit, "limit_train_batches": limit}
    folder = quiet.folder / "checkpoints"
    losses = quiet.fit("single", callbacks=keeping(folder, every_n_train_steps=1), **options)[0]
    for step in (limit - 1, limit, limit + 1):
        resumed = quiet.fit(
            "single",
            f"from {step}",
            callbacks=keeping(quiet.folder / "new", every_n_train_steps=100),
            resume=str(folder / f"step={step}.ckpt"),
            **options,
        )[0]
        assert resumed == losses[step:]


def test_another_batch_size_goes_on_behind_the_text_that_was_read(quiet):
    """Ten steps of 8 blocks are, from block 16 on, also two steps of 8 and four of 16."""
    seen: dict[str, list] = {}

    class Blocks(L.Callback):
        def __init__(self, name):
            self.name = name

        def on_train_batch_end(self, *hooked):
            batch = hooked[3]
            seen.setdefault(self.name, []).extend(batch["input_ids"].tolist())

    folder = quiet.folder / "checkpoints"

    def blocks(trainer, module):
        return next(c for c in trainer.callbacks if isinstance(c, Blocks)) and seen

    def first():
        return [*keeping(folder, every_n_train_steps=2)(), Blocks("first")]

    def second():
        return [*keeping(quiet.folder / "new", every_n_train_steps=100)(), Blocks("second")]

    task = {**TASK, "max_steps": 6, "look": blocks}
    (before,) = quiet.fit("single", callbacks=first, **task)
    resume = str(folder / "step=2.ckpt")
    (after,) = quiet.fit(
        "single", "wide", callbacks=second, resume=resume, batch_size=16, **{**task, "max_steps": 4}
    )
    assert after["second"] == before["first"][16:]
    with pytest.raises(RuntimeError, match="after 16 blocks of its epoch, which are no whole numb"):
        quiet.fit("single", "odd", callbacks=second, resume=resume, batch_size=5, **task)


def test_the_newest_complete_checkpoint_is_found(quiet, original, caplog):
    _, folder = original("single")
    _, sharded = original("zero3")
    place = quiet.folder / "place"
    place.mkdir()
    shutil.copy(folder / "step=4.ckpt", place)
    shutil.copytree(sharded / "step=8.ckpt", place / "broken.ckpt")
    (place / "broken.ckpt/checkpoint/zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    (place / "last.ckpt").write_bytes((folder / "last.ckpt").read_bytes()[:1000])
    assert newest_checkpoint([place]) == place / "step=4.ckpt"
    assert "passed over" in caplog.text
    assert newest_checkpoint([quiet.folder / "nowhere"]) is None


def test_what_killed_runs_had_begun_to_write_is_removed_after_an_hour(tmp_path):
    names = [".old.ckpt.partial", ".new.ckpt.partial"]
    for name in names:
        (tmp_path / "a" / name).mkdir(parents=True)
        (tmp_path / "a" / name / "share.pt").write_text("half")
    (tmp_path / "a" / ".one.ckpt.partial").write_text("half")
    hour_ago = time.time() - 3700
    for path in (*(tmp_path / "a" / names[0]).iterdir(), *(tmp_path / "a").glob(".o*.partial")):
        os.utime(path, (hour_ago, hour_ago))
    assert newest_checkpoint([tmp_path]) is None
    assert [path.name for path in (tmp_path / "a").iterdir()] == names[1:]


def test_another_amount_than_that_of_the_checkpoint_is_refused(quiet, original):
    _, folder = original("single")
    with pytest.raises(RuntimeError, match=r"keeps 4 experts in .*, but this run asks for 2"):
        quiet.fit(
            "single",
            callbacks=lambda: [OneShotPruning("reap", keep_ratio=0.25)],
            resume=str(folder / "step=4.ckpt"),
            **TASK,
        )


def test_a_full_disk_spares_a_checkpoint_in_one_file(tmp_path, monkeypatch):
    target = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, target)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(LitMoEError, match="No space left.*still there"):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, target)
    assert torch.load(target) == {"step": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_weights_of_a_checkpoint_are_evaluated_alone(quiet, original):
    """validate loads a ZeRO-3 checkpoint of a pruned model, whose plan it takes from there."""
    _, folder = original("zero3")
    _, other = original("zero2")

    def loss(trainer, module):
        return float(trainer.callback_metrics["validation/loss"])

    found = []
    for mode, path in (("zero3", folder), ("zero2", other)):
        found += quiet.validate(mode, str(path / "step=12.ckpt"), look=loss)
    assert found[0] == pytest.approx(found[2], abs=1e-5)
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["optim", "model"])
def test_a_missing_share_is_named(quiet, original, kind):
    _, folder = original("zero3")
    broken = quiet.folder / "broken.ckpt"
    shutil.copytree(folder / "step=4.ckpt", broken)
    (broken / "checkpoint" / f"zero_pp_rank_1_mp_rank_00_{kind}_states.pt").unlink()
    with pytest.raises(RuntimeError, match="written by 2 ranks, but zero_pp_rank_1.*is missing"):
        quiet.fit("zero3", resume=str(broken), **TASK)


def test_a_half_written_share_is_passed_over(quiet, original, caplog):
    _, folder = original("zero3")
    whole, broken = quiet.folder / "whole.ckpt", quiet.folder / "broken.ckpt"
    for copy in (whole, broken):
        shutil.copytree(folder / "step=4.ckpt", copy)
    share = broken / "checkpoint" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    share.write_bytes(share.read_bytes()[:-100])
    os.utime(share.parent)  # the newest
    assert newest_checkpoint([quiet.folder]) == whole
    assert f"{share.name} is half-written" in caplog.text


def test_one_file_and_a_folder_are_told_apart(quiet, original):
    _, sharded = original("zero3")
    _, single = original("ddp")
    with pytest.raises(RuntimeError, match="resume it with --trainer.strategy zero3 --trainer.dev"):
        quiet.fit("ddp", callbacks=keeping(quiet.folder), resume=str(sharded / "last.ckpt"), **TASK)
    with pytest.raises(RuntimeError, match="in one file.*--trainer.strategy auto or ddp"):
        quiet.fit(
            "zero3", callbacks=keeping(quiet.folder), resume=str(single / "last.ckpt"), **TASK
        )


def test_another_plan_is_refused(quiet, original):
    _, folder = original("zero3")

    def others():
        return [OneShotPruning("random", keep_ratio=0.25)]

    with pytest.raises(RuntimeError, match="written under another plan"):
        quiet.fit(
            "zero3",
            callbacks=others,
            resume=str(folder / "step=4.ckpt"),
            tell_module=False,
            **TASK,
        )


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    target = tmp_path / "last.ckpt"

    def write(text, error=None):
        with written_together(target, is_first_rank=True, barrier=lambda _: None) as folder:
            (folder / "checkpoint").mkdir()
            (folder / "share.pt").write_text(text)
            if error is not None:
                raise error

    write("first")
    with pytest.raises(LitMoEError, match="could not be written.*still there"):
        write("second", OSError(28, "No space left on device"))
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert (target / "share.pt").read_text() == "first"
    write("third")
    assert (target / "share.pt").read_text() == "third"
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    target.rename(tmp_path / ".last.ckpt.replaced")  # killed between two renames
    put_back(target)
    assert (target / "share.pt").read_text() == "third"
