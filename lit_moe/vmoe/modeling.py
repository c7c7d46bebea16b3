"""The V-MoE itself: its layers and a classifier; an ensemble of them (E3) as a setting.

B images, S tokens per image, H hidden, M images of all members.
"""

from __future__ import annotations

import inspect
import math
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.vit.modeling_vit import ViTAttention, ViTEmbeddings, ViTLayer
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from lit_moe.vmoe.block import VMoELayer
from lit_moe.vmoe.configuration import VMoEConfig
from lit_moe.vmoe.experts import VMoEExperts
from lit_moe.vmoe.router import VMoERouter

REMOTE_FILE = "modeling_lit_vmoe.py"
"""Name of the copy of this code in every saved folder."""
SOURCES = ("configuration.py", "routing.py", "router.py", "experts.py", "block.py", "modeling.py")
"""The files that the copy is made of, each behind those that it needs."""


class VMoEPreTrainedModel(PreTrainedModel):
    """What transformers must know of all V-MoE classes."""

    config: VMoEConfig
    config_class = VMoEConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    builds_per_layer = True
    """Layers with different numbers of experts need no help to be loaded."""
    input_modalities: Any = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules: Any = ("ViTEmbeddings", "ViTLayer", "VMoELayer")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_record_outputs: Any = {  # noqa: RUF012 - as transformers declares it
        "hidden_states": ViTLayer,
        "attentions": ViTAttention,
    }
    _input_embed_layer = "patch_embeddings"

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for the experts' decorator in this file alone.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        deviation = self.config.initializer_range
        if isinstance(module, ViTEmbeddings):
            init.trunc_normal_(module.position_embeddings, mean=0.0, std=deviation)
            init.trunc_normal_(module.cls_token, mean=0.0, std=deviation)
        elif isinstance(module, VMoERouter):
            init.normal_(module.weight, mean=0.0, std=deviation)
        elif isinstance(module, VMoEExperts):
            for name, parameter in module.named_parameters():
                if name.endswith("bias"):
                    init.zeros_(parameter)
                else:
                    init.normal_(parameter, mean=0.0, std=deviation)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as any model, with the code to load it where nobody knows it."""
        module = REMOTE_FILE.removesuffix(".py")
        self.config.auto_map = {
            "AutoConfig": f"{module}.VMoEConfig",
            "AutoModelForImageClassification": f"{module}.VMoEForImageClassification",
        }
        super().save_pretrained(save_directory, *args, **kwargs)
        Path(save_directory, REMOTE_FILE).write_text(source_code(), encoding="utf-8")


class VMoEModel(VMoEPreTrainedModel):
    """Embeddings, layers, last norm."""

    def __init__(self, config: VMoEConfig) -> None:
        super().__init__(config)
        self.embeddings = ViTEmbeddings(config)
        sparse = set(config.moe_layers or ())
        self.first_sparse = min(sparse)
        self.layers = nn.ModuleList(
            VMoELayer(config, i) if i in sparse else ViTLayer(config)
            for i in range(config.num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.num_members = config.n_group
        self.post_init()

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs(tie_last_hidden_states=False)  # type: ignore[untyped-decorator]
    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutput:
        """Return the last hidden states ``(B, S, H)``, for an ensemble member by member."""
        interpolate = bool(kwargs.get("interpolate_pos_encoding"))
        dtype = self.embeddings.patch_embeddings.projection.weight.dtype
        hidden = self.embeddings(pixel_values.to(dtype), interpolate_pos_encoding=interpolate)
        for i, layer in enumerate(self.layers):
            if i == self.first_sparse and self.num_members > 1:
                hidden = hidden.repeat(self.num_members, 1, 1)
            hidden = layer(hidden)
        return BaseModelOutput(last_hidden_state=self.layernorm(hidden))


class VMoEForImageClassification(VMoEPreTrainedModel):
    """A V-MoE with a linear classifier. The members of an ensemble average their probabilities."""

    def __init__(self, config: VMoEConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vit = VMoEModel(config)
        width = config.representation_size or config.hidden_size
        self.pre_logits = (
            nn.Linear(config.hidden_size, width) if config.representation_size else None
        )
        self.classifier = nn.Linear(width, int(config.num_labels or 0))
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: shape ``(B, channels, height, width)``.
            labels: class ids, shape ``(B,)``.
            **kwargs: ``interpolate_pos_encoding`` for images of another size, and what any model
                takes: ``output_hidden_states``, ``output_attentions``, ``return_dict``.

        Returns:
            ``logits (B, labels)`` and, with labels, ``loss``: cross-entropy (of an ensemble: mean
            over its members) and, in training, the auxiliary losses of the routers.
        """
        body = self.vit(pixel_values, **kwargs)
        hidden_BSH = body.last_hidden_state
        token = self.config.pooling == "token"
        pooled_MH = hidden_BSH[:, 0] if token else hidden_BSH.mean(dim=1)
        if self.pre_logits is not None:
            pooled_MH = torch.tanh(self.pre_logits(pooled_MH))
        logits_ML = self.classifier(pooled_MH)
        members = self.config.n_group
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_ML.float(), labels.repeat(members)) + self._auxiliary()
        return ImageClassifierOutput(
            loss=loss,
            logits=averaged(logits_ML, members),
            hidden_states=body.hidden_states,
            attentions=body.attentions,
        )

    def _auxiliary(self) -> Tensor | float:
        """Return the mean over MoE layers, and let go of it: a model with it cannot be copied."""
        routers = [module for module in self.modules() if isinstance(module, VMoERouter)]
        losses = [router.aux_loss for router in routers if router.aux_loss is not None]
        for router in routers:
            router.aux_loss = None
        return torch.stack(losses).mean() if losses else 0.0


def averaged(logits_ML: Tensor, num_members: int) -> Tensor:
    """Return the logarithm of the members' mean probabilities, ``(B, labels)``; alone, logits."""
    if num_members == 1:
        return logits_ML
    by_member = torch.log_softmax(logits_ML.float(), dim=-1).unflatten(0, (num_members, -1))
    return (by_member.logsumexp(dim=0) - math.log(num_members)).to(logits_ML.dtype)


def source_code() -> str:
    """Return the code of this model as one file; that of a saved copy is the copy itself."""
    own = Path(inspect.getfile(VMoEModel))
    if own.name == REMOTE_FILE:
        return own.read_text(encoding="utf-8")
    future = "from __future__ import annotations\n"
    parts = [own.with_name(name).read_text(encoding="utf-8") for name in SOURCES]
    bodies = [re.sub(r"(?m)^from lit_moe\S+ import (\([^)]*\)|.*)\n", "", p) for p in parts]
    code = "\n".join(body.partition(future)[2] for body in bodies)
    return f'"""V-MoE, written by lit-moe; needs torch and transformers."""\n\n{future}{code}'
