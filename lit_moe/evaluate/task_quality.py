"""How well a model does a task: answers that it writes, beside answers that it finds likely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_moe.errors import LitMoEError
from lit_moe.evaluate.chat import ChatFormat
from lit_moe.evaluate.encoding import prompt_ids
from lit_moe.evaluate.generation import (
    GenerationOptions,
    check_can_generate,
    check_context,
    generate_answers,
)
from lit_moe.evaluate.multiple_choice import Question, evaluate_multiple_choice
from lit_moe.evaluate.prompts import Prompting, TaskItem
from lit_moe.evaluate.squad import AnswerScores, mean_and_error


@dataclass(frozen=True)
class TaskQuality:
    """Right answers to a task, each share in [0, 1] with its standard error.

    Attributes:
        exact_match: written answers that are right to the letter, as SQuAD v1.1 compares.
        exact_match_stderr: of ``exact_match``, binomial.
        f1: mean over questions of the F1 of words.
        f1_stderr: of ``f1``.
        num_items: questions asked.
        num_shots: solved examples before each.
        choice_accuracy: questions whose right choice is the likeliest per byte; None without
            choices.
        choice_stderr: of ``choice_accuracy``, binomial.
        chance: what guessing among the choices would reach.
    """

    exact_match: float
    exact_match_stderr: float
    f1: float
    f1_stderr: float
    num_items: int
    num_shots: int
    choice_accuracy: float | None = None
    choice_stderr: float | None = None
    chance: float | None = None


def evaluate_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[TaskItem],
    *,
    prompting: Prompting,
    generation: GenerationOptions | None = None,
) -> TaskQuality:
    """Ask every question after solved examples; score what is written and what is likely.

    The model runs in evaluation mode, on its own device, and is left as it was. With a process
    group every rank must call this with all questions and answers its share of them; all get the
    result over all shares.

    Args:
        model: a decoder that transformers can generate with, pruned or whole.
        tokenizer: its own.
        items: what is asked. Those with choices are also answered by likelihood.
        prompting: the wording and the examples; its pool should hold none of ``items``.
        generation: lengths, stop texts, batch size.

    Raises:
        LitMoEError: if there is no question, the model cannot generate, or a prompt is longer
            than its context, on all ranks and before anything runs.
    """
    options = generation or GenerationOptions()
    prompts = checked_prompts(model, tokenizer, items, prompting=prompting, generation=options)
    scores = AnswerScores().to(model.device)
    mine, num_idle = _share(len(items))
    written = generate_answers(
        model, tokenizer, [prompts[i] for i in mine], options, chat=prompting.chat
    )
    answers = [items[i].answers for i in mine]
    num = len(mine) - num_idle
    scores.update(written[:num], answers[:num])
    questions = [
        _question(item, prompt, prompting)
        for item, prompt in zip(items, prompts, strict=True)
        if item.choices
    ]
    if questions:
        _choose(model, tokenizer, questions, scores, prompting.chat)
    return _quality(scores.totals(), prompting.num_shots)


def checked_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[TaskItem],
    *,
    prompting: Prompting,
    generation: GenerationOptions,
) -> list[str]:
    """Return the prompt of each question, without running the model.

    Raises:
        LitMoEError: as :func:`evaluate_task`.
    """
    if not items:
        raise LitMoEError("a task needs at least one question, none was given")
    check_can_generate(model)
    prompts = [prompting.prompt(item) for item in items]
    check_context(model, prompt_ids(tokenizer, prompts, prompting.chat), generation)
    return prompts


def _choose(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    scores: AnswerScores,
    chat: ChatFormat | None,
) -> None:
    """Add this rank's share of the questions that can be answered by choosing."""
    mine, num_idle = _share(len(questions))
    num = len(mine) - num_idle
    if num:
        asked = [questions[i] for i in mine[:num]]
        scores.update_choices(evaluate_multiple_choice(model, tokenizer, asked, chat=chat))
    if num_idle:
        evaluate_multiple_choice(model, tokenizer, [questions[i] for i in mine[num:]], chat=chat)


def _share(num_items: int) -> tuple[list[int], int]:
    """Return the questions of this rank, and how many at the end count for nothing.

    Ranks that share one model must run it equally often, so a short share is filled up.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = list(range(rank, num_items, world_size))
    num_idle = -(-num_items // world_size) - len(mine)
    return mine + [0] * num_idle, num_idle


def _question(item: TaskItem, prompt: str, prompting: Prompting) -> Question:
    choices = tuple(prompting.answer(choice) for choice in item.choices)
    return Question(prompt, choices, item.choices.index(item.answers[0]))


def _quality(totals: dict[str, float], num_shots: int) -> TaskQuality:
    num, asked = totals["num"], totals["asked"]
    exact, exact_error = mean_and_error(totals["exact"], totals["exact"], num)
    f1, f1_error = mean_and_error(totals["f1"], totals["f1_f1"], num)
    chosen, chosen_error = mean_and_error(totals["chosen"], totals["chosen"], asked)
    return TaskQuality(
        exact_match=exact,
        exact_match_stderr=exact_error,
        f1=f1,
        f1_stderr=f1_error,
        num_items=int(num),
        num_shots=num_shots,
        choice_accuracy=chosen if asked else None,
        choice_stderr=chosen_error if asked else None,
        chance=totals["chance"] / asked if asked else None,
    )
