"""Experts run with one row per (token, expert) pair: those that routing chose, and others beside.

T tokens, K experts per token, H hidden, E experts, R rows: the T x K chosen pairs first, in their
order, then those asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.adapters import MoEAdapter, MoESite, adapter_for
from lit_moe.errors import UnsupportedModelError
from lit_moe.stats.slots import Slots, is_fused, routing_of, slots_of


@dataclass(frozen=True)
class Pairs:
    """Tokens and the experts that they go to.

    Attributes:
        expert_ids: shape ``(R,)``.
        token_ids: which token of the flattened batch, shape ``(R,)``.
        real: False where no routed expert serves the pair, shape ``(R,)``.
        num_tokens: T.
    """

    expert_ids: Tensor
    token_ids: Tensor
    real: Tensor
    num_tokens: int


@dataclass(frozen=True)
class Rows:
    """One call of one experts module.

    Attributes:
        pairs: what each row is.
        hidden: what the experts were given, shape ``(T, H)``.
        outputs: raw expert outputs, not weighted, shape ``(R, H)``.
    """

    pairs: Pairs
    hidden: Tensor
    outputs: Tensor


Asked = Callable[[Pairs], tuple[Tensor, Tensor]]
"""From the chosen pairs of a call to further ``expert_ids`` and ``token_ids``."""
OnRows = Callable[[Rows], None]
OnAnswers = Callable[[Pairs, Tensor], None]
"""What takes pairs and their raw outputs, shape ``(R, H)``."""


def check_dispatch(model: PreTrainedModel) -> None:
    """Refuse a model whose experts cannot be handed any token.

    Raises:
        UnsupportedModelError: naming the family.
    """
    adapter = adapter_for(model.config)
    if type(adapter).attach_slots is not MoEAdapter.attach_slots:
        raise UnsupportedModelError(
            f"loss.experts compares experts on tokens of its own choice, but {type(model).__name__}"
            f" ({model.config.model_type}) has no experts module that takes tokens, experts and "
            "weights; take loss.distillation or loss.router instead"
        )


@contextmanager
def dispatched(
    model: PreTrainedModel, site: MoESite, asked: Asked | None, on_rows: OnRows
) -> Iterator[None]:
    """Run the experts of one layer row by row inside the block; the layer's output stays the same.

    All rows go through the model's own implementation in one call, so gradients flow as ever.

    Args:
        model: of a family that :func:`check_dispatch` lets pass.
        site: the MoE layer.
        asked: which pairs to run beside those that routing chose; None for none.
        on_rows: called once per call of the experts.
    """
    adapter, experts = adapter_for(model.config), model.get_submodule(site.experts)
    forward = experts.forward

    def by_rows(*args: Tensor, **kwargs: Tensor) -> Tensor:
        hidden = args[0] if args else kwargs["hidden_states"]
        index_TK, weights_TK = routing_of(args, kwargs)
        num_tokens, num_slots = index_TK.shape
        hidden_TH = hidden.reshape(num_tokens, -1)
        pairs, inputs_RH = _with_asked(adapter, site, (index_TK, weights_TK), hidden_TH, asked)
        outputs_RH = run_rows(adapter, forward, inputs_RH, pairs.expert_ids, weights_TK.dtype)
        on_rows(Rows(pairs, hidden_TH, outputs_RH))
        num_chosen = num_tokens * num_slots
        chosen = outputs_RH if len(outputs_RH) == num_chosen else outputs_RH[:num_chosen]
        chosen = chosen * weights_TK.reshape(-1, 1)
        summed = chosen.view(num_tokens, num_slots, -1).sum(dim=1)
        return summed.to(hidden.dtype).view(hidden.shape)

    # The instance dictionary wins over the class; hooks of the module still run around it.
    experts.__dict__["forward"] = by_rows
    try:
        yield
    finally:
        del experts.__dict__["forward"]


@contextmanager
def observed(
    model: PreTrainedModel, site: MoESite, asked: Asked | None, on_answers: OnAnswers
) -> Iterator[None]:
    """Report what the experts of one layer say inside the block, where they say it anyway.

    Args:
        model: of a family that :func:`check_dispatch` lets pass; takes no gradient.
        site: the MoE layer.
        asked: which pairs to run beside those that routing chose; None for none.
        on_answers: called once per call of the experts.
    """
    experts = model.get_submodule(site.experts)
    if asked is None and site.registered and is_fused(experts):

        def on_slots(slots: Slots) -> None:
            real = slots.expert_ids < site.num_experts
            num_tokens = slots.expert_ids.numel() // site.top_k
            on_answers(Pairs(slots.expert_ids, slots.token_ids, real, num_tokens), slots.outputs)

        with slots_of(experts, on_slots):
            yield
        return
    with dispatched(model, site, asked, lambda rows: on_answers(rows.pairs, rows.outputs)):
        yield


def run_rows(
    adapter: MoEAdapter,
    experts: Callable[..., Tensor],
    inputs_RH: Tensor,
    expert_ids: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Return the raw output of one expert for each row, shape ``(R, H)``.

    Args:
        adapter: of the family.
        experts: module or its forward.
        inputs_RH: one token per row.
        expert_ids: shape ``(R,)``.
        dtype: of the routing weights.
    """
    index = expert_ids[:, None]
    weights = torch.ones(index.shape, dtype=dtype, device=index.device)
    if adapter.needs_two_slots:
        index = index.expand(-1, 2)
        weights = torch.cat([weights, torch.zeros_like(weights)], dim=1)
    return experts(inputs_RH, index, weights).reshape(inputs_RH.shape[0], -1)


def _with_asked(
    adapter: MoEAdapter,
    site: MoESite,
    routing: tuple[Tensor, Tensor],
    hidden_TH: Tensor,
    asked: Asked | None,
) -> tuple[Pairs, Tensor]:
    """Return all pairs of a call and the hidden state of each, shape ``(R, H)``."""
    index_TK, weights_TK = routing
    num_tokens, num_slots = index_TK.shape
    ids = index_TK.reshape(-1)
    tokens = torch.arange(num_tokens, device=ids.device).repeat_interleave(num_slots)
    pairs = Pairs(ids, tokens, adapter.is_real_slot(site, ids, weights_TK.reshape(-1)), num_tokens)
    inputs_RH = hidden_TH[:, None].expand(-1, num_slots, -1).reshape(ids.numel(), -1)
    if asked is None:
        return pairs, inputs_RH
    more_ids, more_tokens = asked(pairs)
    joined = Pairs(
        torch.cat([ids, more_ids.to(ids.dtype)]),
        torch.cat([tokens, more_tokens]),
        torch.cat([pairs.real, torch.ones_like(more_tokens, dtype=torch.bool)]),
        num_tokens,
    )
    return joined, torch.cat([inputs_RH, hidden_TH.index_select(0, more_tokens)])
