"""A forward that begins in the middle is bit for bit a whole one, in every family that is asked."""

import pytest
import torch

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.errors import CalibrationError, LitMoEError
from lit_moe.evaluate import evaluate_perplexity
from lit_moe.prefix import PrefixCache
from lit_moe.testing import example_inputs, tiny_moe


def text_for(model, batches=2):
    return [example_inputs(model, seed=seed) for seed in range(batches)]


@pytest.fixture
def model():
    return tiny_moe("mixtral", num_hidden_layers=4)


def without(model, site, expert):
    """Hide one expert of a layer; returns the handle."""
    keep = [e for e in range(site.num_experts) if e != expert]
    return adapter_for(model.config).mask_(model, site, keep)


@torch.no_grad()
def plain_logits(model, batch):
    return model(**batch).logits


@pytest.mark.parametrize(
    "family",
    ["mixtral", "olmoe", "gemma4", "deepseek_v4", "nemotron_h", "switch_transformers", "jetmoe"],
)
def test_every_single_expert_gives_the_logits_of_a_whole_forward(family):
    model = tiny_moe(family)
    batches = text_for(model)
    cache = PrefixCache(model, batches)
    forwards = 0
    for site in find_sites(model):
        for expert in range(0, site.num_experts, 3):
            mask = without(model, site, expert)
            for index, batch in enumerate(batches):
                found = cache.logits(index, {site.name: expert})
                assert torch.equal(found, plain_logits(model, batch)), (site.name, expert)
                forwards += 1
            mask.remove()
    assert cache.places
    assert cache.layers_run < forwards * len(cache.layers)


def test_attention_of_the_changed_layer_is_not_run_again(model):
    cache = PrefixCache(model, text_for(model, 1))
    cache.logits(0, {"model.layers.2.mlp": 1})
    calls = []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(lambda *_: calls.append("attention"))
        layer.mlp.experts.register_forward_hook(lambda *_: calls.append("experts"))
    cache.logits(0, {"model.layers.2.mlp": 2})
    assert calls == ["experts", "attention", "experts"]


def test_candidates_share_what_they_have_in_common(model):
    first, second, third = "model.layers.0.mlp", "model.layers.1.mlp", "model.layers.3.mlp"
    sites = {site.name: site for site in find_sites(model)}
    batches = text_for(model, 1)
    cache = PrefixCache(model, batches)

    def logits(**changed):
        changes = {f"model.layers.{k[1:]}.mlp": v for k, v in changed.items()}
        masks = [without(model, sites[name], expert) for name, expert in changes.items()]
        before = cache.layers_run
        found = cache.logits(0, changes, remember=[second, third])
        assert torch.equal(found, plain_logits(model, batches[0]))
        for mask in masks:
            mask.remove()
        return cache.layers_run - before

    assert first in sites
    assert logits(_0=1, _1=2, _3=3) == 4
    assert logits(_0=1, _1=2, _3=5) == 1
    assert logits(_0=1, _1=4) == 3
    assert logits(_0=2, _1=2, _3=3) == 4
    assert logits() == 4


def test_a_small_budget_costs_layers_and_changes_no_logit(model):
    batches = text_for(model, 4)
    costs = []
    for room in (2**30, 2 * 2 * 12 * 32 * 4 * 2, 1):
        cache = PrefixCache(model, batches, budget=room)
        for site in find_sites(model):
            for expert in range(3):
                mask = without(model, site, expert)
                for index, batch in enumerate(batches):
                    found = cache.logits(index, {site.name: expert})
                    assert torch.equal(found, plain_logits(model, batch))
                mask.remove()
        costs.append(cache.layers_run)
        assert cache.num_bytes <= room
    assert costs == sorted(costs)
    assert costs[0] < costs[1] < costs[2] == 4 * 3 * 4 * 4


def test_what_is_passed_around_the_layers_is_found_out(model):
    """Layer 1 tells layer 2 something that is not in its output."""
    said: dict[str, torch.Tensor] = {}
    layers = model.model.layers
    layers[1].mlp.register_forward_hook(lambda _, __, out: said.update(value=out.mean()))
    layers[2].register_forward_pre_hook(lambda _, args: (args[0] + said["value"], *args[1:]))
    cache = PrefixCache(model, text_for(model))
    names = [f"model.layers.{i}" for i in range(4)]
    assert cache.layers == tuple(names)
    assert set(cache.places) == {names[0], names[1], names[3]}
    site = find_sites(model)[3]
    mask = without(model, site, 0)
    for index, batch in enumerate(text_for(model)):
        assert torch.equal(cache.logits(index, {site.name: 0}), plain_logits(model, batch))
    mask.remove()


def test_the_model_is_afterwards_what_it_was(model):
    model.train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cache = PrefixCache(model, text_for(model))
    cache.loss({"model.layers.2.mlp": "x"})
    cache.loss({"model.layers.2.mlp": "y"})
    assert all(module.training for module in model.modules())
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_the_loss_is_that_of_the_evaluation(model):
    batches = text_for(model)
    batches[1]["attention_mask"][0, 8:] = 0
    rows = [
        {**b, "domain": torch.zeros(2, dtype=torch.long), "num_bytes": torch.ones(2)}
        for b in batches
    ]
    quality = evaluate_perplexity(model, rows, ("text",))
    cache = PrefixCache(model, batches)
    nats, tokens = cache.losses()
    assert tokens.tolist() == [11, 11, 7, 11]
    assert quality.perplexity == pytest.approx(float((nats.sum() / tokens.sum()).exp()), rel=1e-9)
    some, _ = cache.losses(batches=[1])
    assert torch.equal(some, nats[2:])


def test_requests_that_cannot_be_met(model):
    with pytest.raises(CalibrationError, match="no batch"):
        PrefixCache(model, [])
    cache = PrefixCache(model, text_for(model, 1))
    with pytest.raises(LitMoEError, match="'lm_head' is in none of the 4 layers"):
        cache.loss({"lm_head": 1})
    with pytest.raises(LitMoEError, match="is no size in bytes"):
        PrefixCache(model, text_for(model, 1), budget="much")
