"""Attaches the accumulators to a model for as long as a block lasts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_moe.adapters import adapter_for
from lit_moe.adapters.base import MoEAdapter
from lit_moe.adapters.site import MoESite
from lit_moe.stats.slots import Slots, slots_of


class Sums(Protocol):
    """What adds up everything that the tap sees."""

    def update(
        self, layer: str, slots: Slots, mask_T: Tensor | None, token_ids: Tensor | None
    ) -> None:
        """Add the slots of one forward of one layer.

        Args:
            layer: name of the MoE layer.
            slots: see :class:`Slots`.
            mask_T: True where a token counts; None when all do.
            token_ids: vocabulary id of each token, shape ``(T,)``; None if the batch has none.
        """
        ...

    def add_probabilities(
        self, layer: str, probability_TE: Tensor, mask_T: Tensor | None, token_ids: Tensor | None
    ) -> None:
        """Add the router's probabilities of one forward of one layer, and count its tokens."""
        ...


class TokenMask:
    """Which tokens of the current batch count, and their ids, told to the tap out of band.

    Experts see flattened tokens and no mask; an encoder and a decoder see different ones.
    """

    def __init__(self) -> None:
        self._encoder: Tensor | None = None
        self._decoder: Tensor | None = None
        self._encoder_ids: Tensor | None = None
        self._decoder_ids: Tensor | None = None

    def set(self, batch: Mapping[str, Tensor]) -> None:
        """Read the masks and ids of a batch."""
        self._encoder = _flat(batch.get("attention_mask"))
        is_pair = "decoder_input_ids" in batch
        self._decoder = _flat(batch.get("decoder_attention_mask")) if is_pair else self._encoder
        self._encoder_ids = batch.get("input_ids")
        self._decoder_ids = batch.get("decoder_input_ids", self._encoder_ids)

    def of(self, site: MoESite) -> Tensor | None:
        """Return the mask of the tokens that a site sees, shape ``(T,)``, or None for all."""
        return self._encoder if _is_in_encoder(site) else self._decoder

    def ids_of(self, site: MoESite) -> Tensor | None:
        """Return the vocabulary ids of the tokens that a site sees, shape ``(T,)``, if known."""
        ids = self._encoder_ids if _is_in_encoder(site) else self._decoder_ids
        return None if ids is None else ids.reshape(-1)


@contextmanager
def tapped(
    model: PreTrainedModel, sites: Sequence[MoESite], sums: Sums, mask: TokenMask
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
    model: PreTrainedModel, adapter: MoEAdapter, site: MoESite, sums: Sums, mask: TokenMask
) -> Iterator[None]:
    def on_slots(slots: Slots) -> None:
        sums.update(site.name, slots, mask.of(site), mask.ids_of(site))

    if adapter.tap_kind(site) == "custom":
        handle = adapter.attach_slots(model, site, lambda *parts: on_slots(Slots(*parts)))
        try:
            yield
        finally:
            handle.remove()
        return
    with slots_of(model.get_submodule(site.experts), on_slots):
        yield


def _on_router(adapter: MoEAdapter, site: MoESite, sums: Sums, mask: TokenMask) -> Any:
    def hook(router: nn.Module, _: Any, output: Any) -> None:
        probability_TE = adapter.router_probabilities(site, output, router)
        sums.add_probabilities(site.name, probability_TE, mask.of(site), mask.ids_of(site))

    return hook


def _is_in_encoder(site: MoESite) -> bool:
    return site.name.split(".")[0] == "encoder"


def _flat(mask: Tensor | None) -> Tensor | None:
    if mask is None or bool(mask.all()):
        return None
    return mask.reshape(-1).bool()
