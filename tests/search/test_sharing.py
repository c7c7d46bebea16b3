"""Candidates shared among ranks, and what a killed rank leaves behind."""

import json
import time
from contextlib import nullcontext

import pytest
import torch.distributed as dist

from lit_moe.search import Genome, ModelEvaluator, Score, one_hot
from lit_moe.search.journal import FORMAT, Journal, remove_journals
from lit_moe.search.request import Floor, Request
from lit_moe.search.sharing import _turns
from lit_moe.testing import run_distributed

pytestmark = pytest.mark.distributed


def some_requests(num=12, floor=None):
    return [
        Request(Genome((one_hot([n // 4, 4 + n % 4], 8),)), "search", 8, floor) for n in range(num)
    ]


class Scorer:
    """Takes as long as it is told to, and remembers who was asked."""

    num_samples = 8

    def __init__(self, seconds):
        self.seconds, self.asked = seconds, []

    def score(self, genome, samples, **_):
        self.asked.append(genome.key)
        time.sleep(self.seconds(dist.get_rank(), len(self.asked)))
        return Score(float(int(genome.key, 16) % 1000), float(samples))


class Live:
    """Has as many active experts as it should."""

    def active(self, _):
        return nullcontext()


def evaluator_of(scorer, **options):
    return ModelEvaluator({"search": scorer}, Live(), **options)  # type: ignore[arg-type]


def test_each_request_is_scored_once_and_whoever_is_free_takes_it():
    requests = some_requests()

    def rank(number):
        scorer = Scorer(lambda rank, _: 0.3 if rank == 0 else 0.01)
        evaluator = evaluator_of(scorer)
        assert evaluator.width == 2
        scores = [*evaluator(requests[:8]), *evaluator(requests[8:]), *evaluator([])]
        return scores, scorer.asked

    (scores, slow), (same, fast) = run_distributed(rank, 2)
    assert scores == same
    assert sorted(slow + fast) == sorted(one.genome.key for one in requests)
    assert len(slow) <= 4 < len(fast)  # one of each round is what a slow rank has time for


def test_turns_are_handed_out_in_order_and_begin_anew_each_round():
    def rank(number):
        return [list(_turns(5)) for _ in range(3)]

    both = run_distributed(rank, 2)
    for first, second in zip(*both, strict=True):
        assert sorted(first + second) == list(range(5))
        assert first == sorted(first)
        assert second == sorted(second)


def test_what_ranks_left_behind_is_not_evaluated_again(tmp_path):
    requests, history = some_requests(), tmp_path / "search.jsonl"

    def rank(number, *, num=12, fingerprint="mine"):
        scorer = Scorer(lambda *_: 0.02)
        journal = Journal.open(history, fingerprint)
        assert journal is not None
        scores = evaluator_of(scorer, journal=journal)(requests[:num])
        return scores, len(scorer.asked)

    first = run_distributed(lambda number: rank(number, num=7), 2)
    assert sum(asked for _, asked in first) == 7
    path = max(tmp_path.iterdir(), key=lambda one: one.stat().st_size)
    path.write_bytes(path.read_bytes()[:-9])  # killed while it wrote its last line
    second = run_distributed(rank, 2)
    assert sum(asked for _, asked in second) == 12 - 7 + 1
    assert second[0][0][:7] == first[0][0]
    wider = run_distributed(rank, 3)
    assert sum(asked for _, asked in wider) == 0
    other = run_distributed(lambda number: rank(number, fingerprint="other"), 2)
    assert sum(asked for _, asked in other) == 12
    header = json.loads(path.read_text().splitlines()[0])
    assert header == {"format": FORMAT, "fingerprint": "other"}
    assert not (tmp_path / "search.rank2.jsonl").exists()
    remove_journals(history)
    assert list(tmp_path.iterdir()) == []


def test_a_bound_is_known_for_its_own_floor_alone(tmp_path):
    low, high = some_requests(3, Floor(10.0)), some_requests(3, Floor(20.0))

    def rank(number):
        journal = Journal.open(tmp_path / "search.jsonl", "mine")
        assert journal is not None
        if number == 0:
            journal.add(low[1], Score(9.0, -2.0, is_bound=True))
        dist.barrier()
        again = Journal.open(tmp_path / "search.jsonl", "mine")
        assert again is not None
        return again.known(low), again.known(high)

    for known in run_distributed(rank, 2):
        assert known == ({1: Score(9.0, -2.0, is_bound=True)}, {})


def test_a_single_process_needs_no_journal(tmp_path):
    assert Journal.open(tmp_path / "search.jsonl", "mine") is None
    assert list(tmp_path.iterdir()) == []
