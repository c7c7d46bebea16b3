"""Two hosts: two network namespaces joined by a cable of their own, one rank in each.

They are as far apart as two machines: the loopback address of one is not that of the other. Making
them needs root; elsewhere these tests are skipped.
"""

import pytest

from tests.distributed.tiny_fit import (
    finish,
    finish_forks,
    fork_fit,
    losses,
    world_size,
    write_config,
)
from tests.distributed.two_hosts import (
    ADDRESSES,
    PORTS,
    REASON,
    REFUSED,
    plain_variables,
    start_on_both,
)

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]


@pytest.fixture(scope="module")
def one(checkpoint, pages, tmp_path_factory):
    """Losses of one process without any strategy."""
    folder = tmp_path_factory.mktemp("one")
    config = write_config(folder, checkpoint, pages, stage=None)
    finish_forks((fork_fit([f"--config={config}"], folder / "log"), folder / "log"))
    return losses(folder)


def test_torchrun_sh_on_two_hosts(hosts, one, checkpoint, pages, tmp_path):
    config = write_config(tmp_path, checkpoint, pages, stage=3)
    variables = {"NODES": "2", "DEVICES": "1"}
    finish(*start_on_both(hosts, tmp_path, "torchrun.sh", str(config), **variables))
    agrees(tmp_path, one)


def test_deepspeed_sh_on_two_hosts_without_ssh(hosts, one, checkpoint, pages, tmp_path):
    config = write_config(tmp_path, checkpoint, pages, stage=2)
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    variables = {"HOSTFILE": str(hostfile), "DEVICES": "1"}
    finish(*start_on_both(hosts, tmp_path, "deepspeed.sh", str(config), **variables))
    agrees(tmp_path, one)


def test_plain_variables_on_two_hosts(hosts, one, checkpoint, pages, tmp_path):
    config = write_config(tmp_path, checkpoint, pages, stage=2)
    words = [f"--config={config}", "--trainer.num_nodes=2", "--trainer.devices=1"]
    port = str(next(PORTS))
    started = []
    for rank, host in enumerate(hosts):
        log = tmp_path / f"log{rank}"
        variables = plain_variables(rank, port)
        started.append((fork_fit(words, log, namespace=host, **variables), log))
    finish_forks(*started)
    agrees(tmp_path, one)


@pytest.mark.slow
def test_a_host_that_nobody_answers_is_one_sentence(hosts, checkpoint, pages, tmp_path):
    config = write_config(tmp_path, checkpoint, pages, stage=2)
    words = [f"--config={config}", "--trainer.num_nodes=2", "--trainer.devices=1"]
    words.append("--trainer.strategy.init_args.patience=3")
    variables = {"NODE_RANK": "1", "MASTER_ADDR": "10.77.0.9", "MASTER_PORT": str(next(PORTS))}
    log = tmp_path / "log"
    process = fork_fit(words, log, namespace=hosts[1], **variables)
    finish_forks((process, log), code=REFUSED)
    assert_one_sentence(log, "rank 1 did not find all 2 processes of the run by 10.77.0.9:")


@pytest.mark.slow
def test_hosts_whose_name_means_loopback_are_told_of_the_interface(
    hosts, checkpoint, pages, tmp_path
):
    config = write_config(tmp_path, checkpoint, pages, stage=2)
    words = [f"--config={config}", "--trainer.num_nodes=2", "--trainer.devices=1"]
    words.append("--trainer.strategy.init_args.patience=5")
    port = str(next(PORTS))
    logs = [tmp_path / f"log{rank}" for rank in (0, 1)]
    variables = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    started = [
        (fork_fit(words, log, namespace=host, NODE_RANK=str(rank), **variables), log)
        for rank, (host, log) in enumerate(zip(hosts, logs, strict=True))
    ]
    finish_forks(*started, code=REFUSED)
    for log in logs:
        assert_one_sentence(log, "did not find all 2 processes")


def assert_one_sentence(log, beginning) -> None:
    (line,) = [line for line in log.read_text().splitlines() if "lit-moe: error:" in line]
    assert beginning in line
    assert "GLOO_SOCKET_IFNAME" in line
    assert "Traceback" not in log.read_text()


def agrees(folder, one) -> None:
    assert world_size(folder) == 2
    assert losses(folder) == pytest.approx(one, abs=1e-5)
