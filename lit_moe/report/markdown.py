"""The report for people: the same facts as report.json, in reading order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lit_moe.quantities import ids_as_ranges
from lit_moe.report.schema import RunReport
from lit_moe.report.table import stages, summary_rows


def to_markdown(report: RunReport, *, figures: Sequence[str] = ()) -> str:
    """Return the report as Markdown.

    Args:
        report: of a run, finished or not.
        figures: image paths to show, relative to where the text will lie.
    """
    sections = [
        _head(report),
        _table(["", *stages(report)], ([label, *cells] for label, cells in summary_rows(report))),
        _domains(report),
        _warnings(report),
        _choice(report),
        _merging(report),
        _search(report),
        _sparsity(report),
        _refit(report),
        "\n".join(f"![{name}]({name})\n" for name in figures),
        _layers(report),
        _rounds(report),
        _seconds(report),
        _environment(report),
    ]
    return "\n".join(section for section in sections if section)


def _head(report: RunReport) -> str:
    running = "" if report.status == "finished" else "\nThe run is not finished.\n"
    return f"# {report.source}\n\nFamily `{report.family}`, seed {report.seed}.\n{running}"


def _domains(report: RunReport) -> str:
    names = list(dict.fromkeys(d for q in report.quality.values() for d in q.domains))
    if len(names) < 2:
        return ""
    rows = []
    for name in names:
        values = [q.domains.get(name) for q in report.quality.values()]
        rows.append([name, *("-" if v is None else f"{v:.4g}" for v in values)])
    return "## Perplexity by domain\n\n" + _table(["domain", *report.quality], rows)


def _warnings(report: RunReport) -> str:
    if not report.warnings:
        return ""
    return "## To know\n\n" + "\n".join(f"- {warning}" for warning in report.warnings) + "\n"


def _choice(report: RunReport) -> str:
    if not report.experts:
        return ""
    before = sum(layer.before for layer in report.experts.values())
    kept = sum(len(layer.kept) for layer in report.experts.values())
    unrouted = sum(len(ids) for ids in report.unrouted.values())
    lines = [f"- kept {kept} of {before} routed experts ({kept / before:.0%})"]
    if report.criterion:
        lines.append(f"- criterion `{report.criterion}`")
    if report.calibration.tokens:
        lines.append(f"- observed on {report.calibration.tokens:,} tokens")
        if report.calibration.predicted is not None:
            lines.append(f"- gradients of {report.calibration.predicted:,} predicted tokens")
        lines.append(f"- experts that saw no token: {unrouted}")
    if report.protected:
        total = sum(len(ids) for ids in report.protected.values())
        lines.append(f"- protected whatever their score: {total}")
    lines.append(f"- shared experts: {report.shared_experts}")
    if report.export:
        lines.append(f"- exported to `{report.export.path}` ({report.export.layout})")
        if (difference := report.export.max_abs_logit_difference) is not None:
            lines.append(f"- largest logit difference after reloading it: {difference:.3g}")
    return "## What was done\n\n" + "\n".join(lines) + "\n"


def _sparsity(report: RunReport) -> str:
    sparsity = report.sparsity
    if sparsity is None:
        return ""
    matrices = list(dict.fromkeys(m for layer in sparsity.zeros.values() for m in layer))
    rows = [
        [f"`{name}`", *("-" if m not in layer else f"{layer[m]:.2%}" for m in matrices)]
        for name, layer in sparsity.zeros.items()
    ]
    lines = [
        f"- `{sparsity.method}`, {sparsity.pattern} of the inputs of each neuron asked for",
        f"- statistics of each layer with all earlier layers {sparsity.earlier}",
        "- zeros are stored like other weights: by themselves they save neither memory nor time",
    ]
    if report.calibration.tokens:
        lines.insert(2, f"- observed on {report.calibration.tokens:,} tokens")
    if sparsity.steps:
        lines.insert(2, f"- kept through {sparsity.steps:,} training steps")
    if sparsity.unrouted:
        total = sum(map(len, sparsity.unrouted.values()))
        lines.insert(2, f"- experts that saw no calibration token: {total}")
    head = ["fraction of zeros", *matrices]
    return "## Zeros in the experts\n\n" + "\n".join(lines) + "\n\n" + _table(head, rows)


def _merging(report: RunReport) -> str:
    merging = report.merging
    if merging is None:
        return ""
    before = sum(layer.before for layer in merging.layers.values())
    after = sum(len(layer.groups) for layer in merging.layers.values())
    lines = [
        f"- {before} routed experts became {after} ({after / before:.0%})",
        f"- {merging.recipe}; router rows: {merging.router}",
    ]
    if merging.tokens:
        lines.append(f"- compared on {merging.tokens:,} tokens")
    if merging.neurons_moved is not None:
        lines.append(f"- alignment gave {merging.neurons_moved:,} neurons another place")
    lines.append(f"- shared experts: {report.shared_experts}")
    rows = [
        [
            f"`{name}`",
            str(layer.before),
            str(len(layer.groups)),
            "; ".join(ids_as_ranges(ids) for ids in layer.groups if len(ids) > 1) or "-",
        ]
        for name, layer in merging.layers.items()
    ]
    images = "\n".join(f"![{name}]({name})\n" for name in merging.figures)
    table = _table(["layer", "before", "after", "merged"], rows)
    return "## Merged experts\n\n" + "\n".join(lines) + f"\n\n{table}\n{images}"


def _search(report: RunReport) -> str:
    search = report.search
    if search is None:
        return ""
    changes = ", ".join(f"{name}: {old} -> {new}" for name, (old, new) in search.counts.items())
    lines = [
        f"- {search.evaluations:,} candidates, fitness {search.fitness}, then {search.finer}"
        + (
            f"; {search.bounded:,} stopped when they could not count any more"
            * bool(search.bounded)
        ),
        f"- experts per layer: {changes}; router maps act on {search.router_space}",
        f"- every evaluation: `{search.history}`",
    ]
    if search.active_experts is not None:
        lines.append(f"- dynamic skipping uses {search.active_experts:.2f} experts per token")
    lines += [f"- {note}" for note in search.notes]
    sizes = [f"{name} ({num})" for name, num in search.samples.items()]
    table = _table(["points", *sizes], search.lines)
    return "## Evolutionary search\n\n" + "\n".join(lines) + f"\n\n{table}"


def _refit(report: RunReport) -> str:
    refit = report.refit
    if refit is None:
        return ""
    head = ["layer", "residual", "with refit", "held out", "with refit", "lam", ""]
    rows = [
        [
            f"`{name}`",
            *(
                _number(value)
                for value in (
                    layer.residual_before,
                    layer.residual_after,
                    layer.held_out_before,
                    layer.held_out_after,
                    layer.lam,
                )
            ),
            "" if layer.kept else "left as it was",
        ]
        for name, layer in refit.layers.items()
    ]
    lines = [
        f"- {refit.mode}, solver {refit.solver}",
        f"- fitted on {refit.tokens:,} tokens, judged on {refit.held_out_tokens:,} others",
        f"- teacher: {refit.teacher}",
        f"- loss on those others (nats per token): {refit.loss_before or 0:.5g} without the refit, "
        f"{refit.loss_after or 0:.5g} with it" + ("" if refit.kept else "; undone"),
        "- residuals: what is missing of the teacher's output, as a fraction of its energy",
    ]
    return "## Refit\n\n" + "\n".join(lines) + "\n\n" + _table(head, rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _layers(report: RunReport) -> str:
    rows = [
        [f"`{name}`", str(layer.before), str(len(layer.kept)), ids_as_ranges(layer.kept)]
        for name, layer in report.experts.items()
    ]
    if not rows:
        return ""
    return "## Experts kept\n\n" + _table(["layer", "before", "kept", "ids"], rows)


def _rounds(report: RunReport) -> str:
    if len(report.rounds) < 2:
        return ""
    rows = [
        [
            str(r.round),
            str(r.experts),
            f"{r.step:,}",
            f"{r.tokens_before:,}",
            _number(r.load_cv),
        ]
        for r in report.rounds
    ]
    head = ["round", "experts left", "at step", "tokens trained on before", "load CV before"]
    return "## Rounds\n\n" + _table(head, rows)


def _seconds(report: RunReport) -> str:
    if not report.seconds:
        return ""
    rows = [[phase, f"{seconds:.1f}"] for phase, seconds in report.seconds.items()]
    return "## Time\n\n" + _table(["phase", "seconds"], rows)


def _environment(report: RunReport) -> str:
    versions = {"lit-moe": report.lit_moe, **report.versions}
    return "Made with " + ", ".join(f"{k} {v}" for k, v in versions.items()) + ".\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    lines = [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]
    return "\n".join(lines) + "\n"
