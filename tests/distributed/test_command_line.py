"""Sharded runs as a user starts them: by the command line, not by the classes beneath."""

import json
import socket

import pytest

from lit_moe.plan import KeepPlan
from tests.distributed.runs import some
from tests.distributed.test_killed import command, finish, start

pytestmark = pytest.mark.distributed
SHARDED = (
    "--trainer.strategy=lit_moe.sharding.MoEDeepSpeed",
    "--trainer.strategy.init_args.stage=3",
    "--trainer.strategy.init_args.shard_on_load=true",
)


def fit(folder, checkpoint, text, *options):
    code, output = finish(start(*command(folder, checkpoint, text, *options)))
    assert code == 0, output
    return output


def plan_of(folder):
    (path,) = folder.glob("lightning_logs/*/plan.json")
    return KeepPlan.load(path)


def test_a_model_that_no_rank_holds_whole_is_pruned_trained_and_exported(
    checkpoint, chapters, tmp_path
):
    short = ("--trainer.max_steps=4", "--trainer.gradient_clip_val=1.0")
    fit(tmp_path / "two", checkpoint, chapters, *SHARDED, *short)
    fit(tmp_path / "one", checkpoint, chapters, *short, "--trainer.devices=1")
    assert plan_of(tmp_path / "two") == plan_of(tmp_path / "one")
    assert (tmp_path / "two" / "model" / "model.safetensors").exists()


@pytest.mark.parametrize("stage", some(["zero3"], ["zero1", "zero2"]))
def test_another_precision_goes_on(restless, chapters, tmp_path, stage):
    one = (
        f"--trainer.strategy={stage}",
        "--trainer.devices=1",
        "--ckpt_path=last",
        "--ExportModel.overwrite=true",
    )
    fit(
        tmp_path,
        restless,
        chapters,
        *one,
        "--trainer.max_steps=4",
        "--trainer.precision=bf16-mixed",
    )
    output = fit(tmp_path, restless, chapters, *one, "--trainer.max_steps=6")
    assert "in bf16; it is converted for 1 ranks" in output


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"stage": 4}, "stage=4 is no ZeRO stage; there are 1, 2 and 3"),
        ({"stage": 2, "shard_on_load": True}, "which only stage 3 does"),
        ({"config": "/no/such.json"}, "does not exist: /no/such.json"),
        ({"config": "broken.json"}, "broken.json' cannot be taken: Expecting"),
        ({"config": {"zero_optimization": {"stage": 5}}}, "zero_optimization.stage 5"),
        (
            {"config": {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}},
            "has a section 'optimizer'",
        ),
        (
            {
                "config": {
                    "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
                    "zero_force_ds_cpu_optimizer": True,
                }
            },
            "zero_force_ds_cpu_optimizer: true, but the optimizer is torch's",
        ),
    ],
)
def test_fields_that_cannot_be_are_one_sentence(
    fields, sentence, checkpoint, chapters, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    strategy = {"class_path": "lit_moe.sharding.MoEDeepSpeed", "init_args": fields}
    words = command(tmp_path, checkpoint, chapters, f"--trainer.strategy={json.dumps(strategy)}")
    code, output = finish(start(*words))
    assert code == 2, output
    assert sentence in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ("--trainer.strategy=zero2", "--trainer.strategy=zero3", "(stage 3)"),
        pytest.param(
            "--OneShotPruning.keep_ratio=0.5",
            "--OneShotPruning.keep_ratio=0.75",
            "keep_ratio=0.75",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_ranks_that_were_told_different_things(
    checkpoint, chapters, tmp_path, monkeypatch, first, second, told
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    ranks = []
    for rank, option in enumerate((first, second)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        options = [option] if "strategy" in option else ["--trainer.strategy=ddp", option]
        ranks.append(start(*command(tmp_path, checkpoint, chapters, *options)))
    code, output = finish(ranks[0])
    finish(ranks[1])
    assert code == 2, output
    assert "rank 0 was set up with" in output
    assert told in output
    assert "start all ranks with the same configuration" in output
