"""Layers that keep different numbers of experts, under every mode: train, stop, go on, export."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from lit_moe.callbacks import ExportModel, OneShotPruning, ReportWriter
from lit_moe.plan import KeepPlan
from tests.distributed.runs import MODES, Setup, some

pytestmark = pytest.mark.distributed
SHARED = some(["zero3"], ["ddp", "zero1", "zero2", "zero3-sharded-load"])
TASK = {"distillation": 0.5, "max_steps": 8, "enable_checkpointing": True}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """File of a plan that keeps four experts in one layer and six in another."""
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    kept = {f"model.layers.{i}.mlp": tuple(range(2 - 2 * i, 6)) for i in range(2)}
    KeepPlan(kept, dict.fromkeys(kept, 8)).save(file)
    return str(file)


@pytest.fixture(scope="module")
def run(checkpoint, chapters, plan, tmp_path_factory):
    """Return a function: mode -> losses of a run with checkpoints, made once, and its folder."""
    setup = Setup(checkpoint, chapters, tmp_path_factory.mktemp("unequal"))
    known = {}

    def losses(mode):
        if mode not in known:
            folder = setup.folder / "run" / mode
            callbacks = pruning(plan, folder / "checkpoints")
            known[mode] = setup.fit(mode, callbacks=callbacks, **TASK)[0], folder
        return known[mode]

    return losses


def pruning(plan, checkpoints=None):
    """Callbacks that prune by a plan and export; with checkpoints every four steps."""

    def callbacks():
        made = [ReportWriter(figures=False), OneShotPruning(plan=plan), ExportModel()]
        if checkpoints is not None:
            made.append(
                ModelCheckpoint(
                    str(checkpoints), filename="{step}", save_top_k=-1, every_n_train_steps=4
                )
            )
        return made

    return callbacks


def weights(folder):
    return load_file(folder / "model" / "model.safetensors")


@pytest.mark.parametrize("mode", SHARED)
def test_training_and_its_export_are_those_of_one_process(run, mode):
    (one, first), (two, second) = run("single"), run(mode)
    assert two == pytest.approx(one, abs=1e-5)
    config = "model/config.json"
    assert (second / config).read_text() == (first / config).read_text()
    assert '"per_layer_config"' in (first / config).read_text()
    expected, found = weights(first), weights(second)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mode", SHARED)
def test_an_export_without_training_is_bit_equal(checkpoint, chapters, plan, tmp_path, mode):
    setup = Setup(checkpoint, chapters, tmp_path)
    for each in ("single", mode):
        setup.fit(each, callbacks=pruning(plan), max_steps=0)
    one, two = (tmp_path / "run" / each / "model" for each in ("single", mode))
    for file in ("model.safetensors", "config.json", "modeling_lit_moe.py"):
        assert (two / file).read_bytes() == (one / file).read_bytes(), file


@pytest.mark.parametrize("mode", ["single", *SHARED])
def test_a_resumed_run_and_its_export_are_those_of_one_that_never_stopped(
    run, checkpoint, chapters, plan, tmp_path, mode
):
    losses, folder = run(mode)
    resumed = Setup(checkpoint, chapters, tmp_path).fit(
        mode,
        callbacks=pruning(plan, tmp_path / "new"),
        resume=str(folder / "checkpoints" / "step=4.ckpt"),
        **TASK,
    )
    assert resumed[0] == losses[4:]
    again = tmp_path / "run" / mode / "model" / "model.safetensors"
    assert again.read_bytes() == (folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("zero3", "zero3 on 1"),
        pytest.param("zero2", "zero3", marks=pytest.mark.slow),
        pytest.param("zero3-sharded-load", "zero1", marks=pytest.mark.slow),
    ],
)
def test_another_stage_or_number_of_ranks_goes_on(
    run, checkpoint, chapters, plan, tmp_path, before, after
):
    losses, folder = run(before)
    mode, _, ranks = after.partition(" on ")
    resumed = Setup(checkpoint, chapters, tmp_path).fit(
        mode,
        callbacks=pruning(plan, tmp_path / "new"),
        resume=str(folder / "checkpoints" / "step=4.ckpt"),
        ranks=int(ranks or MODES[mode][1]),
        **TASK,
    )
    assert resumed[0] == pytest.approx(losses[4:], abs=1e-5)


@pytest.mark.parametrize("mode", SHARED)
def test_a_run_can_begin_with_such_an_export(run, chapters, tmp_path, mode):
    _, folder = run("single")
    setup = Setup(folder / "model", chapters, tmp_path)
    options = {"distillation": 0.5, "max_steps": 4}
    one = setup.fit("single", **options)[0]
    assert setup.fit(mode, **options)[0] == pytest.approx(one, abs=1e-5)
