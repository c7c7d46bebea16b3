"""Tiny random MoE models of every supported family, and inputs for them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lit_moe.adapters import MoESite, adapter_for, count_experts, find_sites
from lit_moe.adapters.self_test import randomise
from lit_moe.errors import LitMoEError
from lit_moe.plan import KeepPlan
from lit_moe.testing.families import FAMILIES, FamilyCase
from lit_moe.testing.settings import COMMON


def tiny_moe(
    family: str, *, num_experts: int = 8, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """Return a tiny random model in eval mode and fp32, routers and biases random too.

    Args:
        family: a key of ``FAMILIES``.
        num_experts: routed experts per layer.
        seed: of the weights; the global random state is left alone.
        **overrides: values for the language model's config, such as ``norm_topk_prob=True``.
    """
    if family not in FAMILIES:
        raise LitMoEError(f"no tiny model of family {family!r}; there are {sorted(FAMILIES)}")
    case = FAMILIES[family]
    config = tiny_config(case, num_experts, overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, case.model)._from_config(config)
        randomise(model, find_sites(model))
    return model.eval()


def tiny_config(
    case: FamilyCase, num_experts: int, overrides: Mapping[str, Any]
) -> PreTrainedConfig:
    """Return the config of a case with ``num_experts`` experts."""
    settings = copy.deepcopy(dict(case.settings))
    text = {**COMMON, **(settings if case.text is None else settings[case.text]), **overrides}
    settings = text if case.text is None else {**settings, case.text: text}
    *path, key = case.experts.split(".")
    owner = settings
    for part in path:
        owner = owner.setdefault(part, {})
    owner[key] = num_experts
    return getattr(transformers, case.config)(**settings)


def example_inputs(
    model: PreTrainedModel, batch: int = 2, length: int = 12, seed: int = 0
) -> dict[str, Tensor]:
    """Return random token inputs that the model's forward accepts.

    Returns:
        ``input_ids`` and ``attention_mask`` of shape ``(batch, length)``, ``decoder_input_ids``
        too where the model takes them.
    """
    generator = torch.Generator().manual_seed(seed)
    vocab_size = model.get_input_embeddings().get_parameter("weight").shape[0]
    ids = torch.randint(3, vocab_size, (batch, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        inputs["decoder_input_ids"] = ids.flip(0)
    return inputs


def random_plan(model: PreTrainedModel, *, ratio: float = 0.5, seed: int = 0) -> KeepPlan:
    """Return a plan that keeps random experts, as close to ``ratio`` of them as routers allow.

    Every layer keeps the same number, in every group the same.
    """
    adapter, sites = adapter_for(model.config), find_sites(model)
    generator = torch.Generator().manual_seed(seed)
    legal = set.intersection(*(set(adapter.legal_counts(site)) for site in sites))
    count = min(legal, key=lambda n: abs(n - ratio * sites[0].num_experts))
    kept = {site.name: _random_ids(site, count, generator) for site in sites}
    return KeepPlan(kept, count_experts(sites))


def _random_ids(site: MoESite, count: int, generator: torch.Generator) -> tuple[int, ...]:
    size = site.num_experts // site.num_groups
    orders = [torch.randperm(size, generator=generator) for _ in range(site.num_groups)]
    chosen = [g * size + order[: count // site.num_groups] for g, order in enumerate(orders)]
    return tuple(torch.cat(chosen).sort().values.tolist())
