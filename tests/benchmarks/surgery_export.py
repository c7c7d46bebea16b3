"""Dropping half of the experts of a 1 GB model and exporting it, against plain save_pretrained."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

from lit_moe.adapters import count_experts, find_sites
from lit_moe.export import export
from lit_moe.plan import KeepPlan
from lit_moe.surgery import shrink
from tests.benchmarks.timing import markdown


def run() -> str:
    torch.set_num_threads(2)
    rows = []
    for _ in range(5):
        model = _model()
        with tempfile.TemporaryDirectory() as folder:
            plain = _seconds(lambda m=model, f=folder: m.save_pretrained(f))
            ours = _seconds(
                lambda m=model, f=folder: _shrink_and_export(m, Path(f) / "ours", False)
            )
        model = _model()
        with tempfile.TemporaryDirectory() as folder:
            full = _seconds(lambda m=model, f=folder: _shrink_and_export(m, Path(f) / "ours", True))
        rows.append((plain, ours, full))
    size = sum(p.numel() * p.element_size() for p in _model().parameters())
    plain, ours, full = (statistics.median(column) for column in zip(*rows, strict=True))
    ratios = [statistics.median(r[i] / r[0] for r in rows) for i in (1, 2)]
    return markdown(
        [f"{size / 1e9:.2f} GB model, half of the experts dropped", "seconds", "ratio"],
        [
            ["save_pretrained of the whole model", f"{plain:.2f}", ""],
            ["shrink + export", f"{ours:.2f}", f"{ratios[0]:.2f}"],
            ["shrink + export + reload and compare", f"{full:.2f}", f"{ratios[1]:.2f}"],
        ],
    )


def _shrink_and_export(model: PreTrainedModel, path: Path, verify: bool) -> None:
    counts = count_experts(find_sites(model))
    kept = {layer: tuple(range(0, num, 2)) for layer, num in counts.items()}
    shrink(model, KeepPlan(kept, counts))
    export(model, path, verify=verify)


def _model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=1280,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        num_local_experts=16,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def _seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
