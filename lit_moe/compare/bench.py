"""One model and the cells that are measured on it.

The model is loaded once. One-shot and iterative cells mask its routers and take the mask off again,
which computes what cutting the experts out would; lotteries train a copy that is loaded for them.
So no cell knows of another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lit_moe.adapters import find_sites
from lit_moe.compare.ablation import AblationMap, ablation_map
from lit_moe.compare.calibration import Calibration, Scores
from lit_moe.compare.cells import Judge, is_done, load_model, plan_values
from lit_moe.compare.grid import Grid
from lit_moe.compare.lottery import Station, play
from lit_moe.compare.options import Line
from lit_moe.compare.stations import (
    budget_of,
    iterate,
    one_shot_plan,
)
from lit_moe.compare.store import CellStore
from lit_moe.compare.text import ComparedText
from lit_moe.criteria import Criterion, get_criterion
from lit_moe.masking import masked
from lit_moe.plan import KeepPlan
from lit_moe.selection import find_super_experts, layer_counts
from lit_moe.stats import observe

Failed = (ValueError, RuntimeError)
"""What ends a cell and not the comparison; out of memory is a RuntimeError too."""


class ModelBench:
    """Measures what is missing in the store.

    Args:
        name: folder, hub id or ``embedded``.
        grid: of the comparison.
        text: without a seed.
        judge: of every cell.
        store: of finished cells.
        on_cell: called after each cell with the words for the progress bar.

    Raises:
        LitMoEError: if the tokenizer does not suit the model.
    """

    def __init__(
        self,
        name: str,
        grid: Grid,
        *,
        text: ComparedText,
        judge: Judge,
        store: CellStore,
        on_cell: Callable[[str], None],
    ) -> None:
        self.name, self.grid, self.options, self.store = name, grid, grid.options, store
        self.text, self.judge, self.on_cell = text, judge, on_cell
        self.model = load_model(name, self.options.dtype, text)
        self.sites = find_sites(self.model)
        self._calibrations: dict[int, Calibration] = {}
        self._texts: dict[int, ComparedText] = {}

    def measure_whole(self) -> None:
        """Judge the model with all its experts."""
        if self.store.get("whole", model=self.name) is None:
            self.store.put("whole", self.judge(self.model), model=self.name)

    def measure(self, line: Line, seed: int) -> None:
        """Measure the missing ratios of a curve for one seed, and keep what fails as a sentence."""
        keys = {ratio: self.grid.key(line, self.name, seed, ratio) for ratio in self.grid.ratios}
        missing = {ratio: key for ratio, key in keys.items() if not is_done(self.store, key)}
        if not missing:
            return
        ways_down = {
            "one_shot": self._one_shot,
            "iterative": self._iterative,
            "lottery": self._lottery,
        }
        try:
            ways_down[line.procedure](line, seed, missing)
        except Failed as error:
            sentence = " ".join(str(error).split()) or type(error).__name__
            for key in missing.values():
                if not is_done(self.store, key):
                    self._keep(key, {"error": sentence})

    def measure_ablation(self, budget: int | str = "1GiB") -> AblationMap:
        """Return the loss without each single expert; goes on where an earlier run ended."""
        known = {
            (key["layer"], key["expert"]): value["loss"]
            for key, value in self.store.all("ablation")
            if key["model"] == self.name
        }

        def keep(layer: str, expert: int, loss: float) -> None:
            value = {"loss": loss}
            self.store.put("ablation", value, model=self.name, layer=layer, expert=expert)
            self.on_cell(f"{layer}: without expert {expert}")

        return ablation_map(
            self.model, self.judge.batches, budget=budget, known=known, on_loss=keep
        )

    def _one_shot(self, line: Line, seed: int, missing: Mapping[float, dict[str, Any]]) -> None:
        for ratio, key in missing.items():
            plan = one_shot_plan(self._scores(line, seed, ratio), self.sites, ratio, line.scope)
            self._keep(key, self._judged(plan))

    def _iterative(self, line: Line, seed: int, missing: Mapping[float, dict[str, Any]]) -> None:
        way = self.grid.ways[line.scope].to(missing)
        stations = iterate(
            self._calibration(seed),
            self._criterion(line),
            way,
            first=self._scores(line, seed, None),
            scope=line.scope,
            unrouted=self.options.unrouted,
        )
        for ratio, plan in stations:
            self._keep(missing[ratio], self._judged(plan))

    def _lottery(self, line: Line, seed: int, missing: Mapping[float, dict[str, Any]]) -> None:
        start = time.perf_counter()

        def keep(station: Station) -> None:
            found = {
                **self.judge(station.model),
                **plan_values(station.plan),
                "trained_tokens": station.tokens,
                "load": self._loads(station, seed),
                "seconds": time.perf_counter() - start,
            }
            self._keep(missing[station.ratio], found)

        play(
            self.options,
            self.name,
            line,
            text=self._text(seed),
            way=self.grid.ways[line.scope].to(missing),
            on_station=keep,
        )

    def _loads(self, station: Station, seed: int) -> dict[str, dict[str, list[float]]]:
        """Return layer -> tokens of each expert that is left, without and with fine-tuning."""
        batches = self._text(seed).calibration()
        with masked(self.model, station.plan):
            before = observe(self.model, batches)
        after = observe(station.model, batches)
        return {
            name: {
                "before": before.layers[name].count[list(ids)].tolist(),
                "after": after.layers[name].count[list(station.alive[name])].tolist(),
            }
            for name, ids in station.plan.kept.items()
        }

    def _judged(self, plan: KeepPlan) -> dict[str, Any]:
        start = time.perf_counter()
        with masked(self.model, plan):
            found = self.judge(self.model)
        return {**found, **plan_values(plan), "seconds": time.perf_counter() - start}

    def _keep(self, key: dict[str, Any], value: dict[str, Any]) -> None:
        self.store.put("cell", value, **key)
        self.on_cell(f"{key['procedure']} {key['criterion']} {key['keep_ratio']:g}")

    def _scores(self, line: Line, seed: int, ratio: float | None) -> Scores:
        """Return the scores of the whole model, from the store if they are there.

        Args:
            line: names the criterion.
            seed: of the calibration.
            ratio: that scores are wanted for; None for the first round of several.
        """
        criterion = self._criterion(line)
        rates_subsets = "forward" in criterion.needs and line.scope == "layer"
        chosen = max(self.grid.ratios) if ratio is None else ratio
        key: dict[str, Any] = {**line.scored, "model": self.name, "seed": seed}
        key["keep_ratio"] = chosen if rates_subsets else None
        found = self.store.get("scores", **key)
        if found is not None:
            return {name: torch.tensor(v, dtype=torch.float64) for name, v in found.items()}
        keep = layer_counts(budget_of(chosen, "layer"), self.sites) if rates_subsets else None
        calibration = self._calibration(seed)
        scores = calibration.scores(criterion, unrouted=self.options.unrouted, keep=keep)
        self.store.put("scores", {k: v.tolist() for k, v in scores.items()}, **key)
        if "routing" in criterion.needs:
            self._note_loads(seed, calibration)
        return scores

    def _note_loads(self, seed: int, calibration: Calibration) -> None:
        if self.store.get("load", model=self.name, seed=seed) is not None:
            return
        seen = calibration.observation
        value = {
            "tokens": seen.tokens,
            "count": {name: stats.count.tolist() for name, stats in seen.layers.items()},
            "max_abs": {name: stats.max_abs.tolist() for name, stats in seen.layers.items()},
            "super_experts": {k: list(ids) for k, ids in find_super_experts(seen).items()},
            "unrouted": {k: list(ids) for k, ids in seen.unrouted.items()},
        }
        self.store.put("load", value, model=self.name, seed=seed)

    def _calibration(self, seed: int) -> Calibration:
        if seed not in self._calibrations:
            needs = {need for line in self.grid.lines for need in self._criterion(line).needs}
            self._calibrations[seed] = Calibration(
                self.model, self.sites, self._text(seed).calibration(), needs=needs, seed=seed
            )
        return self._calibrations[seed]

    def _text(self, seed: int) -> ComparedText:
        if seed not in self._texts:
            self._texts[seed] = self.text.drawn(seed)
        return self._texts[seed]

    def _criterion(self, line: Line) -> Criterion:
        fields = {"direction": "opposite"} if line.direction == "opposite" else {}
        return get_criterion(line.criterion, **fields)
