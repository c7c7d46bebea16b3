"""``lit-moe compare`` from outside: killed and started again, bad requests, what it leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_moe import cli
from lit_moe.compare import lottery
from lit_moe.compare.options import CompareOptions
from lit_moe.option_commands import parsed

CONFIG = Path(__file__).parents[2] / "configs" / "mc_suite" / "compare.yaml"


@pytest.fixture
def words(checkpoint, pages, tmp_path):
    """A command line of seconds."""
    config = {
        "models": [str(checkpoint)],
        "criteria": ["ean", "ets"],
        "directions": ["paper", "opposite"],
        "keep_ratios": [0.75, 0.5],
        "procedures": ["one_shot", "iterative", "lottery"],
        "seeds": [0, 1],
        "random_draws": 2,
        "rounds": 2,
        "fine_tuning": {"first": 1, "unit": "steps", "when_data_ends": "repeat"},
        "text": {
            "calibration_files": [pages],
            "train_files": [pages],
            "evaluation_files": [pages],
            "sequence_length": 32,
            "batch_size": 4,
            "calibration_tokens": 256,
            "evaluation_tokens": 256,
        },
        "output": str(tmp_path / "out"),
    }
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(config))
    return ["compare", f"--config={tmp_path / 'compare.yaml'}"]


def records(path):
    """Return the records of a file of cells, without times."""
    found = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record["kind"] != "header":
            value = record["value"]
            record["value"] = {k: v for k, v in value.items() if "second" not in k}
            found.append(record)
    return found


def status_of(words):
    try:
        return cli.main(words)
    except SystemExit as stop:  # of the parser
        return stop.code


def names(found):
    return [json.dumps([r["kind"], r["key"]], sort_keys=True) for r in found]


def test_after_a_kill_the_same_command_goes_on_and_repeats_nothing(words, tmp_path):
    cells = tmp_path / "out" / "cells.jsonl"
    words = [*words, "--criteria=[ean]", "--directions=[paper]", "--random_draws=0"]
    command = [sys.executable, "-m", "lit_moe", *words]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (cells.exists() and len(records(cells)) >= 8):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = cells.read_bytes()
    assert not (tmp_path / "out" / "report.json").exists()
    assert cli.main(words) == 0
    assert cells.read_bytes().startswith(before)
    found = records(cells)
    assert len(set(names(found))) == len(found)
    assert cli.main([*words, f"--output={tmp_path / 'whole'}"]) == 0
    whole = records(tmp_path / "whole" / "cells.jsonl")
    assert sorted(names(found)) == sorted(names(whole))
    by_name = dict(zip(names(whole), whole, strict=True))
    assert all(record == by_name[name] for name, record in zip(names(found), found, strict=True))


def test_what_a_comparison_leaves(words, tmp_path, capsys):
    assert cli.main([*words, "--ablation=true"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{name}: perplexity" in shown for name in ("one-shot", "lottery"))
    out = tmp_path / "out"
    report = json.loads((out / "report.json").read_text())
    assert report["failed"] == []
    assert len(report["rows"]) == 3 * (1 + 2 * 2)
    best = next(
        r
        for r in report["rows"]
        if (r["criterion"], r["direction"], r["procedure"]) == ("ean", "paper", "lottery")
    )
    assert {"mean", "deviation", "num", "min", "max", "beats_random"} < set(
        best["perplexity"]["0.5"]
    )
    assert (
        best["perplexity"]["0.5"]["trained_tokens"] > best["perplexity"]["0.75"]["trained_tokens"]
    )
    assert set(report["paper_direction_wins"]) == {
        f"{p}: {c}" for p in ("one_shot", "iterative", "lottery") for c in ("ean", "ets")
    }
    assert report["agreement"]["0.5"]["overall"][0][0] == 1
    correlated = report["rank_correlation"]
    ean, opposite = (correlated["names"].index(n) for n in ("ean", "ean (opposite)"))
    assert correlated["overall"][ean][opposite] == pytest.approx(-1)
    assert {"load_cv_before", "load_cv_after"} <= set(report["load"]["ean, 0.5 kept"])
    assert set(report["super_experts"]) == {"extreme_activations", "single_drop"}
    assert len(report["ablation"]["without"]) == 2
    text = (out / "report.md").read_text()
    names = [
        "perplexity",
        "agreement",
        "rank_correlation",
        "expert_load",
        "ablation",
        "largest_activations",
    ]
    for name in names:
        assert (out / f"{name}.png").stat().st_size > 5000
        assert f"![{name}]({name}.png)" in text
    signs = "| layer | experts with extreme activations | experts without which"
    for part in ("| random |", "## Directions", f"## Super-experts\n\n{signs}"):
        assert part in text
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    curve = events.Scalars("lottery/ean")
    assert [event.step for event in curve] == [0, 25, 50]
    assert curve[2].value == pytest.approx(best["perplexity"]["0.5"]["mean"], rel=1e-5)
    assert set(names) == set(events.Tags()["images"])


def test_the_status_says_that_cells_failed(words, capsys):
    options = ["--procedures=[iterative]", "--criteria=[naee]", "--seeds=[0]"]
    assert cli.main([*words, *options]) == 1
    assert (
        "failed: iterative naee (2 cells): criterion 'naee' uses masks" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--critera=[ean]", "did you mean 'criteria'?"),
        ("--criteria=[eann]", "did you mean 'ean'?"),
        ("--criteria=[]", "criteria is empty"),
        ("--criteria=[ean,ean]", "criteria has 'ean' twice"),
        ("--procedures=[one_shot,lotery]", "one of ['one_shot', 'iterative', 'lottery']"),
        ("--keep_ratios=[0.5,1.5]", "keep_ratios has 1.5"),
        ("--keep_ratios=[0.1]", "the nearest legal count is 2, keep_ratio=0.25"),
        ("--rounds=3", "rounds=3 does not divide what goes"),
        ("--rounds=1", "1 rounds from all experts to keep_ratio=0.5 miss 0.75"),
        ("--fine_tuning.optimizer=keep", "use reset"),
        ("--fine_tuning.frist=3", "did you mean 'fine_tuning.first'?"),
        ("--models=[/nowhere]", "/nowhere does not exist"),
        ("--text.evaluation_files=[/nowhere.txt]", "/nowhere.txt"),
        ("--text.calibration_tokens=8", "the least usable is 32"),
        ("--text.tokenizer=/nowhere", "has no tokenizer"),
        ("--config=/nowhere.yaml", "/nowhere.yaml"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_sentence_before_anything_runs(
    words, option, message, capsys, tmp_path
):
    assert status_of([*words, option]) == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert message in sentence
    assert not (tmp_path / "out" / "cells.jsonl").exists() or not [
        r for r in records(tmp_path / "out" / "cells.jsonl") if r["kind"] != "model"
    ]


def test_the_config_of_the_project_parses_and_names_every_field():
    options = parsed(CompareOptions, [f"--config={CONFIG}"], prog="lit-moe compare")
    assert options.procedures == ["one_shot", "iterative", "lottery"]
    written = yaml.safe_load(CONFIG.read_text())
    assert set(vars(options)) - set(written) <= {"dtype", "figures"}
    head = CONFIG.read_text().splitlines()[:8]
    assert any("lit-moe compare --config configs/mc_suite/compare.yaml" in line for line in head)


def test_lists_are_given_as_yaml_on_the_command_line():
    words = [f"--config={CONFIG}", "--criteria", "[reap, random]", "--seeds", "[7]"]
    options = parsed(CompareOptions, words, prog="lit-moe compare")
    assert (options.criteria, options.seeds) == (["reap", "random"], [7])


def test_more_training_than_text_is_refused_before_anything_is_measured(words, tmp_path, capsys):
    options = ["--procedures=[one_shot,lottery]", "--fine_tuning.first=50000000"]
    options += ["--fine_tuning.when_data_ends=error"]
    assert cli.main([*words, *options]) == 2
    assert "but one pass over the training text has" in capsys.readouterr().err
    assert not (tmp_path / "out" / "cells.jsonl").exists()


def test_a_lottery_that_is_told_to_end_does_not_look_finished(words, tmp_path, monkeypatch):
    def told(*_):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(lottery._StationedPruning, "on_round_end", told)
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--procedures=[lottery]", "--seeds=[0]"])
    assert ended.value.code == 128 + signal.SIGTERM
    assert not (tmp_path / "out" / "report.md").exists()
