"""Attaches the accumulators to a model for as long as a block lasts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_moe.adapters import adapter_for
from lit_moe.adapters.base import MoEAdapter
from lit_moe.adapters.site import MoESite
from lit_moe.stats.accumulators import RoutedSums
from lit_moe.stats.slots import Slots, slots_of


class TokenMask:
    """Which tokens of the current batch count, told to the tap out of band.

    Experts see flattened tokens and no mask; an encoder and a decoder see different ones.
    """

    def __init__(self) -> None:
        self._encoder: Tensor | None = None
        self._decoder: Tensor | None = None

    def set(self, batch: Mapping[str, Tensor]) -> None:
        """Read the masks of a batch."""
        self._encoder = _flat(batch.get("attention_mask"))
        is_pair = "decoder_input_ids" in batch
        self._decoder = _flat(batch.get("decoder_attention_mask")) if is_pair else self._encoder

    def of(self, site: MoESite) -> Tensor | None:
        """Return the mask of the tokens that a site sees, shape ``(T,)``, or None for all."""
        return self._encoder if site.name.split(".")[0] == "encoder" else self._decoder


@contextmanager
def tapped(
    model: PreTrainedModel, sites: Sequence[MoESite], sums: RoutedSums, mask: TokenMask
) -> Iterator[None]:
    """Add everything that the experts of ``sites`` do inside the block to ``sums``."""
    adapter = adapter_for(model.config)
    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(_tap_experts(model, adapter, site, sums, mask))
            router = model.get_submodule(site.router)
            hook = router.register_forward_hook(_on_router(adapter, site, sums, mask))
            stack.callback(hook.remove)
        yield


@contextmanager
def _tap_experts(
    model: PreTrainedModel, adapter: MoEAdapter, site: MoESite, sums: RoutedSums, mask: TokenMask
) -> Iterator[None]:
    def on_slots(slots: Slots) -> None:
        sums.update(site.name, slots, mask.of(site))

    if adapter.tap_kind(site) == "custom":
        handle = adapter.attach_slots(model, site, lambda *parts: on_slots(Slots(*parts)))
        try:
            yield
        finally:
            handle.remove()
        return
    with slots_of(model.get_submodule(site.experts), on_slots):
        yield


def _on_router(adapter: MoEAdapter, site: MoESite, sums: RoutedSums, mask: TokenMask) -> Any:
    def hook(router: nn.Module, _: Any, output: Any) -> None:
        probability_TE = adapter.router_probabilities(site, output, router)
        sums.add_probabilities(site.name, probability_TE, mask.of(site))

    return hook


def _flat(mask: Tensor | None) -> Tensor | None:
    if mask is None or bool(mask.all()):
        return None
    return mask.reshape(-1).bool()
