"""A dense Llama whose MLPs are split into experts, as a ``glm4_moe`` that transformers loads.

The output of a gated MLP is a sum over its neurons, so any grouping of them gives a shared expert
and routed experts whose sum is the dense MLP; using only ``top_k`` of the experts per token makes
it sparse. Nothing is trained.

T tokens, D hidden, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, LlamaForCausalLM, PreTrainedModel

from lit_moe.errors import CalibrationError, LitMoEError
from lit_moe.inference import evaluating
from lit_moe.models.neurons import GatedMLP, Partition, fit_router, partition_neurons

SAMPLE_TOKENS = 8192
"""Most tokens whose MLP inputs are kept, of each layer, in the model's dtype."""

_SAME_KEYS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range"),
    *("rms_norm_eps", "use_cache", "tie_word_embeddings", "attention_dropout"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)


def split_dense(
    model: PreTrainedModel,
    batches: Iterable[dict[str, Tensor]],
    *,
    num_experts: int = 16,
    num_shared: int = 8,
    top_k: int = 8,
    seed: int = 0,
) -> PreTrainedModel:
    """Return the dense model as a sparse one with as many parameters plus the routers.

    In each layer the neurons with the largest mean contribution ``|a_i| * ||d_i||`` form the
    shared expert, the others equally large clusters of neurons that are active together; a ridge
    regression from the MLP's input to the length of each expert's output is the router. One
    forward pass over the text is all that is needed. With ``top_k=num_experts`` the logits are
    those of the dense model up to the gates, which are 1 +- 1e-4 (``neurons.GATE_DEVIATION``).

    The router rows are tiny for that reason, which has two consequences. A training step of usual
    size would overwrite them: freeze the routers, or give them a learning rate of their own. And
    the fp32 scores of two experts are sometimes equal (``neurons.GATE_DEVIATION``); which of them
    ``torch.topk`` takes may change when other experts are masked or removed, so a masked and a
    cut model may differ by such a swap.

    Args:
        model: a ``LlamaForCausalLM`` without biases; it is not changed.
        batches: calibration text as dictionaries with ``input_ids`` and optionally
            ``attention_mask``; a few thousand tokens.
        num_experts: routed experts per layer, at least 2.
        num_shared: width of the shared expert in widths of a routed one, at least 1. The width is
            ``intermediate_size / (num_experts + num_shared)``.
        top_k: routed experts that each token uses.
        seed: of the clustering; the global random state is left alone.

    Returns:
        A ``Glm4MoeForCausalLM`` in eval mode, in the dtype and on the device of ``model``.

    Raises:
        LitMoEError: if the model is no such Llama, or the numbers do not fit its width.
        CalibrationError: if the text is empty or an activation is not finite.
    """
    dense = _checked(model)
    width = _expert_width(dense.config, num_experts, num_shared, top_k)
    config = _config(dense, num_experts, num_shared, top_k)
    inputs = _mlp_inputs(dense, list(batches), seed)
    split = _without_experts(dense, config)
    generator = torch.Generator().manual_seed(seed)
    for old, new, x_TD in zip(dense.model.layers, split.model.layers, inputs, strict=True):
        mlp = _matrices(old.mlp)
        _split_layer_(new.mlp, mlp, x_TD.float(), num_shared * width, generator)
    return split.eval()


def _checked(model: PreTrainedModel) -> LlamaForCausalLM:
    if not isinstance(model, LlamaForCausalLM):
        raise LitMoEError(
            f"{type(model).__name__} cannot be split into experts: only the Llama layout "
            "(LlamaForCausalLM) has neurons that a glm4_moe model can hold exactly"
        )
    if model.config.attention_bias or model.config.mlp_bias:
        raise LitMoEError(
            f"this Llama has biases (attention_bias={model.config.attention_bias}, "
            f"mlp_bias={model.config.mlp_bias}), which the split model has no place for; "
            "only Llamas without them can be split"
        )
    return model


def _expert_width(config: Any, num_experts: int, num_shared: int, top_k: int) -> int:
    if num_experts < 2 or num_shared < 1 or not 1 <= top_k <= num_experts:
        raise LitMoEError(
            f"num_experts={num_experts}, num_shared={num_shared}, top_k={top_k}: there must be "
            "at least 2 experts and 1 shared one, and top_k lies between 1 and num_experts"
        )
    neurons, parts = config.intermediate_size, num_experts + num_shared
    if neurons % parts:
        fitting = [n for n in range(parts, neurons + 1) if neurons % n == 0]
        hint = f"their sum could be {fitting[0]}" if fitting else "use fewer"
        raise LitMoEError(
            f"{neurons} neurons cannot be split into {num_experts} experts and {num_shared} "
            f"shared parts of one width: num_experts + num_shared must divide {neurons} ({hint})"
        )
    return neurons // parts


def _config(dense: LlamaForCausalLM, num_experts: int, num_shared: int, top_k: int) -> Any:
    """Return the config in which glm4_moe's forward is Llama's, apart from the MLPs."""
    old: Any = dense.config
    return Glm4MoeConfig(
        **{key: getattr(old, key) for key in _SAME_KEYS},
        rope_parameters={**old.rope_parameters, "partial_rotary_factor": 1.0},
        intermediate_size=old.intermediate_size,
        moe_intermediate_size=old.intermediate_size // (num_experts + num_shared),
        n_routed_experts=num_experts,
        n_shared_experts=num_shared,
        num_experts_per_tok=top_k,
        first_k_dense_replace=0,
        norm_topk_prob=False,
        routed_scaling_factor=2.0,
        n_group=1,
        topk_group=1,
        use_qk_norm=False,
        attention_bias=False,
        num_mtp_layers=0,
    )


def _without_experts(dense: LlamaForCausalLM, config: Any) -> Glm4MoeForCausalLM:
    """Return the sparse model with everything but the MLPs copied."""
    with torch.random.fork_rng(devices=[]):
        split = Glm4MoeForCausalLM._from_config(config, dtype=dense.dtype).to(dense.device)
    kept = {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}
    outcome = split.load_state_dict(kept, strict=False)
    assert not outcome.unexpected_keys
    assert all(".mlp." in name for name in outcome.missing_keys)
    split.generation_config = copy.deepcopy(dense.generation_config)
    return split


def _mlp_inputs(
    model: LlamaForCausalLM, batches: Sequence[dict[str, Tensor]], seed: int
) -> list[Tensor]:
    """Return the inputs of each layer's MLP at a sample of tokens, from one forward pass."""
    masks = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])) for batch in batches]
    chosen = _sample(masks, seed)
    rows: list[list[Tensor]] = [[] for _ in model.model.layers]
    with evaluating(model):
        for batch, mask, keep in zip(batches, masks, chosen, strict=True):
            with _recording(model, keep.to(model.device), rows):
                model.model(
                    input_ids=batch["input_ids"].to(model.device),
                    attention_mask=mask.to(model.device),
                    use_cache=False,
                )
    inputs = [torch.cat(parts) for parts in rows]
    for layer, x_TD in enumerate(inputs):
        if not x_TD.isfinite().all():
            raise CalibrationError(f"the input of layer {layer}'s MLP is not finite on this text")
    return inputs


def _sample(masks: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Return boolean masks of at most ``SAMPLE_TOKENS`` of the tokens that are no padding."""
    real = [mask.cpu() == 1 for mask in masks]
    total = sum(int(mask.sum()) for mask in real)
    if total == 0:
        raise CalibrationError("no calibration text was given: the batches hold no token")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    taken = torch.zeros(total, dtype=torch.bool)
    taken[order[:SAMPLE_TOKENS]] = True
    for mask, part in zip(real, taken.split([int(m.sum()) for m in real]), strict=True):
        mask[mask.clone()] = part
    return real


@contextmanager
def _recording(
    model: LlamaForCausalLM, keep: Tensor, rows: Sequence[list[Tensor]]
) -> Iterator[None]:
    """Append to ``rows`` what the MLPs see at the tokens in ``keep`` during the block."""

    def hook(into: list[Tensor]) -> Any:
        return lambda _, args: into.append(args[0][keep])

    layers = model.model.layers
    handles = [
        layer.mlp.register_forward_pre_hook(hook(into))
        for layer, into in zip(layers, rows, strict=True)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _matrices(mlp: nn.Module) -> GatedMLP:
    gate_ND, up_ND, down_DN = (
        mlp.get_parameter(f"{name}_proj.weight").detach().float() for name in ("gate", "up", "down")
    )
    return GatedMLP(gate_ND, up_ND, down_DN, mlp.get_submodule("act_fn"))


@torch.no_grad()
def _split_layer_(
    block: Any, mlp: GatedMLP, x_TD: Tensor, shared_neurons: int, generator: torch.Generator
) -> None:
    """Fill, in place, one MoE block with the neurons of one MLP and a router fitted to them."""
    activations_TN = mlp.activations(x_TD)
    partition = partition_neurons(
        mlp.contributions(activations_TN),
        num_experts=block.gate.num_experts,
        num_shared=shared_neurons,
        generator=generator,
    )
    _place_(block, mlp, partition)
    rows_ED, bias_E = fit_router(x_TD, mlp.output_norms(activations_TN, partition.experts))
    block.gate.weight.copy_(rows_ED)
    block.gate.e_score_correction_bias.copy_(bias_E)


def _place_(block: Any, mlp: GatedMLP, partition: Partition) -> None:
    shared, expert_EW = partition.shared, partition.experts
    block.shared_experts.gate_proj.weight.copy_(mlp.gate[shared])
    block.shared_experts.up_proj.weight.copy_(mlp.up[shared])
    block.shared_experts.down_proj.weight.copy_(mlp.down[:, shared])
    block.experts.gate_up_proj.copy_(torch.cat([mlp.gate[expert_EW], mlp.up[expert_EW]], 1))
    block.experts.down_proj.copy_(mlp.down[:, expert_EW].transpose(0, 1))
