"""Refit, monitor and criteria that run the model, on image classifiers."""

import copy
import json

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lit_moe
from lit_moe.adapters import count_experts, find_sites
from lit_moe.callbacks import ExpertMonitor, IterativePruning, OneShotPruning, Refit
from lit_moe.errors import LitMoEError
from lit_moe.plan import KeepPlan
from lit_moe.refit import RefitOptions, refit
from lit_moe.surgery import shrink
from lit_moe.testing.vision import VARIANTS, example_images, tiny_vmoe
from tests.vision.test_training import DIGITS, data, module, trainer

every_variant = pytest.mark.parametrize("variant", VARIANTS)


@torch.no_grad()
@every_variant
@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_a_refit_finds_the_weights_that_were_spoilt(variant, mode):
    teacher = tiny_vmoe(variant)
    student = copy.deepcopy(teacher)
    down = student.get_parameter("vit.layers.3.mlp.experts.down_proj")
    down.copy_(down.flip(0))
    batches = [example_images(teacher, 64, seed) for seed in range(2)]
    pixels = batches[0]["pixel_values"]
    wanted, spoilt = teacher(pixels).logits, student(pixels).logits
    report = refit(student, teacher, batches, RefitOptions(mode=mode, lam=1e-6))
    assert report.kept
    found = student(pixels).logits
    assert (found - wanted).norm() < 0.02 * (spoilt - wanted).norm()


@torch.no_grad()
def test_layers_whose_first_image_meets_no_expert_are_refitted_too():
    teacher = tiny_vmoe("zero", num_experts_per_tok=1)
    student, batch = copy.deepcopy(teacher), example_images(teacher, 64)
    taken = []
    router = teacher.get_submodule("vit.layers.1.mlp.router")
    hook = router.register_forward_hook(lambda _, __, output: taken.append(output[2]))
    teacher(batch["pixel_values"][:1])
    hook.remove()
    names = count_experts(find_sites(teacher))
    left = sorted(set(range(8)) - set(taken[0].unique().tolist()))
    assert left, "the first image meets all experts"
    shrink(student, KeepPlan(dict.fromkeys(names, tuple(left)), names))
    report = refit(student, teacher, [batch, example_images(teacher, 64, 1)])
    assert all("not run as a module" not in sentence for sentence in report.sentences())


@every_variant
def test_a_refit_in_a_run_is_reported_as_a_stage(variant, tmp_path):
    L.seed_everything(0, verbose=False)
    model = module(architecture={**DIGITS, **VARIANTS[variant]})
    callbacks = [OneShotPruning("router_norm", keep_ratio=0.5), Refit()]
    trainer(tmp_path, callbacks, max_steps=1).fit(model, data())
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["images"]) == ["before", "pruned", "refitted", "recovered"]
    assert report["refit"]["loss_after"] <= report["refit"]["loss_before"]
    assert report["refit"]["tokens"] + report["refit"]["held_out_tokens"] == 180 * 17


@every_variant
def test_the_monitor_counts_what_finds_room(variant, tmp_path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    model = module(architecture={**DIGITS, **VARIANTS[variant]})
    callbacks = [OneShotPruning("router_norm", keep_ratio=0.5), ExpertMonitor(every_n_steps=2)]
    trainer(tmp_path, callbacks, logger=logger, log_every_n_steps=1).fit(model, data())
    events = EventAccumulator(str(tmp_path)).Reload()
    tags = events.Tags()
    for site in find_sites(model.built_model):
        points = events.Scalars(f"experts/{site.name}/load_cv")
        assert [point.step for point in points] == [2, 4]
        assert all(0 <= point.value < 2 for point in points)
        assert f"experts/load/{site.name}" in tags["images"]


@every_variant
def test_obs_rates_experts_that_give_nothing_last(variant):
    model = tiny_vmoe(variant)
    batches = [example_images(model, 16)]
    before = lit_moe.score(model, "obs", batches=batches)
    best = {name: values.argsort()[-2:] for name, values in before.items()}
    with torch.no_grad():
        for name, ids in best.items():
            for part in ("down_proj", "down_proj_bias"):
                model.get_parameter(f"{name}.experts.{part}")[ids] = 0.0
    for name, values in lit_moe.score(model, "obs", batches=batches).items():
        assert set(values.argsort()[:2].tolist()) == set(best[name].tolist())


def test_obs_drops_experts_in_a_run(tmp_path):
    trainer(tmp_path, [OneShotPruning("obs", keep_ratio=0.5)], max_steps=1).fit(module(), data())
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["calibration"]["tokens"] == 180 * 17
    assert {len(layer["kept"]) for layer in report["experts"].values()} == {4}


@pytest.mark.parametrize("criterion", ["naee", "ege"])
@pytest.mark.parametrize("callback", [OneShotPruning, IterativePruning])
def test_criteria_that_need_text_are_refused_before_anything_is_measured(
    criterion, callback, tmp_path
):
    words = f"criterion '{criterion}' needs text to run the model on, which an image classifier"
    with pytest.raises(LitMoEError, match=words):
        trainer(tmp_path, [callback(criterion, keep_ratio=0.5)]).fit(module(), data())
    assert not json.loads((tmp_path / "report.json").read_text())["images"]


def test_naee_without_a_run_names_what_it_lacks():
    model = tiny_vmoe()
    with pytest.raises(LitMoEError, match=r"needs 'input_ids'; it has \['pixel_values'\]"):
        lit_moe.score(model, "naee", batches=[example_images(model)], keep=4)
