"""What ranks must have in common, and what is said when they do not."""

import types

import lightning as L
import pytest
from lightning.pytorch.strategies import DeepSpeedStrategy

from lit_moe import MoEModule, agreement, cli
from lit_moe.agreement import check_versions_agree
from lit_moe.errors import LitMoEError
from lit_moe.sharding import (
    DeepSpeedLauncherEnvironment,
    MoEDeepSpeed,
    register_short_names,
)
from lit_moe.testing import run_distributed
from tests.distributed.slurm_stand_in import free_port
from tests.distributed.tiny_fit import finish_forks, fork_fit, write_config


@pytest.mark.distributed
def test_different_versions_on_two_ranks_are_named(monkeypatch):
    def said(rank):
        found = {**agreement.installed_versions(), "torch": f"2.{rank}"}
        monkeypatch.setattr(agreement, "installed_versions", lambda: found)
        try:
            check_versions_agree()
        except LitMoEError as error:
            return str(error)
        return "nothing"

    for sentence in run_distributed(said):
        assert sentence.startswith("rank 0 has torch 2.0, but rank 1 has 2.1: install the same")


@pytest.mark.distributed
def test_the_same_versions_pass():
    assert run_distributed(lambda _: check_versions_agree()) == [None, None]


def test_a_stock_deepspeed_strategy_is_refused():
    module = MoEModule()
    strategy = object.__new__(DeepSpeedStrategy)
    module._trainer = types.SimpleNamespace(strategy=strategy)  # type: ignore[assignment]
    with pytest.raises(LitMoEError, match=r"take strategy: zero1, zero2, zero3, or class_path"):
        module._check_strategy()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"stage": 4}, "stage=4 is no ZeRO stage; there are 1, 2 and 3"),
        ({"stage": 2, "shard_on_load": True}, "only stage 3 does; the configuration asks for st"),
        (
            {"stage": 3, "shard_on_load": True, "config": {"zero_optimization": {"stage": 1}}},
            "asks for stage 1",
        ),
    ],
)
def test_impossible_fields_of_the_strategy(fields, sentence):
    with pytest.raises(LitMoEError, match=sentence):
        MoEDeepSpeed(**fields)


SLURM = {
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NNODES": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NAME": "prune",
}
LAUNCHER = {
    "RANK": "1",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "2",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
}


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (SLURM, "num_nodes=1"),
        (LAUNCHER, "started 2 processes on 2 nodes, but trainer.devices=4 and trainer.num_nodes=1"),
    ],
)
def test_a_world_that_the_launcher_did_not_start(monkeypatch, capsys, variables, sentence):
    for name in (*SLURM, *LAUNCHER, "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["lit-moe"])
    words = ["fit", "--config=configs/one_shot/reap.yaml", "--trainer.accelerator=cpu"]
    options = ["--trainer.strategy=zero2", "--trainer.devices=4" if "RANK" in variables else ""]
    assert (
        cli.main(
            [
                *words,
                *filter(None, options),
                *([] if "RANK" in variables else ["--trainer.devices=2"]),
            ]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.distributed
@pytest.mark.parametrize("interface", ["lo", "nothere0"])
def test_hosts_that_do_not_find_each_other_under_a_stock_strategy(
    checkpoint, pages, tmp_path, interface
):
    """Nobody listens at that port; an interface that is not there is noticed by a single host."""
    num_nodes = 2 if interface == "lo" else 1
    config = write_config(tmp_path, checkpoint, pages, stage=1)
    words = [f"--config={config}", f"--trainer.num_nodes={num_nodes}", "--trainer.devices=1"]
    words.append("--trainer.strategy=lightning.pytorch.strategies.DDPStrategy")
    words.append("--trainer.strategy.init_args.timeout=0:00:02")
    port, rank = free_port(), num_nodes - 1
    variables = {"NODE_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    log = tmp_path / "log"
    process = fork_fit(words, log, GLOO_SOCKET_IFNAME=interface, **variables)
    finish_forks((process, log), code=2)
    (line,) = [line for line in log.read_text().splitlines() if "lit-moe: error:" in line]
    assert line.startswith(
        f"lit-moe: error: rank {rank} did not find all {num_nodes} processes of the run by "
        f"127.0.0.1:{port} within 2 s: "
    )
    assert "GLOO_SOCKET_IFNAME / NCCL_SOCKET_IFNAME name the interface" in line
    assert "lost contact" not in line
    assert "Traceback" not in log.read_text()


def test_the_deepspeed_launcher_says_which_machine_this_is(monkeypatch):
    for name, value in {**LAUNCHER, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29501"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NODE_RANK", raising=False)
    assert DeepSpeedLauncherEnvironment.detect()
    environment = DeepSpeedLauncherEnvironment()
    ranks = (environment.global_rank(), environment.local_rank(), environment.node_rank())
    assert ranks == (1, 0, 1)
    assert (environment.main_address, environment.main_port) == ("10.0.0.1", 29501)
    environment.validate_settings(num_devices=1, num_nodes=2)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "lit_moe.sharding.MoEDeepSpeed"])
def test_names_of_the_strategy(name):
    register_short_names()
    trainer = L.Trainer(accelerator="cpu", devices=1, strategy=name, logger=False)
    assert isinstance(trainer.strategy, MoEDeepSpeed)
    assert trainer.strategy.stage == (int(name[-1]) if name.startswith("zero") else 2)


def test_an_unknown_strategy_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["lit-moe"])
    words = ["fit", "--config=configs/one_shot/reap.yaml", "--trainer.strategy=zero4"]
    assert cli.main(words) == 2
    assert "invalid strategy name" in capsys.readouterr().err
