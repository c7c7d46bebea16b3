"""The files of a comparison: tables as Markdown and JSON, figures, TensorBoard events."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_moe.compare.ablation import AblationMap
from lit_moe.compare.agreement import Agreement
from lit_moe.compare.answers import answer_tables, answers_markdown
from lit_moe.compare.findings import (
    COLLAPSE,
    Found,
    agreements,
    collapsing,
    correlations,
    lottery_loads,
    super_experts,
)
from lit_moe.compare.pictures import can_draw, draw, draw_ablation, save, write_events
from lit_moe.compare.summary import Row, Summary, markdown_table, to_markdown
from lit_moe.report import installed_versions
from lit_moe.report.coding import plain_values

JSON_NAME, MARKDOWN_NAME, EVENTS = "report.json", "report.md", "tensorboard"
_MOST_COSTLY = 5
_SIGNS = {
    "extreme_activations": "experts with extreme activations",
    "single_drop": f"experts without which the perplexity is {COLLAPSE:g} times as large or more",
}


def write_all(found: Found, folder: Path) -> None:
    """Write report.json, report.md, figures and TensorBoard events."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = draw(found) if found.grid.options.figures and can_draw() else {}
    save(figures, folder)
    _replace(folder / JSON_NAME, json.dumps(plain_values(to_dict(found)), indent=2) + "\n")
    _replace(folder / MARKDOWN_NAME, markdown(found, list(figures)))
    write_events(figures, folder / EVENTS, found.summary)


def to_dict(found: Found) -> dict[str, Any]:
    """Return all findings as plain values."""
    grid, summary = found.grid, found.summary
    correlated = correlations(grid, found.store)
    agreed = agreements(grid, found.store)
    return {
        "models": grid.options.models,
        "settings": found.store.settings,
        "versions": installed_versions(),
        "whole": summary.whole.to_dict(),
        "rows": [_row(summary, row) for row in summary.rows],
        "questions": [table.to_dict() for table in answer_tables(summary)],
        "paper_direction_wins": summary.paper_wins(),
        "failed": [
            {**vars(f.line), "cells": f.cells, "error": f.sentence} for f in summary.failures
        ],
        "agreement": {ratio: _agreement(a) for ratio, a in agreed.items()},
        "rank_correlation": None if correlated is None else _agreement(correlated),
        "load": lottery_loads(summary),
        "super_experts": super_experts(found),
        "ablation": None if found.ablation is None else _ablation(found.ablation),
    }


def markdown(found: Found, figures: list[str]) -> str:
    """Return the report for people."""
    parts = [f"# {', '.join(found.grid.options.models)}\n", to_markdown(found.summary)]
    parts += [text for text in [answers_markdown(found.summary)] if text]
    parts += [f"![{name}]({name}.png)\n" for name in figures]
    loads = lottery_loads(found.summary)
    if loads:
        head = ["load of the experts", "CV before", "CV after", "entropy before", "entropy after"]
        rows = [[name, *(f"{v:.3f}" for v in values.values())] for name, values in loads.items()]
        parts.append("## Load before and after fine-tuning\n\n" + markdown_table(head, rows))
    if found.ablation is not None:
        parts.append(_costly(found.ablation))
    signs = super_experts(found)
    if signs:
        parts.append(_super_experts(signs))
    return "\n".join(parts)


def write_ablation(found: AblationMap, model: str, folder: Path, *, figures: bool) -> None:
    """Write the map of single experts alone: report.json, report.md, a figure and events."""
    folder.mkdir(parents=True, exist_ok=True)
    collapsed = collapsing(found)
    values = {
        "model": model,
        **_ablation(found),
        "super_experts": collapsed,
        "versions": installed_versions(),
    }
    _replace(folder / JSON_NAME, json.dumps(plain_values(values), indent=2) + "\n")
    image = ""
    if figures and can_draw():
        drawn = {"ablation": draw_ablation(found)}
        save(drawn, folder)
        write_events(drawn, folder / EVENTS)
        image = "\n![ablation](ablation.png)\n"
    head = f"# {model}\n\nPerplexity with all experts: {math.exp(found.whole):.4g}.\n\n"
    table = _super_experts({"single_drop": collapsed})
    _replace(folder / MARKDOWN_NAME, f"{head}{_costly(found)}\n{table}{image}")


def _row(summary: Summary, row: Row) -> dict[str, Any]:
    ratios = {}
    for ratio, value in row.perplexity.items():
        beats = summary.beats_control(row, ratio)
        ratios[f"{ratio:g}"] = {**value.to_dict(), "beats_random": beats}
        if ratio in row.tokens:
            ratios[f"{ratio:g}"]["trained_tokens"] = row.tokens[ratio]
    return {**vars(row.line), "perplexity": ratios}


def _agreement(agreement: Agreement) -> dict[str, Any]:
    layers = {layer: values.tolist() for layer, values in agreement.layers.items()}
    return {
        "names": list(agreement.names),
        "overall": agreement.overall.tolist(),
        "layers": layers,
    }


def _ablation(ablation: AblationMap) -> dict[str, Any]:
    perplexities = {layer: values.tolist() for layer, values in ablation.perplexities.items()}
    whole = math.exp(ablation.whole)
    return {"whole": whole, "tokens": ablation.tokens, "without": perplexities}


def _costly(ablation: AblationMap) -> str:
    drops = [
        (float(value.exp()), layer, expert)
        for layer, values in ablation.increases.items()
        for expert, value in enumerate(values)
    ]
    most = sorted(drops, reverse=True)[:_MOST_COSTLY]
    rows = [[f"`{layer}`", str(expert), f"x {factor:.4g}"] for factor, layer, expert in most]
    head = ["layer", "expert left out", "perplexity"]
    return "## The experts that cost most\n\n" + markdown_table(head, rows)


def _super_experts(signs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return layer -> experts by each sign that was looked for, as :func:`super_experts` does."""
    layers = dict.fromkeys(layer for found in signs.values() for layer in found)
    rows = [
        [f"`{layer}`", *(_named(found.get(layer, ())) for found in signs.values())]
        for layer in layers
    ]
    head = ["layer", *(_SIGNS[sign] for sign in signs)]
    table = markdown_table(head, rows or [["all", *("-" for _ in signs)]])
    return f"## Super-experts\n\n{table}"


def _named(experts: Sequence[int] | Mapping[str, float]) -> str:
    if isinstance(experts, Mapping):
        return ", ".join(f"{expert} (x {factor:.4g})" for expert, factor in experts.items()) or "-"
    return ", ".join(str(expert) for expert in experts) or "-"


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
