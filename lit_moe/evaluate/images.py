"""How often an image classifier is right."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lit_moe.inference import evaluating


@dataclass(frozen=True)
class ImageQuality:
    """How well a model classifies held-out images.

    Attributes:
        accuracy: share whose likeliest label is right, in [0, 1].
        stderr: its binomial standard error.
        loss: mean cross-entropy in nats.
        images: classified.
        images_per_second: wall-clock speed of the evaluation on this rank.
    """

    accuracy: float
    stderr: float
    loss: float
    images: int
    images_per_second: float = 0.0


def evaluate_images(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]
) -> ImageQuality:
    """Measure a classifier in evaluation mode, on its own device.

    With a process group each rank passes its own share; all ranks must call this and all get the
    result over all shares.

    Args:
        model: an image classifier.
        batches: dictionaries with ``pixel_values`` and ``labels``.
    """
    sums, start = torch.zeros(3, dtype=torch.float64, device=model.device), time.perf_counter()
    with evaluating(model):
        for batch in batches:
            labels = batch["labels"].to(model.device)
            logits = model(pixel_values=batch["pixel_values"].to(model.device)).logits.float()
            right = (logits.argmax(dim=-1) == labels).sum()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack([right.double(), loss.double(), right.new_tensor(len(labels))])
    seconds, own = time.perf_counter() - start, float(sums[2])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(sums)
    right, loss, count = sums.tolist()
    share = right / max(count, 1)
    return ImageQuality(
        accuracy=share,
        stderr=math.sqrt(share * (1 - share) / max(count, 1)),
        loss=loss / max(count, 1),
        images=int(count),
        images_per_second=own / max(seconds, 1e-9),
    )
