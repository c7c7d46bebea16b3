"""What every family must do, done by the V-MoE in all its variants."""

import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageClassification

import lit_moe
from lit_moe.adapters import adapter_for, count_experts, find_sites
from lit_moe.errors import PlanError
from lit_moe.masking import RouterMask, masked
from lit_moe.plan import KeepPlan
from lit_moe.surgery import shrink
from lit_moe.testing import random_plan
from lit_moe.testing.vision import VARIANTS, example_images, tiny_vmoe

every_variant = pytest.mark.parametrize("variant", VARIANTS)


@torch.no_grad()
def logits_of(model):
    return model(**example_images(model)).logits


def unequal_plan(model):
    counts = {site.name: 6 if site.layer == 1 else 2 for site in find_sites(model)}
    step = find_sites(model)[0].num_groups
    kept = {
        name: tuple(g * 8 // step + e for g in range(step) for e in range(count // step))
        for name, count in counts.items()
    }
    return KeepPlan(kept, dict.fromkeys(kept, 8))


@every_variant
@pytest.mark.parametrize("plan_of", [random_plan, unequal_plan])
def test_hidden_experts_give_the_logits_of_the_model_without_them(variant, plan_of):
    model = tiny_vmoe(variant)
    full, plan = logits_of(model), plan_of(model)
    with masked(model, plan):
        hidden = logits_of(model)
    assert torch.equal(logits_of(model), full)
    shrink(model, plan)
    torch.testing.assert_close(logits_of(model), hidden, rtol=0, atol=1e-6)
    assert not torch.allclose(hidden, full, atol=1e-3)
    assert count_experts(find_sites(model)) == plan.counts


@every_variant
@pytest.mark.parametrize("plan_of", [random_plan, unequal_plan])
def test_a_plain_reload_gives_the_same_logits_and_no_odd_keys(variant, plan_of, tmp_path):
    model = tiny_vmoe(variant)
    shrink(model, plan_of(model))
    model.save_pretrained(tmp_path)
    again, info = AutoModelForImageClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info.values()), info
    assert torch.equal(logits_of(again.eval()), logits_of(model))
    assert count_experts(find_sites(again)) == count_experts(find_sites(model))
    assert torch.equal(logits_of(lit_moe.load(tmp_path)), logits_of(model))


@every_variant
def test_dropping_twice_is_dropping_at_once(variant):
    at_once, twice = tiny_vmoe(variant), tiny_vmoe(variant)
    sites = count_experts(find_sites(at_once))
    shrink(at_once, KeepPlan(dict.fromkeys(sites, (1, 5)), sites))
    shrink(twice, KeepPlan(dict.fromkeys(sites, (0, 1, 5, 7)), sites))
    shrink(twice, KeepPlan(dict.fromkeys(sites, (1, 2)), dict.fromkeys(sites, 4)))
    torch.testing.assert_close(logits_of(twice), logits_of(at_once), rtol=0, atol=1e-6)


def test_a_single_expert_is_enough_where_rows_stay(tmp_path):
    model = tiny_vmoe("zero")
    sites = count_experts(find_sites(model))
    shrink(model, KeepPlan(dict.fromkeys(sites, (3,)), sites))
    assert model.config.num_null_experts == 7
    assert model.get_parameter("vit.layers.1.mlp.router.weight").shape == (8, 32)
    result = lit_moe.export(model, tmp_path / "out")
    assert result.max_abs_logit_difference == 0.0


def test_members_of_an_ensemble_keep_equal_shares():
    model = tiny_vmoe("ensemble")
    sites = count_experts(find_sites(model))
    with pytest.raises(PlanError, match="groups of 4 experts"):
        RouterMask(model, KeepPlan(dict.fromkeys(sites, (0, 1, 2, 4)), sites))


@every_variant
def test_observed_experts_are_those_that_ran(variant):
    model = tiny_vmoe(variant)
    observation = lit_moe.observe(model, [example_images(model)])
    tokens = 3 * 17 * model.config.n_group
    for stats in observation.layers.values():
        assert stats.tokens == tokens
        limit = 3 * 8 * model.config.tokens_per_expert if variant == "expert_choice" else 2 * tokens
        assert 0 < stats.count.sum() <= limit
    scores = lit_moe.score(observation, "reap")
    plan = lit_moe.select(scores, keep_ratio=0.5, sites=find_sites(model))
    shrink(model, plan)


@every_variant
def test_every_weight_and_router_row_is_found(variant):
    model = tiny_vmoe(variant)
    adapter = adapter_for(model.config)
    for site in find_sites(model):
        weights = adapter.expert_weights(model, site)
        assert weights["up"].shape == (8, 24, 32)
        assert weights["down_bias"].shape == (8, 32)
        assert adapter.router_weight(model, site).shape == (8, 32)


def test_gradients_under_a_mask_are_those_of_the_smaller_model():
    model, plan = tiny_vmoe("zero"), None
    plan = random_plan(model)
    with masked(model, plan):
        model(**example_images(model), labels=torch.tensor([0, 1, 2])).loss.backward()
    hidden = model.get_parameter("classifier.weight").grad
    small = tiny_vmoe("zero")
    shrink(small, plan)
    small(**example_images(small), labels=torch.tensor([0, 1, 2])).loss.backward()
    torch.testing.assert_close(hidden, small.get_parameter("classifier.weight").grad)


CODE_WITHOUT_US = """
import sys
sys.modules["lit_moe"] = None
import torch
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
torch.manual_seed(0)
torch.save(model(torch.randn(3, 1, 8, 8)).logits, sys.argv[1] + "/logits.pt")
model.save_pretrained(sys.argv[1] + "/again")
"""
CODE_WITH_US = """
import sys, lit_moe
assert "torch" not in sys.modules and "transformers" not in sys.modules
from transformers import AutoConfig, AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1])
assert type(model).__module__ == "lit_moe.vmoe.modeling", type(model)
"""


@pytest.mark.slow
@pytest.mark.parametrize("plan_of", [random_plan, unequal_plan])
def test_people_without_lit_moe_load_it_by_the_code_in_the_folder(plan_of, tmp_path):
    model = tiny_vmoe()
    shrink(model, plan_of(model))
    model.save_pretrained(tmp_path)
    subprocess.run([sys.executable, "-c", CODE_WITHOUT_US, str(tmp_path)], check=True)
    torch.manual_seed(0)
    expected = model(torch.randn(3, 1, 8, 8)).logits
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(logits_of(again), logits_of(model))


def test_importing_lit_moe_is_enough_for_the_auto_classes(tmp_path):
    tiny_vmoe().save_pretrained(tmp_path)
    subprocess.run([sys.executable, "-c", CODE_WITH_US, str(tmp_path)], check=True)
