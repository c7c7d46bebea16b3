"""Everything that one pass adds up: the sums that all passes keep, and what was asked for."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.adapters import adapter_for, count_experts
from lit_moe.adapters.site import MoESite
from lit_moe.errors import CalibrationError, LitMoEError
from lit_moe.sharding.partitions import gathered
from lit_moe.stats.accumulators import RoutedSums
from lit_moe.stats.gathered import Gathering, OutputMoments, PairCounts, VocabularySets
from lit_moe.stats.observation import GATHERABLE, Gathered, Observation
from lit_moe.stats.slots import Slots


class Collected:
    """The sums of one pass over the MoE layers of a model.

    Args:
        model: the model that will run.
        sites: its MoE layers.
        gather: kinds of further sums.

    Raises:
        LitMoEError: for a kind that does not exist.
    """

    def __init__(
        self, model: PreTrainedModel, sites: tuple[MoESite, ...], gather: Collection[Gathered]
    ) -> None:
        unknown = sorted(set(gather) - set(GATHERABLE))
        if unknown:
            raise LitMoEError(f"cannot gather {unknown[0]!r}; there are {', '.join(GATHERABLE)}")
        self._num_experts = count_experts(sites)
        self._routed = RoutedSums(self._num_experts).to(model.device)
        self._needs_ids = "vocabulary" in gather
        self._further = [_gathering(kind, model, sites) for kind in GATHERABLE if kind in gather]

    def update(
        self, layer: str, slots: Slots, mask_T: Tensor | None, token_ids: Tensor | None
    ) -> None:
        """See :meth:`lit_moe.stats.tap.Sums.update`."""
        self._routed.update(layer, slots, mask_T)
        if not self._further:
            return
        counted = slots.expert_ids < self._num_experts[layer]
        if mask_T is not None:
            counted &= mask_T[slots.token_ids]
        slots = slots.sorted_by_expert(counted)
        for sums in self._further if len(slots.expert_ids) else ():
            sums.update(layer, slots, token_ids)

    def add_probabilities(
        self, layer: str, probability_TE: Tensor, mask_T: Tensor | None, token_ids: Tensor | None
    ) -> None:
        """See :meth:`lit_moe.stats.tap.Sums.add_probabilities`.

        Raises:
            CalibrationError: if token ids are gathered and the batch has not one for each token.
        """
        found = 0 if token_ids is None else len(token_ids)
        if self._needs_ids and found != len(probability_TE):
            raise CalibrationError(
                f"which token ids an expert is sent cannot be told in {layer!r}: the batch has "
                f"{found} ids for {len(probability_TE)} tokens; give batches with input_ids, or "
                "take a criterion that does not look at the vocabulary"
            )
        self._routed.add_probabilities(layer, probability_TE, mask_T)

    def check_finite(self) -> None:
        """See :meth:`RoutedSums.check_finite`."""
        self._routed.check_finite()

    def observation(self) -> Observation:
        """Return what was seen; the sums are given away. Collective: every rank must call it."""
        plain = self._routed.observation()
        layers = {}
        for name, stats in plain.layers.items():
            further: dict[str, Any] = {}
            for sums in self._further:
                further.update(sums.layer_sums(name))
            layers[name] = replace(stats, **further)
        return Observation(layers)


def _gathering(kind: Gathered, model: PreTrainedModel, sites: tuple[MoESite, ...]) -> Gathering:
    if kind == "pairs":
        return PairCounts(count_experts(sites), model.device)
    if kind == "vocabulary":
        return VocabularySets(count_experts(sites), _vocabulary_size(model), model.device)
    adapter = adapter_for(model.config)
    shapes = {}
    for site in sites:
        with gathered(model.get_submodule(site.name)):
            num_experts, hidden, _ = adapter.expert_weights(model, site)["down"].shape
        shapes[site.name] = (num_experts, hidden)
    return OutputMoments(shapes, model.device)


def _vocabulary_size(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    size = getattr(embeddings, "num_embeddings", None)
    return int(embeddings.weight.shape[0] if size is None else size)
