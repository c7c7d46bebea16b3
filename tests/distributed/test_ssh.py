"""launch/deepspeed.sh started once: pdsh and ssh bring the run to both hosts.

The hosts are network namespaces with an sshd each. That needs root, and the programs ssh, sshd and
pdsh (Debian: openssh-client, openssh-server, pdsh).
"""

import os
import shutil
import subprocess
import time

import pytest

from tests.distributed.test_dead_hosts import LOST, stumble
from tests.distributed.tiny_fit import (
    ROOT,
    environment,
    finish_forks,
    fork_fit,
    losses,
    start,
    world_size,
    write_config,
)
from tests.distributed.two_hosts import (
    ADDRESSES,
    CABLE,
    LAUNCH,
    PORTS,
    REASON,
    on_host,
    wait_for,
)

PATH = os.pathsep.join([environment()["PATH"], "/usr/sbin"])
MISSING = [p for p in ("ssh", "sshd", "ssh-keygen", "pdsh") if shutil.which(p, path=PATH) is None]
WHY_NOT = f"not installed: {', '.join(MISSING)}" if MISSING else REASON
pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT)),
]


@pytest.fixture
def ssh(hosts, tmp_path):
    """Configuration for ssh, by which both hosts let the other in."""
    for name in ("host", "user"):
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)]
        subprocess.run(words, check=True)
    server, client = tmp_path / "sshd_config", tmp_path / "ssh_config"
    keys = {"HostKey": tmp_path / "host", "AuthorizedKeysFile": tmp_path / "user.pub"}
    fixed = {"StrictModes": "no", "UsePAM": "no", "PidFile": "none", "PasswordAuthentication": "no"}
    server.write_text("".join(f"{k} {v}\n" for k, v in {**keys, **fixed}.items()))
    known = {"UserKnownHostsFile": "/dev/null", "StrictHostKeyChecking": "no", "LogLevel": "ERROR"}
    mine = {"IdentityFile": tmp_path / "user", "BatchMode": "yes", **known}
    client.write_text("".join(f"{k} {v}\n" for k, v in mine.items()))
    # sshd wants a folder of its own in /run, which is this machine's: give it another /run
    script = 'mount -t tmpfs tmpfs /run && mkdir /run/sshd && exec "$0" -D -f "$1"'
    sshd = ["unshare", "--mount", "sh", "-c", script, str(shutil.which("sshd", path=PATH))]
    servers = [
        start(on_host(host, *sshd, str(server)), tmp_path / f"sshd{i}")
        for i, host in enumerate(hosts)
    ]
    for address, process in zip(ADDRESSES, servers, strict=True):
        wait_for_server(hosts[0], client, address, process)
    yield client
    for process in servers:
        process.kill()
        process.wait()


def wait_for_server(host, client, address, server):
    words = on_host(host, "ssh", "-F", str(client), address, "true")
    for _ in range(100):
        if subprocess.run(words, capture_output=True).returncode == 0:
            return
        assert server.poll() is None, "sshd has ended"
        time.sleep(0.1)
    raise AssertionError("sshd does not answer")


@pytest.fixture
def cluster(checkpoint, pages, tmp_path):
    """Config and variables of a run on both hosts."""
    config = write_config(tmp_path, checkpoint, pages, stage=2)
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    own = {"HOSTFILE": str(hostfile), "DEVICES": "1", "MASTER_ADDR": ADDRESSES[0]}
    return str(config), {**own, "MASTER_PORT": str(next(PORTS))}


@pytest.fixture
def by_pdsh(ssh, cluster, hosts, tmp_path):
    """Return a function that runs launch/deepspeed.sh on the first host only."""
    handed_on = tmp_path / "deepspeed_env"
    handed_on.write_text(f"GLOO_SOCKET_IFNAME={CABLE}\nOMP_NUM_THREADS=1\n")

    def run(*words):
        config, variables = cluster
        variables |= {"PDSH_SSH_ARGS_APPEND": f"-F {ssh}", "SSH_CHECK": "no"}
        variables["DS_ENV_FILE"] = str(handed_on)
        script = on_host(hosts[0], str(LAUNCH / "deepspeed.sh"), config, *words)
        log = tmp_path / "log"
        process = start(script, log, **variables)
        wait_for([(process, log)], hosts)
        return process.returncode, log.read_text()

    return run


@pytest.fixture(scope="module")
def one(checkpoint, pages, tmp_path_factory):
    """Losses of one process without any strategy."""
    folder = tmp_path_factory.mktemp("one")
    config = write_config(folder, checkpoint, pages, stage=None)
    finish_forks((fork_fit([f"--config={config}"], folder / "log"), folder / "log"))
    return losses(folder)


def test_deepspeed_sh_by_pdsh_and_ssh(by_pdsh, one, tmp_path):
    code, said = by_pdsh()
    assert code == 0, said[-3000:]
    assert world_size(tmp_path) == 2
    assert losses(tmp_path) == pytest.approx(one, abs=1e-5)


def test_by_pdsh_the_reason_of_the_other_host_is_on_the_one_screen(by_pdsh, hosts):
    code, said = by_pdsh(*stumble(1, "raise"))
    assert code != 0
    (line,) = [line for line in said.splitlines() if "lit-moe: error:" in line]
    assert line.startswith(f"{ADDRESSES[0]}: lit-moe: error: {LOST}rank 1 on {hosts[1]} (process ")
    assert "ended with: OSError: the disk of this machine went away" in line


def test_deepspeed_sh_by_ssh_alone(ssh, cluster, hosts, one, tmp_path):
    """The loop over ssh that the head of the script shows, from the first host."""
    config, variables = cluster
    variables |= {"GLOO_SOCKET_IFNAME": CABLE, "OMP_NUM_THREADS": "1", "PATH": PATH}
    given = " ".join(f"{name}={value}" for name, value in variables.items())
    script = f"{LAUNCH / 'deepspeed.sh'} {config}"
    logs = [tmp_path / "log0", tmp_path / "log1"]
    started = []
    for number, (address, log) in enumerate(zip(ADDRESSES, logs, strict=True)):
        remote = f"cd {ROOT} && {given} NODE_RANK={number} {script}"
        started.append((start(on_host(hosts[0], "ssh", "-F", str(ssh), address, remote), log), log))
    wait_for(started, hosts)
    assert [process.returncode for process, _ in started] == [0, 0], logs[1].read_text()[-3000:]
    assert world_size(tmp_path) == 2
    assert losses(tmp_path) == pytest.approx(one, abs=1e-5)
