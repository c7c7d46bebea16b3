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


def next_token_loss(
    logits_BSV: Tensor,
    input_ids_BS: Tensor,
    attention_mask_BS: Tensor,
    *,
    num_tokens: Tensor | None = None,
) -> Tensor:
    """Mean of :func:`next_token_nll` over the predicted tokens that are no padding.

    Args:
        logits_BSV: of the model.
        input_ids_BS: the tokens, each predicted from those before it.
        attention_mask_BS: 1 where a token counts.
        num_tokens: what to divide the sum by; None for the predicted tokens that count.
    """
    nll = next_token_nll(logits_BSV, input_ids_BS, attention_mask_BS)
    return nll.sum() / _or_sum(num_tokens, attention_mask_BS[:, 1:]).clamp(min=1)


def logits_distillation_loss(
    student_BSV: Tensor,
    teacher_BSV: Tensor,
    attention_mask_BS: Tensor,
    *,
    temperature: float,
    num_tokens: Tensor | None = None,
) -> Tensor:
    """KL(teacher || student) in nats per token, times temperature squared (Hinton, 1503.02531).

    Args:
        student_BSV: logits that take the gradient.
        teacher_BSV: logits of the unpruned model on the same tokens.
        attention_mask_BS: 1 where a token counts.
        temperature: both distributions are softened by it; above 0.
        num_tokens: what to divide the sum by; None for the tokens that count.
    """
    student = F.log_softmax(student_BSV.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_BSV.float() / temperature, dim=-1)
    kl_BS = F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=-1)
    mask = attention_mask_BS.to(kl_BS.dtype)
    return (kl_BS * mask).sum() / _or_sum(num_tokens, mask).clamp(min=1) * temperature**2


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


def router_distillation_loss(student_TE: Tensor, teacher_TE: Tensor, mask_T: Tensor) -> Tensor:
    """KL(teacher || student) in nats per token between distributions over the same experts.

    Both are divided by their sum first: scores of sigmoid routers, and what a softmax over more
    experts leaves to these, become distributions.

    Args:
        student_TE: probabilities or scores that take the gradient, at least 0.
        teacher_TE: those of the unpruned model for the same tokens and experts.
        mask_T: 1 where a token counts.
    """
    student, teacher = (_log_share(p_TE) for p_TE in (student_TE, teacher_TE))
    kl_T = (teacher.exp() * (teacher - student)).sum(dim=-1)
    mask = mask_T.to(kl_T.dtype)
    return (kl_T * mask).sum() / mask.sum().clamp(min=1)


def _log_share(score_TE: Tensor) -> Tensor:
    score_TE = score_TE.float().clamp(min=torch.finfo(torch.float32).tiny)
    return score_TE.log() - score_TE.sum(dim=-1, keepdim=True).log()


def _or_sum(given: Tensor | None, mask: Tensor) -> Tensor:
    return mask.sum() if given is None else given
