import fcntl
import threading

import pytest

from lit_moe.compare.store import CellStore
from lit_moe.errors import LitMoEError
from lit_moe.testing import run_distributed

SETTINGS = {"version": 1, "text": {"tokens": 256, "digest": "abc"}}
OTHER = {"version": 1, "text": {"tokens": 512, "digest": "abc"}}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out" / "cells.jsonl"


def test_records_are_there_again_exactly(path):
    value = {"loss": 0.1 + 0.2, "scores": [float("inf"), -1e-300], "kept": {"a": [0, 2]}}
    CellStore(path, SETTINGS).put("cell", value, model="x", ratio=0.5)
    again = CellStore(path, SETTINGS)
    assert again.get("cell", ratio=0.5, model="x") == value
    assert again.get("cell", model="x") is None
    assert again.get("scores", model="x", ratio=0.5) is None
    assert list(again.all("cell")) == [({"model": "x", "ratio": 0.5}, value)]


def test_a_line_that_a_kill_cut_off_spoils_only_itself(path):
    store = CellStore(path, SETTINGS)
    store.put("cell", {"loss": 1.0}, seed=1)
    store.put("cell", {"loss": 2.0}, seed=2)
    text = path.read_text()
    path.write_text(text[: text.rindex('"loss"')])
    store = CellStore(path, SETTINGS)
    assert store.get("cell", seed=1) == {"loss": 1.0}
    assert store.get("cell", seed=2) is None
    store.put("cell", {"loss": 3.0}, seed=3)
    again = CellStore(path, SETTINGS)
    assert [key["seed"] for key, _ in again.all("cell")] == [1, 3]


def test_a_file_cut_off_in_its_header_begins_anew(path):
    CellStore(path, SETTINGS).put("cell", {"loss": 1.0}, seed=1)
    path.write_text(path.read_text()[:20])
    store = CellStore(path, SETTINGS)
    store.put("cell", {"loss": 2.0}, seed=2)
    assert CellStore(path, SETTINGS).get("cell", seed=2) == {"loss": 2.0}
    with pytest.raises(LitMoEError, match=r"version = 1"):
        CellStore(path, {**SETTINGS, "version": 2})


def test_the_later_of_two_records_counts(path):
    store = CellStore(path, SETTINGS)
    store.put("cell", {"error": "no room"}, seed=1)
    store.put("cell", {"loss": 2.0}, seed=1)
    assert CellStore(path, SETTINGS).get("cell", seed=1) == {"loss": 2.0}


def test_results_of_other_settings_are_refused_by_name_or_kept_beside(path):
    CellStore(path, SETTINGS).put("cell", {"loss": 1.0}, seed=1)
    with pytest.raises(LitMoEError, match=r"text\.tokens = 256, this run has 512.*beside"):
        CellStore(path, OTHER)
    store = CellStore(path, OTHER, when_other="beside")
    assert store.get("cell", seed=1) is None
    store.put("cell", {"loss": 2.0}, seed=1)
    (old,) = [file for file in path.parent.iterdir() if file != path]
    assert CellStore(old, SETTINGS).get("cell", seed=1) == {"loss": 1.0}
    assert CellStore(path, OTHER).get("cell", seed=1) == {"loss": 2.0}


def test_a_running_store_never_writes_behind_the_header_of_another(path):
    running = CellStore(path, SETTINGS)
    running.put("cell", {"loss": 1.0}, seed=0)
    other = CellStore(path, OTHER, when_other="beside")
    for touch in (running.refresh, lambda: running.put("cell", {"loss": 9.0}, seed=2)):
        with pytest.raises(LitMoEError, match=r"begun .* anew with text\.tokens = 512.*`output`"):
            touch()
    other.put("cell", {"loss": 2.0}, seed=1)
    assert [key["seed"] for key, _ in CellStore(path, OTHER).all("cell")] == [1]
    (old,) = [file for file in path.parent.iterdir() if file != path]
    assert [key["seed"] for key, _ in CellStore(old, SETTINGS).all("cell")] == [0]


def test_results_that_were_set_aside_before_are_not_written_over(path):
    for number, settings in enumerate((SETTINGS, OTHER, SETTINGS, OTHER)):
        CellStore(path, settings, when_other="beside").put("cell", {"loss": 1.0}, seed=number)
    found = [line for file in path.parent.iterdir() for line in file.read_text().splitlines()]
    assert sum('"kind": "cell"' in line for line in found) == 4


def test_who_sets_aside_waits_for_who_writes_and_follows_a_renamed_file(path):
    CellStore(path, SETTINGS).put("cell", {"loss": 1.0}, seed=0)
    third = {"version": 3}
    opening = threading.Thread(target=lambda: CellStore(path, OTHER, when_other="beside"))
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        opening.start()
        opening.join(0.3)
        assert opening.is_alive()
        path.rename(path.with_stem("renamed"))
        CellStore(path, third).put("cell", {"loss": 3.0}, seed=3)
    opening.join()
    assert list(CellStore(path, OTHER).all("cell")) == []
    assert CellStore(path.with_stem("renamed"), SETTINGS).get("cell", seed=0) == {"loss": 1.0}
    (aside,) = set(path.parent.iterdir()) - {path, path.with_stem("renamed")}
    assert CellStore(aside, third).get("cell", seed=3) == {"loss": 3.0}


def test_two_that_set_aside_at_once_share_the_new_file(path):
    CellStore(path, SETTINGS).put("cell", {"loss": 1.0}, seed=0)

    def opening(rank):
        CellStore(path, OTHER, when_other="beside").put("cell", {"loss": 2.0}, seed=rank)

    run_distributed(opening)
    assert {key["seed"] for key, _ in CellStore(path, OTHER).all("cell")} == {0, 1}
    (old,) = [file for file in path.parent.iterdir() if file != path]
    assert CellStore(old, SETTINGS).get("cell", seed=0) == {"loss": 1.0}
