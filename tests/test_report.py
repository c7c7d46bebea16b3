from __future__ import annotations

import json
import logging
import math
import sys

import pytest
import torch
from rich.console import Console

from lit_moe.errors import LitMoEError
from lit_moe.evaluate import Quality
from lit_moe.plan import KeepPlan
from lit_moe.quantities import count, ids_as_ranges, size, with_error
from lit_moe.report import (
    Change,
    Export,
    RunReport,
    draw_figures,
    read_json,
    summary_table,
    to_markdown,
    write_json,
    write_markdown,
)

LAYERS = ("model.layers.0.mlp", "model.layers.1.mlp")


@pytest.fixture
def report():
    report = RunReport.start(source="some/model", family="mixtral", seed=3)
    report.record_plan(
        KeepPlan({LAYERS[0]: (0, 2), LAYERS[1]: (1, 2, 3)}, dict.fromkeys(LAYERS, 4))
    )
    report.calibration.tokens = 4096
    report.criterion = "reap"
    report.unrouted = {LAYERS[0]: [3]}
    report.parameters = Change(1_000_000, 600_000)
    report.active_parameters = Change(400_000, 400_000)
    report.bytes = Change(2_000_000, 1_200_000)
    report.seconds = {"calibration": 1.5}
    report.quality = {
        "before": Quality(20.0, 0.2, 1.4, 5000, 900.0, {"news": 18.0, "code": 22.0}),
        "pruned": Quality(50.0, 0.5, 1.9, 5000, 1000.0, {"news": 40.0, "code": 60.0}),
    }
    report.export = Export("runs/out", 0.0, "plain")
    return report


def shown(renderable):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    console.file.close()
    return console.export_text()


def test_report_json_has_the_keys_that_scripts_rely_on(report, tmp_path):
    write_json(report, tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    for key in ("lit_moe", "source", "family", "seed", "status", "versions", "warnings"):
        assert key in data
    assert data["seconds"] == {"calibration": 1.5}
    assert data["calibration"]["tokens"] == 4096
    for key in ("parameters", "active_parameters", "bytes"):
        assert set(data[key]) == {"before", "after"}
    assert data["experts"][LAYERS[0]] == {"before": 4, "kept": [0, 2]}
    assert data["unrouted"] == {LAYERS[0]: [3]}
    assert {"perplexity", "stderr", "bits_per_byte", "tokens"} <= set(data["quality"]["pruned"])
    assert data["quality"]["before"]["domains"] == {"news": 18.0, "code": 22.0}
    assert data["export"] == {
        "path": "runs/out",
        "max_abs_logit_difference": 0.0,
        "layout": "plain",
    }
    assert {"python", "torch", "transformers"} <= set(data["versions"])


def test_a_report_survives_writing_and_reading(report, tmp_path):
    report.quality["pruned"] = Quality(math.inf, 0.0, 2.0, 10)
    report.status = "finished"
    write_json(report, tmp_path / "report.json")
    assert "Infinity" not in (tmp_path / "report.json").read_text()
    assert read_json(tmp_path / "report.json") == report
    write_json(RunReport.start(source="a", family="b", seed=None), tmp_path / "report.json")
    assert read_json(tmp_path / "report.json").seed is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"famly": "x"}, "report has an unknown key 'famly'; known: family"),
        ({"source": None}, "report.source should be"),
        ({"status": "paused"}, "report.status should be"),
        ({"parameters": 3}, "report.parameters should be an object, found 3"),
        ({"experts": {"l": {"before": 4}}}, "report.experts.l lacks kept"),
    ],
)
def test_a_wrong_report_is_refused_with_the_key(report, change, message):
    with pytest.raises(LitMoEError, match=message):
        RunReport.from_dict({**report.to_dict(), **change})


def test_reading_a_missing_or_damaged_report_names_the_file(tmp_path):
    with pytest.raises(LitMoEError, match=r"report\.json does not exist"):
        read_json(tmp_path / "report.json")
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(LitMoEError, match=r"report\.json is not JSON"):
        read_json(tmp_path / "report.json")


def test_a_failed_write_leaves_the_older_report(report, tmp_path):
    write_json(report, tmp_path / "report.json")
    report.seconds["bad"] = object()
    with pytest.raises(TypeError):
        write_json(report, tmp_path / "report.json")
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
    assert read_json(tmp_path / "report.json").seconds == {"calibration": 1.5}


def test_the_table_has_a_column_for_each_stage_that_exists(report):
    text = shown(summary_table(report))
    assert "20.00 +- 0.20" in text
    assert "600 K" in text
    assert "1.20 MB" in text
    assert "recovered" not in text
    report.quality["refitted"] = Quality(30.0, 0.3, 1.5, 5000)
    text = shown(summary_table(report))
    assert text.index("pruned") < text.index("refitted")
    assert "30.00 +- 0.30" in text


def test_the_table_of_a_run_without_evaluation_compares_sizes(report):
    report.quality = {}
    text = shown(summary_table(report))
    assert "after" in text
    assert "perplexity" not in text
    assert "1.00 M" in text


def test_markdown_says_what_was_done_and_shows_the_figures(report, tmp_path):
    report.warnings.append("expert 3 saw no token")
    write_markdown(report, tmp_path / "report.md", figures=[tmp_path / "quality.png"])
    text = (tmp_path / "report.md").read_text()
    assert "kept 5 of 8 routed experts (62%)" in text
    assert "- expert 3 saw no token" in text
    assert "| `model.layers.1.mlp` | 4 | 3 | 1-3 |" in text
    assert "| code | 22 | 60 |" in text
    assert "![quality.png](quality.png)" in text
    assert "The run is not finished" in text
    report.status = "finished"
    assert "not finished" not in to_markdown(report)


def test_figures_are_drawn_for_what_is_known(report, tmp_path):
    pytest.importorskip("matplotlib")
    from PIL import Image

    scores = {LAYERS[0]: torch.tensor([4.0, 1, 3, 2]), LAYERS[1]: torch.tensor([0.0, 0, 0, 0])}
    loads = {LAYERS[0]: torch.tensor([9, 1, 5, 0]), LAYERS[1]: torch.tensor([3, 3, 3, 3])}
    files = draw_figures(report, tmp_path, scores=scores, loads=loads)
    assert [file.name for file in files] == ["scores.png", "expert_load.png", "quality.png"]
    for file in files:
        with Image.open(file) as image:
            assert min(image.size) > 200
            assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 10
    report.quality = {}
    assert draw_figures(report, tmp_path) == []


def test_without_matplotlib_the_log_says_how_to_get_it(report, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with caplog.at_level(logging.WARNING):
        assert draw_figures(report, tmp_path) == []
    assert "pip install lit-moe[plots]" in caplog.text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (None, "-"),
        (0, "0"),
        (999, "999"),
        (1000, "1.00 K"),
        (46_702_792_704, "46.7 B"),
        (999_999, "1.00 M"),
    ],
)
def test_counts_have_three_digits(number, text):
    assert count(number) == text


def test_sizes_errors_and_ids_are_short():
    assert size(93_405_585_408) == "93.4 GB"
    assert size(532) == "532 B"
    assert with_error(21.3742, 0.2103) == "21.37 +- 0.21"
    assert with_error(1234.5, 38.0) == "1,234 +- 38"
    assert with_error(21.3742, 0.0) == "21.37"
    assert with_error(math.inf, math.nan) == "inf"
    assert ids_as_ranges([0, 1, 2, 5, 6, 9]) == "0-2, 5, 6, 9"
    assert ids_as_ranges([]) == ""
