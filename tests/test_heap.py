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


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    heap._malloc_trim.cache_clear()
    try:
        heap.give_back_memory()
        assert heap._malloc_trim() is None
    finally:
        heap._malloc_trim.cache_clear()


def resident() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0])
