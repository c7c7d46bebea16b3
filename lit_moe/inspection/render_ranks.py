"""What one rank holds, as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Group
from rich.table import Table
from rich.text import Text

from lit_moe.inspection.ranks import Held, RankNeeds, RankRequest, Training
from lit_moe.quantities import count, size


def render_ranks(needs: RankNeeds) -> Group:
    """Return the table of training, that of loading, and what neither counts."""
    notes = (Text(f"- {note}") for note in _notes(needs.request))
    return Group(_heading(needs), _training(needs), _loading(needs), *notes)


def _heading(needs: RankNeeds) -> Text:
    request = needs.request
    words = [f"{request.ranks} ranks, ZeRO stage {request.stage}, {request.precision}"]
    if request.offload != "none":
        words.append("on the host: " + request.offload.replace("both", "optimizer and parameters"))
    if request.teacher:
        words.append("with a teacher")
    return Text("one of " + ", ".join(words))


def _training(needs: RankNeeds) -> Table:
    table = Table()
    table.add_column("while training")
    for moment, training in (("whole", needs.whole), ("pruned", needs.pruned)):
        for place in ("device", "host"):
            table.add_column(f"{moment},\n{place}", justify="right")
        del training
    for part in needs.pruned.parts:
        table.add_row(part, *_cells(needs.whole.parts[part]), *_cells(needs.pruned.parts[part]))
    table.add_section()
    table.add_row("at its peak", *_cells(needs.whole.peak), *_cells(needs.pruned.peak))
    table.add_row("experts per layer", *_experts(needs.whole), *_experts(needs.pruned))
    table.add_row("trained parameters", count(needs.whole.trained), "", count(needs.pruned.trained))
    return table


def _experts(training: Training) -> tuple[str, str]:
    low, high = training.experts
    return (str(low) if low == high else f"{low} to {high}", "")


def _loading(needs: RankNeeds) -> Table:
    table = Table()
    table.add_column("before training")
    table.add_column("loading, host", justify="right")
    table.add_column("observing, device", justify="right")
    for loading in needs.loading:
        name = "shard_on_load: true" if loading.shard_on_load else "each rank builds it whole"
        host = f"{size(loading.host)}{' (rank 0)' if loading.shard_on_load else ''}"
        table.add_row(name, host, size(loading.device))
    return table


def _cells(held: Held) -> tuple[str, str]:
    device, host = (size(n) if n else "-" for n in (held.device, held.host))
    return device, host


def _notes(request: RankRequest) -> Iterator[str]:
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[request.precision]
    yield f"loading is for model.init_args.dtype: {dtype}; another one costs its own bytes"
    if request.tokens_per_rank is None:
        yield "activations are left out: --tokens-per-rank T adds an estimate"
    yield "the peak has the more of backward (activations, gathered) and step, which take turns"
    yield "left out: buffers of the collectives and of prefetching (some GB), CUDA's own memory"
