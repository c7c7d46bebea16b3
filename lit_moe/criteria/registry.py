"""Criteria by name, by class path, or as they are."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from typing import Any, TypeVar

from lit_moe.criteria.base import Criterion
from lit_moe.errors import LitMoEError

C = TypeVar("C", bound=type[Criterion])

_CRITERIA: dict[str, type[Criterion]] = {}


def register(name: str) -> Callable[[C], C]:
    """Class decorator: make a criterion known as ``name``.

    Raises:
        LitMoEError: if another class already has that name.
    """

    def add(cls: C) -> C:
        known = _CRITERIA.get(name)
        if known is not None and known is not cls:
            raise LitMoEError(f"criterion name {name!r} is taken by {known.__qualname__}")
        cls.name = name
        _CRITERIA[name] = cls
        return cls

    return add


def available() -> list[str]:
    """Return the short names of all registered criteria, sorted."""
    return sorted(_CRITERIA)


def get_criterion(criterion: str | Criterion, **init_args: Any) -> Criterion:
    """Return a criterion from a short name, a class path, or an instance.

    Args:
        criterion: ``"reap"``, ``"my_package.MyCriterion"``, or a ready instance.
        init_args: fields of the criterion; none for an instance.

    Raises:
        LitMoEError: if the name is unknown (names the nearest and all others), the class cannot
            be imported or is no criterion, or it has no such field.

    >>> get_criterion("router_norm", keep="largest").name
    'router_norm'
    """
    if isinstance(criterion, Criterion):
        if init_args:
            raise LitMoEError(
                f"criterion {criterion.name!r} is already built; set {sorted(init_args)} "
                f"where it is built"
            )
        return criterion
    cls = _import_class(criterion) if "." in criterion else _named_class(criterion)
    try:
        return cls(**init_args)
    except TypeError as error:
        raise LitMoEError(f"criterion {criterion!r} cannot be built: {error}") from error


def _named_class(name: str) -> type[Criterion]:
    if name in _CRITERIA:
        return _CRITERIA[name]
    near = difflib.get_close_matches(name.lower(), available(), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise LitMoEError(
        f"unknown criterion {name!r}: {hint}available are {', '.join(available())}, "
        f"or the path of your own class, such as 'my_package.MyCriterion'"
    )


def _import_class(path: str) -> type[Criterion]:
    module_name, _, class_name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise LitMoEError(f"criterion class {path!r} cannot be imported: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Criterion)):
        raise LitMoEError(f"{path!r} is not a subclass of lit_moe.criteria.Criterion")
    return found
