"""Images that cannot be read, labels that are none, tests on training images: all are told."""

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from lit_moe.data import Augmentation, ImageDataModule, SplitFractions
from lit_moe.data.image_sources import load_images
from lit_moe.errors import LitMoEError

PICTURE = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
SHARES = SplitFractions(0.2, 0.1, 0.2)


def write(path, labels, kind, pictures=None):
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    rows = {"image": pictures or [PICTURE] * len(labels), "label": labels}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return str(path)


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(5):
            PICTURE.save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def refuse(words, make):
    with pytest.raises(LitMoEError, match=words):
        make()


@pytest.mark.parametrize("content", [b"", b"no image"])
def test_a_file_that_is_no_image_is_named(content, folder):
    (folder / "b" / "3.png").write_bytes(content)
    words = r"row 8 of column 'image' \(.*b.3\.png\) is no image that could be read: .*remove it"
    refuse(words, lambda: load_images(str(folder), channels=1))
    lazy = ImageDataModule(str(folder), in_memory=False, fractions=SHARES, batch_size=1)
    loaders = lazy.train_dataloader(), lazy.val_dataloader(), lazy.test_dataloader()
    calibration = lazy.calibration_dataloader()
    refuse(words, lambda: [list(loader) for loader in (*loaders, calibration)])


def test_half_an_image_is_none(folder, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    rows = {"image": [{"bytes": whole[: len(whole) // 2], "path": None}], "label": ["a"]}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "half.parquet"))
    words = "row 0 of column 'image' is no image that could be read: image file is truncated"
    refuse(words, lambda: load_images(f"{tmp_path}/half.parquet"))


def test_a_folder_of_one_class_is_told_what_it_lacks(folder):
    words = "has no column 'label'; it has image; a folder of images needs a sub-folder per class"
    refuse(words, lambda: load_images(str(folder / "a")))


@pytest.mark.parametrize("in_memory", [True, False])
def test_only_squares_are_turned_by_quarters(in_memory, tmp_path):
    wide = Image.fromarray(np.zeros((4, 6), dtype=np.uint8))
    path = write(tmp_path / "wide.parquet", ["a", "b"] * 5, datasets.Value("string"), [wide] * 10)
    fields = {"in_memory": in_memory, "fractions": SHARES}
    odd = ImageDataModule(path, turns=(0, 90), **fields)
    refuse("4 x 6 pixels turned by 90 degrees have another shape", lambda: odd.label_names)
    assert ImageDataModule(path, turns=(0, 180), **fields).image_shape == (1, 4, 6)
    twice = ImageDataModule(path, turns=(0, 0), **fields)
    refuse(r"turns=\[0, 0\] can be some of", lambda: twice.label_names)


def test_rows_without_image_and_columns_of_something_else_are_named(tmp_path):
    names = datasets.Value("string")
    path = write(tmp_path / "none.parquet", ["a", "b"], names, [PICTURE, None])
    refuse("row 1 of column 'image' is no image", lambda: load_images(path))
    text = datasets.Dataset.from_dict({"image": ["x", "y"], "label": ["a", "b"]})
    text.to_parquet(str(tmp_path / "text.parquet"))
    refuse("row 0 of column 'image' is no image", lambda: load_images(f"{tmp_path}/text.parquet"))


@pytest.mark.parametrize(
    ("labels", "kind", "words"),
    [
        (["a", None], datasets.Value("string"), "1 of 2 images have no label but None"),
        ([-1, -1], datasets.ClassLabel(names=["a", "b"]), "2 of 2 images have no label but -1"),
        ([[1], [2]], datasets.List(datasets.Value("int64")), r"no label but \[1\]; a label is a"),
    ],
)
def test_images_without_labels_are_refused(labels, kind, words, tmp_path):
    path = write(tmp_path / "all.parquet", labels, kind)
    refuse(words, lambda: load_images(path))


def test_labels_are_names_or_numbers(tmp_path):
    path = write(tmp_path / "s.parquet", ["dog", "cat", "dog"], datasets.Value("string"))
    found = load_images(path, channels=1)
    assert (found.names, found.labels.tolist()) == (("cat", "dog"), [1, 0, 1])
    path = write(tmp_path / "n.parquet", [7, 3, 7], datasets.Value("int64"))
    found = load_images(path, channels=1)
    assert (found.names, found.labels.tolist()) == (("3", "7"), [1, 0, 1])


def test_bright_is_1_whatever_the_depth(tmp_path):
    deep = Image.fromarray(np.array([[0, 257], [32896, 65535]], dtype=np.uint16))
    flat = Image.fromarray(np.array([[0, 1], [128, 255]], dtype=np.uint8))
    for name, picture in (("deep", deep), ("flat", flat)):
        for label in ("a", "b"):
            (tmp_path / name / label).mkdir(parents=True)
            picture.save(tmp_path / name / label / "0.png")
    one, other = (load_images(str(tmp_path / n), channels=1) for n in ("deep", "flat"))
    torch.testing.assert_close(one.pixels, other.pixels, rtol=0, atol=1e-6)
    lists = datasets.Dataset.from_dict({"image": [[[0, 1], [128, 255]]] * 2, "label": [0, 1]})
    lists.to_parquet(str(tmp_path / "lists.parquet"))
    third = load_images(f"{tmp_path}/lists.parquet", channels=1)
    torch.testing.assert_close(third.pixels, other.pixels, rtol=0, atol=1e-6)


def test_a_folder_of_saved_splits_is_read(folder, tmp_path):
    table = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    parts = {"train": table, "test": table.select(range(3, 7))}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    source = str(tmp_path / "saved")
    data = ImageDataModule(source, source, fractions=SHARES)
    assert data.images("test").labels.tolist() == [0, 0, 1, 1]
    assert len(data.images("train")) == 7
    refuse("no split 'dev'; it has train, test", lambda: load_images(source, split="dev"))


def test_training_images_are_no_test_images(folder, tmp_path):
    file = write(tmp_path / "all.parquet", ["a", "b"] * 5, datasets.Value("string"))
    for source, split in ((str(folder), "train"), (file, "test"), ("digits", "test")):
        same = ImageDataModule(source, source, test_split=split)
        refuse("test would be the training images themselves", lambda m=same: m.label_names)


def test_a_margin_as_wide_as_the_image_is_refused():
    data = ImageDataModule(augmentation=Augmentation(crop=8))
    refuse("crop is 8, but the images have 8 x 8 pixels", lambda: data.label_names)
    assert ImageDataModule(augmentation=Augmentation(crop=7)).image_shape == (1, 8, 8)
