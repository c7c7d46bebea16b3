"""Scores candidates on the samples of one split: live model, kept hidden states."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moe.errors import LitMoEError
from lit_moe.evaluate.task_quality import checked_prompts
from lit_moe.inference import evaluating
from lit_moe.prefix import PrefixCache
from lit_moe.prefix.cache import ends_of
from lit_moe.search.fitness import Compressed, Fitness, RowFitness, RowKind, WrittenAnswers
from lit_moe.search.genome import Genome
from lit_moe.search.live import LiveModel
from lit_moe.search.population import Score
from lit_moe.search.report import SplitPoints
from lit_moe.search.request import Floor
from lit_moe.search.rows import RowBatch
from lit_moe.search.splits import SplitData

_REMEMBERED = 256
"""Candidates whose points are remembered, for racing."""
_CERTAIN = 1e-6
"""Points that a bound must be below a floor, so that rounding never decides."""

Points = dict[str, Tensor]
"""Measure -> points of some samples, in order."""


@dataclass(frozen=True)
class Measures:
    """What is measured, and how much memory it may take.

    Attributes:
        fitness: what is searched for.
        finer: for candidates that are equally fit; runs on the same rows where it can.
        batch_size: rows per forward.
        prefix_bytes: of hidden states kept per split; 0 runs every candidate from the first layer.
    """

    fitness: Fitness
    finer: RowFitness
    batch_size: int = 64
    prefix_bytes: int = 1 << 29

    @property
    def most(self) -> dict[str, float]:
        """Measure -> points that no sample can be above."""
        return {measure.name: measure.most for measure in (self.finer, self.fitness)}


@dataclass(frozen=True, eq=False)
class _Part:
    """Samples that are measured together.

    Attributes:
        num: samples.
        names: of the measures.
        run: returns the points of the present candidate, given what it changes.
    """

    num: int
    names: tuple[str, ...]
    run: Callable[[Mapping[str, Any]], Points]


class SplitScorer:
    """Scores candidates on one split.

    Args:
        live: the model.
        data: the samples.
        measures: what is measured.
        tokenizer: of the model; needed for choices and for written answers.
    """

    def __init__(
        self,
        live: LiveModel,
        data: SplitData,
        measures: Measures,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self._live, self._measures, self._tokenizer = live, measures, tokenizer
        self._remember = [group.layers[0] for group in live.groups]
        self._arrange(data)

    @property
    def num_samples(self) -> int:
        """Samples of the split."""
        return len(self._data.rows)

    @property
    def batches(self) -> tuple[RowBatch, ...]:
        """What is run, in order."""
        return tuple(self._batches)

    @property
    def layers_run(self) -> int:
        """Layers computed so far, over all batches; 0 without kept hidden states."""
        return 0 if self._cache is None else self._cache.layers_run

    def ask_hardest_first(self, probes: Sequence[Genome] = ()) -> None:
        """Put those samples first that models do worst on; before anything is scored.

        Evaluations that a floor may stop then stop sooner. All measures stay what they were.

        Args:
            probes: candidates like those to come, whose mean decides; none for the whole model.
        """
        finer = self._measures.finer
        if finer.needs_whole:
            return
        points = sum((self._finer_points(probe) for probe in probes or (None,)), torch.zeros(()))
        self._arrange(self._data.reordered(points.argsort(stable=True).tolist()))

    def _finer_points(self, genome: Genome | None) -> Tensor:
        """Return the finer measure's points of all samples, where no whole model is needed."""
        finer, tags = self._measures.finer, self._live.tags(genome)
        with nullcontext() if genome is None else self._live.applied(genome):
            parts = [finer.points(self._logits(i, tags), e, None) for i, e in enumerate(self._ends)]
        return torch.cat(parts)

    def learn_whole(self) -> None:
        """Keep what the whole model says, for measures that compare with it."""
        for measure in self._row_measures:
            if measure.needs_whole:
                for index, batch in enumerate(self._ends):
                    self._whole[measure.name, index] = measure.compress(self._logits(index), batch)

    def score(
        self, genome: Genome | None, samples: int | None = None, *, floor: Floor | None = None
    ) -> Score:
        """Return the mean points of a candidate over the first samples; all where None.

        Args:
            genome: the candidate; None for the model as it is.
            samples: how many.
            floor: stop as soon as the candidate is certain to end below it; the score is then the
                most that it could have come to.
        """
        num = self.num_samples if samples is None else min(samples, self.num_samples)
        begun = self._parts_of(genome)
        with nullcontext() if genome is None else self._live.applied(genome):
            found = self._measured(self._live.tags(genome), num, begun, floor)
        most = self._most(found, num)
        fitness, finer = (most[m.name] for m in (self._measures.fitness, self._measures.finer))
        return Score(fitness, finer, is_bound=any(len(points) < num for points in found.values()))

    def points(self, genome: Genome | None = None) -> SplitPoints:
        """Return mean and standard error over all samples; of the model as it is for None."""
        with nullcontext() if genome is None else self._live.applied(genome):
            found = self._measured(self._live.tags(genome), self.num_samples, {}, None)
        fitness = found[self._measures.fitness.name]
        error = float(fitness.std(unbiased=False)) / len(fitness) ** 0.5
        finer = float(found[self._measures.finer.name].mean())
        return SplitPoints(float(fitness.mean()), error, finer)

    def _arrange(self, data: SplitData) -> None:
        """Make batches of samples, and forget what was known of others."""
        self._data = data
        self._check_written()
        kind: RowKind = self._measures.fitness.rows or "answers"
        self._batches = data.batches(kind, self._tokenizer, self._measures.batch_size)
        self._ends = [batch.end for batch in self._batches]
        inputs, budget = [batch.inputs for batch in self._batches], self._measures.prefix_bytes
        self._cache = PrefixCache(self._live.model, inputs, budget=budget) if budget else None
        self._whole: dict[tuple[str, int], Compressed] = {}
        self._begun: OrderedDict[tuple[str, int | None], dict[_Part, Points]] = OrderedDict()
        rows = [self._row_part(index) for index in range(len(self._batches))]
        self._parts = [*self._written_parts(), *rows]

    def _parts_of(self, genome: Genome | None) -> dict[_Part, Points]:
        """Return what is known of a candidate, part by part: heats go on where one ended."""
        if genome is None:
            return {}
        begun = self._begun.setdefault((genome.key, self._live.top_k), {})
        while len(self._begun) > _REMEMBERED:
            self._begun.popitem(last=False)
        return begun

    def _measured(
        self,
        tags: Mapping[str, Any],
        num: int,
        begun: dict[_Part, Points],
        floor: Floor | None,
    ) -> Points:
        """Return measure -> points of the first samples; of fewer if a floor stopped it."""
        found: Points = {name: torch.zeros(0).double() for name in self._measures.most}
        for part in self._parts:
            if len(found[part.names[0]]) >= num:
                continue
            if floor is not None and self._is_below(floor, found, num):
                break
            if part not in begun:
                begun[part] = part.run(tags)
            for name in part.names:
                found[name] = torch.cat([found[name], begun[part][name]])[:num]
        return found

    def _is_below(self, floor: Floor, found: Points, num: int) -> bool:
        measure = self._measures.finer if floor.by_finer else self._measures.fitness
        return self._most(found, num)[measure.name] < floor.points - _CERTAIN

    def _most(self, found: Points, num: int) -> dict[str, float]:
        """Return measure -> the most that its mean can be; what it is if no sample is left."""
        means = {}
        for name, most in self._measures.most.items():
            left = num - len(found[name])
            total = float(found[name].sum()) + (left * most if left else 0.0)
            means[name] = float(found[name].mean()) if not left else total / num
        return means

    def _row_part(self, index: int) -> _Part:
        def run(tags: Mapping[str, Any]) -> Points:
            logits, batch = self._logits(index, tags), self._ends[index]
            return {
                measure.name: measure.points(logits, batch, self._whole.get((measure.name, index)))
                for measure in self._row_measures
            }

        names = tuple(measure.name for measure in self._row_measures)
        return _Part(self._batches[index].num_samples, names, run)

    def _logits(self, index: int, tags: Mapping[str, Any] | None = None) -> Tensor:
        """Return the logits of the places that predict something, and those between them."""
        last = self._batches[index].last
        if self._cache is not None:
            return self._cache.logits(index, tags, remember=self._remember, last=last)
        model: PreTrainedModel = self._live.model
        with evaluating(model):
            inputs = {k: v.to(model.device) for k, v in self._batches[index].inputs.items()}
            logits: Tensor = model(**inputs, use_cache=False, **ends_of(model, last)).logits
            return logits[:, -last:]

    def _check_written(self) -> None:
        """Refuse prompts that cannot be answered, before anything runs."""
        data, fitness = self._data, self._measures.fitness
        if not isinstance(fitness, WrittenAnswers):
            return
        if data.prompting is None or self._tokenizer is None:
            raise LitMoEError(
                f"{fitness.name} needs questions with answers; plain text has none: take "
                "NegativeLoss or Agreement, or a task"
            )
        checked_prompts(
            self._live.model,
            self._tokenizer,
            data.items,
            prompting=data.prompting,
            generation=data.generation,
        )

    def _written_parts(self) -> list[_Part]:
        """Return the questions to be answered in writing, by batches; none for other measures."""
        fitness, prompting = self._measures.fitness, self._data.prompting
        if not isinstance(fitness, WrittenAnswers):
            return []
        assert prompting is not None
        asked = [(prompting.prompt(item), item) for item in self._data.items]
        size = self._data.generation.batch_size

        def part(some: list[Any]) -> _Part:
            def run(_: Mapping[str, Any]) -> Points:
                assert self._tokenizer is not None
                model, options = self._live.model, self._data.generation
                points = fitness.written(model, self._tokenizer, some, options, chat=prompting.chat)
                return {fitness.name: points}

            return _Part(len(some), (fitness.name,), run)

        return [part(asked[begin : begin + size]) for begin in range(0, len(asked), size)]

    @property
    def _row_measures(self) -> list[RowFitness]:
        """The measures that rows are run for, each once."""
        both = (self._measures.fitness, self._measures.finer)
        found = {measure.name: measure for measure in both if isinstance(measure, RowFitness)}
        return list(found.values())
