"""Tables for the README from finished comparisons of criteria and of procedures.

``python -m tests.benchmarks.mc_suite_tables CRITERIA_FOLDER... [-- PROCEDURES_FOLDER...]`` reads
the ``report.json`` that ``lit-moe compare`` left in each folder, one per recipe of models.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks.timing import markdown

RESULTS = Path(__file__).parent / "results"
RATIOS = {"0.75": "75%", "0.5": "50%", "0.25": "25%"}
UNSTATED = ("ewn", "eao", "egs", "ego", "egn")
"""Criteria whose better direction the paper leaves open; the first column has ours."""
PROCEDURES = {"one_shot": "one-shot", "iterative": "iterative", "lottery": "lottery"}

Report = dict[str, Any]


def criteria(reports: Sequence[Report], ratio: str = "0.5") -> str:
    """Return criterion x (paper's direction, opposite) of each model at one ratio."""
    names = list(dict.fromkeys(row["criterion"] for row in reports[0]["rows"]))
    header = ["criterion"]
    for report in reports:
        header += [f"{_named(report)}", "opposite"]
    rows = [
        [name, *(text for report in reports for text in _both(report, name, ratio))]
        for name in names
    ]
    return markdown(header, rows)


def wins(reports: Sequence[Report]) -> str:
    """Return how often the first direction wins, and how many criteria beat random."""
    rows = []
    for report in reports:
        found = {line.split(": ")[1]: won for line, won in report["paper_direction_wins"].items()}
        for ratio, label in RATIOS.items():
            stated = [won[ratio] for name, won in found.items() if name not in UNSTATED]
            ours = [won[ratio] for name, won in found.items() if name in UNSTATED]
            better = sum(row["perplexity"][ratio]["beats_random"] or False for row in _ours(report))
            counts = (f"{sum(won)} of {len(won)}" for won in (stated, ours))
            rows.append([_named(report), label, *counts, f"{better} of 16"])
    header = [
        "",
        "kept",
        "the direction that the paper states is better",
        "where it states none: ours is better",
        "better than random by both deviations",
    ]
    return markdown(header, rows)


def procedures(
    reports: Sequence[Report],
    scope: str,
    *,
    only: Collection[str] | None = None,
    ratios: Sequence[str] = tuple(RATIOS),
) -> str:
    """Return criterion x procedure of each model at each ratio, in one scope."""
    header = ["", "kept", "criterion", *PROCEDURES.values()]
    rows = []
    for report in reports:
        names = dict.fromkeys(row["criterion"] for row in report["rows"])
        for ratio in ratios:
            label = RATIOS[ratio]
            for name in (name for name in names if only is None or name in only):
                cells = [_cell(report, name, procedure, scope, ratio) for procedure in PROCEDURES]
                if any(cells):
                    rows.append([_named(report), label, name, *cells])
    return markdown(header, rows)


def _ours(report: Report) -> list[dict[str, Any]]:
    return [
        row
        for row in report["rows"]
        if row["direction"] == "paper" and row["criterion"] != "random"
    ]


def _both(report: Report, name: str, ratio: str) -> list[str]:
    rows = {
        row["direction"]: row["perplexity"].get(ratio)
        for row in report["rows"]
        if row["criterion"] == name
    }
    return [_text(rows.get(direction)) for direction in ("paper", "opposite")]


def _cell(report: Report, name: str, procedure: str, scope: str, ratio: str) -> str:
    for row in report["rows"]:
        if (row["criterion"], row["procedure"], row["scope"]) == (name, procedure, scope):
            return _text(row["perplexity"].get(ratio))
    return ""


def _text(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    star = " *" if found["beats_random"] else ""
    digits = 0 if found["mean"] >= 100 else 1
    return f"{found['mean']:.{digits}f} ({found['deviation']:.{digits}f}){star}"


def _named(report: Report) -> str:
    """Return the recipe of the models: ``mixtral_8x2`` of ``.../mixtral_8x2-seed1``."""
    return Path(report["models"][0]).name.split("-seed")[0]


def main(words: Sequence[str]) -> None:
    split = words.index("--") if "--" in words else len(words)
    first, second = (
        [json.loads((Path(w) / "report.json").read_text()) for w in part]
        for part in (words[:split], words[split + 1 :])
    )
    if first:
        (RESULTS / "mc_suite_criteria.md").write_text(criteria(first) + "\n")
        (RESULTS / "mc_suite_wins.md").write_text(wins(first) + "\n")
    if second:
        (RESULTS / "mc_suite_procedures.md").write_text(procedures(second, "layer") + "\n")
        short = procedures(second, "layer", only=("random", "ean", "ege"), ratios=("0.5", "0.25"))
        (RESULTS / "mc_suite_short.md").write_text(short + "\n")
        (RESULTS / "mc_suite_global.md").write_text(procedures(second, "global") + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
