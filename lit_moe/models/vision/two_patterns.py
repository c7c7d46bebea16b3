"""The theory of dropping experts by their router's change, made to run (arXiv 2405.16646).

Inputs are ``n`` tokens from an orthonormal basis of ``R^d``. One of them decides the class: pattern
0 stands for +1, pattern 1 for -1; the others are irrelevant patterns, drawn evenly. One layer of
``k`` experts, each a sum of ReLU neurons with a fixed sign, choose ``l`` tokens each (expert
choice) with a softmax over those as gates. Hinge loss, SGD, a rate of their own for the routers.

As tokens are basis vectors, a token is its number and a product with it reads one column.

B inputs, n tokens, d dimensions, k experts, m neurons.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

RELEVANT = 2
"""Patterns that decide the class: the first ones."""


@dataclass(frozen=True)
class TwoPatterns:
    """Sizes of the task and of the network, and how it is trained.

    Attributes:
        tokens: per input.
        experts: k, an even number: half of them vote for each class.
        chosen: tokens that an expert chooses, l.
        neurons: of each expert.
        expert_rate: learning rate of the experts.
        router_rate: of the routers.
        steps: of SGD.
        batch: inputs per step.
    """

    tokens: int = 16
    experts: int = 16
    chosen: int = 4
    neurons: int = 8
    expert_rate: float = 0.02
    router_rate: float = 1.0
    steps: int = 600
    batch: int = 128


class ExpertChoiceLayer(nn.Module):
    """The network of the theory: ``f(x) = sum_s a_s sum_j G_j^s sum_r relu(<w_r^s, x_j>)``."""

    def __init__(self, task: TwoPatterns, dimension: int, generator: torch.Generator) -> None:
        super().__init__()
        scale = 1 / math.sqrt(dimension)
        router = torch.randn(task.experts, dimension, generator=generator) * scale
        neurons = torch.randn(task.experts, task.neurons, dimension, generator=generator)
        self.router = nn.Parameter(router)
        self.neurons = nn.Parameter(neurons * scale / task.neurons)
        sign = torch.ones(task.experts)
        sign[1::2] = -1
        self.register_buffer("sign", sign)
        self.chosen = task.chosen
        self.sign: Tensor

    def forward(self, patterns_Bn: Tensor) -> Tensor:
        """Return the score of each input, ``(B,)``; its sign is the class."""
        gates_kBl, places_kBl = self.gates(patterns_Bn)
        picked_kBl = patterns_Bn.expand(len(gates_kBl), -1, -1).gather(2, places_kBl)
        expert_k = torch.arange(len(gates_kBl))[:, None, None]
        active_kBl = self.neurons.transpose(1, 2)[expert_k, picked_kBl].relu().sum(dim=3)
        return (self.sign[:, None] * (gates_kBl * active_kBl).sum(dim=2)).sum(dim=0)

    def gates(self, patterns_Bn: Tensor) -> tuple[Tensor, Tensor]:
        """Return gates and places of the tokens that each expert chooses, ``(k, B, l)``."""
        logits_kBn = self.router[:, patterns_Bn]
        top_kBl, places_kBl = logits_kBn.topk(self.chosen, dim=2)
        return torch.softmax(top_kBl, dim=2), places_kBl

    def without(self, dropped: Tensor) -> ExpertChoiceLayer:
        """Return a copy without some experts; with expert choice the others stay as they are."""
        kept = torch.ones(len(self.sign), dtype=torch.bool)
        kept[dropped] = False
        twin = ExpertChoiceLayer.__new__(ExpertChoiceLayer)
        nn.Module.__init__(twin)
        twin.router = nn.Parameter(self.router.detach()[kept].clone())
        twin.neurons = nn.Parameter(self.neurons.detach()[kept].clone())
        twin.register_buffer("sign", self.sign[kept])
        twin.chosen = self.chosen
        return twin


def draw(
    task: TwoPatterns, dimension: int, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return patterns ``(count, n)`` and classes +-1 ``(count,)``."""
    size = (count, task.tokens)
    patterns = torch.randint(RELEVANT, dimension, size, generator=generator)
    positive = torch.randint(0, 2, (count,), generator=generator)
    place = torch.randint(0, task.tokens, (count, 1), generator=generator)
    patterns.scatter_(1, place, 1 - positive[:, None])
    return patterns, positive * 2.0 - 1


def train(
    layer: ExpertChoiceLayer, task: TwoPatterns, dimension: int, generator: torch.Generator
) -> None:
    """Take ``task.steps`` steps of SGD on fresh inputs, in place."""
    groups = [
        {"params": [layer.neurons], "lr": task.expert_rate},
        {"params": [layer.router], "lr": task.router_rate},
    ]
    optimizer = torch.optim.SGD(groups)
    for _ in range(task.steps):
        patterns_Bn, classes_B = draw(task, dimension, task.batch, generator)
        loss = (1 - classes_B * layer(patterns_Bn)).clamp(min=0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@torch.no_grad()
def accuracy(
    layer: ExpertChoiceLayer, task: TwoPatterns, dimension: int, generator: torch.Generator
) -> float:
    """Return the share of 2,000 fresh inputs whose class is found; a score of 0 finds none."""
    patterns_Bn, classes_B = draw(task, dimension, 2000, generator)
    return float((layer(patterns_Bn).sign() == classes_B).float().mean())


@torch.no_grad()
def proficiency(
    layer: ExpertChoiceLayer, task: TwoPatterns, dimension: int, generator: torch.Generator
) -> Tensor:
    """Return, per expert, how often the pattern of its own class reaches it with gate >= 1/l.

    Shape ``(k,)``, in [0, 1]; ``p_v^(s)`` of the paper, for the class that the expert votes for.
    """
    patterns_Bn, classes_B = draw(task, dimension, 2000, generator)
    gates_kBl, places_kBl = layer.gates(patterns_Bn)
    picked_kBl = patterns_Bn.expand(len(gates_kBl), -1, -1).gather(2, places_kBl)
    deciding_kBl = (picked_kBl < RELEVANT) & (gates_kBl >= 1 / task.chosen)
    reached_kB = deciding_kBl.any(dim=2)
    own_kB = layer.sign[:, None] == classes_B
    return (reached_kB & own_kB).sum(dim=1) / own_kB.sum(dim=1)
