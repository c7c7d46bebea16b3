"""All cells of a comparison, known from options and config alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from lit_moe.adapters import find_sites
from lit_moe.adapters.discovery import build_on_meta
from lit_moe.adapters.site import MoESite
from lit_moe.assets import resolve_model
from lit_moe.checkpoints import model_class, read_config
from lit_moe.compare.ablation import check_ablation
from lit_moe.compare.options import CompareOptions, Line, default_tokenizer, lines_of, seeds_of
from lit_moe.compare.stations import Way, check_ratios, find_way
from lit_moe.compare.store import digest
from lit_moe.compare.text import ComparedText


class Grid:
    """Lines x models x seeds x ratios.

    Args:
        options: of the comparison.
        text: of the comparison; None reads it where the keys depend on it.

    Raises:
        LitMoEError: if the model has no experts, its routers cannot meet the ratios, or the rounds
            miss one; no weights are loaded to find out.
    """

    def __init__(self, options: CompareOptions, text: ComparedText | None = None) -> None:
        self.options, self._text = options, text
        check_ratios(self.sites, options.keep_ratios, options.scopes)
        in_rounds = set(options.procedures) - {"one_shot"}
        self.ways: dict[str, Way] = {
            scope: find_way(self.sites, options.keep_ratios, scope, options.rounds)
            for scope in (options.scopes if in_rounds else ())
        }
        if options.ablation:
            check_ablation(self.sites)

    @cached_property
    def sites(self) -> tuple[MoESite, ...]:
        """The MoE layers of the (first) model."""
        config = read_config(resolve_model(self.options.models[0]))
        return find_sites(build_on_meta(model_class(config), config))

    @cached_property
    def lines(self) -> list[Line]:
        """All curves, the control first."""
        return lines_of(self.options)

    @property
    def ratios(self) -> list[float]:
        """Fractions of experts that stay, falling."""
        return sorted(self.options.keep_ratios, reverse=True)

    def seeds(self, line: Line) -> list[int]:
        """Return the seeds of a curve."""
        return seeds_of(self.options, line)

    @property
    def all_seeds(self) -> list[int]:
        """Seeds of any curve; the control may have some that the others have not."""
        return list(dict.fromkeys(seed for line in self.lines for seed in self.seeds(line)))

    def key(self, line: Line, model: str, seed: int, ratio: float) -> dict[str, Any]:
        """Return what names a cell among those with the same settings.

        Args:
            line: the curve.
            model: as it was asked for.
            seed: of calibration, training and chance.
            ratio: of experts that stay.
        """
        options = self.options
        key = {"model": model, "seed": seed, "keep_ratio": ratio, **dataclasses.asdict(line)}
        if line.procedure != "one_shot":
            key["per_round"] = self.ways[line.scope].per_round
        if line.procedure == "lottery":
            training = [dataclasses.asdict(o) for o in (options.fine_tuning, options.optimizer)]
            key["training"] = digest([*training, self._training_text, options.text.batch_size])
        return key

    @cached_property
    def _training_text(self) -> list[str] | None:
        """Digest of the training tokens; None for the embedded text, which comes with the code."""
        if self.options.text.train_files is None:
            return None
        text = self._text or ComparedText(self.options.text, default_tokenizer(self.options))
        return list(text.fingerprint(("train",)).values())

    def keys(self, model: str) -> Iterator[dict[str, Any]]:
        """Yield the keys of all cells of a model."""
        for line in self.lines:
            for seed in self.seeds(line):
                for ratio in self.ratios:
                    yield self.key(line, model, seed, ratio)
