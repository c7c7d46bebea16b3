"""Peak memory of an evolutionary search, beside the model and the budget of its caches.

``python -m tests.benchmarks.search_memory``: in a process of its own, resident memory is read when
everything is imported and warmed up on a tiny model, before the model is made (the baseline); the
peak is reset when the model is there, and read after a search of both phases. What counts is the
peak minus the baseline, against 1.3 times the bytes of the model plus the budget.
"""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from lit_moe.search import Effort, Rates
from tests.benchmarks import search
from tests.benchmarks.search_task import EXPERTS, LAYERS, VOCABULARY
from tests.benchmarks.timing import markdown

EFFORT = Effort(initial=8, discrete=16, total=48, rerank=8)
HIDDEN = 512
BUDGETS = (64, 256)
"""MiB."""
MIB = 1 << 20


def large_model(hidden: int = HIDDEN) -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=8,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=64,
    )
    return MixtralForCausalLM(config).eval()


def measured(setting: search.Setting, budget: int) -> list[object]:
    """Return a row of the table; call it in a fresh process."""
    torch.set_num_threads(1)
    tiny = replace(EFFORT, total=18)
    search.ours(large_model(32), setting, tiny, num_bytes=budget)
    baseline = _status("VmRSS")
    model = large_model()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here on
    loaded = _status("VmRSS") - baseline
    search.ours(model, setting, EFFORT, num_bytes=budget)
    peak = _status("VmHWM") - baseline
    parts = [size, budget, loaded, peak, 1.3 * size + budget]
    return [setting.name, *(f"{part / MIB:.0f}" for part in parts), f"{(peak - budget) / size:.2f}"]


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


HEADER = [
    "search",
    "model, MiB",
    "budget",
    "resident with the model",
    "peak of the search",
    "1.3 x model + budget",
    "(peak - budget) / model",
]


def run() -> str:
    settings = [one for one in search.SETTINGS if one.rates == Rates()]
    rows = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for setting in settings[2:]:
            for budget in BUDGETS:
                rows.append(pool.apply(measured, (setting, budget * MIB)))
                print(*rows[-1], sep=" | ", flush=True)
    return markdown(HEADER, rows)


if __name__ == "__main__":
    print(run())
