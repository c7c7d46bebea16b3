"""Numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Sequence

_UNITS = ("", " K", " M", " B", " T")
_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")


def count(number: float | None) -> str:
    """Return ``number`` with three digits and a unit of a thousand: 46.7 B; ``-`` for None."""
    if number is None:
        return "-"
    power = _power(number)
    return f"{_three_digits(number, power)}{_UNITS[power]}"


def size(num_bytes: float | None) -> str:
    """Return bytes in decimal units: 93.4 GB; ``-`` for None."""
    if num_bytes is None:
        return "-"
    power = _power(num_bytes)
    return f"{_three_digits(num_bytes, power)} {_BYTE_UNITS[power]}"


def with_error(value: float, error: float) -> str:
    """Return ``value +- error``, both to the second digit of the error: 21.37 +- 0.21."""
    if not (math.isfinite(value) and math.isfinite(error)):
        return str(value)
    if error <= 0:
        return f"{value:.4g}"
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:,.{decimals}f} +- {error:.{decimals}f}"


def ids_as_ranges(ids: Sequence[int]) -> str:
    """Return ascending ids with runs of three and more joined: ``0-2, 5, 6``."""
    runs: list[list[int]] = []
    for i in ids:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    parts = [[f"{r[0]}-{r[-1]}"] if len(r) > 2 else [str(i) for i in r] for r in runs]
    return ", ".join(part for run in parts for part in run)


def _power(number: float) -> int:
    """Thousands in ``number``; 999.7 counts as 1000, which it is rounded to."""
    power = 0
    while abs(number) / 1000**power >= 999.5 and power < len(_UNITS) - 1:
        power += 1
    return power


def _three_digits(number: float, power: int) -> str:
    if power == 0 and number == int(number):
        return str(int(number))
    scaled = number / 1000**power
    decimals = max(0, 2 - math.floor(math.log10(max(abs(scaled), 1.0))))
    return f"{scaled:.{decimals}f}"
