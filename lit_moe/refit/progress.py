"""Solved layers on disk, so that a killed refit goes on where it was."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe import quantities
from lit_moe.refit.collective import on_all_ranks
from lit_moe.refit.options import RefitOptions
from lit_moe.refit.report import LayerRefit

_LOG = logging.getLogger(__name__)


class Progress:
    """One file per solved layer, written in one step, below a folder named after the request.

    Args:
        folder: where progress of all refits lies; None to keep none.
        signature: what makes this refit this refit; see :func:`signature_of`.
        writes: whether this process writes (rank 0).
    """

    def __init__(self, folder: Path | None, signature: str, *, writes: bool = True) -> None:
        self._folder = None if folder is None else folder / signature
        self._writes = writes
        self._tell_of_others()

    def load(self, name: str) -> tuple[Tensor | None, LayerRefit] | None:
        """Collective: return update and record of a layer that was solved before, else None."""
        if self._folder is None or not on_all_ranks(self._path(name).exists()):
            return None
        tensors = load_file(self._path(name))
        record = LayerRefit(**json.loads(bytes(tensors["record"].tolist()).decode()))
        return tensors.get("update"), dataclasses.replace(record, resumed=True)

    def save(self, name: str, update: Tensor | None, record: LayerRefit) -> None:
        """Write one layer; a kill in the middle leaves nothing that :meth:`load` would take."""
        if self._folder is None or not self._writes:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dataclasses.asdict(record)).encode()
        tensors = {"record": _bytes(text)}
        if update is not None:
            tensors["update"] = update.float().cpu().contiguous()
        unfinished = self._path(name).with_suffix(".unfinished")
        save_file(tensors, unfinished)
        os.replace(unfinished, self._path(name))

    def clear(self) -> None:
        """Remove the files of a refit that is through."""
        if self._folder is not None and self._writes:
            shutil.rmtree(self._folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # other refits are on their way, or it never was
                self._folder.parent.rmdir()

    def _tell_of_others(self) -> None:
        """Name what killed runs of other requests left, which nothing else would remove."""
        if self._folder is None or not self._writes or not self._folder.parent.is_dir():
            return
        others = [f for f in self._folder.parent.iterdir() if f.is_dir() and f != self._folder]
        if others:
            total = sum(file.stat().st_size for f in others for file in f.rglob("*"))
            _LOG.info(
                "%s holds %s of refits with other models, text or options, for instance %s; "
                "delete them if none of those runs is to go on",
                *(self._folder.parent, quantities.size(total), others[0].name),
            )

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}.safetensors"


def signature_of(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    batches: Sequence[Mapping[str, Tensor]],
    options: RefitOptions,
) -> str:
    """Return a hash of both models' configs and weights, the tokens in order, and the options."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(options), sort_keys=True).encode())
    for model in (student, teacher):
        config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
        digest.update(config.encode())
        for name, tensor in model.state_dict().items():
            total = tensor.sum(dtype=torch.float64).item()
            digest.update(f"{name} {tuple(tensor.shape)} {total!r}".encode())
    for batch in batches:
        for name, value in batch.items():
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]


def _bytes(text: bytes) -> Tensor:
    return torch.tensor(list(text), dtype=torch.uint8)
