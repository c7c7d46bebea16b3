"""The terms of the recovery loss as functions of tensors.

B blocks, S tokens per block, V vocabulary, T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def next_token_nll(logits_BSV: Tensor, input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
    """Negative log-likelihood of each next token in nats, shape ``(B, S-1)``; 0 at padding."""
    targets = input_ids_BS[:, 1:]
    nll = F.cross_entropy(
        logits_BSV[:, :-1].float().flatten(0, 1), targets.flatten(), reduction="none"
    ).view_as(targets)
    return nll * attention_mask_BS[:, 1:]


def next_token_loss(logits_BSV: Tensor, input_ids_BS: Tensor, attention_mask_BS: Tensor) -> Tensor:
    """Mean of :func:`next_token_nll` over the predicted tokens that are no padding."""
    nll = next_token_nll(logits_BSV, input_ids_BS, attention_mask_BS)
    return nll.sum() / attention_mask_BS[:, 1:].sum().clamp(min=1)


def logits_distillation_loss(
    student_BSV: Tensor, teacher_BSV: Tensor, attention_mask_BS: Tensor, *, temperature: float
) -> Tensor:
    """KL(teacher || student) in nats per token, times temperature squared (Hinton, 1503.02531).

    Args:
        student_BSV: logits that take the gradient.
        teacher_BSV: logits of the unpruned model on the same tokens.
        attention_mask_BS: 1 where a token counts.
        temperature: both distributions are softened by it; above 0.
    """
    student = F.log_softmax(student_BSV.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_BSV.float() / temperature, dim=-1)
    kl_BS = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)
    mask = attention_mask_BS.to(kl_BS.dtype)
    return (kl_BS * mask).sum() / mask.sum().clamp(min=1) * temperature**2


def load_balancing_loss(probabilities: Sequence[Tensor], top_k: Sequence[int]) -> Tensor:
    """Mean over layers of ``E/k * sum_e load_e * probability_e`` (Switch, 2101.03961, eq. 4).

    ``load_e`` is the share of tokens whose ``k`` most probable experts include ``e``,
    ``probability_e`` its mean router probability; 1 when the load is even. Layers may have
    different numbers of experts. Padding is not left out.

    Args:
        probabilities: per MoE layer, shape ``(T, E)``, rows summing to at most 1.
        top_k: experts per token, per layer.
    """
    losses = []
    for probability_TE, k in zip(probabilities, top_k, strict=True):
        chosen = probability_TE.topk(k, dim=-1).indices
        num_experts = probability_TE.shape[-1]
        load_E = torch.bincount(chosen.flatten(), minlength=num_experts) / chosen.shape[0]
        losses.append(num_experts / k * (load_E * probability_TE.mean(dim=0)).sum())
    return torch.stack(losses).mean()
