"""Who takes part in a run, and why it ended: each rank tells rank 0, whose screen is read.

Ranks talk through the store by which they met. It is there until the process that keeps it ends
(rank 0, or the agent of torchrun beside it), also when no collective works any more.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lit_moe.errors import LitMoEError

GRACE = 5.0
"""Seconds that rank 0 waits for the reason of a rank on another machine."""

_LOST = ("closed by peer", "reset by peer", "connectFullMesh", "Socket Timeout", "Broken pipe")
_LATE = ("Timed out waiting", "timeout caused pair closure", "collective operation timeout")
_GO_ON = (
    "afterwards the same command with --ckpt_path last goes on from the newest checkpoint, and a "
    "search from its history"
)


@dataclass(frozen=True)
class Member:
    """One process of a run.

    Attributes:
        host: name of its machine.
        boot: of that machine, so that equal names are not taken for one machine.
        process: its id there.
        log: file that its errors are written to; None for a screen or a launcher that collects.
    """

    host: str
    boot: str
    process: int
    log: str | None

    def __str__(self) -> str:
        return f"on {self.host} (process {self.process}{self._where_to_look})"

    @property
    def _where_to_look(self) -> str:
        return f", log {self.log}" if self.log and not self.is_here else ""

    @property
    def is_here(self) -> bool:
        """Whether it runs on this machine."""
        here = this_process()
        return (self.host, self.boot) == (here.host, here.boot)

    @property
    def is_gone(self) -> bool:
        """Whether it certainly has ended; of other machines nothing is certain."""
        status = Path(f"/proc/{self.process}/stat")
        if not self.is_here or not status.parent.parent.is_dir():
            return False
        try:
            return status.read_text().rpartition(")")[2].split()[0] == "Z"
        except OSError:
            return True


def this_process() -> Member:
    """Return what others need to find this process and its log."""
    boot, errors = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/fd/2")
    target = str(errors.resolve()) if errors.exists() else ""
    return Member(
        host=socket.gethostname(),
        boot=boot.read_text().strip() if boot.exists() else "",
        process=os.getpid(),
        log=target if os.path.isfile(target) else None,
    )


def introduce() -> None:
    """Let the other ranks know where this one runs; no-op on one process."""
    _leave("member", asdict(this_process()))


def have_met() -> bool:
    """Whether this process belongs to a process group, if only to one of its own."""
    return dist.is_available() and dist.is_initialized()


def lost_contact(error: BaseException) -> bool:
    """Whether an error is what the other ranks see when one of them has died."""
    return any(isinstance(cause, dist.DistError) or _says(cause, _LOST) for cause in _causes(error))


def waited_in_vain(error: BaseException) -> bool:
    """Whether an error is that of a rank whose patience with the others ended."""
    return any(_says(cause, _LATE) for cause in _causes(error))


@contextmanager
def reasons_shared(rank: int, timeout: timedelta | None) -> Iterator[None]:
    """Tell the other ranks why this one ends, and its user why another one did. No collective.

    Errors from before the ranks have met pass as they are: nobody can be lost yet.

    Args:
        rank: of this process.
        timeout: of the collectives.

    Raises:
        LitMoEError: instead of the error of a collective that another rank has left.
    """
    try:
        yield
    except BaseException as error:
        if not have_met():
            raise
        if waited_in_vain(error):
            sentence = _impatient(rank, timeout)
            _leave("reason", {"text": sentence, "time": time.time()})
            raise LitMoEError(sentence) from error
        if not lost_contact(error):
            _leave("reason", {"text": _in_one_line(error), "time": time.time()})
            raise
        _leave("lost", {})
        raise LitMoEError(f"{_whose_end(rank)}; {_GO_ON} ({_in_one_line(error)[:160]})") from error


def _whose_end(rank: int) -> str:
    start = f"rank {rank} lost contact to another process of the run"
    store = _store()
    if rank != 0 or store is None:
        return f"{start}; rank 0 says which one and why"
    reasons, silent = _inquire(store)
    if reasons:
        first = min(reasons, key=lambda other: reasons[other]["time"])
        return f"{start}: {_place(store, first)} ended with: {reasons[first]['text']}"
    if not silent:
        return f"{start}, and so did all the others: the network between them failed"
    return (
        f"{start}: {_places(store, silent)} stopped answering without a reason, killed (by the "
        "system, for want of memory?) or cut off"
    )


def _inquire(store: Any) -> tuple[dict[int, dict[str, Any]], list[int]]:
    """Return reasons, and the ranks that left none; waits while a reason may still come."""
    deadline = time.monotonic() + GRACE
    while True:
        gone = [r for r in _heard(store)[1] if (member := _member(store, r)) and member.is_gone]
        reasons, silent = _heard(store)  # after: who was gone may have spoken before
        if reasons or gone or time.monotonic() > deadline:
            return reasons, [r for r in gone if r in silent] or silent
        time.sleep(0.1)


def _heard(store: Any) -> tuple[dict[int, dict[str, Any]], list[int]]:
    """Return the reasons that other ranks left, by rank, and the ranks that said nothing."""
    others = range(1, dist.get_world_size())
    reasons = {r: found for r in others if (found := _read(store, "reason", r)) is not None}
    silent = [r for r in others if r not in reasons and _read(store, "lost", r) is None]
    return reasons, silent


def _places(store: Any, ranks: list[int]) -> str:
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return ", ".join(_place(store, rank) for rank in ranks[:4]) + more


def _place(store: Any, rank: int) -> str:
    member = _member(store, rank)
    return f"rank {rank}" if member is None else f"rank {rank} {member}"


def _member(store: Any, rank: int) -> Member | None:
    found = _read(store, "member", rank)
    return None if found is None else Member(**found)


def _impatient(rank: int, timeout: timedelta | None) -> str:
    limit = "the limit of this run" if timeout is None else f"{timeout}, the limit of this run,"
    return (
        f"rank {rank} waited {limit} for {_awaited(rank)}: one of them hangs or cannot be reached, "
        "or rank 0 has longer work of its own (an export with its check, converting a checkpoint); "
        "allow more by the strategy's field timeout, as in "
        "--trainer.strategy.init_args.timeout=6:00:00 with class_path "
        "lit_moe.sharding.MoEDeepSpeed or lightning.pytorch.strategies.DDPStrategy"
    )


def _awaited(rank: int) -> str:
    store = _store()
    if rank != 0 or store is None:
        return "the others"
    return _places(store, _heard(store)[1]) or "the others"


def _in_one_line(error: BaseException) -> str:
    mendable = next((e for e in _causes(error) if isinstance(e, LitMoEError)), None)
    if mendable is not None:
        return str(mendable)
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _says(error: BaseException, signs: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _store() -> Any:
    """Return what the ranks met by; None on one process."""
    if not have_met() or dist.get_world_size() == 1:
        return None
    return dist.distributed_c10d._get_default_store()


def _leave(what: str, content: dict[str, Any]) -> None:
    store = _store()
    if store is not None:
        with contextlib.suppress(RuntimeError):  # whoever kept it may be gone already
            store.set(f"lit_moe/{what}/{dist.get_rank()}", json.dumps(content))


def _read(store: Any, what: str, rank: int) -> dict[str, Any] | None:
    key = f"lit_moe/{what}/{rank}"
    found: dict[str, Any] | None = json.loads(store.get(key)) if store.check([key]) else None
    return found
