"""Slot by slot and row by row: what Wanda and MoE-Pruner say, in float64, in plain loops."""

from __future__ import annotations

import torch
from torch import nn

from lit_moe.adapters import adapter_for, find_sites
from tests.adapters.test_weights import gated

MATRICES = ("gate", "up", "down")


def slots_by_loop(model, site, batch):
    """Return what the experts of one layer do: (expert, gate, scale, x, phi) of each slot.

    ``scale`` is what the family multiplies the expert's input by.
    """
    calls = []

    def remember(_, args, kwargs):
        calls.append((*args, *kwargs.values()))

    family = model.config.model_type
    watched = site.name if family.startswith(("llama4", "jetmoe")) else site.experts
    hook = model.get_submodule(watched).register_forward_pre_hook(remember, with_kwargs=True)
    router = model.get_submodule(site.router).register_forward_hook(
        lambda _, __, output: routed.append(output)
    )
    routed: list = []
    model.base_model(**batch)
    hook.remove()
    router.remove()
    (call,) = calls
    hidden_TH = call[0].reshape(-1, call[0].shape[-1])
    for expert, token, gate, scale in _routing(family, site, call, routed[0]):
        x = hidden_TH[token] * scale
        yield expert, gate / scale, x, _features(model, site, expert, x)


def _routing(family, site, call, router_output):
    """Yield expert, token, gate and input scale."""
    kind = next((name for name in _OWN_ROUTING if family.startswith(name)), None)
    if kind is not None:
        yield from _OWN_ROUTING[kind](site, call, router_output)
        return
    _, index_TK, weights_TK = call
    for token, chosen in enumerate(index_TK.tolist()):
        for slot, expert in enumerate(chosen):
            if expert < site.num_experts and float(weights_TK[token, slot]) != 0:
                yield expert, token, weights_TK[token, slot], 1.0


def _llama4(site, _, router_output):
    scores_TE = router_output[0]
    for token, chosen in enumerate(scores_TE.topk(site.top_k, dim=1).indices.tolist()):
        for expert in chosen:
            yield expert, token, scores_TE[token, expert], scores_TE[token, expert]


def _jetmoe(_, __, router_output):
    _, tokens, gates, sizes, _ = router_output
    ids = [expert for expert, size in enumerate(sizes) for _ in range(size)]
    for expert, token, gate in zip(ids, tokens.tolist(), gates, strict=True):
        yield expert, token, gate, 1.0


def _switch(_, call, __):
    _, selected_T1E, gates_T1 = call
    for token, expert in selected_T1E[:, 0].nonzero().tolist():
        yield expert, token, gates_T1[token, 0], 1.0


_OWN_ROUTING = {"llama4": _llama4, "jetmoe": _jetmoe, "switch": _switch}


def _features(model, site, expert, x):
    weights = adapter_for(model.config).expert_weights(model, site)
    experts = model.get_submodule(site.experts)

    def project(name):
        y = weights[name][expert] @ x
        return y + weights[f"{name}_bias"][expert] if f"{name}_bias" in weights else y

    if "gate" in weights:
        return gated(experts, project("gate")[None], project("up")[None])[0]
    activation = getattr(experts, "act_fn", None) or nn.functional.relu  # Switch: relu
    return activation(project("up"))


@torch.no_grad()
def masks_by_loop(model, site, batches, *, gated, zeros, group):
    """Return matrix -> nested lists of booleans, True where a weight stays."""
    weights = adapter_for(model.config).expert_weights(model, site)
    squares = {
        name: torch.zeros(site.num_experts, weights[name].shape[2], dtype=torch.float64)
        for name in MATRICES
        if name in weights
    }
    for batch in batches:
        for expert, gate, x, phi in slots_by_loop(model, site, batch):
            factor = gate if gated else 1.0
            for name, values in squares.items():
                values[expert] += (factor * (phi if name == "down" else x)).double() ** 2
    return {
        name: torch.stack(
            [_kept(weights[name][e], values[e].sqrt(), zeros, group) for e in range(len(values))]
        )
        for name, values in squares.items()
    }


def _kept(weight_OD, norm_D, zeros, group):
    """Zero ``zeros`` of each ``group`` entries of a row; an expert without tokens by size alone."""
    if not bool(norm_D.any()):
        norm_D = torch.ones_like(norm_D)
    keep = torch.ones(weight_OD.shape, dtype=torch.bool)
    for row, entries in enumerate((weight_OD.double().abs() * norm_D).tolist()):
        for start in range(0, len(entries), group):
            part = range(start, start + group)
            for column in sorted(part, key=lambda c: (entries[c], c))[:zeros]:
                keep[row, column] = False
    return keep


def state_of(model):
    """Return copies of all tensors of a model."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def expert_parameters(model):
    """Return the names of all tensors that belong to experts, under any path that shares them."""
    state, paths = model.state_dict(), tuple(f"{site.experts}." for site in find_sites(model))
    memory = {tensor.data_ptr() for name, tensor in state.items() if name.startswith(paths)}
    return {name for name, tensor in state.items() if tensor.data_ptr() in memory}
