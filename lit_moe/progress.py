"""Progress bars of transformers, only where there is something to wait for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging as hf_logging

WORTH_SHOWING = 2.0
"""Seconds that a bar stays hidden; gigabytes of weights take longer to load."""


@contextmanager
def late_progress_bars(seconds: float = WORTH_SHOWING) -> Iterator[None]:
    """Inside the block, bars of transformers appear once their work has taken some seconds.

    A hook that is set already is called as well; bars that are switched off stay off.
    """
    earlier = hf_logging.set_tqdm_hook(None)

    def make(bar: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        options = {"delay": seconds, **options}
        return bar(*args, **options) if earlier is None else earlier(bar, args, options)

    hf_logging.set_tqdm_hook(make)
    try:
        yield
    finally:
        hf_logging.set_tqdm_hook(earlier)
