"""Dense, refused and unknown models."""

import pytest
import torch
from torch import nn
from transformers import (
    DogeConfig,
    DogeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralForCausalLM,
    NllbMoeConfig,
    VitPoseBackboneConfig,
    VitPoseConfig,
)

from lit_moe.adapters import adapter_for, find_sites, registry
from lit_moe.adapters.discovery import build_on_meta
from lit_moe.adapters.self_test import small_config
from lit_moe.adapters.unknown import UnknownAdapter
from lit_moe.errors import NotAnMoEError, UnsupportedModelError
from lit_moe.surgery import shrink
from lit_moe.testing import FAMILIES, random_plan, tiny_moe

# Families that the default adapter, knowing nothing, rightly refuses after its test.
NEEDS_ITS_OWN_ADAPTER = {
    "deepseek_v4": "differ from those with hidden experts",
    "diffusion_gemma": "differ",
    "jetmoe": "could not be tried out",
    "llama4": "could not be tried out",
    "longcat_flash": "could not be tried out",
    "switch_transformers": "modules of its own",
}


def test_a_dense_model_is_not_an_moe():
    model = build_on_meta(LlamaForCausalLM, LlamaConfig(num_hidden_layers=1))
    with pytest.raises(NotAnMoEError, match="llama is a dense model"):
        find_sites(model)


def test_a_sparse_family_without_sparse_layers_is_not_an_moe():
    with pytest.raises(NotAnMoEError, match="no MoE layer"):
        find_sites(tiny_moe("qwen3_moe", mlp_only_layers=[0, 1]))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (NllbMoeConfig(), "only experts 0 and 1 ever run"),
        (DogeConfig(), "single neurons"),
        (VitPoseBackboneConfig(num_experts=6), "data sets"),
        (VitPoseConfig(backbone_config=VitPoseBackboneConfig(num_experts=6)), "data sets"),
    ],
)
def test_families_that_cannot_work_are_refused_with_the_reason(config, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        adapter_for(config)


def test_find_sites_refuses_them_too():
    model = build_on_meta(DogeForCausalLM, DogeConfig(num_hidden_layers=1))
    with pytest.raises(UnsupportedModelError, match="doge"):
        find_sites(model)


@pytest.mark.parametrize(
    "family",
    [name for name in sorted(FAMILIES) if name.split("_m")[0] not in NEEDS_ITS_OWN_ADAPTER],
)
def test_a_family_nobody_knows_proves_itself(family):
    model = tiny_moe(family)
    known = {site.name: site for site in find_sites(model)}
    found = {site.name: site for site in UnknownAdapter().sites(model)}
    assert set(found) == set(known)
    for name, site in found.items():
        assert site.axes == known[name].axes
        assert site.routing in (known[name].routing, "custom")


@pytest.mark.parametrize("family", sorted(NEEDS_ITS_OWN_ADAPTER))
def test_a_family_nobody_knows_is_refused_if_it_fails(family):
    with pytest.raises(UnsupportedModelError, match=NEEDS_ITS_OWN_ADAPTER[family]):
        UnknownAdapter().sites(tiny_moe(family))


def test_an_unknown_family_is_shrunk_after_its_test(monkeypatch):
    model = tiny_moe("olmoe")
    monkeypatch.delitem(registry.TABLE, "olmoe")
    shrink(model, random_plan(model))
    assert [site.num_experts for site in find_sites(model)] == [4, 4]
    assert find_sites(model)[0].renormalised is False


class StubbornRouter(nn.Module):
    """Keeps a copy of its weight where no diff can see it."""

    def __init__(self, router):
        super().__init__()
        self.router = router
        self.hidden_copy = []

    @property
    def weight(self):
        return self.router.weight

    def forward(self, hidden):
        self.hidden_copy = self.hidden_copy or [torch.randn_like(self.router.weight)]
        logits = hidden @ self.hidden_copy[0].T
        weights, index = logits[:, :4].softmax(-1).topk(2)
        return logits, weights, index


class StubbornMixtral(MixtralForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp.gate = StubbornRouter(layer.mlp.gate)


def test_a_router_that_ignores_the_mask_is_refused():
    config = tiny_moe("mixtral").config
    model = StubbornMixtral(config)
    with pytest.raises(UnsupportedModelError, match="no family that lit-moe knows"):
        UnknownAdapter().sites(model)


def test_the_small_copy_keeps_the_structure():
    config = tiny_moe("deepseek_v3", hidden_size=128, n_group=4, topk_group=2).config
    small = small_config(config)
    assert (small.hidden_size, small.n_routed_experts, small.n_group) == (32, 16, 4)
    assert small.num_experts_per_tok == 2
    assert config.hidden_size == 128
