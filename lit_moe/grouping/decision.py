"""What a decision about a merge says, and doing it.

E experts, N groups, I expert width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.grouping.align import align_
from lit_moe.grouping.options import MergeOptions
from lit_moe.grouping.report import LayerMerge, MergeReport
from lit_moe.grouping.segments import Rebuilt
from lit_moe.merge_plan import MergePlan
from lit_moe.merging import merge


@dataclass(frozen=True)
class Decision:
    """What will be done, and why.

    Attributes:
        plan: how experts are combined.
        similarity: layer name -> ``(E, E)``, what they were grouped by; empty for DERN.
        rebuilt: layer name -> experts that DERN made; empty otherwise.
        tokens: of the calibration text, as many as that part of the recipe saw that saw most;
            without padding.
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
