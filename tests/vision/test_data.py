"""Images from every source, cut without overlap, changed at random, refused when odd."""

import numpy as np
import pytest
import torch
from PIL import Image

from lit_moe.data import Augmentation, ImageDataModule, SplitFractions
from lit_moe.data.image_sources import LabelledImages, load_images, turned
from lit_moe.errors import LitMoEError
from lit_moe.evaluate.images import evaluate_images
from lit_moe.models.vision import check_images, check_labels
from lit_moe.testing.vision import tiny_vmoe

COUNT = 6


@pytest.fixture
def folder(tmp_path):
    """Twelve images of two classes, each of a brightness of its own."""
    for i, name in enumerate(("cat", "dog")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for j in range(COUNT):
            pixels = np.full((4, 4, 3), 20 * (i * COUNT + j), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{j}.png")
    return tmp_path / "images"


def brightness(images):
    return sorted(round(float(p.mean()) * 255) for p in images.pixels)


def test_a_folder_of_folders_is_read(folder):
    images = load_images(str(folder), channels=3)
    assert images.names == ("cat", "dog")
    assert images.pixels.shape == (2 * COUNT, 3, 4, 4)
    assert brightness(images) == [20 * i for i in range(2 * COUNT)]
    dark = images.labels[images.pixels.mean(dim=(1, 2, 3)) < 20 * COUNT / 255]
    assert dark.tolist() == [0] * COUNT


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_parquet_and_saved_data_sets_give_the_same(kind, folder, tmp_path):
    import datasets

    table = datasets.load_dataset("imagefolder", data_dir=str(folder), split="train")
    target = tmp_path / ("all.parquet" if kind == "parquet" else "all")
    table.to_parquet(str(target)) if kind == "parquet" else table.save_to_disk(str(target))
    images, expected = load_images(str(target)), load_images(str(folder))
    assert images.names == expected.names
    assert torch.equal(images.pixels, expected.pixels)
    assert torch.equal(images.labels, expected.labels)


def test_images_are_scaled_and_made_grey(folder):
    images = load_images(str(folder), image_size=8, channels=1)
    assert images.pixels.shape == (2 * COUNT, 1, 8, 8)
    assert brightness(images) == [20 * i for i in range(2 * COUNT)]


def test_digits_are_real_and_splits_share_none():
    data = ImageDataModule(fractions=SplitFractions(0.1, 0.1, 0.2), seed=3)
    parts = [data.images(split) for split in ("train", "calibration", "validation", "test")]
    assert [len(part) for part in parts] == [1078, 180, 180, 359]
    everything = torch.cat([part.pixels.flatten(1) for part in parts])
    assert len(everything.unique(dim=0)) == len(
        load_images("digits").pixels.flatten(1).unique(dim=0)
    )
    assert data.label_names == tuple("0123456789")
    assert data.image_shape == (1, 8, 8)


def test_turns_are_classes_of_their_own_and_come_after_the_cut():
    data = ImageDataModule(turns=(0, 90), seed=0)
    plain = ImageDataModule(seed=0)
    both, one = data.images("test"), plain.images("test")
    assert len(both) == 2 * len(one)
    assert torch.equal(both.pixels[: len(one)], one.pixels)
    assert torch.equal(both.pixels[len(one) :], one.pixels.rot90(1, (2, 3)))
    assert torch.equal(both.labels[len(one) :], one.labels + 10)
    assert both.names[10:12] == ("0 turned by 90", "1 turned by 90")


def test_flip_mirrors_about_half():
    pixels = torch.arange(4.0).expand(200, 1, 4, 4)
    flipped = Augmentation(flip=True)(pixels)[:, 0, 0, 0] == 3
    assert 70 < int(flipped.sum()) < 130


def test_crop_moves_by_at_most_the_margin():
    pixels = torch.zeros(100, 1, 8, 8)
    pixels[:, :, 4, 4] = 1
    places = Augmentation(crop=2)(pixels)[:, 0].nonzero()[:, 1:]
    assert places.min() == 2
    assert places.max() == 6


def test_rotation_keeps_the_middle_and_a_turn_of_nothing_is_nothing():
    pixels = torch.rand(5, 1, 9, 9)
    torch.testing.assert_close(Augmentation(rotate=30)(pixels)[:, :, 4, 4], pixels[:, :, 4, 4])
    assert torch.equal(Augmentation()(pixels), pixels)


def test_accuracy_and_loss_are_those_of_all_images_together():
    model, images = tiny_vmoe(eval_capacity_factor=None), random_images(17)
    quality = evaluate_images(model, [images[:10], images[10:]])
    with torch.no_grad():
        logits = model(pixel_values=images.pixels).logits
    expected = (logits.argmax(-1) == images.labels).float().mean()
    assert quality.images == 17
    assert quality.accuracy == pytest.approx(float(expected))
    loss = torch.nn.functional.cross_entropy(logits, images.labels)
    assert quality.loss == pytest.approx(float(loss), rel=1e-5)


def random_images(count):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(5, (count,), generator=generator)
    pixels = torch.randn(count, 1, 8, 8, generator=generator)
    return _Batch(pixels, labels, tuple("abcde"))


class _Batch(LabelledImages):
    def __getitem__(self, index):
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}


def test_labels_of_a_superset_are_known_by_name():
    model = tiny_vmoe()
    check_labels(model, tuple("abcde"))
    assert list((model.config.id2label or {}).values()) == list("abcde")
    check_labels(model, tuple("abc"))
    with pytest.raises(
        LitMoEError, match=r"the data has 3 classes \(b, a, c, ...\), but the model"
    ):
        check_labels(model, ("b", "a", "c"))
    with pytest.raises(LitMoEError, match=r"same 5 classes in different orders \(b, a, c, d, e"):
        check_labels(model, tuple("bacde"))
    with pytest.raises(LitMoEError, match="has 6 classes .* model has 5 labels"):
        check_labels(model, tuple("abcdef"))


def test_images_of_another_size_are_refused():
    with pytest.raises(LitMoEError, match="16 x 16 pixels, but the model takes 8 x 8"):
        check_images(tiny_vmoe(), (1, 16, 16))
    with pytest.raises(LitMoEError, match="have 3 channels, but the model takes 1"):
        check_images(tiny_vmoe(), (3, 8, 8))


def refuse(words, make):
    with pytest.raises(LitMoEError, match=words):
        make()


def test_bad_input_is_one_sentence(folder, tmp_path):
    other = np.zeros((5, 4, 3), dtype=np.uint8)
    Image.fromarray(other).save(folder / "cat" / "odd.png")
    source = str(folder)
    refuse(r"differ in size .*set image_size", lambda: load_images(source))
    refuse("no column 'picture'", lambda: load_images(source, columns=("picture", "label")))
    refuse("no folder, parquet file", lambda: load_images(str(tmp_path / "nothing.parquet")))
    refuse(r"turns=\[45\] can be some", lambda: turned(load_images("digits"), [45]))
    refuse("channels=2", lambda: ImageDataModule(channels=2))
    refuse("image_size=0: the first is", lambda: ImageDataModule(image_size=0))
    refuse("num_workers=-1, ", lambda: ImageDataModule(num_workers=-1))
    refuse("crop is -1", lambda: Augmentation(crop=-1))
    no_test = ImageDataModule(fractions=SplitFractions(0.1, 0.1, 0.0))
    refuse(r"test split has no image: set fractions.test", lambda: no_test.images("test"))
    (folder / "cat" / "odd.png").unlink()
    classes = ImageDataModule(train="digits", test=source, test_split="train", image_size=8)
    refuse("training images have 10 classes .* test images 2", lambda: classes.label_names)
