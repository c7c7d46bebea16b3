"""From an observation or a model to scores: the second of the five lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lit_moe.adapters import find_sites
from lit_moe.criteria.base import Criterion, Evidence
from lit_moe.criteria.registry import get_criterion
from lit_moe.errors import LitMoEError
from lit_moe.stats.gradient_stats import GradientObservation
from lit_moe.stats.observation import Observation


def score(
    observation_or_model: Observation | GradientObservation | PreTrainedModel,
    criterion: str | Criterion,
    *,
    model: PreTrainedModel | None = None,
    keep: Mapping[str, int] | int | None = None,
    batches: Iterable[Mapping[str, Any]] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return layer name -> score of each routed expert; a higher score means keep.

    Args:
        observation_or_model: what ``lit_moe.observe`` returned, for criteria of routing and
            activations; what ``lit_moe.stats.observe_gradients`` returned, for those of gradients;
            a model, for criteria of weights.
        criterion: short name (see ``lit_moe.criteria.available()``), class path, or instance.
        model: the model, if the first argument is an observation and the criterion wants both.
        keep: experts that will stay, per layer or for all; only for criteria that rate subsets.
        batches: keyword arguments of the model; only for criteria that run it, or that take
            gradients of it which are not given.
        seed: of every random choice.

    Returns:
        Tensors of shape ``(E,)``, float64, on the CPU, without NaN.

    Raises:
        LitMoEError: if the criterion is unknown, lacks what it needs, or scores something NaN.
    """
    evidence = _evidence(observation_or_model, model)
    if isinstance(keep, int):
        keep = dict.fromkeys(evidence.num_experts, keep)
    evidence = replace(evidence, batches=batches, keep=keep, seed=seed)
    return score_evidence(get_criterion(criterion), evidence)


def score_evidence(criterion: Criterion, evidence: Evidence) -> dict[str, Tensor]:
    """Return what :func:`score` does, from evidence that is already gathered.

    Raises:
        LitMoEError: if the criterion lacks what it needs, or scores something NaN.
    """
    scores = criterion.scores(evidence)
    _check_scores(scores, evidence.num_experts, criterion.name)
    return scores


def _evidence(
    given: Observation | GradientObservation | PreTrainedModel, model: PreTrainedModel | None
) -> Evidence:
    if not isinstance(given, Observation | GradientObservation | PreTrainedModel):
        raise LitMoEError(
            f"score() takes an Observation (from lit_moe.observe) or a model, "
            f"not {type(given).__name__}"
        )
    observation = given if isinstance(given, Observation) else None
    gradients = given if isinstance(given, GradientObservation) else None
    model = given if isinstance(given, PreTrainedModel) else model
    sites = find_sites(model) if model is not None else ()
    return Evidence(observation=observation, gradients=gradients, model=model, sites=sites)


def _check_scores(
    scores: Mapping[str, Tensor], num_experts: Mapping[str, int], criterion: str
) -> None:
    for layer, num in num_experts.items():
        values = scores.get(layer)
        if values is None or values.shape != (num,) or values.dtype != torch.float64:
            found = None if values is None else (tuple(values.shape), values.dtype)
            raise LitMoEError(
                f"criterion {criterion!r} must return float64 scores of shape ({num},) for "
                f"layer {layer!r}, but returned {found}"
            )
        if values.isnan().any():
            ids = values.isnan().nonzero().flatten().tolist()
            raise LitMoEError(f"criterion {criterion!r} scored experts {ids} of {layer!r} NaN")
