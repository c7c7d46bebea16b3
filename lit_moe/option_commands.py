"""Commands whose options are a dataclass: ``compare`` and ``ablate``."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

import jsonargparse
from rich.console import Console
from rich.table import Table

from lit_moe.commands import one_sentence
from lit_moe.compare.ablate import AblateOptions, ablate
from lit_moe.compare.options import CompareOptions
from lit_moe.compare.run import compare
from lit_moe.compare.summary import Summary, table_rows

T = TypeVar("T")
SOME_FAILED = 1
"""Exit status when single cells failed and everything else was measured."""


class _Parser(jsonargparse.ArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        keys = [action.dest for action in self._actions]
        said = " ".join(message.split()).replace("a typing.Literal", "one of ")
        print(f"lit-moe: error: {one_sentence(said, keys)}", file=sys.stderr)
        sys.exit(2)


def run_compare(args: Sequence[str]) -> int:
    """Compare criteria, ratios and procedures.

    Returns:
        0, or 1 if single cells failed.
    """
    options = parsed(CompareOptions, args, prog="lit-moe compare")
    console = Console()
    found = compare(options, progress=True)
    _print_tables(console, found.summary)
    for failure in found.summary.failures:
        console.print(
            f"failed: {failure.line.procedure} {failure.line.name} ({failure.cells} cells): "
            f"{failure.sentence}",
            soft_wrap=True,
            highlight=False,
        )
    console.print(f"report: {options.output}/report.md", soft_wrap=True, highlight=False)
    return 0 if found.is_complete else SOME_FAILED


def run_ablate(args: Sequence[str]) -> int:
    """Measure the loss without each single expert."""
    options = parsed(AblateOptions, args, prog="lit-moe ablate")
    found = ablate(options, progress=True)
    worst = max(float(values.max()) for values in found.increases.values())
    Console().print(
        f"perplexity {math.exp(found.whole):.4g} with all experts, at most x {math.exp(worst):.4g} "
        f"without one; report: {options.output}/report.md",
        soft_wrap=True,
        highlight=False,
    )
    return 0


def parsed(kind: type[T], args: Sequence[str], *, prog: str) -> T:
    """Return options from a command line, with ``--config FILE`` for a YAML file of them.

    Args:
        kind: the dataclass; its docstring is the help.
        args: the words.
        prog: named in the help.
    """
    parser = _Parser(prog=prog, description=(kind.__doc__ or "").split("\n")[0])
    parser.add_argument("--config", action="config", help="a YAML file of these options")
    parser.add_class_arguments(kind, as_group=False)
    found: Any = parser.instantiate_classes(parser.parse_args(list(args)))
    values = {name: value for name, value in vars(found).items() if name != "config"}
    return kind(**values)


def _print_tables(console: Console, summary: Summary) -> None:
    for procedure in dict.fromkeys(row.line.procedure for row in summary.rows):
        title = f"{procedure.replace('_', '-')}: perplexity ({summary.whole.text} with all experts)"
        table = Table(title=title, title_justify="left")
        for name in ("kept", *(f"{ratio:.0%}" for ratio in summary.ratios)):
            table.add_column(name, justify="left" if name == "kept" else "right")
        for cells in table_rows(summary, procedure):
            table.add_row(*cells)
        console.print(table)
