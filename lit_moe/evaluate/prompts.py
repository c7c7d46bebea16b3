"""Questions as prompts: what a task asks, how it is worded, and solved examples before it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from string import Formatter

from lit_moe.errors import LitMoEError
from lit_moe.evaluate.chat import ChatFormat

_SOLUTIONS = frozenset({"answer", "answers"})


@dataclass(frozen=True)
class TaskItem:
    """One question of a task.

    Attributes:
        fields: name -> text, for templates.
        answers: every answer that counts as right, at least one; the first is shown in examples
            and trained on.
        choices: what can be chosen from, the first answer among them; empty where there is nothing
            to choose.
        place: where the question comes from, named in errors.
        domain: which figures of a report it belongs to.
    """

    fields: Mapping[str, str]
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    place: str = "a question"
    domain: str = "task"


@dataclass(frozen=True)
class PromptTemplate:
    """How a question is worded.

    ``{name}`` stands for a field of the question, ``{{`` and ``}}`` for braces; nothing else is
    interpreted. ``{choices}`` is the list of choices, with commas between.

    Attributes:
        question: what the model is asked; must not name the answer.
        answer: what follows, in examples and in training.
        separator: between an example and what follows it.
        instruction: once, before everything.
    """

    question: str = "Question: {question}\nAnswer:"
    answer: str = " {answer}"
    separator: str = "\n\n"
    instruction: str = ""

    def __post_init__(self) -> None:
        named = {name for _, name in _pieces(self.question) if name}
        if named & _SOLUTIONS:
            raise LitMoEError(
                f"the question template {self.question!r} names the answer, which would be told "
                "before it is asked for; name it in the answer template"
            )
        if {name for _, name in _pieces(self.answer) if name} != {"answer"}:
            raise LitMoEError(
                f"the answer template {self.answer!r} must name {{answer}} and nothing else"
            )

    def question_text(self, item: TaskItem) -> str:
        """Return the wording of one question.

        Raises:
            LitMoEError: if the template names a field that the question does not have.
        """
        fields = dict(item.fields)
        if item.choices:
            fields["choices"] = ", ".join(item.choices)
        return _render(self.question, fields, item.place)

    def answer_text(self, answer: str) -> str:
        """Return the wording of an answer, as it follows the question."""
        return _render(self.answer, {"answer": answer}, "the answer")

    def identity(self, item: TaskItem) -> str:
        """Return what two questions share if they are the same but for case and spaces."""
        return " ".join(self.question_text(item).casefold().split())


@dataclass(frozen=True)
class Prompting:
    """Makes prompts of ``num_shots`` solved examples and a question.

    The examples are drawn for each question anew, by a seed of the question itself: they depend
    neither on the order of the questions nor on how many processes share them.

    Attributes:
        template: the wording.
        pool: where examples are drawn from, without replacement; never the question itself.
        num_shots: examples before each question; 0 for none.
        seed: of the draw.
        chat: turns prompts into conversations: the instruction is the system's message, examples
            are turns of user and assistant, and the template's separator is not needed. None for
            running text.
    """

    template: PromptTemplate
    pool: Sequence[TaskItem] = ()
    num_shots: int = 0
    seed: int = 0
    chat: ChatFormat | None = None

    def shots(self, item: TaskItem) -> list[TaskItem]:
        """Return the examples before a question.

        Raises:
            LitMoEError: if the pool has too few other questions.
        """
        if self.num_shots == 0:
            return []
        own = self.template.identity(item)
        same = self._frequencies[own]
        if len(self.pool) - same < self.num_shots:
            raise LitMoEError(
                f"{self.num_shots} examples before {item.place} were asked for, but only "
                f"{len(self.pool) - same} other questions are there to draw them from"
            )
        draw = random.Random(f"{self.seed}:{own}")
        drawn = draw.sample(range(len(self.pool)), self.num_shots + same)
        others = [index for index in drawn if self._identities[index] != own]
        return [self.pool[index] for index in others[: self.num_shots]]

    def prompt(self, item: TaskItem) -> str:
        """Return instruction, examples and question, up to where the answer begins."""
        template, question = self.template, self.template.question_text(item)
        examples = [
            (template.question_text(shot), template.answer_text(shot.answers[0]))
            for shot in self.shots(item)
        ]
        if self.chat is not None:
            turns = [(asked, answer.strip()) for asked, answer in examples]
            return self.chat.prompt(template.instruction, turns, question)
        texts = [asked + answer for asked, answer in examples]
        return template.instruction + template.separator.join([*texts, question])

    def answer(self, words: str) -> str:
        """Return an answer as it follows the prompt, without what ends it.

        In a chat the template decides about spaces around it.
        """
        text = self.template.answer_text(words)
        return text if self.chat is None else self.chat.lead + text.strip()

    @cached_property
    def _identities(self) -> list[str]:
        return [self.template.identity(item) for item in self.pool]

    @cached_property
    def _frequencies(self) -> Counter[str]:
        return Counter(self._identities)


def _pieces(template: str) -> list[tuple[str, str | None]]:
    """Return pairs of literal text and the field that follows it, None at the end."""
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise LitMoEError(
            f"template {template!r} has a brace without a partner ({error}); write {{{{ or }}}} "
            "for a brace itself"
        ) from error
    for _, name, form, conversion in parsed:
        if name is not None and (not name.isidentifier() or form or conversion):
            raise LitMoEError(
                f"template {template!r} has a placeholder that is no plain field name; write "
                "{name}, without dots, brackets or formats"
            )
    return [(literal, name) for literal, name, _, _ in parsed]


def _render(template: str, fields: Mapping[str, str], place: str) -> str:
    words = []
    for literal, name in _pieces(template):
        words.append(literal)
        if name is None:
            continue
        if name not in fields:
            raise LitMoEError(
                f"template {template!r} names {{{name}}}, but {place} has only "
                f"{', '.join(sorted(fields)) or 'no field'}"
            )
        words.append(fields[name])
    return "".join(words)
