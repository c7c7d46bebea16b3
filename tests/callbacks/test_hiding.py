"""Experts hidden while a model trains: again after hooks went, through checkpoints, until cut."""

import copy

import pytest
import torch

from lit_moe.adapters import count_experts, find_sites
from lit_moe.adapters.router_mask import is_masked
from lit_moe.callbacks.hiding import HiddenExperts
from lit_moe.errors import PlanError
from lit_moe.plan import KeepPlan
from lit_moe.surgery import shrink
from lit_moe.testing import example_inputs, random_plan, tiny_moe


@pytest.fixture
def model():
    return tiny_moe("mixtral").eval()


@torch.no_grad()
def logits_of(model):
    return model(**example_inputs(model)).logits


def test_hidden_experts_are_as_good_as_cut(model):
    plan, cut, hidden = random_plan(model), copy.deepcopy(model), HiddenExperts()
    shrink(cut, plan)
    whole = logits_of(model)
    hidden.hide(model, plan)
    torch.testing.assert_close(logits_of(model), logits_of(cut), rtol=0, atol=1e-6)
    hidden.show()
    assert torch.equal(logits_of(model), whole)


def test_hiding_again_replaces_what_something_removed(model):
    plan, hidden = random_plan(model), HiddenExperts()
    hidden.hide(model, plan)
    expected = logits_of(model)
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    hidden.hide(model)
    assert torch.equal(logits_of(model), expected)
    hidden.hide(model)
    assert torch.equal(logits_of(model), expected)


def test_a_second_plan_takes_the_place_of_the_first(model):
    names, hidden = count_experts(find_sites(model)), HiddenExperts()
    for kept in ((0, 1, 2), (1, 2)):
        hidden.hide(model, KeepPlan(dict.fromkeys(names, kept), names))
        assert hidden.alive(model).kept == dict.fromkeys(names, kept)
    hidden.show()
    assert not any(is_masked(module) for module in model.modules())


def test_nothing_hidden_means_all_are_left(model):
    hidden = HiddenExperts()
    hidden.hide(model)
    hidden.show()
    assert hidden.alive(model) == KeepPlan.identity(count_experts(find_sites(model)))
    assert hidden.state() is None
    assert hidden.release() is None


def test_the_plan_goes_through_a_checkpoint(model):
    plan, first, second = random_plan(model), HiddenExperts(), HiddenExperts()
    first.hide(model, plan)
    expected, state = logits_of(model), first.state()
    first.show()
    second.load_state(state)
    assert second.plan == plan
    assert not torch.equal(logits_of(model), expected)
    second.hide(model)
    assert torch.equal(logits_of(model), expected)
    second.load_state(None)
    assert second.plan is None


def test_release_shows_all_and_hands_over_the_plan(model):
    plan, hidden, whole = random_plan(model), HiddenExperts(), logits_of(model)
    hidden.hide(model, plan)
    assert hidden.release() == plan
    assert hidden.plan is None
    assert torch.equal(logits_of(model), whole)


def test_a_plan_for_another_model_is_refused(model):
    names = count_experts(find_sites(model))
    odd = KeepPlan(dict.fromkeys(names, (0, 1)), dict.fromkeys(names, 64))
    with pytest.raises(PlanError):
        HiddenExperts().hide(model, odd)
