"""The most memory that tensors take while something runs, those in mapped files apart."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class HeldTensors(TorchDispatchMode):
    """Within it, counts after each operation what new tensors hold that are still there.

    Attributes:
        peak: bytes at most, without tensors of before and files mapped by ``torch.from_file``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._new: dict[int, tuple[StorageWeakRef, int]] = {}
        existing = (o for o in gc.get_objects() if issubclass(type(o), Tensor))
        self._ignored = {ref.cdata: ref for ref in map(_reference, existing) if ref is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and look at what it returns."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            ref = _reference(tensor) if isinstance(tensor, Tensor) else None
            if ref is None or ref.cdata in self._ignored:
                continue
            if func is torch.ops.aten.from_file.default:
                self._ignored[ref.cdata] = ref
            else:
                self._new[ref.cdata] = ref, tensor.untyped_storage().nbytes()
        self._new = {key: entry for key, entry in self._new.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._new.values()))
        return result


def _reference(tensor: Tensor) -> StorageWeakRef | None:
    """Return a reference that does not keep the storage, None if the tensor has no memory."""
    return None if tensor.device.type == "meta" else StorageWeakRef(tensor.untyped_storage())
