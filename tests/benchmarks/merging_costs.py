"""What grouping 64 experts costs, in plain forwards of the same 2,048 tokens.

CPU seconds of one core, medians of ratios that are taken in turns, so that other work on the
machine hardly shows. Random weights: costs do not depend on them.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM

from lit_moe.adapters import find_sites
from lit_moe.grouping import MergeOptions, available, decide
from tests.benchmarks.merging import RECIPES
from tests.benchmarks.refit_bench import timed
from tests.benchmarks.timing import markdown

EXPERTS, KEPT, TOKENS, TURNS = 64, 48, 2048, 3
SHAPES = {"8 of 64, 256 x 128": (8, 256, 128), "4 of 64, 128 x 256": (4, 128, 256)}
"""Experts asked per token, hidden size, width of an expert."""


def run() -> str:
    columns = [costs(*shape) for shape in SHAPES.values()]
    rows = [(name, *(f"{column[name]:.1f}" for column in columns)) for name in columns[0]]
    return markdown(["forwards of the same tokens", *SHAPES], rows)


def costs(top_k: int, hidden: int, width: int) -> dict[str, float]:
    """Return similarity or recipe -> seconds of a decision over those of a forward."""
    torch.set_num_threads(1)
    model = _model(top_k, hidden, width)
    ids = torch.randint(1, 1024, (TOKENS // 128, 128), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    recipes: dict[str, dict[str, Any]] = {name: {"similarity": name} for name in available()}
    recipes |= {f"recipe {name}": RECIPES[name] for name in ("hc_smoe", "m_smoe", "ream")}
    recipes["cka, all experts on all tokens"] = {"effort": None}
    return {name: _ratio(model, batch, MergeOptions(**how)) for name, how in recipes.items()}


@torch.no_grad()
def _ratio(model: OlmoeForCausalLM, batch: dict[str, Tensor], options: MergeOptions) -> float:
    counts = {site.name: KEPT for site in find_sites(model)}
    ratios = []
    for _ in range(TURNS):
        _, plain = timed(lambda: model(**batch))
        _, grouping = timed(lambda: decide(model, counts, [batch], options))
        ratios.append(grouping / plain)
    return median(ratios)


def _model(top_k: int, hidden: int, width: int) -> OlmoeForCausalLM:
    config = OlmoeConfig(
        vocab_size=1024,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=EXPERTS,
        num_experts_per_tok=top_k,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    return OlmoeForCausalLM(config).eval().requires_grad_(False)


if __name__ == "__main__":
    print(run())
