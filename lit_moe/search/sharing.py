"""Evaluations on one process, or shared among ranks: whoever is free takes the next one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch.distributed as dist

from lit_moe.search.journal import Journal
from lit_moe.search.live import LiveModel
from lit_moe.search.population import Score
from lit_moe.search.request import Request
from lit_moe.search.scoring import SplitScorer

_ROUNDS = itertools.count()
"""Shared rounds of this process so far: all ranks take part in all, so they count alike."""


class ModelEvaluator:
    """Scores requests on the live model, each by one rank where there are several.

    A rank that is free takes the next request, so that candidates that stop early, or that begin
    late in the model, keep nobody waiting. Who scores a candidate changes no bit of its score.

    Args:
        scorers: split -> its scorer.
        live: the model.
        top_k: experts per token that all candidates have.
        journal: where a rank puts each score at once; needed with several ranks alone, whose scores
            come together at the end of a round. None for nowhere.
    """

    def __init__(
        self,
        scorers: Mapping[str, SplitScorer],
        live: LiveModel,
        *,
        top_k: int | None = None,
        journal: Journal | None = None,
    ) -> None:
        self._scorers, self._live, self._top_k = scorers, live, top_k
        self._journal = journal
        is_shared = dist.is_available() and dist.is_initialized()
        self.width = dist.get_world_size() if is_shared else 1

    def num_samples(self, split: str) -> int:
        """Return the size of a split."""
        return self._scorers[split].num_samples

    def __call__(self, requests: Sequence[Request]) -> list[Score]:
        """Return the scores of requests, in their order. Collective with several ranks."""
        if self.width == 1:
            return [self._one(request) for request in requests]
        known = {} if self._journal is None else self._journal.known(requests)
        left = [index for index in range(len(requests)) if index not in known]
        mine = {left[turn]: self._noted(requests[left[turn]]) for turn in _turns(len(left))}
        everywhere: list[Any] = [None] * self.width
        dist.all_gather_object(everywhere, mine)
        for part in everywhere:
            known |= part
        return [known[index] for index in range(len(requests))]

    def _noted(self, request: Request) -> Score:
        score = self._one(request)
        if self._journal is not None:
            self._journal.add(request, score)
        return score

    def _one(self, request: Request) -> Score:
        with self._live.active(self._top_k):
            scorer = self._scorers[request.split]
            return scorer.score(request.genome, request.samples, floor=request.floor)


def _turns(num: int) -> Iterator[int]:
    """Yield the turns that fall to this rank, of ``num``: each to the rank that asks first."""
    # The one counter that all ranks can reach: torch offers no public way to the group's store.
    store: Any = dist.distributed_c10d._get_default_store()
    name = f"lit_moe/search/{next(_ROUNDS)}"
    while (turn := store.add(name, 1) - 1) < num:
        yield turn
