"""What is looked at before a model's experts are grouped: routing, outputs, inputs.

T tokens, E experts, H hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.adapters import MoESite, adapter_for
from lit_moe.grouping.inputs import (
    Batch,
    check_can_be_asked,
    count_inputs,
    expert_inputs,
    outputs_of,
)
from lit_moe.grouping.likeness import OutputSums, observe_outputs
from lit_moe.grouping.memory import Blocks, blocks_for
from lit_moe.grouping.options import MergeOptions
from lit_moe.grouping.similarity import LayerEvidence, get_similarity
from lit_moe.stats import Observation, observe


def similarities(
    model: PreTrainedModel,
    sites: Sequence[MoESite],
    rows: list[Batch],
    options: MergeOptions,
    inputs: LayerInputs,
) -> tuple[dict[str, Tensor], Observation | None, int]:
    """Return how alike experts are, what routing did if the recipe asks, and the tokens seen.

    Collective.

    Args:
        model: any supported MoE.
        sites: its MoE layers.
        rows: this rank's batches.
        options: the recipe.
        inputs: of the layers, passed over only by recipes that compare outputs.
    """
    similarity = get_similarity(options.similarity)
    if "outputs" in similarity.needs:
        check_can_be_asked(model, sites)
    seen = None
    if "routing" in options.needs:
        pairs = ["pairs"] if "routing" in similarity.needs else []
        seen = observe(model, rows, gather=pairs)  # type: ignore[arg-type]
    if "outputs" in similarity.needs:
        outputs = _all_outputs(model, inputs, options)
    else:
        outputs = ((site, None) for site in sites)
    adapter, found, tokens = adapter_for(model.config), {}, 0 if seen is None else seen.tokens
    for site, sums in outputs:
        evidence = LayerEvidence(
            adapter.expert_weights(model, site),
            adapter.router_weight(model, site),
            sums,
            None if seen is None else seen.layers[site.name],
            options.memory_gib,
        )
        found[site.name] = similarity.of(evidence)
        tokens = max(tokens, 0 if sums is None else int(sums.tokens))
    return found, seen, tokens


def _all_outputs(
    model: PreTrainedModel, inputs: LayerInputs, options: MergeOptions
) -> Iterator[tuple[MoESite, OutputSums | None]]:
    """Yield the sums of one layer after the other."""
    for site, hidden_TH in inputs:
        sums = observe_outputs(
            hidden_TH,
            lambda hidden_TH, s=site: outputs_of(model, s, hidden_TH),  # type: ignore[misc]
            num_experts=site.num_experts,
            blocks=inputs.blocks,
            kernels="kernels" in options.needs,
            cosines="cosines" in options.needs,
        )
        yield site, sums


class LayerInputs:
    """What the layers are fed: pairs of layer and hidden states ``(T, H)``, one layer at a time.

    Every pass over them runs the model, for as many layers at once as memory holds; unless they are
    kept, then only the first does where it holds them all.

    Args:
        model: any supported MoE.
        sites: its MoE layers.
        rows: this rank's batches.
        options: the recipe.
        keep: whether there will be another pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sites: Sequence[MoESite],
        rows: list[Batch],
        options: MergeOptions,
        *,
        keep: bool,
    ) -> None:
        self._model, self._sites, self._rows, self._options = model, sites, rows, options
        self._keep = keep
        self._kept: dict[str, Tensor] = {}

    @functools.cached_property
    def blocks(self) -> Blocks:
        """How much is held at a time.

        Raises:
            LitMoEError: if the budget is too small.
        """
        return _blocks(self._model, self._sites, self._rows, self._options)

    def __iter__(self) -> Iterator[tuple[MoESite, Tensor]]:
        if self._kept:
            yield from ((site, self._kept[site.name]) for site in self._sites)
            return
        for start in range(0, len(self._sites), self.blocks.layers):
            some = self._sites[start : start + self.blocks.layers]
            inputs = self._gather(some)
            if self._keep and len(some) == len(self._sites):
                self._kept = dict(inputs)
            for site in some:
                yield site, inputs.pop(site.name)

    def _gather(self, sites: Sequence[MoESite]) -> dict[str, Tensor]:
        max_tokens, share = self._options.max_tokens, _share(self._sites, self._options)
        return expert_inputs(self._model, sites, self._rows, max_tokens=max_tokens, share=share)


def _blocks(
    model: PreTrainedModel, sites: Sequence[MoESite], rows: list[Batch], options: MergeOptions
) -> Blocks:
    share = _share(sites, options)
    num_tokens = count_inputs(rows, max_tokens=options.max_tokens, share=share)
    return blocks_for(model, sites, num_tokens, options.memory_gib)


def _share(sites: Sequence[MoESite], options: MergeOptions) -> float:
    """Return the part of the tokens that all experts may be asked about."""
    if options.effort is None:
        return 1.0
    return min(1.0, *(options.effort * site.top_k / site.num_experts for site in sites))
