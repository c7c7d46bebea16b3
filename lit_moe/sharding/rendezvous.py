"""How the processes of a run find each other, and what to say when they do not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from lit_moe.contact import have_met, lost_contact, waited_in_vain
from lit_moe.errors import LitMoEError

_NO_INTERFACE = "Unable to find address for"  # gloo, of a GLOO_SOCKET_IFNAME that is not there


def meet(
    backend: str, *, rank: int, world_size: int, patience: timedelta, timeout: timedelta
) -> None:
    """Make the process group of a run, unless there is one.

    Under torchrun the agents have met already, and the ordinary way is taken.

    Args:
        backend: ``gloo`` or ``nccl``.
        rank: of this process.
        world_size: processes on all machines.
        patience: how long the first process waits for the others and they for it.
        timeout: of every collective afterwards.

    Raises:
        LitMoEError: if they do not find each other, with what to look at.
    """
    if dist.is_initialized():
        return
    with explained(rank, world_size, patience):
        store = None
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = TCPStore(address, port, world_size, rank == 0, timeout=patience)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=patience
        )
        dist.barrier()
    have_patience(timeout)


def have_patience(timeout: timedelta) -> None:
    """Let the collectives of all groups wait as long.

    DeepSpeed makes groups of its own, which would have torch's default: 10 minutes on GPUs.
    """
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


@contextmanager
def meeting_explained(rank: int, world_size: int, patience: timedelta) -> Iterator[None]:
    """Do as :func:`explained` for a whole command, whose strategy makes the group by itself.

    Only errors of a connection count, and only until there is a process group.

    Raises:
        LitMoEError: if the processes of the run did not find each other.
    """
    try:
        yield
    except RuntimeError as error:
        if have_met() or not _is_of_connecting(error):
            raise
        with explained(rank, world_size, patience):
            raise


def _is_of_connecting(error: RuntimeError) -> bool:
    return lost_contact(error) or waited_in_vain(error) or _NO_INTERFACE in str(error)


@contextmanager
def explained(rank: int, world_size: int, patience: timedelta) -> Iterator[None]:
    """Turn what torch says of a failed connection into what a user can do about it.

    Raises:
        LitMoEError: for any failure to connect inside the block.
    """
    try:
        yield
    except (dist.DistError, RuntimeError, OSError) as error:
        said = " ".join(str(error).split())
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise LitMoEError(
            f"rank {rank} did not find all {world_size} processes of the run by {where} within "
            f"{patience.total_seconds():.0f} s: check that every machine was started with the same "
            "MASTER_ADDR, MASTER_PORT and number of nodes, that this port is open, and that "
            "GLOO_SOCKET_IFNAME / NCCL_SOCKET_IFNAME name the interface that the machines share "
            f"(`ip addr` lists them); torch said: {said[:200]}"
        ) from error
