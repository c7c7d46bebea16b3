"""The tables of the refit's benchmark, from the cells that are there.

Each number is a mean over seeds with [smallest, largest]; how many seeds stands in the header, or
in the cell where it is fewer.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from tests.benchmarks.refit_bench import model_names
from tests.benchmarks.refit_parts import CRITERIA, RATIOS, SIZED, THINNED, TRAINED, VARIANTS
from tests.benchmarks.refit_store import Result, Store
from tests.benchmarks.timing import markdown

COLUMNS = {
    "drop": "dropped",
    "refit": "+ refit",
    "tune_tokens": "+ fine-tuned, same tokens",
    "tune_seconds": "+ fine-tuned, same seconds",
    "distil": "+ distilled",
    "refit_distil": "+ refit, distilled",
}
TRAINING_NOTE = (
    "Fine-tuned: AdamW on all weights, the best of 2 learning rates (and of 1 and 3 passes over "
    "the same 16,384 tokens), chosen on the test text itself; for the same seconds on fresh "
    "training text. Distilled: 60 steps of 1,024 tokens of training text, half next tokens, half "
    "the whole model's distribution. Perplexity on 32,768 held-out tokens, fp32."
)
FLOOR_NOTE = (
    "With 25% kept, each layer of mixtral_8x2 and olmoe_16x4 has as many experts as its router "
    "picks, so that a global budget cannot differ."
)
WIDER_SAID = {
    "tune_tokens": ("as above", "10 passes or rate 3e-3, the better"),
    "distil": ("rate 1e-3", "rate 2e-3"),
    "refit_distil": ("rate 1e-3", "rate 2e-3"),
}
Number = Callable[[str], float | None]


def families() -> dict[str, list[str]]:
    """Return the models of each family."""
    found: dict[str, list[str]] = {}
    for name in model_names():
        found.setdefault(name.split("-seed")[0], []).append(name)
    return found


class Tables:
    """Renders one store."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._families = families()

    def all(self) -> dict[str, str]:
        """Return every table by its name."""
        whole = {f"refit_repairs_{family}": self.repairs(family) for family in self._families}
        return {
            "refit": self.gaps(),
            **whole,
            "refit_budgets": self.budgets(),
            "refit_tuning": self.tuning(),
            "refit_sizes": self.sizes(),
            "refit_solvers": self.solvers(),
            "refit_thinned": self.thinned(),
            "refit_wider": self.wider(),
        }

    def gaps(self) -> str:
        """Share of the perplexity gap that the refit closes."""

        def row(criterion: str, keep: float) -> list[str]:
            return [
                self._seeds(family, lambda m: self.gap(m, criterion, keep), "{:.0f} %")
                for family in self._families
            ]

        rows = [[f"{keep:.0%}", name, *row(name, keep)] for keep in RATIOS for name in CRITERIA]
        return markdown(["kept", "criterion", *self._headers()], rows)

    def repairs(self, family: str) -> str:
        """Perplexities of one family: every criterion, ratio and repair."""
        base = self._seeds(family, self._ppl("whole"))
        rows = []
        for keep in RATIOS:
            for criterion in CRITERIA:
                settings: dict[str, Any] = {"criterion": criterion, "keep": keep}
                row = [
                    self._seeds(family, self._ppl("repairs", **settings, repair=repair))
                    if repair in ("drop", "refit") or (criterion, keep) in TRAINED
                    else ""
                    for repair in COLUMNS
                ]
                rows.append([f"{keep:.0%}", criterion, *row])
        head = f"{family}, {count_seeds(len(self._families[family]))}; whole: {base}"
        table = markdown([head, "criterion", *COLUMNS.values()], rows)
        return f"{table}\n\n{TRAINING_NOTE}" if family == "embedded" else table

    def tuning(self) -> str:
        """Half of the experts by reap: every repair, family by family."""
        rows = []
        for family in self._families:
            row = [
                self._seeds(family, self._ppl("repairs", criterion="reap", keep=0.5, repair=repair))
                for repair in COLUMNS
            ]
            rows.append([family, self._seeds(family, self._ppl("whole")), *row])
        return markdown(["50% kept by reap", "whole", *COLUMNS.values()], rows)

    def budgets(self) -> str:
        """The same number of experts in each layer against a global budget, after the refit."""
        rows = []
        for keep, criterion in itertools.product(RATIOS, CRITERIA[:3]):
            for repair, said in (("drop", "dropped"), ("refit", "+ refit")):
                settings: dict[str, Any] = {"criterion": criterion, "keep": keep, "repair": repair}
                rows.append([f"{keep:.0%}", criterion, said, *self._row("repairs", **settings)])
        return f"{markdown(['kept', 'criterion', '', *self._headers()], rows)}\n\n{FLOOR_NOTE}"

    def sizes(self) -> str:
        """Perplexity by calibration tokens, one plan of REAP for each fraction kept."""
        rows = []
        for keep in (0.5, 0.75):
            plan: dict[str, Any] = {"criterion": "reap", "keep": keep, "repair": "drop"}
            rows.append([f"{keep:.0%}", "0 (dropped)", *self._row("repairs", **plan)])
            rows += [
                [f"{keep:.0%}", f"{tokens:,}", *self._row("sizes", keep=keep, tokens=tokens)]
                for at, tokens in SIZED
                if at == keep
            ]
        return markdown(["kept", "calibration tokens", *self._headers()], rows)

    def solvers(self) -> str:
        """Perplexity and seconds by solver, mode, target and weights of tokens."""
        rows = []
        for options in VARIANTS:
            cells = zip(
                self._row("solvers", **options),
                self._row("solvers", key="seconds", **options),
                strict=True,
            )
            names = [
                options["mode"],
                options["solver"],
                options.get("target", "stream" if options["mode"] == "sequential" else "block"),
                options.get("token_weights", "relative"),
            ]
            rows.append([*names, *(f"{ppl}; {seconds} s" for ppl, seconds in cells)])
        return markdown(["mode", "solver", "target", "token weights", *self._headers()], rows)

    def thinned(self) -> str:
        """Merged pairs, 2:4 masks, fewer active experts."""
        rows = [["nothing", "", *self._row("whole")]]
        rows += [
            [what, repair, *self._row("thinned", what=what, repair=repair)]
            for what in THINNED
            for repair in ("before", "refit")
        ]
        return markdown(["what was done", "", *self._headers()], rows)

    def wider(self) -> str:
        """Whether the controls were given too little: REAP's plan for half of the experts."""
        half: dict[str, Any] = {"criterion": "reap", "keep": 0.5}
        rows = [["+ refit", "", *self._row("repairs", **half, repair="refit")]]
        for repair, (narrow, wide) in WIDER_SAID.items():
            rows.append([COLUMNS[repair], narrow, *self._row("repairs", **half, repair=repair)])
            rows.append([COLUMNS[repair], wide, *self._row("wider", repair=repair)])
        return markdown(["50% kept", "training", *self._headers()], rows)

    def gap(self, model: str, criterion: str, keep: float) -> float | None:
        """Return percent of the gap between dropped and whole that the refit closes."""
        whole = self._ppl("whole")(model)
        dropped, refit = (
            self._ppl("repairs", criterion=criterion, keep=keep, repair=r)(model)
            for r in ("drop", "refit")
        )
        if whole is None or dropped is None or refit is None:
            return None
        return 100 * (dropped - refit) / (dropped - whole)

    def _ppl(self, part: str, key: str = "perplexity", **settings: Any) -> Number:
        def number(model: str) -> float | None:
            cell: Result | None = self._store.get(model, part, **settings)
            return None if cell is None else cell[key]

        return number

    def _row(self, part: str, key: str = "perplexity", **settings: Any) -> list[str]:
        number = self._ppl(part, key, **settings)
        return [self._seeds(family, number) for family in self._families]

    def _seeds(self, family: str, number: Number, form: str = "{:.1f}") -> str:
        models = self._families[family]
        values = [value for model in models if (value := number(model)) is not None]
        return spread(values, len(models), form)

    def _headers(self) -> list[str]:
        return [f"{name} ({count_seeds(len(models))})" for name, models in self._families.items()]


def spread(values: Sequence[float], expected: int, form: str = "{:.1f}") -> str:
    """Return mean and range, and the number of values if some are missing."""
    if not values:
        return "-"
    said = form.format(statistics.mean(values))
    if len(values) > 1:
        ends = [form.format(end).removesuffix(" %") for end in (min(values), max(values))]
        said += f" [{ends[0]}, {ends[1]}]"
    return said if len(values) == expected else f"{said} ({count_seeds(len(values))})"


def count_seeds(num: int) -> str:
    return f"{num} seed" if num == 1 else f"{num} seeds"
