"""``lit-moe inspect`` on the full-size default config of every family, from config.json alone."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import pytest
import transformers
from rich.console import Console

from lit_moe.errors import LitMoEError, NotAnMoEError, UnsupportedModelError
from lit_moe.inspection import inspect_model, render
from lit_moe.testing import FAMILIES


class Incomplete(NamedTuple):
    """Defaults that are no MoE model, or no model at all, and the least that makes them one."""

    error: type[LitMoEError]
    message: str
    settings: dict[str, Any]


DENSE = (NotAnMoEError, "is a dense model")
GEMMA = {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704}
QWEN_INDEXER = {
    "indexer_n_heads": 16,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 2048,
    "indexer_compress_ratio": 4,
}
INCOMPLETE = {
    # The attention reads rope_theta, which its own config class does not declare.
    "dbrx": Incomplete(LitMoEError, "rope_theta", {"attn_config": {"rope_theta": 5e5}}),
    # No layer types, and no number of active experts.
    "deepseek_ocr2": Incomplete(
        LitMoEError,
        "cannot be built",
        {
            "text_config": {
                "mlp_layer_types": ["dense"] + ["sparse"] * 31,
                "num_experts_per_tok": 6,
            }
        },
    ),
    # No number of active experts.
    "deepseek_v2": Incomplete(
        UnsupportedModelError, "does not say how many experts act", {"num_experts_per_tok": 6}
    ),
    # No experts at all.
    "diffusion_gemma": Incomplete(*DENSE, {"text_config": GEMMA}),
    "dots1": Incomplete(
        *DENSE, {"n_routed_experts": 128, "num_experts_per_tok": 6, "n_shared_experts": 2}
    ),
    "gemma4": Incomplete(*DENSE, {"enable_moe_block": True, **GEMMA}),
    "gemma4_multimodal": Incomplete(*DENSE, {"text_config": {"enable_moe_block": True, **GEMMA}}),
    # One expert, and no size of an attention head.
    "hunyuan_v1_moe": Incomplete(*DENSE, {"num_experts": 16, "moe_topk": 2, "head_dim": 128}),
    # No layer types.
    "lfm2_moe": Incomplete(
        LitMoEError,
        "cannot be built",
        {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    ),
    # No sizes of the indexer.
    "qwen4_exp": Incomplete(LitMoEError, "cannot be built", QWEN_INDEXER),
    "qwen4_exp_multimodal": Incomplete(
        LitMoEError, "cannot be built", {"text_config": QWEN_INDEXER}
    ),
}


def saved(name, folder, settings=None):
    """Write the config.json of a full-size model and return its config."""
    case = FAMILIES[name]
    config = getattr(transformers, case.config)(**(settings or {}))
    config.architectures = [case.model]
    config.save_pretrained(folder)
    return config


def shown(inspection):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(inspection))
    console.file.close()
    return console.export_text()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_full_size_model_of_a_family_is_described(name, tmp_path):
    missing = INCOMPLETE.get(name)
    config = saved(name, tmp_path, missing.settings if missing else None)
    found = inspect_model(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (found.family, found.architecture) == (config.model_type, FAMILIES[name].model)
    num_experts = functools.reduce(getattr, FAMILIES[name].experts.split("."), config)
    for layer in found.layers:
        assert layer.num_experts == num_experts > 1
        assert layer.legal_counts[-1] == num_experts
        assert 1 <= layer.top_k <= layer.legal_counts[0]
        assert all(count % layer.num_groups == 0 for count in layer.legal_counts)
    check_sizes(name, found)
    assert all(f"{kept:.0%}" in shown(found) for kept in (0.75, 0.5, 0.25))


def check_sizes(name, found):
    """Every part is recognised, and the numbers agree with each other."""
    parts = {part: size.parameters for part, size in found.parts.items()}
    buffers = sum(parts.values()) - found.parameters
    assert 0 <= buffers < 0.001 * found.parameters
    assert {"embeddings", "attention", "routed experts", "routers"} <= set(parts)
    if FAMILIES[name].text is None:
        assert parts["other"] < 0.01 * found.parameters
    idle = found.parameters - found.active_parameters
    layer = found.layers[0]
    if name == "longcat_flash":  # its identity experts have rows in one matrix, never used
        assert idle == parts["routed experts"] - 28 * 12 * 3 * 6144 * 2048
    else:
        assert idle * layer.num_experts == parts["routed experts"] * (
            layer.num_experts - layer.top_k
        )
    left = [saving.parameters for saving in found.savings]
    assert found.parameters > left[0] >= left[1] >= left[2]


@pytest.mark.parametrize("name", sorted(INCOMPLETE))
def test_defaults_that_are_no_moe_model_are_said_to_be_so(name, tmp_path):
    missing = INCOMPLETE[name]
    saved(name, tmp_path)
    with pytest.raises(missing.error, match=missing.message):
        inspect_model(tmp_path)
