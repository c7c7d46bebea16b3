"""Every supported family on a tiny random model: hide, cut, save, reload, generate, train.

Numbers are exact. The only allowance, 1e-6, is for routers that call ``topk(sorted=False)``: with
fewer experts the chosen ones may come in another order, and their weighted sum is then added up in
that order.
"""

from typing import Any

import pytest
import torch

from lit_moe.adapters import adapter_for, count_experts, find_sites
from lit_moe.adapters.registry import REFUSED, TABLE
from lit_moe.adapters.routing_probe import classify_output
from lit_moe.masking import masked
from lit_moe.plan import KeepPlan
from lit_moe.surgery import shrink
from lit_moe.testing import FAMILIES, example_inputs, random_plan, tiny_moe

every_family = pytest.mark.parametrize("family", sorted(FAMILIES))
NO_GENERATION = {
    "openai_privacy_filter": "classifies tokens",
    "diffusion_gemma": "fills a canvas of its own length",
}
AUX_LOSS = [
    *("dbrx", "deepseek_v4", "ernie4_5_moe", "ernie4_5_vl_moe", "flex_olmo", "flint", "glm4v_moe"),
    *("glm5_next", "gpt_oss", "granitemoe", "granitemoe_swa", "granitemoehybrid", "jamba"),
    *("granitemoeshared", "jetmoe", "laguna", "mellum", "minimax", "minimax_m2", "minimax_m3_vl"),
    *("mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe", "qwen3_moe", "qwen3_next"),
    *("qwen3_omni_moe", "qwen3_vl_moe", "qwen4_exp"),
]
# Routers whose output is no (logits, weights, index), or whose rule is not one of the two.
PROBE_BLIND = {"dbrx", "deepseek_v4", "diffusion_gemma", "gemma4", "inkling", "jetmoe", "llama4"}
PROBE_BLIND |= {"phimoe", "switch_transformers"}
ROUNDING = 1e-5
"""Of logits of this size: some processors' matrix products depend on shapes and alignment."""


@torch.no_grad()
def logits_of(model, inputs):
    return model(**inputs).logits


def assert_same(again, model, inputs):
    """Equal tensors, bit for bit, and logits that are equal to rounding."""
    theirs = model.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in again.state_dict().items())
    torch.testing.assert_close(
        logits_of(again, inputs), logits_of(model, inputs), rtol=0, atol=ROUNDING
    )


@every_family
def test_hidden_experts_give_the_logits_of_the_model_without_them(family):
    model = tiny_moe(family)
    inputs, plan = example_inputs(model), random_plan(model)
    full = logits_of(model, inputs)
    with masked(model, plan):
        hidden = logits_of(model, inputs)
    assert torch.equal(logits_of(model, inputs), full)
    report = shrink(model, plan)
    without = logits_of(model, inputs)
    torch.testing.assert_close(hidden, without, rtol=0, atol=ROUNDING)
    assert not torch.allclose(without, full, atol=1e-3), "the plan changed nothing to be tested"
    assert count_experts(find_sites(model)) == plan.counts
    assert report.params_after < report.params_before


@every_family
def test_a_plain_reload_gives_the_same_logits_and_no_odd_keys(family, tmp_path):
    model = tiny_moe(family)
    inputs = example_inputs(model)
    shrink(model, random_plan(model))
    model.save_pretrained(tmp_path)
    loaded: tuple = type(model).from_pretrained(tmp_path, output_loading_info=True)  # type: ignore[assignment]
    again, info = loaded
    assert not any(info.values()), info
    assert_same(again.eval(), model, inputs)
    assert count_experts(find_sites(again)) == count_experts(find_sites(model))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(NO_GENERATION)))
def test_the_shrunken_model_generates(family):
    model = tiny_moe(family)
    shrink(model, random_plan(model))
    prompt = {k: v for k, v in example_inputs(model).items() if k != "decoder_input_ids"}
    generate: Any = model.generate
    tokens = generate(**prompt, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    before = 1 if model.config.is_encoder_decoder else prompt["input_ids"].shape[1]
    assert tokens.shape == (2, before + 3)


@pytest.mark.parametrize("family", AUX_LOSS)
def test_the_auxiliary_loss_of_the_shrunken_model_is_finite(family):
    model = tiny_moe(family)
    shrink(model, random_plan(model))
    inputs = example_inputs(model)
    output = model(**inputs, labels=inputs["input_ids"], output_router_logits=True)
    assert torch.isfinite(output.aux_loss)
    assert output.aux_loss > 0


@every_family
def test_unequal_layers_work_in_memory_and_can_be_made_equal_again(family, tmp_path):
    model = tiny_moe(family)
    if family == "dbrx":
        pytest.skip("its config cannot express unequal layers: see test_surgery")
    inputs, plan = example_inputs(model), unequal_plan(model)
    with masked(model, plan):
        hidden = logits_of(model, inputs)
    shrink(model, plan)
    torch.testing.assert_close(hidden, logits_of(model, inputs), rtol=0, atol=ROUNDING)
    assert count_experts(find_sites(model)) == plan.counts
    shrink(model, random_plan(model, ratio=0.0))
    model.save_pretrained(tmp_path)
    assert_same(type(model).from_pretrained(tmp_path).eval(), model, inputs)


@every_family
def test_probabilities_are_those_of_the_routed_experts(family):
    model = tiny_moe(family)
    adapter, sites = adapter_for(model.config), find_sites(model)
    seen = []
    for site in sites:
        model.get_submodule(site.router).register_forward_hook(
            lambda router, _, output, site=site: seen.append(
                (site, adapter.router_probabilities(site, output, router), output)
            )
        )
    logits_of(model, example_inputs(model))
    for site, probability_TE, output in seen:
        assert probability_TE.shape == (24, site.num_experts)
        assert probability_TE.dtype == torch.float32
        assert bool(((probability_TE >= 0) & (probability_TE <= 1)).all())
        if site.routing == "softmax" and not site.router_tail:
            torch.testing.assert_close(probability_TE.sum(1), torch.ones(24))
        if family.removesuffix("_multimodal") not in PROBE_BLIND:
            assert classify_output(output) == (site.routing, site.renormalised)


def test_every_family_of_the_registry_has_a_tiny_model():
    built = {model_type for name in FAMILIES for model_type in types_of(tiny_moe(name).config)}
    assert set(TABLE) <= built | {"lit_vmoe"}  # which is in tests/vision
    assert not set(REFUSED) & built


def types_of(config):
    nested = (getattr(config, name) for name in config.sub_configs)
    return {config.model_type, *(c.model_type for c in nested if c is not None)}


def unequal_plan(model):
    """Even layers keep one legal step more than odd ones."""
    adapter, sites = adapter_for(model.config), find_sites(model)
    kept = {}
    for site in sites:
        legal = adapter.legal_counts(site)
        count = legal[min(len(legal) // 2 + site.layer % 2, len(legal) - 1)]
        size, per_group = site.num_experts // site.num_groups, count // site.num_groups
        groups = range(site.num_groups)
        kept[site.name] = tuple(g * size + e for g in groups for e in range(size - per_group, size))
    return KeepPlan(kept, count_experts(sites))
