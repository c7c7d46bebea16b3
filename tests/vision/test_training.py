"""Image classifiers in Lightning: trained, pruned, measured, exported; dropped for one task."""

import json

import lightning as L
import pytest
import torch

import lit_moe
from lit_moe.adapters import count_experts, find_sites
from lit_moe.callbacks import ExportModel, OneShotPruning, ReportWriter
from lit_moe.data import Augmentation, ImageDataModule, SplitFractions
from lit_moe.distill.images import divergence, image_recovery
from lit_moe.errors import LitMoEError
from lit_moe.module import LossWeights, MoEModule, OptimizerConfig, TeacherConfig
from lit_moe.optimization import build_optimizer, build_schedule
from lit_moe.testing.vision import TINY, example_images, tiny_vmoe
from lit_moe.vmoe.configuration import VMoEConfig
from lit_moe.vmoe.modeling import VMoEForImageClassification

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
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{
            "logger": False,
            "max_steps": 4,
            "limit_val_batches": 1,
            "num_sanity_val_steps": 0,
            **options,
        },
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


def test_a_run_that_drops_nothing_can_be_measured_before_training_too(tmp_path):
    trainer(tmp_path, [ReportWriter(measure_before=True)]).fit(module(), data())
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["images"]) == ["before", "trained"]
    assert report["source"] == "random weights"


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


def test_what_makes_a_missing_model_is_told_in_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    missing = MoEModule("runs/vision/finetune_e3/model")
    with pytest.raises(LitMoEError, match=r"--config /.*configs/vision/finetune_e3\.yaml$"):
        trainer(tmp_path).fit(missing, data())


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


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [("image_size", 16, "image_size is 16 in the teacher and 8"), ("num_channels", 3, "is 3 in")],
)
def test_a_teacher_of_other_images_is_refused(field, value, said, tmp_path):
    config = VMoEConfig(**{**TINY, "num_labels": 10, field: value})
    VMoEForImageClassification(config).save_pretrained(tmp_path / "teacher")
    teacher = TeacherConfig(str(tmp_path / "teacher"))
    distilled = module(loss=LossWeights(distillation=1.0), teacher=teacher)
    with pytest.raises(LitMoEError, match=f"{said}.*both are shown the same images"):
        trainer(tmp_path, max_steps=1).fit(distilled, data())


def test_a_teacher_on_another_device_gets_its_pixels_there():
    student = tiny_vmoe("delete")
    batch = {**example_images(student), "labels": torch.tensor([0, 1, 2])}
    asked = []

    class Elsewhere(torch.nn.Module):
        device = torch.device("meta")

        def forward(self, pixel_values):
            asked.append(pixel_values.device.type)
            return student(pixel_values=torch.zeros(pixel_values.shape))

    image_recovery(student, Elsewhere(), batch, LossWeights(distillation=1.0))  # type: ignore[arg-type]
    assert asked == ["meta"]
