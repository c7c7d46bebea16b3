"""Candidates per second of the evolutionary search against a whole forward for each of them.

A 12-layer model with random weights; the candidates are those that a real search of negative loss
comes to. Naive: every candidate that the released rates draw, duplicates too, its maps put together
anew, all layers run. Scores are compared bit for bit; seconds are those of the process, so that
other programs do not count.

What sharing hidden states can give is bounded by the layers behind the first changed group, however
many candidates are remembered: under the released rates a child changes each group with a chance of
its own, so that the first change comes early. ``bound`` is that limit; nothing else of a candidate
is the same, to the bit, as anything that was computed before.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from lit_moe.adapters import find_sites
from lit_moe.search import (
    Effort,
    Evolution,
    Genome,
    History,
    LiveModel,
    Measures,
    ModelEvaluator,
    NegativeLoss,
    Problem,
    Rates,
    SearchRun,
    SplitData,
    SplitScorer,
    group_layers,
)
from lit_moe.search.groups import Grouping
from lit_moe.search.population import Score
from tests.benchmarks.timing import markdown

LAYERS, EXPERTS, KEPT = 12, 8, 4
ROWS, TOKENS, BATCH = 32, 32, 32
EFFORT = Effort(initial=10, discrete=100, total=200, rerank=0)


@dataclass(frozen=True)
class Setting:
    """A row of the table."""

    name: str
    groups: Grouping
    rates: Rates = field(default_factory=Rates)


SETTINGS = (
    Setting("4 groups, released rates", 4),
    Setting("4 groups, touched by cost", 4, Rates(touch="by_cost")),
    Setting("per layer, released rates", "per_layer"),
    Setting("per layer, touched by cost", "per_layer", Rates(touch="by_cost")),
)


def twelve_layers() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=1024,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        max_position_embeddings=TOKENS,
    )
    return MixtralForCausalLM(config).eval()


def samples() -> SplitData:
    ids = torch.randint(3, 1000, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    return SplitData([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids])


def bound(num_groups: int, chance: float) -> float:
    """Return layers over expected layers behind the first of the groups that a child changes.

    Args:
        num_groups: by depth, about equally many of the layers in each.
        chance: that a child differs from its parent in a group, for each group on its own.
    """
    behind = np.cumsum([len(part) for part in np.array_split(np.arange(LAYERS), num_groups)][::-1])
    first = (1 - chance) ** np.arange(num_groups)
    return LAYERS / float((first * behind[::-1]).sum() / first.sum())


def bounds() -> str:
    """Return the bounds of both phases under the released rates, without crossings."""
    rates = Rates()
    chances = {
        "discrete": rates.group * (1 - (1 - rates.row) ** KEPT),
        "continuous": 1 - (1 - rates.group) ** 2,
    }
    rows = [
        [f"{num} groups", *(f"{bound(num, chance):.2f}" for chance in chances.values())]
        for num in (4, LAYERS)
    ]
    return markdown(["released rates, at most", *chances], rows)


class Proposals(Evolution):
    """Counts the proposals, duplicates too, behind each candidate that is evaluated."""

    drawn: int = 0

    def _new(self, child):
        self.drawn += 1
        return super()._new(child)


def scorer_of(live: LiveModel, *, prefix_bytes: int) -> SplitScorer:
    measures = Measures(NegativeLoss(), NegativeLoss(), BATCH, prefix_bytes)
    return SplitScorer(live, samples(), measures)


def searched(model, setting: Setting, effort: Effort) -> tuple[SearchRun, float, int, int]:
    """Return a finished search, its seconds, proposals drawn, and layers run."""
    groups = group_layers(find_sites(model), setting.groups)
    live = LiveModel(model, groups)
    scorer = scorer_of(live, prefix_bytes=1 << 30)
    problem = Problem(groups, (KEPT,) * len(groups))
    evolution = Proposals(problem, setting.rates, effort)
    run = SearchRun(evolution, ModelEvaluator({"search": scorer}, live), History("benchmark"))
    start = time.process_time()
    run.run()
    return run, time.process_time() - start, evolution.drawn, scorer.layers_run


def naive_scores(model, setting: Setting, genomes: list[Genome]) -> tuple[list[Score], float]:
    groups = group_layers(find_sites(model), setting.groups)
    live = LiveModel(model, groups, cache_bytes=0)
    scorer = scorer_of(live, prefix_bytes=0)
    scorer.score(genomes[0])
    start = time.process_time()
    fresh = [replace(genome) for genome in genomes]
    scores = [scorer.score(genome) for genome in fresh[1:]]
    return scores, (time.process_time() - start) / len(scores)


def row_of(model, setting: Setting, effort: Effort = EFFORT) -> list[object]:
    run, seconds, drawn, layers = searched(model, setting, effort)
    ranked = sorted(run.evolution.population.ranked, key=lambda one: one.number)
    scores, per_candidate = naive_scores(model, setting, [one.genome for one in ranked])
    assert scores == [one.score for one in ranked[1:]]
    fast = seconds / len(ranked)
    batches = -(-ROWS // BATCH)
    return [
        setting.name,
        f"{1 / per_candidate:.2f}",
        f"{1 / fast:.2f}",
        f"{per_candidate / fast:.2f}",
        f"{drawn / len(ranked):.2f}",
        f"{per_candidate / fast * drawn / len(ranked):.2f}",
        f"{layers / batches / len(ranked):.1f} of {LAYERS}",
        f"{LAYERS * batches * len(ranked) / layers:.2f}",
    ]


HEADER = [
    "search",
    "naive, candidates/s",
    "ours, candidates/s",
    "ratio",
    "proposals per new candidate",
    "ratio with duplicates",
    "layers run",
    "ratio if nothing but layers took time",
]


def run() -> str:
    model = twelve_layers()
    rows = []
    for setting in SETTINGS:
        rows.append(row_of(model, setting))
        print(*rows[-1], sep=" | ", flush=True)
    return f"{markdown(HEADER, rows)}\n\n{bounds()}"


if __name__ == "__main__":
    print(run())
