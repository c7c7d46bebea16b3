"""How much may stay: a ratio, a number of experts, or a number of bytes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from lit_moe.adapters.site import MoESite
from lit_moe.errors import LitMoEError
from lit_moe.sharding.partitions import whole_numel, whole_shape

_UNITS = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


@dataclass(frozen=True)
class ModelBytes:
    """What a model weighs, split into what pruning can and cannot free.

    Attributes:
        fixed: bytes of everything that stays whatever is pruned (embeddings, attention, norms,
            shared experts).
        per_expert: layer name -> bytes that go with one expert (its matrices, biases, router row).
    """

    fixed: int
    per_expert: Mapping[str, int]

    def total(self, counts: Mapping[str, int]) -> int:
        """Return the bytes of the model with ``counts`` experts per layer."""
        return self.fixed + sum(self.per_expert[layer] * n for layer, n in counts.items())


@dataclass(frozen=True)
class Budget:
    """Exactly one amount, and how it is spread over the layers.

    Attributes:
        keep_ratio: fraction of experts that stay, strictly between 0 and 1. Per layer it is
            rounded to the nearest possible count, halves up (0.5 of 9 keeps 5), in whole rows of
            groups where routing is group-limited. Layers that are protected keep all on top of
            it. ``plan.keep_ratio`` tells the ratio that came out.
        keep_experts: experts that stay in each layer (on average, if ``scope`` is global).
        max_bytes: bytes that the whole pruned model may take, as a number or like ``"13GB"``
            (10^9) or ``"13GiB"`` (2^30); the most experts that fit are kept. Needs ``sizes``.
        scope: ``layer``: every layer keeps the same number; ``global``: one ranking over all
            layers, so that layers end up with different numbers.
        floor: experts that every layer keeps at least; never less than the router needs.
        normalise: ``global`` only: standardise the scores of each layer (mean 0, deviation 1)
            before layers are compared. Without it, criteria that grow with depth, such as
            activation norms, empty the early layers.
        sizes: what the model weighs, see :func:`measure_bytes`; only for ``max_bytes``.

    Raises:
        LitMoEError: if not exactly one amount is given, or it can fit no model at all.
    """

    keep_ratio: float | None = None
    keep_experts: int | None = None
    max_bytes: int | str | None = None
    scope: Literal["layer", "global"] = "layer"
    floor: int = 1
    normalise: bool = True
    sizes: ModelBytes | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        amounts = {
            "keep_ratio": self.keep_ratio,
            "keep_experts": self.keep_experts,
            "max_bytes": self.max_bytes,
        }
        given = [f"{key}={value!r}" for key, value in amounts.items() if value is not None]
        if len(given) != 1:
            raise LitMoEError(
                f"give exactly one of keep_ratio, keep_experts, max_bytes; "
                f"got {', '.join(given) or 'none'}"
            )
        if self.scope not in ("layer", "global"):
            raise LitMoEError(f"scope={self.scope!r} is unknown; use 'layer' or 'global'")
        _check_ratio(self.keep_ratio)
        _check_count("keep_experts", self.keep_experts)
        _check_count("floor", self.floor)
        if self.max_bytes is not None:
            object.__setattr__(self, "max_bytes", parse_bytes(self.max_bytes))

    @property
    def limit(self) -> int:
        """``max_bytes`` as a number."""
        return parse_bytes(self.max_bytes or 0)

    @property
    def asked(self) -> str:
        """The amount as it was asked for, for messages."""
        if self.keep_ratio is not None:
            return f"keep_ratio={self.keep_ratio:g}"
        if self.keep_experts is not None:
            return f"keep_experts={self.keep_experts}"
        return f"max_bytes={self.max_bytes}"


def parse_bytes(size: int | str) -> int:
    """Return a number of bytes from a number or a string with a unit.

    Raises:
        LitMoEError: if it is no positive size.

    >>> parse_bytes("13GB"), parse_bytes("1.5 GiB"), parse_bytes(4096)
    (13000000000, 1610612736, 4096)
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", str(size))
    unit = match[2].lower() or "b" if match else ""
    if match is None or isinstance(size, bool) or unit not in _UNITS:
        raise LitMoEError(f"{size!r} is no size in bytes; write 13000000000, '13GB' or '12.1GiB'")
    num = int(float(match[1]) * _UNITS[unit])
    if num < 1:
        raise LitMoEError(f"a size of {size!r} holds no model; it must be at least 1 byte")
    return num


def measure_bytes(model: nn.Module, sites: Iterable[MoESite]) -> ModelBytes:
    """Return what ``model`` weighs, in the types that it is held in; works on the meta device.

    Tied weights count once, as in a checkpoint.
    """
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    total = sum(whole_numel(t) * t.element_size() for t in tensors.values())
    per_expert: dict[str, int] = {}
    for site in sites:
        per_expert[site.name] = 0
        for axis in site.axes:
            if axis.kind == "id_table" or axis.name not in tensors:
                continue
            tensor = tensors[axis.name]
            rows = whole_shape(tensor)[axis.dim]
            row_bytes = whole_numel(tensor) * tensor.element_size() // rows
            per_expert[site.name] += row_bytes * axis.rows_per_expert
    experts = sum(per_expert[site.name] * site.num_experts for site in sites)
    return ModelBytes(fixed=total - experts, per_expert=per_expert)


def _check_ratio(ratio: float | None) -> None:
    is_number = isinstance(ratio, float | int) and not isinstance(ratio, bool)
    if ratio is None or (is_number and 0 < ratio < 1):
        return
    if is_number and ratio == 1:
        raise LitMoEError("keep_ratio=1 keeps every expert, so nothing would be pruned")
    hint = f"; for {ratio:g} % write {ratio / 100:g}" if is_number and 1 < ratio < 100 else ""
    raise LitMoEError(
        f"keep_ratio={ratio!r} must be the fraction of experts to keep, "
        f"strictly between 0 and 1{hint}"
    )


def _check_count(name: str, count: int | None) -> None:
    if count is None:
        return
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise LitMoEError(f"{name}={count!r} must be a whole number of experts, at least 1")
