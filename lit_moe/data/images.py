"""Images for calibration, training, validation and test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from lit_moe.assets import Split
from lit_moe.data.augmentation import Augmentation
from lit_moe.data.image_sources import DIGITS, Images, load_images, open_images, turned
from lit_moe.data.order import ResumableLoader, ShareInOrder, ShuffledShare
from lit_moe.data.stored_images import ImageForm
from lit_moe.data.tasks import SplitFractions
from lit_moe.errors import LitMoEError
from lit_moe.evaluate.images import ImageQuality, evaluate_images


class ImageDataModule(L.LightningDataModule):
    """Labelled images, cut into four purposes; no image serves two of them.

    Batches are dictionaries of ``pixel_values (B, C, height, width)`` and ``labels (B,)``.

    Args:
        train: where images come from: ``digits`` (8 x 8, with scikit-learn), a folder with one
            sub-folder per class, a parquet file, a ``datasets`` folder, or a hub id.
        test: images for the numbers in the report; None cuts them from those of ``train``.
        fractions: how much is cut off for calibration, validation and, without ``test``, test.
        train_split: name of the split to take from ``train``, where there are several.
        test_split: likewise of ``test``.
        image_column: name of the column with images.
        label_column: and with labels.
        image_size: pixels per side that images are scaled to; None if all have one size.
        channels: 1 for grey, 3 for colours.
        mean: subtracted from pixels in [0, 1].
        std: pixels are divided by it then.
        turns: degrees by which images are turned, each turn of each class a class of its own:
            ``[0, 90, 180, 270]`` makes a superset with four times the classes.
        augmentation: random changes of training images.
        batch_size: images per batch and device.
        seed: of the split and of the order of training.
        in_memory: read all images at once, as numbers of 4 bytes; false reads each when its turn
            comes, for sets that would not fit.
        num_workers: processes that read images, where they are not in memory.
    """

    def __init__(
        self,
        train: str = DIGITS,
        test: str | None = None,
        fractions: SplitFractions | None = None,
        train_split: str = "train",
        test_split: str = "test",
        image_column: str = "image",
        label_column: str = "label",
        image_size: int | None = None,
        channels: int = 1,
        mean: float = 0.5,
        std: float = 0.5,
        turns: Sequence[int] = (0,),
        augmentation: Augmentation | None = None,
        batch_size: int = 128,
        seed: int = 0,
        in_memory: bool = True,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or channels not in (1, 3) or not std > 0:
            raise LitMoEError(
                f"batch_size={batch_size}, channels={channels}, std={std:g}: the first must be at "
                "least 1, the second 1 or 3, the third above 0"
            )
        if num_workers < 0 or (image_size is not None and image_size < 1):
            raise LitMoEError(
                f"num_workers={num_workers}, image_size={image_size}: the first is at least 0, "
                "the second at least 1, or null where images have one size"
            )
        self.sources = {"train": (train, train_split), "test": (test, test_split)}
        self.columns = (image_column, label_column)
        self.fractions = fractions or SplitFractions(calibration=0.1, validation=0.05, test=0.2)
        self.form = ImageForm(image_size, channels, mean, std)
        self.turns = tuple(turns)
        self.augmentation = augmentation or Augmentation()
        self.batch_size = batch_size
        self.seed = seed
        self.in_memory = in_memory
        self.num_workers = num_workers
        self._images: dict[str, Images] = {}
        self._loader: ResumableLoader | None = None
        self._position: dict[str, Any] = {}

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes, by label; reads the images on first use."""
        return self.images("train").names

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Channels, height and width of the images."""
        return self.images("train").shape

    def images(self, split: Split) -> Images:
        """Return the images of a split, read, cut and checked on first use.

        Raises:
            LitMoEError: if the split is empty, or test images have other classes.
        """
        if not self._images:
            self._images = self._cut()
        found = self._images[split]
        if len(found) == 0:
            raise LitMoEError(f"the {split} split has no image: set fractions.{split} above 0")
        return found

    def calibration_dataloader(self, *, rank: int = 0, world_size: int = 1) -> DataLoader:
        """Batches of this rank's share of the calibration images."""
        return self._in_order(self.images("calibration").rows(slice(rank, None, world_size)))

    def train_dataloader(self) -> DataLoader:
        """Shuffled training batches of this rank; the last incomplete step is left out."""
        images = self.images("train")
        trainer = self.trainer
        sampler = ShuffledShare(
            images,
            rank=0 if trainer is None else trainer.global_rank,
            world_size=1 if trainer is None else trainer.world_size,
            seed=self.seed,
            multiple_of=self.batch_size
            * (1 if trainer is None else trainer.accumulate_grad_batches),
        )
        if len(sampler) < self.batch_size:
            raise LitMoEError(
                f"{len(images)} training images do not fill one batch of {self.batch_size}; give "
                "more images or a smaller batch_size"
            )
        self._loader = ResumableLoader(images, sampler=sampler, **self._reading())
        self._loader.load_state_dict(self._position)
        self._position = {}
        return self._loader

    def val_dataloader(self) -> DataLoader:
        """Validation batches in fixed order."""
        return self._shared_out("validation")

    def test_dataloader(self) -> DataLoader:
        """Test batches in fixed order."""
        return self._shared_out("test")

    def predict_dataloader(self) -> DataLoader:
        """The test batches."""
        return self.test_dataloader()

    def evaluate_images(self, model: PreTrainedModel) -> ImageQuality:
        """Return the quality on the test images. Collective: all ranks get the same."""
        rank = 0 if self.trainer is None else self.trainer.global_rank
        world_size = 1 if self.trainer is None else self.trainer.world_size
        share = self.images("test").rows(slice(rank, None, world_size))
        return evaluate_images(model, self._in_order(share))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """On the device, before a step. Changes training images at random."""
        del dataloader_idx
        if self.trainer is None or not self.trainer.training:
            return batch
        return {**batch, "pixel_values": self.augmentation(batch["pixel_values"])}

    def state_dict(self) -> dict[str, Any]:
        """Return how far into the epoch training is."""
        return {} if self._loader is None else self._loader.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Let training go on where a checkpoint was written."""
        self._position = dict(state_dict)
        if self._loader is not None:
            self._loader.load_state_dict(self._position)
            self._position = {}

    def _cut(self) -> dict[str, Images]:
        _check_apart(*self.sources.values())
        found = self._load("train")
        shares = {name: self.fractions.of(name) for name in _CUT}
        if self.sources["test"][0] is not None:
            shares["test"] = 0.0
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(found), generator=generator)
        parts: dict[str, Images] = {}
        for name, share in shares.items():
            count = round(share * len(found))
            parts[name], order = found.rows(order[:count]), order[count:]
        parts["train"] = found.rows(order)
        if self.sources["test"][0] is not None:
            parts["test"] = self._load("test")
            _check_same_classes(found, parts["test"])
        if self.augmentation.crop:
            _check_margin(self.augmentation.crop, found.shape)
        return {name: turned(images, self.turns) for name, images in parts.items()}

    def _load(self, which: str) -> Images:
        source, split = self.sources[which]
        assert source is not None
        form = self.form
        if not self.in_memory and source != DIGITS:
            return open_images(source, split=split, form=form, columns=self.columns)
        images = load_images(
            source,
            split=split,
            image_size=form.size,
            channels=form.channels,
            columns=self.columns,
        )
        return replace(images, pixels=(images.pixels - form.mean) / form.std)

    def _shared_out(self, split: Split) -> DataLoader:
        images = self.images(split)
        world_size = 1 if self.trainer is None else self.trainer.world_size
        whole = images.rows(slice(0, len(images) // world_size * world_size))
        rank = 0 if self.trainer is None else self.trainer.global_rank
        sampler = ShareInOrder(whole, rank=rank, world_size=world_size)
        return DataLoader(whole, sampler=sampler, **self._reading())

    def _in_order(self, images: Images) -> DataLoader:
        return DataLoader(images, **self._reading())

    def _reading(self) -> dict[str, Any]:
        # A generator of its own: loaders draw a seed, which would move the model's random numbers.
        workers = 0 if self.in_memory else self.num_workers
        return {
            "batch_size": self.batch_size,
            "num_workers": workers,
            "generator": torch.Generator(),
        }


_CUT: tuple[Split, ...] = ("calibration", "validation", "test")


def _check_apart(train: tuple[str | None, str], test: tuple[str | None, str]) -> None:
    """Refuse to test on training images; files have no splits that could tell them apart."""
    source = str(train[0])
    path = Path(source).expanduser()
    has_one = source == DIGITS or path.is_file() or (path / "dataset_info.json").is_file()
    if train[0] == test[0] and (has_one or train[1] == test[1]):
        raise LitMoEError(
            f"test would be the training images themselves ({source}, split {train[1]!r}); leave "
            "data.init_args.test out, so that fractions.test of them are kept apart"
        )


def _check_margin(crop: int, shape: Sequence[int]) -> None:
    if crop >= min(shape[1:]):
        raise LitMoEError(
            f"augmentation.crop is {crop}, but the images have {shape[1]} x {shape[2]} pixels; a "
            "mirrored margin must be smaller than the image"
        )


def _check_same_classes(train: Images, test: Images) -> None:
    if train.names != test.names:
        raise LitMoEError(
            f"training images have {len(train.names)} classes ({', '.join(train.names[:5])}, ...), "
            f"test images {len(test.names)} ({', '.join(test.names[:5])}, ...); both must have the "
            "same, in the same order"
        )
