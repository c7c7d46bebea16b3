import json
import multiprocessing
import os
import signal

import pytest

from lit_moe.errors import LitMoEError
from lit_moe.search import History
from tests.search.toy import RACING, ToyEvaluator, toy_run


def records(path):
    return [
        {k: v for k, v in json.loads(line).items() if k != "seconds"}
        for line in path.read_text().splitlines()
    ]


def run_with(path, *, evaluator=None, **options):
    run = toy_run(history=History.open(path, "toy"), evaluator=evaluator, **options)
    return run, run.run()


@pytest.mark.parametrize("racing", [None, RACING])
@pytest.mark.parametrize("stop", [0, 5, 13, 42, 78])
def test_a_search_that_was_broken_off_goes_on_to_the_same_history(tmp_path, racing, stop):
    _, whole = run_with(tmp_path / "whole.jsonl", racing=racing)
    broken = ToyEvaluator(fail_at=stop)
    with pytest.raises(KeyboardInterrupt):
        run_with(tmp_path / "broken.jsonl", evaluator=broken, racing=racing)
    rest = ToyEvaluator()
    run, found = run_with(tmp_path / "broken.jsonl", evaluator=rest, racing=racing)
    assert records(tmp_path / "broken.jsonl") == records(tmp_path / "whole.jsonl")
    assert found.best.genome == whole.best.genome
    assert found.regrets == whole.regrets
    assert len(broken.asked) + len(rest.asked) == len(run.history.lines)
    again = ToyEvaluator()
    run_with(tmp_path / "broken.jsonl", evaluator=again, racing=racing)
    assert again.asked == []


def _killed_at_work(path):
    class Killer(ToyEvaluator):
        def __call__(self, requests):
            if len(self.asked) == 21:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(requests)

    run_with(path, evaluator=Killer())


def test_a_kill_loses_the_candidate_in_work_and_no_other(tmp_path):
    process = multiprocessing.get_context("fork").Process(
        target=_killed_at_work, args=(tmp_path / "killed.jsonl",)
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(records(tmp_path / "killed.jsonl")) == 1 + 21
    run_with(tmp_path / "killed.jsonl")
    run_with(tmp_path / "whole.jsonl")
    assert records(tmp_path / "killed.jsonl") == records(tmp_path / "whole.jsonl")


def test_a_line_that_a_kill_cut_off_is_evaluated_again(tmp_path):
    path = tmp_path / "torn.jsonl"
    run_with(path)
    whole = records(path)
    path.write_bytes(path.read_bytes()[:-30])
    evaluator = ToyEvaluator()
    run_with(path, evaluator=evaluator)
    assert len(evaluator.asked) == 1
    assert records(path) == whole
    path.write_text('{"format": "lit')
    run_with(path)
    assert records(path) == whole


def test_another_search_does_not_go_on_with_this_history(tmp_path):
    path = tmp_path / "history.jsonl"
    run_with(path)
    with pytest.raises(LitMoEError, match="history of another search"):
        History.open(path, "another")
    with pytest.raises(LitMoEError, match="line 2 of the history was written by another search"):
        run_with(path, seed=1)
    path.write_text("hello\n")
    with pytest.raises(LitMoEError, match="is no history of a search"):
        History.open(path, "toy")


def test_a_line_tells_where_its_candidate_comes_from(tmp_path):
    run_with(tmp_path / "history.jsonl")
    lines = records(tmp_path / "history.jsonl")[1:]
    assert [line["number"] for line in lines] == list(range(len(lines)))
    known = {line["genome"] for line in lines}
    for line in lines:
        if line["split"] == "search":
            assert set(line["parents"]) <= known
            assert (line["generation"] == 0) == (line["how"] == "random")
            assert ("kept" in line) == (line["phase"] == "discrete")
