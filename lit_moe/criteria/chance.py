"""The baseline that every other criterion has to beat: chance."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_moe.criteria.base import Criterion, Evidence
from lit_moe.criteria.registry import register
from lit_moe.errors import LitMoEError


@register("random")
@dataclass(frozen=True)
class RandomScores(Criterion):
    """Independent uniform scores in [0, 1).

    A layer's scores depend on the seed and on its own name only: neither on the order of the
    layers nor on which others there are, so the ranks of a distributed run agree without talking.
    """

    def scores(self, evidence: Evidence) -> dict[str, Tensor]:
        """Draw the scores; needs only the names and sizes of the layers."""
        if not evidence.num_experts:
            raise LitMoEError("criterion 'random' needs an observation or a model to know layers")
        return {
            name: torch.rand(
                num, dtype=torch.float64, generator=layer_generator(evidence.seed, name)
            )
            for name, num in evidence.num_experts.items()
        }


def layer_generator(seed: int, layer: str) -> torch.Generator:
    """Return a CPU generator seeded by ``seed`` and the name of the layer."""
    digest = hashlib.sha256(f"{seed}:{layer}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
