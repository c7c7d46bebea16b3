"""All of MC-Suite's criteria of one kind at once, against the plain pass that they share.

And the map of single experts against as many whole forwards.
``python -m tests.benchmarks.mc_suite [TOKENS]`` runs it on fewer tokens; ``... ablation`` only the
second part.
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

import lit_moe
from lit_moe.adapters import adapter_for, find_sites
from lit_moe.compare import ablation_map
from lit_moe.distill.losses import next_token_nll
from lit_moe.models import build_model
from lit_moe.stats import GATHERABLE, observe, observe_gradients
from tests.benchmarks.calibration import DTYPES, SHAPES, Batches, _model
from tests.benchmarks.timing import interleaved, markdown

WEIGHTS = ("ews", "rwn", "wsr", "ewn")
FORWARD = ("euf", "ecc", "evtc", "ets", "eas", "eae", "eao", "ean")
BACKWARD = ("egs", "ege", "ego", "egn")
ROWS, LENGTH = 4, 512
TOKENS = 16_384
ABLATION_TOKENS = 2_048


def run(tokens: int = TOKENS, pairs: int = 5) -> str:
    torch.set_num_threads(2)
    rows = [
        [shape, dtype, *_measure(shape, dtype, tokens, pairs)]
        for shape in SHAPES
        for dtype in DTYPES
    ]
    header = [
        f"hidden 512, 6 layers; {tokens:,} tokens",
        "dtype",
        "forward",
        "8 criteria",
        "ratio",
        "forward + backward",
        "4 criteria",
        "ratio",
        "4 criteria of weights",
    ]
    return markdown(header, rows) + "\n\n" + run_ablation()


def run_ablation(pairs: int = 3) -> str:
    torch.set_num_threads(2)
    models = {
        "embedded: 4 layers, 16 experts": build_model("embedded", dtype="float32"),
        "hidden 512: 6 layers, 8 experts": _model("8 experts, top-2", "fp32"),
        "hidden 256: 12 layers, 8 experts": _deep(),
    }
    rows = []
    for name, model in models.items():
        batches = _batches(ABLATION_TOKENS)
        naive, cached, ratio = interleaved(
            partial(_naive_map, model, batches),
            partial(ablation_map, model, batches),
            pairs=pairs,
        )
        rows.append([name, f"{naive:.1f} s", f"{cached:.1f} s", f"{ratio:.3f}"])
    header = [
        f"loss without each expert, {ABLATION_TOKENS:,} tokens",
        "whole forwards",
        "from the changed layer on",
        "ratio",
    ]
    return markdown(header, rows)


def _deep() -> PreTrainedModel:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=8,
    )
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def _naive_map(model: PreTrainedModel, batches: Batches) -> None:
    adapter = adapter_for(model.config)
    for site in find_sites(model):
        for expert in range(site.num_experts):
            keep = [e for e in range(site.num_experts) if e != expert]
            mask = adapter.mask_(model, site, keep)
            for inputs in batches:
                logits = model(**inputs, use_cache=False).logits
                ids = inputs["input_ids"]
                next_token_nll(logits, ids, torch.ones_like(ids)).double().sum()
            mask.remove()


def _measure(shape: str, dtype: str, tokens: int, pairs: int) -> list[str]:
    model = _model(shape, dtype)
    batches = _batches(tokens)
    forward = interleaved(
        lambda: _forward(model, batches), lambda: _all_forward(model, batches), pairs=pairs
    )
    backward = interleaved(
        lambda: _backward(model, batches), lambda: _all_backward(model, batches), pairs=pairs
    )
    weights, _, _ = interleaved(lambda: _all_weights(model), lambda: None, pairs=1)
    return [*_cells(forward), *_cells(backward), f"{weights:.2f} s"]


def _batches(tokens: int) -> Batches:
    """Different text in each batch, so that the vocabulary fills up as it does in earnest."""
    generator = torch.Generator().manual_seed(0)
    shape = (ROWS, LENGTH)
    count = max(1, tokens // (ROWS * LENGTH))
    return [{"input_ids": torch.randint(0, 1024, shape, generator=generator)} for _ in range(count)]


@torch.no_grad()
def _forward(model: PreTrainedModel, batches: Batches) -> None:
    for inputs in batches:
        model.base_model(**inputs)


def _all_forward(model: PreTrainedModel, batches: Batches) -> None:
    stats = observe(model, batches, gather=GATHERABLE)
    for name in FORWARD:
        lit_moe.score(stats, name)


def _backward(model: PreTrainedModel, batches: Batches) -> None:
    for inputs in batches:
        ids = inputs["input_ids"]
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
        cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    model.zero_grad(set_to_none=True)


def _all_backward(model: PreTrainedModel, batches: Batches) -> None:
    gradients = observe_gradients(model, batches)
    for name in BACKWARD:
        lit_moe.score(gradients, name)


def _all_weights(model: PreTrainedModel) -> None:
    for name in WEIGHTS:
        lit_moe.score(model, name)


def _cells(times: tuple[float, float, float]) -> list[str]:
    plain, observed, ratio = times
    return [f"{plain:.2f} s", f"{observed:.2f} s", f"{ratio:.3f}"]


if __name__ == "__main__":
    if sys.argv[1:] == ["ablation"]:
        print(run_ablation())
    else:
        print(run(int(sys.argv[1]) if sys.argv[1:] else TOKENS, pairs=3))
