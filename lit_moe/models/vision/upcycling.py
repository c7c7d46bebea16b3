"""A V-MoE made of a dense Vision Transformer: every expert begins as a copy of the MLP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, ViTForImageClassification

from lit_moe.errors import LitMoEError
from lit_moe.vmoe.configuration import VMoEConfig
from lit_moe.vmoe.modeling import VMoEForImageClassification

_SAME_KEYS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps"),
    *("image_size", "patch_size", "num_channels", "qkv_bias", "initializer_range", "id2label"),
)


def upcycle(
    model: PreTrainedModel,
    *,
    num_experts: int = 8,
    top_k: int = 2,
    moe_layers: Sequence[int] | None = None,
    noise: float = 0.0,
    **fields: Any,
) -> VMoEForImageClassification:
    """Return a sparse model whose experts are copies of the dense model's MLPs.

    Routers are random. Gates are probabilities over all experts, so the MoE layers give the dense
    output times the sum of the chosen gates: with ``top_k=num_experts`` and no limit of capacity
    the logits are those of the dense model. Train it before use otherwise.

    Source: sparse upcycling (Komatsuzaki et al., arXiv 2212.05055).

    Args:
        model: a ``ViTForImageClassification``; it is not changed.
        num_experts: experts of each MoE layer.
        top_k: experts per token.
        moe_layers: layers that get experts; None for every second.
        noise: normal noise on the copies, as a multiple of each matrix's own deviation; copies
            without any become different only by what tokens they are sent.
        **fields: further fields of ``VMoEConfig``; another ``num_labels`` gives a new, random
            classifier.

    Returns:
        A model in evaluation mode, in the dtype and on the device of ``model``.

    Raises:
        LitMoEError: if the model is no dense ViT classifier, or the numbers do not fit it.
    """
    if not isinstance(model, ViTForImageClassification):
        raise LitMoEError(
            f"{type(model).__name__} cannot be upcycled: a ViTForImageClassification can"
        )
    if noise < 0:
        raise LitMoEError(f"noise={noise:g} is a deviation, which is at least 0")
    same = [key for key in _SAME_KEYS if key != "id2label" or "num_labels" not in fields]
    shared = {key: getattr(model.config, key) for key in same}
    layers = None if moe_layers is None else list(moe_layers)
    own = {"num_experts": num_experts, "num_experts_per_tok": top_k, "moe_layers": layers}
    try:
        config = VMoEConfig(**{**shared, **own, **fields})
        sparse = VMoEForImageClassification._from_config(config, dtype=model.dtype)
    except ValueError as error:
        raise LitMoEError(f"the model cannot be upcycled: {error}") from error
    dense = model.state_dict()
    with torch.no_grad():
        for name, parameter in _shared_with(dense, sparse):
            parameter.copy_(dense[name])
        for i in config.moe_layers or ():
            _fill(sparse.get_submodule(f"vit.layers.{i}.mlp.experts"), dense, i, noise)
    return sparse.to(model.device).eval()


def _shared_with(
    dense: dict[str, torch.Tensor], sparse: nn.Module
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that both have; not a classifier of other labels."""
    for name, parameter in sparse.named_parameters():
        if name not in dense:
            continue
        if dense[name].shape == parameter.shape:
            yield name, parameter
        elif not name.startswith("classifier."):
            raise LitMoEError(
                f"the model cannot be upcycled: its {name} is {tuple(dense[name].shape)}, the "
                f"fields ask for {tuple(parameter.shape)}; leave out those that the model decides"
            )


def _fill(experts: nn.Module, dense: dict[str, torch.Tensor], layer: int, noise: float) -> None:
    sources = {"up_proj": "fc1.weight", "up_proj_bias": "fc1.bias"}
    sources |= {"down_proj": "fc2.weight", "down_proj_bias": "fc2.bias"}
    for own, source in sources.items():
        value = dense[f"vit.layers.{layer}.mlp.{source}"]
        parameter = experts.get_parameter(own)
        parameter.copy_(value.expand_as(parameter))
        if noise and not own.endswith("bias"):
            parameter.add_(torch.randn_like(parameter) * (noise * value.std()))
