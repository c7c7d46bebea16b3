"""Whether a refit as a whole did good: the loss on rows that were not fitted on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from lit_moe.distill.losses import next_token_nll
from lit_moe.errors import LitMoEError
from lit_moe.inference import evaluating
from lit_moe.refit.collective import all_sum

Batch = Mapping[str, Tensor]


def held_out_loss(
    model: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Batch]
) -> float:
    """Collective: return the mean loss of ``model`` on ``batches``, over all ranks.

    Language models that read and write one text: nats per next token. Others: the divergence
    ``KL(teacher || model)`` of what they predict, per prediction.
    """
    total = torch.zeros(2, dtype=torch.float64)
    with evaluating(model), evaluating(teacher):
        for batch in batches:
            for row in range(len(next(iter(batch.values())))):
                one = {k: v[row : row + 1] for k, v in batch.items()}
                total += (
                    _next_token(model, one) if _is_text(model, one) else _gap(model, teacher, one)
                )
    total = all_sum(total)
    return float(total[0] / total[1].clamp(min=1))


def _is_text(model: PreTrainedModel, batch: Batch) -> bool:
    reads_text_only = set(batch) <= {"input_ids", "attention_mask"}
    return reads_text_only and model.can_generate() and not model.config.is_encoder_decoder


def _next_token(model: PreTrainedModel, batch: Batch) -> Tensor:
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    nll = next_token_nll(_logits(model, batch), batch["input_ids"], mask)
    count = mask[:, 1:].sum()
    return torch.stack([nll.double().sum().cpu(), count.double().cpu()])


def _gap(model: PreTrainedModel, teacher: PreTrainedModel, batch: Batch) -> Tensor:
    ours = F.log_softmax(_logits(model, batch).double(), -1)
    theirs = F.log_softmax(_logits(teacher, batch).double(), -1)
    divergence = (theirs.exp() * (theirs - ours)).sum(-1)
    return torch.stack([divergence.sum().cpu(), torch.tensor(float(divergence.numel())).double()])


def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    logits = getattr(model(**batch), "logits", None)
    if logits is None:
        raise LitMoEError(
            f"{type(model).__name__} has no head, so nothing says how good its predictions are; "
            "give the whole models, for instance those of AutoModelForCausalLM"
        )
    return logits
