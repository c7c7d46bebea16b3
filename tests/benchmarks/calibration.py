"""Observing all routed statistics against a plain forward, and against the all-experts oracle."""

from __future__ import annotations

import resource
import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

from lit_moe.stats import observe
from tests.benchmarks.timing import interleaved, markdown
from tests.stats.oracle import all_experts_statistics

Batches = list[dict[str, torch.Tensor]]

SHAPES = {
    "64 experts, top-8": {
        "num_local_experts": 64,
        "num_experts_per_tok": 8,
        "intermediate_size": 256,
    },
    "8 experts, top-2": {
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 1024,
    },
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENS = (4, 512)
BATCHES = 8  # 16,384 tokens, the default of TextDataModule
# Several batches, as a user has them, since observe() checks itself once on the first. All 64
# experts on all tokens take ten times as long as the model, so fewer there.
ORACLE_BATCHES = {"64 experts, top-8": 2, "8 experts, top-2": 4}
MEMORY_BATCHES = 2  # the second meets the sums of the first; later ones add nothing


def run() -> str:
    torch.set_num_threads(2)
    rows = [[shape, dtype, *_measure(shape, dtype)] for shape in SHAPES for dtype in DTYPES]
    header = [
        "hidden 512, 6 layers; 16,384 tokens",
        "dtype",
        "plain",
        "observed",
        "time ratio",
        "peak memory ratio",
        "all-experts observer / ours",
    ]
    return markdown(header, rows)


def _measure(shape: str, dtype: str) -> list[str]:
    model, inputs = _model(shape, dtype), _inputs()
    # observe() also runs 64 tokens twice for its self-check: that is in its time.
    plain_s, observed_s, ratio = interleaved(
        lambda: _plain(model, [inputs] * BATCHES),
        lambda: observe(model, [inputs] * BATCHES),
        pairs=5,
    )
    batches = [inputs] * ORACLE_BATCHES[shape]
    _, _, oracle = interleaved(
        lambda: observe(model, batches), lambda: _all_experts(model, batches), pairs=3
    )
    memory = _peak(shape, dtype, "observe") / _peak(shape, dtype, "plain")
    return [
        f"{plain_s:.2f} s",
        f"{observed_s:.2f} s",
        f"{ratio:.3f}",
        f"{memory:.3f}",
        f"{oracle:.1f}",
    ]


@torch.no_grad()
def _plain(model: PreTrainedModel, batches: Batches) -> None:
    for inputs in batches:
        model.base_model(**inputs)


def _all_experts(model: PreTrainedModel, batches: Batches) -> None:
    for inputs in batches:
        all_experts_statistics(model, inputs)


def _peak(shape: str, dtype: str, what: str) -> int:
    """Return the peak resident bytes of a process that does only this."""
    words = [sys.executable, "-m", "tests.benchmarks.calibration", shape, dtype, what]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def _model(shape: str, dtype: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=1024,
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    config.update(SHAPES[shape])
    return AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]).eval()


def _inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(0, 1024, TOKENS, generator=torch.Generator().manual_seed(0))}


if __name__ == "__main__":
    torch.set_num_threads(2)
    model, batches = _model(*sys.argv[1:3]), [_inputs()] * MEMORY_BATCHES
    if sys.argv[3] == "plain":
        _plain(model, batches)
    else:
        observe(model, batches)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
