"""Documents from wherever a user keeps text: files of four kinds, ``datasets`` folders, the hub."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from lit_moe.errors import LitMoEError

_PIECE = 1 << 20
_FEATURES = Features({"domain": Value("string"), "text": Value("string")})
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def load_documents(sources: Sequence[str], *, text_column: str = "text") -> Dataset:
    """Return one dataset with the string columns ``domain`` and ``text``.

    Args:
        sources: each a ``.txt``, ``.jsonl``, ``.json`` or ``.parquet`` file, a folder written by
            ``datasets.save_to_disk``, or a hub id, optionally with a configuration and a split
            (``name``, ``name:config``, ``name:config:split``). A file without a ``domain`` column
            is one domain, named after the file.
        text_column: name of the column that holds the text.

    Raises:
        LitMoEError: naming the source that is missing, empty, or has no such column.
    """
    if not sources:
        raise LitMoEError("no text was given: name at least one file, folder or hub id")
    parts = [_with_domain(source, _read(source), text_column) for source in sources]
    return concatenate_datasets(parts)


def _read(source: str) -> Dataset:
    path = Path(source)
    if path.is_dir():
        return _one_split(source, load_from_disk(source), None)
    if path.suffix == ".txt" or path.suffix in _READERS:
        return _read_file(path)
    if path.is_absolute() or path.suffix:
        raise LitMoEError(
            f"text source {source!r} was not found; use an existing .txt, .jsonl, .json or "
            ".parquet file, a datasets folder, or a hub id"
        )
    return _read_hub(source)


def _read_file(path: Path) -> Dataset:
    if not path.is_file():
        raise LitMoEError(f"text file {path} does not exist (looked from {os.getcwd()})")
    if path.stat().st_size == 0:
        raise LitMoEError(f"text file {path} is empty")
    try:
        if path.suffix == ".txt":
            return Dataset.from_generator(
                _pieces, gen_kwargs={"path": str(path), "stamp": path.stat().st_mtime_ns}
            )
        return load_dataset(_READERS[path.suffix], data_files=str(path), split="train")
    except (DatasetGenerationError, ValueError, OSError) as error:
        raise LitMoEError(f"text file {path} could not be read: {_innermost(error)}") from error


def _read_hub(source: str) -> Dataset:
    name, config, split = (*source.split(":"), None, None)[:3]
    try:
        data = load_dataset(name, config or None)
    except (DatasetNotFoundError, ConnectionError, OSError, ValueError) as error:
        raise LitMoEError(
            f"text source {source!r} is neither an existing file or folder nor a data set that "
            f"could be loaded from the hub: {_innermost(error)}"
        ) from error
    return _one_split(source, data, split)


def _one_split(source: str, data: Dataset | DatasetDict, split: str | None) -> Dataset:
    if isinstance(data, Dataset):
        return data
    wanted = split or "train"
    if wanted not in data:
        raise LitMoEError(f"{source!r} has no split {wanted!r}; it has {sorted(data)}")
    return data[wanted]


def _with_domain(source: str, data: Dataset, text_column: str) -> Dataset:
    if text_column not in data.column_names:
        raise LitMoEError(
            f"{source!r} has no column {text_column!r}; it has {data.column_names} "
            "(set text_column)"
        )
    if len(data) == 0:
        raise LitMoEError(f"text source {source!r} holds no document")
    if text_column != "text":
        data = data.rename_column(text_column, "text")
    if "domain" not in data.column_names:
        data = data.add_column("domain", [Path(source).stem] * len(data))
    data = data.select_columns(["domain", "text"])
    return data if data.features == _FEATURES else data.cast(_FEATURES)


def _pieces(path: str, stamp: int) -> Iterator[dict[str, Any]]:  # noqa: ARG001
    """Yield a text file in pieces cut at line ends; ``stamp`` makes the cache see an edit."""
    with Path(path).open(encoding="utf-8") as stream:
        while lines := stream.readlines(_PIECE):
            yield {"text": "".join(lines)}


# A reader wraps whatever its parser raised; only the innermost message helps a user.
def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"
