"""A rank that ends on another machine: rank 0 says which one, where, and why.

The machines are network namespaces with host names of their own; making them needs root.
"""

import pytest

from tests.distributed.tiny_fit import fork_fit, write_config
from tests.distributed.two_hosts import (
    ADDRESSES,
    PORTS,
    REASON,
    REFUSED,
    plain_variables,
    start_on_both,
    wait_for,
)

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]
BOUND = 60.0
"""Seconds within which both ranks must have ended."""
WORDS = ["--trainer.num_nodes=2", "--trainer.devices=1"]
LOST = "rank 0 lost contact to another process of the run: "


@pytest.fixture
def config(checkpoint, pages, tmp_path):
    return str(write_config(tmp_path, checkpoint, pages, stage=2))


def stumble(rank, how):
    return [
        "--trainer.callbacks+=tests.distributed.tiny_fit.Stumbles",
        f"--trainer.callbacks.rank={rank}",
        f"--trainer.callbacks.how={how}",
    ]


def run_on_both(hosts, folder, words):
    """Fit on both hosts by plain variables; return what each rank said, which lit-moe refused."""
    logs, port = (folder / "log0", folder / "log1"), str(next(PORTS))
    ranks = [
        fork_fit([*WORDS, *words], log, namespace=host, **plain_variables(rank, port))
        for rank, (host, log) in enumerate(zip(hosts, logs, strict=True))
    ]
    for rank in ranks:
        rank.join(BOUND)
        if rank.is_alive():
            rank.kill()
            rank.join()
    assert ranks[0].exitcode == REFUSED, logs[0].read_text()[-3000:]
    return [error_of(log) for log in logs]


def error_of(log):
    text = log.read_text()
    lines = [line for line in text.splitlines() if "lit-moe: error:" in line]
    assert len(lines) <= 1, text[-3000:]
    return lines[0].partition("lit-moe: error: ")[2] if lines else None


def assert_names_the_other(said, hosts, how):
    assert said.startswith(f"{LOST}rank 1 on {hosts[1]} (process ")
    assert (") ended with: OSError: the disk of this machine went away" in said) == (how != "kill")
    assert (") stopped answering without a reason, killed" in said) == (how == "kill")
    assert "the same command with --ckpt_path last" in said


@pytest.mark.parametrize("how", ["raise", "kill", "early"])
def test_rank_0_says_which_rank_ended_on_the_other_host_and_why(hosts, config, tmp_path, how):
    said, _ = run_on_both(hosts, tmp_path, [f"--config={config}", *stumble(1, how)])
    assert_names_the_other(said, hosts, how)
    assert f", log {tmp_path / 'log1'})" in said


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raise", "kill"])
@pytest.mark.parametrize("script", ["torchrun.sh", "deepspeed.sh"])
def test_launchers_leave_the_sentence_to_rank_0(hosts, config, tmp_path, script, how):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    variables = {"NODES": "2", "DEVICES": "1", "HOSTFILE": str(hostfile)}
    words = [config, *stumble(1, how)]
    started = start_on_both(hosts, tmp_path, script, *words, **variables)
    wait_for(started, hosts)
    assert all(process.returncode != 0 for process, _ in started)
    assert_names_the_other(error_of(started[0][1]), hosts, how)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_who_waits_longer_than_the_timeout_names_it(hosts, config, tmp_path, rank):
    words = [f"--config={config}", *stumble(rank, "hang")]
    said, others = run_on_both(
        hosts, tmp_path, [*words, "--trainer.strategy.init_args.timeout=0:00:04"]
    )
    waited = others if rank == 0 else said
    assert waited.startswith(f"rank {1 - rank} waited 0:00:04, the limit of this run, for ")
    assert "timeout=6:00:00 with class_path lit_moe.sharding.MoEDeepSpeed" in waited
    if rank == 0:
        assert waited in said  # on the screen that is read
        assert said.startswith(f"{LOST}rank 1 on {hosts[1]} (process ")
    else:
        assert f"for rank 1 on {hosts[1]} (process " in said
