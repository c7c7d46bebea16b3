import pytest

from lit_moe.compare.store import CellStore
from lit_moe.errors import LitMoEError

SETTINGS = {"version": 1, "text": {"tokens": 256, "digest": "abc"}}


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
    other = {"version": 1, "text": {"tokens": 512, "digest": "abc"}}
    with pytest.raises(LitMoEError, match=r"text\.tokens = 256, this run has 512.*beside"):
        CellStore(path, other)
    store = CellStore(path, other, when_other="beside")
    assert store.get("cell", seed=1) is None
    store.put("cell", {"loss": 2.0}, seed=1)
    (old,) = [file for file in path.parent.iterdir() if file != path]
    assert CellStore(old, SETTINGS).get("cell", seed=1) == {"loss": 1.0}
    assert CellStore(path, other).get("cell", seed=1) == {"loss": 2.0}
