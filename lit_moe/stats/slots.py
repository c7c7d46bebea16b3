"""One expert call seen from inside: which token went to which expert, and what came out.

T tokens, K experts per token, S = T x K slots (token and chosen expert), H hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Slots:
    """The slots of one call of one experts module, in any order.

    Attributes:
        expert_ids: shape ``(S,)``.
        gates: the weight that the model gives each slot, shape ``(S,)``.
        outputs: raw expert outputs, not yet weighted, shape ``(S, H)``.
        token_ids: which token of the flattened batch, shape ``(S,)``.
    """

    expert_ids: Tensor
    gates: Tensor
    outputs: Tensor
    token_ids: Tensor

    def sorted_by_expert(self, counted_S: Tensor) -> Slots:
        """Return the slots for which ``counted_S`` is True, in the order of their experts.

        No copy if that is all of them as they are.
        """
        rising = bool((self.expert_ids[1:] >= self.expert_ids[:-1]).all())
        if rising and bool(counted_S.all()):
            return self
        rows = counted_S.nonzero().flatten()
        rows = rows[torch.argsort(self.expert_ids[rows], stable=True)]
        return Slots(
            self.expert_ids[rows], self.gates[rows], self.outputs[rows], self.token_ids[rows]
        )


OnSlots = Callable[[Slots], None]


@contextmanager
def slots_of(experts: nn.Module, on_slots: OnSlots) -> Iterator[None]:
    """Call ``on_slots`` once per forward of an experts module with the three-argument contract.

    ``experts(hidden (T, H), top_k_index (T, K), top_k_weights (T, K)) -> (T, H)``; its result is
    what it was. The fused implementations of transformers are read where they hold the raw output
    anyway; any other forward is called with one slot per row and unit weights.
    """
    with _inside_fused(experts, on_slots) if is_fused(experts) else _unrolled(experts, on_slots):
        yield


def is_fused(experts: nn.Module) -> bool:
    """Whether these experts run in a fused implementation of transformers that can be read."""
    implementation = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    return hasattr(experts, "has_post_expert_norm") and implementation in (
        "grouped_mm",
        "batched_mm",
    )


@contextmanager
def _inside_fused(experts: nn.Module, on_slots: OnSlots) -> Iterator[None]:
    """Stand where a norm of each expert's output would: it is handed the raw slot outputs."""
    had_norm = experts.has_post_expert_norm
    norm: Any = experts.post_expert_norm if had_norm else None
    routing: list[tuple[Tensor, Tensor]] = []

    def remember(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        routing[:] = [routing_of(args, kwargs)]

    def look(outputs_SH: Tensor) -> Tensor:
        outputs_SH = norm(outputs_SH) if had_norm else outputs_SH
        if not routing:  # someone called the forward past the hooks
            return outputs_SH
        index_TK, weights_TK = routing.pop()
        on_slots(in_order_of(experts, index_TK, weights_TK, outputs_SH))
        return outputs_SH

    hook = experts.register_forward_pre_hook(remember, with_kwargs=True)
    # The instance dictionary wins over modules and class attributes of the same name.
    experts.__dict__["post_expert_norm"] = look
    experts.__dict__["has_post_expert_norm"] = True
    try:
        yield
    finally:
        hook.remove()
        del experts.__dict__["post_expert_norm"]
        experts.__dict__["has_post_expert_norm"] = had_norm


def in_order_of(
    experts: nn.Module, index_TK: Tensor, weights_TK: Tensor, outputs_SH: Tensor
) -> Slots:
    """Pair rows with their slots: grouped_mm sorts slots by expert, batched_mm does not."""
    expert_ids, gates = index_TK.reshape(-1), weights_TK.reshape(-1)
    order = torch.arange(expert_ids.numel(), device=expert_ids.device)
    if experts.config._experts_implementation == "grouped_mm":  # type: ignore[union-attr]
        expert_ids, order = torch.sort(expert_ids)
        gates = gates[order]
    return Slots(expert_ids, gates, outputs_SH, order // index_TK.shape[-1])


@contextmanager
def _unrolled(experts: nn.Module, on_slots: OnSlots) -> Iterator[None]:
    forward = experts.forward
    had_own = "forward" in experts.__dict__

    def unrolled(*args: Tensor, **kwargs: Tensor) -> Tensor:
        hidden_TH = args[0] if args else kwargs["hidden_states"]
        index_TK, weights_TK = routing_of(args, kwargs)
        num_slots = index_TK.shape[-1]
        rows_SH = hidden_TH.repeat_interleave(num_slots, dim=0)
        outputs_SH = raw_outputs(forward, rows_SH, index_TK.reshape(-1), weights_TK.dtype)
        gates = weights_TK.reshape(-1)
        tokens = torch.arange(gates.numel(), device=gates.device) // num_slots
        on_slots(Slots(index_TK.reshape(-1), gates, outputs_SH, tokens))
        weighted = (outputs_SH * gates[:, None]).view(-1, num_slots, hidden_TH.shape[-1])
        return weighted.sum(dim=1).to(hidden_TH.dtype)

    experts.__dict__["forward"] = unrolled
    try:
        yield
    finally:
        if had_own:
            experts.__dict__["forward"] = forward
        else:
            del experts.__dict__["forward"]


def raw_outputs(
    forward: Callable[..., Tensor], rows_SH: Tensor, expert_ids: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return ``f_e(x)`` for each row and its expert, shape ``(S, H)``.

    Args:
        forward: of an experts module with the three-argument contract.
        rows_SH: one input row per slot.
        expert_ids: one expert per row, shape ``(S,)``.
        dtype: of the routing weights.
    """
    index = expert_ids[:, None]
    ones = torch.ones(index.shape, dtype=dtype, device=rows_SH.device)
    return forward(rows_SH, index, ones)


def routing_of(args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return ``top_k_index (T, K)`` and ``top_k_weights (T, K)`` of a call of an experts module."""
    values = [*args[1:3]]
    if len(values) < 2:
        values += [kwargs[name] for name in ("top_k_index", "top_k_weights")[len(values) :]]
    return values[0], values[1]
