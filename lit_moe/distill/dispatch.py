"""Experts seen with one row per (token, expert) pair: those that routing chose, and others beside.

T tokens, K experts per token, H hidden, E experts, R rows: T x K for the chosen pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
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
    """Some of the rows of one call of one experts module, in any order.

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
OnRows = Callable[[Sequence[Rows]], None]
"""What takes the chosen rows of a call, and those asked for if there are any."""


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
    """Report the raw outputs of the experts of one layer inside the block, with their gradients.

    The layer's output stays the same. Fused experts of transformers are read where they hold their
    raw outputs anyway, and called a second time for what is asked beside; others are called with
    one row per pair.

    Args:
        model: of a family that :func:`check_dispatch` lets pass.
        site: the MoE layer.
        asked: which pairs to run beside those that routing chose; None for none.
        on_rows: called once per call of the experts.
    """
    adapter, experts = adapter_for(model.config), model.get_submodule(site.experts)
    call = _Call(adapter, site, experts.forward, asked, on_rows)
    with ExitStack() as stack:
        forward = call.by_rows
        if site.registered and is_fused(experts):
            stack.enter_context(slots_of(experts, call.remember))
            forward = call.as_ever
        # The instance dictionary wins over the class; hooks of the module still run around it.
        experts.__dict__["forward"] = forward
        stack.callback(experts.__dict__.pop, "forward")
        yield


class _Call:
    """Calls of one experts module, one after another."""

    def __init__(
        self,
        adapter: MoEAdapter,
        site: MoESite,
        forward: Callable[..., Tensor],
        asked: Asked | None,
        on_rows: OnRows,
    ) -> None:
        self._adapter, self._site, self._forward = adapter, site, forward
        self._asked, self._on_rows = asked, on_rows
        self._slots: list[Slots] = []

    def remember(self, slots: Slots) -> None:
        """Keep what a fused forward holds, until it is over."""
        self._slots.append(slots)

    def as_ever(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Run a fused forward, then what is asked beside it."""
        output = self._forward(*args, **kwargs)
        index_TK, weights_TK = routing_of(args, kwargs)
        hidden_TH = _hidden(args, kwargs).reshape(len(index_TK), -1)
        slots = self._slots.pop()
        pairs = self._pairs(slots.expert_ids, slots.token_ids, slots.gates, len(index_TK))
        self._report(Rows(pairs, hidden_TH, slots.outputs), weights_TK.dtype)
        return output

    def by_rows(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """Run any forward with one row per pair, then weigh and add up as it would have."""
        hidden, (index_TK, weights_TK) = _hidden(args, kwargs), routing_of(args, kwargs)
        num_tokens, num_slots = index_TK.shape
        hidden_TH = hidden.reshape(num_tokens, -1)
        ids, gates = index_TK.reshape(-1), weights_TK.reshape(-1)
        inputs_RH = hidden_TH[:, None].expand(-1, num_slots, -1).reshape(ids.numel(), -1)
        outputs_RH = run_rows(self._adapter, self._forward, inputs_RH, ids, weights_TK.dtype)
        tokens = torch.arange(num_tokens, device=ids.device).repeat_interleave(num_slots)
        pairs = self._pairs(ids, tokens, gates, num_tokens)
        self._report(Rows(pairs, hidden_TH, outputs_RH), weights_TK.dtype)
        chosen_TKH = (outputs_RH * gates[:, None]).view(num_tokens, num_slots, -1)
        return chosen_TKH.sum(dim=1).to(hidden.dtype).view(hidden.shape)

    def _pairs(self, ids: Tensor, tokens: Tensor, gates: Tensor, num_tokens: int) -> Pairs:
        real = self._adapter.is_real_slot(self._site, ids, gates)
        return Pairs(ids, tokens, real, num_tokens)

    def _report(self, chosen: Rows, dtype: torch.dtype) -> None:
        """Run what is asked beside the chosen rows, and tell of both."""
        reported = [chosen]
        if self._asked is not None:
            ids, tokens = self._asked(chosen.pairs)
            if len(ids):
                inputs_RH = chosen.hidden.index_select(0, tokens)
                outputs_RH = run_rows(self._adapter, self._forward, inputs_RH, ids, dtype)
                real = torch.ones_like(tokens, dtype=torch.bool)
                pairs = Pairs(ids, tokens, real, chosen.pairs.num_tokens)
                reported.append(Rows(pairs, chosen.hidden, outputs_RH))
        self._on_rows(reported)


def _hidden(args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


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
