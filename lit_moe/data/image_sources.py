"""Labelled images as tensors, from scikit-learn's digits, folders, parquet files, or the hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lit_moe.data.stored_images import ImageForm, StoredImages, turned_labels
from lit_moe.errors import LitMoEError

DIGITS = "digits"
"""1,797 images of 8 x 8 pixels, which come with scikit-learn."""
_NONE = (-1,)
"""What stands for no label in a column of classes."""
_SAVED = ("dataset_info.json", "dataset_dict.json")
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

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width of an image."""
        return tuple(self.pixels.shape[1:])

    def rows(self, index: Tensor | slice) -> Self:
        """Return some of the images."""
        return replace(self, pixels=self.pixels[index], labels=self.labels[index])

    def turned(self, quarters: Sequence[int]) -> Self:
        """Return the images once for each number of quarter turns, classes told apart."""
        pixels = torch.cat([torch.rot90(self.pixels, count, (2, 3)) for count in quarters])
        labels, names = turned_labels(self.labels, self.names, quarters)
        return replace(self, pixels=pixels, labels=labels, names=names)


Images = LabelledImages | StoredImages


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
        source: ``digits``, a folder with one sub-folder per class, a parquet file, a folder that
            ``datasets`` saved, or a hub id (``name`` or ``name:config``).
        split: of a data set that has several.
        image_size: pixels per side that images are scaled to; None if all have the same size.
        channels: 1 for grey, 3 for colours.
        columns: names of the image and of the label.

    Raises:
        LitMoEError: if the source is missing, holds no image or no label, or images differ in size.
    """
    form = ImageForm(image_size, channels)
    if source != DIGITS:
        return _in_memory(open_images(source, split=split, form=form, columns=columns), source)
    found = _digits()
    return replace(found, pixels=torch.stack([form(image) for image in found.pixels]))


def open_images(
    source: str,
    *,
    split: str = "train",
    form: ImageForm | None = None,
    columns: tuple[str, str] = ("image", "label"),
) -> StoredImages:
    """Find a set of labelled images; each is read only when it is asked for.

    Args:
        source: as in :func:`load_images`, but not ``digits``.
        split: of a data set that has several.
        form: how an image becomes a tensor.
        columns: names of the image and of the label.

    Raises:
        LitMoEError: if the source is missing, or holds no image or no label.
    """
    table = _split_of(_open(source, split), source, split)
    image, label = columns
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        has = f"{source} has no column {missing[0]!r}; it has {', '.join(table.column_names)}"
        if table.column_names == ["image"]:
            raise LitMoEError(
                f"{has}; a folder of images needs a sub-folder per class, two or more"
            )
        raise LitMoEError(f"{has}; name them by image_column and label_column")
    if len(table) == 0:
        raise LitMoEError(f"{source} has no image in its split {split!r}")
    names = getattr(table.features[label], "names", None)
    labels, names = _labels(list(table[label]), names)
    order = torch.arange(len(labels))
    quarters = torch.zeros_like(order)
    return StoredImages(
        _decoding(table, image), image, form or ImageForm(), order, quarters, labels, names
    )


def _in_memory(stored: StoredImages, source: str) -> LabelledImages:
    pixels = [stored[i]["pixel_values"] for i in range(len(stored))]
    sizes = sorted({tuple(p.shape[1:]) for p in pixels})
    if len(sizes) > 1:
        raise LitMoEError(
            f"the images of {source} differ in size (from {sizes[0]} to {sizes[-1]}); set "
            "image_size, so that all are scaled to one"
        )
    return LabelledImages(torch.stack(pixels), stored.labels, stored.names)


def _decoding(table: Any, column: str) -> Any:
    """Return the table with files in the column decoded, which a plain parquet does not ask for."""
    import datasets

    kind = table.features[column]
    if isinstance(kind, dict) and "bytes" in kind:
        return table.cast_column(column, datasets.Image())
    return table


def turned(images: Images, degrees: Sequence[int]) -> Images:
    """Return the images once for each turn, each turn of each class a class of its own.

    Label ``turn * classes + label``, so that without a turn labels stay what they were.

    Args:
        images: square ones.
        degrees: multiples of 90, the first usually 0.

    Raises:
        LitMoEError: for another angle.
    """
    odd = [angle for angle in degrees if angle not in _QUARTERS]
    if odd or not degrees or len(set(degrees)) < len(degrees):
        raise LitMoEError(f"turns={list(degrees)} can be some of {list(_QUARTERS)} degrees, once")
    if any(angle % 180 for angle in degrees) and len(images):
        height, width = images.shape[1:]
        if height != width:
            raise LitMoEError(
                f"images of {height} x {width} pixels turned by 90 degrees have another shape; set "
                "image_size, so that all are scaled to squares"
            )
    return images.turned([angle // 90 for angle in degrees])


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


def _open(source: str, split: str) -> Any:
    import datasets

    path = Path(source).expanduser()
    try:
        if path.is_file() and path.suffix == ".parquet":
            return datasets.load_dataset("parquet", data_files=str(path), split="train")
        if any((path / name).is_file() for name in _SAVED):
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


def _split_of(found: Any, source: str, split: str) -> Any:
    """Return one table of a folder that was saved with several."""
    if not isinstance(found, dict):
        return found
    if split not in found:
        raise LitMoEError(f"{source} has no split {split!r}; it has {', '.join(found)}")
    return found[split]


def _labels(values: list[Any], names: Sequence[str] | None) -> tuple[Tensor, tuple[str, ...]]:
    odd = [v for v in values if not isinstance(v, str | int | float) or (names and v in _NONE)]
    if odd:
        raise LitMoEError(
            f"{len(odd)} of {len(values)} images have no label but {odd[0]!r}; a label is a number "
            "from 0 or a name, so take a split or a column that has them"
        )
    if names is None:
        found = sorted(set(values))
        names = [str(value) for value in found]
        values = [found.index(value) for value in values]
    return torch.tensor(values, dtype=torch.long), tuple(names)
