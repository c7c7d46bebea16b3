"""An inspection as tables for the terminal."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lit_moe.inspection.findings import Inspection, Layer
from lit_moe.inspection.render_ranks import render_ranks
from lit_moe.quantities import count, ids_as_ranges, size

_FIRST_NUMBER = re.compile(r"\d+")


def render(inspection: Inspection) -> RenderableType:
    """Return head line, MoE layers, parts, savings and notes."""
    notes = [Text(f"- {note}") for note in inspection.notes]
    tables: list[RenderableType] = [
        _head(inspection),
        _layers(inspection),
        _parts(inspection),
        _savings(inspection),
    ]
    if inspection.refit:
        tables.append(_refit(inspection))
    if inspection.ranks:
        tables.append(render_ranks(inspection.ranks))
    return Group(*tables, *notes)


def _head(inspection: Inspection) -> Text:
    lines = (
        f"{inspection.name}: {inspection.architecture} ({inspection.family}), {inspection.dtype}",
        f"{count(inspection.parameters)} parameters, "
        f"{count(inspection.active_parameters)} active per token, {size(inspection.bytes)}",
        f"MoE layers: {len(inspection.layers)}, dense layers: {inspection.dense_layers}",
        f"routing: {_routing(inspection)}",
    )
    return Text("\n".join(lines))


def _layers(inspection: Inspection) -> Table:
    table = _table("MoE layers", "experts", "top-k", "groups", "shared", "legal counts")
    for name, layer in _alike(inspection.layers):
        limited = layer.num_groups > 1
        table.add_row(
            escape(name),
            str(layer.num_experts),
            str(layer.top_k),
            f"{layer.top_k_groups} of {layer.num_groups}" if limited else "-",
            str(layer.num_shared or "-"),
            counts_in_words(layer.legal_counts),
        )
    return table


def _parts(inspection: Inspection) -> Table:
    table = _table("part", "parameters", "bytes", "share")
    total = inspection.bytes
    for part, part_size in inspection.parts.items():
        share = f"{part_size.bytes / total:.1%}"
        table.add_row(part, count(part_size.parameters), size(part_size.bytes), share)
    return table


def _savings(inspection: Inspection) -> Table:
    table = _table("keep", "experts per layer", "parameters", "bytes", "saved", "size")
    for saving in inspection.savings:
        low, high = saving.experts
        table.add_row(
            f"{saving.keep_ratio:.0%}",
            str(low) if low == high else f"{low} to {high}",
            count(saving.parameters),
            size(saving.bytes),
            size(saving.saved_bytes),
            f"{saving.size_ratio:.1%}",
        )
    return table


def _refit(inspection: Inspection) -> Group:
    table = _table("refit", "keep", "solver", "matrices", "features", "streams", "undo", "disk")
    for needs in inspection.refit:
        numbers = (needs.matrices, needs.features, needs.streams, needs.undo, needs.on_disk)
        cells = ("-",) * len(numbers) if needs.solver == "none" else map(size, numbers)
        table.add_row(needs.mode, f"{needs.keep_ratio:.0%}", needs.solver, *cells)
    reasons = dict.fromkeys(n.reason for n in inspection.refit if n.solver == "none")
    return Group(table, *(Text(f"- no refit: {reason}") for reason in reasons))


def counts_in_words(counts: Sequence[int]) -> str:
    """Return ascending counts in short: ``2-8``, ``16-256 by 8``, ``4, 9, 16``."""
    steps = {after - before for before, after in itertools.pairwise(counts)}
    if len(counts) > 2 and len(steps) == 1 and (step := steps.pop()) > 1:
        return f"{counts[0]}-{counts[-1]} by {step}"
    return ids_as_ranges(counts)


def _routing(inspection: Inspection) -> str:
    how = {True: ", renormalised", False: ", not renormalised", None: ""}
    kinds = dict.fromkeys(layer.routing + how[layer.renormalised] for layer in inspection.layers)
    return "; ".join(kinds)


def _alike(layers: Sequence[Layer]) -> list[tuple[str, Layer]]:
    """Join layers that differ in their number only: ``model.layers.{3-60}.mlp``."""
    groups: dict[Layer, list[int]] = {}
    for layer in layers:
        found = _FIRST_NUMBER.search(layer.name)
        pattern = _FIRST_NUMBER.sub("{}", layer.name, count=1)
        key = dataclasses.replace(layer, name=pattern)
        groups.setdefault(key, []).append(int(found[0]) if found else 0)
    return [(_name(key.name, numbers), key) for key, numbers in groups.items()]


def _name(pattern: str, numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return pattern.replace("{}", str(numbers[0]))
    return pattern.replace("{}", "{" + ids_as_ranges(numbers) + "}")


def _table(first: str, *others: str) -> Table:
    table = Table()
    table.add_column(first)
    for heading in others:
        table.add_column(heading, justify="right")
    return table
