"""Runs a function in several processes that can talk to each other."""

from __future__ import annotations

import io
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

T = TypeVar("T")
TIMEOUT = 300.0
"""Seconds after which a process that says nothing is taken for dead."""


def run_distributed(fn: Callable[[int], T], world_size: int = 2, *, group: bool = True) -> list[T]:
    """Run ``fn(rank)`` in ``world_size`` forked processes that can reach each other.

    Args:
        fn: any callable, closures included; its result must be picklable by torch.save.
        world_size: number of processes.
        group: make a gloo process group; False leaves that to ``fn``, a lightning trainer for
            instance, which takes the processes for those of an external launcher.

    Returns:
        The results, by rank.

    Raises:
        RuntimeError: if a process failed, with its traceback.
    """
    context = mp.get_context("fork")
    queue = context.Queue()
    port = _free_port()
    args = (fn, world_size, port, queue, group)
    processes = [context.Process(target=_work, args=(rank, *args)) for rank in range(world_size)]
    for process in processes:
        process.start()
    answers = [queue.get(timeout=TIMEOUT) for _ in processes]
    for process in processes:
        process.join()
    errors = [f"rank {rank}: {error}" for rank, error, _ in sorted(answers) if error]
    if errors:
        raise RuntimeError("\n".join(errors))
    return [_unpack(payload) for _, _, payload in sorted(answers)]


def _work(
    rank: int, fn: Callable[[int], Any], world_size: int, port: int, queue: Any, group: bool
) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(NODE_RANK="0")
    try:
        if group:
            dist.init_process_group("gloo", rank=rank, world_size=world_size)
        payload = io.BytesIO()
        torch.save(fn(rank), payload)
        queue.put((rank, "", payload.getvalue()))
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - whatever it was, the parent must hear of it
        queue.put((rank, traceback.format_exc(), b""))


def _unpack(payload: bytes) -> Any:
    return torch.load(io.BytesIO(payload), weights_only=False)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
