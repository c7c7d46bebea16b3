from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import lit_moe.export
from lit_moe.adapters import count_experts, find_sites
from lit_moe.checkpoints import load
from lit_moe.errors import ExportError, LitMoEError
from lit_moe.export import export
from lit_moe.export.padding import DEAD_BIAS
from lit_moe.plan import KeepPlan
from lit_moe.report import RunReport
from lit_moe.surgery import shrink
from lit_moe.testing import example_inputs, tiny_moe
from tests.pruned import pruned

FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss")
WITH_BIAS = ("deepseek_v3", "gpt_oss", "minimax_m2", "glm4_moe", "afmoe", "nemotron_h")


def plain_load(folder):
    load_with_info: Any = AutoModelForCausalLM.from_pretrained
    model, info = load_with_info(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model


@torch.no_grad()
def logits(model):
    return model(**example_inputs(model)).logits


def stored(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uniform_export_reloads_with_plain_transformers_to_equal_logits(family, dtype, tmp_path):
    model, plan = pruned(family, dtype=dtype)
    result = export(model, tmp_path / "out", plan=plan)
    assert result.layout == "plain"
    assert result.max_abs_logit_difference == 0.0
    if dtype == torch.float32:
        assert torch.equal(logits(plain_load(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_export_has_the_keys_of_its_family(family, tmp_path):
    model, _ = pruned(family)
    export(model, tmp_path / "out")
    tiny_moe(family, num_experts=4, num_hidden_layers=3).save_pretrained(tmp_path / "stock")
    shapes, expected = (
        {k: v.shape for k, v in stored(tmp_path / n).items()} for n in ("out", "stock")
    )
    assert shapes == expected
    config, stock = (
        json.loads((tmp_path / n / "config.json").read_text()) for n in ("out", "stock")
    )
    assert config == stock


@pytest.mark.parametrize(
    ("family", "bias"), [("deepseek_v3", "correction_bias"), ("gpt_oss", "router.bias")]
)
def test_selection_and_router_biases_are_stored_in_float32(family, bias, tmp_path):
    model, _ = pruned(family, dtype=torch.bfloat16)
    export(model, tmp_path / "out")
    tensors = stored(tmp_path / "out")
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    assert {dtype for name, dtype in dtypes.items() if bias in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if bias not in name} == {torch.bfloat16}


def test_a_selection_bias_finer_than_bfloat16_survives(tmp_path):
    model, _ = pruned("deepseek_v3", dtype=torch.bfloat16)
    gate = model.model.layers[1].mlp.gate
    gate.e_score_correction_bias = gate.e_score_correction_bias.float() + 1e-5
    export(model, tmp_path / "out")
    reloaded = plain_load(tmp_path / "out").model.layers[1].mlp.gate.e_score_correction_bias
    assert torch.equal(reloaded, gate.e_score_correction_bias)


@pytest.mark.parametrize("family", FAMILIES)
def test_uneven_export_reloads_with_our_loader_and_can_be_exported_again(family, tmp_path):
    model, plan = pruned(family, uneven=True)
    result = export(model, tmp_path / "out", plan=plan)
    assert result.layout == "per_layer_config"
    assert result.max_abs_logit_difference == 0.0
    reloaded = load(tmp_path / "out")
    assert torch.equal(logits(reloaded), logits(model))
    assert export(reloaded, tmp_path / "again").max_abs_logit_difference == 0.0
    assert stored(tmp_path / "again").keys() == stored(tmp_path / "out").keys()


def test_uneven_export_is_refused_by_plain_transformers_instead_of_read_wrongly(tmp_path):
    model, _ = pruned("mixtral", uneven=True)
    export(model, tmp_path / "out")
    with pytest.raises(RuntimeError, match="per-layer attribute"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)


def test_loading_an_uneven_export_leaves_no_trace_in_transformers(tmp_path):
    from transformers.models.mixtral import modeling_mixtral

    before = modeling_mixtral.MixtralDecoderLayer.__init__
    model, _ = pruned("mixtral", uneven=True)
    export(model, tmp_path / "out")
    config = load(tmp_path / "out").config
    assert modeling_mixtral.MixtralDecoderLayer.__init__ is before
    assert "allow_global_per_layer_attribute_access" not in vars(config)


REMOTE = """
import sys
sys.modules["lit_moe"] = None  # importing it fails
import torch
from transformers import AutoModelForCausalLM
folder, inputs, answers, resaved = sys.argv[1:]
model, info = AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, output_loading_info=True
)
assert not any(info.values()), info
batch = torch.load(inputs)
with torch.no_grad():
    torch.save(model(**batch).logits, answers)
assert model.generate(**batch, max_new_tokens=2, do_sample=False).shape[1] == 14
model.save_pretrained(resaved)
"""


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h", "zaya"])
def test_uneven_export_loads_without_lit_moe_in_a_fresh_process(family, tmp_path):
    model, _ = pruned(family, uneven=True)
    export(model, tmp_path / "out")
    torch.save(example_inputs(model), tmp_path / "inputs.pt")
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    arguments = [tmp_path / name for name in ("out", "inputs.pt", "logits.pt", "resaved")]
    script = [sys.executable, "-I", "-c", REMOTE, *map(str, arguments)]
    subprocess.run(script, check=True, env=environment, cwd=tmp_path, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(model))
    assert stored(tmp_path / "resaved").keys() == stored(tmp_path / "out").keys()


@pytest.mark.parametrize("family", WITH_BIAS)
def test_padded_export_reloads_with_plain_transformers_to_equal_logits(family, tmp_path):
    model, plan = pruned(family, uneven=True)
    result = export(model, tmp_path / "out", plan=plan, layout="padded")
    assert result.layout == "padded"
    reloaded = plain_load(tmp_path / "out")
    torch.testing.assert_close(logits(reloaded), logits(model), rtol=0, atol=1e-5)
    lowest = min(t.min() for n, t in stored(tmp_path / "out").items() if n.endswith("bias"))
    assert lowest == DEAD_BIAS


@pytest.mark.parametrize(
    ("family", "reason"),
    [("mixtral", "no bias"), ("qwen3_moe", "no bias"), ("ernie4_5_moe", "softmax")],
)
def test_padding_is_refused_where_it_would_not_be_exact(family, reason, tmp_path):
    model, _ = pruned(family, uneven=True)
    with pytest.raises(ExportError, match=f"cannot be exported padded.*{reason}"):
        export(model, tmp_path / "out", layout="padded")
    assert not list(tmp_path.iterdir())


def test_a_family_that_builds_all_layers_alike_is_refused_when_uneven(tmp_path):
    model, _ = pruned("openai_privacy_filter", uneven=True)
    with pytest.raises(ExportError, match="keep the same number in all"):
        export(model, tmp_path / "out")


def test_export_leaves_model_and_random_state_as_they_were(tmp_path):
    model, plan = pruned("deepseek_v3", uneven=True, dtype=torch.bfloat16)
    model.train()
    model.model.layers[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    export(model, tmp_path / "out", plan=plan, layout="padded")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert [module.training for module in model.modules()] == modes
    after = model.state_dict()
    assert all(torch.equal(after[n], t) and after[n].dtype == t.dtype for n, t in before.items())


def test_an_export_that_differs_from_memory_is_refused_and_removed(tmp_path):
    model, _ = pruned("mixtral")
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 1  # the config still says 2
    with pytest.raises(ExportError, match="is not the model in memory: logits differ"):
        export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_folder_carries_plan_report_tokenizer_and_model_card(tmp_path, checkpoint):
    from transformers import AutoTokenizer

    model, plan = pruned("mixtral", vocab_size=1024)
    report = RunReport.start(source="mistralai/Mixtral-8x7B-v0.1", family="mixtral", seed=1)
    report.criterion = "reap"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    out = tmp_path / "out"
    export(model, out, plan=plan, report=report.to_dict(), tokenizer=tokenizer)
    assert KeepPlan.load(out / "lit_moe_plan.json") == plan
    written = RunReport.from_dict(json.loads((out / "report.json").read_text()))
    assert written.export is not None
    assert written.export.path == str(out)
    assert written.export.max_abs_logit_difference == 0.0
    card = (out / "README.md").read_text()
    assert "base_model: mistralai/Mixtral-8x7B-v0.1" in card
    assert "12 of 24 routed experts (50%) stay chosen by the criterion `reap`" in card
    assert AutoTokenizer.from_pretrained(out)("the").input_ids == tokenizer("the").input_ids


def test_the_package_itself_can_be_called(tmp_path):
    result = lit_moe.export(tiny_moe("mixtral"), tmp_path / "out", verify=False)
    assert result.max_abs_logit_difference is None
    with pytest.raises(LitMoEError, match="export target"):
        lit_moe.export(tiny_moe("mixtral"), tmp_path / "out")


def test_a_model_that_came_as_remote_code_is_exported_as_the_stock_class(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache")
    )
    monkeypatch.syspath_prepend(str(tmp_path / "cache"))
    export(pruned("mixtral", uneven=True)[0], tmp_path / "uneven")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "uneven", trust_remote_code=True)
    assert type(model).__name__ == "PerLayerMixtralForCausalLM"
    again = export(model, tmp_path / "again")
    assert again.layout == "per_layer_config"
    sites = find_sites(model)
    shrink(model, KeepPlan({s.name: (0, 1, 2) for s in sites}, count_experts(sites)))
    assert export(model, tmp_path / "even").layout == "plain"
    assert type(plain_load(tmp_path / "even")).__name__ == "MixtralForCausalLM"
    assert not (tmp_path / "even" / "modeling_lit_moe.py").exists()
