"""What a teacher said of the training text, on disk, so that it need not stay in memory.

A block of text is found by its tokens, not by its place: order, epochs and ranks do not matter.
Files ``HASH.safetensors`` hold some blocks each and appear under their names when they are
complete, so a run that was killed goes on behind the last of them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_moe.distill.top_logits import TopLogits
from lit_moe.errors import LitMoEError

FORMAT = "lit-moe/teacher-logits/2"
_KEY_FILE = "key.json"
_PARTIAL = ".partial"
_BYTES_PER_FILE = 1 << 24


@dataclass(frozen=True)
class CacheKey:
    """Whose logits these are; blocks of text are told apart by themselves.

    Attributes:
        teacher: fingerprint of its weights.
        tokenizer: fingerprint of its vocabulary, '' if there is none.
        vocabulary: number of logits per token.
        top_k: how many of them are kept.
    """

    teacher: str
    tokenizer: str
    vocabulary: int
    top_k: int


class LogitsCache:
    """The cache in one folder, opened for reading and adding.

    Args:
        folder: made if it is not there.
        key: what it must be of.

    Raises:
        LitMoEError: if the folder is of something else, or a file of it is damaged.
    """

    def __init__(self, folder: str | Path, key: CacheKey) -> None:
        self.folder, self.key = Path(folder).expanduser(), key
        self._waiting: dict[bytes, TopLogits] = {}
        self._bytes = 0
        self._check_key()
        self._places: dict[bytes, tuple[Path, int]] = {}
        self._files: dict[Path, Any] = {}
        self.refresh()

    def __len__(self) -> int:
        return len(self._places)

    def refresh(self) -> None:
        """Take notice of files that other processes have added."""
        known = {path for path, _ in self._places.values()}
        for path in sorted(self.folder.glob("*.safetensors")):
            if path not in known:
                self._places |= {block: (path, row) for row, block in enumerate(_blocks_of(path))}

    def lacks(self, batch: Mapping[str, Tensor]) -> bool:
        """Whether some block of a batch is not there yet."""
        return any(b not in self._places and b not in self._waiting for b in blocks_of(batch))

    def add(self, batch: Mapping[str, Tensor], top: TopLogits) -> None:
        """Keep what the teacher said of a batch; on disk after :meth:`flush` at the latest."""
        rows = zip(blocks_of(batch), top.values.cpu(), top.ids.cpu(), strict=True)
        for block, values_SK, ids_SK in rows:
            if block not in self._places and block not in self._waiting:
                self._waiting[block] = TopLogits(values_SK, ids_SK)
                self._bytes += values_SK.nbytes + ids_SK.nbytes
        if self._bytes >= _BYTES_PER_FILE:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting, blocks of one length into a file of their own."""
        by_length: dict[int, list[bytes]] = {}
        for block, top in self._waiting.items():
            by_length.setdefault(top.values.shape[0], []).append(block)
        for blocks in by_length.values():
            path = self._write(blocks)
            self._places |= {block: (path, row) for row, block in enumerate(blocks)}
        self._waiting.clear()
        self._bytes = 0

    def read(self, batch: Mapping[str, Tensor]) -> TopLogits:
        """Return what the teacher said of a batch, on the batch's device.

        Raises:
            LitMoEError: if a block is not there.
        """
        device = batch["input_ids"].device
        rows = [self._row(block) for block in blocks_of(batch)]
        values, ids = (torch.stack(part).to(device) for part in zip(*rows, strict=True))
        return TopLogits(values, ids)

    def _row(self, block: bytes) -> tuple[Tensor, Tensor]:
        if block not in self._places:
            raise LitMoEError(
                f"the cache {self.folder} holds {len(self)} blocks of text, but not one that is "
                "trained on now, although it was completed for the coming steps: the data module "
                "gives other blocks now, or the run was resumed behind its last step; start it "
                "anew, or leave loss.cache out, which keeps the teacher in memory"
            )
        path, row = self._places[block]
        if path not in self._files:
            self._files[path] = safe_open(path, framework="pt")
        file = self._files[path]
        return file.get_slice("values")[row], file.get_slice("ids")[row]

    def _write(self, blocks: list[bytes]) -> Path:
        tensors = {
            "blocks": torch.frombuffer(bytearray(b"".join(blocks)), dtype=torch.uint8).view(-1, 16),
            "values": torch.stack([self._waiting[block].values for block in blocks]),
            "ids": torch.stack([self._waiting[block].ids for block in blocks]),
        }
        path = self.folder / f"{_digest(blocks).hex()}.safetensors"
        partial = path.with_suffix(f"{_PARTIAL}-{os.getpid()}")
        save_file(tensors, partial)
        _replace(partial, path)
        return path

    def _check_key(self) -> None:
        file, mine = self.folder / _KEY_FILE, {"format": FORMAT, **asdict(self.key)}
        if not file.is_file():
            self._begin(file, mine)
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise LitMoEError(f"{file} is damaged: {error}; delete {self.folder}") from error
        found = found if isinstance(found, dict) else {}
        odd = [name for name in mine if found.get(name) != mine[name]]
        if odd:
            pairs = ", ".join(f"{name} {found.get(name)!r} and not {mine[name]!r}" for name in odd)
            raise LitMoEError(
                f"the cache {self.folder} is not of this run's teacher: it says {pairs}; name "
                "another folder in loss.cache, or delete this one"
            )

    def _begin(self, file: Path, key: dict[str, Any]) -> None:
        others = [path for path in self.folder.glob("[!.]*") if path != file]
        if others:
            raise LitMoEError(
                f"{self.folder} holds files, but no {_KEY_FILE}, so it is no cache of logits; name "
                "another folder in loss.cache"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{_KEY_FILE}{_PARTIAL}-{os.getpid()}")
        partial.write_text(json.dumps(key, indent=2) + "\n", encoding="utf-8")
        _replace(partial, file)


def blocks_of(batch: Mapping[str, Tensor]) -> list[bytes]:
    """Return 16 bytes for each block of a batch, which tell its tokens and padding apart."""
    ids, mask = (batch[name].cpu().long().numpy() for name in ("input_ids", "attention_mask"))
    return [_digest([i.tobytes(), m.tobytes()]) for i, m in zip(ids, mask, strict=True)]


def _digest(parts: Iterable[bytes]) -> bytes:
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part)
    return found.digest()


def _blocks_of(path: Path) -> list[bytes]:
    """Return the blocks in one file of a cache."""
    try:
        with safe_open(path, framework="pt") as file:
            found = file.get_tensor("blocks")
            counts = {len(found), *(file.get_slice(n).get_shape()[0] for n in ("values", "ids"))}
    except (SafetensorError, OSError) as error:
        raise LitMoEError(
            f"{path} is damaged ({error}); delete it, and the next run writes it again"
        ) from error
    if len(counts) != 1:
        raise LitMoEError(f"{path} is damaged: its tensors are not of equally many blocks")
    return [bytes(row) for row in found.numpy()]


def _replace(partial: Path, path: Path) -> None:
    """Give a complete file its name, on the disk too."""
    with partial.open("rb") as stream:
        os.fsync(stream.fileno())
    partial.replace(path)
