"""What a checkpoint is made of, from its config alone: no weights are read or allocated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from lit_moe.accounting import count_parameters, elements_per_expert
from lit_moe.adapters import MoESite, adapter_for, find_sites
from lit_moe.adapters.discovery import build_on_meta
from lit_moe.adapters.site import AxisKind
from lit_moe.checkpoints import model_class, read_config
from lit_moe.errors import LitMoEError
from lit_moe.heterogeneous import per_layer_counts
from lit_moe.inspection.findings import (
    Inspection,
    Layer,
    RefitRequest,
    Saving,
    Size,
    nearest,
)
from lit_moe.inspection.parts import size_of_parts
from lit_moe.inspection.rank_needs import rank_needs
from lit_moe.inspection.ranks import RankRequest
from lit_moe.inspection.refit_needs import refit_needs

KEEP_RATIOS = (0.75, 0.5, 0.25)


def inspect_model(
    name_or_path: str | Path,
    *,
    trust_remote_code: bool | None = None,
    refit: RefitRequest | None = None,
    ranks: RankRequest | None = None,
) -> Inspection:
    """Describe a checkpoint by its config: a local folder or a hub id.

    Args:
        name_or_path: where the config is.
        trust_remote_code: run model code that comes with the checkpoint.
        refit: also tell what a refit would hold in memory.
        ranks: also tell what one rank of a sharded run would hold in memory.

    Raises:
        NotAnMoEError: if the model is dense.
        UnsupportedModelError: if lit-moe cannot act on its experts; says why.
        LitMoEError: if there is no readable config.
    """
    config = read_config(name_or_path, trust_remote_code=trust_remote_code)
    cls = model_class(config)
    adapter = adapter_for(config)
    model = _skeleton(cls, config, name_or_path)
    sites = find_sites(model)
    dtype = _dtype(config)
    counts = count_parameters(model, sites)
    parts = size_of_parts(model, sites, dtype)
    layers = tuple(_layer(site, adapter.legal_counts(site)) for site in sites)
    return Inspection(
        name=str(name_or_path),
        family=config.model_type,
        architecture=cls.__name__,
        dtype=str(dtype).removeprefix("torch."),
        layers=layers,
        dense_layers=_dense_layers(model, sites),
        parameters=counts.total,
        active_parameters=counts.active,
        parts=parts,
        savings=tuple(_savings(model, sites, layers, parts)),
        notes=tuple(_notes(config, sites, parts)),
        refit=() if refit is None else tuple(refit_needs(model, sites, layers, refit, dtype)),
        ranks=None if ranks is None else rank_needs(model, sites, layers, ranks),
    )


def _skeleton(
    cls: type[PreTrainedModel], config: PreTrainedConfig, name_or_path: str | Path
) -> PreTrainedModel:
    """Return the model without memory behind its tensors."""
    try:
        with per_layer_counts(config, cls):
            model = build_on_meta(cls, config)
            model.tie_weights()
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise LitMoEError(
            f"{cls.__name__} cannot be built from the config of {name_or_path}: {error}"
        ) from error
    return model


def _layer(site: MoESite, legal: tuple[int, ...]) -> Layer:
    return Layer(
        name=site.name,
        num_experts=site.num_experts,
        top_k=site.top_k,
        num_groups=site.num_groups,
        top_k_groups=site.top_k_groups,
        num_shared=site.num_shared,
        routing=site.routing,
        renormalised=site.renormalised,
        legal_counts=legal,
    )


def _dtype(config: PreTrainedConfig) -> torch.dtype:
    for part in (config, config.get_text_config()):
        if isinstance(part.dtype, torch.dtype):
            return part.dtype
    return torch.float32


def _dense_layers(model: PreTrainedModel, sites: Sequence[MoESite]) -> int:
    """Layers beside those with experts, in every stack that has some."""
    stacks = {_stack_of(site.name) for site in sites}
    total = sum(len(list(model.get_submodule(stack).children())) for stack in stacks)
    with_experts = {tuple(site.name.split(".")[: _stack_depth(site.name) + 1]) for site in sites}
    return total - len(with_experts)


def _stack_of(name: str) -> str:
    return ".".join(name.split(".")[: _stack_depth(name)])


def _stack_depth(name: str) -> int:
    return next(i for i, word in enumerate(name.split(".")) if word.isdigit())


def _savings(
    model: PreTrainedModel,
    sites: Sequence[MoESite],
    layers: Sequence[Layer],
    parts: Mapping[str, Size],
) -> Iterable[Saving]:
    elements = sum(size.parameters for size in parts.values())
    num_bytes = sum(size.bytes for size in parts.values())
    per_element = num_bytes / elements
    kinds: tuple[AxisKind, ...] = ("expert", "router", "select_bias")
    for ratio in KEEP_RATIOS:
        kept = [nearest(layer.legal_counts, ratio * layer.num_experts) for layer in layers]
        gone = sum(
            (site.num_experts - count) * elements_per_expert(model, site, kinds)
            for site, count in zip(sites, kept, strict=True)
        )
        saved = round(gone * per_element)
        left = num_bytes - saved
        yield Saving(ratio, (min(kept), max(kept)), elements - gone, left, saved, left / num_bytes)


def _notes(
    config: PreTrainedConfig, sites: Sequence[MoESite], parts: Mapping[str, Size]
) -> Iterable[str]:
    if getattr(config, "quantization_config", None):
        yield "the checkpoint is quantized: bytes are those after loading it in the dtype above"
    if config.dtype is None and config.get_text_config().dtype is None:
        yield "the config names no dtype: bytes are for float32"
    if "shared experts" in parts:
        yield "shared experts are never scored and never removed"
    if any(site.renormalised is False for site in sites):
        yield "the router does not renormalise: removing even an unused expert changes outputs"
    if len({site.num_experts for site in sites}) > 1:
        yield "layers have different numbers of experts: it loads with lit_moe.export.load"
