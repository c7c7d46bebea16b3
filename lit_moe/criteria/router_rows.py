"""Router rows straight from a checkpoint folder: headers first, then only the bytes of routers."""

from __future__ import annotations

import json
from collections.abc import Mapping
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

    def read(self, name: str) -> Tensor:
        """Return one tensor; nothing else is read."""
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for path in dict.fromkeys(self._files.values()):
            try:
                with safe_open(path, framework="pt") as file:
                    shapes |= {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise LitMoEError(f"{path} cannot be read: {error}") from error
        return shapes


def router_names(tensors: CheckpointTensors) -> list[str]:
    """Return the names of the router matrices of a folder, told by name and shape, in layer order.

    A router matrix has as many rows as the config has experts, and stands outside of experts,
    attention, norms and embeddings. So it is in all families but ernie4_5_vl_moe, inkling, jetmoe,
    qwen4_exp and zaya; there compare a loaded model with a folder by :class:`RouterChange`.

    Raises:
        LitMoEError: if there is none.
    """
    counts = _expert_counts(tensors.folder)
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


def _files_of(folder: Path) -> dict[str, Path]:
    """Return tensor name -> file."""
    if not folder.is_dir():
        raise LitMoEError(f"checkpoint folder {folder} does not exist{made_by(folder)}")
    index, single = folder / SAFE_WEIGHTS_INDEX_NAME, folder / SAFE_WEIGHTS_NAME
    if index.is_file():
        names: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in names.items()}
    if single.is_file():
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    if (folder / _ADAPTER_CONFIG_NAME).is_file():
        raise LitMoEError(
            f"{folder} holds only a LoRA adapter, which leaves the routers as they were, so that "
            "all changes would be 0; fine-tune the routers themselves, or merge an adapter that "
            "covers them into the model"
        )
    raise LitMoEError(f"{folder} holds no {SAFE_WEIGHTS_NAME}, which routers could be read from")


def _expert_counts(folder: Path) -> set[int]:
    """Return every number of router rows that the config speaks of."""
    file = folder / CONFIG_NAME
    if not file.is_file():
        raise LitMoEError(f"folder {folder} holds no {CONFIG_NAME}, so it is not a model folder")
    found: set[int] = set()
    _collect(json.loads(file.read_text(encoding="utf-8")), found, 0)
    return found


def _collect(part: Mapping[str, Any], found: set[int], default: int) -> None:
    count = next((part[k] for k in EXPERT_KEYS if isinstance(part.get(k), int)), default)
    extra = part.get("num_null_experts", 0) + (part.get("zero_expert_num") or 0)
    if count > 1 or extra:
        found |= {count, count + extra}
    for value in part.values():
        if isinstance(value, dict):
            _collect(value, found, count)


def _in_layer_order(name: str) -> list[tuple[int, str]]:
    return [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")]


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
