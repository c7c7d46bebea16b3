"""Run one MoE block again and again on the inputs it saw, without paying for its experts.

A block's inputs are captured once from a forward of the whole model. Replaying the block runs its
own code, router included; only the experts module is answered from a table of what every expert
says about every token, so that another routing costs a gather instead of matrix products.

T tokens, K experts per token, E experts, H hidden.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_moe.adapters.site import MoESite
from lit_moe.errors import LitMoEError
from lit_moe.inference import evaluating
from lit_moe.stats.slots import raw_outputs
from lit_moe.stats.tap import TokenMask

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class BlockCall:
    """One call of one block, as the model made it.

    Attributes:
        args: positional arguments.
        kwargs: keyword arguments, without key-value caches.
        valid: which of the flattened tokens are no padding, shape ``(T,)``; None if all are.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    valid: Tensor | None

    def run(self, block: nn.Module) -> Tensor:
        """Return the block's output on the tokens that are no padding, shape ``(T, H)``."""
        output = block(*self.args, **self.kwargs)
        hidden = output if isinstance(output, Tensor) else output[0]
        hidden = hidden.reshape(-1, hidden.shape[-1])
        return hidden if self.valid is None else hidden[self.valid]


@torch.no_grad()
def capture_calls(
    model: PreTrainedModel, sites: Iterable[MoESite], batches: Iterable[Batch]
) -> dict[str, list[BlockCall]]:
    """Return layer name -> the calls of its block while ``model`` runs over ``batches``.

    Holds the inputs of all blocks at once: layers x tokens x hidden numbers.
    """
    mask = TokenMask()
    calls: dict[str, list[BlockCall]] = {site.name: [] for site in sites}

    def recorder(site: MoESite) -> Callable[[nn.Module, Any, Any], None]:
        def record(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            plain = {k: v for k, v in kwargs.items() if not k.startswith("past_key_value")}
            calls[site.name].append(BlockCall(args, plain, mask.of(site)))

        return record

    hooks = [
        model.get_submodule(site.name).register_forward_pre_hook(recorder(site), with_kwargs=True)
        for site in sites
    ]
    accepted = inspect.signature(model.base_model.forward).parameters
    try:
        with evaluating(model):
            for batch in batches:
                inputs = {k: v.to(model.device) for k, v in batch.items() if k in accepted}
                mask.set(inputs)
                model.base_model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def small_batches(
    batches: Iterable[Batch], *, max_tokens: int, tokens_per_call: int
) -> Iterator[dict[str, Tensor]]:
    """Yield the first ``max_tokens`` tokens, in whole rows, at most ``tokens_per_call`` at a time.

    Padding counts as tokens here, so that memory stays bounded.

    Raises:
        LitMoEError: if a single row is longer than ``tokens_per_call``, there is no batch, or a
            batch has no ``input_ids``.
    """
    left = max_tokens
    for batch in batches:
        num_rows, length = _rows_and_length(batch)
        if length > tokens_per_call:
            raise LitMoEError(
                f"a calibration row has {length} tokens, but the outputs of all experts for only "
                f"{tokens_per_call} fit into cache_gib: use shorter rows or raise it"
            )
        start = 0
        while start < num_rows and left > 0:
            rows = min(tokens_per_call // length, -(-left // length), num_rows - start)
            yield _rows(batch, start, start + rows)
            start, left = start + rows, left - rows * length
        if left <= 0:
            return
    if left == max_tokens:
        raise LitMoEError("there is no calibration batch to run the model on; give at least one")


@contextmanager
def cached_experts(experts: nn.Module, num_experts: int) -> Iterator[None]:
    """Answer ``experts(hidden, ids, weights)`` from a table while the context lasts.

    The first call fills the table with the raw output of every expert on every token,
    ``(E, T, H)``; all later calls must come with the same hidden states, which is what replaying a
    :class:`BlockCall` under another routing does.

    Args:
        experts: module of transformers' experts contract.
        num_experts: experts that a router can choose.
    """
    forward = experts.forward
    had_own = "forward" in vars(experts)
    table: list[Tensor] = []

    def lookup(hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        if not table:
            table.append(_all_outputs(forward, hidden_states, top_k_weights.dtype, num_experts))
        return combine(table[0], top_k_index, top_k_weights).to(hidden_states.dtype)

    # The instance dictionary wins over the method of the class.
    vars(experts)["forward"] = lookup
    try:
        yield
    finally:
        if had_own:
            vars(experts)["forward"] = forward
        else:
            del vars(experts)["forward"]


def combine(outputs_ETH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Return the weighted sum of the chosen experts' outputs, shape ``(T, H)``.

    >>> outputs = torch.tensor([[[1.0]], [[10.0]]])
    >>> combine(outputs, torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.25]]))
    tensor([[3.]])
    """
    tokens = torch.arange(len(ids_TK), device=ids_TK.device)
    slots = zip(ids_TK.unbind(1), weights_TK.unbind(1), strict=True)
    terms = [outputs_ETH[ids, tokens] * weights[:, None] for ids, weights in slots]
    return torch.stack(terms).sum(dim=0)


def _all_outputs(
    forward: Callable[..., Tensor], hidden_TH: Tensor, dtype: torch.dtype, num_experts: int
) -> Tensor:
    ids = torch.zeros(len(hidden_TH), dtype=torch.long, device=hidden_TH.device)
    each = [raw_outputs(forward, hidden_TH, ids + e, dtype) for e in range(num_experts)]
    return torch.stack(each)


def _rows_and_length(batch: Batch) -> tuple[int, int]:
    ids = [batch[key] for key in ("input_ids", "decoder_input_ids") if key in batch]
    if not ids:
        raise LitMoEError(f"a calibration batch needs 'input_ids'; it has {sorted(batch)}")
    return len(ids[0]), max(x.shape[1] for x in ids)


def _rows(batch: Batch, start: int, stop: int) -> dict[str, Tensor]:
    return {key: value[start:stop] for key, value in batch.items() if isinstance(value, Tensor)}
