"""The V-MoE itself: router, experts, layers, classifier; an ensemble of them (E3) as a setting.

T tokens, H hidden, R router rows, E experts, K rows per token, S slots (token and expert).
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
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation
from transformers.modeling_outputs import BaseModelOutput, ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel
from transformers.models.vit.modeling_vit import ViTEmbeddings, ViTLayer

from lit_moe.vmoe.configuration import VMoEConfig
from lit_moe.vmoe.routing import (
    capacity_of,
    choose_tokens,
    importance_loss,
    load_loss,
    only_own_rows,
    slots_with_room,
)

REMOTE_FILE = "modeling_lit_vmoe.py"
"""Name of the copy of this code in every saved folder."""
SMALL = 2**18
"""Numbers in the inputs of all slots, up to which one product of padded stacks is the quickest."""


class VMoERouter(nn.Module):
    """Logits of all rows, and which rows (or tokens) are chosen with which gates."""

    def __init__(self, config: VMoEConfig, num_experts: int, num_null: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.top_k = config.num_experts_per_tok
        self.num_members = config.n_group
        self.tokens_per_expert = config.tokens_per_expert
        self.chooses_tokens = config.router_type == "expert_choice"
        self.noise = config.router_noise
        self.loss_weights = (config.importance_loss, config.load_loss)
        self.weight = nn.Parameter(torch.empty(num_experts + num_null, config.hidden_size))
        self.aux_loss: Tensor | None = None

    def forward(self, hidden_BSH: Tensor) -> tuple[Tensor, ...]:
        """Return logits ``(T, R)``, gates and rows ``(T, K)``.

        Under expert choice gates and rows are ``(S, 1)``, followed by the tokens ``(S,)``.
        """
        logits_BSR = F.linear(hidden_BSH.float(), self.weight.float())
        logits_TR = logits_BSR.reshape(-1, logits_BSR.shape[-1])
        if self.chooses_tokens:
            gates_S, rows_S, tokens_S = choose_tokens(logits_BSR, self.tokens_per_expert or 1)
            return logits_TR, gates_S[:, None].to(hidden_BSH.dtype), rows_S[:, None], tokens_S
        if self.num_members > 1:
            logits_TR = only_own_rows(logits_TR, self.num_experts, self.num_members)
        noisy_TR, top_k = self._noisy(logits_TR), min(self.top_k, logits_TR.shape[-1])
        self.aux_loss = self._auxiliary(logits_TR, noisy_TR) if self.training else None
        # Over a last dimension of a few numbers softmax is several times slower.
        probability_TR = torch.softmax(noisy_TR.T.contiguous(), dim=0).T
        gates_TK, rows_TK = torch.topk(probability_TR, top_k, dim=-1)
        return logits_TR, gates_TK.to(hidden_BSH.dtype), rows_TK

    def _noisy(self, logits_TR: Tensor) -> Tensor:
        if not self.training or not self.noise:
            return logits_TR
        return logits_TR + torch.randn_like(logits_TR) * (self.noise / logits_TR.shape[-1])

    def _auxiliary(self, logits_TR: Tensor, noisy_TR: Tensor) -> Tensor:
        importance, load = self.loss_weights
        total = logits_TR.new_zeros(())
        seen = (logits_TR > -torch.inf).any(dim=0)  # the others are masked
        if importance:
            total = total + importance * importance_loss(logits_TR[:, seen])
        top_k = min(self.top_k, int(seen.sum()) // self.num_members)
        if load and self.noise and top_k:
            deviation = self.noise / logits_TR.shape[-1]
            total = total + load * load_loss(
                logits_TR[:, seen], noisy_TR[:, seen], top_k, deviation
            )
        return total


@use_experts_implementation(has_gate=False, has_bias=True)
class VMoEExperts(nn.Module):
    """Two-layer MLPs with biases, stacked."""

    def __init__(self, config: VMoEConfig, num_experts: int) -> None:
        super().__init__()
        hidden, width = config.hidden_size, int(config.moe_intermediate_size or 0)
        self.num_experts = num_experts
        self.up_proj = nn.Parameter(torch.empty(num_experts, width, hidden))
        self.up_proj_bias = nn.Parameter(torch.empty(num_experts, width))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden, width))
        self.down_proj_bias = nn.Parameter(torch.empty(num_experts, hidden))
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_TH: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the sum over slots of gate times expert output, ``(T, H)``."""
        rows_S, weights_S1 = top_k_index.reshape(-1), top_k_weights.reshape(-1, 1)
        if top_k_index.shape[-1] == 1 and bool((rows_S[1:] >= rows_S[:-1]).all()):
            return self._run(hidden_TH, rows_S) * weights_S1
        rows_S, order_S = torch.sort(rows_S, stable=True)
        tokens_S = order_S // top_k_index.shape[-1]
        out_SH = self._run(hidden_TH.index_select(0, tokens_S), rows_S)
        out_SH = out_SH * weights_S1.index_select(0, order_S)
        return torch.zeros_like(hidden_TH).index_add_(0, tokens_S, out_SH)

    def _run(self, hidden_SH: Tensor, rows_S: Tensor) -> Tensor:
        """Return the output of each slot's expert, ``(S, H)``; slots are sorted by expert."""
        counts_E = torch.bincount(rows_S, minlength=self.num_experts)
        counts = counts_E.tolist()
        room = max(counts)
        if hidden_SH.numel() > SMALL or room * self.num_experts > 2 * len(rows_S):
            return self._run_one_by_one(hidden_SH, counts)
        # The first slot of expert e moves from place starts[e] to place e * room.
        shift_E = torch.arange(self.num_experts, device=rows_S.device) * room
        shift_E = shift_E - (counts_E.cumsum(0) - counts_E)
        places_S = torch.arange(len(rows_S), device=rows_S.device) + shift_E.index_select(0, rows_S)
        padded = hidden_SH.new_zeros(self.num_experts * room, hidden_SH.shape[-1])
        padded = padded.index_copy_(0, places_S, hidden_SH).unflatten(0, (self.num_experts, room))
        inner = torch.baddbmm(self.up_proj_bias[:, None], padded, self.up_proj.transpose(1, 2))
        down = self.down_proj.transpose(1, 2)
        outer = torch.baddbmm(self.down_proj_bias[:, None], self.act_fn(inner), down)
        return outer.flatten(0, 1).index_select(0, places_S)

    def _run_one_by_one(self, hidden_SH: Tensor, counts: list[int]) -> Tensor:
        own = (self.up_proj, self.up_proj_bias, self.down_proj, self.down_proj_bias)
        each = zip(hidden_SH.split(counts), *(weights.unbind() for weights in own), strict=True)
        return torch.cat(
            [F.linear(self.act_fn(F.linear(x, up, b)), down, c) for x, up, b, down, c in each]
        )


class VMoEBlock(nn.Module):
    """What stands in the place of an MLP. Slots without room or without expert give 0."""

    def __init__(self, config: VMoEConfig, layer_idx: int) -> None:
        super().__init__()
        own = config.per_layer_config[layer_idx]
        self.router = VMoERouter(config, own.num_experts, own.num_null_experts)
        self.experts = VMoEExperts(config, own.num_experts)
        self.num_members = config.n_group
        self.capacity_factors = (config.capacity_factor, config.eval_capacity_factor)
        self.batch_priority = config.batch_priority
        self.slot_tokens: Tensor | None = None

    def forward(self, hidden_BSH: Tensor) -> Tensor:
        """Return what the experts make of each token, ``(B, S, H)``.

        While the experts run, ``slot_tokens`` says which tokens they are given; None for all.
        """
        hidden_TH = hidden_BSH.reshape(-1, hidden_BSH.shape[-1])
        logits_TR, gates_TK, rows_TK, *chosen = self.router(hidden_BSH)
        if chosen:
            slots = (chosen[0], gates_TK[:, 0], rows_TK[:, 0])
        else:
            capacity = self._capacity(logits_TR, rows_TK)
            if capacity is None and bool(self._is_live(gates_TK, rows_TK).all()):
                return self.experts(hidden_TH, rows_TK, gates_TK).view_as(hidden_BSH)
            slots = self._slots(gates_TK, rows_TK, capacity)
        return self._combined(hidden_TH, *slots).view_as(hidden_BSH)

    def _is_live(self, gates: Tensor, rows: Tensor) -> Tensor:
        # A masked row can only be chosen where no other is left, with gate 0.
        return (rows < self.experts.num_experts) & (gates > 0)

    def _slots(
        self, gates_TK: Tensor, rows_TK: Tensor, capacity: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens, gates and rows of the slots with room, sorted by row."""
        by_gate = self.batch_priority and not self.training and capacity is not None
        priority_T = gates_TK[:, 0] if by_gate else None
        tokens_S, ranks_S, rows_S = slots_with_room(rows_TK, priority_T, capacity)
        places_S = tokens_S * rows_TK.shape[1] + ranks_S
        return tokens_S, gates_TK.reshape(-1).index_select(0, places_S), rows_S

    def _combined(
        self, hidden_TH: Tensor, tokens_S: Tensor, gates_S: Tensor, rows_S: Tensor
    ) -> Tensor:
        live_S = self._is_live(gates_S, rows_S)
        if not bool(live_S.all()):
            tokens_S, gates_S, rows_S = tokens_S[live_S], gates_S[live_S], rows_S[live_S]
        out_TH = torch.zeros_like(hidden_TH)
        if not len(tokens_S):
            return out_TH
        self.slot_tokens = tokens_S
        given_SH = hidden_TH.index_select(0, tokens_S)
        out_SH = self.experts(given_SH, rows_S[:, None], gates_S[:, None])
        self.slot_tokens = None
        return out_TH.index_add_(0, tokens_S, out_SH)

    def _capacity(self, logits_TR: Tensor, rows_TK: Tensor) -> int | None:
        """Return the tokens that each row serves; None for no limit."""
        factor = self.capacity_factors[0 if self.training else 1]
        if factor is None:
            return None
        # A masked row is -inf for all tokens of its member: it counts as if it were not there.
        first_MR = logits_TR[:: len(logits_TR) // self.num_members]
        num_rows = int((first_MR > -torch.inf).any(dim=0).sum())
        num_slots = len(rows_TK) * min(rows_TK.shape[1], num_rows)
        return capacity_of(num_slots, num_rows, factor)


class VMoELayer(ViTLayer):
    """A layer of ViT with experts in the place of its MLP."""

    def __init__(self, config: VMoEConfig, layer_idx: int) -> None:
        super().__init__(config)
        block: Any = VMoEBlock(config, layer_idx)
        self.mlp = block


class VMoEPreTrainedModel(PreTrainedModel):
    """What transformers must know of all V-MoE classes."""

    config: VMoEConfig
    config_class = VMoEConfig
    base_model_prefix = "vit"
    main_input_name = "pixel_values"
    builds_per_layer = True
    """Layers with different numbers of experts need no help to be loaded."""
    input_modalities: Any = ("image",)
    _no_split_modules: Any = ("ViTEmbeddings", "ViTLayer", "VMoELayer")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _input_embed_layer = "patch_embeddings"

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

    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Any
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: shape ``(B, channels, height, width)``.
            labels: class ids, shape ``(B,)``.
            **kwargs: ``interpolate_pos_encoding`` for images of another size.

        Returns:
            ``logits (B, labels)`` and, with labels, ``loss``: cross-entropy (of an ensemble: mean
            over its members) and, in training, the auxiliary losses of the routers.
        """
        kwargs.pop("return_dict", None)
        hidden_BSH = self.vit(pixel_values, **kwargs)[0]
        token = self.config.pooling == "token"
        pooled_MH = hidden_BSH[:, 0] if token else hidden_BSH.mean(dim=1)
        if self.pre_logits is not None:
            pooled_MH = torch.tanh(self.pre_logits(pooled_MH))
        logits_ML = self.classifier(pooled_MH)
        members = self.config.n_group
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_ML.float(), labels.repeat(members)) + self._auxiliary()
        return ImageClassifierOutput(loss=loss, logits=averaged(logits_ML, members))

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
    own = Path(inspect.getfile(VMoERouter))
    names = ("configuration.py", "routing.py", own.name)
    if own.name == REMOTE_FILE:
        return own.read_text(encoding="utf-8")
    future = "from __future__ import annotations\n"
    parts = [own.with_name(name).read_text(encoding="utf-8") for name in names]
    bodies = [re.sub(r"(?m)^from lit_moe\S+ import (\([^)]*\)|.*)\n", "", p) for p in parts]
    code = "\n".join(body.partition(future)[2] for body in bodies)
    return f'"""V-MoE, written by lit-moe; needs torch and transformers."""\n\n{future}{code}'
