"""Misspelt fields of ``architecture`` are refused, others taken."""

import pytest

from lit_moe.errors import LitMoEError
from lit_moe.models.causal_lm import build_model
from lit_moe.testing.vision import TINY

MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "vocab_size": 64,
}
VMOE = {**TINY, "model_type": "lit_vmoe"}


@pytest.mark.parametrize(
    ("fields", "wrong", "nearest"),
    [
        ({**VMOE, "num_expert": 4}, "num_expert", "num_experts"),
        ({**VMOE, "eval_capacity_facter": 2.0}, "eval_capacity_facter", "eval_capacity_factor"),
        ({**VMOE, "num_member": 2}, "num_member", "num_members"),
        ({**MIXTRAL, "num_locl_experts": 8}, "num_locl_experts", "num_local_experts"),
        ({**VMOE, "num_label": 3}, "num_label", "num_labels"),
    ],
)
def test_a_misspelt_field_is_refused_with_the_nearest(fields, wrong, nearest):
    words = f"field '{wrong}', which .* does not know; the nearest that it knows is '{nearest}'$"
    with pytest.raises(LitMoEError, match=words):
        build_model("embedded", architecture=fields)


def test_a_misspelt_field_of_an_inner_config_is_refused():
    inner = {"model_type": "qwen3_vl_moe", "text_config": {"num_expert": 4}}
    with pytest.raises(LitMoEError, match="'num_expert', which Qwen3VLMoeTextConfig .*'num_exp"):
        build_model("embedded", architecture=inner)


@pytest.mark.parametrize(
    "more",
    [
        {"rope_theta": 500.0},  # an older name, moved to another place
        {"torch_dtype": "float32"},
        {"num_experts": 2},  # another name of num_local_experts
        {"head_dim": 16},
        {"attn_implementation": "eager"},
        {"num_labels": 3},
        {"moe_intermediate_size": 8},  # another word, of other families
    ],
)
def test_other_names_of_what_is_read_are_taken(more):
    model = build_model("embedded", architecture={**MIXTRAL, **more})
    if "rope_theta" in more:
        assert model.config.rope_parameters["rope_theta"] == 500.0
    if "num_experts" in more:
        assert model.config.num_local_experts == 2
    if "head_dim" in more:
        assert model.model.layers[0].self_attn.q_proj.weight.shape == (64, 32)


def test_members_by_their_other_name_are_taken():
    model = build_model("embedded", architecture={**VMOE, "num_members": 2})
    assert model.config.n_group == 2
