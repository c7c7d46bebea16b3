"""Two hosts made of network namespaces: what they are called, and how programs run on them."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.distributed.tiny_fit import ROOT, TIMEOUT, start

LAUNCH = ROOT / "launch"
ADDRESSES = ("10.77.0.1", "10.77.0.2")
CABLE = "litmoe0"
"""Name of its end on each host."""
REFUSED = 2
"""What lit-moe returns for a request that cannot be met."""
PORTS = itertools.count(29511)  # the namespaces are new: all ports are free


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


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@contextmanager
def joined_namespaces() -> Iterator[tuple[str, ...]]:
    """Names of two namespaces that reach each other at ``ADDRESSES`` and nothing else."""
    names = tuple(f"lit-moe-{os.getpid()}-{i}" for i in (0, 1))
    made: list[str] = []
    try:
        for name in names:
            ip("netns", "add", name)
            made.append(name)
        ip("link", "add", CABLE, "netns", names[0], "type", "veth",
           "peer", "name", CABLE, "netns", names[1])  # fmt: skip
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", CABLE)
            ip("-n", name, "link", "set", CABLE, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in made:
            ip("netns", "delete", name)  # the cable goes with them


def on_host(host: str, *words: str) -> list[str]:
    """Return a command that runs words in a namespace, on a machine of the same name."""
    named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host]
    return ["ip", "netns", "exec", host, *named, *words]


def start_on_both(
    hosts: tuple[str, ...], folder: Path, script: str, *words: str, **variables: str
) -> list[tuple[subprocess.Popen[bytes], Path]]:
    """Start one of the files in launch/ on both hosts at the same time, each with its number."""
    port = str(next(PORTS))
    started = []
    for rank, host in enumerate(hosts):
        log = folder / f"log{rank}"
        own = {"NODE_RANK": str(rank), "MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": port}
        own["GLOO_SOCKET_IFNAME"] = CABLE
        command = on_host(host, str(LAUNCH / script), *words)
        started.append((start(command, log, **variables, **own), log))
    return started


def wait_for(started: list[tuple[subprocess.Popen[bytes], Path]], hosts: tuple[str, ...]) -> None:
    """Wait for programs on both hosts, however they end; those still there are killed."""
    deadline = time.monotonic() + TIMEOUT
    try:
        for process, _ in started:
            process.wait(timeout=max(1.0, deadline - time.monotonic()))
    finally:
        for host in hosts:
            for pid in ip("netns", "pids", host).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)


def plain_variables(rank: int, port: str) -> dict[str, str]:
    """Return the variables by which two processes find each other without any launcher."""
    where = {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": port, "NODE_RANK": str(rank)}
    return {**where, "GLOO_SOCKET_IFNAME": CABLE}
