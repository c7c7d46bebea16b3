"""Which weights of a row go: so many of the whole row, or N of every M consecutive ones.

A row is what makes one output neuron: its entries are the weights of the inputs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lit_moe.errors import LitMoEError
from lit_moe.sparsity.selection import without_smallest, without_smallest_of_groups

_BLOCK = 128
"""Columns that SparseGPT decides on at once, as in its paper."""


class Pattern(Protocol):
    """How many weights of a row go, and which, given their scores."""

    def check(self, width: int, where: str) -> None:
        """Refuse rows that the pattern cannot be laid on.

        Raises:
            LitMoEError: naming ``where`` and the numbers.
        """

    def zeros(self, width: int) -> int:
        """Return the weights of a row of ``width`` inputs that go."""

    def keep(self, scores: Tensor) -> Tensor:
        """Return True for the weights that stay; the lowest scores go, of equal ones the first.

        Args:
            scores: shape ``(..., inputs)``, at least 0.
        """

    def keep_columns(self, scores: Tensor, start: int, width: int) -> Tensor:
        """Return :meth:`keep` for the columns ``start, start + 1, ...`` of rows of ``width``."""

    def columns(self) -> int:
        """Return the columns that :meth:`keep_columns` should be asked for at once."""

    def at(self, progress: float) -> Pattern:
        """Return the pattern on the way: 0 keeps everything, 1 is this pattern."""


@dataclass(frozen=True)
class RatioPattern:
    """The same number of weights of every row.

    Attributes:
        ratio: fraction of a row that goes, in (0, 1); rounded to whole weights.
    """

    ratio: float

    def __str__(self) -> str:
        return f"{self.ratio:g}"

    def check(self, width: int, where: str) -> None:
        """See :class:`Pattern`."""
        if not 0 < self.zeros(width) < width:
            raise LitMoEError(
                f"ratio={self.ratio:g} of the {width} inputs of {where} is "
                f"{self.zeros(width)} weights; give a ratio from {1 / width:.3g} to "
                f"{1 - 1 / width:.3g}"
            )

    def zeros(self, width: int) -> int:
        """See :class:`Pattern`."""
        return int(self.ratio * width + 0.5)

    def keep(self, scores: Tensor) -> Tensor:
        """See :class:`Pattern`."""
        return without_smallest(scores, self.zeros(scores.shape[-1]))

    def keep_columns(self, scores: Tensor, start: int, width: int) -> Tensor:
        """See :class:`Pattern`; each part of a row bears its share."""
        total, stop = self.zeros(width), start + scores.shape[-1]
        return without_smallest(scores, total * stop // width - total * start // width)

    def columns(self) -> int:
        """See :class:`Pattern`."""
        return _BLOCK

    def at(self, progress: float) -> RatioPattern:
        """See :class:`Pattern`."""
        return RatioPattern(self.ratio * progress)


@dataclass(frozen=True)
class GroupPattern:
    """N of every M consecutive inputs go.

    Attributes:
        num_zeros: N, in [1, M).
        group: M.
    """

    num_zeros: int
    group: int

    def __str__(self) -> str:
        return f"{self.num_zeros}:{self.group}"

    def check(self, width: int, where: str) -> None:
        """See :class:`Pattern`."""
        if width % self.group:
            fits = [m for m in range(2, 33) if width % m == 0]
            raise LitMoEError(
                f"pattern {self} needs rows whose length {self.group} divides, but {where} has "
                f"{width} inputs; groups of {', '.join(map(str, fits)) or 'no size'} would fit, "
                "or give a ratio instead"
            )

    def zeros(self, width: int) -> int:
        """See :class:`Pattern`."""
        return width // self.group * self.num_zeros

    def keep(self, scores: Tensor) -> Tensor:
        """See :class:`Pattern`."""
        return without_smallest_of_groups(scores, self.num_zeros, self.group)

    def keep_columns(self, scores: Tensor, start: int, width: int) -> Tensor:
        """See :class:`Pattern`; ``start`` and the number of columns are multiples of M."""
        del start, width
        return self.keep(scores)

    def columns(self) -> int:
        """See :class:`Pattern`."""
        return self.group

    def at(self, progress: float) -> GroupPattern:
        """See :class:`Pattern`; rounded to whole weights per group."""
        return GroupPattern(int(self.num_zeros * progress + 0.5), self.group)


def parse_pattern(pattern: str | None, ratio: float | None) -> Pattern:
    """Return what the user asked for.

    Args:
        pattern: ``"N:M"``, of every M consecutive inputs N go.
        ratio: fraction of every row that goes; one of the two must be given.

    Raises:
        LitMoEError: if both or none are given, or the numbers leave nothing or change nothing.
    """
    if (pattern is None) == (ratio is None):
        raise LitMoEError(
            f"pattern={pattern!r} and ratio={ratio!r} are given; give one of them, for instance "
            'pattern: "2:4" or ratio: 0.5'
        )
    if ratio is not None:
        if not isinstance(ratio, int | float) or not 0 < ratio < 1:
            raise LitMoEError(
                f"ratio={ratio!r} must be a number above 0 (nothing goes) and below 1 (all goes), "
                "for instance 0.5"
            )
        return RatioPattern(float(ratio))
    return _parse_groups(pattern)


def _parse_groups(pattern: object) -> GroupPattern:
    found = re.fullmatch(r"(\d+):(\d+)", str(pattern))
    if found is None:
        raise LitMoEError(
            f"pattern={pattern!r} is not N:M; give for instance '2:4' (in YAML with quotes)"
        )
    num_zeros, group = int(found[1]), int(found[2])
    if not 0 < num_zeros < group:
        raise LitMoEError(
            f"pattern {pattern} zeroes {num_zeros} of every {group} weights; N must be at least 1 "
            f"and below M, for instance {max(group // 2, 1)}:{max(group, 2)}"
        )
    return GroupPattern(num_zeros, group)
