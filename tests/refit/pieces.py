"""Random least-squares problems of one layer."""

from __future__ import annotations

import torch

from lit_moe.stats.features import FeatureSlots
from lit_moe.stats.grams import Piece, gated_features

EXPERTS, WIDTH, HIDDEN = 4, 6, 5
SHAPE = (EXPERTS, WIDTH, HIDDEN)


def random_pieces(*, top_k=2, tokens=80, count=2):
    generator = torch.Generator().manual_seed(0)

    def piece():
        ids = torch.rand(tokens, EXPERTS, generator=generator).topk(top_k, dim=1).indices
        slots = FeatureSlots(
            ids.reshape(-1),
            torch.rand(tokens * top_k, generator=generator) + 0.2,
            torch.randn(tokens * top_k, WIDTH, generator=generator),
            torch.arange(tokens).repeat_interleave(top_k),
        )
        weights = torch.rand(tokens, generator=generator) + 0.5
        held = torch.arange(tokens) % 8 == 7
        residual = torch.randn(tokens, HIDDEN, generator=generator)
        parts = gated_features(slots, bias=False)
        return Piece(*parts, residual, weights * ~held, weights * held)

    return [piece() for _ in range(count)]
