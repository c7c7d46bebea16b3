"""Texts that tell teachers and vocabularies apart, from everything that their logits come from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from lit_moe.assets import resolve_model
from lit_moe.checkpoints import read_config
from lit_moe.sharding.partitions import stream_whole

_WHOLE_BYTES = 16 << 30
_PIECE = 1 << 20
_PIECES = 1024
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")
_BESIDE = ("config.json", "*.index.json", "*.py")
_NO_MATTER = ("_name_or_path", "architectures", "dtype", "transformers_version")


def fingerprint(model: PreTrainedModel) -> str:
    """Return a text that tells models apart: their configs, and each bit of their weights.

    Takes a second or two per GB. Collective.
    """
    found = hashlib.blake2b(digest_size=16)
    config = {k: v for k, v in model.config.to_dict().items() if k not in _NO_MATTER}
    found.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in stream_whole(model):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1).cpu().contiguous()
        found.update(flat.view(torch.uint8).numpy().data)
    return found.hexdigest()


def folder_fingerprint(path: str, dtype: str) -> str:
    """Return a text that tells checkpoints apart.

    Reads config, model code and weight files, safetensors or pickled, from end to end if together
    they have at most 16 GiB. Of larger checkpoints it reads 1024 pieces of 1 MiB from each file,
    evenly spread, and the sizes: fine-tuning, which changes nearly all values, shows, but a change
    of a few values between the pieces does not. A checkpoint of the hub is known by its commit.

    Args:
        path: folder or hub id.
        dtype: that the teacher runs in.
    """
    found = hashlib.blake2b(dtype.encode(), digest_size=16)
    folder = Path(resolve_model(path)).expanduser()
    if not folder.is_dir():
        found.update(f"{path} {read_config(path)._commit_hash}".encode())
        return found.hexdigest()
    files = sorted({file for pattern in (*_WEIGHTS, *_BESIDE) for file in folder.glob(pattern)})
    is_large = sum(file.stat().st_size for file in files) > _WHOLE_BYTES
    for file in files:
        found.update(f"{file.name} {file.stat().st_size}".encode())
        for piece in _pieces(file, only_some=is_large):
            found.update(piece)
    return found.hexdigest()


def vocabulary_fingerprint(tokenizer: Any) -> str:
    """Return a text that tells vocabularies apart; '' for no tokenizer."""
    if tokenizer is None:
        return ""
    words = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda word: word[1]))
    return hashlib.blake2b(words.encode(), digest_size=16).hexdigest()


def _pieces(file: Path, *, only_some: bool) -> Iterator[bytes]:
    """Yield a file from end to end, or so many pieces of it, the first and the last among them."""
    last = max(0, file.stat().st_size - _PIECE)
    with file.open("rb") as stream:
        if not only_some or last <= _PIECE * (_PIECES - 1):
            while piece := stream.read(_PIECE):
                yield piece
            return
        for number in range(_PIECES):
            stream.seek(last * number // (_PIECES - 1))
            yield stream.read(_PIECE)
