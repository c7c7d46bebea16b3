"""Scores candidates on the samples of a search: live model, kept hidden states, one or more ranks.

Splits: ``search`` is what the search sees, ``dev`` chooses among its best, ``test`` is for the
report.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moe.errors import LitMoEError
from lit_moe.evaluate.generation import GenerationOptions
from lit_moe.evaluate.prompts import Prompting, TaskItem
from lit_moe.evaluate.task_quality import checked_prompts
from lit_moe.inference import evaluating
from lit_moe.prefix import PrefixCache
from lit_moe.search.fitness import Compressed, Fitness, RowFitness, RowKind, WrittenAnswers
from lit_moe.search.genome import Genome
from lit_moe.search.live import LiveModel
from lit_moe.search.population import Score
from lit_moe.search.report import SplitPoints
from lit_moe.search.rows import RowBatch, choice_batches, text_batches
from lit_moe.search.run import Request

SPLITS = ("search", "dev", "test")
_REMEMBERED = 256
"""Candidates whose points are remembered, for racing."""


@dataclass
class SplitData:
    """The samples of one split.

    Attributes:
        rows: ``input_ids``, ``attention_mask``, maybe ``labels``, each ``(S,)``; one per sample.
        items: the questions behind them, in the same order; empty for plain text.
        prompting: their wording; None for plain text.
        generation: how answers are written.
    """

    rows: Sequence[Mapping[str, Tensor]]
    items: Sequence[TaskItem] = ()
    prompting: Prompting | None = None
    generation: GenerationOptions = field(default_factory=GenerationOptions)

    def batches(
        self, kind: RowKind, tokenizer: PreTrainedTokenizerBase | None, batch_size: int
    ) -> list[RowBatch]:
        """Return what is run.

        Raises:
            LitMoEError: for choices where there are none.
        """
        if kind == "answers":
            return text_batches(self.rows, batch_size)
        if not self.items or not all(item.choices for item in self.items):
            raise LitMoEError(
                "accuracy of choices needs questions that all have choices; take AnswerTokens or "
                "WrittenAnswers, or a task with choices"
            )
        assert self.prompting is not None
        assert tokenizer is not None
        return choice_batches(self.items, self.prompting, tokenizer, batch_size)

    def identities(self) -> list[str]:
        """Return what two samples share if they are the same."""
        if self.prompting is not None:
            return [self.prompting.template.identity(item) for item in self.items]
        return [row["input_ids"].numpy().tobytes().hex() for row in self.rows]


def check_splits(splits: Mapping[str, SplitData]) -> None:
    """Refuse splits that are empty, or that share a sample.

    Raises:
        LitMoEError: naming the split, or both.
    """
    seen: dict[str, str] = {}
    for name, data in splits.items():
        if not data.rows:
            raise LitMoEError(
                f"the {name} split of the search has no sample: give more text or questions, or "
                "larger fractions"
            )
        for identity in data.identities():
            other = seen.setdefault(identity, name)
            if other != name:
                raise LitMoEError(
                    f"the {other} and the {name} split of the search share a sample; the choice on "
                    f"{name} would only confirm the search: use different files"
                )


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
        self._live, self._data, self._measures = live, data, measures
        self._tokenizer = tokenizer
        self._check_written()
        kind: RowKind = measures.fitness.rows or "answers"
        self._batches = data.batches(kind, tokenizer, measures.batch_size)
        inputs = [batch.inputs for batch in self._batches]
        budget = measures.prefix_bytes
        self._cache = PrefixCache(live.model, inputs, budget=budget) if budget else None
        self._remember = [group.layers[0] for group in live.groups]
        self._whole: dict[tuple[str, int], Compressed] = {}
        self._begun: OrderedDict[tuple[str, int | None], list[dict[str, Tensor]]] = OrderedDict()

    @property
    def num_samples(self) -> int:
        """Samples of the split."""
        return len(self._data.rows)

    @property
    def layers_run(self) -> int:
        """Layers computed so far, over all batches; 0 without kept hidden states."""
        return 0 if self._cache is None else self._cache.layers_run

    def learn_whole(self) -> None:
        """Keep what the whole model says, for measures that compare with it."""
        for measure in self._row_measures:
            if measure.needs_whole:
                for index, batch in enumerate(self._batches):
                    self._whole[measure.name, index] = measure.compress(self._logits(index), batch)

    def score(self, genome: Genome | None, samples: int | None = None) -> Score:
        """Return the mean points of a candidate over the first samples; all where None.

        Args:
            genome: the candidate; None for the model as it is.
            samples: how many.
        """
        num = self.num_samples if samples is None else min(samples, self.num_samples)
        begun = self._batches_of(genome)
        with nullcontext() if genome is None else self._live.applied(genome):
            return self._score(self._live.tags(genome), num, begun)

    def points(self, genome: Genome | None = None) -> SplitPoints:
        """Return mean and standard error over all samples; of the model as it is for None."""
        with nullcontext() if genome is None else self._live.applied(genome):
            found = self._measured(self._live.tags(genome), self.num_samples, [])
        fitness = found[self._measures.fitness.name]
        error = float(fitness.std(unbiased=False)) / len(fitness) ** 0.5
        finer = float(found[self._measures.finer.name].mean())
        return SplitPoints(float(fitness.mean()), error, finer)

    def _batches_of(self, genome: Genome | None) -> list[dict[str, Tensor]]:
        """Return what is known of a candidate, batch by batch: heats go on where one ended."""
        if genome is None:
            return []
        begun = self._begun.setdefault((genome.key, self._live.top_k), [])
        while len(self._begun) > _REMEMBERED:
            self._begun.popitem(last=False)
        return begun

    def _score(self, tags: Mapping[str, Any], num: int, begun: list[dict[str, Tensor]]) -> Score:
        found = self._measured(tags, num, begun)
        values = {name: float(points.mean()) for name, points in found.items()}
        return Score(values[self._measures.fitness.name], values[self._measures.finer.name])

    def _measured(
        self, tags: Mapping[str, Any], num: int, begun: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Return measure -> points of the first samples."""
        found = {name: points[:num] for name, points in self._on_rows(tags, num, begun).items()}
        fitness = self._measures.fitness
        if isinstance(fitness, WrittenAnswers):
            found[fitness.name] = self._written(fitness, num)
        return found

    def _on_rows(
        self, tags: Mapping[str, Any], num: int, begun: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        done = 0
        for index, batch in enumerate(self._batches):
            if done >= num:
                break
            if index == len(begun):
                logits = self._logits(index, tags)
                begun.append({m.name: self._points(m, logits, index) for m in self._row_measures})
            done += batch.num_samples
        names = [measure.name for measure in self._row_measures]
        return {name: torch.cat([points[name] for points in begun]) for name in names}

    def _points(self, measure: RowFitness, logits: Tensor, index: int) -> Tensor:
        return measure.points(logits, self._batches[index], self._whole.get((measure.name, index)))

    def _logits(self, index: int, tags: Mapping[str, Any] | None = None) -> Tensor:
        if self._cache is not None:
            return self._cache.logits(index, tags, remember=self._remember)
        model: PreTrainedModel = self._live.model
        with evaluating(model):
            inputs = {k: v.to(model.device) for k, v in self._batches[index].inputs.items()}
            logits: Tensor = model(**inputs, use_cache=False).logits
            return logits

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

    def _written(self, fitness: WrittenAnswers, num: int) -> Tensor:
        prompting = self._data.prompting
        assert prompting is not None
        assert self._tokenizer is not None
        asked = [(prompting.prompt(item), item) for item in self._data.items[:num]]
        return fitness.written(
            self._live.model, self._tokenizer, asked, self._data.generation, chat=prompting.chat
        )

    @property
    def _row_measures(self) -> list[RowFitness]:
        """The measures that rows are run for, each once."""
        both = (self._measures.fitness, self._measures.finer)
        found = {measure.name: measure for measure in both if isinstance(measure, RowFitness)}
        return list(found.values())


class ModelEvaluator:
    """Scores requests, each rank its own where there are several; see ``Evaluator``.

    Args:
        scorers: split -> its scorer.
        top_k: experts per token that all candidates have.
        live: the model.
    """

    def __init__(
        self, scorers: Mapping[str, SplitScorer], live: LiveModel, *, top_k: int | None = None
    ) -> None:
        self._scorers, self._live, self._top_k = scorers, live, top_k
        is_shared = dist.is_available() and dist.is_initialized()
        self.width = dist.get_world_size() if is_shared else 1
        self._rank = dist.get_rank() if is_shared else 0

    def num_samples(self, split: str) -> int:
        """Return the size of a split."""
        return self._scorers[split].num_samples

    def __call__(self, requests: Sequence[Request]) -> list[Score]:
        """Return the scores of at most ``width`` requests. Collective with several ranks."""
        mine = requests[self._rank] if self._rank < len(requests) else None
        score = None if mine is None else self._one(mine)
        if self.width == 1:
            assert score is not None
            return [score]
        everywhere: list[Any] = [None] * self.width
        dist.all_gather_object(everywhere, score)
        return everywhere[: len(requests)]

    def _one(self, request: Request) -> Score:
        with self._live.active(self._top_k):
            return self._scorers[request.split].score(request.genome, request.samples)
