"""Memory that DeepSpeed's stage 3 spends twice in a run without mixed precision."""

from __future__ import annotations

from typing import Any


def share_master_weights(optimizer: Any) -> int:
    """Let float32 parameters be their own master weights, instead of keeping a copy of each.

    The step then updates the partitions in place; DeepSpeed's copy back copies a tensor to itself.

    Args:
        optimizer: DeepSpeed's of stage 3; any other is left alone.

    Returns:
        Elements saved on this rank.
    """
    masters = getattr(optimizer, "fp32_partitioned_groups_flat", [])
    working = getattr(optimizer, "fp16_partitioned_groups_flat", [])
    saved = 0
    for master, partition in zip(masters, working, strict=True):
        if partition is None or (master.dtype, master.device, master.shape) != (
            partition.dtype,
            partition.device,
            partition.shape,
        ):
            continue
        master.data = partition
        saved += master.numel()
    return saved
