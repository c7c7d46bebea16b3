"""Grouping as one call: which experts are merged with which coefficients.

E experts, N groups, T tokens, H hidden.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.adapters import MoESite, adapter_for, find_sites
from lit_moe.criteria import score
from lit_moe.errors import LitMoEError, NoEffectWarning
from lit_moe.grouping.activations import orders_by_activations
from lit_moe.grouping.align import align_, check_can_be_aligned
from lit_moe.grouping.coefficients import strongest_map, weighted_map
from lit_moe.grouping.inputs import (
    Batch,
    check_can_be_asked,
    count_inputs,
    expert_inputs,
    outputs_of,
)
from lit_moe.grouping.learned import LearnOptions, learn_coefficients
from lit_moe.grouping.likeness import OutputSums, observe_outputs
from lit_moe.grouping.memory import Blocks, blocks_for
from lit_moe.grouping.options import MergeOptions
from lit_moe.grouping.partition import Groups, partition_layer
from lit_moe.grouping.report import LayerMerge, MergeReport
from lit_moe.grouping.segments import Rebuilt, recombine, router_shares
from lit_moe.grouping.similarity import LayerEvidence, get_similarity
from lit_moe.merge_plan import MergePlan
from lit_moe.merging import merge
from lit_moe.plan import KeepPlan
from lit_moe.stats import Observation, observe

Protected = Mapping[str, Iterable[int]]


@dataclass(frozen=True)
class Decision:
    """What will be done, and why.

    Attributes:
        plan: how experts are combined.
        similarity: layer name -> ``(E, E)``, what they were grouped by; empty for DERN.
        rebuilt: layer name -> experts that DERN made; empty otherwise.
        tokens: that were compared on.
        align: whether neurons are brought into one order before.
        orders: layer name -> ``(E, I)``, what comes to the places of each expert's neurons; empty
            if weights decide.
    """

    plan: MergePlan
    similarity: Mapping[str, Tensor] = field(default_factory=dict)
    rebuilt: Mapping[str, Rebuilt] = field(default_factory=dict)
    tokens: int = 0
    align: bool = False
    orders: Mapping[str, Tensor] = field(default_factory=dict)


@torch.no_grad()
def decide(
    model: PreTrainedModel,
    counts: Mapping[str, int],
    batches: Iterable[Batch] = (),
    options: MergeOptions | None = None,
    *,
    protected: Protected | None = None,
) -> Decision:
    """Return how the experts of a model are merged; the model stays as it is.

    Collective: every rank must call it with its own rows, dealt in turn; all get the same decision
    (up to the rounding of sums, so broadcast it).

    Args:
        model: any supported MoE.
        counts: MoE layer name -> experts that there will be, for every layer.
        batches: dictionaries with ``input_ids`` (B, S) and optionally ``attention_mask``; not
            looked at by recipes without data.
        options: the recipe.
        protected: layer name -> experts that stay as they are.

    Raises:
        LitMoEError: if a count is impossible for the layer, its router or its protected experts, or
            the recipe does not suit the model. Before anything is run.
        CalibrationError: if there is no text but the recipe needs some.
    """
    options = options or MergeOptions()
    sites = find_sites(model)
    shielded = {s.name: frozenset((protected or {}).get(s.name, ())) for s in sites}
    _check_counts(model, sites, counts, shielded)
    if all(counts[site.name] == site.num_experts for site in sites):
        warnings.warn(
            "every expert is a group of its own, so that nothing is merged; ask for fewer groups "
            f"than {max(s.num_experts for s in sites)}",
            NoEffectWarning,
            stacklevel=2,
        )
        everyone = KeepPlan.identity({site.name: site.num_experts for site in sites})
        return Decision(MergePlan.from_keep_plan(everyone))
    rows = list(batches) if options.needs_text else []
    if options.segments is not None:
        return _decide_segments(model, sites, counts, rows, options, shielded)
    return _decide_groups(model, sites, counts, rows, options, shielded)


def apply(model: PreTrainedModel, decision: Decision) -> int | None:
    """Merge, in place; return how many neurons alignment moved, None without it."""
    moved = align_(model, decision.plan, decision.orders or None) if decision.align else None
    merge(model, decision.plan)
    adapter = adapter_for(model.config)
    for site in find_sites(model):
        if site.name in decision.rebuilt:
            adapter.set_expert_weights_(model, site, decision.rebuilt[site.name].weights)
    return moved


def report_of(decision: Decision, options: MergeOptions) -> MergeReport:
    """Return what a decision says, for the report."""
    recipe = f"{options.similarity}, {options.partition} partition, {options.coefficients}"
    if options.segments is not None:
        recipe = f"dern, tau {options.segments.tau:g}"
    report = MergeReport(recipe, options.router, decision.tokens)
    for layer, map_NE in decision.plan.experts.items():
        report.layers[layer] = layer_merge(_shown(decision, layer), map_NE.shape[1])
    return report


def layer_merge(map_NE: Tensor, before: int) -> LayerMerge:
    """Return the groups and coefficients of one layer."""
    groups = [row.nonzero().flatten().tolist() for row in map_NE]
    values = [row[ids].tolist() for row, ids in zip(map_NE, groups, strict=True)]
    return LayerMerge(before, groups, values)


def _shown(decision: Decision, layer: str) -> Tensor:
    map_NE = decision.plan.experts[layer]
    if layer not in decision.rebuilt:
        return map_NE
    rebuilt = decision.rebuilt[layer]
    return map_NE + rebuilt.moved.double() / rebuilt.weights["up"].shape[1]


def _decide_groups(
    model: PreTrainedModel,
    sites: Sequence[MoESite],
    counts: Mapping[str, int],
    rows: list[Batch],
    options: MergeOptions,
    protected: Mapping[str, frozenset[int]],
) -> Decision:
    if options.align:
        check_can_be_aligned(model)
    if options.align == "activations":
        check_can_be_asked(model, sites)
    similarity, seen, tokens = _similarities(model, sites, rows, options)
    weights = _weights(sites, seen, options)
    groups: dict[str, Groups] = {
        site.name: partition_layer(
            similarity[site.name],
            counts[site.name],
            method=options.partition,
            saliency_E=weights[site.name],
            protected=protected[site.name],
            routing_groups=site.num_groups,
        )
        for site in sites
    }
    if options.coefficients == "learned":
        learn = options.learn or LearnOptions()
        maps = learn_coefficients(
            model, groups, rows, sites, max_tokens=options.max_tokens, options=learn
        )
    else:
        chosen = strongest_map if options.coefficients == "max_visited" else weighted_map
        maps = {layer: chosen(groups[layer], weights[layer]) for layer in groups}
    routers = maps if options.router == "merge" else _strongest_rows(groups, maps)
    plan = MergePlan(maps, routers, model.config.model_type)
    orders = {}
    if options.align == "activations":
        for site, hidden_TH in _all_inputs(model, sites, rows, options):
            orders[site.name] = orders_by_activations(model, site, plan, hidden_TH)
            tokens = max(tokens, len(hidden_TH))
    return Decision(plan, similarity, tokens=tokens, align=bool(options.align), orders=orders)


def _decide_segments(
    model: PreTrainedModel,
    sites: Sequence[MoESite],
    counts: Mapping[str, int],
    rows: list[Batch],
    options: MergeOptions,
    protected: Mapping[str, frozenset[int]],
) -> Decision:
    assert options.segments is not None
    check_can_be_aligned(model)
    seen = observe(model, rows)
    importance = {k: s.gate_sum / max(s.tokens, 1) for k, s in seen.layers.items()}
    keep = _most_important(sites, importance, counts, protected)
    adapter = adapter_for(model.config)
    rebuilt, routers = {}, {}
    for site in sites:
        weights, kept = adapter.expert_weights(model, site), keep.kept[site.name]
        found = recombine(weights, kept, importance[site.name], options.segments)
        rebuilt[site.name] = found
        routers[site.name] = router_shares(found.moved, kept, weights["up"].shape[1])
    dropping = MergePlan.from_keep_plan(keep)
    rows_of = routers if options.router == "merge" else dropping.routers
    plan = MergePlan(dropping.experts, rows_of, model.config.model_type)
    return Decision(plan, rebuilt=rebuilt, tokens=seen.tokens)


def _most_important(
    sites: Sequence[MoESite],
    importance: Mapping[str, Tensor],
    counts: Mapping[str, int],
    protected: Mapping[str, frozenset[int]],
) -> KeepPlan:
    """Return the experts with the largest importance of each routing group."""
    kept = {}
    for site in sites:
        score_E = importance[site.name].clone()
        score_E[sorted(protected[site.name])] = float("inf")
        size, each = site.num_experts // site.num_groups, counts[site.name] // site.num_groups
        best = score_E.view(-1, size).argsort(dim=1, descending=True, stable=True)[:, :each]
        starts = torch.arange(site.num_groups)[:, None] * size
        kept[site.name] = tuple((best + starts).flatten().sort().values.tolist())
    return KeepPlan(kept, {site.name: site.num_experts for site in sites})


def _similarities(
    model: PreTrainedModel, sites: Sequence[MoESite], rows: list[Batch], options: MergeOptions
) -> tuple[dict[str, Tensor], Observation | None, int]:
    similarity = get_similarity(options.similarity)
    if "outputs" in similarity.needs:
        check_can_be_asked(model, sites)
    seen = None
    if "routing" in options.needs:
        pairs = ["pairs"] if "routing" in similarity.needs else []
        seen = observe(model, rows, gather=pairs)  # type: ignore[arg-type]
    if "outputs" in similarity.needs:
        outputs = _all_outputs(model, sites, rows, options)
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
    model: PreTrainedModel, sites: Sequence[MoESite], rows: list[Batch], options: MergeOptions
) -> Iterator[tuple[MoESite, OutputSums | None]]:
    """Yield the sums of one layer after the other."""
    blocks = _blocks(model, sites, rows, options)
    for site, hidden_TH in _all_inputs(model, sites, rows, options):
        sums = observe_outputs(
            hidden_TH,
            lambda hidden_TH, s=site: outputs_of(model, s, hidden_TH),  # type: ignore[misc]
            num_experts=site.num_experts,
            blocks=blocks,
            kernels="kernels" in options.needs,
            cosines="cosines" in options.needs,
        )
        yield site, sums


def _all_inputs(
    model: PreTrainedModel, sites: Sequence[MoESite], rows: list[Batch], options: MergeOptions
) -> Iterator[tuple[MoESite, Tensor]]:
    """Yield what one layer after the other is fed; as many per run of the model as memory holds."""
    at_once, share = _blocks(model, sites, rows, options).layers, _share(sites, options)
    for start in range(0, len(sites), at_once):
        some = sites[start : start + at_once]
        inputs = expert_inputs(model, some, rows, max_tokens=options.max_tokens, share=share)
        for site in some:
            yield site, inputs.pop(site.name)


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


def _weights(
    sites: Sequence[MoESite], seen: Observation | None, options: MergeOptions
) -> dict[str, Tensor]:
    """Return layer name -> how much each expert counts within its group."""
    if seen is None or options.coefficients in ("uniform", "learned"):
        return {site.name: torch.ones(site.num_experts, dtype=torch.float64) for site in sites}
    if options.coefficients == "reap":
        return score(seen, "reap")
    return {name: stats.count for name, stats in seen.layers.items()}


def _strongest_rows(groups: Mapping[str, Groups], maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {layer: strongest_map(groups[layer], maps[layer].amax(dim=0)) for layer in maps}


def _check_counts(
    model: PreTrainedModel,
    sites: Sequence[MoESite],
    counts: Mapping[str, int],
    protected: Mapping[str, frozenset[int]],
) -> None:
    adapter = adapter_for(model.config)
    for site in sites:
        if site.name not in counts:
            raise LitMoEError(f"counts do not say how many experts {site.name!r} will have")
        wanted, legal = counts[site.name], adapter.legal_counts(site)
        if wanted not in (*legal, site.num_experts):
            raise LitMoEError(
                f"{site.name} has {site.num_experts} experts of which its router picks "
                f"{site.top_k}; they cannot become {wanted}, but {legal[0]} to {legal[-1]}"
            )
        if len(protected[site.name]) > wanted:
            raise LitMoEError(
                f"{len(protected[site.name])} of the {site.num_experts} experts of {site.name} are "
                f"protected, so that they cannot become {wanted}; protect fewer or keep more"
            )
