"""Which experts serve the tokens of a pass of gradients, whether these are predicted or not.

T tokens, K experts per token, S slots (token and chosen expert), E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_moe.adapters import adapter_for
from lit_moe.adapters.base import MoEAdapter
from lit_moe.adapters.site import MoESite
from lit_moe.adapters.taps import Handle
from lit_moe.stats.slots import routing_of
from lit_moe.stats.tap import TokenMask


class RoutedTokens:
    """Counts the tokens that each expert is sent, and those of the batches.

    Nothing is computed a second time: routing is read on its way into the experts, or, where they
    have no module that takes it, where the family's own observation reads it.

    Args:
        model: the model that will run.
        sites: its MoE layers.

    Attributes:
        count: layer name -> tokens routed to each expert, shape ``(E,)``, float64.
        tokens: tokens of the batches, padding excluded, shape ``()``, float64; of a model with
            an encoder those of the longer of both sides.
    """

    def __init__(self, model: PreTrainedModel, sites: Sequence[MoESite]) -> None:
        self._model, self._sites, self._mask = model, sites, TokenMask()
        self.count = {
            site.name: torch.zeros(site.num_experts, dtype=torch.float64, device=model.device)
            for site in sites
        }
        self.tokens = torch.zeros((), dtype=torch.float64, device=model.device)

    def begin(self, inputs: Mapping[str, Tensor]) -> None:
        """Take note of the batch that the model is going to be given."""
        self._mask.set(inputs)
        self.tokens += max(_real_tokens(inputs, prefix) for prefix in ("", "decoder_"))

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what the model does inside the block."""
        adapter = adapter_for(self._model.config)
        with ExitStack() as stack:
            for site in self._sites:
                stack.callback(self._attach(adapter, site).remove)
            yield

    def _attach(self, adapter: MoEAdapter, site: MoESite) -> Handle:
        has_own_way = type(adapter).attach_slots is not MoEAdapter.attach_slots
        if has_own_way and adapter.tap_kind(site) == "custom":
            return adapter.attach_slots(
                self._model, site, lambda ids, _, __, tokens: self._add(site, ids, tokens)
            )

        def on_experts(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            index_TK, weights_TK = routing_of(args, kwargs)
            ids_S = index_TK.reshape(-1)
            real_S = adapter.is_real_slot(site, ids_S, weights_TK.reshape(-1))
            tokens_S = torch.arange(len(ids_S), device=ids_S.device) // index_TK.shape[-1]
            self._add(site, ids_S[real_S], tokens_S[real_S])

        experts = self._model.get_submodule(site.experts)
        return experts.register_forward_pre_hook(on_experts, with_kwargs=True)

    def _add(self, site: MoESite, ids_S: Tensor, tokens_S: Tensor) -> None:
        mask_T = self._mask.of(site)
        if mask_T is not None:
            ids_S = ids_S[mask_T[tokens_S]]
        self.count[site.name] += torch.bincount(ids_S, minlength=site.num_experts)


def _real_tokens(inputs: Mapping[str, Tensor], prefix: str) -> int:
    ids, mask = inputs.get(f"{prefix}input_ids"), inputs.get(f"{prefix}attention_mask")
    if ids is None:
        return 0
    return ids.numel() if mask is None else int(mask.sum())
