"""Merged experts and mixed routers are trained, kept and resumed in every mode."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_moe.adapters import find_sites
from lit_moe.callbacks import ExpertMerging, ExportModel
from lit_moe.checkpoints import load
from lit_moe.merge_plan import MergePlan
from lit_moe.mixing import mixed_layers
from tests.distributed.runs import Setup, some

pytestmark = pytest.mark.distributed
TASK = {"max_steps": 6, "enable_checkpointing": True, "distillation": 0.5}


@pytest.fixture(scope="module")
def plan(checkpoint, tmp_path_factory):
    """A plan that mixes four experts of eight, and their probabilities otherwise."""
    generator = torch.Generator().manual_seed(0)
    experts: dict[str, torch.Tensor] = {}
    routers: dict[str, torch.Tensor] = {}
    for site in find_sites(load(checkpoint)):
        for each in (experts, routers):
            noise = torch.randn(4, site.num_experts, generator=generator)
            each[site.name] = torch.eye(site.num_experts)[::2] + 0.1 * noise
    path = tmp_path_factory.mktemp("plan") / "plan.safetensors"
    MergePlan(experts, routers, router_space="probabilities").save(path)
    return str(path)


def merging(folder, plan):
    def callbacks():
        saved = ModelCheckpoint(str(folder), "{step}", every_n_train_steps=2, save_top_k=-1)
        return [ExpertMerging(plan=plan), saved, ExportModel("model")]

    return callbacks


@pytest.fixture(scope="module")
def original(checkpoint, chapters, plan, tmp_path_factory):
    """Mode -> losses, checkpoints and export of an uninterrupted run."""
    setup = Setup(checkpoint, chapters, tmp_path_factory.mktemp("merged"))
    known = {}

    def run(mode):
        if mode not in known:
            folder = setup.folder / "checkpoints" / mode
            losses = setup.fit(mode, mode, callbacks=merging(folder, plan), **TASK)[0]
            (export,) = setup.folder.rglob(f"{mode}/**/model/config.json")
            known[mode] = losses, folder, export.parent
        return known[mode]

    return run


modes = pytest.mark.parametrize("mode", some(["ddp", "zero3"], ["zero1", "zero2"]))


@modes
def test_losses_and_export_are_those_of_one_process(original, mode):
    losses, _, folder = original(mode)
    expected, _, whole = original("single")
    assert losses == pytest.approx(expected, abs=1e-5)
    model, other = load(folder), load(whole)
    assert len(mixed_layers(model)) == len(find_sites(model))
    theirs = other.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-4, atol=2e-4)


@modes
def test_a_resumed_run_is_the_one_that_was_not_interrupted(
    checkpoint, chapters, plan, original, mode, tmp_path
):
    losses, folder, _ = original(mode)
    setup = Setup(checkpoint, chapters, tmp_path)
    resume = str(folder / "step=2.ckpt")
    callbacks = merging(tmp_path / "new", plan)
    resumed = setup.fit(mode, callbacks=callbacks, resume=resume, **TASK)[0]
    assert resumed == losses[2:]
