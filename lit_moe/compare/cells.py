"""The cells of a comparison: what they depend on, and how they are judged."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import lit_moe
from lit_moe.assets import Split, resolve_model
from lit_moe.checkpoints import read_config
from lit_moe.compare.options import CompareOptions, TaskOptions
from lit_moe.compare.store import CellStore, digest
from lit_moe.compare.text import ComparedText
from lit_moe.data import TaskDataModule
from lit_moe.errors import LitMoEError
from lit_moe.evaluate import evaluate_perplexity
from lit_moe.evaluate.prompts import TaskItem
from lit_moe.models import DType, build_model, check_vocabulary
from lit_moe.plan import KeepPlan

VERSION = 1
"""Raise it when a change of the code makes all earlier cells worthless."""
_PEEK = 1 << 16
_WEIGHTS = (".safetensors", ".bin")
_MAY_DIFFER = {"_name_or_path", "name_or_path", "dtype", "torch_dtype", "transformers_version"}


@dataclass(frozen=True)
class Judge:
    """What every cell is measured by.

    Attributes:
        batches: of the evaluation text.
        domains: names of their domains.
        tasks: questions, or None.
    """

    batches: Sequence[Mapping[str, Tensor]]
    domains: tuple[str, ...]
    tasks: TaskDataModule | None = None

    def __call__(self, model: PreTrainedModel) -> dict[str, Any]:
        """Return quality as plain values; the model is left as it is."""
        quality = evaluate_perplexity(model, [dict(b) for b in self.batches], self.domains)
        found = dataclasses.asdict(quality)
        if self.tasks is not None:
            answers = self.tasks.evaluate(model)
            found["tasks"] = {shots: dataclasses.asdict(q) for shots, q in answers.items()}
        return found


def task_data(options: TaskOptions, tokenizer: str) -> TaskDataModule:
    """Return the questions as a data module."""
    return TaskDataModule(
        task=options.task,
        train_files=options.train_files,
        test_files=options.test_files,
        evaluated_shots=options.shots,
        sequence_length=options.sequence_length,
        batch_size=options.batch_size,
        chat=options.chat,
        tokenizer=tokenizer,
    )


def settings_of(options: CompareOptions, text: ComparedText) -> dict[str, Any]:
    """Return what every cell depends on. The grid is not in it: that may grow."""
    amounts = {
        name: getattr(options.text, name)
        for name in ("sequence_length", "calibration_tokens", "evaluation_tokens")
    }
    return {
        "version": VERSION,
        "code": {
            "lit_moe": lit_moe.__version__,
            "torch": torch.__version__,
            "transformers": metadata.version("transformers"),
        },
        "text": {**amounts, **text.fingerprint(("calibration", "validation"))},
        "tasks": None if options.tasks is None else _task_settings(options.tasks, text),
        "unrouted": options.unrouted,
        "dtype": options.dtype,
    }


def _task_settings(options: TaskOptions, text: ComparedText) -> dict[str, Any]:
    """Return the fields, and digests of questions and chat template where they can change.

    Running text and packaged questions are not named: they are what results without these mean.
    """
    found = dataclasses.asdict(options)
    if options.train_files or options.test_files:
        found["questions"] = _questions_digest(task_data(options, text.tokenizer.name_or_path))
    if not options.chat:
        return {name: value for name, value in found.items() if name != "chat"}
    return {**found, "chat_template": digest(text.tokenizer.chat_template)}


def _questions_digest(data: TaskDataModule) -> str:
    """Return what tells the questions that are asked or shown from others."""
    splits: tuple[Split, ...] = ("train", "test")
    return digest([[_wording(item) for item in data.items(split)] for split in splits])


def _wording(item: TaskItem) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(item).items() if k != "place"}


def load_model(name: str, dtype: DType, text: ComparedText) -> PreTrainedModel:
    """Return a model where it will be measured: on the GPU if there is one.

    Raises:
        LitMoEError: if it cannot be loaded, or the tokenizer has ids that it does not know.
    """
    model = build_model(name, dtype=dtype)
    check_vocabulary(model, len(text.tokenizer), text.tokenizer.name_or_path)
    if torch.cuda.is_available():
        nn.Module.to(model, torch.device("cuda"))
    return model


def is_done(store: CellStore, key: Mapping[str, Any]) -> bool:
    """Return whether a cell was measured; one that failed is tried again by the next run."""
    found = store.get("cell", **key)
    return found is not None and "error" not in found


def is_settled(store: CellStore, key: Mapping[str, Any]) -> bool:
    """Return whether a cell was measured, or has failed in this run, here or elsewhere."""
    return is_done(store, key) or store.is_new("cell", **key)


def plan_of(cell: Mapping[str, Any]) -> KeepPlan:
    """Return the plan of a finished cell."""
    return KeepPlan({k: tuple(ids) for k, ids in cell["kept"].items()}, cell["num_experts"])


def plan_values(plan: KeepPlan) -> dict[str, Any]:
    """Return a plan as plain values of a cell."""
    return {"kept": {k: list(ids) for k, ids in plan.kept.items()}, "num_experts": plan.num_experts}


def model_digest(model: str) -> str:
    """Return what tells one checkpoint from another: config, and size and ends of its files."""
    folder = Path(resolve_model(model))
    if not folder.is_dir():
        return str(getattr(read_config(model), "_commit_hash", None))
    found = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(path for path in folder.iterdir() if path.suffix in _WEIGHTS):
        found.update(f"{file.name} {file.stat().st_size}".encode())
        with file.open("rb") as stream:
            found.update(stream.read(_PEEK))
            stream.seek(-min(_PEEK, file.stat().st_size), 2)
            found.update(stream.read())
    return found.hexdigest()[:16]


def check_same_shape(models: Sequence[str]) -> None:
    """Refuse models that cannot be training runs of one.

    Raises:
        LitMoEError: naming the first value of the config that differs.
    """
    configs = [read_config(resolve_model(model)).to_dict() for model in models]
    for model, config in zip(models[1:], configs[1:], strict=True):
        for name in sorted({*configs[0], *config} - _MAY_DIFFER):
            if configs[0].get(name) != config.get(name):
                raise LitMoEError(
                    f"several models are taken for training runs of one, but {name} is "
                    f"{configs[0].get(name)!r} in {models[0]} and {config.get(name)!r} in {model}: "
                    "compare them in runs of their own, with outputs of their own"
                )
