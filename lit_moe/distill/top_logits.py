"""The teacher's likeliest next tokens instead of its whole distribution.

B blocks, S tokens per block, V vocabulary, K tokens that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class TopLogits:
    """The largest logits at each position, as they are kept on disk too.

    Attributes:
        values: less the largest one, so that float16 is most exact where it matters; descending,
            shape ``(B, S, K)``, float16.
        ids: of the tokens, shape ``(B, S, K)``, int32.
    """

    values: Tensor
    ids: Tensor


def top_logits(logits_BSV: Tensor, top_k: int) -> TopLogits:
    """Return the ``top_k`` largest logits at each position, K of them, without gradient."""
    values, ids = logits_BSV.detach().float().topk(top_k, dim=-1)
    return TopLogits((values - values[..., :1]).half(), ids.int())


def top_logits_loss(
    student_BSV: Tensor,
    teacher: TopLogits,
    attention_mask_BS: Tensor,
    *,
    temperature: float,
    num_tokens: Tensor | None = None,
) -> Tensor:
    """KL(teacher || student) in nats per token, times temperature squared.

    The teacher's distribution is its ``K`` likeliest tokens, made to sum to 1; the student's is the
    whole one, so that what it gives to other tokens costs.

    Args:
        student_BSV: logits that take the gradient.
        teacher: of the unpruned model on the same tokens.
        attention_mask_BS: 1 where a token counts.
        temperature: both distributions are softened by it; above 0.
        num_tokens: what to divide the sum by; None for the tokens that count.
    """
    student_BSV = F.log_softmax(student_BSV.float() / temperature, dim=-1)
    student_BSK = student_BSV.gather(-1, teacher.ids.long())
    teacher_BSK = F.log_softmax(teacher.values.float() / temperature, dim=-1)
    kl_BS = F.kl_div(student_BSK, teacher_BSK, reduction="none", log_target=True).sum(dim=-1)
    mask = attention_mask_BS.to(kl_BS.dtype)
    count = mask.sum() if num_tokens is None else num_tokens
    return (kl_BS * mask).sum() / count.clamp(min=1) * temperature**2
