"""Whether a classifier and a data set fit: sizes of images, meaning of labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from lit_moe.errors import LitMoEError


def check_images(model: PreTrainedModel, shape: Sequence[int]) -> None:
    """Refuse images of another size or with other channels than the model takes.

    Args:
        model: an image classifier.
        shape: channels, height and width of the images.

    Raises:
        LitMoEError: with both, and what would do.
    """
    size = model.config.image_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    if (height, width) != tuple(shape[1:]):
        raise LitMoEError(
            f"the images have {shape[1]} x {shape[2]} pixels, but the model takes {height} x "
            f"{width}; scale them by data.init_args.image_size: {height}"
        )
    if model.config.num_channels != shape[0]:
        raise LitMoEError(
            f"the images have {shape[0]} channels, but the model takes "
            f"{model.config.num_channels}; set data.init_args.channels: {model.config.num_channels}"
        )


def check_labels(model: PreTrainedModel, names: Sequence[str]) -> None:
    """Refuse a classifier with other labels than the data has; remember the data's names.

    A classifier may have more labels than the data if its first ones have the same names: one that
    was trained on a superset.

    Args:
        model: an image classifier.
        names: of the data's classes, by label.

    Raises:
        LitMoEError: with both numbers, and what would do; or if the same labels are in another
            order.
    """
    config: Any = model.config
    count = len(names)
    known = [str((config.id2label or {}).get(i)) for i in range(config.num_labels)]
    if known[:count] == list(names):
        return
    if sorted(known) == sorted(names):
        raise LitMoEError(
            f"the data and the model have the same {count} classes in different orders "
            f"({', '.join(names[:5])}, ... and {', '.join(known[:5])}, ...), so that labels would "
            "mean something else; give the data the model's order (a ClassLabel column)"
        )
    if config.num_labels != count:
        raise LitMoEError(
            f"the data has {count} classes ({', '.join(names[:5])}, ...), but the model has "
            f"{config.num_labels} labels ({', '.join(known[:5])}, ...); give the model a new "
            f"classifier by model.init_args.num_labels: {count}, or take the data it was made for"
        )
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}
