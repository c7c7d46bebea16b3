"""Freed tensors go back to the system."""

import ctypes
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from lit_moe import heap

MIB = 2**20
COUNT_HEAPS = """
import ctypes, sys, threading
from lit_moe import heap
{call}
count = ctypes.CDLL(None).malloc_stats
count()
print("threads", file=sys.stderr, flush=True)
meet = threading.Barrier(5)
def work():
    held = bytearray(100_000)
    meet.wait()
    meet.wait()
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
meet.wait()
count()
meet.wait()
"""

glibc = pytest.mark.skipif(
    platform.system() != "Linux" or platform.libc_ver()[0] != "glibc",
    reason="malloc_trim and mallopt are glibc's",
)


@glibc
def test_freed_tensors_between_live_ones_go_back_to_the_system():
    torch.ones(MIB)  # glibc takes from the heap what is smaller than the largest that was freed
    tensors = [torch.ones(MIB // 4) for _ in range(200)]
    every_other = tensors[::2]
    heap.give_back_memory()
    full = resident()
    del tensors
    heap.give_back_memory()
    assert full - resident() > 80 * MIB
    assert all(bool((t == 1).all()) for t in every_other)


@glibc
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch was built without MKL")
@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="counted by mallinfo2, of glibc 2.33"
)
def test_buffers_of_a_thread_are_freed_and_made_again():
    left, right = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))
    product = left @ right
    before = in_use()
    heap.free_buffers_of_thread()
    assert before - in_use() > MIB // 2
    assert torch.equal(left @ right, product)


@glibc
@pytest.mark.parametrize("shared", [True, False])
def test_new_threads_take_from_the_heap_that_there_is(shared):
    # A process of its own: the option stays.
    words = [sys.executable, "-c", COUNT_HEAPS.format(call="heap.share_heap()" if shared else "")]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    before, after = (part.count("Arena") for part in done.stderr.split("threads\n"))
    assert (after == before) is shared


@pytest.mark.parametrize(
    "what", [heap.give_back_memory, heap.share_heap, heap.free_buffers_of_thread]
)
def test_where_a_library_cannot_do_it_nothing_happens(what, monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    heap._function.cache_clear()
    try:
        what()
        assert heap._function(None, "malloc_trim") is None
    finally:
        heap._function.cache_clear()


def resident() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0])


class _MallInfo(ctypes.Structure):
    _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]


def in_use() -> int:
    """Return the bytes that the C library has given out: ``hblkhd`` and ``uordblks``."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _MallInfo
    info = mallinfo()
    return int(info.field4 + info.field7)


def test_a_joined_thread_has_ended_for_the_system_too():
    for _ in range(50):
        thread = threading.Thread(target=lambda: torch.randn(64, 64) @ torch.randn(64, 64))
        thread.start()
        heap.join(thread)
        assert not Path(f"/proc/self/task/{thread.native_id}").exists()
