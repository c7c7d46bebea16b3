"""Part 6 of the refit's benchmark: SmolLM2 split into experts, a model that was not trained here.

Some 200 tokens per second and core: each cell takes minutes. A refit that was stopped goes on with
the layer it was at.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import lit_moe
from lit_moe.assets import text_file
from lit_moe.data import TextDataModule
from lit_moe.errors import LitMoEError
from lit_moe.evaluate import evaluate_perplexity
from lit_moe.evaluate.exact_match import exact_match, load_capitals
from lit_moe.models import build_model, sharing_copy, smollm2_folder, smollm2_split_folder
from lit_moe.plan import KeepPlan
from lit_moe.refit import refit
from tests.benchmarks.refit_bench import BLOCK, CALIBRATION, Batches, summary, timed
from tests.benchmarks.refit_store import Result, Store

NAME = "smollm2_split"
TEST = 4096
ROWS = 8
MANY = 65536
PLANS = (
    (0.5, "split", MANY),
    (0.75, "split", MANY),
    (0.75, "split", CALIBRATION),
    (0.5, "split", CALIBRATION),
    (0.75, "dense", CALIBRATION),
    (0.5, "dense", CALIBRATION),
    (1.0, "dense", CALIBRATION),
)
"""Fraction of experts kept, the model that the refit goes towards, tokens; most telling first."""


def smollm2(store: Store) -> None:
    """Measure what is missing; nothing where the packages that the model is made from are not."""
    try:
        split = _Split(store)
    except LitMoEError as error:
        print(f"no SmolLM2: {error}")
        return
    store.measure(lambda: split.quality(split.dense), NAME, "smollm2", keep="dense")
    for keep in (1.0, 0.5, 0.75):
        store.measure(partial(split.before, keep), NAME, "smollm2", keep=keep, teacher=None)
    for keep, teacher, tokens in PLANS:
        store.measure(
            partial(split.refitted, keep, teacher, tokens),
            *(NAME, "smollm2"),
            keep=keep,
            teacher=teacher,
            tokens=tokens,
        )


class _Split:
    """The split model, its dense ancestor, its text and its plans."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._folders = {"dense": smollm2_folder(), "split": smollm2_split_folder()}

    @cached_property
    def dense(self) -> PreTrainedModel:
        return self._model("dense")

    @cached_property
    def split(self) -> PreTrainedModel:
        return self._model("split")

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self._folders["split"])

    def student(self, keep: float) -> PreTrainedModel:
        """Return the split model with the most frequently used experts."""
        student = sharing_copy(self.split)
        if keep < 1:
            lit_moe.shrink(student, self._plan(keep))
        return student

    def quality(self, model: PreTrainedModel) -> Result:
        """Return perplexity on the test text and the share of capitals that are known."""
        loader, domains = self._text().test_share(rank=0, world_size=1)
        text = evaluate_perplexity(model, loader, domains)
        shots, questions = load_capitals()
        facts = exact_match(model, self.tokenizer, questions, shots=shots)
        return {
            "perplexity": text.perplexity,
            "domains": text.domains,
            "capitals": facts.accuracy,
            "capitals_stderr": facts.stderr,
        }

    def before(self, keep: float) -> Result:
        return self.quality(self.student(keep))

    def refitted(self, keep: float, teacher: str, tokens: int) -> Result:
        student, batches = self.student(keep), self._calibration(tokens)
        folder = self._store.path.parent / f"{NAME}-{keep}-{teacher}-{tokens}"
        report, seconds = timed(
            lambda: refit(student, getattr(self, teacher), batches, progress_folder=folder)
        )
        return {**self.quality(student), "seconds": seconds, **summary(report)}

    def _plan(self, keep: float) -> KeepPlan:
        def choose() -> Result:
            stats = lit_moe.observe(self.split, self._calibration(CALIBRATION))
            scores = lit_moe.score(stats, "frequency")
            return {
                str(ratio): lit_moe.select(scores, keep_ratio=ratio).to_dict()
                for ratio in (0.5, 0.75)
            }

        self._store.measure(choose, NAME, "smollm2_plans", tokens=CALIBRATION)
        plans: Any = self._store.get(NAME, "smollm2_plans", tokens=CALIBRATION)
        return KeepPlan.from_dict(plans[str(keep)])

    def _model(self, which: str) -> PreTrainedModel:
        return build_model(str(self._folders[which]), dtype="float32").requires_grad_(False)

    def _text(self, tokens: int = CALIBRATION) -> TextDataModule:
        return TextDataModule(
            calibration_files=[str(text_file("calibration"))],
            sequence_length=BLOCK,
            batch_size=ROWS,
            calibration_tokens=tokens,
            test_tokens=TEST,
            tokenizer=str(self._folders["split"]),
        )

    def _calibration(self, tokens: int) -> Batches:
        blocks = self._text(tokens).blocks("calibration")
        assert len(blocks) * BLOCK == tokens
        return [
            {"input_ids": batch["input_ids"], "attention_mask": torch.ones_like(batch["input_ids"])}
            for batch in DataLoader(blocks, batch_size=ROWS)
        ]
