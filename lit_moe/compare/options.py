"""What is compared with what: each field is a key of the YAML file and an option of the command."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lit_moe.assets import EMBEDDED, resolve_model
from lit_moe.callbacks.rounds import FineTuning
from lit_moe.checkpoints import read_config
from lit_moe.criteria import UnroutedRule, get_criterion
from lit_moe.criteria.direction import Direction
from lit_moe.errors import LitMoEError
from lit_moe.models import DType
from lit_moe.optimization import OptimizerConfig

Procedure = Literal["one_shot", "iterative", "lottery"]
Scope = Literal["layer", "global"]
CONTROL = "random"
_LISTS = ("models", "criteria", "directions", "keep_ratios", "procedures", "scopes")


@dataclass
class TextOptions:
    """What experts are observed on, trained on, and judged by.

    Attributes:
        calibration_files: text that experts are observed on; each seed draws its own blocks of it.
            This and the next two take what ``TextDataModule`` does; None is the embedded text.
        train_files: for the fine-tuning of lotteries.
        evaluation_files: for the perplexities; None is the embedded validation text.
        tokenizer: folder or hub id; None takes that of the first model.
        sequence_length: tokens per block.
        batch_size: blocks per batch.
        calibration_tokens: observed per pass, in turn from each domain.
        evaluation_tokens: evaluated per cell; None for all.
        text_column: of structured files.
    """

    calibration_files: list[str] | None = None
    train_files: list[str] | None = None
    evaluation_files: list[str] | None = None
    tokenizer: str | None = None
    sequence_length: int = 128
    batch_size: int = 16
    calibration_tokens: int = 16384
    evaluation_tokens: int | None = 16384
    text_column: str = "text"

    def __post_init__(self) -> None:
        for name, least in (
            ("sequence_length", 2),
            ("batch_size", 1),
            ("calibration_tokens", self.sequence_length),
            ("evaluation_tokens", self.sequence_length),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise LitMoEError(f"text.{name}={value} is too small; the least usable is {least}")


@dataclass
class TaskOptions:
    """Questions that are asked beside the perplexity, see ``TaskDataModule``.

    Attributes:
        task: ``capitals`` or ``domains``; of your own: any name, with ``train_files``.
        train_files: JSONL with ``question``, ``answer`` and maybe ``choices``, which examples are
            drawn from.
        test_files: questions that are asked; None cuts a part off the others.
        shots: numbers of solved examples before each question.
        sequence_length: most tokens of examples, question and answer.
        batch_size: questions per batch.
        chat: whether questions are asked in the chat format of the tokenizer, see
            ``TaskDataModule``.
    """

    task: Literal["capitals", "domains"] = "capitals"
    train_files: list[str] | None = None
    test_files: list[str] | None = None
    shots: list[int] = field(default_factory=lambda: [0])
    sequence_length: int = 256
    batch_size: int = 8
    chat: bool | Literal["auto"] = False


@dataclass
class CompareOptions:
    """Criteria x ratios x procedures x seeds on one model.

    Attributes:
        models: folders, hub ids or ``embedded``; several are taken for training runs of one model
            and count like seeds.
        criteria: short names or class paths; the control ``random`` comes by itself.
        directions: ``paper``, ``opposite`` or both, for criteria that have a direction.
        keep_ratios: fractions of experts that stay.
        procedures: ``one_shot``, ``iterative`` (scored anew after each round), ``lottery`` (and
            trained after each round).
        scopes: ``layer`` (each keeps equally many), ``global`` (one ranking over all), or both.
        seeds: of the calibration text, of training, and of random choices.
        random_draws: at least so many seeds for ``random`` in one shot; 0 leaves the control out.
        rounds: down to the smallest ratio; every ratio must be met on the way. None: one expert
            per layer and round.
        fine_tuning: of lotteries.
        optimizer: of lotteries.
        text: what experts are observed on, trained on, and judged by.
        tasks: questions beside the perplexity; None for none.
        unrouted: what becomes of experts that saw no calibration token.
        ablation: also measure the loss without each single expert.
        dtype: of the weights.
        output: folder for the results, the tables and figures.
        when_changed: if the folder has results of other settings, ``refuse``, or keep them
            ``beside`` under another name.
        figures: draw PNG figures.
    """

    models: list[str] = field(default_factory=lambda: [EMBEDDED])
    criteria: list[str] = field(default_factory=lambda: ["reap", "ean", "ege", "ets", "rwn"])
    directions: list[Direction] = field(default_factory=lambda: ["paper"])
    keep_ratios: list[float] = field(default_factory=lambda: [0.75, 0.5, 0.25])
    procedures: list[Procedure] = field(default_factory=lambda: ["one_shot"])
    scopes: list[Scope] = field(default_factory=lambda: ["layer"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    random_draws: int = 5
    rounds: int | None = None
    fine_tuning: FineTuning = field(default_factory=lambda: FineTuning(first=8192, growth=1.2))
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(learning_rate=3e-4, warmup_steps=2)
    )
    text: TextOptions = field(default_factory=TextOptions)
    tasks: TaskOptions | None = None
    unrouted: UnroutedRule = "drop"
    ablation: bool = False
    dtype: DType = "float32"
    output: str = "runs/compare"
    when_changed: Literal["refuse", "beside"] = "refuse"
    figures: bool = True

    def __post_init__(self) -> None:
        for name in (*_LISTS, "seeds"):
            _check_list(name, getattr(self, name))
        for ratio in self.keep_ratios:
            if not (math.isfinite(ratio) and 0 < ratio < 1):
                raise LitMoEError(
                    f"keep_ratios has {ratio:g}, but each must be the fraction of experts to keep, "
                    "strictly between 0 and 1"
                )
        self._check_numbers()
        for name in self.criteria:
            get_criterion(name)  # refused here, in its own words
        for model in self.models:
            read_config(resolve_model(model))

    def _check_numbers(self) -> None:
        if self.random_draws < 0:
            raise LitMoEError(f"random_draws={self.random_draws} must be at least 0")
        if self.rounds is not None and self.rounds < 1:
            raise LitMoEError(f"rounds={self.rounds} must be at least 1, or null")
        if "lottery" in self.procedures and self.fine_tuning.optimizer == "keep":
            raise LitMoEError(
                "fine_tuning.optimizer: keep has one schedule over all rounds, so that no ratio on "
                "the way would be a lottery of its own; use reset"
            )


@dataclass(frozen=True)
class Line:
    """One curve: everything but the ratio, the seed and the model.

    Attributes:
        criterion: as it was asked for.
        direction: ``paper`` for criteria without directions.
        procedure: how experts are dropped.
        scope: of the ranking.
    """

    criterion: str
    direction: Direction
    procedure: Procedure
    scope: Scope

    @property
    def name(self) -> str:
        """For tables and figures; says only what is not the usual."""
        direction = " (opposite)" if self.direction == "opposite" else ""
        return f"{self.criterion}{direction}{', global' if self.scope == 'global' else ''}"

    @property
    def scored(self) -> dict[str, str]:
        """What the scores of the first round depend on."""
        return {"criterion": self.criterion, "direction": self.direction}


def has_direction(criterion: str) -> bool:
    """Return whether a criterion can be turned around."""
    found = get_criterion(criterion)
    return dataclasses.is_dataclass(found) and "direction" in {
        f.name for f in dataclasses.fields(found)
    }


def lines_of(options: CompareOptions) -> list[Line]:
    """Return all curves, the control first."""
    criteria = [c for c in options.criteria if c != CONTROL]
    if options.random_draws or CONTROL in options.criteria:
        criteria.insert(0, CONTROL)
    return [
        Line(criterion, direction, procedure, scope)
        for procedure in options.procedures
        for scope in options.scopes
        for criterion in criteria
        for direction in _directions(options, criterion)
    ]


def _directions(options: CompareOptions, criterion: str) -> list[Direction]:
    return options.directions if has_direction(criterion) else ["paper"]


def seeds_of(options: CompareOptions, line: Line) -> list[int]:
    """Return the seeds of a curve; the control may have more than the others."""
    if line.criterion != CONTROL or line.procedure != "one_shot":
        return list(options.seeds)
    more = (s for s in range(options.random_draws + len(options.seeds)) if s not in options.seeds)
    missing = max(0, options.random_draws - len(options.seeds))
    return [*options.seeds, *(next(more) for _ in range(missing))]


def default_tokenizer(options: CompareOptions) -> str:
    """Return where the tokenizer comes from."""
    return options.text.tokenizer or str(Path(resolve_model(options.models[0])))


def _check_list(name: str, values: Sequence[object]) -> None:
    if not values:
        raise LitMoEError(f"{name} is empty; give at least one")
    twice = [value for value in values if values.count(value) > 1]
    if twice:
        raise LitMoEError(f"{name} has {twice[0]!r} twice; once is enough")
