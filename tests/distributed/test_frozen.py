"""Weights that the user froze are in checkpoints, the teacher's are not; both survive resuming."""

import lightning as L
import pytest
import torch

from tests.distributed.runs import MODES, Setup, some
from tests.distributed.test_resume import keeping

pytestmark = pytest.mark.distributed
TASK = {"distillation": 0.5, "max_steps": 8, "enable_checkpointing": True}


class Frozen(L.Callback):
    """Halves the embeddings and freezes them; in a resumed run they come from the checkpoint."""

    def on_model_built(self, _, module):
        """When the model is built. Collective if it is partitioned."""
        from deepspeed import zero

        weight = module.model.get_input_embeddings().weight
        parts = [weight] if hasattr(weight, "ds_tensor") else []
        with zero.GatheredParameters(parts, modifier_rank=0), torch.no_grad():
            weight.mul_(0.0 if module.is_resumed else 0.5)
        weight.requires_grad_(False)


def freezing(folder, **options):
    return lambda: [Frozen(), *keeping(folder, **options)()]


@pytest.fixture(scope="module")
def original(checkpoint, chapters, tmp_path_factory):
    """Return a function: mode -> losses and folder of checkpoints of a run, made once."""
    setup = Setup(checkpoint, chapters, tmp_path_factory.mktemp("frozen"))
    known = {}

    def run(mode):
        if mode not in known:
            folder = setup.folder / mode
            callbacks = freezing(folder, every_n_train_steps=4)
            known[mode] = setup.fit(mode, callbacks=callbacks, **TASK)[0], folder
        return known[mode]

    return run


@pytest.mark.parametrize("mode", some(["zero2", "zero3"], ["ddp", "zero1", "zero3-sharded-load"]))
def test_training_with_frozen_weights_has_the_losses_of_one_process(original, mode):
    assert original(mode)[0] == pytest.approx(original("single")[0], abs=1e-5)


@pytest.mark.parametrize("mode", some(["zero2", "zero3"], ["zero1", "zero3-sharded-load"]))
def test_a_checkpoint_has_the_frozen_weights_but_no_teacher(original, mode):
    _, folder = original(mode)
    files = sorted((folder / "step=4.ckpt" / "checkpoint").glob("*model_states.pt"))
    for file in files:
        stored = torch.load(file, weights_only=False)
        shapes = stored["frozen_param_shapes"] or {}
        assert not [n for n in {*stored["module"], *shapes} if n.startswith("teacher")]
        assert "model.model.embed_tokens.weight" in (
            stored["module"] if mode == "zero1" else shapes
        )


@pytest.mark.parametrize(
    "mode", some(["single", "zero3"], ["zero1", "zero2", "zero3-sharded-load"])
)
def test_it_goes_on_with_equal_losses(original, checkpoint, chapters, tmp_path, mode):
    losses, folder = original(mode)
    resumed = Setup(checkpoint, chapters, tmp_path).fit(
        mode, callbacks=freezing(tmp_path), resume=str(folder / "step=4.ckpt"), **TASK
    )
    assert resumed[0] == losses[4:]


@pytest.mark.parametrize(
    "change",
    some(
        ["zero2 -> zero3", "zero3 -> zero3 on 1"],
        ["zero3 -> zero2", "zero1 -> zero2", "zero2 -> zero1 on 1", "zero3 -> zero1"],
    ),
)
def test_another_stage_or_number_of_ranks_goes_on(original, checkpoint, chapters, tmp_path, change):
    before, _, after = change.partition(" -> ")
    losses, folder = original(before)
    mode, _, ranks = after.partition(" on ")
    resumed = Setup(checkpoint, chapters, tmp_path).fit(
        mode,
        callbacks=freezing(tmp_path),
        resume=str(folder / "step=4.ckpt"),
        ranks=int(ranks or MODES[mode][1]),
        **TASK,
    )
    assert resumed[0] == pytest.approx(losses[4:], abs=1e-5)


@pytest.mark.parametrize("mode", some(["zero3"], ["zero1", "zero2"]))
def test_what_is_evaluated_alone_has_the_frozen_weights(
    original, checkpoint, chapters, tmp_path, mode
):
    _, folder = original(mode)

    def loss(trainer, _):
        return float(trainer.callback_metrics["validation/loss"])

    setup = Setup(checkpoint, chapters, tmp_path)
    found = setup.validate(mode, str(folder / "step=8.ckpt"), look=loss)
    expected = setup.validate("single", str(original("single")[1] / "step=8.ckpt"), look=loss)
    assert found[0] == pytest.approx(expected[0], abs=1e-5)


@pytest.mark.parametrize("mode", some(["zero3"], ["zero1", "zero2", "zero3-sharded-load"]))
def test_a_run_without_a_teacher_goes_on(checkpoint, chapters, tmp_path, mode):
    task = {**TASK, "distillation": 0.0, "max_steps": 4}
    setup = Setup(checkpoint, chapters, tmp_path)
    losses = setup.fit(mode, callbacks=keeping(tmp_path / "a", every_n_train_steps=2), **task)[0]
    resumed = setup.fit(
        mode,
        callbacks=keeping(tmp_path / "b", every_n_train_steps=2),
        resume=str(tmp_path / "a" / "step=2.ckpt"),
        **task,
    )
    assert resumed[0] == losses[2:]
