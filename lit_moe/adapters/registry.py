"""Which families lit-moe knows, and the adapter of each."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedConfig, PreTrainedModel

from lit_moe.adapters.base import MoEAdapter, Traits
from lit_moe.adapters.config_keys import expert_keys, walk
from lit_moe.adapters.dbrx import DbrxAdapter
from lit_moe.adapters.deepseek_v2 import DeepseekV2Adapter
from lit_moe.adapters.deepseek_v4 import DeepseekV4Adapter
from lit_moe.adapters.diffusion_gemma import DiffusionGemmaAdapter
from lit_moe.adapters.gemma4 import Gemma4Adapter
from lit_moe.adapters.jetmoe import JetMoeAdapter
from lit_moe.adapters.llama4 import Llama4Adapter
from lit_moe.adapters.longcat import LongcatAdapter
from lit_moe.adapters.phimoe import PhimoeAdapter
from lit_moe.adapters.site import MoESite
from lit_moe.adapters.switch import SwitchAdapter
from lit_moe.adapters.unknown import UnknownAdapter
from lit_moe.adapters.vmoe import VMoEAdapter
from lit_moe.adapters.zaya import ZayaAdapter
from lit_moe.errors import NotAnMoEError, UnsupportedModelError

SOFTMAX = Traits("softmax", renormalised=True)
SOFTMAX_PLAIN = Traits("softmax", renormalised=False)
SOFTMAX_FLAG = Traits("softmax", renormalised="norm_topk_prob")
SOFTMAX_GROUPS = Traits("softmax", renormalised="norm_topk_prob", group_score="top2")
GROUP_MAX = Traits("softmax", renormalised=False, group_score="max")
SIGMOID = Traits("sigmoid", renormalised=True)
SIGMOID_PLAIN = Traits("sigmoid", renormalised=False)
SIGMOID_FLAG = Traits("sigmoid", renormalised="norm_topk_prob")
SIGMOID_JOINT = Traits("sigmoid", renormalised=None)
DEEPSEEK = Traits("sigmoid", renormalised="norm_topk_prob", group_score="top2")
CUSTOM = Traits("custom", renormalised=True)

TABLE: dict[str, MoEAdapter] = {
    "afmoe": MoEAdapter(SIGMOID),
    "aria_text": MoEAdapter(SOFTMAX),
    "axk1": MoEAdapter(DEEPSEEK),
    "axk2": MoEAdapter(DEEPSEEK),
    "bailing_hybrid": MoEAdapter(DEEPSEEK),
    "beam": MoEAdapter(DEEPSEEK),
    "cohere2_moe": MoEAdapter(SOFTMAX),
    "dbrx": DbrxAdapter(SOFTMAX),
    "deepseek_ocr2_text": DeepseekV2Adapter(GROUP_MAX),
    "deepseek_v2": DeepseekV2Adapter(GROUP_MAX),
    "deepseek_v3": MoEAdapter(DEEPSEEK),
    "deepseek_v32": MoEAdapter(DEEPSEEK),
    "deepseek_v4": DeepseekV4Adapter(CUSTOM),
    "diffusion_gemma_text": DiffusionGemmaAdapter(SOFTMAX),
    "dots1": MoEAdapter(DEEPSEEK),
    "dots3_note_text": MoEAdapter(DEEPSEEK),
    "ernie4_5_moe": MoEAdapter(SOFTMAX),
    "ernie4_5_vl_moe_text": MoEAdapter(SOFTMAX),
    "exaone_moe": MoEAdapter(DEEPSEEK),
    "flex_olmo": MoEAdapter(SOFTMAX_FLAG),
    "flint": MoEAdapter(SIGMOID_FLAG),
    "gemma4_text": Gemma4Adapter(SOFTMAX),
    "glm4_moe": MoEAdapter(DEEPSEEK),
    "glm4_moe_lite": MoEAdapter(DEEPSEEK),
    "glm4v_moe_text": MoEAdapter(DEEPSEEK),
    "glm5_next_text": MoEAdapter(DEEPSEEK),
    "glm_moe_dsa": MoEAdapter(DEEPSEEK),
    "gpt_oss": MoEAdapter(SOFTMAX),
    "granitemoe": MoEAdapter(SOFTMAX),
    "granitemoe_swa": MoEAdapter(SOFTMAX),
    "granitemoehybrid": MoEAdapter(SOFTMAX),
    "granitemoeshared": MoEAdapter(SOFTMAX),
    "hunyuan_v1_moe": MoEAdapter(SOFTMAX),
    "hy_v3": MoEAdapter(SIGMOID),
    "hy_v4": MoEAdapter(DEEPSEEK),
    "inkling2_text": MoEAdapter(SIGMOID),
    "inkling_text": MoEAdapter(SIGMOID_JOINT),
    "jamba": MoEAdapter(SOFTMAX_PLAIN),
    "jetmoe": JetMoeAdapter(SOFTMAX),
    "kimi_linear": MoEAdapter(DEEPSEEK),
    "kolibri1": MoEAdapter(SIGMOID_FLAG),
    "laguna": MoEAdapter(SIGMOID),
    "lfm2_moe": MoEAdapter(SIGMOID_FLAG),
    "llama4_text": Llama4Adapter(SIGMOID_PLAIN),
    "longcat_flash": LongcatAdapter(SOFTMAX_PLAIN),
    "mellum": MoEAdapter(SOFTMAX_FLAG),
    "mimo_v2_flash": MoEAdapter(DEEPSEEK),
    "minimax": MoEAdapter(SOFTMAX),
    "minimax_m2": MoEAdapter(SIGMOID),
    "minimax_m3_vl_text": MoEAdapter(SIGMOID),
    "mistral4": MoEAdapter(SOFTMAX_GROUPS),
    "mistral_large4_text": MoEAdapter(Traits("softmax", True, "top2")),
    "mixtral": MoEAdapter(SOFTMAX),
    "muse_spark_text": MoEAdapter(SIGMOID),
    "nemotron_h": MoEAdapter(DEEPSEEK),
    "olmoe": MoEAdapter(SOFTMAX_FLAG),
    "openai_privacy_filter": MoEAdapter(SOFTMAX),
    "phimoe": PhimoeAdapter(Traits("custom", renormalised=None)),
    "qwen2_moe": MoEAdapter(SOFTMAX_FLAG),
    "qwen3_5_moe_text": MoEAdapter(SOFTMAX),
    "qwen3_moe": MoEAdapter(SOFTMAX_FLAG),
    "qwen3_next": MoEAdapter(SOFTMAX_FLAG),
    "qwen3_omni_moe_text": MoEAdapter(SOFTMAX),
    "qwen3_vl_moe_text": MoEAdapter(SOFTMAX),
    "qwen4_exp_text": MoEAdapter(SOFTMAX_FLAG),
    "solar_open": MoEAdapter(DEEPSEEK),
    "step3p5": MoEAdapter(SIGMOID),
    "switch_transformers": SwitchAdapter(SOFTMAX_PLAIN),
    "unlimited_ocr_text": DeepseekV2Adapter(GROUP_MAX),
    "lit_vmoe": VMoEAdapter(SOFTMAX_PLAIN),
    "zaya": ZayaAdapter(SOFTMAX_PLAIN),
}
"""model_type -> adapter: the families that the tests run. One line adds a family."""

REFUSED = {
    "nllb-moe": "transformers 5.23 computes its experts wrongly (only experts 0 and 1 ever run)",
    "doge": "its experts are single neurons found by product keys, not experts behind a router",
    "vitpose": "its experts belong to data sets and are chosen by the caller, not by a router",
    "vitpose_backbone": "its experts belong to data sets and are chosen by the caller, "
    "not by a router",
}
"""model_type -> why a model with something called experts cannot be pruned by lit-moe."""


def adapter_for(config: PreTrainedConfig) -> MoEAdapter:
    """Return the adapter of a model's family.

    A family outside the table gets an adapter that first tests itself on a small copy of the
    model (see ``adapters/unknown.py``).

    Raises:
        NotAnMoEError: if the config counts no experts.
        UnsupportedModelError: if the family is known not to work.
    """
    for _, part in walk(config):
        if part.model_type in REFUSED:
            raise UnsupportedModelError(
                f"{part.model_type} is not supported: {REFUSED[part.model_type]}"
            )
    keys = expert_keys(config)
    if not keys:
        raise NotAnMoEError(
            f"{config.model_type} is a dense model: its config does not count experts"
        )
    for model_type in (*(key.owner(config).model_type for key in keys), config.model_type):
        if model_type in TABLE:
            return TABLE[model_type]
    return UnknownAdapter()


def find_sites(model: PreTrainedModel) -> tuple[MoESite, ...]:
    """Return the MoE layers of a model in module order.

    Raises:
        NotAnMoEError: if the model is dense.
        UnsupportedModelError: if it has experts that cannot be observed or removed correctly.
        TypeError: if the model is wrapped (DDP, DeepSpeed engine, LightningModule).
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"expected a transformers model, got {type(model).__name__}; pass the model inside"
        )
    return adapter_for(model.config).sites(model)


def count_experts(sites: Sequence[MoESite]) -> dict[str, int]:
    """Return MoE layer name -> number of routed experts."""
    return {site.name: site.num_experts for site in sites}
