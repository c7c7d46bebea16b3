"""Progress bars of the ``datasets`` library, only where there is something to wait for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

_WORTH_SHOWING = 64 << 20


@contextmanager
def progress_bars_for(num_bytes: int) -> Iterator[None]:
    """Show bars inside the block only if ``num_bytes`` of text are to be read."""
    was_off = are_progress_bars_disabled()
    if num_bytes < _WORTH_SHOWING:
        disable_progress_bars()
    try:
        yield
    finally:
        if not was_off:
            enable_progress_bars()
