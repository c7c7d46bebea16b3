"""Sums over the ranks of a process group; nothing to do without one."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def all_sum(tensor: Tensor) -> Tensor:
    """Collective: return the sum over all ranks, on the tensor's device."""
    if not (dist.is_available() and dist.is_initialized()):
        return tensor
    if tensor.device.type == _device():
        dist.all_reduce(tensor)
        return tensor
    moved = tensor.to(_device())
    dist.all_reduce(moved)
    return moved.to(tensor.device)


def from_first(tensor: Tensor) -> Tensor:
    """Collective: return rank 0's tensor, so that rounding cannot make ranks differ."""
    if dist.is_available() and dist.is_initialized():
        tensor = tensor.contiguous()  # solvers return columns first, which NCCL refuses
        dist.broadcast(tensor, src=0)
    return tensor


def on_all_ranks(condition: bool) -> bool:
    """Collective: whether a condition holds on every rank."""
    failed = all_sum(torch.tensor(0.0 if condition else 1.0, device=_device()))
    return float(failed) == 0


def _device() -> str:
    is_gpu = dist.is_available() and dist.is_initialized() and dist.get_backend() == "nccl"
    return "cuda" if is_gpu else "cpu"


def all_sum_of(number: int) -> int:
    """Collective: return the sum of a count over all ranks."""
    return int(all_sum(torch.tensor(number, dtype=torch.int64, device=_device())))


def agreed(text: str) -> str:
    """Collective: return one hash of what the ranks say, in rank order."""
    if not (dist.is_available() and dist.is_initialized()):
        return text
    said: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(said, text)
    return hashlib.sha256("".join(said).encode()).hexdigest()[: len(text)]


def from_first_object(value: Any) -> Any:
    """Collective: return rank 0's value, which must be picklable."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
