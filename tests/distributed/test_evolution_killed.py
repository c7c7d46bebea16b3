"""A rank of a search is killed in the middle of a generation; the same command goes on."""

import json
import multiprocessing
import os
import signal
import socket
import time

import pytest

import lit_moe
from lit_moe import MoEModule
from lit_moe.testing import run_distributed
from tests.callbacks.test_evolution import history_of, quiet, searching
from tests.callbacks.test_evolution import make_texts as make_texts
from tests.callbacks.test_evolution import texts as texts

pytestmark = pytest.mark.distributed
EFFORT = {"initial": 8, "discrete": 16, "total": 24, "children": 8}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def killed_in_work(work, killed, after):
    """Run both ranks; the one dies by kill -9, then the other, as a launcher would see to it."""
    port = free_port()
    context = multiprocessing.get_context("fork")

    def enter(number):
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, NODE_RANK="0")
        os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2")
        scorer = lit_moe.search.SplitScorer
        original, calls = scorer.score, []

        def score(*words, **options):
            calls.append(1)
            if number == killed and len(calls) > after:
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.05)  # so that both ranks get their turns
            return original(*words, **options)

        scorer.score = score  # type: ignore[method-assign]
        work(number)

    ranks = [context.Process(target=enter, args=(number,)) for number in range(2)]
    for rank in ranks:
        rank.start()
    ranks[killed].join(timeout=120)
    assert ranks[killed].exitcode == -signal.SIGKILL
    time.sleep(0.3)
    ranks[1 - killed].kill()
    ranks[1 - killed].join()


@pytest.mark.parametrize(("killed", "after"), [(1, 7), pytest.param(0, 6, marks=pytest.mark.slow)])
def test_a_killed_rank_loses_its_candidate_and_no_other(
    checkpoint, make_texts, make_trainer, tmp_path, killed, after
):
    def search_in(folder):
        def work(_):
            trainer = make_trainer(
                searching(effort=EFFORT),
                quiet(),
                devices=2,
                strategy="ddp",
                default_root_dir=str(folder),
                logger=False,
            )
            module = MoEModule(str(checkpoint))
            trainer.fit(module, datamodule=make_texts())
            assert module.plan is not None
            return module.plan.to_dict()

        return work

    whole = run_distributed(search_in(tmp_path / "whole"), 2, group=False)[0]
    assert not list((tmp_path / "whole").glob("search.rank*"))
    folder = tmp_path / "killed"
    killed_in_work(search_in(folder), killed, after)
    noted = [
        json.loads(line)
        for path in folder.glob("search.rank*.jsonl")
        for line in path.read_text().splitlines()[1:]
    ]
    lines = history_of(folder / "search.jsonl")[1:]
    assert len(lines) % 8 == 0  # the history ends with a generation, the journals go further
    assert len(noted) > len(lines)
    assert sum("rank" in path.name for path in folder.iterdir()) == 2
    number, asked = multiprocessing.Value("i", 0), lit_moe.search.SplitScorer.score

    def counted(*words, **options):
        with number.get_lock():
            number.value += 1
        return asked(*words, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lit_moe.search.SplitScorer, "score", counted)
        again = run_distributed(search_in(folder), 2, group=False)[0]
    assert again == whole
    assert history_of(folder / "search.jsonl") == history_of(tmp_path / "whole" / "search.jsonl")
    everything = len(history_of(folder / "search.jsonl")) - 1
    assert number.value == everything - len(noted)
    assert not list(folder.glob("search.rank*"))
