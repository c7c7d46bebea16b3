"""How tokens and experts find each other, as functions of tensors.

T tokens, R router rows, K rows per token, B images, S tokens per image, C tokens per expert.
"""

from __future__ import annotations

import torch
from torch import Tensor


def slots_with_room(
    index_TK: Tensor, priority_T: Tensor | None, capacity: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the slots that find room if each row serves ``capacity`` tokens, sorted by row.

    First choices of all tokens take their places before any second choice. Within one rank of
    choice tokens come in their order, or by descending priority (batch-priority routing of V-MoE,
    arXiv 2106.05974, section 4.1).

    Args:
        index_TK: chosen rows, best first.
        priority_T: larger first; equal ones in their order. None for the order of the tokens.
        capacity: tokens that one row serves; None for all.

    Returns:
        Tokens, their ranks of choice, and rows, each ``(slots,)``.

    >>> slots_with_room(torch.tensor([[0], [0], [1]]), torch.tensor([0.1, 0.9, 0.5]), 1)
    (tensor([1, 2]), tensor([0, 0]), tensor([0, 1]))
    """
    num_tokens, order_T = len(index_TK), None
    if priority_T is not None:
        order_T = torch.argsort(priority_T, descending=True, stable=True)
        index_TK = index_TK.index_select(0, order_T)
    rows_S, places_S = torch.sort(index_TK.T.reshape(-1), stable=True)
    if capacity is not None:
        first_S = torch.searchsorted(rows_S, rows_S)
        has_room = torch.arange(len(rows_S), device=rows_S.device) - first_S < capacity
        rows_S, places_S = rows_S.masked_select(has_room), places_S.masked_select(has_room)
    tokens_S = places_S % num_tokens
    if order_T is not None:
        tokens_S = order_T.index_select(0, tokens_S)
    return tokens_S, places_S // num_tokens, rows_S


def places_with_room(
    index_TK: Tensor, priority_T: Tensor | None, capacity: int, num_experts: int, num_rows: int
) -> tuple[Tensor, Tensor]:
    """Return who gets which of the ``E * capacity`` places of the experts.

    The same slots find room as in :func:`slots_with_room`, in the same order. Quicker for a few
    rows: turns are counted, not sorted.

    Args:
        index_TK: chosen rows, best first, up to ``num_rows``; from E on they have no expert.
        priority_T: larger first; equal ones in their order. None for the order of the tokens.
        capacity: tokens that one row serves, C.
        num_experts: E, of the first rows.
        num_rows: R.

    Returns:
        The token at each place, shape ``(E * C + 1,)``, any where a place stays free. The place of
        each slot, shape ``(K, T)``: from ``e * C`` on those of expert e, ``E * C`` for none.

    >>> places_with_room(torch.tensor([[0], [0], [1]]), torch.tensor([0.1, 0.9, 0.5]), 1, 2, 2)
    (tensor([1, 2, 0]), tensor([[2, 0, 1]]))
    """
    (num_tokens, top_k), device, nowhere = index_TK.shape, index_TK.device, num_experts * capacity
    if priority_T is None:
        order_T = torch.arange(num_tokens, device=device)
    else:
        order_T = torch.argsort(priority_T, descending=True, stable=True)
    rows_S = index_TK.index_select(0, order_T).T.reshape(-1)
    is_row_RS = rows_S == torch.arange(num_rows + 1, device=device)[:, None]
    turn_S = is_row_RS.cumsum(dim=1, dtype=torch.int32).gather(0, rows_S[None])[0]
    place_S = torch.add(turn_S - 1, rows_S, alpha=capacity)
    place_S = torch.where(turn_S <= capacity, place_S, nowhere).clamp_(max=nowhere)
    token_S = order_T if top_k == 1 else order_T.repeat(top_k)
    token_P = order_T.new_zeros(nowhere + 1).scatter_(0, place_S, token_S)
    place_KT = place_S.view(top_k, num_tokens)
    order_KT = order_T.expand(top_k, num_tokens)
    return token_P, torch.empty_like(place_KT).scatter_(1, order_KT, place_KT)


def best_rows(probability_RT: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the largest probabilities of each token and their rows, ``(T, K)``, best first.

    Of equal ones any row may be chosen, with one row per token the first.
    """
    if top_k > 1:
        return torch.topk(probability_RT.T, top_k, dim=-1)
    gate_T, row_T = probability_RT.max(dim=0)  # several times quicker
    return gate_T[:, None], row_T[:, None]


def capacity_of(num_slots: int, num_rows: int, factor: float) -> int:
    """Return the tokens that one row serves: its equal share of the slots times ``factor``."""
    return max(round(num_slots * factor / max(num_rows, 1)), 1)


def owners(num_rows: int, num_experts: int, num_members: int, device: torch.device) -> Tensor:
    """Return the member of the ensemble that each router row belongs to, shape ``(R,)``.

    Rows of experts come first, in equal blocks by member, then those without expert likewise.
    """
    tail = num_rows - num_experts
    parts = [
        torch.arange(count, device=device) * num_members // max(count, 1)
        for count in (num_experts, tail)
    ]
    return torch.cat(parts)


def only_own_rows(logits_TR: Tensor, num_experts: int, num_members: int) -> Tensor:
    """Return logits that are -inf for the rows of other members.

    Args:
        logits_TR: the tokens of the first member, then those of the second, and so on.
        num_experts: rows that have an expert.
        num_members: members of the ensemble.
    """
    num_tokens, num_rows = logits_TR.shape
    own_R = owners(num_rows, num_experts, num_members, logits_TR.device)
    member_T = torch.arange(num_tokens, device=logits_TR.device) * num_members // num_tokens
    return logits_TR.masked_fill(member_T[:, None] != own_R, -torch.inf)


def choose_tokens(logits_BSR: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Let every row choose the tokens with its largest logits in every image.

    Gates are a softmax over the tokens that a row chose (arXiv 2405.16646), so that no row depends
    on any other.

    Args:
        logits_BSR: by image and token.
        count: tokens that a row chooses in each image, at most S.

    Returns:
        Gates, rows and tokens (of the flattened batch), each ``(R * B * count,)``, sorted by row.
    """
    num_images, length, num_rows = logits_BSR.shape
    top_BCR, token_BCR = logits_BSR.topk(min(count, length), dim=1)
    gates_BCR = torch.softmax(top_BCR, dim=1)
    first_B = torch.arange(num_images, device=logits_BSR.device) * length
    rows_BCR = torch.arange(num_rows, device=logits_BSR.device).expand_as(token_BCR)
    tokens_BCR = token_BCR + first_B[:, None, None]
    gates, rows, tokens = (x.permute(2, 0, 1) for x in (gates_BCR, rows_BCR, tokens_BCR))
    return gates.reshape(-1), rows.reshape(-1), tokens.reshape(-1)


def squared_variation(total_R: Tensor) -> Tensor:
    """Return the squared coefficient of variation, 0 if all are equal.

    >>> squared_variation(torch.tensor([1.0, 3.0])).item()
    0.25
    """
    return total_R.var(unbiased=False) / total_R.mean().clamp(min=1e-20).square()


def importance_loss(logits_TR: Tensor) -> Tensor:
    """Return how unequal the summed probabilities of the rows are (V-MoE, appendix A)."""
    return squared_variation(torch.softmax(logits_TR, dim=-1).sum(dim=0))


def load_loss(logits_TR: Tensor, noisy_TR: Tensor, top_k: int, deviation: float) -> Tensor:
    """Return how unequal the rows' chances to be chosen under new noise are (V-MoE, appendix A).

    Args:
        logits_TR: without noise.
        noisy_TR: with the noise that the choice was made with.
        top_k: rows per token.
        deviation: standard deviation of the noise, above 0.
    """
    threshold_T1 = noisy_TR.topk(top_k, dim=-1).values[:, -1:]
    chance_TR = torch.special.ndtr((logits_TR - threshold_T1) / deviation)
    return squared_variation(chance_TR.sum(dim=0))
