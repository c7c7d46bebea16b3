"""The mask: exact, reversible, correct in training, never doubled."""

import copy

import pytest
import torch

from lit_moe.adapters import find_sites
from lit_moe.adapters.slicing import kept_rows
from lit_moe.errors import PlanError
from lit_moe.masking import RouterMask, masked
from lit_moe.surgery import shrink
from lit_moe.testing import example_inputs, random_plan, tiny_moe

KINDS = ["mixtral", "olmoe", "deepseek_v3", "gpt_oss", "ernie4_5_moe", "afmoe", "laguna", "dbrx"]
KINDS += ["llama4", "zaya", "inkling", "longcat_flash", "deepseek_v4", "mistral4", "jetmoe"]


def hooks_of(model):
    return [
        (name, len(module._forward_pre_hooks), len(module._forward_hooks))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v4", "diffusion_gemma"])
def test_detaching_restores_the_model_bit_for_bit(family):
    model = tiny_moe(family)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objects = {name: id(p) for name, p in model.named_parameters()}
    before, hooks = model(**example_inputs(model)).logits, hooks_of(model)
    with masked(model, random_plan(model)):
        assert not torch.equal(model(**example_inputs(model)).logits, before)
    assert torch.equal(model(**example_inputs(model)).logits, before)
    assert hooks_of(model) == hooks
    assert {name: id(p) for name, p in model.named_parameters()} == objects
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_an_error_inside_the_context_still_restores():
    model = tiny_moe("mixtral")
    before = model(**example_inputs(model)).logits
    with pytest.raises(KeyError), masked(model, random_plan(model)):
        raise KeyError
    assert torch.equal(model(**example_inputs(model)).logits, before)


def test_an_error_inside_the_router_leaves_no_mode_behind():
    model = tiny_moe("mixtral")
    site = find_sites(model)[0]
    with masked(model, random_plan(model)), pytest.raises(RuntimeError):
        model.get_submodule(site.router)(torch.randn(3, 5))
    weight = model.get_parameter(f"{site.router}.weight")
    assert torch.isfinite(torch.nn.functional.linear(torch.ones(1, 32), weight)).all()


@pytest.mark.parametrize("family", KINDS)
def test_masked_training_has_the_gradients_of_the_shrunken_model(family):
    model = tiny_moe(family).train()
    plan, inputs = random_plan(model), example_inputs(model)
    axes = {a.name: (a, plan.kept[s.name]) for s in find_sites(model) for a in s.axes}
    small = copy.deepcopy(model)
    shrink(small, plan)
    with masked(model, plan):
        model(**inputs).logits.square().mean().backward()
    small(**inputs).logits.square().mean().backward()
    for name, parameter in small.named_parameters():
        full = model.get_parameter(name).grad
        if parameter.grad is None:
            assert full is None or not full.any(), name
            continue
        if name in axes:
            axis, kept = axes[name]
            rows = kept_rows(axis, kept, full.device)
            assert full.index_select(axis.dim, rows).norm() == pytest.approx(float(full.norm()))
            full = full.index_select(axis.dim, rows)
        torch.testing.assert_close(full, parameter.grad, rtol=1e-5, atol=1e-8, msg=name)


def test_gradient_checkpointing_sees_the_mask_in_both_passes():
    model = tiny_moe("mixtral").train()
    plan, inputs = random_plan(model), example_inputs(model)
    plain, saving = copy.deepcopy(model), copy.deepcopy(model)
    saving.activation_checkpointing_enable()
    for each in (plain, saving):
        with masked(each, plan):
            each(**inputs).logits.square().mean().backward()
    for (name, mine), theirs in zip(plain.named_parameters(), saving.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), name


def test_training_steps_under_the_mask_end_in_the_shrunken_models_weights():
    model = tiny_moe("mixtral").train()
    plan, inputs = random_plan(model), example_inputs(model)
    small = copy.deepcopy(model)
    shrink(small, plan)
    mask = RouterMask(model, plan)
    mask.attach()
    for each in (model, small):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            each(**inputs, labels=inputs["input_ids"]).loss.backward()
            optimizer.step()
    mask.detach()
    shrink(model, plan)
    for (name, mine), theirs in zip(model.named_parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6, msg=name)


def test_a_second_mask_on_the_same_model_is_refused_and_the_first_stays():
    model = tiny_moe("mixtral")
    first, second = random_plan(model, seed=1), random_plan(model, seed=2)
    inputs = example_inputs(model)
    with masked(model, first):
        hidden = model(**inputs).logits
        with pytest.raises(RuntimeError, match="masked already"), masked(model, second):
            pass
        assert torch.equal(model(**inputs).logits, hidden)


def test_masks_on_two_models_do_not_touch_each_other():
    one, two = tiny_moe("mixtral"), tiny_moe("mixtral")
    plan, inputs = random_plan(one), example_inputs(one)
    full = one(**inputs).logits
    with masked(one, plan):
        assert torch.equal(two(**inputs).logits, full)
        with masked(two, plan):
            assert torch.equal(one(**inputs).logits, two(**inputs).logits)
        assert torch.equal(two(**inputs).logits, full)


def test_a_mask_can_be_attached_again_and_detached_twice():
    model = tiny_moe("mixtral")
    inputs, mask = example_inputs(model), RouterMask(model, random_plan(model))
    full = model(**inputs).logits
    mask.attach()
    hidden = model(**inputs).logits
    mask.detach()
    mask.detach()
    assert not mask.attached
    assert torch.equal(model(**inputs).logits, full)
    mask.attach()
    assert mask.attached
    assert torch.equal(model(**inputs).logits, hidden)
    mask.detach()


def test_a_plan_of_another_model_is_refused():
    plan = random_plan(tiny_moe("mixtral", num_experts=6))
    with pytest.raises(PlanError, match="another model"), masked(tiny_moe("mixtral"), plan):
        pass


def test_a_router_as_wide_as_the_model_is_deep_is_not_confused():
    """32 experts on hidden size 32: no guess by shape could tell logits from hidden states."""
    model = tiny_moe("qwen2_moe", num_experts=32, shared_expert_intermediate_size=32)
    plan, inputs = random_plan(model), example_inputs(model)
    with torch.no_grad():
        with masked(model, plan):
            hidden = model(**inputs).logits
        shrink(model, plan)
        # Rounding only: a softmax over 16 terms is added up in another order than one over 32.
        torch.testing.assert_close(model(**inputs).logits, hidden, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", ["zaya", "longcat_flash"])
def test_null_experts_stay_choosable(family):
    model = tiny_moe(family)
    for site in find_sites(model):
        for axis in site.rows("select_bias"):
            model.get_buffer(axis.name)[axis.real :] = 0.1
    plan, inputs = random_plan(model), example_inputs(model)
    with masked(model, plan):
        hidden = model(**inputs).logits
    shrink(model, plan)
    assert torch.equal(model(**inputs).logits, hidden)
