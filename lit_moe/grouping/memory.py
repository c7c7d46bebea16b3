"""How much is held at a time while experts are compared, so that a budget is kept.

T tokens, E experts, I expert width, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from lit_moe.adapters import MoESite, adapter_for
from lit_moe.errors import LitMoEError

WINDOW = 128  # tokens between which kernels are taken
_FEWEST_TOKENS = 16  # of all experts' outputs at a time; below, estimates get noisy and calls many
_ROWS = 64  # of all kernels at a time
_GIB = 2**30


@dataclass(frozen=True)
class Blocks:
    """Sizes of what is held at a time.

    Attributes:
        layers: whose inputs are gathered in one run of the model.
        tokens: on which the outputs of all experts are held.
        rows: of the kernels of all experts.
    """

    layers: int = 1
    tokens: int = 16 * WINDOW
    rows: int = _ROWS


def blocks_for(
    model: PreTrainedModel, sites: Sequence[MoESite], num_tokens: int, memory_gib: float
) -> Blocks:
    """Return the largest blocks that a budget holds, beside the model and one batch's forward.

    Half of it may hold inputs of several layers, which saves runs of the model; outputs take what
    is left.

    Args:
        model: says how large its experts are.
        sites: the layers to compare.
        num_tokens: T of each layer.
        memory_gib: the budget.

    Raises:
        LitMoEError: if the smallest blocks do not fit, naming what they need.
    """
    costs = [_Costs.of(model, site, num_tokens) for site in sites]
    largest = max(costs, key=lambda cost: cost.total(1, _FEWEST_TOKENS, 1))
    budget, needed = bytes_in(memory_gib), largest.total(1, _FEWEST_TOKENS, 1)
    if budget < needed:
        raise LitMoEError(
            f"memory_gib={memory_gib:g} does not hold {num_tokens} inputs of one layer and the "
            f"outputs of its {largest.experts} experts on {_FEWEST_TOKENS} of them; give at least "
            f"{at_least(needed):g}, or fewer max_tokens"
        )
    layers = max(1, min(len(sites), int(budget / 2 / max(1, *(c.inputs for c in costs))) - 1))
    return Blocks(
        layers,
        min(cost.most_tokens(budget, layers) for cost in costs),
        min(cost.most_rows(budget, layers) for cost in costs),
    )


def bytes_in(memory_gib: float) -> float:
    """Return how many bytes a budget has."""
    return memory_gib * _GIB


def at_least(needed: float) -> float:
    """Return the GiB that hold so many bytes, rounded up to three digits."""
    digits = 10 ** (2 - math.floor(math.log10(needed / _GIB)))
    return math.ceil(needed / _GIB * digits) / digits


@dataclass(frozen=True)
class _Costs:
    """Bytes that comparing the experts of one layer takes.

    Attributes:
        experts: E.
        inputs: of the hidden states of all tokens.
        token: of all experts' outputs on one token, and of what one expert computes on the way.
        row: of one row of all experts' kernels.
        fixed: of the sums.
    """

    experts: int
    inputs: int
    token: int
    row: int
    fixed: int

    @classmethod
    def of(cls, model: PreTrainedModel, site: MoESite, num_tokens: int) -> _Costs:
        router = adapter_for(model.config).router_weight(model, site)
        num_experts, hidden = site.num_experts, router.shape[1]
        experts = model.get_submodule(site.experts)
        numbers = sum(p.numel() for p in experts.parameters()) // (num_experts * hidden)
        on_the_way = 8 * hidden + 2 * numbers + 8 * num_experts  # also one-hot expert ids
        return cls(
            num_experts,
            inputs=4 * num_tokens * hidden,
            token=4 * (num_experts * (hidden + 3) + on_the_way),
            row=4 * num_experts * WINDOW,
            fixed=8 * (3 * num_experts * hidden + 8 * num_experts**2),
        )

    def total(self, layers: int, tokens: int, rows: int) -> int:
        """Return the bytes of some blocks; inputs of one layer exist twice for a moment."""
        return (layers + 1) * self.inputs + tokens * self.token + rows * self.row + self.fixed

    def most_tokens(self, budget: float, layers: int) -> int:
        """Return how many tokens fit with one row; whole windows where there is room for one."""
        room = int((budget - self.total(layers, 0, min(8, _ROWS))) / self.token)
        room = max(room, _FEWEST_TOKENS)
        return room // WINDOW * WINDOW or room

    def most_rows(self, budget: float, layers: int) -> int:
        """Return how many rows of the kernels fit beside the tokens."""
        left = budget - self.total(layers, self.most_tokens(budget, layers), 0)
        return max(1, min(_ROWS, int(left / self.row)))
