"""Two hosts: two network namespaces joined by a cable of their own, one rank in each.

They are as far apart as two machines: the loopback address of one is not that of the other. Making
them needs root; elsewhere these tests are skipped.
"""

import itertools
import os
import shutil
import subprocess

import pytest

from tests.distributed.tiny_fit import (
    ROOT,
    finish,
    finish_forks,
    fork_fit,
    losses,
    start,
    world_size,
    write_config,
)

LAUNCH = ROOT / "launch"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
CABLES = ("litmoe-a", "litmoe-b")
REFUSED = 2
"""What lit-moe returns for a request that cannot be met."""


def why_not() -> str | None:
    """Return what keeps this machine from making namespaces, None if nothing does."""
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    if shutil.which("ip") is None:
        return "there is no ip command (iproute2)"
    name = f"lit-moe-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    joined = subprocess.run(
        ["ip", "-n", name, "link", "add", "probe-a", "type", "veth", "peer", "name", "probe-b"],
        capture_output=True,
        text=True,
    )
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return f"no cables here: {joined.stderr.strip()}" if joined.returncode else None


REASON = why_not()
pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def hosts():
    """Names of two namespaces that reach each other at ``ADDRESSES`` and nothing else."""
    names = tuple(f"lit-moe-{os.getpid()}-{i}" for i in (0, 1))
    made: list[str] = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", CABLES[0], "netns", names[0], "type", "veth",
           "peer", "name", CABLES[1], "netns", names[1])  # fmt: skip
        for name, cable, address in zip(names, CABLES, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in made:
            ip("netns", "delete", name)  # the cable goes with them


@pytest.fixture(scope="module")
def one(checkpoint, pages, tmp_path_factory):
    """Losses of one process without any strategy."""
    folder = tmp_path_factory.mktemp("one")
    config = write_config(folder, checkpoint, pages, stage=None)
    finish_forks((fork_fit([f"--config={config}"], folder / "log"), folder / "log"))
    return losses(folder)


_PORTS = itertools.count(29511)  # the namespaces are new: all ports are free


def test_torchrun_sh_on_two_hosts(hosts, one, checkpoint, pages, tmp_path):
    config = write_config(tmp_path, checkpoint, pages, stage=3)
    run_on_both(hosts, tmp_path, "torchrun.sh", str(config), NODES="2", DEVICES="1")
    agrees(tmp_path, one)


@pytest.mark.slow
def test_deepspeed_sh_on_two_hosts_without_ssh(hosts, one, checkpoint, pages, tmp_path):
    config = write_config(tmp_path, checkpoint, pages, stage=2)
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    run_on_both(hosts, tmp_path, "deepspeed.sh", str(config), HOSTFILE=str(hostfile), DEVICES="1")
    agrees(tmp_path, one)


@pytest.mark.slow
def test_plain_variables_on_two_hosts(hosts, one, checkpoint, pages, tmp_path):
    config = write_config(tmp_path, checkpoint, pages, stage=2)
    words = [f"--config={config}", "--trainer.num_nodes=2", "--trainer.devices=1"]
    port = str(next(_PORTS))
    started = []
    for rank, host in enumerate(hosts):
        log = tmp_path / f"log{rank}"
        variables = {"NODE_RANK": str(rank), "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": port}
        variables["GLOO_SOCKET_IFNAME"] = CABLES[rank]
        started.append((fork_fit(words, log, namespace=host, **variables), log))
    finish_forks(*started)
    agrees(tmp_path, one)


@pytest.mark.slow
def test_a_host_that_nobody_answers_is_one_sentence(hosts, checkpoint, pages, tmp_path):
    config = write_config(tmp_path, checkpoint, pages, stage=2)
    words = [f"--config={config}", "--trainer.num_nodes=2", "--trainer.devices=1"]
    words.append("--trainer.strategy.init_args.patience=3")
    variables = {"NODE_RANK": "1", "MASTER_ADDR": "10.77.0.9", "MASTER_PORT": str(next(_PORTS))}
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
    port = str(next(_PORTS))
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


def run_on_both(hosts, folder, script, *words, **variables) -> None:
    """Run one of the files in launch/ on both hosts at the same time, each with its number."""
    port = str(next(_PORTS))
    started = []
    for rank, host in enumerate(hosts):
        log = folder / f"log{rank}"
        own = {"NODE_RANK": str(rank), "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": port}
        own["GLOO_SOCKET_IFNAME"] = CABLES[rank]
        command = ["ip", "netns", "exec", host, str(LAUNCH / script), *words]
        started.append((start(command, log, **variables, **own), log))
    finish(*started)


def agrees(folder, one) -> None:
    assert world_size(folder) == 2
    assert losses(folder) == pytest.approx(one, abs=1e-5)
