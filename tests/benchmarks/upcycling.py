"""From-scratch against upcycled experts: copies of a dense MLP, trained on, beside their likes.

A dense model is a mixtral of one expert. Its copies make ``mixtral_upcycled``: each expert the
dense MLP, a new router, then a short training. ``python -m tests.benchmarks.upcycling [SEED ...]``
trains them once into the cache folder of the other benchmark models.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    get_cosine_schedule_with_warmup,
)

from tests.benchmarks.models import SEEDS, cache_folder, model_folder
from tests.benchmarks.refit_bench import ROWS, text

DENSE, UPCYCLED = "mixtral_dense", "mixtral_upcycled"
DENSE_STEPS, UPCYCLED_STEPS = 1000, 500
SIZES: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "router_aux_loss_coef": 0.01,
}


def main() -> None:
    for seed in map(int, sys.argv[1:] or SEEDS):
        train(seed)


def train(seed: int) -> Path:
    """Return the folder of an upcycled model; train what is missing."""
    folder, dense = model_folder(UPCYCLED, seed), model_folder(DENSE, seed)
    if not dense.exists():
        torch.manual_seed(seed)
        config = MixtralConfig(**SIZES, num_local_experts=1, num_experts_per_tok=1)
        _save(_trained(MixtralForCausalLM(config), seed, DENSE_STEPS, rate=3e-3), dense)
    if not folder.exists():
        source = MixtralForCausalLM.from_pretrained(dense, dtype=torch.float32)
        _save(_trained(upcycled(source, seed), seed + 100, UPCYCLED_STEPS, rate=1e-3), folder)
    return folder


def upcycled(dense: MixtralForCausalLM, seed: int) -> MixtralForCausalLM:
    """Return a model that computes what the dense one does, its MLP eight times as experts."""
    torch.manual_seed(seed)
    config = MixtralConfig(**SIZES, num_local_experts=8, num_experts_per_tok=2)
    model, theirs = MixtralForCausalLM(config), dense.state_dict()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not name.endswith("mlp.gate.weight"):
                tensor.copy_(theirs[name].expand_as(tensor))
    return model


def _trained(
    model: MixtralForCausalLM, seed: int, steps: int, *, rate: float
) -> MixtralForCausalLM:
    """Train on the next token, with the usual load-balancing loss where there is a router."""
    blocks = text().blocks("train")
    order = torch.Generator().manual_seed(seed)
    descent = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = get_cosine_schedule_with_warmup(descent, 60, steps)
    is_sparse, done = model.config.num_local_experts > 1, 0
    model.train()
    while done < steps:
        for batch in DataLoader(blocks, batch_size=ROWS, shuffle=True, generator=order):
            ids = batch["input_ids"]
            loss = model(input_ids=ids, labels=ids, output_router_logits=is_sparse).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            descent.step()
            schedule.step()
            descent.zero_grad()
            done += 1
            if done % 50 == 0:
                print(f"step {done}: {float(loss.detach()):.3f}", flush=True)
            if done == steps:
                break
    return model.eval()


def _save(model: MixtralForCausalLM, folder: Path) -> None:
    unfinished = cache_folder() / "runs" / f"{folder.name}-unfinished"
    model.save_pretrained(unfinished)
    unfinished.replace(folder)


if __name__ == "__main__":
    main()
