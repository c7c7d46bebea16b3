"""Several processes on one output: each does a part, all know the whole, one may die."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml

from lit_moe import cli
from lit_moe.compare import run
from lit_moe.compare.bench import ModelBench
from lit_moe.compare.claims import Claims
from lit_moe.compare.options import Line
from lit_moe.compare.store import CellStore
from lit_moe.testing import run_distributed

SETTINGS = {"version": 1}
PATIENCE = 400  # seconds, on a busy machine


@pytest.fixture
def words(checkpoint, pages, tmp_path):
    """A command line of seconds, without its output."""
    config = {
        "models": [str(checkpoint)],
        "criteria": ["ean", "ets"],
        "keep_ratios": [0.75, 0.5],
        "procedures": ["one_shot", "iterative", "lottery"],
        "seeds": [0, 1, 2],
        "random_draws": 4,
        "rounds": 2,
        "fine_tuning": {"first": 2, "unit": "steps", "when_data_ends": "repeat"},
        "text": {
            **{f"{name}_files": [pages] for name in ("calibration", "train", "evaluation")},
            "sequence_length": 32,
            "batch_size": 4,
            "calibration_tokens": 256,
            "evaluation_tokens": 256,
        },
        "figures": False,
    }
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(config))
    return ["compare", f"--config={tmp_path / 'compare.yaml'}"]


def started(words, output):
    return subprocess.Popen(
        [sys.executable, "-m", "lit_moe", *words, f"--output={output}"],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def cells_in(path):
    """Return the cells of a file, each as key and value without times, in the order written."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # cut off
        if record["kind"] == "cell":
            value = {k: v for k, v in record["value"].items() if "second" not in k}
            found.append((json.dumps(record["key"], sort_keys=True), value))
    return found


def report_in(folder):
    """Return report.json and report.md."""
    return (folder / "report.json").read_text(), (folder / "report.md").read_text()


def alone(words, output):
    assert cli.main([*words, f"--output={output}"]) == 0
    return cells_in(output / "cells.jsonl"), report_in(output)


def spied(monkeypatch):
    """Return a list that the criterion and seed of each curve that is measured are added to."""
    measured = []
    measure = ModelBench.measure

    def noting(bench, line, seed):
        measured.append((line.criterion, seed))
        measure(bench, line, seed)

    monkeypatch.setattr(ModelBench, "measure", noting)
    return measured


@pytest.mark.slow
def test_two_processes_make_the_table_of_one_and_measure_no_cell_twice(words, tmp_path):
    cells, report = alone(words, tmp_path / "one")
    both = [started(words, tmp_path / "two") for _ in range(2)]
    assert [process.wait(timeout=PATIENCE) for process in both] == [0, 0]
    shared = cells_in(tmp_path / "two" / "cells.jsonl")
    assert len({name for name, _ in shared}) == len(shared), "measured twice"
    assert dict(shared) == dict(cells)
    assert report_in(tmp_path / "two") == report


@pytest.mark.slow
def test_what_a_killed_process_was_at_is_done_by_the_other(words, tmp_path):
    cells, report = alone(words, tmp_path / "one")
    output = tmp_path / "two"
    first = started(words, output)
    while len(cells_in(output / "cells.jsonl")) < 3:
        assert first.poll() is None
        time.sleep(0.01)
    second = started(words, output)
    while len(cells_in(output / "cells.jsonl")) < 12:
        assert first.poll() is None
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert second.wait(timeout=PATIENCE) == 0
    assert dict(cells_in(output / "cells.jsonl")) == dict(cells)
    assert report_in(output) == report


def test_a_piece_that_another_holds_is_left_to_it_and_waited_for(words, tmp_path, monkeypatch):
    output = tmp_path / "out"
    words = [*words, f"--output={output}", "--procedures=[one_shot]", "--random_draws=0"]
    (model,) = yaml.safe_load((tmp_path / "compare.yaml").read_text())["models"]
    held = run._piece(model, 1, Line("ets", "paper", "one_shot", "layer"))
    measured, waited = spied(monkeypatch), []
    other = Claims(output / run.LOCKS).held(**held)
    other.__enter__()
    wait = run._Work._wait

    def waiting(work, name):
        waited.append(list(measured))
        other.__exit__(None, None, None)  # the other ends without having measured
        wait(work, name)

    monkeypatch.setattr(run._Work, "_wait", waiting)
    assert cli.main(words) == 0
    assert len(waited) == 2
    assert ("ets", 1) not in waited[0]
    assert len(waited[0]) == 5
    assert measured[5:] == [("ets", 1)]


def test_a_seed_that_another_is_at_comes_last(words, tmp_path, monkeypatch):
    output = tmp_path / "out"
    words = [*words, f"--output={output}", "--procedures=[one_shot]", "--random_draws=0"]
    (model,) = yaml.safe_load((tmp_path / "compare.yaml").read_text())["models"]
    measured = spied(monkeypatch)
    with Claims(output / run.LOCKS).held(model=model, seed=0, piece="seed"):
        assert cli.main(words) == 0
    assert [seed for _, seed in measured] == [1, 1, 2, 2, 0, 0]


def test_a_claim_is_held_by_one_and_given_up_with_the_block(tmp_path):
    claims = Claims(tmp_path / "locks")
    with (
        claims.tried(seed=1) as first,
        claims.tried(seed=1) as second,
        claims.tried(seed=2) as more,
    ):
        assert (first, second, more) == (True, False, True)
    with claims.tried(seed=1) as again:
        assert again


def test_what_two_stores_write_at_once_is_all_there(tmp_path):
    path = tmp_path / "out" / "cells.jsonl"
    text = "x" * 20_000  # longer than one write of a buffered file

    def writing(rank):
        store = CellStore(path, SETTINGS)
        for n in range(40):
            store.put("cell", {"text": text, "rank": rank}, rank=rank, n=n)

    run_distributed(writing)
    lines = [line for line in path.read_text().splitlines() if line]
    assert sum('"header"' in line for line in lines) == 1
    assert '"header"' in lines[0]
    found = list(CellStore(path, SETTINGS).all("cell"))
    assert len(found) == 80
    assert all(value == {"text": text, "rank": key["rank"]} for key, value in found)


def test_a_store_takes_in_what_others_wrote_and_knows_what_is_new(tmp_path):
    path = tmp_path / "cells.jsonl"
    CellStore(path, SETTINGS).put("cell", {"error": "no room"}, seed=0)
    mine = CellStore(path, SETTINGS)
    assert not mine.is_new("cell", seed=0)
    other = CellStore(path, SETTINGS)
    other.put("cell", {"loss": 1.0}, seed=1)
    other.put("scores", {"a": [1.0]}, seed=1)
    assert mine.get("cell", seed=1) is None
    assert mine.refresh() == 1
    assert mine.get("cell", seed=1) == {"loss": 1.0}
    assert mine.get("scores", seed=1) == {"a": [1.0]}
    assert mine.is_new("cell", seed=1)
    assert mine.refresh() == 0
    other.put("cell", {"error": "no room"}, seed=0)
    mine.refresh()
    assert mine.is_new("cell", seed=0)


def test_who_writes_is_alone(tmp_path):
    path = tmp_path / "cells.jsonl"
    store = CellStore(path, SETTINGS)
    store.put("cell", {"loss": 1.0}, seed=1)
    writing = threading.Thread(target=lambda: store.put("cell", {"loss": 2.0}, seed=2))
    before = path.read_bytes()
    with path.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        writing.start()
        writing.join(0.5)
        assert writing.is_alive()
        assert path.read_bytes() == before
    writing.join()
    assert CellStore(path, SETTINGS).get("cell", seed=2) == {"loss": 2.0}
