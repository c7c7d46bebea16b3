"""A bridge to lm-evaluation-harness (``pip install 'lit-moe[eval]'``).

In one line, on a model in memory, pruned or not::

    evaluate_harness(model, tokenizer, ["arc_easy", "my_task.yaml"], num_fewshot=0)

A task is a name of the harness, whose data set it downloads, or a YAML file of the harness's own
format over local files, which needs no network.
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
import functools
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moe.errors import LitMoEError
from lit_moe.inference import evaluating


def evaluate_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str | Path],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
) -> dict[str, dict[str, Any]]:
    """Return task -> metric -> value, as lm-evaluation-harness computes and names them.

    Model, tokenizer and the global random states are afterwards what they were. Every process that
    calls this evaluates everything; only those with ``LOCAL_RANK`` 0 get the numbers, the others an
    empty mapping.

    Args:
        model: in memory, on its device; also one with different numbers of experts per layer.
        tokenizer: of the model.
        tasks: names, patterns (``mmlu_*``) or YAML files.
        num_fewshot: examples in the prompt; None takes each task's own.
        limit: at most so many questions per task.
        batch_size: questions per batch.

    Raises:
        LitMoEError: if the harness is not installed, does not know a task, or cannot download the
            data set of one.
    """
    if find_spec("lm_eval") is None:
        raise LitMoEError("lm-evaluation-harness is not installed: pip install 'lit-moe[eval]'")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    names = [str(task) for task in tasks]
    _check_tasks(names)
    # The harness may give the tokenizer a padding token: it gets a copy.
    with evaluating(model), _random_states_kept():
        wrapped = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        try:
            found = simple_evaluate(
                model=wrapped,
                tasks=names,
                num_fewshot=num_fewshot,
                limit=limit,
                log_samples=False,
                task_manager=_task_manager(),
            )
        except ConnectionError as error:
            raise LitMoEError(
                f"a data set of {', '.join(names)} is not here and could not be downloaded "
                f"({error}); go online once, or give a YAML file over local data"
            ) from error
    return {} if found is None else dict(found["results"])


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Let the harness seed everything, and take it back."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - what it seeds
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@functools.lru_cache(maxsize=1)
def _task_manager() -> Any:
    """Return the index of all tasks; reading them takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _check_tasks(names: Sequence[str]) -> None:
    """Refuse what is neither a task nor a file, before anything is downloaded or run."""
    if not names:
        raise LitMoEError("no task is given; name one, for instance arc_easy, or a YAML file")
    known = _task_manager().all_tasks
    for name in names:
        if Path(name).is_file() or fnmatch.filter(known, name):
            continue
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise LitMoEError(
            f"lm-evaluation-harness has no task {name!r}, and there is no such file{hint}"
        )
