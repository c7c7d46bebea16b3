"""Canonical weights and slots: enough to rebuild what every family's experts compute."""

from functools import partial

import pytest
import torch
from torch import nn

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.adapters.taps import on_forward
from lit_moe.adapters.weights import halves
from lit_moe.errors import LitMoEError
from lit_moe.testing import FAMILIES, example_inputs, tiny_moe

CUSTOM = [
    *("dbrx", "jetmoe", "llama4", "llama4_multimodal", "longcat_flash", "step3p7"),
    *("switch_transformers", "zaya"),
]


def gated(experts, gate, up):
    """The family's own activation on separate gate and up parts."""
    if hasattr(experts, "_apply_gate"):
        concatenated = getattr(experts, "is_concatenated", True)
        both = (
            torch.cat([gate, up], -1) if concatenated else torch.stack([gate, up], -1).flatten(-2)
        )
        return experts._apply_gate(both)
    activation = getattr(getattr(experts, "mlp", experts), "activation_fn", None)
    activation = activation or getattr(experts, "activation", None) or experts.act_fn
    return activation(gate) * up


def outputs_by_weights(model, site, inputs_SH, expert_ids):
    """f_e(x) for pairs of expert and input, from the canonical weights."""
    experts = model.get_submodule(site.experts)
    w = adapter_for(model.config).expert_weights(model, site)
    assert {name: t.shape[0] for name, t in w.items()} == dict.fromkeys(w, site.num_experts)

    def apply(name, x):
        y = torch.einsum("soi,si->so", w[name][expert_ids], x)
        return y + w[f"{name}_bias"][expert_ids] if f"{name}_bias" in w else y

    up = apply("up", inputs_SH)
    if "gate" in w:
        hidden = gated(experts, apply("gate", inputs_SH), up)
    else:
        activation = getattr(experts, "act_fn", None) or nn.functional.relu  # Switch: relu
        hidden = activation(up)
    out = apply("down", hidden)
    return experts.post_expert_norm(out) if getattr(experts, "has_post_expert_norm", 0) else out


@torch.no_grad()
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(CUSTOM)))
def test_weights_and_activation_reproduce_the_experts_module(family):
    model = tiny_moe(family)
    sites = find_sites(model)
    calls: dict = {}
    for site in sites:
        remember = partial(_remember, calls, site.name)
        on_forward(model.get_submodule(site.experts), remember)
    model(**example_inputs(model))
    assert calls
    for site in (s for s in sites if s.name in calls):
        x_TH, index_TK, weights_TK, out_TH = calls[site.name]
        tokens = torch.arange(len(x_TH)).repeat_interleave(index_TK.shape[1])
        raw_SH = outputs_by_weights(model, site, x_TH[tokens], index_TK.reshape(-1))
        mine_TH = torch.zeros_like(x_TH)
        mine_TH.index_add_(0, tokens, raw_SH * weights_TK.reshape(-1, 1))
        torch.testing.assert_close(mine_TH, out_TH, rtol=1e-4, atol=1e-5)


def _remember(store, name, args, output):
    store[name] = (*args, output)


def _append(store, name, *parts):
    store.setdefault(name, []).append(parts)


def slots_of(model, inputs):
    """Layer -> (expert_ids, gates, outputs, token_ids) and the layer's own inputs."""
    adapter, handles = adapter_for(model.config), []
    slots: dict = {}
    block_inputs: dict = {}
    for site in find_sites(model):
        assert adapter.tap_kind(site) == "custom"
        on_forward(model.get_submodule(site.name), partial(_remember, block_inputs, site.name))
        on_slots = partial(_append, slots, site.name)
        handles.append(adapter.attach_slots(model, site, on_slots))
    logits = model(**inputs).logits
    for handle in handles:
        handle.remove()
    return logits, slots, block_inputs


@torch.no_grad()
@pytest.mark.parametrize("family", CUSTOM)
def test_slots_are_called_once_and_leave_the_logits_alone(family):
    model = tiny_moe(family)
    inputs = example_inputs(model)
    before = model(**inputs).logits
    logits, slots, _ = slots_of(model, inputs)
    torch.testing.assert_close(logits, before, rtol=1e-5, atol=1e-6)
    assert torch.equal(model(**inputs).logits, before)
    assert set(slots) == {site.name for site in find_sites(model)}
    for calls in slots.values():
        ((ids, gates, outputs, tokens),) = calls
        assert ids.shape == gates.shape == tokens.shape == outputs.shape[:1]
        assert int(ids.max()) < 8
        assert int(tokens.max()) < 24


@torch.no_grad()
@pytest.mark.parametrize("family", CUSTOM)
def test_slot_outputs_are_the_raw_outputs_of_their_experts(family):
    model = tiny_moe(family)
    _, slots, block_inputs = slots_of(model, example_inputs(model))
    checked = 0
    for site in find_sites(model):
        if site.name not in block_inputs:
            continue  # JetMoE's attention experts: their inputs are attention outputs
        ((ids, gates, outputs, tokens),) = slots[site.name]
        x_SH = block_inputs[site.name][0].flatten(0, -2)[tokens]
        if family.startswith("llama4"):
            expected = outputs_by_weights(model, site, gates[:, None] * x_SH, ids) / gates[:, None]
        else:
            expected = outputs_by_weights(model, site, x_SH, ids)
        torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
        checked += 1
    assert checked


@torch.no_grad()
def test_skipped_tokens_of_zaya_are_no_slots():
    model = tiny_moe("zaya")
    for site in find_sites(model):
        model.get_buffer(f"{site.router}.balancing_biases")[-1] = 0.1
    _, slots, _ = slots_of(model, example_inputs(model))
    counts = [len(calls[0][0]) for calls in slots.values()]
    assert 0 < min(counts) < 24
    assert all(bool((calls[0][1] > 0).all()) for calls in slots.values())


@torch.no_grad()
def test_identity_experts_of_longcat_are_no_slots():
    model = tiny_moe("longcat_flash")
    for site in find_sites(model):
        model.get_buffer(f"{site.router}.e_score_correction_bias")[-2:] = 0.5
    _, slots, _ = slots_of(model, example_inputs(model))
    assert all(0 < len(calls[0][0]) < 72 for calls in slots.values())


@torch.no_grad()
def test_tokens_beyond_the_capacity_of_switch_are_no_slots():
    model = tiny_moe("switch_transformers", expert_capacity=2)
    _, slots, _ = slots_of(model, example_inputs(model))
    assert any(len(calls[0][0]) < 24 for calls in slots.values())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_router_rows_are_those_of_the_routed_experts(family):
    model = tiny_moe(family)
    for site in find_sites(model):
        rows = adapter_for(model.config).router_weight(model, site)
        assert rows.shape[0] == site.num_experts
        assert rows.data_ptr() in {p.data_ptr() for p in model.parameters()}


def test_halves_undo_interleaving():
    fused = torch.arange(8).reshape(1, 8, 1)
    gate, up = halves(fused, dim=1, concatenated=False)
    assert gate.flatten().tolist() == [0, 2, 4, 6]
    assert up.flatten().tolist() == [1, 3, 5, 7]
    gate, up = halves(fused, dim=1, concatenated=True)
    assert gate.flatten().tolist() == [0, 1, 2, 3]


def test_an_unknown_tiny_family_names_those_there_are():
    with pytest.raises(LitMoEError, match="'mixtral'"):
        tiny_moe("mixtrall")
