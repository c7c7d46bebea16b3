"""What the comparison of two builds finds, and what pairing makes of it."""

import copy
import time

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, OpenAIPrivacyFilterConfig
from transformers import OpenAIPrivacyFilterForTokenClassification as PrivacyFilter

from lit_moe.adapters import find_sites
from lit_moe.adapters.config_keys import ConfigKey, expert_keys, homogeneous
from lit_moe.adapters.discovery import build_on_meta, discover, discover_ints
from lit_moe.errors import UnsupportedModelError
from lit_moe.surgery import shrink
from lit_moe.testing import FAMILIES, random_plan, tiny_moe


def kinds_of(site):
    return {a.name.removeprefix(f"{site.name}."): (a.dim, a.tail, a.kind) for a in site.axes}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            "mixtral",
            {
                "experts.gate_up_proj": (0, 0, "expert"),
                "experts.down_proj": (0, 0, "expert"),
                "gate.weight": (0, 0, "router"),
            },
        ),
        (
            "gpt_oss",
            {
                "experts.gate_up_proj": (0, 0, "expert"),
                "experts.gate_up_proj_bias": (0, 0, "expert"),
                "experts.down_proj": (0, 0, "expert"),
                "experts.down_proj_bias": (0, 0, "expert"),
                "router.weight": (0, 0, "router"),
                "router.bias": (0, 0, "router"),
            },
        ),
        (
            "ernie4_5_moe",
            {
                "experts.gate_up_proj": (0, 0, "expert"),
                "experts.down_proj": (0, 0, "expert"),
                "gate.weight": (0, 0, "router"),
                "gate.moe_statics.e_score_correction_bias": (1, 0, "select_bias"),
            },
        ),
        (
            "afmoe",
            {
                "experts.gate_up_proj": (0, 0, "expert"),
                "experts.down_proj": (0, 0, "expert"),
                "router.gate.weight": (0, 0, "router"),
                "expert_bias": (0, 0, "select_bias"),
            },
        ),
        (
            "gemma4",
            {
                "experts.gate_up_proj": (0, 0, "expert"),
                "experts.down_proj": (0, 0, "expert"),
                "router.per_expert_scale": (0, 0, "expert"),
                "router.proj.weight": (0, 0, "router"),
            },
        ),
        (
            "longcat_flash",
            {
                "experts.gate_up_proj": (0, 2, "expert"),
                "experts.down_proj": (0, 0, "expert"),
                "router.classifier.weight": (0, 2, "router"),
                "router.e_score_correction_bias": (0, 2, "select_bias"),
            },
        ),
        (
            "inkling",
            {
                "experts.gate_up_proj": (0, 0, "expert"),
                "experts.down_proj": (0, 0, "expert"),
                "gate.weight": (0, 2, "router"),
                "gate.e_score_correction_bias": (0, 0, "select_bias"),
            },
        ),
    ],
)
def test_axes_of_a_layer(family, expected):
    assert kinds_of(find_sites(tiny_moe(family))[-1]) == expected


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_sites_name_modules_of_the_model_in_their_order(family):
    model = tiny_moe(family)
    order = [name for name, _ in model.named_modules()]
    sites = find_sites(model)
    assert [s.name for s in sites] == sorted((s.name for s in sites), key=order.index)
    for site in sites:
        assert {site.name, site.experts, site.router} <= set(order)
        assert site.num_experts == 8
        assert str(site.layer) in site.name.split(".")


def test_2d_experts_are_found_with_their_rows():
    site = find_sites(tiny_moe("dbrx"))[0]
    rows = {a.name.rpartition(".")[2]: a.rows_per_expert for a in site.axes}
    assert rows == {"w1": 24, "v1": 24, "w2": 24, "weight": 1}


def test_integers_are_found_by_their_value_and_not_by_their_name():
    """OpenAIPrivacyFilterMLP.num_experts is the number of ACTIVE experts."""
    model = build_on_meta(PrivacyFilter, OpenAIPrivacyFilterConfig(num_hidden_layers=1))
    counting = {(n.module, n.name) for d in discover(model) for n in d.ints}
    assert ("model.layers.0.mlp", "num_experts") not in counting
    assert ("model.layers.0.mlp.experts", "num_experts") in counting
    active = {
        (n.module, n.name) for n in discover_ints(model, ConfigKey((), "num_experts_per_tok"))
    }
    assert ("model.layers.0.mlp", "num_experts") in active


def test_integers_of_the_language_model_head_are_found():
    found = discover(tiny_moe("mixtral"))[0].ints
    assert ("", "num_experts") in {(n.module, n.name) for n in found}


def test_integers_follow_their_own_line():
    """LongCat remembers experts plus identity experts."""
    found = {n.name: n for n in discover(tiny_moe("longcat_flash"))[0].ints}
    assert found["total_experts"].value(5) == 7
    assert found["num_routed_experts"].value(5) == 5


def test_a_full_size_model_is_described_in_seconds_and_without_memory():
    model = build_on_meta(DeepseekV3ForCausalLM, DeepseekV3Config())
    start = time.perf_counter()
    sites = find_sites(model)
    assert time.perf_counter() - start < 30
    assert (len(sites), sites[0].num_experts, sites[0].top_k) == (58, 256, 8)
    assert all(p.is_meta for p in model.parameters())


def test_discovery_of_the_same_config_is_done_once():
    model = tiny_moe("mixtral")
    assert discover(model) is discover(tiny_moe("mixtral", seed=5))


def test_discovery_does_not_change_the_config_or_the_random_state():
    model = tiny_moe("deepseek_v3", rms_norm_eps=1e-4)
    config, state = model.config.to_dict(), torch.get_rng_state()
    find_sites(model)
    assert model.config.to_dict() == config
    assert torch.equal(torch.get_rng_state(), state)


def test_a_model_shrunk_to_unequal_layers_is_found_as_it_is():
    model = tiny_moe("mixtral")
    plan = random_plan(model)
    kept = dict(plan.kept)
    kept["model.layers.1.mlp"] = (0, 2, 5)
    shrink(model, type(plan)(kept, plan.num_experts))
    assert [site.num_experts for site in find_sites(model)] == [4, 3]
    assert not homogeneous(model.config).is_heterogeneous
    assert model.config.is_heterogeneous


def test_keys_are_the_stored_ones_of_nested_configs():
    assert [str(k) for k in expert_keys(tiny_moe("qwen3_vl_moe").config)] == [
        "text_config.num_local_experts"
    ]
    assert str(expert_keys(tiny_moe("dbrx").config)[0]) == "ffn_config.moe_num_experts"
    assert ConfigKey.parse("text_config.moe_k") == ConfigKey(("text_config",), "moe_k")


def test_a_quantised_model_is_refused_with_the_missing_tensor():
    model = copy.deepcopy(tiny_moe("mixtral"))
    experts = model.model.layers[1].mlp.experts
    del experts.down_proj
    experts.down_proj_blocks = torch.nn.Parameter(torch.zeros(8, 2))
    with pytest.raises(
        UnsupportedModelError, match=r"layers\.1\.mlp\.experts\.down_proj.*quantised"
    ):
        find_sites(model)
