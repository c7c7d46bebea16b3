"""Masks against plain loops, in every layout, and what must not change."""

import copy

import pytest
import torch

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.models import check_unwritten, sharing_copy
from lit_moe.sparsity import (
    apply_masks,
    observe_inputs,
    sparsify,
    weight_masks,
)
from lit_moe.testing import example_inputs, tiny_moe
from tests.sparsity.oracle import masks_by_loop, state_of

# concatenated, interleaved and transposed with biases, without gate, one under the other, groups,
# input times gate, modules, linears of their own, skipped tokens, identity experts, beside a layer
LAYOUTS = [
    *("mixtral", "gpt_oss", "nemotron_h", "dbrx", "deepseek_v3", "llama4"),
    *("switch_transformers", "jetmoe", "zaya", "longcat_flash", "gemma4"),
]


def double(family, **overrides):
    """A tiny model in float64, so that sums in another order decide the same."""
    model = tiny_moe(family, **overrides).double()
    model.set_experts_implementation("batched_mm")  # grouped_mm has no float64
    return model


def text_for(model, num=2):
    return [example_inputs(model, seed=seed) for seed in range(num)]


def sites_to_check(model):
    """Leave out JetMoE's attention experts, whose features are attention outputs."""
    return [site for site in find_sites(model) if "self_attention" not in site.name]


@pytest.mark.parametrize("method", ["wanda", "moe_pruner"])
@pytest.mark.parametrize("family", LAYOUTS)
def test_masks_are_those_of_plain_loops(family, method):
    model = double(family)
    batches = text_for(model)
    masks = weight_masks(model, batches, method=method, pattern="2:4", earlier="dense")
    for site in sites_to_check(model):
        expected = masks_by_loop(
            model, site, batches, gated=method == "moe_pruner", zeros=2, group=4
        )
        keep = masks.keep(site.name)
        assert set(keep) == set(expected)
        for name, mask in expected.items():
            assert torch.equal(keep[name], mask), (site.name, name)


@pytest.mark.parametrize("family", [f for f in LAYOUTS if f != "jetmoe"])
def test_later_layers_see_the_pruned_earlier_ones(family):
    model = double(family)
    batches = text_for(model)
    masks = weight_masks(model, batches, method="moe_pruner", pattern="2:4")
    pruned = copy.deepcopy(model)
    adapter = adapter_for(pruned.config)
    for site in find_sites(pruned):
        expected = masks_by_loop(pruned, site, batches, gated=True, zeros=2, group=4)
        for name, mask in expected.items():
            assert torch.equal(masks.keep(site.name)[name], mask), (site.name, name)
        weights = adapter.expert_weights(pruned, site)
        values = {name: weights[name] * mask for name, mask in expected.items()}
        adapter.set_expert_weights_(pruned, site, values)


def test_whether_earlier_layers_are_pruned_matters_only_behind_the_first():
    model = double("mixtral")
    batches = text_for(model)
    pruned, dense = (
        weight_masks(model, batches, ratio=0.5, earlier=e) for e in ("pruned", "dense")
    )
    first, second = pruned
    assert all(torch.equal(pruned.bits[first][m], dense.bits[first][m]) for m in pruned.bits[first])
    assert not torch.equal(pruned.bits[second]["down"], dense.bits[second]["down"])


def test_with_routing_weights_of_one_moe_pruner_is_wanda():
    model = tiny_moe("mixtral", num_experts_per_tok=1)
    wanda, gated = (
        weight_masks(model, text_for(model), method=m, ratio=0.5) for m in ("wanda", "moe_pruner")
    )
    assert wanda == gated
    model = tiny_moe("mixtral", num_experts_per_tok=2)
    wanda, gated = (
        weight_masks(model, text_for(model), method=m, ratio=0.5) for m in ("wanda", "moe_pruner")
    )
    assert wanda != gated


def test_a_family_that_multiplies_inputs_by_the_gate_has_it_in_wanda_already():
    model = tiny_moe("llama4")
    wanda, gated = (
        weight_masks(model, text_for(model), method=m, ratio=0.5) for m in ("wanda", "moe_pruner")
    )
    assert wanda == gated


def test_padding_does_not_count():
    model = double("mixtral")
    (batch,) = text_for(model, 1)
    padded = {k: torch.nn.functional.pad(v, (0, 5), value=0) for k, v in batch.items()}
    padded["input_ids"][:, -5:] = 7
    plain, with_padding = (
        weight_masks(model, [b], pattern="2:4", method="moe_pruner") for b in (batch, padded)
    )
    assert plain == with_padding


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("method", ["moe_pruner", "sparsegpt"])
def test_sums_do_not_depend_on_the_experts_implementation(method, implementation):
    model = tiny_moe("gpt_oss")
    reference = observe_inputs(model, text_for(model), method=method)
    model.set_experts_implementation(implementation)
    for layer, moments in observe_inputs(model, text_for(model), method=method).items():
        assert torch.equal(moments.count, reference[layer].count)
        for name in ("up", "down"):
            torch.testing.assert_close(
                moments.of(name), reference[layer].of(name), rtol=1e-3, atol=1e-4
            )


@pytest.mark.parametrize("method", ["magnitude", "wanda", "moe_pruner", "sparsegpt"])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 0.7])
def test_every_row_loses_exactly_its_share(method, ratio):
    model = tiny_moe("gpt_oss")
    masks = weight_masks(model, text_for(model), method=method, ratio=ratio)
    for layer in masks:
        for keep in masks.keep(layer).values():
            zeros = (~keep).sum(dim=2)
            assert zeros.unique().tolist() == [int(ratio * keep.shape[2] + 0.5)]


@pytest.mark.parametrize("family", ["mixtral", "switch_transformers", "diffusion_gemma"])
def test_asking_for_masks_changes_nothing_and_applying_them_gives_what_pruning_gives(family):
    model = tiny_moe(family)
    batches = text_for(model)
    before = state_of(model)
    masks = weight_masks(model, batches, pattern="2:4")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    twin = copy.deepcopy(model)
    apply_masks(model, masks)
    sparsify(twin, batches, pattern="2:4")
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("family", ["mixtral", "switch_transformers", "jetmoe"])
def test_a_model_that_shares_the_tensors_stays_whole(family):
    model = tiny_moe(family)
    whole, before = sharing_copy(model), state_of(model)
    sparsify(model, text_for(model), pattern="2:4")
    assert all(torch.equal(v, before[k]) for k, v in whole.state_dict().items())
    check_unwritten(whole)


def test_parameters_stay_the_same_objects_with_their_gradients_switched_on():
    model = tiny_moe("mixtral")
    before = dict(model.named_parameters())
    sparsify(model, text_for(model), pattern="2:4")
    for name, parameter in model.named_parameters():
        assert parameter is before[name]
        assert parameter.requires_grad
