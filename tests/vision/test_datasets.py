"""The configs of public data sets, on stand-ins of the same layout, with tiny models."""

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lit_moe.cli import main
from lit_moe.data import Augmentation, ImageDataModule, SplitFractions
from lit_moe.data.image_sources import load_images
from lit_moe.errors import LitMoEError
from lit_moe.testing.vision import tiny_vmoe

CONFIGS = Path(__file__).parents[2] / "configs" / "vision"
SETS: dict[str, Any] = {
    "cifar10": {"columns": ("img", "label"), "pixels": (32, 32, 3), "classes": 10, "size": 128},
    "cifar100": {
        "columns": ("img", "fine_label"),
        "pixels": (32, 32, 3),
        "classes": 100,
        "size": 128,
    },
    "imagenet": {"columns": ("image", "label"), "pixels": None, "classes": 1000, "size": 384},
    "mnist": {"columns": ("image", "label"), "pixels": (28, 28), "classes": 10, "size": 28},
}
PEAKS = {"cifar10": 1.5e-3, "cifar100": 1.5e-3, "imagenet": 1.5e-3 * 32 / 512, "mnist": 0.02}


def write_stand_in(path, name, count, seed):
    """A parquet file with the columns, classes and sizes of the hub's; ImageNet's sizes differ."""
    rng, kind = np.random.default_rng(seed), SETS[name]
    shapes = [kind["pixels"] or (40 + i % 3, 50, 3) for i in range(count)]
    pictures = [Image.fromarray(rng.integers(0, 256, s, dtype=np.uint8)) for s in shapes]
    labels = rng.integers(0, kind["classes"], size=count).tolist()
    image, label = kind["columns"]
    names = [f"class {i}" for i in range(kind["classes"])]
    features = {image: datasets.Image(), label: datasets.ClassLabel(names=names)}
    rows = {image: pictures, label: labels}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(str(path))


def stand_in(name, folder):
    """Both splits of a data set, and the words that let a config take them."""
    words = ["--data.init_args.batch_size=4"]
    for split, count in (("train", 24), ("test", 6)):
        write_stand_in(folder / f"{split}.parquet", name, count, len(split))
        words.append(f"--data.init_args.{split}={folder / split}.parquet")
    if SETS[name]["pixels"] is None or len(SETS[name]["pixels"]) == 3:
        words.append("--data.init_args.num_workers=0")
    words += [f"--data.init_args.fractions.{part}=0.1" for part in ("calibration", "validation")]
    return [*words, "--trainer.max_steps=2", "--trainer.accumulate_grad_batches=1"]


def tiny_ancestor(name, folder):
    """Twelve layers as V-MoE-B/16 has, or the three of the MNIST configs, but narrow."""
    size, grey = SETS[name]["size"], name == "mnist"
    model = tiny_vmoe(
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=2,
        num_hidden_layers=3 if grey else 12,
        image_size=size,
        patch_size=7 if grey else 64,
        num_channels=1 if grey else 3,
        num_labels=10 if grey else 21,
    )
    model.save_pretrained(folder)


@pytest.mark.parametrize("name", SETS)
def test_fine_tuning_and_dropping_run_on_a_stand_in(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_ancestor(name, ancestor_of(name))
    words = stand_in(name, tmp_path)
    for kind in ("finetune", "router_norm"):
        assert main(["fit", "--config", str(CONFIGS / f"{kind}_{name}.yaml"), *words]) == 0
    report = json.loads(Path(f"runs/vision/router_norm_{name}/report.json").read_text())
    assert list(report["images"]) == ["before", "pruned", "recovered"]
    assert {stage["images"] for stage in report["images"].values()} == {6}
    whole = {} if name == "mnist" else {"vit.layers.9.mlp": 8}
    left = {layer: len(found["kept"]) for layer, found in report["experts"].items()}
    assert {layer: count for layer, count in left.items() if count != 4} == whole
    config = json.loads(Path(f"runs/vision/router_norm_{name}/model/config.json").read_text())
    assert len(config["id2label"]) == SETS[name]["classes"]


def ancestor_of(name):
    criterion = settings(f"router_norm_{name}")["trainer"]["callbacks"][0]["init_args"]
    return Path(criterion["criterion_options"]["ancestor"])


def settings(name):
    return yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", SETS)
def test_the_schedule_is_the_papers(name):
    found = settings(f"router_norm_{name}")
    optimizer = found["model"]["init_args"]["optimizer"]
    assert (optimizer["name"], optimizer["momentum"]) == ("sgd", 0.9)
    assert optimizer["schedule"] == "cosine_with_min_lr"
    assert optimizer["schedule_options"] == {"min_lr": 1e-5}
    assert optimizer["warmup_steps"] == (500 if name == "imagenet" else 100)
    assert optimizer["learning_rate"] == pytest.approx(PEAKS[name])
    assert found["trainer"]["gradient_clip_val"] == 10
    assert found["trainer"]["max_steps"] == 1000
    assert found["data"]["init_args"]["batch_size"] == (32 if name == "imagenet" else 512)
    assert found["data"]["init_args"]["image_size"] == SETS[name]["size"]


def test_pretraining_on_mnist_runs_on_a_stand_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = str(CONFIGS / "pretrain_mnist.yaml")
    assert main(["fit", "--config", config, *stand_in("mnist", tmp_path)]) == 0
    report = json.loads(Path("runs/vision/pretrain_mnist/report.json").read_text())
    assert report["images"]["trained"]["images"] == 4 * 6


def test_images_read_one_by_one_are_those_in_memory(tmp_path):
    write_stand_in(tmp_path / "all.parquet", "imagenet", 20, 0)
    fields: dict[str, Any] = {
        "train": str(tmp_path / "all.parquet"),
        "image_size": 16,
        "channels": 3,
        "turns": (0, 90),
        "fractions": SplitFractions(0.2, 0.2, 0.2),
        "batch_size": 3,
    }
    eager, lazy = ImageDataModule(**fields), ImageDataModule(**fields, in_memory=False)
    assert eager.image_shape == lazy.image_shape == (3, 16, 16)
    assert eager.label_names == lazy.label_names
    loaders = [(m.train_dataloader(), m.test_dataloader()) for m in (eager, lazy)]
    for one, other in zip(*loaders, strict=True):
        for batch, same in zip(one, other, strict=True):
            torch.testing.assert_close(batch["pixel_values"], same["pixel_values"])
            assert torch.equal(batch["labels"], same["labels"])


def test_a_parquet_file_that_does_not_say_what_its_bytes_are_is_read(tmp_path):
    write_stand_in(tmp_path / "all.parquet", "mnist", 3, 0)
    table = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "all.parquet"), split="train"
    )
    raw = [{"bytes": row["bytes"], "path": None} for row in encoded(table)]
    plain = datasets.Dataset.from_dict({"image": raw, "label": list(table["label"])})
    plain.to_parquet(str(tmp_path / "plain.parquet"))
    found = load_images(str(tmp_path / "plain.parquet"), channels=1)
    expected = load_images(str(tmp_path / "all.parquet"), channels=1)
    assert torch.equal(found.pixels, expected.pixels)


def encoded(table):
    return table.cast_column("image", datasets.Image(decode=False))["image"]


def test_windows_show_a_part_of_each_image():
    ramp = torch.linspace(0, 1, 32).expand(400, 1, 32, 32)
    windows = Augmentation(smallest_area=0.25)(ramp)
    assert windows.shape == ramp.shape
    widths = windows[:, 0, 0, -1] - windows[:, 0, 0, 0]
    assert widths.min() > (0.25 * 3 / 4) ** 0.5 - 0.08
    assert widths.max() <= 1
    assert 0.6 < widths.mean() < 0.9
    assert windows[:, 0, 0, 0].min() < 0.05
    assert windows[:, 0, 0, -1].max() > 0.95
    with pytest.raises(LitMoEError, match="smallest_area is 0; it is a share above 0"):
        Augmentation(smallest_area=0)
