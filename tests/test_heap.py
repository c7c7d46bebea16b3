"""Freed tensors go back to the system."""

import platform
from pathlib import Path

import pytest
import torch

from lit_moe import heap

MIB = 2**20


@pytest.mark.skipif(
    platform.system() != "Linux" or platform.libc_ver()[0] != "glibc", reason="glibc on Linux only"
)
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


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch was built without MKL")
def test_buffers_of_a_thread_are_freed_and_made_again():
    heap.free_buffers_of_thread()
    left, right = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))
    before = left @ right
    heap.free_buffers_of_thread()
    assert heap._function.cache_info().currsize > 0
    assert torch.equal(left @ right, before)


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
