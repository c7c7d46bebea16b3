"""Image classifiers in Lightning: trained, pruned, measured, exported; dropped for one task."""

import json
from itertools import pairwise

import lightning as L
import pytest
import torch
from torch.nn import functional as F

import lit_moe
from lit_moe.adapters import count_experts, find_sites
from lit_moe.callbacks import ExportModel, OneShotPruning, TaskSpecificPruning
from lit_moe.callbacks.task_specific import proficiency
from lit_moe.data import Augmentation, ImageDataModule, SplitFractions, TextDataModule
from lit_moe.distill.images import divergence
from lit_moe.errors import LitMoEError
from lit_moe.module import LossWeights, MoEModule, OptimizerConfig
from lit_moe.optimization import build_optimizer, build_schedule
from lit_moe.testing.vision import TINY, tiny_vmoe

DIGITS = {**TINY, "model_type": "lit_vmoe", "num_labels": 10}


def module(**fields):
    optimizer = OptimizerConfig(learning_rate=3e-3)
    options = {"architecture": DIGITS, "optimizer": optimizer, **fields}
    return MoEModule(**options)


def data(**fields):
    fractions = SplitFractions(0.1, 0.05, 0.1)
    return ImageDataModule(fractions=fractions, batch_size=64, **fields)


def trainer(folder, callbacks=(), **options):
    return L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{"max_steps": 4, "limit_val_batches": 1, "num_sanity_val_steps": 0, **options},
    )


def test_a_pruned_classifier_is_measured_at_each_stage_and_exported(tmp_path):
    L.seed_everything(0, verbose=False)
    callbacks = [OneShotPruning("importance", keep_ratio=0.5), ExportModel("model")]
    augmented = data(augmentation=Augmentation(crop=1, rotate=10, noise=0.01))
    trainer(tmp_path, callbacks).fit(module(), augmented)
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["images"]) == ["before", "pruned", "recovered"]
    assert all(0 <= stage["accuracy"] <= 1 for stage in report["images"].values())
    assert report["images"]["before"]["images"] == 180
    assert report["export"]["max_abs_logit_difference"] == 0
    assert "| accuracy |" in (tmp_path / "report.md").read_text()
    again = lit_moe.load(tmp_path / "model")
    assert again.config.num_experts == 4
    assert again.config.num_null_experts == 4
    quality = data().evaluate_images(again)
    assert quality.accuracy == pytest.approx(report["images"]["recovered"]["accuracy"])


def test_training_learns_digits(tmp_path):
    L.seed_everything(0, verbose=False)
    run = trainer(tmp_path, max_steps=150, max_epochs=-1)
    better = {**DIGITS, "pooling": "mean", "initializer_range": 0.1}
    model, digits = module(architecture=better), data()
    run.fit(model, digits)
    assert digits.evaluate_images(model.built_model).accuracy > 0.6
    assert float(run.callback_metrics["validation/accuracy"]) > 0.5
    assert {"train/labels", "train/accuracy", "validation/loss"} <= set(run.callback_metrics)
    found = run.predict(model, digits.predict_dataloader())
    assert found is not None
    assert torch.cat([torch.as_tensor(batch) for batch in found]).shape == (180,)


def test_distillation_is_0_from_itself_and_a_divergence_otherwise():
    own, other = torch.randn(3, 5), torch.randn(3, 5)
    assert divergence(own, own, 2.0).item() == pytest.approx(0, abs=1e-6)
    target = other.softmax(-1)
    expected = (target * (target.log() - own.log_softmax(-1))).sum(1).mean()
    assert divergence(own, other, 1.0).item() == pytest.approx(expected.item(), rel=1e-5)


def test_distillation_keeps_a_teacher(tmp_path):
    model = module(loss=LossWeights(next_token=0.5, distillation=0.5))
    run = trainer(tmp_path, [OneShotPruning("router_norm", keep_ratio=0.5)], max_steps=1)
    run.fit(model, data())
    assert model.teacher is not None
    assert set(count_experts(find_sites(model.teacher)).values()) == {8}
    assert float(run.callback_metrics["train/distillation"]) >= 0


def test_sgd_with_momentum_warms_up_and_ends_at_the_smallest_rate():
    config = OptimizerConfig(
        name="sgd",
        momentum=0.9,
        learning_rate=0.1,
        warmup_steps=2,
        schedule="cosine_with_min_lr",
        schedule_options={"min_lr": 1e-5},
    )
    optimizer = build_optimizer(tiny_vmoe(), config)
    assert isinstance(optimizer, torch.optim.SGD)
    assert all(group["momentum"] == 0.9 for group in optimizer.param_groups)
    schedule, rates = build_schedule(optimizer, config, num_steps=10), []
    for _ in range(10):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:3] == [0.0, 0.05, 0.1]
    assert schedule.get_last_lr()[0] == pytest.approx(1e-5)
    with pytest.raises(LitMoEError, match="'adam'; it can be 'adamw' or 'sgd'"):
        OptimizerConfig(name="adam")  # type: ignore[arg-type]


def test_a_new_classifier_replaces_the_old_one(tmp_path):
    tiny_vmoe(num_labels=40).save_pretrained(tmp_path / "model")
    folder = str(tmp_path / "model")
    with pytest.raises(LitMoEError, match=r"num_labels: 10"):
        trainer(tmp_path).fit(MoEModule(folder), data())
    model = MoEModule(folder, num_labels=10)
    trainer(tmp_path, max_steps=1).fit(model, data())
    assert model.built_model.config.num_labels == 10
    assert model.source_dtype == "float32"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: (module(loss=LossWeights(experts=1.0)), data()), "loss.experts is 1, but image"),
        (lambda: (module(), data(image_size=16)), "16 x 16 pixels, but the model takes 8 x 8"),
        (lambda: (module(), data(turns=(0, 90))), "data has 20 classes"),
        (lambda: (MoEModule("runs/vision/pretrain_digits/model"), data()), "this makes it: light"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(make, words, tmp_path, monkeypatch):
    (tmp_path / "configs/vision").mkdir(parents=True)
    (tmp_path / "configs/vision/pretrain_digits.yaml").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LitMoEError, match=words):
        trainer(tmp_path).fit(*make())


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


def test_experts_are_dropped_for_good_and_only_in_the_first_half(tmp_path):
    seen = []

    class Watched(TaskSpecificPruning):
        def on_train_batch_end(self, *_):
            seen.append(self._mask.kept if self._mask else None)

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
