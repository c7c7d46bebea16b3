"""Coefficients that are learned: gradient descent on what the merged layer gets wrong.

E experts, N groups.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_moe.adapters import MoESite, find_sites
from lit_moe.criteria.replay import BlockCall
from lit_moe.errors import LitMoEError, NoEffectWarning, UnsupportedModelError
from lit_moe.grouping.captures import calls_of_layers
from lit_moe.grouping.coefficients import weighted_map
from lit_moe.grouping.inputs import Batch, check_text, first_rows, of_all_ranks, rank_and_world_size
from lit_moe.grouping.merged_layer import Kind, MergedLayer, outline_of, summed
from lit_moe.grouping.mixed_text import pairs_of
from lit_moe.grouping.partition import Groups
from lit_moe.inference import evaluating

_JUDGED = 4  # every fourth row tells when to stop


@dataclass(frozen=True)
class LearnOptions:
    """Descent on the coefficients of one layer.

    Attributes:
        learning_rate: of SGD on logits of the coefficients; the loss is a fraction of the layer's
            energy.
        momentum: of SGD.
        epochs: at most; each is one step over all rows.
        patience: epochs without a better loss on the judged rows, after which it stops.
        mixed_rows: rows of mixed text per fitted row, see
            :func:`lit_moe.grouping.mixed_text.pairs_of`; the judged rows stay pure.
        mixing: concentration of the Beta distribution of the share of each row; the smaller, the
            purer. Read only where there are mixed rows.
    """

    learning_rate: float = 3.0
    momentum: float = 0.9
    epochs: int = 50
    patience: int = 5
    mixed_rows: int = 0
    mixing: float = 0.5

    def __post_init__(self) -> None:
        whole = isinstance(self.mixed_rows, int) and self.mixed_rows >= 0
        if not whole or not 0 < self.mixing < math.inf:
            raise LitMoEError(
                f"learned coefficients: mixed_rows={self.mixed_rows} must be a whole number from 0 "
                f"and mixing={self.mixing:g} positive"
            )
        for name in ("learning_rate", "epochs", "patience"):
            if not 0 < getattr(self, name) < math.inf:
                raise LitMoEError(f"learned coefficients: {name} must be positive")


@dataclass(frozen=True)
class Learned:
    """What was learned.

    Attributes:
        maps: layer name -> coefficients, shape ``(N, E)``, float64, rows >= 0 that sum to 1.
        tokens: of all ranks' rows that were fitted and judged, in the layer that saw most; without
            padding, and without mixed text, which is made of the same tokens.
    """

    maps: Mapping[str, Tensor]
    tokens: int


def learn_coefficients(
    model: PreTrainedModel,
    groups: Mapping[str, Groups],
    batches: Iterable[Batch],
    *,
    max_tokens: int,
    memory_gib: float,
    options: LearnOptions,
) -> Learned:
    """Return the coefficients of each layer's groups. Collective.

    Coefficients are a softmax over the members of a group, begin uniform, and minimise
    ``|| MoE(x) - merged(x) ||^2``, router rows merged alike, on the inputs of the unmerged model.
    Three rows of four are fitted; the coefficients with the least loss on the fourth win (arXiv
    2407.09590, which also learns a scale).

    Args:
        model: unmerged, stays as it is.
        groups: layer name -> groups, of every MoE layer.
        batches: this rank's rows.
        max_tokens: of all ranks.
        memory_gib: of each rank, for inputs and outputs of layers on its rows.
        options: of the descent.

    Raises:
        UnsupportedModelError: if the experts are modules of their own.
        CalibrationError: if the fitted rows or the judged ones are padding alone.
        LitMoEError: if there are fewer than four rows, or memory does not hold one layer's.
    """
    sites = find_sites(model)
    _check_family(model, sites)
    rows = [
        {k: v[i : i + 1] for k, v in batch.items()}
        for batch in first_rows(batches, max_tokens)
        for i in range(len(next(iter(batch.values()))))
    ]
    kinds = _kinds(len(rows))
    _check_rows(sites, rows, kinds)
    pairs = []
    if options.mixed_rows:
        per_row, mixing = options.mixed_rows, options.mixing
        pairs = pairs_of(rows, per_row=per_row, mixing=mixing, judged=_JUDGED)
        kinds += ["mixed"] * len(pairs)
    outline = outline_of(model, sites, {name: len(members) for name, members in groups.items()})
    found, tokens, by_name = {}, 0, {site.name: site for site in sites}
    for calls in calls_of_layers(model, sites, rows, pairs, memory_gib=memory_gib):
        for name in list(calls):
            with evaluating(model):
                layer = _layer(model, outline, by_name[name], calls.pop(name), kinds)
                found[name] = _descend(layer, _uniform(groups[name], model.device), options)
                tokens = max(tokens, sum(of_all_ranks(layer.num_tokens)))
            del layer  # before the next part is captured
    return Learned(found, tokens)


def _layer(
    model: PreTrainedModel,
    outline: PreTrainedModel,
    site: MoESite,
    calls: Sequence[BlockCall],
    kinds: Sequence[Kind],
) -> MergedLayer:
    if kinds and not calls:
        warnings.warn(
            f"{model.config.model_type} does not call {site.name} as one block, so that its "
            "coefficients stay uniform",
            NoEffectWarning,
            stacklevel=4,
        )
        kinds = ()
    return MergedLayer(model, outline, site, calls, kinds)


def _uniform(groups: Groups, device: torch.device) -> Tensor:
    return weighted_map(groups, torch.ones(sum(map(len, groups)))).to(device)


def _descend(layer: MergedLayer, start_NE: Tensor, options: LearnOptions) -> Tensor:
    member_NE = start_NE > 0
    logits_NE = nn.Parameter(torch.zeros_like(start_NE))
    descent = torch.optim.SGD([logits_NE], lr=options.learning_rate, momentum=options.momentum)
    best, best_loss, waited = start_NE, layer.loss(start_NE), 0
    for _ in range(options.epochs):
        with torch.enable_grad():
            map_NE = torch.softmax(logits_NE.masked_fill(~member_NE, float("-inf")), dim=1)
            descent.zero_grad()
            map_NE.backward(layer.gradient(map_NE))
        assert logits_NE.grad is not None
        logits_NE.grad = summed(logits_NE.grad)
        descent.step()
        map_NE = torch.softmax(logits_NE.detach().masked_fill(~member_NE, float("-inf")), dim=1)
        loss = layer.loss(map_NE)
        waited = 0 if loss < best_loss else waited + 1
        if loss < best_loss:
            best, best_loss = map_NE, loss
        if waited >= options.patience:
            break
    return best.clone().cpu()


def _kinds(num_rows: int) -> list[Kind]:
    """Return what becomes of each of this rank's rows, which are every ``world_size``-th."""
    rank, world_size = rank_and_world_size()
    is_judged = [(i * world_size + rank) % _JUDGED == _JUDGED - 1 for i in range(num_rows)]
    return ["judged" if judged else "fitted" for judged in is_judged]


def _check_family(model: PreTrainedModel, sites: Sequence[MoESite]) -> None:
    if not all(site.rows("expert") for site in sites):
        raise UnsupportedModelError(
            f"coefficients cannot be learned for {model.config.model_type}: each of its experts is "
            "a module of its own; take uniform or frequency"
        )
    tables = [site.name for site in sites if site.rows("id_table")]
    if tables:
        raise UnsupportedModelError(
            f"{tables[0]} chooses experts by a table of token ids, which cannot be merged; drop "
            "experts with a pruning callback instead"
        )


def _check_rows(sites: Sequence[MoESite], rows: Sequence[Batch], kinds: Sequence[Kind]) -> None:
    """Refuse too few rows, and rows without text. Collective, on all ranks alike."""
    total = sum(of_all_ranks(len(rows)))
    if total < _JUDGED:
        raise LitMoEError(
            f"learned coefficients need at least {_JUDGED} calibration rows, there are {total}; "
            "give more text or take uniform"
        )
    for kind in ("fitted", "judged"):
        mine = [row for row, its in zip(rows, kinds, strict=True) if its == kind]
        check_text(sites, mine, asked=f"coefficients='learned' ({kind} rows)")
