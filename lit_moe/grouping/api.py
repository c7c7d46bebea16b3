"""Grouping as one call: which experts are merged with which coefficients.

E experts, N groups, T tokens, H hidden.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.adapters import MoESite, adapter_for, find_sites
from lit_moe.criteria import score
from lit_moe.errors import LitMoEError, NoEffectWarning
from lit_moe.grouping.activations import orders_by_activations
from lit_moe.grouping.align import check_can_be_aligned
from lit_moe.grouping.coefficients import strongest_map, weighted_map
from lit_moe.grouping.decision import Decision
from lit_moe.grouping.evidence import LayerInputs, similarities
from lit_moe.grouping.inputs import Batch, check_can_be_asked, check_text, first_rows
from lit_moe.grouping.learned import LearnOptions, learn_coefficients
from lit_moe.grouping.options import MergeOptions
from lit_moe.grouping.partition import Groups, partition_layer
from lit_moe.grouping.segments import recombine, router_shares
from lit_moe.merge_plan import MergePlan
from lit_moe.plan import KeepPlan
from lit_moe.stats import Observation, observe

Protected = Mapping[str, Iterable[int]]


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
        CalibrationError: if the recipe needs text but there is none, or padding alone.
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
    if options.needs_text:
        _check_text(sites, rows, options)
    if options.segments is not None:
        return _decide_segments(model, sites, counts, rows, options, shielded)
    return _decide_groups(model, sites, counts, rows, options, shielded)


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
    # Learning has the whole budget to itself, so nothing is kept beside it.
    again = options.align == "activations" and options.coefficients != "learned"
    inputs = LayerInputs(model, sites, rows, options, keep=again)
    similarity, seen, tokens = similarities(model, sites, rows, options, inputs)
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
        learned = learn_coefficients(
            model,
            groups,
            rows,
            max_tokens=options.max_tokens,
            memory_gib=options.memory_gib,
            options=options.learn or LearnOptions(),
        )
        maps, tokens = dict(learned.maps), max(tokens, learned.tokens)
    else:
        chosen = strongest_map if options.coefficients == "max_visited" else weighted_map
        maps = {layer: chosen(groups[layer], weights[layer]) for layer in groups}
    routers = maps if options.router == "merge" else _strongest_rows(groups, maps)
    plan = MergePlan(maps, routers, model.config.model_type)
    orders = {}
    if options.align == "activations":
        for site, hidden_TH in inputs:
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


def _check_text(sites: Sequence[MoESite], rows: list[Batch], options: MergeOptions) -> None:
    asked, read = list(options.readers), iter(rows)
    if options.reads_part:
        asked.append(f"max_tokens={options.max_tokens}")
        read = first_rows(rows, options.max_tokens)
    check_text(sites, read, asked=f"the recipe ({', '.join(asked)})")


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
