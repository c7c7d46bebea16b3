"""Router rows straight from a checkpoint folder: headers first, then only the bytes of routers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from lit_moe.adapters.config_keys import EXPERT_KEYS
from lit_moe.checkpoints import made_by
from lit_moe.errors import LitMoEError

_NO_ROUTERS = ("expert", "embed", "norm", "attn", "attention", "lm_head")
_ADAPTER_CONFIG_NAME = "adapter_config.json"
_NULL_ROWS = "num_null_experts"
_SAMPLE_BYTES = 1 << 16
_MOST_SAMPLES = 16


class CheckpointTensors:
    """The tensors of a checkpoint folder, read one at a time.

    Args:
        folder: with safetensors files.

    Raises:
        LitMoEError: if the folder is missing, holds only a LoRA adapter, or no safetensors.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self._files = _files_of(self.folder)
        self.shapes = self._shapes()

    @property
    def config(self) -> dict[str, Any]:
        """What ``config.json`` says.

        Raises:
            LitMoEError: if there is none, or it is damaged.
        """
        file = self.folder / CONFIG_NAME
        if not file.is_file():
            raise LitMoEError(
                f"folder {self.folder} holds no {CONFIG_NAME}, so it is not a model folder"
            )
        return _json_of(file)

    def read(self, name: str) -> Tensor:
        """Return one tensor; nothing else is read."""
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for path in dict.fromkeys(self._files.values()):
            with _opened(path) as file:
                shapes |= {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
        return shapes


def router_names(tensors: CheckpointTensors) -> list[str]:
    """Return the names of the router matrices of a folder, told by name and shape, in layer order.

    A router matrix has as many rows as the config has experts, and stands outside of experts,
    attention, norms and embeddings. So it is in all families but ernie4_5_vl_moe, inkling, jetmoe,
    qwen4_exp and zaya; there compare a loaded model with a folder by :class:`RouterChange`.

    Raises:
        LitMoEError: if there is none.
    """
    counts: set[int] = set()
    _collect(tensors.config, counts)
    found = [
        name
        for name, shape in tensors.shapes.items()
        if len(shape) == 2
        and name.endswith("weight")
        and shape[0] in counts
        and not name.startswith(("classifier.", "score."))
        and not any(word in name.lower() for word in _NO_ROUTERS)
    ]
    if not found:
        raise LitMoEError(
            f"no router was found in {tensors.folder}: no matrix outside of experts and attention "
            f"has as many rows as its config has experts ({sorted(counts)})"
        )
    return sorted(found, key=_in_layer_order)


def rows_without_expert(config: Mapping[str, Any], path: str = "") -> dict[str, int]:
    """Return where a config counts router rows without an expert, and how many.

    Dropping experts may leave such rows, behind those of the experts that stay: routers with equal
    numbers of rows, but not of these, have their rows in different orders.
    """
    found: dict[str, int] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= rows_without_expert(value, f"{path}{key}.")
        elif key == _NULL_ROWS and (value or path):
            found[path + key] = value
    return found


def same_elsewhere(first: CheckpointTensors, second: CheckpointTensors) -> bool:
    """Whether a few small tensors that are no routers are equal in two folders."""
    small = sorted(
        (
            name
            for name, shape in first.shapes.items()
            if second.shapes.get(name) == shape and 4 * _numel(shape) <= _SAMPLE_BYTES
        ),
        key=lambda name: _numel(first.shapes[name]),
    )
    sample = {*small[:_MOST_SAMPLES], *small[-_MOST_SAMPLES:]}
    return all(torch.equal(first.read(n), second.read(n)) for n in sample)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise LitMoEError(f"{path} cannot be read: {error}") from error


def _json_of(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise LitMoEError(f"{file} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _files_of(folder: Path) -> dict[str, Path]:
    """Return tensor name -> file."""
    if not folder.is_dir():
        raise LitMoEError(f"checkpoint folder {folder} does not exist{made_by(folder)}")
    index, single = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
    if index.is_file():
        names = _json_of(index).get("weight_map")
        if not isinstance(names, dict):
            raise LitMoEError(f"{index} has no weight_map, which says what file holds which tensor")
        return {name: folder / file for name, file in names.items()}
    if single.is_file():
        with _opened(single) as file:
            return dict.fromkeys(file.keys(), single)
    if (folder / _ADAPTER_CONFIG_NAME).is_file():
        raise LitMoEError(
            f"{folder} holds only a LoRA adapter, which leaves the routers as they were, so that "
            "all changes would be 0; fine-tune the routers themselves, or merge an adapter that "
            "covers them into the model"
        )
    raise LitMoEError(f"{folder} holds no {SAFE_WEIGHTS_NAME}, which routers could be read from")


def _collect(part: Mapping[str, Any], found: set[int], default: int = 0, tail: int = 0) -> None:
    """Add every number of router rows that a config speaks of; layers may override parts of it."""
    count = next((part[k] for k in EXPERT_KEYS if isinstance(part.get(k), int)), default)
    tails = [part[k] for k in (_NULL_ROWS, "zero_expert_num") if isinstance(part.get(k), int)]
    tail = sum(tails) if tails else tail
    if count > 1 or tail:
        found |= {count, count + tail}
    for value in part.values():
        if isinstance(value, dict):
            _collect(value, found, count, tail)


def _in_layer_order(name: str) -> list[tuple[int, str]]:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")]


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
