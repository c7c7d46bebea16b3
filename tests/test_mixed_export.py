"""Models whose routers mix: what is written, who can load it, how a run with one goes on."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, MixtralForCausalLM

from lit_moe.adapters import find_sites
from lit_moe.errors import ExportError
from lit_moe.export import export, load
from lit_moe.merge_plan import MergePlan
from lit_moe.merging import merge
from lit_moe.mixing import mixed_layers
from lit_moe.testing import example_inputs, tiny_moe

FAMILIES = ("mixtral", "gpt_oss", "ernie4_5_moe", "glm4_moe", "qwen3_next")


def mixed_model(family, counts=(4,)):
    model = tiny_moe(family)
    generator = torch.Generator().manual_seed(1)
    maps = {}
    for i, site in enumerate(find_sites(model)):
        count = counts[i % len(counts)]
        noise = torch.randn(count, site.num_experts, generator=generator)
        maps[site.name] = torch.eye(site.num_experts)[-count:] + 0.1 * noise
    plan = MergePlan(maps, maps, router_space="probabilities")
    merge(model, plan)
    return model, plan


@torch.no_grad()
def logits_of(model):
    return model(**example_inputs(model)).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_our_loader_and_the_remote_code_give_the_model_in_memory(family, tmp_path):
    model, plan = mixed_model(family)
    result = export(model, tmp_path / "out", plan=plan)
    assert (result.layout, result.max_abs_logit_difference) == ("mixed_routers", 0.0)
    again = load(tmp_path / "out")
    assert torch.equal(logits_of(again), logits_of(model))
    assert mixed_layers(again) == mixed_layers(model)
    remote = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(logits_of(remote.eval()), logits_of(model))


def test_the_remote_code_needs_no_lit_moe(tmp_path):
    model, plan = mixed_model("mixtral")
    export(model, tmp_path / "out", plan=plan)
    inputs = example_inputs(model)
    torch.save((inputs, logits_of(model)), tmp_path / "expected.pt")
    script = f"""
import sys
from typing import Any
sys.modules["lit_moe"] = None
import torch
from transformers import AutoModelForCausalLM
inputs, expected = torch.load({str(tmp_path / "expected.pt")!r})
folder = {str(tmp_path / "out")!r}
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, expected)
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "equal" in done.stdout, done.stderr


def test_plain_transformers_loads_a_likeness(tmp_path):
    model, plan = mixed_model("mixtral")
    export(model, tmp_path / "out", plan=plan)
    loaded: Any = MixtralForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    plain, info = loaded
    assert not info["missing_keys"]
    assert {key.rpartition(".")[2] for key in info["unexpected_keys"]} == {
        "mixed_weight",
        "expert_mix",
    }
    assert not torch.equal(logits_of(plain.eval()), logits_of(model))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Routers choose by mixed probabilities" in card
    assert "trust_remote_code=True" in card


def test_layers_may_differ_and_mix_at_once(tmp_path):
    model, plan = mixed_model("mixtral", counts=(3, 5))
    result = export(model, tmp_path / "out", plan=plan)
    assert result.layout == "per_layer_config"
    assert torch.equal(logits_of(load(tmp_path / "out")), logits_of(model))


def test_padding_is_refused(tmp_path):
    model, plan = mixed_model("glm4_moe")
    with pytest.raises(ExportError, match="mix probabilities"):
        export(model, tmp_path / "out", plan=plan, layout="padded")


def test_an_export_of_an_export_is_the_same(tmp_path):
    model, plan = mixed_model("mixtral")
    export(model, tmp_path / "one", plan=plan)
    export(load(tmp_path / "one"), tmp_path / "two", plan=plan)
    assert torch.equal(logits_of(load(tmp_path / "two")), logits_of(model))
