"""Dataclass trees to plain JSON values and back, with errors that name the key."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING
from typing import Any, Literal

from lit_moe.errors import LitMoEError


def to_plain(tree: Any) -> dict[str, Any]:
    """Return a dataclass as dicts, lists and scalars; numbers that JSON lacks become strings."""
    return plain_values(dataclasses.asdict(tree))


def plain_values(value: Any) -> Any:
    """Return dicts and lists as JSON can hold them; numbers that it lacks become strings."""
    if isinstance(value, dict):
        return {str(k): plain_values(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def from_plain(kind: Any, value: Any, where: str) -> Any:
    """Return a value from JSON as the annotated ``kind``: a dataclass, container or scalar.

    Args:
        kind: type annotation.
        value: as parsed from JSON.
        where: name of the value in errors.

    Raises:
        LitMoEError: if a key is missing or unknown, or a value is of the wrong kind.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        return _fields(kind, value, where)
    if origin is types.UnionType:
        return None if value is None else from_plain(args[0], value, where)
    if origin is dict and isinstance(value, Mapping):
        return {k: from_plain(args[1], v, f"{where}.{k}") for k, v in value.items()}
    if origin is list and isinstance(value, list):
        return [from_plain(args[0], v, where) for v in value]
    if origin is Literal and value in args:
        return value
    if kind is float and isinstance(value, float | int | str):
        return float(value)
    if isinstance(kind, type) and isinstance(value, kind):
        return value
    raise LitMoEError(f"{where} should be {kind}, found {value!r}")


def _fields(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise LitMoEError(f"{where} should be an object, found {value!r}")
    kinds = typing.get_type_hints(kind)
    for key in value:
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1) or sorted(kinds)
            raise LitMoEError(f"{where} has an unknown key {key!r}; known: {', '.join(near)}")
    missing = [f.name for f in dataclasses.fields(kind) if _is_required(f) and f.name not in value]
    if missing:
        raise LitMoEError(f"{where} lacks {', '.join(missing)}")
    return kind(**{k: from_plain(kinds[k], v, f"{where}.{k}") for k, v in value.items()})


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING
