"""What the ranks of a run say of each other when one of them has ended."""

import os
import socket
import subprocess
import sys
from datetime import timedelta

import pytest
import torch.distributed as dist

from lit_moe import contact
from lit_moe.contact import introduce, lost_contact, reasons_shared, this_process, waited_in_vain
from lit_moe.errors import LitMoEError
from lit_moe.sharding.rendezvous import meeting_explained
from lit_moe.testing import run_distributed

CLOSED = RuntimeError("gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:7565")
LATE = RuntimeError("gloo/unbound_buffer.cc:78] Timed out waiting 4000ms for recv operation")


def ended(rank, errors, *, grace=0.3):
    """What each rank says at its end; rank 0 hears of it last, as the first to ask."""
    contact.GRACE = grace
    introduce()
    dist.barrier()
    for turn in range(dist.get_world_size())[::-1]:
        said = _ended_by(rank, errors[rank]) if turn == rank else None
        dist.barrier()
        if said is not None:
            mine = said
    return mine


def _ended_by(rank, error):
    if error is None:
        return "nothing"
    try:
        with reasons_shared(rank, timedelta(hours=2)):
            raise error
    except Exception as said:  # noqa: BLE001 - whatever is raised is looked at
        return f"{type(said).__name__}: {said}"


@pytest.mark.distributed
def test_the_reason_of_one_rank_is_told_by_rank_0():
    errors = [CLOSED, OSError("the disk went away"), CLOSED]
    first, second, third = run_distributed(lambda rank: ended(rank, errors), 3)
    place = f"rank 1 on {socket.gethostname()} (process "
    start = "rank 0 lost contact to another process of the run: "
    assert first.startswith(f"LitMoEError: {start}{place}")
    assert ") ended with: OSError: the disk went away; afterwards the same command" in first
    assert second == "OSError: the disk went away"
    assert third.startswith(
        "LitMoEError: rank 2 lost contact to another process of the run; rank 0"
    )


@pytest.mark.distributed
def test_of_two_reasons_the_earlier_is_told():
    errors = [CLOSED, KeyError("a consequence"), LitMoEError("the cause")]
    first, *_ = run_distributed(lambda rank: ended(rank, errors), 3)
    assert "rank 2 on" in first
    assert "ended with: the cause" in first
    assert "consequence" not in first


@pytest.mark.distributed
def test_the_rank_that_says_nothing_is_named():
    first, *_ = run_distributed(lambda rank: ended(rank, [CLOSED, CLOSED, None, CLOSED]), 4)
    assert "rank 2 on" in first
    assert "stopped answering without a reason" in first
    assert "rank 1" not in first
    assert "rank 3" not in first


@pytest.mark.distributed
def test_all_of_them_losing_each_other_is_the_network():
    first, _ = run_distributed(lambda rank: ended(rank, [CLOSED, CLOSED]))
    assert "and so did all the others: the network between them failed" in first


@pytest.mark.distributed
def test_waiting_in_vain_names_the_limit_and_whom_one_waited_for():
    first, _ = run_distributed(lambda rank: ended(rank, [LATE, None]))
    assert "rank 0 waited 2:00:00, the limit of this run, for rank 1 on " in first
    assert "--trainer.strategy.init_args.timeout=6:00:00" in first


@pytest.mark.distributed
def test_a_checkpoint_that_failed_since_a_rank_was_lost_is_a_lost_contact():
    wrapped = LitMoEError("the checkpoint could not be written")
    wrapped.__cause__ = CLOSED
    first, _ = run_distributed(lambda rank: ended(rank, [wrapped, OSError("no space")]))
    assert "ended with: OSError: no space" in first


def test_one_process_keeps_its_errors():
    with pytest.raises(OSError, match="mine"), reasons_shared(0, None):
        raise OSError("mine")


@pytest.mark.parametrize("error", [CLOSED, LATE, dist.DistNetworkError("timed out")])
def test_before_a_group_exists_nobody_is_lost(error):
    with pytest.raises(RuntimeError) as said, reasons_shared(1, timedelta(seconds=8)):
        raise error
    assert said.value is error


@pytest.mark.parametrize(
    "error", [LATE, dist.DistStoreError("wait"), RuntimeError("Unable to find address for: eth9")]
)
def test_before_a_group_exists_a_failed_connection_is_explained(monkeypatch, error):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    limit = timedelta(seconds=8)
    with pytest.raises(LitMoEError) as said, reasons_shared(1, limit):  # noqa: SIM117
        with meeting_explained(1, 2, limit):
            raise error
    start = "rank 1 did not find all 2 processes of the run by 127.0.0.1:29500 within 8 s: "
    assert str(said.value).startswith(start)
    assert "GLOO_SOCKET_IFNAME" in str(said.value)


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), LitMoEError("keep_ratio=2")])
def test_other_errors_before_a_group_exists_stay(error):
    with pytest.raises(type(error)) as said, meeting_explained(1, 2, timedelta(seconds=8)):
        raise error
    assert said.value is error


@pytest.mark.distributed
def test_with_a_group_a_lost_rank_is_no_failed_meeting():
    def said(rank):
        try:
            with meeting_explained(rank, 2, timedelta(seconds=8)):
                raise CLOSED
        except RuntimeError as error:
            return str(error)

    assert run_distributed(said) == [str(CLOSED)] * 2


def test_a_process_that_has_ended_is_known_to_be_gone():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    member = contact.Member(**{**vars(this_process()), "process": child.pid})
    elsewhere = contact.Member("elsewhere", member.boot, child.pid, "/its/log")
    assert not member.is_gone
    child.communicate(b"\n")
    assert member.is_gone
    assert not elsewhere.is_gone  # nothing is known of other machines
    assert str(elsewhere) == f"on elsewhere (process {child.pid}, log /its/log)"
    assert this_process().process == os.getpid()


@pytest.mark.parametrize(
    ("error", "lost", "late"),
    [
        (CLOSED, True, False),
        (LATE, False, True),
        (dist.DistNetworkError("anything"), True, False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False, False),
        (ValueError("Connection closed by peer"), False, False),
    ],
)
def test_a_lost_contact_is_told_from_other_errors(error, lost, late):
    assert (lost_contact(error), waited_in_vain(error)) == (lost, late)
