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
_DECODER = {"decoder_input_ids", "decoder_attention_mask"}


def held_out_loss(
    model: PreTrainedModel, teacher: PreTrainedModel, batches: Sequence[Batch]
) -> float:
    """Collective: return the mean loss of ``model`` on ``batches``, over all ranks.

    Language models that read and write one text: nats per next token. Others: the divergence
    ``KL(teacher || model)`` of what they predict, per prediction. Padding and idle rows, which keep
    ranks in step, count for nothing.
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
    counted = _counted(batch, divergence.shape)
    total = divergence.cpu()[counted].sum()  # what padding predicts may be NaN
    return torch.stack([total, counted.sum().double()])


def _counted(batch: Batch, shape: torch.Size) -> Tensor:
    """Return 1 for each prediction that counts: on no padding, and in no idle row.

    A mask that does not lie over the predictions (an encoder's over a decoder's) only says which
    rows are idle.
    """
    counted = torch.ones(shape, dtype=torch.bool)
    for name in ("attention_mask", "decoder_attention_mask"):
        mask = batch.get(name)
        if mask is None:
            continue
        mask = mask.bool().cpu()
        over = mask.shape == shape and (name in _DECODER or not _DECODER & set(batch))
        if not over:
            rows = mask.flatten(1).any(dim=1)
            mask = rows.view(-1, *[1] * (len(shape) - 1)).expand(shape)
        counted &= mask
    return counted


def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    logits = getattr(model(**batch), "logits", None)
    if logits is None:
        raise LitMoEError(
            f"{type(model).__name__} has no head, so nothing says how good its predictions are; "
            "give the whole models, for instance those of AutoModelForCausalLM"
        )
    return logits
