"""From what is asked for to a problem in numbers, refused before anything runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from lit_moe.adapters import MoEAdapter, MoESite, adapter_for, find_sites
from lit_moe.adapters.legality import check_top_k
from lit_moe.errors import LitMoEError
from lit_moe.plan import KeepPlan
from lit_moe.search.genome import genome_of_plan
from lit_moe.search.groups import LayerGroup, group_layers
from lit_moe.search.options import SearchSpace
from lit_moe.search.problem import Problem
from lit_moe.search.variation import exchanges

_SAMPLED = 64


def problem_of(
    model: PreTrainedModel, space: SearchSpace, plans: Sequence[KeepPlan] = ()
) -> Problem:
    """Return the problem that a space poses for a model.

    Args:
        model: with all its experts.
        space: what is asked for.
        plans: warm starts; layers that share a map vote.

    Raises:
        LitMoEError: for numbers of experts that the routers cannot work with, groups that do not
            fit the layers, or a plan of another model.
    """
    sites, adapter = find_sites(model), adapter_for(model.config)
    groups = group_layers(sites, space.groups)
    by_name = {site.name: site for site in sites}
    firsts = [by_name[group.layers[0]] for group in groups]
    counts = tuple(_count(adapter, site, space) for site in firsts)
    floors = tuple(_floor(adapter, site, space, n) for site, n in zip(firsts, counts, strict=True))
    if space.non_uniform and not exchanges(groups, counts, floors):
        raise LitMoEError(
            f"space.non_uniform has nothing to vary: of the groups {[g.name for g in groups]}, "
            f"which keep {list(counts)} experts, none can give one to another; give more groups, a "
            "smaller space.floor or another number of experts, or set non_uniform: false"
        )
    start = tuple(genome_of_plan(plan, groups, _counts_of(plan, groups, counts)) for plan in plans)
    return Problem(
        groups,
        counts,
        floors=floors,
        non_uniform=space.non_uniform,
        free_router=space.router == "free",
        start=start,
    )


def fingerprint(
    model: PreTrainedModel, options: Mapping[str, object], samples: Mapping[str, Sequence[str]]
) -> str:
    """Return what the numbers of a search depend on, as a hash.

    Args:
        model: its weights are looked at in 64 places each.
        options: of the search; compared by their text.
        samples: split -> what identifies its samples.
    """
    digest = hashlib.sha256(json.dumps([str(options), dict(samples)]).encode())
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        few = flat[:: max(1, flat.numel() // _SAMPLED)][:_SAMPLED]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(few.to(torch.float64).cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _count(adapter: MoEAdapter, site: MoESite, space: SearchSpace) -> int:
    wanted = space.keep_experts
    if wanted is None:
        assert space.keep_ratio is not None
        wanted = round(space.keep_ratio * site.num_experts)
    legal = _legal(adapter, site, space)
    if wanted not in legal:
        near = sorted(legal, key=lambda n: abs(n - wanted))[:2]
        raise LitMoEError(
            f"the search is to keep {wanted} of {site.num_experts} experts in {site.name}, whose "
            f"router picks {space.top_k or site.top_k}"
            f"{_in_groups(site)}; nearest possible: {' or '.join(map(str, sorted(near)))}"
        )
    if space.top_k is not None:
        remaining = replace(site, num_experts=wanted)
        check_top_k(remaining, space.top_k, fixed=adapter.top_k_is_fixed)
    return wanted


def _floor(adapter: MoEAdapter, site: MoESite, space: SearchSpace, count: int) -> int:
    floor = max(space.floor or 1, _legal(adapter, site, space)[0])
    if floor > count:
        raise LitMoEError(
            f"space.floor={floor} is more than the {count} experts that {site.name} keeps on "
            "average; take a smaller one"
        )
    return floor


def _legal(adapter: MoEAdapter, site: MoESite, space: SearchSpace) -> tuple[int, ...]:
    return adapter.legal_counts(site if space.top_k is None else replace(site, top_k=space.top_k))


def _in_groups(site: MoESite) -> str:
    return f" from {site.num_groups} groups" if site.num_groups > 1 else ""


def _counts_of(
    plan: KeepPlan, groups: Sequence[LayerGroup], counts: Sequence[int]
) -> tuple[int, ...]:
    """Return the plan's own counts where its layers agree within each group, else the asked."""
    own = [{len(plan.kept.get(layer, ())) for layer in group.layers} for group in groups]
    if all(len(found) == 1 for found in own):
        return tuple(next(iter(found)) for found in own)
    return tuple(counts)
