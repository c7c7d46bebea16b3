"""The training loss of image classifiers: labels, the model's own auxiliary losses, a teacher."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lit_moe.distill.recovery import Recovery
from lit_moe.distill.weights import LossWeights
from lit_moe.errors import LitMoEError

_TEXT_ONLY = ("experts", "router", "load_balance")


def takes_images(model: PreTrainedModel) -> bool:
    """Whether a model reads pixels and not tokens."""
    return model.main_input_name == "pixel_values"


def check_image_weights(weights: LossWeights) -> None:
    """Refuse terms that image classifiers do not have.

    Raises:
        LitMoEError: naming the first, and what there is instead.
    """
    if weights.top_k is not None:
        raise LitMoEError(
            f"loss.top_k is {weights.top_k}, but image classifiers are distilled from all labels; "
            "leave loss.top_k and loss.cache out"
        )
    for name in _TEXT_ONLY:
        if getattr(weights, name) > 0:
            raise LitMoEError(
                f"loss.{name} is {getattr(weights, name):g}, but image classifiers are trained by "
                "loss.next_token (their labels) and loss.distillation; routers are balanced by "
                "importance_loss and load_loss in the model's config"
            )


def image_recovery(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batch: Mapping[str, Tensor],
    weights: LossWeights,
) -> Recovery:
    """Return the weighted loss of one step.

    Args:
        student: the model that is trained, in training mode.
        teacher: frozen, on any device; None if there is no distillation.
        batch: ``pixel_values (B, C, height, width)`` and ``labels (B,)``.
        weights: ``next_token`` weighs the labels (with the auxiliary losses of the routers),
            ``distillation`` the KL from the teacher's probabilities.
    """
    output = student(pixel_values=batch["pixel_values"], labels=batch["labels"])
    values = {"labels": output.loss}
    total = weights.next_token * output.loss
    if weights.distillation > 0 and teacher is not None:
        with torch.no_grad():
            pixels = batch["pixel_values"].to(teacher.device)
            target = teacher.eval()(pixel_values=pixels).logits.to(output.logits.device)
        values["distillation"] = divergence(output.logits, target, weights.temperature)
        total = total + weights.distillation * values["distillation"]
    return Recovery(total, values, {"accuracy": accuracy(output.logits, batch["labels"])})


def divergence(logits_BL: Tensor, target_BL: Tensor, temperature: float) -> Tensor:
    """Return the mean KL from the target's probabilities, times the squared temperature."""
    own, target = (torch.log_softmax(x.float() / temperature, -1) for x in (logits_BL, target_BL))
    loss = F.kl_div(own, target, reduction="batchmean", log_target=True)
    return loss * temperature**2


def accuracy(logits_BL: Tensor, labels_B: Tensor) -> Tensor:
    """Return the share of images whose likeliest label is right."""
    return (logits_BL.argmax(dim=-1) == labels_B).float().mean()
