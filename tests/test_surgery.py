"""What a shrink keeps, what it refuses, and what it writes into the config."""

import copy
from typing import Any

import pytest
import torch
from transformers import Dots3NoteConfig, Dots3NoteForConditionalGeneration

from lit_moe.accounting import count_bytes
from lit_moe.adapters import adapter_for, count_experts, find_sites
from lit_moe.errors import PlanError
from lit_moe.masking import RouterMask, masked
from lit_moe.plan import KeepPlan
from lit_moe.surgery import shrink
from lit_moe.testing import example_inputs, random_plan, tiny_moe
from lit_moe.testing.settings import COMMON, LATENT, SPARSE

SMALL_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
ADAPTER = {"adapter_in_dim": 32, "adapter_out_dim": 32}


def plan_for(model, *kept):
    counts = count_experts(find_sites(model))
    return KeepPlan(dict(zip(counts, kept, strict=True)), counts)


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_kept_experts_keep_their_weights_in_the_order_of_the_plan():
    model = tiny_moe("mixtral", num_experts=4)
    before = state_of(model)
    shrink(model, plan_for(model, (1, 3), (0, 2)))
    for layer, kept in enumerate([[1, 3], [0, 2]]):
        block = f"model.layers.{layer}.mlp"
        for name in ("experts.gate_up_proj", "experts.down_proj", "gate.weight"):
            after = model.get_parameter(f"{block}.{name}")
            assert torch.equal(after, before[f"{block}.{name}"][kept])


def test_report_counts_parameters_and_bytes_of_the_whole_model():
    model = tiny_moe("mixtral", num_experts=4)
    report = shrink(model, plan_for(model, (0, 1), (1, 2)))
    expert = 3 * 24 * 32 + 32  # gate, up, down and a router row
    assert report.params_before - report.params_after == 2 * 2 * expert
    assert report.bytes_before - report.bytes_after == 4 * 2 * 2 * expert
    assert report.params_after == model.num_parameters()
    assert report.bytes_after == count_bytes(model)
    assert report.layers == {"model.layers.0.mlp": (4, 2), "model.layers.1.mlp": (4, 2)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype_and_requires_grad_stay(dtype):
    model = tiny_moe("gpt_oss").to(dtype)
    model.model.layers[0].mlp.experts.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    shrink(model, random_plan(model))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_a_selection_bias_stays_a_buffer_and_keeps_fp32():
    model = tiny_moe("deepseek_v3").bfloat16()
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    gate = model.get_submodule("model.layers.1.mlp.gate")
    gate.e_score_correction_bias = gate.e_score_correction_bias.float()
    before = model.get_buffer(name).clone()
    plan = random_plan(model)
    shrink(model, plan)
    after = model.get_buffer(name)
    assert after.dtype == torch.float32
    assert torch.equal(after, before[list(plan.kept["model.layers.1.mlp"])])


def test_attributes_of_a_parameter_survive():
    model = tiny_moe("mixtral")
    name = "model.layers.0.mlp.gate.weight"
    vars(model.get_parameter(name))["group"] = "router"
    shrink(model, random_plan(model))
    assert vars(model.get_parameter(name)) == {"group": "router"}


def test_keeping_everything_changes_nothing():
    model = tiny_moe("deepseek_v3", n_group=4, topk_group=4)
    before, config = state_of(model), model.config.to_dict()
    report = shrink(model, KeepPlan.identity(count_experts(find_sites(model))))
    assert report.params_after == report.params_before
    assert model.config.to_dict() == config
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_plan_of_another_model_is_refused_before_anything_is_touched():
    model, other = tiny_moe("mixtral"), tiny_moe("mixtral", num_experts=6)
    before = state_of(model)
    with pytest.raises(PlanError, match="6 experts in the plan and 8 experts in the model"):
        shrink(model, random_plan(other))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_plan_that_one_layer_cannot_serve_is_refused_before_anything_is_touched():
    model = tiny_moe("mixtral")
    before = state_of(model)
    with pytest.raises(PlanError, match=r"layers\.1\.mlp: 1 of 8 experts cannot stay"):
        shrink(model, plan_for(model, (0, 1, 2), (4,)))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_the_count_goes_under_the_key_that_config_json_stores():
    model = tiny_moe("qwen3_moe")
    shrink(model, random_plan(model))
    stored = model.config.to_dict()
    assert stored["num_local_experts"] == 4
    assert "per_layer_config" not in stored
    assert model.num_experts == 4  # what the auxiliary loss reads


def test_nested_configs_are_updated_wherever_modules_hold_them():
    model = tiny_moe("qwen3_vl_moe")
    inner = model.model.language_model
    inner.config = copy.deepcopy(inner.config)
    shrink(model, random_plan(model))
    assert model.config.text_config.num_experts == 4
    assert inner.config.num_experts == 4


def test_unequal_counts_go_to_per_layer_config():
    model = tiny_moe("qwen3_moe")
    shrink(model, plan_for(model, (0, 1, 2), (3, 4, 5, 6, 7)))
    config = model.config
    assert config.to_dict()["per_layer_config"] == {"0": {"num_local_experts": 3}}
    assert config.num_local_experts == 5
    assert config.allow_global_per_layer_attribute_access
    assert [config.per_layer_config[i].num_local_experts for i in range(2)] == [3, 5]


def test_unequal_counts_survive_next_to_a_familys_own_per_layer_settings():
    model = tiny_moe("gemma4", global_head_dim=16)
    shrink(model, plan_for(model, (0, 1), (2, 3, 4)))
    stored = model.config.to_dict()["per_layer_config"]
    assert stored == {"0": {"num_experts": 2}, "1": {"head_dim": 16}}
    shrink(model, plan_for(model, (0, 1), (0, 1)))
    assert model.config.to_dict()["per_layer_config"] == {"1": {"head_dim": 16}}


def test_unequal_counts_are_refused_where_a_config_knows_no_layers():
    model = tiny_moe("dbrx")
    before = state_of(model)
    with pytest.raises(PlanError, match="dbrx cannot express a different number"):
        shrink(model, plan_for(model, (0, 1), (0, 1, 2)))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_two_moe_layers_of_one_decoder_layer_must_agree():
    model = tiny_moe("jetmoe")
    counts = count_experts(find_sites(model))
    kept = {name: (0, 1, 2) if "attention" in name else (0, 1) for name in counts}
    with pytest.raises(PlanError, match="share one expert count"):
        shrink(model, KeepPlan(kept, counts))


def test_a_grouping_that_limits_nothing_is_dropped_when_it_stands_in_the_way():
    model = tiny_moe("deepseek_v3", n_group=4, topk_group=4)
    site = find_sites(model)[0]
    assert (site.num_groups, site.top_k_groups) == (1, 1)
    inputs, plan = example_inputs(model), plan_for(model, (0, 1, 4, 6, 7))
    with torch.no_grad():
        with masked(model, plan):
            hidden = model(**inputs).logits
        shrink(model, plan)
        torch.testing.assert_close(model(**inputs).logits, hidden, rtol=0, atol=1e-6)
    assert (model.config.n_group, model.config.topk_group) == (1, 1)
    assert model.model.layers[1].mlp.gate.num_group == 1


def test_a_grouping_that_limits_keeps_its_groups_equally_large():
    model = tiny_moe("deepseek_v3")
    with pytest.raises(PlanError, match="keep 2 of each"):
        shrink(model, plan_for(model, (0, 1, 2, 4)))


def test_a_mask_must_be_detached_first():
    model = tiny_moe("mixtral")
    plan = random_plan(model)
    mask = RouterMask(model, plan)
    mask.attach()
    with pytest.raises(RuntimeError, match="detach it before"):
        shrink(model, plan)
    mask.detach()
    shrink(model, plan)


def test_a_shrunken_model_trains_like_one_that_was_built_small():
    model = tiny_moe("mixtral").train()
    shrink(model, random_plan(model))
    small = type(model)(copy.deepcopy(model.config)).train()
    small.load_state_dict(model.state_dict())
    inputs = example_inputs(model)
    for each in (model, small):
        each(**inputs, labels=inputs["input_ids"]).loss.backward()
    for (name, mine), theirs in zip(model.named_parameters(), small.parameters(), strict=True):
        assert torch.equal(mine.grad, theirs.grad), name


def test_fewer_active_experts_act_in_memory_as_after_a_reload(tmp_path):
    model = tiny_moe("openai_privacy_filter")
    adapter_for(model.config).set_top_k(model, 1)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    inputs = example_inputs(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)
    assert find_sites(model)[0].top_k == 1


def test_a_family_with_unequal_layers_of_its_own_keeps_them_apart(tmp_path):
    """The vision tower of dots3-note counts experts per layer, in a second config key."""
    config = Dots3NoteConfig(
        text_config={**COMMON, **LATENT, **SPARSE, "n_routed_experts": 8},
        vision_config={
            **SMALL_TOWER,
            "pyramid_num_routed": [-1, 4, 6],
            "num_hidden_layers": 3,
            **ADAPTER,
        },
        audio_config={
            **SMALL_TOWER,
            "downsample_hidden_size": 16,
            "adapter_input_size": 32,
            **ADAPTER,
        },
    )
    model = Dots3NoteForConditionalGeneration(config)
    counts = count_experts(find_sites(model))
    assert sorted(counts.values()) == [4, 6, 8]
    kept = {name: tuple(range(n // 2)) for name, n in counts.items()}
    shrink(model, KeepPlan(kept, counts))
    stored = model.config.to_dict()
    assert stored["text_config"]["n_routed_experts"] == 4
    assert stored["vision_config"]["per_layer_config"]["1"]["num_local_experts"] == 2
    assert stored["vision_config"]["num_local_experts"] == 3
    model.save_pretrained(tmp_path)
    again = Dots3NoteForConditionalGeneration.from_pretrained(tmp_path)
    assert sorted(count_experts(find_sites(again)).values()) == [2, 3, 4]


def test_offloaded_weights_are_refused():
    model = tiny_moe("mixtral")
    model.model.layers[1].mlp.experts.to("meta")
    with pytest.raises(RuntimeError, match=r"layers\.1.*1 more tensors are offloaded"):
        shrink(model, random_plan(model))


def test_a_model_without_any_weights_can_be_shrunk_for_its_sizes():
    model = tiny_moe("mixtral")
    for module in model.children():
        module.to("meta")
    report = shrink(model, random_plan(model))
    assert report.params_after < report.params_before
    assert all(p.is_meta for p in model.parameters())


def test_a_wrapped_model_is_refused():
    wrapped: Any = torch.nn.Sequential(tiny_moe("mixtral"))
    with pytest.raises(TypeError, match="got Sequential; pass the model inside"):
        find_sites(wrapped)
