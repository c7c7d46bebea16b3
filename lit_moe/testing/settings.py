"""Sizes of the tiny models, by what they are for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Settings = Mapping[str, Any]

COMMON: Settings = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Small enough for one core, large enough that routing differs from token to token."""

LATENT: Settings = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
"""Multi-head latent attention."""

GROUPED: Settings = {**LATENT, "n_group": 2, "topk_group": 1}
DENSE_FIRST: Settings = {"first_k_dense_replace": 1}
NO_DENSE: Settings = {"first_k_dense_replace": 0}
SPARSE: Settings = {"mlp_layer_types": ["dense", "sparse"]}
INDEXER: Settings = {"index_topk": 8, "index_n_heads": 2, "index_head_dim": 16}
HYBRID: Settings = {"layer_types": ["linear_attention", "full_attention"]}
SHARED: Settings = {"shared_expert_intermediate_size": 24}
MAMBA: Settings = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_expand": 2, "mamba_chunk_size": 8}
DELTA: Settings = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
VISION: Settings = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
OCR_VISION: Settings = {
    "sam_config": {
        "hidden_size": 32,
        "output_channels": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 64,
        "mlp_dim": 32,
        "downsample_channels": [16, 32],
    },
    "encoder_config": {**VISION, "vocab_size": 64, "num_key_value_heads": 2, "image_size": 28},
}
MUSE: Settings = {
    "audio_config": {
        "patch_sizes": [16],
        "hidden_sizes": [16],
        "depths": [1],
        "num_hidden_layers": 1,
        "out_hidden_size": 32,
    },
    "out_hidden_size": 32,
    "projector_hidden_size": 32,
}
OMNI: Settings = {
    # Read by the forward, but not declared by the config class.
    "vision_start_token_id": 63,
    "audio_config": {
        "d_model": 32,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "downsample_hidden_size": 16,
        "output_dim": 32,
    },
}
DBRX: Settings = {
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 64,
    "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_top_k": 2},
}
HASHED: Settings = {
    "mlp_layer_types": ["hash_moe", "moe"],
    "q_lora_rank": 16,
    "o_groups": 2,
    "o_lora_rank": 8,
    "num_key_value_heads": 1,
}
WINDOWED: Settings = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "d_rel": 4,
    "rel_extent": 16,
}
LONGCAT: Settings = {
    "num_hidden_layers": 4,
    "moe_topk": 3,
    "zero_expert_num": 2,
    "ffn_hidden_size": 24,
    "expert_ffn_hidden_size": 24,
}
SWITCH: Settings = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "decoder_start_token_id": 0,
}
GEMMA: Settings = {
    "top_k_experts": 2,
    "global_head_dim": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
GEMMA_VISION: Settings = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "position_embedding_size": 64,
}
ARIA_VISION: Settings = {
    **VISION,
    "model_type": "idefics3_vision",
    "image_size": 28,
    "patch_size": 14,
}
ARIA: Settings = {"projector_patch_to_query_dict": {"4": 2}}
INKLING_VISION: Settings = {
    "text_hidden_size": 32,
    "hidden_size": 32,
    "n_layers": 1,
    "num_attention_heads": 2,
}
INKLING: Settings = {
    "audio_config": {"text_hidden_size": 32, "n_mel_bins": 8, "mel_vocab_size": 8},
}
LLAMA_VISION: Settings = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 28,
    "vision_output_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
}
NEMOTRON: Settings = {
    "layer_types": ["linear_attention", "moe", "full_attention", "moe"],
    "num_hidden_layers": 4,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "moe_shared_expert_intermediate_size": 24,
}
KIMI_HEADS: Settings = {"linear_head_dim": 8, "linear_num_heads": 4}
QSA: Settings = {
    "hc_lowrank": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}


def rope(**settings: Any) -> Settings:
    """Return rotary parameters, for families whose defaults do not fit a tiny head."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **settings}}
