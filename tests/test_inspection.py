from __future__ import annotations

import json
import time

import pytest
import transformers
from rich.console import Console

from lit_moe.accounting import count_parameters, tensor_at
from lit_moe.adapters import find_sites
from lit_moe.errors import LitMoEError, NotAnMoEError, UnsupportedModelError
from lit_moe.export import export
from lit_moe.inspection import RefitRequest, inspect_model, nearest, render
from lit_moe.inspection.parts import part_by_name
from lit_moe.inspection.render import counts_in_words
from lit_moe.testing import tiny_moe
from tests.pruned import pruned


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves a default config of real size, without any weights."""

    def save(name, **values):
        getattr(transformers, f"{name}Config")(dtype="bfloat16", **values).save_pretrained(tmp_path)
        return tmp_path

    return save


def shown(inspection):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(inspection))
    console.file.close()
    return console.export_text()


def test_mixtral_has_its_published_size(saved):
    found = inspect_model(saved("Mixtral"))
    assert (found.family, found.architecture) == ("mixtral", "MixtralForCausalLM")
    assert found.parameters == 46_702_792_704
    assert found.active_parameters == 12_879_925_248
    assert found.bytes == 2 * found.parameters
    assert (len(found.layers), found.dense_layers) == (32, 0)
    assert found.layers[0].legal_counts == (2, 3, 4, 5, 6, 7, 8)
    assert found.parts["routed experts"].parameters == 32 * 8 * 3 * 4096 * 14336
    assert found.parts["attention"].parameters == 32 * 4096 * (4096 + 1024 + 1024 + 4096)
    assert found.parts["embeddings"] == found.parts["head"]


def test_deepseek_v3_has_its_published_size_groups_and_shared_expert(saved):
    start = time.perf_counter()
    found = inspect_model(saved("DeepseekV3"))
    assert time.perf_counter() - start < 30
    assert found.parameters == 671_026_404_352
    assert found.active_parameters == 37_552_282_624
    layer = found.layers[0]
    assert (layer.num_experts, layer.top_k, layer.num_shared) == (256, 8, 1)
    assert (layer.num_groups, layer.top_k_groups) == (8, 4)
    assert all(count % 8 == 0 for count in layer.legal_counts)
    assert (len(found.layers), found.dense_layers) == (58, 3)
    assert found.parts["shared experts"].parameters == 58 * 3 * 7168 * 2048
    assert found.parts["dense MLP"].parameters == 3 * 3 * 7168 * 18432
    assert "shared experts are never scored and never removed" in found.notes


@pytest.mark.parametrize(
    ("config", "model"),
    [
        ("Qwen3Moe", "Qwen3MoeForCausalLM"),
        ("GptOss", "GptOssForCausalLM"),
        ("Olmoe", "OlmoeForCausalLM"),
        ("Qwen3VLMoe", "Qwen3VLMoeForConditionalGeneration"),
    ],
)
def test_parts_sum_up_to_the_whole_model(config, model, saved):
    found = inspect_model(saved(config))
    assert found.architecture == model
    parts = sum(size.parameters for size in found.parts.values())
    assert parts == found.parameters
    assert found.bytes == 2 * parts


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss", "qwen2_moe"])
def test_what_keeping_half_would_leave_is_what_pruning_half_leaves(family, tmp_path):
    tiny_moe(family, num_hidden_layers=3).save_pretrained(tmp_path)
    half = next(s for s in inspect_model(tmp_path).savings if s.keep_ratio == 0.5)
    model, _ = pruned(family)
    tensors = {**dict(model.named_parameters()), **model.state_dict()}
    assert half.parameters == sum(t.numel() for t in tensors.values())
    assert half.experts == (4, 4)
    assert half.bytes == 4 * half.parameters


def test_active_parameters_leave_out_the_experts_a_token_is_not_sent_to():
    model = tiny_moe("mixtral", num_experts=8)
    one_expert = model.model.layers[0].mlp.experts
    each = sum(p[0].numel() for p in one_expert.parameters())
    counts = count_parameters(model, find_sites(model))
    assert counts.total == model.num_parameters()
    assert counts.active == counts.total - len(model.model.layers) * (8 - 2) * each


def test_experts_that_are_modules_of_their_own_are_routed_experts_too(tmp_path):
    model = tiny_moe("switch_transformers")
    model.save_pretrained(tmp_path)
    expert = model.get_submodule("encoder.block.1.layer.1.mlp.experts.expert_0")
    each = sum(p.numel() for p in expert.parameters())
    found = inspect_model(tmp_path)
    assert found.parts["routed experts"].parameters == 2 * 8 * each
    assert found.active_parameters == found.parameters - 2 * (8 - 1) * each
    half = next(s for s in found.savings if s.keep_ratio == 0.5)
    router_row = model.config.d_model
    assert half.parameters == found.parameters - 2 * 4 * (each + router_row)


def test_rows_of_experts_that_compute_nothing_are_not_active():
    model = tiny_moe("longcat_flash")  # 8 routed and 2 identity experts
    sites = find_sites(model)
    first, second = (tensor_at(model, axis.name)[0] for axis in sites[0].rows("expert"))
    each, unused = first.numel() + second.numel(), 2 * first.numel()
    counts = count_parameters(model, sites)
    assert counts.total - counts.active == len(sites) * ((8 - sites[0].top_k) * each + unused)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.layers.0.mixer.up_proj.weight", "dense MLP"),
        ("model.layers.0.mixer.in_proj.weight", "attention"),
        ("model.layers.0.shared_mlp.input_linear.weight", "shared experts"),
        ("model.layers.0.post_attention_layernorm.0.weight", "other"),
        ("model.layers.0.input_layernorm.mlp.fc1.weight", "other"),
        ("model.layers.0.norm_attn_norm.attn.Wqkv.weight", "attention"),
        ("model.layers.0.norm_attn_norm.norm_1.weight", "other"),
        ("model.multi_modal_projector.cross_attn.q_proj.weight", "other"),
        ("model.vision_tower.layers.0.mlp.fc1.weight", "other"),
        ("model.embed_tokens_per_layer.weight", "embeddings"),
        ("model.layers.1.mlp.bias", "other"),
        ("model.layers.1.mlp.pre_expert_proj.weight", "dense MLP"),
    ],
)
def test_a_tensor_that_no_module_claims_is_placed_by_its_name(name, part):
    assert part_by_name(name, ["model.layers.1.mlp"]) == part


def test_tied_embeddings_count_once(tmp_path):
    tiny_moe("mixtral", tie_word_embeddings=True).save_pretrained(tmp_path)
    found = inspect_model(tmp_path)
    assert "head" not in found.parts
    assert sum(size.parameters for size in found.parts.values()) == found.parameters


def test_an_uneven_export_is_inspected_with_its_own_counts(tmp_path):
    model, _ = pruned("mixtral", uneven=True)
    export(model, tmp_path / "out")
    found = inspect_model(tmp_path / "out")
    assert [layer.num_experts for layer in found.layers] == [4, 6, 4]
    assert found.parameters == model.num_parameters()
    assert any("different numbers of experts" in note for note in found.notes)


def test_inspection_is_shown_in_80_columns_and_as_json(saved):
    found = inspect_model(saved("DeepseekV3"))
    text = shown(found)
    assert "671 B parameters, 37.6 B active per token, 1.34 TB" in text
    assert "model.layers.{3-60}.mlp" in text
    assert "16-256 by 8" in text
    assert "4 of 8" in text
    data = json.loads(json.dumps(found.to_dict()))
    assert data["layers"][0]["legal_counts"][0] == 16
    assert data["parts"]["routed experts"]["bytes"] > 0
    assert data["bytes"] == found.bytes
    assert [saving["keep_ratio"] for saving in data["savings"]] == [0.75, 0.5, 0.25]


def test_no_weight_is_needed_or_read(saved):
    folder = saved("Mixtral")
    assert [path.name for path in folder.iterdir()] == ["config.json"]
    inspect_model(folder)


def test_dense_unsupported_and_damaged_models_are_said_to_be_so(saved, tmp_path):
    with pytest.raises(NotAnMoEError, match="dense model"):
        inspect_model(saved("Llama"))
    with pytest.raises(UnsupportedModelError):
        inspect_model(saved("NllbMoe"))
    with pytest.raises(LitMoEError, match="holds no config"):
        inspect_model(tmp_path.parent)


def test_the_nearest_legal_count_prefers_the_larger_of_two():
    assert nearest((2, 4, 6), 5) == 6
    assert nearest((2, 4, 6), 4.9) == 4
    assert nearest((8, 16), 1) == 8


def test_legal_counts_are_short():
    assert counts_in_words((2, 3, 4)) == "2-4"
    assert counts_in_words((16, 24, 32)) == "16-32 by 8"
    assert counts_in_words((4, 9, 16)) == "4, 9, 16"
    assert counts_in_words((4,)) == "4"


def test_bytes_follow_the_dtype_of_the_config(tmp_path):
    tiny_moe("mixtral").bfloat16().save_pretrained(tmp_path)
    found = inspect_model(tmp_path)
    assert found.dtype == "bfloat16"
    assert found.bytes == 2 * found.parameters


def test_the_memory_of_a_refit_is_said_beforehand(saved):
    folder = saved("Mixtral")
    found = inspect_model(folder, refit=RefitRequest(tokens=10_000, memory_gib=32))
    assert [(n.mode, n.keep_ratio) for n in found.refit] == [
        (mode, ratio) for mode in ("sequential", "parallel") for ratio in (0.75, 0.5, 0.25)
    ]
    quarter = found.refit[2]
    assert quarter.solver == "joint"
    width, hidden = 2 * 14336, 4096
    assert quarter.matrices == 8 * (2 * width**2 + 3 * width * hidden)
    assert quarter.features == 10_000 * 2 * 14336 * 4
    for needs in found.refit:
        assert needs.memory - needs.streams <= 32 * 2**30
    assert "joint" in shown(found)
    small = inspect_model(folder, refit=RefitRequest(memory_gib=0.5))
    assert {n.solver for n in small.refit} == {"none"}
    assert all("set memory_gib to" in n.reason for n in small.refit)
