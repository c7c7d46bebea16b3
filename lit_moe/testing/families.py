"""One tiny configuration per supported family: the table that drives the family tests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lit_moe.testing import settings as s
from lit_moe.testing.settings import Settings

LOCAL, ROUTED, MOE = "num_local_experts", "n_routed_experts", "moe_num_experts"


@dataclass(frozen=True)
class FamilyCase:
    """How to build a tiny random model of one family.

    Attributes:
        config: config class in transformers.
        model: model class in transformers.
        experts: dotted config path of the expert count.
        settings: config values beside the common ones; nested for sub-configs.
        text: name of the sub-config that describes the language model, None if it is the config.
        inputs: what the model reads.
    """

    config: str
    model: str
    experts: str = "num_experts"
    settings: Settings = field(default_factory=dict)
    text: str | None = None
    inputs: Literal["causal", "seq2seq", "tokens", "diffusion"] = "causal"


def _lm(name: str, experts: str = "num_experts", **settings: Any) -> FamilyCase:
    return FamilyCase(f"{name}Config", f"{name}ForCausalLM", experts, settings)


def _part(name: str, experts: str = "num_experts", **settings: Any) -> FamilyCase:
    """Row of the language model inside a multimodal family."""
    return FamilyCase(f"{name}TextConfig", f"{name}ForCausalLM", experts, settings)


def _whole(
    name: str,
    experts: str = "num_experts",
    *,
    vision: Settings = s.VISION,
    top: Settings | None = None,
    model: str | None = None,
    **text: Any,
) -> FamilyCase:
    """Row of a multimodal family, run on text."""
    settings = {"text_config": text, "vision_config": vision, **(top or {})}
    model = model or f"{name}ForConditionalGeneration"
    return FamilyCase(f"{name}Config", model, f"text_config.{experts}", settings, "text_config")


FAMILIES: dict[str, FamilyCase] = {
    "afmoe": _lm("Afmoe", num_dense_layers=1),
    "aria": FamilyCase("AriaTextConfig", "AriaTextForCausalLM", MOE, {"moe_topk": 2}),
    "axk1": _lm("AXK1", ROUTED, **s.GROUPED, **s.SPARSE),
    "axk2": _lm("AXK2", ROUTED, **s.GROUPED, **s.SPARSE, **s.INDEXER),
    "bailing_hybrid": _lm("BailingHybrid", **s.GROUPED, **s.SPARSE, **s.HYBRID),
    "beam": _lm("Beam", **s.GROUPED, **s.SPARSE),
    "cohere2_moe": _lm("Cohere2Moe", **s.SPARSE),
    "dbrx": FamilyCase("DbrxConfig", "DbrxForCausalLM", "ffn_config.moe_num_experts", s.DBRX),
    "deepseek_ocr2": _whole("DeepseekOcr2", ROUTED, vision=s.OCR_VISION, **s.SPARSE),
    "deepseek_v2": _lm(
        "DeepseekV2", ROUTED, **s.GROUPED, **s.NO_DENSE, topk_method="group_limited_greedy"
    ),
    "deepseek_v3": _lm("DeepseekV3", ROUTED, **s.GROUPED, **s.DENSE_FIRST),
    "deepseek_v32": _lm("DeepseekV32", ROUTED, **s.GROUPED, **s.SPARSE, **s.INDEXER),
    "deepseek_v4": _lm("DeepseekV4", ROUTED, **s.HASHED, **s.INDEXER),
    "diffusion_gemma": FamilyCase(
        "DiffusionGemmaConfig",
        "DiffusionGemmaForBlockDiffusion",
        "text_config.num_experts",
        {"text_config": s.GEMMA, "vision_config": s.GEMMA_VISION, "canvas_length": 12},
        "text_config",
        "diffusion",
    ),
    "dots1": _lm("Dots1", ROUTED, n_shared_experts=1, **s.NO_DENSE),
    "dots3_note": _part("Dots3Note", ROUTED, **s.GROUPED, **s.SPARSE),
    "ernie4_5_moe": _lm("Ernie4_5_Moe", MOE, moe_k=2),
    "ernie4_5_vl_moe": _whole(
        "Ernie4_5_VLMoe",
        MOE,
        moe_k=2,
        moe_intermediate_size=[24, 16],
        **s.SPARSE,
        **s.rope(mrope_section=[1, 1, 2]),
    ),
    "exaone_moe": _lm("ExaoneMoe", **s.SPARSE),
    "flex_olmo": _lm("FlexOlmo"),
    "flint": _lm("Flint", **s.SHARED, mlp_only_layers=[]),
    "gemma4": _part("Gemma4", enable_moe_block=True, hidden_size_per_layer_input=0, **s.GEMMA),
    "glm4_moe": _lm("Glm4Moe", ROUTED, **s.NO_DENSE),
    "glm4_moe_lite": _lm("Glm4MoeLite", ROUTED, **s.LATENT, **s.SPARSE),
    "glm4v_moe": _whole(
        "Glm4vMoe",
        ROUTED,
        **s.NO_DENSE,
        **s.rope(partial_rotary_factor=1.0, mrope_section=[2, 1, 1]),
    ),
    "glm5_next": _whole(
        "Glm5Next",
        ROUTED,
        vision={**s.VISION, "projection_intermediate_size": 32},
        **{**s.LATENT, "qk_rope_head_dim": 0},
        **s.SPARSE,
        **s.INDEXER,
        **s.HYBRID,
        **s.KIMI_HEADS,
        index_kpool=4,
    ),
    "glm_moe_dsa": _lm("GlmMoeDsa", ROUTED, **s.LATENT, **s.SPARSE, **s.INDEXER),
    "gpt_oss": _lm("GptOss", LOCAL),
    "granitemoe": _lm("GraniteMoe", LOCAL),
    "granitemoe_swa": _lm("GraniteMoeSWA", LOCAL),
    "granitemoehybrid": _lm("GraniteMoeHybrid", LOCAL, **s.MAMBA, **s.HYBRID),
    "granitemoeshared": _lm("GraniteMoeShared", LOCAL, shared_intermediate_size=24),
    "hunyuan_v1_moe": _lm("HunYuanMoEV1", moe_topk=2),
    "hy_v3": _lm("HYV3", **s.SPARSE),
    "hy_v4": _lm("HYV4", ROUTED, **s.LATENT, **s.SPARSE),
    "inkling": _part("Inkling", ROUTED, **s.WINDOWED),
    "inkling2": _part("Inkling2", ROUTED, **s.WINDOWED, unpadded_vocab_size=64),
    "jamba": _lm("Jamba", attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8),
    "jetmoe": _lm("JetMoe", LOCAL, kv_channels=8),
    "kimi_linear": _lm("KimiLinear", **s.LATENT, **s.SPARSE, **s.HYBRID, **s.KIMI_HEADS),
    "kolibri1": _lm("Kolibri1", LOCAL, **s.SHARED),
    "laguna": _lm("Laguna", **s.SPARSE, **s.SHARED),
    "lfm2_moe": _lm("Lfm2Moe", num_dense_layers=1, layer_types=["conv", "full_attention"]),
    "llama4": _part("Llama4", LOCAL, intermediate_size_mlp=24),
    "longcat_flash": _lm("LongcatFlash", ROUTED, **s.LATENT, **s.LONGCAT),
    "mellum": _lm("Mellum", LOCAL),
    "mimo_v2_flash": _lm("MiMoV2Flash", ROUTED, **s.SPARSE),
    "minimax": _lm("MiniMax", LOCAL),
    "minimax_m2": _lm("MiniMaxM2", LOCAL),
    "minimax_m3_vl": _part("MiniMaxM3VL", LOCAL, **s.SPARSE),
    "mistral4": _lm(
        "Mistral4",
        ROUTED,
        **s.GROUPED,
        **s.NO_DENSE,
        **s.rope(llama_4_scaling_beta=0.1, original_max_position_embeddings=64),
    ),
    "mistral_large4": _whole("MistralLarge4", ROUTED, **s.GROUPED, **s.SPARSE, **s.INDEXER),
    "mixtral": _lm("Mixtral", LOCAL),
    "muse_spark": _whole("MuseSpark", LOCAL, top=s.MUSE, moe_hidden_size=16, **s.SPARSE),
    "nemotron_h": _lm("NemotronH", ROUTED, **s.NEMOTRON),
    "olmoe": _lm("Olmoe"),
    "openai_privacy_filter": FamilyCase(
        "OpenAIPrivacyFilterConfig",
        "OpenAIPrivacyFilterForTokenClassification",
        LOCAL,
        inputs="tokens",
    ),
    "phimoe": _lm("Phimoe", LOCAL),
    "qwen2_moe": _lm("Qwen2Moe", **s.SHARED),
    "qwen3_5_moe": _part("Qwen3_5Moe", **s.SHARED, **s.HYBRID, **s.DELTA),
    "qwen3_moe": _lm("Qwen3Moe", LOCAL),
    "qwen3_next": _lm("Qwen3Next", **s.SHARED, **s.HYBRID, **s.DELTA),
    "qwen3_omni_moe": _whole("Qwen3OmniMoeThinker", "num_experts", top=s.OMNI),
    "qwen3_vl_moe": _whole("Qwen3VLMoe", LOCAL),
    "qwen4_exp": _part("Qwen4Exp", **s.SHARED, **s.HYBRID, **s.DELTA, **s.QSA),
    "solar_open": _lm("SolarOpen", ROUTED),
    "step3p7": _whole("Step3p7", ROUTED, **s.SPARSE, share_expert_dim=24, sliding_window=8),
    "switch_transformers": FamilyCase(
        "SwitchTransformersConfig",
        "SwitchTransformersForConditionalGeneration",
        settings=s.SWITCH,
        inputs="seq2seq",
    ),
    "unlimited_ocr": _whole("UnlimitedOcr", ROUTED, vision=s.OCR_VISION),
    "zaya": _lm("Zaya", num_experts_per_tok=1, router_hidden_size=8),
    # The same language models inside their multimodal wholes: nested configs, other names on disk.
    "aria_multimodal": _whole("Aria", MOE, vision=s.ARIA_VISION, top=s.ARIA, moe_topk=2),
    "gemma4_multimodal": _whole(
        "Gemma4",
        vision=s.GEMMA_VISION,
        enable_moe_block=True,
        hidden_size_per_layer_input=0,
        **s.GEMMA,
    ),
    "inkling_multimodal": _whole(
        "Inkling", ROUTED, vision=s.INKLING_VISION, top=s.INKLING, **s.WINDOWED
    ),
    "llama4_multimodal": _whole("Llama4", LOCAL, vision=s.LLAMA_VISION, intermediate_size_mlp=24),
    "minimax_m3_vl_multimodal": _whole(
        "MiniMaxM3VL",
        LOCAL,
        model="MiniMaxM3SparseForConditionalGeneration",
        top={"projector_hidden_size": 32},
        **s.SPARSE,
    ),
    "qwen3_5_moe_multimodal": _whole("Qwen3_5Moe", **s.SHARED, **s.HYBRID, **s.DELTA),
    "qwen4_exp_multimodal": _whole("Qwen4Exp", **s.SHARED, **s.HYBRID, **s.DELTA, **s.QSA),
}
"""Name -> case; the name of the family's folder in transformers, maybe with ``_multimodal``."""
