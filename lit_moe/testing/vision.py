"""Tiny random V-MoEs, and images for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageClassification, PreTrainedModel

from lit_moe.adapters import find_sites
from lit_moe.adapters.self_test import randomise

TINY = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "num_labels": 5,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "zero": {"dropped_experts": "zero"},
    "delete": {"dropped_experts": "delete"},
    "no_limit": {"dropped_experts": "delete", "eval_capacity_factor": None},
    "expert_choice": {"router_type": "expert_choice"},
    "ensemble": {"num_members": 2},
    "ensemble_delete": {"num_members": 2, "dropped_experts": "delete"},
}
"""Settings that drop experts in different ways."""


def tiny_vmoe(variant: str = "zero", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return a tiny random V-MoE in eval mode; the global random state is left alone."""
    config = AutoConfig.for_model("lit_vmoe", **{**TINY, **VARIANTS[variant], **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageClassification.from_config(config)
        randomise(model, find_sites(model))
    return model.eval()


def example_images(model: PreTrainedModel, batch: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Return ``pixel_values`` of shape ``(batch, channels, height, width)``."""
    generator, config = torch.Generator().manual_seed(seed), model.config
    shape = (batch, config.num_channels, config.image_size, config.image_size)
    return {"pixel_values": torch.randn(shape, generator=generator)}
