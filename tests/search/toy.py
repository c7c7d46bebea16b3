"""A toy search whose answer is known: which experts are wanted, and what mixture of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lit_moe.search import Evolution, History, Problem, SearchRun
from lit_moe.search.groups import LayerGroup
from lit_moe.search.options import Effort, Racing, Rates
from lit_moe.search.population import Score
from lit_moe.search.request import Floor, Request

NUM_EXPERTS, SAMPLES = 8, 64
WANTED = (1, 4, 6)


def toy_groups(num=2, layers=1, routing_groups=1):
    return tuple(
        LayerGroup(
            f"layers.{i}",
            tuple(f"layers.{i}.mlp.{j}" for j in range(layers)),
            NUM_EXPERTS,
            routing_groups,
        )
        for i in range(num)
    )


@dataclass
class ToyEvaluator:
    """Points for wanted experts, and some for being near a target mixture.

    Attributes:
        width: requests per call.
        fail_at: the evaluation that raises instead, as a kill would.
        coarse: round the fitness to this many points.
    """

    width: int = 1
    fail_at: int | None = None
    coarse: float = 0.0
    asked: list[tuple[str, str, int]] = field(default_factory=list)

    def num_samples(self, split: str) -> int:
        return {"search": SAMPLES, "dev": 16, "test": 16}[split]

    def __call__(self, requests: Sequence[Request]) -> list[Score]:
        scores = []
        for request in requests:
            if len(self.asked) == self.fail_at:
                raise KeyboardInterrupt
            self.asked.append((request.split, request.genome.key, request.samples))
            scores.append(self.bounded(self.score(request), request.floor))
        return scores

    def bounded(self, score: Score, floor: Floor | None) -> Score:
        """Return a bound between the score and the floor, if the score is below it."""
        value = score.finer if floor is not None and floor.by_finer else score.fitness
        if floor is None or value >= floor.points:
            return score
        more = (floor.points - value) / 2
        return Score(score.fitness + more, score.finer + more, is_bound=True)

    def score(self, request: Request) -> Score:
        near = 0.0
        for maps in request.genome.maps:
            target = np.zeros(NUM_EXPERTS)
            target[list(WANTED)] = 1.0
            used = maps.experts.sum(axis=0)
            near -= 10 * float(((used - 1.3 * target) ** 2).sum())
        noise = np.random.default_rng(int(request.genome.key, 16) % 2**32)
        near += float(noise.standard_normal()) * (SAMPLES - request.samples) / SAMPLES
        coarse = round(near / self.coarse) * self.coarse if self.coarse else near
        return Score(coarse, near)


def toy_run(
    *,
    groups=None,
    counts=(3, 3),
    evaluator=None,
    history=None,
    racing=None,
    watch=None,
    rates=None,
    **effort,
):
    """Return a search with the released rates and a short effort."""
    groups = groups or toy_groups()
    options: dict = {"initial": 10, "discrete": 40, "total": 80, "children": 4, "rerank": 3}
    problem = Problem(groups, tuple(counts), floors=tuple(1 for _ in groups))
    evolution = Evolution(problem, rates or Rates(), Effort(**{**options, **effort}))
    return SearchRun(
        evolution,
        evaluator or ToyEvaluator(),
        history or History("toy"),
        racing=racing,
        watch=watch,
    )


RACING = Racing(first=16, audit_every=2)
