"""A sparse V-MoE against the same network with dense MLPs of as many active parameters."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageClassification, ViTConfig
from transformers import ViTForImageClassification as DenseViT

import lit_moe  # noqa: F401 - tells transformers of V-MoE
from tests.benchmarks.refit_store import Store
from tests.benchmarks.timing import interleaved

SIZES: dict[str, dict[str, Any]] = {
    "digits": {"hidden_size": 48, "intermediate_size": 48, "image_size": 8, "patch_size": 2},
    "cifar": {"hidden_size": 192, "intermediate_size": 384, "image_size": 32, "patch_size": 4},
    "tiny/16": {"hidden_size": 192, "intermediate_size": 768, "image_size": 128, "patch_size": 16},
    "small/16": {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "image_size": 128,
        "patch_size": 16,
    },
}
LIMIT = 1.15


def speed(store: Store) -> None:
    for size in SIZES:
        for top_k in (1, 2):
            work = partial(ratio, size, top_k)
            store.measure(work, "speed", "forward", size=size, k=top_k)


def ratio(size: str, top_k: int) -> dict[str, float]:
    """Time one forward of 64 images, interleaved, every second layer sparse."""
    common = {"num_hidden_layers": 4, "num_attention_heads": 3, "num_channels": 3, **SIZES[size]}
    common["num_attention_heads"] = 4 if size == "digits" else 3
    width = SIZES[size]["intermediate_size"]
    fields = {**common, "num_experts": 8, "num_experts_per_tok": top_k}
    sparse = AutoModelForImageClassification.from_config(AutoConfig.for_model("lit_vmoe", **fields))
    dense = DenseViT(ViTConfig(**common))
    for i in sparse.config.moe_layers:  # as many active parameters: top_k experts wide
        mlp = dense.vit.layers[i].mlp
        mlp.fc1 = torch.nn.Linear(common["hidden_size"], top_k * width)
        mlp.fc2 = torch.nn.Linear(top_k * width, common["hidden_size"])
    side = SIZES[size]["image_size"]
    images = torch.randn(64, 3, side, side)
    with torch.inference_mode():
        sparse.eval(), dense.eval()
        sparse.set_experts_implementation("eager")  # the quickest on a CPU
        slow, fast, times = interleaved(lambda: dense(images), lambda: sparse(images))
    return {"dense": slow, "sparse": fast, "ratio": times}


def lines(store: Store) -> list[str]:
    return [
        f"- forward of 64 images, {settings['size']}, {settings['k']} of 8 experts: "
        f"{result['ratio']:.2f} x dense ({result['sparse'] * 1e3:.0f} ms)"
        for name, _, settings, result in store.cells()
        if name == "speed"
    ]
