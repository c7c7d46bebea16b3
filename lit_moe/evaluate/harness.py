"""A bridge to lm-evaluation-harness, for people online (``pip install 'lit-moe[eval]'``)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moe.errors import LitMoEError


def evaluate_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
) -> dict[str, dict[str, Any]]:
    """Return task -> metric -> value, as lm-evaluation-harness computes them.

    Args:
        model: in memory, on its device; also one with different numbers of experts per layer.
        tokenizer: of the model.
        tasks: names of the harness, for instance ``["arc_easy", "boolq"]``; their data sets are
            downloaded by the harness.
        num_fewshot: examples in the prompt; None takes each task's own.
        limit: at most so many questions per task.
        batch_size: questions per batch.

    Raises:
        LitMoEError: if the harness is not installed.
    """
    if find_spec("lm_eval") is None:
        raise LitMoEError("lm-evaluation-harness is not installed: pip install 'lit-moe[eval]'")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = simple_evaluate(
        model=wrapped, tasks=list(tasks), num_fewshot=num_fewshot, limit=limit, log_samples=False
    )
    results: dict[str, dict[str, Any]] = found["results"]
    return results
