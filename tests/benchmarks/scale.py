"""Calibration on two ranks against one, one thread each: tokens per second.

Each turn forks the ranks anew; every rank observes a warm-up batch, waits for the others, and then
observes its share of the same text. The time is that of the slowest rank.
"""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, MixtralConfig

from lit_moe.stats import observe
from lit_moe.testing import run_distributed
from tests.benchmarks.timing import markdown

SHAPES = {
    "64 experts, top-8": (64, 8, 256),
    "8 experts, top-2": (8, 2, 1024),
}
BATCHES, BATCH, LENGTH = 8, 4, 256
PAIRS = 5


def run() -> str:
    rows = []
    for shape in SHAPES:
        model = _model(*SHAPES[shape])
        seconds: dict[int, list[float]] = {1: [], 2: []}
        for turn in range(PAIRS):
            for ranks in (1, 2) if turn % 2 == 0 else (2, 1):
                seconds[ranks].append(_observed(model, ranks))
        ratio = statistics.median(a / b for a, b in zip(seconds[1], seconds[2], strict=True))
        tokens = BATCHES * BATCH * LENGTH
        speeds = [f"{tokens / statistics.median(seconds[n]):,.0f}" for n in (1, 2)]
        rows.append([shape, *speeds, f"{ratio:.2f}"])
    header = [
        f"hidden 512, 4 layers; {BATCHES * BATCH * LENGTH:,} tokens",
        "1 rank, tokens/s",
        "2 ranks",
        "ratio",
    ]
    return markdown(header, rows)


def _model(experts: int, top_k: int, width: int):
    config = MixtralConfig(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=width,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def _observed(model, ranks: int) -> float:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1024, (BATCHES, BATCH, LENGTH), generator=generator)

    def work(rank: int) -> float:
        torch.set_num_threads(1)
        batches = [{"input_ids": rows} for rows in ids[rank::ranks]]
        observe(model, batches[:1])
        dist.barrier()
        start = time.perf_counter()
        observe(model, batches)
        dist.barrier()
        return time.perf_counter() - start

    return max(run_distributed(work, ranks))
