"""What a refit repairs besides dropped experts, and what it leaves loadable."""

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import lit_moe
from lit_moe.adapters import adapter_for, count_experts, find_sites
from lit_moe.plan import KeepPlan
from lit_moe.refit import RefitOptions, refit
from lit_moe.surgery import shrink
from lit_moe.testing import tiny_moe
from tests.refit.models import downs_of, half_of, logits_of, text_for

MODES = ("sequential", "parallel")


def assert_held_out_falls(report):
    assert report.layers
    for name, layer in report.layers.items():
        assert layer.kept, name
        assert layer.held_out_after < 0.99 * layer.held_out_before, name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["mixtral", "dbrx", "gpt_oss"])
def test_a_lowered_top_k_is_repaired_in_part(family, mode, no_judge):
    teacher = tiny_moe(family)
    student = copy.deepcopy(teacher)
    adapter_for(student.config).set_top_k(student, 1)
    batches = text_for(teacher, rows=128)
    before = far_from(teacher, student, batches)
    assert_held_out_falls(refit(student, teacher, batches, RefitOptions(mode=mode)))
    assert {site.top_k for site in find_sites(student)} == {1}
    assert far_from(teacher, student, batches) < 0.97 * before


def far_from(teacher, student, batches):
    """Mean square difference of logits."""
    return sum(
        float((logits_of(teacher, b) - logits_of(student, b)).square().mean()) for b in batches
    )


def two_of_four(model):
    """Zero the two smallest of each four inputs of every output of the down projections."""
    adapter = adapter_for(model.config)
    masks = {}
    for site in find_sites(model):
        down = adapter.expert_weights(model, site)["down"].clone()
        groups = down.unflatten(2, (-1, 4))
        keep = groups.abs().argsort(dim=3).argsort(dim=3) >= 2
        masks[site.name] = keep.flatten(2)
        adapter.set_expert_weights_(model, site, {"down": down * masks[site.name]})
    return masks


@pytest.mark.parametrize("solver", ["joint", "jacobi", "gauss_seidel"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "dbrx"])
def test_zeros_of_a_two_of_four_mask_stay_and_the_rest_makes_up_for_them(family, solver, no_judge):
    teacher = tiny_moe(family)
    student = copy.deepcopy(teacher)
    masks = two_of_four(student)
    before = downs_of(student)
    report: Any = refit(student, teacher, text_for(teacher, rows=128), RefitOptions(solver=solver))
    for name, tensors in downs_of(student).items():
        assert torch.equal(tensors["down"] != 0, masks[name])
        assert not torch.equal(tensors["down"], before[name]["down"])
        assert report.layers[name].held_out_after < 0.97 * report.layers[name].held_out_before


def test_zeros_are_filled_where_that_is_asked_for(no_judge):
    teacher = tiny_moe("mixtral")
    student = copy.deepcopy(teacher)
    two_of_four(student)
    batches = text_for(teacher, rows=128, length=24)
    refit(student, teacher, batches, RefitOptions(keep_zeros=False, lam=1e-8))
    for tensors in downs_of(student).values():
        assert bool((tensors["down"] != 0).all())
    torch.testing.assert_close(
        logits_of(student, batches[0]), logits_of(teacher, batches[0]), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_merged_experts_are_repaired_in_part(family, mode, no_judge):
    teacher = tiny_moe(family)
    student = copy.deepcopy(teacher)
    adapter = adapter_for(student.config)
    sites = find_sites(student)
    for site in sites:
        weights = adapter.expert_weights(student, site)
        average = {k: (v[0::2] + v[1::2]).repeat_interleave(2, 0) / 2 for k, v in weights.items()}
        adapter.set_expert_weights_(student, site, average)
    plan = KeepPlan(
        {s.name: tuple(range(0, s.num_experts, 2)) for s in sites}, count_experts(sites)
    )
    shrink(student, plan)
    report = refit(student, teacher, text_for(teacher, rows=128), RefitOptions(mode=mode))
    assert_held_out_falls(report)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_a_refitted_model_is_exported_and_loads_with_plain_transformers(family, tmp_path, no_judge):
    teacher, student = half_of(family)
    dropped = {k: v.clone() for k, v in student.state_dict().items()}
    batches = text_for(teacher)
    refit(student, teacher, batches)
    assert {k: v.shape for k, v in student.state_dict().items()} == {
        k: v.shape for k, v in dropped.items()
    }
    lit_moe.export(student, tmp_path / "refitted")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "refitted").eval()
    assert torch.equal(logits_of(loaded, batches[0]), logits_of(student, batches[0]))


@pytest.mark.parametrize("mode", MODES)
def test_a_kept_bias_is_refitted_only_if_asked(mode, no_judge):
    changed = {}
    for bias in (True, False):
        teacher, student = half_of("gpt_oss")
        before = downs_of(student)
        refit(student, teacher, text_for(teacher), RefitOptions(mode=mode, bias=bias))
        for name, tensors in downs_of(student).items():
            assert not torch.equal(tensors["down"], before[name]["down"])
            changed[bias, name] = not torch.equal(tensors["down_bias"], before[name]["down_bias"])
    assert {key[0]: value for key, value in changed.items()} == {True: True, False: False}


def test_an_ancestor_without_experts_may_teach(no_judge):
    """The dense model of the same stream: its MLP has the name of the student's block."""
    teacher = tiny_moe("qwen3_moe", mlp_only_layers=[0])
    student = tiny_moe("qwen3_moe", mlp_only_layers=[])
    shared = {k: v for k, v in teacher.state_dict().items() if ".layers.0.mlp." not in k}
    student.load_state_dict(shared, strict=False)
    report = refit(student, teacher, text_for(teacher, rows=256))
    assert list(report.layers) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert_held_out_falls(report)


def test_the_sixth_line_of_the_short_interface(no_judge):
    teacher, student = half_of("mixtral")
    report = lit_moe.refit(student, teacher, iter(text_for(teacher)))
    assert report.kept
    assert (report.mode, report.tokens, report.held_out_tokens) == ("sequential", 448, 64)
    assert report.solver.startswith("joint: the matrix of all 96 features fits")
