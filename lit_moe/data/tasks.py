"""Questions with short answers, for supervised fine-tuning and for k-shot evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedModel

from lit_moe.assets import Split
from lit_moe.data.blocks import Blocks
from lit_moe.data.task_items import (
    SPLITS,
    TEMPLATES,
    Items,
    PackagedTask,
    check_disjoint,
    cut,
    load_items,
    packaged_items,
)
from lit_moe.data.task_rows import task_rows
from lit_moe.data.text import TextDataModule
from lit_moe.errors import LitMoEError
from lit_moe.evaluate.chat import ChatFormat, chat_format
from lit_moe.evaluate.generation import GenerationOptions
from lit_moe.evaluate.prompts import Prompting, PromptTemplate, TaskItem
from lit_moe.evaluate.task_quality import TaskQuality, checked_prompts, evaluate_task


@dataclass(frozen=True)
class SplitFractions:
    """Shares of the training questions that are cut off for splits without files of their own.

    Attributes:
        calibration: for observing experts.
        validation: for the validation loop.
        test: for the numbers in the report.
    """

    calibration: float = 0.2
    validation: float = 0.1
    test: float = 0.3

    def __post_init__(self) -> None:
        shares = (self.calibration, self.validation, self.test)
        if min(shares) < 0 or sum(shares) >= 1:
            raise LitMoEError(
                f"fractions {shares} must be at least 0 each and leave something to training, so "
                "less than 1 together"
            )

    def of(self, split: Split) -> float:
        """Return the share of one split; training has what is left."""
        shares = {"calibration": self.calibration, "validation": self.validation}
        return {**shares, "test": self.test}[split]


class TaskDataModule(TextDataModule):
    """Prompts with short answers for the four purposes; no question serves two of them.

    Batches are those of ``TextDataModule`` with ``labels`` (B, S): -100 where the prompt or
    padding is, so that only answers are learnt. Examples before a question come from the training
    split, and never from the question itself.

    Args:
        task: what comes with the program: ``capitals`` (151 countries) or ``domains`` (the kind of
            an excerpt of the embedded text); only without files.
        train_files: JSONL files of questions, see :func:`lit_moe.data.task_items.load_items`.
        calibration_files: questions that experts are observed on. This and the next two are cut
            from the training questions where None.
        validation_files: questions for the validation loop.
        test_files: questions for the numbers in the report.
        fractions: how much is cut off for splits without files.
        template: the wording; None takes the one of the packaged task, or the default.
        shots: numbers of examples before a question in training, calibration and validation, and
            where likelihood is measured on the test split; dealt to the questions in turn.
        evaluated_shots: numbers of examples that written answers are scored with, each apart.
        generation: how answers are written and where they end.
        chat: whether questions are asked in the chat format of the tokenizer, as instruct models
            are used to: the instruction of the template is the system's message, examples are
            turns of user and assistant, answers end as a turn does. ``auto``: where the tokenizer
            has a chat template, which those of many base models have too. False asks in running
            text.
        tokenizer: folder or hub id; None takes the one of the model.
        sequence_length: most tokens of examples, question and answer together.
        batch_size: questions per batch and device.
        seed: of the order of training, of the split, and of the draw of examples.
    """

    def __init__(  # noqa: PLR0913 - the fields of a YAML file
        self,
        task: PackagedTask = "capitals",
        train_files: list[str] | None = None,
        calibration_files: list[str] | None = None,
        validation_files: list[str] | None = None,
        test_files: list[str] | None = None,
        fractions: SplitFractions | None = None,
        template: PromptTemplate | None = None,
        shots: Sequence[int] = (0,),
        evaluated_shots: Sequence[int] = (0, 5),
        generation: GenerationOptions | None = None,
        chat: bool | Literal["auto"] = False,
        tokenizer: str | None = None,
        sequence_length: int = 256,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__(
            calibration_files=calibration_files,
            train_files=train_files,
            validation_files=validation_files,
            test_files=test_files,
            tokenizer=tokenizer,
            sequence_length=sequence_length,
            batch_size=batch_size,
            calibration_tokens=sequence_length,
            seed=seed,
        )
        others = [split for split in SPLITS if split != "train" and self.files[split]]
        if others and not train_files:
            raise LitMoEError(
                f"{others[0]}_files are given without train_files, which examples are drawn from; "
                "name the training questions too"
            )
        for name, numbers in (("shots", shots), ("evaluated_shots", evaluated_shots)):
            if min(numbers, default=-1) < 0:
                raise LitMoEError(
                    f"{name}={list(numbers)} must be one or more numbers of examples, each at "
                    "least 0"
                )
        if chat not in (True, False, "auto"):
            raise LitMoEError(f"chat={chat!r} is unknown; use auto, true or false")
        self.task = task
        self.chat = chat
        self.fractions = fractions or SplitFractions()
        self.template = template or (PromptTemplate() if train_files else TEMPLATES[task])
        self.shots = tuple(shots)
        self.evaluated_shots = tuple(evaluated_shots)
        self.generation = generation or GenerationOptions()
        self._items: Items | None = None

    def items(self, split: Split) -> list[TaskItem]:
        """Return the questions of a split, read, split and checked on first use.

        Raises:
            LitMoEError: if splits overlap, or this one is empty.
        """
        if self._items is None:
            self._items = self._load()
        if not self._items.get(split):
            raise LitMoEError(
                f"the {split} split has no question: give {split}_files, or fractions.{split} "
                "above 0"
            )
        return self._items[split]

    def prompting(self, num_shots: int) -> Prompting:
        """Return what makes prompts with so many examples of the training split."""
        return Prompting(self.template, self.items("train"), num_shots, self.seed, self.chat_format)

    @cached_property
    def chat_format(self) -> ChatFormat | None:
        """The format that questions are asked in; None for running text.

        Raises:
            LitMoEError: if ``chat`` is true and the tokenizer has no chat template, or one that
                answers cannot be taken from.
        """
        if self.chat is True:
            return chat_format(self.tokenizer)
        if self.tokenizer.chat_template is None:
            return None
        if self.chat == "auto":
            return chat_format(self.tokenizer)
        rank_zero_info(
            "the tokenizer has a chat template, but questions are asked in running text; an "
            "instruct model should be asked with chat: true"
        )
        return None

    def blocks(self, split: Split) -> Blocks:
        """Return the padded rows of a split, tokenized on first use."""
        if split not in self._blocks:
            self._blocks[split] = task_rows(
                self.items(split),
                self.tokenizer,
                [self.prompting(shots) for shots in self.shots],
                sequence_length=self.sequence_length,
                ending=next(iter(self.generation.stop), ""),
            )
        return self._blocks[split]

    def evaluate(self, model: PreTrainedModel) -> dict[str, TaskQuality]:
        """Return ``0-shot`` and so on -> quality on the test split, one for each number of shots.

        Collective: with a process group every rank must call it, and all get the same.

        Raises:
            LitMoEError: if prompts with most examples are longer than the model's context, before
                anything runs.
        """
        promptings = [self.prompting(shots) for shots in self.evaluated_shots]
        for prompting in promptings:  # a refusal should not show after the first evaluation
            checked_prompts(
                model,
                self.tokenizer,
                self.items("test"),
                prompting=prompting,
                generation=self.generation,
            )
        return {
            f"{prompting.num_shots}-shot": evaluate_task(
                model,
                self.tokenizer,
                self.items("test"),
                prompting=prompting,
                generation=self.generation,
            )
            for prompting in promptings
        }

    def _load(self) -> Items:
        if self.files["train"]:
            items: Items = {
                split: [item for path in paths for item in load_items(path)]
                for split, paths in self.files.items()
                if paths
            }
        else:
            items = packaged_items(self.task)
        missing = {split: self.fractions.of(split) for split in SPLITS if split not in items}
        if missing:
            items = items | cut(items["train"], missing, self.template, seed=self.seed)
        check_disjoint(items, self.template)
        return items
