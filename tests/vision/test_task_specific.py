"""Experts dropped for one task while it is learned: windows, eager end, interrupted runs."""

import json
from itertools import pairwise
from pathlib import Path

import lightning as L
import pytest
import torch
from torch.nn import functional as F

from lit_moe.adapters import count_experts, find_sites
from lit_moe.adapters.router_mask import is_masked
from lit_moe.callbacks import ExportModel, TaskSpecificPruning
from lit_moe.callbacks.task_specific import proficiency
from lit_moe.cli import main
from lit_moe.data import TextDataModule
from lit_moe.errors import LitMoEError
from lit_moe.module import MoEModule
from tests.vision.test_training import DIGITS, data, module, trainer


def fit_task(folder, callback, **options):
    L.seed_everything(0, verbose=False)
    model = module(architecture={**DIGITS, "dropped_experts": "delete"})
    trainer(folder, [callback], **options).fit(model, data())
    return model.built_model


def test_eager_dropping_ends_with_one_expert_that_is_a_dense_layer(tmp_path):
    callback = TaskSpecificPruning(beta=0.5, window=2)
    model = fit_task(tmp_path, callback, max_steps=8)
    assert set(count_experts(find_sites(model)).values()) == {1}
    block, hidden = model.get_submodule("vit.layers.1.mlp").eval(), torch.randn(1, 3, 32)
    experts = block.get_submodule("experts")
    up, down = experts.get_parameter("up_proj")[0], experts.get_parameter("down_proj")[0]
    inner = F.gelu(hidden @ up.T + experts.get_parameter("up_proj_bias"))
    expected = inner @ down.T + experts.get_parameter("down_proj_bias")
    block.capacity_factors = (None, None)
    torch.testing.assert_close(block(hidden), expected)
    report = json.loads((tmp_path / "report.json").read_text())
    assert "step 4: " in " ".join(report["warnings"])
    assert list(report["images"]) == ["before", "trained"]


@pytest.mark.parametrize("window", [2, 3, 50])
def test_eager_dropping_keeps_the_expert_that_the_last_window_used_most(window, tmp_path):
    seen = []

    class Watched(TaskSpecificPruning):
        def _end_window(self, trainer, module, *, force):
            alive = self._hidden.alive(module.built_model).kept
            seen.append((force, alive, {name: sums.clone() for name, sums in self._gates.items()}))
            super()._end_window(trainer, module, force=force)

    L.seed_everything(0, verbose=False)
    model = module(architecture={**DIGITS, "dropped_experts": "delete"})
    trainer(tmp_path, [Watched(beta=0.1, window=window)], max_steps=8).fit(model, data())
    force, alive, gates = seen[-1]
    assert force
    for name, sums in gates.items():
        best = max(alive[name], key=lambda e: sums[e])
        assert sums[best] > 0
        assert model.plan.kept[name] == (best,)
    assert any(kept != (0,) for kept in model.plan.kept.values())


def test_what_a_validation_shows_does_not_count(tmp_path):
    sums = []

    class Watched(TaskSpecificPruning):
        def on_train_end(self, trainer, module):
            sums.append({name: gates.clone() for name, gates in self._gates.items()})
            super().on_train_end(trainer, module)

    for every in (None, 1):
        watched = Watched(beta=0.5, window=50, eager=False)
        fit_task(tmp_path / str(every), watched, max_steps=3, val_check_interval=every)
    without, with_validations = sums
    assert sum(gates.sum() for gates in without.values()) > 0
    for name, gates in without.items():
        assert torch.equal(gates, with_validations[name])


def test_experts_that_choose_their_tokens_are_refused(tmp_path):
    model = module(architecture={**DIGITS, "router_type": "expert_choice"})
    with pytest.raises(LitMoEError, match="each expert takes equally many tokens"):
        trainer(tmp_path, [TaskSpecificPruning()]).fit(model, data())


def test_experts_are_dropped_for_good_and_only_in_the_first_half(tmp_path):
    seen = []

    class Watched(TaskSpecificPruning):
        def on_train_batch_end(self, *_):
            seen.append(self._hidden.plan.kept if self._hidden.plan else None)

    fit_task(tmp_path, Watched(beta=1.0, window=2, eager=False), max_steps=12)
    assert seen[0] is None
    masks = [mask for mask in seen if mask is not None]
    assert masks, "no expert was dropped"
    for earlier, later in pairwise(masks):
        assert all(set(later[name]) <= set(earlier[name]) for name in later)
    assert len({json.dumps(mask) for mask in seen[6:]}) == 1


def test_a_beta_that_drops_nothing_says_so(tmp_path):
    model = fit_task(tmp_path, TaskSpecificPruning(beta=1e-9, window=2, eager=False))
    assert set(count_experts(find_sites(model)).values()) == {8}


def test_language_models_are_dropped_for_a_task_too(tmp_path):
    text = TextDataModule(sequence_length=32, batch_size=4, test_tokens=128)
    model = MoEModule()
    callback = TaskSpecificPruning(beta=0.5, window=1)
    trainer(tmp_path, [callback], max_steps=4).fit(model, text)
    fewest = {site.top_k for site in find_sites(model.built_model)}
    assert set(count_experts(find_sites(model.built_model)).values()) == fewest


class Saved(L.Callback):
    """Writes a checkpoint after a step, and notes what the training did after it."""

    def __init__(self, path, step):
        self.path, self.step, self.losses = path, step, []

    def on_train_batch_end(self, trainer, _, outputs, *__):
        if trainer.global_step > self.step:
            self.losses.append(float(outputs["loss"]))
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(("eager", "step"), [(True, 4), (True, 6), (False, 1), (False, 5)])
def test_an_interrupted_run_ends_as_one_that_was_not(eager, step, tmp_path):
    ends = []
    for resumed in (False, True):
        L.seed_everything(0, verbose=False)
        folder = tmp_path / str(resumed)
        saved = Saved(tmp_path / "middle.ckpt", -1 if resumed else step)
        pruning = TaskSpecificPruning(beta=0.9, window=3, eager=eager)
        run = trainer(folder, [pruning, saved, ExportModel("model")], max_steps=12)
        model, path = module(), str(tmp_path / "middle.ckpt") if resumed else None
        model.resume_from = path
        run.fit(model, data(), ckpt_path=path)
        ends.append((model, saved.losses, json.loads((folder / "report.json").read_text())))
    (model, losses, report), (again, others, reported) = ends
    assert losses == others
    assert len(losses) == 12 - step
    assert again.plan == model.plan
    assert any(len(ids) < 8 for ids in model.plan.kept.values())
    assert reported["warnings"] == report["warnings"]
    assert list(reported["images"]) == ["before", "trained"]
    for (name, value), other in zip(
        model.built_model.state_dict().items(),
        again.built_model.state_dict().values(),
        strict=True,
    ):
        assert torch.equal(value, other), name


def test_a_checkpoint_of_the_middle_is_evaluated_without_the_experts_that_are_gone(tmp_path):
    L.seed_everything(0, verbose=False)
    saved = Saved(tmp_path / "middle.ckpt", 6)
    options = {"max_steps": 7, "limit_val_batches": 0}
    pruning = TaskSpecificPruning(beta=0.9, window=2, eager=False, force_at=1.0)
    trainer(tmp_path, [pruning, saved], **options).fit(module(), data())
    counted = []

    class Watched(L.Callback):
        def on_validation_batch_end(self, _, module, *__):
            routers = [module.built_model.get_submodule(s.router) for s in find_sites(module.model)]
            counted.append([is_masked(router) for router in routers])

    again = TaskSpecificPruning(beta=0.9, window=2, eager=False, force_at=1.0)
    run = trainer(tmp_path / "again", [again, Watched()], limit_val_batches=1)
    run.validate(module(), data(), ckpt_path=str(tmp_path / "middle.ckpt"), verbose=False)
    assert any(any(masks) for masks in counted)


def test_proficiency_is_a_share_of_those_that_are_left():
    shares = proficiency(torch.tensor([2.0, 0.0, 6.0, 5.0]), (0, 1, 2))
    assert shares.tolist() == [0.25, 0.0, 0.75, 0.0]


@pytest.mark.parametrize("fields", [{"beta": 0}, {"window": 0}, {"force_at": 1.5}])
def test_odd_settings_are_refused(fields):
    with pytest.raises(LitMoEError, match="must be above 0"):
        TaskSpecificPruning(**fields)


def test_a_run_of_unknown_length_is_refused(tmp_path):
    run = trainer(tmp_path, [TaskSpecificPruning()], max_steps=-1, max_epochs=1)
    with pytest.raises(LitMoEError, match="trainer.max_steps is -1; set it"):
        run.fit(module(), data())


def test_its_config_runs_on_what_it_asks_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {"hidden_size": 16, "intermediate_size": 16, "dropped_experts": "delete"}
    words = [f"--model.init_args.architecture.{key}={value}" for key, value in small.items()]
    assert fit("pretrain_digits", *words, "--trainer.logger.init_args.name=pretrain_delete") == 0
    assert fit("task_specific", "--TaskSpecificPruning.window=1") == 0
    report = json.loads(Path("runs/vision/task_specific/report.json").read_text())
    assert list(report["images"]) == ["before", "trained"]
    assert {len(layer["kept"]) for layer in report["experts"].values()} == {1}
    config = json.loads(Path("runs/vision/task_specific/model/config.json").read_text())
    assert config["num_experts"] == 1
    assert not config.get("num_null_experts")


def fit(name, *words):
    """Run a config of ``configs/vision`` for four steps, here."""
    config = Path(__file__).parents[2] / "configs" / "vision" / f"{name}.yaml"
    return main(["fit", "--config", str(config), "--trainer.max_steps=4", *words])
