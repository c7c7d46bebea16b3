"""Weight masks: what a pruning of single weights decided, as a frozen value, one bit per weight."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_moe.errors import PlanError
from lit_moe.plan import KeepPlan

FORMAT = "lit-moe/weight-masks/1"
_SEPARATOR = "/"


@dataclass(frozen=True, eq=False)
class WeightMasks:
    """Which weights of which experts stay. Rows are outputs and columns inputs in any layout.

    Attributes:
        bits: layer -> matrix (``gate``, ``up``, ``down``) -> uint8 tensor ``(E, outputs, bytes)``
            on the CPU; bit i of byte b is column ``8 b + i``, set where a weight stays.
        widths: layer -> matrix -> number of columns.
        method: that decided; like ``pattern`` and ``family`` it does not count for equality.
        pattern: ``N:M`` or a ratio, as text.
        family: model type that the masks were made for; None if unknown.

    Raises:
        PlanError: if bits and widths do not belong together.
    """

    bits: Mapping[str, Mapping[str, Tensor]]
    widths: Mapping[str, Mapping[str, int]]
    method: str = ""
    pattern: str = ""
    family: str | None = None

    def __post_init__(self) -> None:
        for layer, matrix in self._names():
            bits, width = self.bits[layer][matrix], self.widths.get(layer, {}).get(matrix, -1)
            if bits.dtype != torch.uint8 or bits.ndim != 3 or bits.shape[2] != -(-width // 8):
                raise PlanError(
                    f"masks of {layer} {matrix} are damaged: {tuple(bits.shape)} bytes do not hold "
                    f"one bit for each of {width} columns"
                )

    def __iter__(self) -> Iterator[str]:
        return iter(self.bits)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WeightMasks):
            return NotImplemented
        return self.shapes == other.shapes and all(
            torch.equal(self.bits[layer][matrix], other.bits[layer][matrix])
            for layer, matrix in self._names()
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def shapes(self) -> dict[str, dict[str, tuple[int, int, int]]]:
        """Layer -> matrix -> experts, outputs, inputs."""
        return {
            layer: {m: (*bits.shape[:2], self.widths[layer][m]) for m, bits in matrices.items()}
            for layer, matrices in self.bits.items()
        }

    def keep(self, layer: str) -> dict[str, Tensor]:
        """Return matrix -> boolean tensor ``(E, outputs, inputs)`` on the CPU, True = stays."""
        return {m: unpack(bits, self.widths[layer][m]) for m, bits in self.bits[layer].items()}

    def sparsity(self) -> dict[str, dict[str, float]]:
        """Layer -> matrix -> fraction of weights that go."""
        return {
            layer: {
                matrix: 1 - float(keep.double().mean()) for matrix, keep in self.keep(layer).items()
            }
            for layer in self
        }

    def shrunk(self, plan: KeepPlan) -> WeightMasks:
        """Return the masks of the experts that a plan keeps, which was made after the masks.

        Raises:
            PlanError: if the plan is for another number of experts.
        """
        experts = {layer: next(iter(shape.values()))[0] for layer, shape in self.shapes.items()}
        plan.check_fits(experts, family=self.family)
        bits = {
            layer: {m: packed[list(plan.kept[layer])] for m, packed in matrices.items()}
            for layer, matrices in self.bits.items()
        }
        return WeightMasks(bits, self.widths, self.method, self.pattern, self.family)

    def to_dict(self) -> dict[str, Any]:
        """Return tensors and plain values, as kept in checkpoints."""
        return {
            "format": FORMAT,
            "bits": {layer: dict(matrices) for layer, matrices in self.bits.items()},
            "widths": {layer: dict(matrices) for layer, matrices in self.widths.items()},
            "method": self.method,
            "pattern": self.pattern,
            "family": self.family,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WeightMasks:
        """Inverse of :meth:`to_dict`.

        Raises:
            PlanError: if ``data`` holds no masks of this format.
        """
        if data.get("format") != FORMAT:
            raise PlanError(f"no weight masks: expected {FORMAT!r}, found {data.get('format')!r}")
        names = ("bits", "widths", "method", "pattern", "family")
        return cls(**{name: data[name] for name in names})

    def save(self, path: str | Path) -> None:
        """Write one safetensors file."""
        tensors = {
            _SEPARATOR.join(key): self.bits[key[0]][key[1]].contiguous() for key in self._names()
        }
        facts = {k: v for k, v in self.to_dict().items() if k not in ("bits", "format")}
        save_file(tensors, path, metadata={"format": FORMAT, "facts": json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path) -> WeightMasks:
        """Read what :meth:`save` wrote.

        Raises:
            PlanError: if the file is missing, damaged or holds something else.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise PlanError(
                        f"{path} holds no weight masks: expected {FORMAT!r}, found "
                        f"{metadata.get('format')!r}"
                    )
                bits: dict[str, dict[str, Tensor]] = {}
                for key in file.keys():  # noqa: SIM118 - no dictionary
                    layer, _, matrix = key.rpartition(_SEPARATOR)
                    bits.setdefault(layer, {})[matrix] = file.get_tensor(key)
            return cls.from_dict({"format": FORMAT, "bits": bits, **json.loads(metadata["facts"])})
        except FileNotFoundError as error:
            raise PlanError(f"mask file {path} does not exist") from error
        except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
            raise PlanError(f"mask file {path} cannot be read: {error}") from error

    def check_fits(
        self, shapes: Mapping[str, Mapping[str, tuple[int, ...]]], *, family: str | None = None
    ) -> None:
        """Refuse masks made for another model.

        Args:
            shapes: layer -> matrix -> shape of the model at hand.
            family: its model type; compared only where the masks know their own.

        Raises:
            PlanError: naming both families, or the first matrix that differs.
        """
        if self.family and family and self.family != family:
            raise PlanError(
                f"masks were made for another model: family {self.family!r}, this model is "
                f"{family!r}"
            )
        mine = self.shapes
        for layer in sorted(set(mine) | set(shapes)):
            for matrix in sorted({*mine.get(layer, ()), *shapes.get(layer, ())}):
                ours = mine.get(layer, {}).get(matrix)
                theirs = shapes.get(layer, {}).get(matrix)
                if ours != theirs:
                    raise PlanError(
                        f"masks were made for another model: {matrix} of {layer!r} is "
                        f"{ours or 'not there'} in the masks and {theirs or 'not there'} in the "
                        "model (experts, outputs, inputs)"
                    )

    def _names(self) -> Iterator[tuple[str, str]]:
        for layer, matrices in self.bits.items():
            for matrix in matrices:
                yield layer, matrix


def pack(keep: Tensor) -> Tensor:
    """Return one bit per entry of the last dimension, as uint8 on the CPU."""
    packed = np.packbits(keep.cpu().numpy(), axis=-1, bitorder="little")
    return torch.from_numpy(packed)


def unpack(bits: Tensor, width: int) -> Tensor:
    """Inverse of :func:`pack` for ``width`` entries."""
    flags = np.unpackbits(bits.numpy(), axis=-1, count=width, bitorder="little")
    return torch.from_numpy(flags).bool()
