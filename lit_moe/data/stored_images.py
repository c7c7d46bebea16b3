"""Labelled images that stay on disk until each is asked for, and how they become tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from lit_moe.errors import LitMoEError


@dataclass(frozen=True)
class ImageForm:
    """How an image becomes a tensor.

    Attributes:
        size: pixels per side that it is scaled to, whatever its shape; None to leave it.
        channels: 1 for grey, 3 for colours.
        mean: subtracted from pixels in [0, 1].
        std: pixels are divided by it then.
    """

    size: int | None = None
    channels: int = 3
    mean: float = 0.0
    std: float = 1.0

    def __call__(self, image: Any) -> Tensor:
        """Return one image ``(channels, height, width)`` from PIL, numbers or a tensor."""
        pixels = image if isinstance(image, Tensor) else _as_tensor(image, self.channels)
        if self.size is not None and pixels.shape[1:] != (self.size, self.size):
            sides = (self.size, self.size)
            scaled = F.interpolate(pixels[None], sides, mode="bilinear", antialias=True)
            pixels = scaled[0].clamp(0, 1)
        return (pixels.expand(self.channels, -1, -1) - self.mean) / self.std


@dataclass(frozen=True)
class StoredImages(Dataset[dict[str, Tensor]]):
    """Images of a table, decoded one by one.

    Attributes:
        table: a ``datasets.Dataset``.
        column: of the images.
        form: how they become tensors.
        order: rows of the table, shape ``(N,)``.
        quarters: quarter turns of each, shape ``(N,)``.
        labels: shape ``(N,)``, int64.
        names: of the classes, by label.
    """

    table: Any
    column: str
    form: ImageForm
    order: Tensor
    quarters: Tensor
    labels: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        pixels = self._read(int(self.order[index]))
        pixels = torch.rot90(pixels, int(self.quarters[index]), (1, 2))
        return {"pixel_values": pixels, "labels": self.labels[index]}

    def _read(self, row: int) -> Tensor:
        try:
            image = self.table[row][self.column]
            return self.form(image)
        except (OSError, TypeError, ValueError) as error:
            said = " ".join(str(error).split())[:200]
            raise LitMoEError(
                f"{self._name(row)} is no image that could be read: {said}; mend or remove it"
            ) from error

    def _name(self, row: int) -> str:
        """Return the file that an image came from, or its place in the table."""
        raw = _undecoded(self.table, self.column)[row][self.column]
        path = raw.get("path") if isinstance(raw, dict) else None
        return f"row {row} of column {self.column!r}" + (f" ({path})" if path else "")

    @property
    def pixels(self) -> Tensor:
        """All images, ``(N, channels, height, width)``; reads every one of them."""
        return torch.stack([self[i]["pixel_values"] for i in range(len(self))])

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, height and width of the first image."""
        return tuple(self[0]["pixel_values"].shape)

    def rows(self, index: Tensor | slice) -> Self:
        """Return some of the images."""
        return replace(
            self,
            order=self.order[index],
            quarters=self.quarters[index],
            labels=self.labels[index],
        )

    def turned(self, quarters: Sequence[int]) -> Self:
        """Return the images once for each number of quarter turns, classes told apart."""
        labels, names = turned_labels(self.labels, self.names, quarters)
        return replace(
            self,
            order=self.order.repeat(len(quarters)),
            quarters=torch.tensor(quarters).repeat_interleave(len(self)),
            labels=labels,
            names=names,
        )


def turned_labels(
    labels: Tensor, names: Sequence[str], quarters: Sequence[int]
) -> tuple[Tensor, tuple[str, ...]]:
    """Return labels and names of images that are there once for each number of quarter turns.

    >>> turned_labels(torch.tensor([0, 1]), ("a", "b"), (0, 1))
    (tensor([0, 1, 2, 3]), ('a', 'b', 'a turned by 90', 'b turned by 90'))
    """
    turned = [
        n if not count else f"{n} turned by {90 * count}" for count in quarters for n in names
    ]
    return torch.cat([labels + i * len(names) for i in range(len(quarters))]), tuple(turned)


def _as_tensor(image: Any, channels: int) -> Tensor:
    """Return one image ``(1 or channels, height, width)`` in [0, 1]."""
    if hasattr(image, "convert") and image.mode not in _DEEP:
        image = image.convert("L" if channels == 1 else "RGB")
    array = np.array(image)
    if array.ndim not in (2, 3) or array.dtype.kind not in "uif":
        raise TypeError(f"it has {array.ndim} dimensions of {array.dtype}")
    if array.ndim == 3 and array.shape[2] != channels:
        raise ValueError(f"it has {array.shape[2]} channels, not {channels}")
    pixels = torch.from_numpy(array.astype(np.float32) / _WHITE.get(array.dtype.name, 255))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


_DEEP = {"I", "F", "I;16", "I;16L", "I;16B", "I;16N"}
"""Modes of PIL for grey images with more than 8 bits, which it would cut off when converting."""
_WHITE = {"uint16": 65535, "int32": 65535, "float32": 1, "float64": 1}
"""The brightest value of an array by its type; 255 for the others."""


def _undecoded(table: Any, column: str) -> Any:
    import datasets

    is_image = isinstance(table.features[column], datasets.Image)
    return table.cast_column(column, datasets.Image(decode=False)) if is_image else table
