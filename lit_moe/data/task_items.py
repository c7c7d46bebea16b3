"""Questions of a task: from JSONL files of anybody, or packaged with the program."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow.parquet as pq
import torch

from lit_moe.assets import Split, capitals_file, text_file
from lit_moe.errors import LitMoEError
from lit_moe.evaluate import load_facts
from lit_moe.evaluate.prompts import PromptTemplate, TaskItem

PackagedTask = Literal["capitals", "domains"]
Items = dict[Split, list[TaskItem]]

SPLITS: tuple[Split, ...] = get_args(Split)
TEMPLATES: dict[PackagedTask, PromptTemplate] = {
    "capitals": PromptTemplate(),
    "domains": PromptTemplate("Text: {text}\nKind:"),
}
_EXCERPT, _READ = 60, 2000  # characters of an excerpt at most, and of a document
_EXCERPTS: dict[Split, int] = {"train": 1000, "calibration": 40, "validation": 20, "test": 40}


def load_items(path: str | Path) -> list[TaskItem]:
    """Read a JSONL file of questions.

    Each line is an object with ``answer`` (a text) or ``answers`` (a list of texts, all right, the
    best first), optionally ``choices`` (a list of texts with the answer among them; ``answer`` may
    then be an index), optionally ``domain``; every other field that is a text or a number,
    ``question`` for instance, can be named by a template.

    Raises:
        LitMoEError: naming file and line of the first record that is malformed.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        raise LitMoEError(f"task file {path} does not exist") from error
    except UnicodeDecodeError as error:
        raise LitMoEError(f"task file {path} could not be read as UTF-8: {error}") from error
    items = [
        _item(f"{path}, line {number}", line, Path(path).stem)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not items:
        raise LitMoEError(f"task file {path} holds no question")
    return items


def packaged_items(task: PackagedTask) -> Items:
    """Return the questions of a packaged task; splits without any are to be cut from ``train``.

    ``capitals`` asks for the capitals of 151 countries, ``domains`` for the kind (scripture, code,
    manual, dictionary, german, french) of short excerpts of the embedded text, split as that is.
    """
    if task == "domains":
        return _excerpts()
    facts = load_facts(
        capitals_file(), question="What is the capital of {country}?", answer="{capital}"
    )
    return {
        "train": [
            TaskItem(
                {"question": fact.question}, (fact.answer,), place=fact.question, domain="capitals"
            )
            for fact in facts
        ]
    }


def cut(
    items: Sequence[TaskItem],
    fractions: Mapping[Split, float],
    template: PromptTemplate,
    *,
    seed: int,
) -> Items:
    """Deal questions to splits; what the fractions leave is ``train``.

    Questions that are worded alike go to the same split.

    Args:
        items: all questions.
        fractions: share of the questions per split, in [0, 1], at most 1 together; one above 0
            gets at least one question.
        template: says which questions are alike.
        seed: of the shuffle.

    Raises:
        LitMoEError: if there are fewer questions than splits.
    """
    alike: dict[str, list[TaskItem]] = {}
    for item in items:
        alike.setdefault(template.identity(item), []).append(item)
    counts = {split: max(1, int(f * len(alike))) for split, f in fractions.items() if f > 0}
    if sum(counts.values()) >= len(alike):
        raise LitMoEError(
            f"{len(alike)} different questions are too few to be split into training and "
            f"{_listed(counts)}; give more questions, or files for some of the splits"
        )
    generator = torch.Generator().manual_seed(seed)
    groups = list(alike.values())
    shuffled = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    dealt: Items = {}
    for split, count in counts.items():
        dealt[split] = [item for group in shuffled[:count] for item in group]
        shuffled = shuffled[count:]
    dealt["train"] = [item for group in shuffled for item in group]
    return dealt


def check_disjoint(items: Items, template: PromptTemplate) -> None:
    """Refuse splits that share a question.

    Raises:
        LitMoEError: naming both splits and one question that is in both.
    """
    seen: dict[str, tuple[Split, TaskItem]] = {}
    for split, questions in items.items():
        for item in questions:
            first, other = seen.setdefault(template.identity(item), (split, item))
            if first != split:
                raise LitMoEError(
                    f"splits overlap: {item.place} ({split}) asks the same as {other.place} "
                    f"({first}); a question may be in one split only"
                )


def _item(place: str, line: str, domain: str) -> TaskItem:
    try:
        record: Any = json.loads(line)
        answers = record["answers"] if "answers" in record else [record["answer"]]
        choices = tuple(record.get("choices", ()))
        answers = tuple(choices[a] if choices and isinstance(a, int) else a for a in answers)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise LitMoEError(
            f"{place}: expected an object with question and answer or answers, and perhaps "
            f"choices ({error!r})"
        ) from error
    problem = next(_problems(answers, choices), None)
    if problem:
        raise LitMoEError(f"{place}: {problem}")
    fields = {
        name: str(value)
        for name, value in record.items()
        if name not in ("answer", "answers", "choices") and isinstance(value, str | int | float)
    }
    return TaskItem(fields, answers, choices, place, str(record.get("domain", domain)))


def _problems(answers: tuple[Any, ...], choices: tuple[Any, ...]) -> Iterator[str]:
    if not answers:
        yield "answers is empty; give at least one"
    for text in (*answers, *choices):
        if not isinstance(text, str) or not text.strip():
            yield f"an answer or choice must be a text with a word in it, this is {text!r}"
    if choices and len(set(choices)) < 2:
        yield f"a question needs at least 2 different choices, this has {len(set(choices))}"
    if choices and answers[0] not in choices:
        yield f"the answer {answers[0]!r} is none of the choices {list(choices)}"


def _excerpts() -> Items:
    """Return excerpts of the embedded text, equally many of each domain, none of them twice."""
    items: Items = {}
    seen: set[str] = set()
    for split in reversed(SPLITS):  # the large one, which can spare some, comes last
        table = pq.read_table(text_file(split)).to_pydict()
        domains = sorted(set(table["domain"]))
        items[split] = [
            TaskItem({"text": text}, (domain,), tuple(domains), f"an excerpt of {split}", domain)
            for domain in domains
            for text in _texts_of(table, domain, _EXCERPTS[split], seen)
        ]
    return items


def _texts_of(
    table: Mapping[str, list[str]], domain: str, num: int, seen: set[str]
) -> Iterator[str]:
    """Yield ``num`` excerpts of one domain that were not seen, from documents in turn."""
    documents = [t for t, d in zip(table["text"], table["domain"], strict=True) if d == domain]
    pieces = [textwrap.wrap(" ".join(text[:_READ].split()), _EXCERPT) for text in documents]
    for place in range(max(map(len, pieces))):
        for lines in pieces:
            text = lines[place] if place < len(lines) else ""
            if len(text) < _EXCERPT // 2 or text.casefold() in seen:
                continue
            if num == 0:
                return
            num -= 1
            seen.add(text.casefold())
            yield text


def _listed(counts: Mapping[Split, int]) -> str:
    return ", ".join(f"{count} for {split}" for split, count in counts.items())
