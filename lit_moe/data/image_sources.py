"""Labelled images as tensors, from scikit-learn's digits, folders, parquet files, or the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from lit_moe.errors import LitMoEError

DIGITS = "digits"
"""1,797 images of 8 x 8 pixels, which come with scikit-learn."""
_QUARTERS = (0, 90, 180, 270)


@dataclass(frozen=True)
class LabelledImages(Dataset[dict[str, Tensor]]):
    """Images in memory.

    Attributes:
        pixels: shape ``(N, C, height, width)``, float32 in [0, 1].
        labels: shape ``(N,)``, int64.
        names: of the classes, by label.
    """

    pixels: Tensor
    labels: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.pixels[index], "labels": self.labels[index]}

    def rows(self, index: Tensor | slice) -> LabelledImages:
        """Return some of the images."""
        return replace(self, pixels=self.pixels[index], labels=self.labels[index])


def load_images(
    source: str,
    *,
    split: str = "train",
    image_size: int | None = None,
    channels: int = 3,
    columns: tuple[str, str] = ("image", "label"),
) -> LabelledImages:
    """Read a set of labelled images.

    Args:
        source: ``digits``, a folder with one sub-folder per class, a parquet file, a ``datasets``
            folder, or a hub id (``name`` or ``name:config``).
        split: of a data set that has several.
        image_size: pixels per side that images are scaled to; None if all have the same size.
        channels: 1 for grey, 3 for colours.
        columns: names of the image and of the label.

    Raises:
        LitMoEError: if the source is missing, holds no image or no label, or images differ in size.
    """
    found = _digits() if source == DIGITS else _from_datasets(source, split, channels, columns)
    pixels = found.pixels.expand(-1, channels, -1, -1)
    if image_size is not None and pixels.shape[-2:] != (image_size, image_size):
        pixels = F.interpolate(
            pixels, (image_size, image_size), mode="bilinear", antialias=True
        ).clamp(0, 1)
    return replace(found, pixels=pixels.contiguous())


def turned(images: LabelledImages, degrees: Sequence[int]) -> LabelledImages:
    """Return the images once for each turn, each turn of each class a class of its own.

    Label ``turn * classes + label``, so that without a turn labels stay what they were.

    Args:
        images: square ones.
        degrees: multiples of 90, the first usually 0.

    Raises:
        LitMoEError: for another angle.
    """
    odd = [angle for angle in degrees if angle not in _QUARTERS]
    if odd or not degrees:
        raise LitMoEError(f"turns={list(degrees)} can be some of {list(_QUARTERS)} degrees")
    count = len(images.names)
    names = [n if not a else f"{n} turned by {a}" for a in degrees for n in images.names]
    return LabelledImages(
        torch.cat([torch.rot90(images.pixels, angle // 90, (2, 3)) for angle in degrees]),
        torch.cat([images.labels + i * count for i in range(len(degrees))]),
        tuple(names),
    )


def _digits() -> LabelledImages:
    if find_spec("sklearn") is None:
        raise LitMoEError(
            "the digits come with scikit-learn, which is not installed: pip install "
            "'lit-moe[vision]', or name an image folder"
        )
    from sklearn.datasets import load_digits

    found: Any = load_digits()
    pixels = torch.from_numpy(found.images).float()[:, None] / 16
    labels = torch.from_numpy(found.target).long()
    return LabelledImages(pixels, labels, tuple(str(i) for i in range(10)))


def _from_datasets(
    source: str, split: str, channels: int, columns: tuple[str, str]
) -> LabelledImages:
    table = _open(source, split)
    image, label = columns
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise LitMoEError(
            f"{source} has no column {missing[0]!r}; it has {', '.join(table.column_names)}; name "
            "them by image_column and label_column"
        )
    if len(table) == 0:
        raise LitMoEError(f"{source} has no image in its split {split!r}")
    pixels = [_as_tensor(row, channels) for row in table[image]]
    sizes = sorted({tuple(p.shape[1:]) for p in pixels})
    if len(sizes) > 1:
        raise LitMoEError(
            f"the images of {source} differ in size (from {sizes[0]} to {sizes[-1]}); set "
            "image_size, so that all are scaled to one"
        )
    names = getattr(table.features[label], "names", None)
    labels, names = _labels(list(table[label]), names)
    return LabelledImages(torch.stack(pixels), labels, names)


def _open(source: str, split: str) -> Any:
    import datasets

    path = Path(source).expanduser()
    try:
        if path.is_file() and path.suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files=str(path), split="train")
        if path.is_dir() and (path / "dataset_info.json").is_file():
            return datasets.load_from_disk(str(path))
        if path.is_dir():
            return datasets.load_dataset("imagefolder", data_dir=str(path), split=split)
        name, _, config = source.partition(":")
        return datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        said = " ".join(str(error).split())[:200]
        raise LitMoEError(
            f"images {source!r} are no folder, parquet file or data set that could be read: {said}"
        ) from error


def _as_tensor(image: Any, channels: int) -> Tensor:
    """Return one image ``(1 or channels, height, width)`` in [0, 1] from PIL or from numbers."""
    if hasattr(image, "convert"):
        image = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    pixels = torch.as_tensor(np.array(image))
    pixels = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def _labels(values: list[Any], names: Sequence[str] | None) -> tuple[Tensor, tuple[str, ...]]:
    if names is None:
        found = sorted(set(values))
        names = [str(value) for value in found]
        values = [found.index(value) for value in values]
    return torch.tensor(values, dtype=torch.long), tuple(names)
