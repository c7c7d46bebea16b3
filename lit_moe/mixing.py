"""Mixed routing on a model: which routers can be mixed, on the live model and after a merge.

T tokens, E experts before, N experts after, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.adapters import MoESite, adapter_for, find_sites
from lit_moe.adapters.router_mask import is_masked
from lit_moe.adapters.routing_probe import classify_output
from lit_moe.adapters.site import ExpertAxis
from lit_moe.errors import PlanError
from lit_moe.mixed_routing import CONFIG_KEY, Mixing, is_mixed, mix_router_, unmix_router_

_PROBE_TOKENS = 64


def mixings(model: PreTrainedModel) -> dict[str, Mixing]:
    """Return MoE layer name -> how its router turns logits into weights.

    Raises:
        PlanError: naming the first layer whose routing is limited to groups, has null experts, or
            follows no softmax or sigmoid; probabilities of such routers cannot be mixed.
        RuntimeError: if a router is masked or mixed already.
    """
    return {site.name: _mixing(model, site) for site in find_sites(model)}


@contextmanager
def mixed_routing(
    model: PreTrainedModel,
    maps: Mapping[str, Tensor],
    *,
    how: Mapping[str, Mixing] | None = None,
    top_k: int | None = None,
) -> Iterator[None]:
    """Within it, routers choose among N experts whose probabilities are mixed of those at hand.

    Experts are left alone: ids of the N experts are 0 to N - 1. With ``eye(E)`` as map nothing
    changes.

    Args:
        model: with all its experts.
        maps: MoE layer name -> ``(N, E)``; layers that are not named stay as they are.
        how: what :func:`mixings` gave, to spare the probe.
        top_k: experts per token; None for as many as now.

    Raises:
        PlanError: see :func:`mixings`.
    """
    how = mixings(model) if how is None else how
    changed = []
    try:
        for name, map_NE in maps.items():
            router = model.get_submodule(how[name].router)
            device = next(router.parameters()).device
            mix_router_(router, replace(how[name], top_k=top_k), map_NE.to(device))
            changed.append(router)
        yield
    finally:
        for router in changed:
            unmix_router_(router)


def old_rows(model: PreTrainedModel, mixing: Mixing) -> dict[str, Tensor]:
    """Return copies of what a router reads, by path within it."""
    router = model.get_submodule(mixing.router)
    tensors = dict([*router.named_parameters(), *router.named_buffers()])
    return {path: tensors[path].detach().clone() for path in mixing.rows}


def mix_(
    model: PreTrainedModel,
    routers: Mapping[str, tuple[Mixing, Tensor, Mapping[str, Tensor]]],
) -> None:
    """Give routers of a merged model their old rows back and let them mix, in place.

    The config says so from then on.

    Args:
        model: whose experts are merged.
        routers: MoE layer name -> how it works, map ``(N, E)``, and its :func:`old_rows`.
    """
    for mixing, map_NE, rows in routers.values():
        router = model.get_submodule(mixing.router)
        mix_router_(router, mixing, map_NE.to(next(router.parameters()).device), rows)
    if routers:
        known = {name: mixing.to_dict() for name, (mixing, *_) in routers.items()}
        setattr(model.config, CONFIG_KEY, known)


def mixed_layers(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the names of MoE layers whose routers mix."""
    sites = find_sites(model)
    return tuple(s.name for s in sites if is_mixed(model.get_submodule(s.router)))


def _mixing(model: PreTrainedModel, site: MoESite) -> Mixing:
    router = model.get_submodule(site.router)
    if is_masked(router) or is_mixed(router):
        state = "masked" if is_masked(router) else "mixed already"
        raise RuntimeError(f"the router of {site.name} is {state}; undo that first")
    rows = {a.name.removeprefix(f"{site.router}."): a for a in _router_axes(site)}
    outside = [axis.name for path, axis in rows.items() if path == axis.name]
    if site.num_groups > 1 or outside or any(axis.tail for axis in rows.values()):
        raise _cannot(site, _obstacle(site, outside))
    biases = [path for path, axis in rows.items() if axis.kind == "select_bias"]
    routing, renormalised, scale = _probed(model, site)
    return Mixing(
        router=site.router,
        num_experts=site.num_experts,
        routing=routing,
        renormalised=renormalised,
        scale=scale,
        rows={path: axis.dim for path, axis in rows.items()},
        select_bias=biases[0] if biases else None,
        integers=_integers(model, site),
    )


def _router_axes(site: MoESite) -> list[ExpertAxis]:
    return [axis for kind in ("router", "select_bias") for axis in site.rows(kind)]


def _obstacle(site: MoESite, outside: list[str]) -> str:
    if site.num_groups > 1:
        return f"routing is limited to {site.top_k_groups} of {site.num_groups} groups"
    if outside:
        return f"{outside[0]} lies outside its router"
    return "its router also chooses experts that are no routed ones"


def _cannot(site: MoESite, why: str) -> PlanError:
    return PlanError(
        f"{site.name}: probabilities of its router cannot be mixed, since {why}; take a plan whose "
        "router maps act on rows"
    )


def _integers(model: PreTrainedModel, site: MoESite) -> tuple[str, ...]:
    prefix = f"{site.router}."
    found = []
    for discovery in adapter_for(model.config).discoveries(model):
        if str(discovery.key) == site.config_key:
            names = [f"{number.module}.{number.name}" for number in discovery.ints]
            found += [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    return tuple(found)


@torch.no_grad()
def _probed(model: PreTrainedModel, site: MoESite) -> tuple[str, bool, float]:
    """Return routing, renormalisation and factor on all weights, seen on random hidden states."""
    router = model.get_submodule(site.router)
    rows_EH = adapter_for(model.config).router_weight(model, site)
    generator = torch.Generator().manual_seed(0)
    hidden_TH = torch.randn(_PROBE_TOKENS, rows_EH.shape[1], generator=generator)
    try:
        output = router(hidden_TH.to(rows_EH))
    except (RuntimeError, TypeError, ValueError) as error:
        raise _cannot(site, f"it does not take hidden states alone ({error})") from error
    routing, renormalised = classify_output(output)
    if routing == "custom" or site.routing != routing or renormalised is None:
        raise _cannot(site, "they are no softmax or sigmoid of its logits")
    logits_TE, weights_TK, index_TK = (part.float() for part in output[:3])
    scores_TE = logits_TE.softmax(-1) if routing == "softmax" else logits_TE.sigmoid()
    chosen_TK = scores_TE.gather(-1, index_TK.long())
    if site.top_k == 1 and site.renormalised is not None:
        renormalised = site.renormalised
    expected_T = torch.ones(_PROBE_TOKENS) if renormalised else chosen_TK.sum(-1).cpu()
    measured = float((weights_TK.sum(-1).cpu() / expected_T).mean())
    return routing, renormalised, _nearest_factor(model, site, measured)


def _nearest_factor(model: PreTrainedModel, site: MoESite, measured: float) -> float:
    """Return the factor that the config or the router names, free of rounding."""
    holders = (model.get_submodule(site.router), model.config.get_text_config())
    named = [v for holder in holders for k, v in vars(holder).items() if "scal" in k]
    known = [1.0, *(float(v) for v in named if isinstance(v, int | float))]
    best = min(known, key=lambda factor: abs(factor - measured))
    return best if abs(best - measured) <= 1e-2 * measured else measured
