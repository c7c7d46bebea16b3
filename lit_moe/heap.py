"""Memory of the CPU that libraries hold back for threads, where forwards wait in threads.

Each waiting forward (:mod:`lit_moe.held_forward`) is a thread of its own, for which the C library
keeps what was freed in it, and MKL its buffers. With 16 forwards of 2,048 tokens that came to more
than the hidden states themselves.
"""

from __future__ import annotations

import ctypes
import functools
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

_M_ARENA_MAX = -8  # of mallopt(3)


def give_back_memory() -> None:
    """Return freed memory to the system, where the C library can (glibc). A few milliseconds."""
    trim = _function(None, "malloc_trim")
    if trim is not None:
        trim(0)


def share_heap() -> None:
    """Let threads that start from now on take memory from the heap that others use (glibc).

    Holds for the whole process until it ends, and where many threads allocate at the same time they
    wait for each other, which forwards that take turns do not.
    """
    set_option = _function(None, "mallopt")
    if set_option is not None:
        set_option(_M_ARENA_MAX, 1)


def free_buffers_of_thread() -> None:
    """Let MKL free what it keeps for this thread, in builds of torch with MKL."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    free = _function(str(library), "mkl_serv_thread_free_buffers")
    if free is not None:
        free()


def join(thread: threading.Thread) -> None:
    """Wait until a thread has ended for the system too, where that can be seen (Linux).

    :meth:`threading.Thread.join` returns when the thread's Python code is through. What libraries
    do at its end comes after that, with locks held: MKL's would stay locked forever in a process
    that is forked at that moment, and its first product of matrices would never return.
    """
    thread.join()
    task = Path(f"/proc/self/task/{thread.native_id}")
    while thread.native_id is not None and task.exists():
        time.sleep(0.0005)


@functools.cache
def _function(library: str | None, name: str) -> Callable[..., int] | None:
    """Return a function of a C library, or of the process; None where there is none."""
    try:
        return getattr(ctypes.CDLL(library), name)
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return None
