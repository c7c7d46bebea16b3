"""Turns mixed routers into plain ones: router rows whose choices come close to mixed probabilities.

A router that mixes probabilities (EEP) needs code of its own wherever the model is loaded. Its
nearest plain router has N rows, each a combination of the E old rows; which one is a convex problem
on the old router's logits: the targets are the mixed probabilities, negative ones counted as none.

T tokens, E experts before, N experts after.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from lit_moe.adapters import MoEAdapter, MoESite, adapter_for, find_sites
from lit_moe.errors import CalibrationError
from lit_moe.inference import evaluating, run_body
from lit_moe.merge_plan import MergePlan
from lit_moe.mixed_routing import Mixing
from lit_moe.mixing import mixings
from lit_moe.refit.collective import all_sum
from lit_moe.stats.observe import failing_together, model_inputs

_PENALTY = 1e-6
_STEPS = 100


@dataclass(frozen=True)
class ProjectionLoss:
    """What the plain router of one layer loses against the mixed one, on calibration tokens.

    Attributes:
        divergence: mean Kullback-Leibler divergence of the experts' shares, in nats per token; for
            sigmoid routers the sum over experts of the divergence of each probability.
        divergence_of_likeness: the same for the row of the old expert that counts most in each
            new one, which is what the projection starts from.
        other_choices: fraction of tokens, in [0, 1], that go to other experts, selection biases
            aside.
        tokens: that were looked at.
    """

    divergence: float
    divergence_of_likeness: float
    other_choices: float
    tokens: int


def project_routers(
    model: PreTrainedModel,
    plan: MergePlan,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    max_tokens: int = 8192,
) -> tuple[MergePlan, dict[str, ProjectionLoss]]:
    """Return the plan with router maps that act on rows, and what that costs per layer.

    Collective: every rank calls it with its own batches, and all get the same plan.

    Args:
        model: before the merge; left as it was.
        plan: one whose router maps act on probabilities.
        batches: dictionaries with ``input_ids`` and optionally ``attention_mask``, ``(B, S)``.
        max_tokens: of each rank, that the rows are fitted on.

    Raises:
        PlanError: if the plan is for another model, or its routers cannot be mixed.
        CalibrationError: if there are no tokens.
    """
    if plan.router_space == "rows":
        return plan, {}
    sites = find_sites(model)
    plan.check_fits({s.name: s.num_experts for s in sites}, family=model.config.model_type)
    how = mixings(model)
    seen = _router_logits(model, sites, batches, max_tokens)
    rows, losses = {}, {}
    for site in sites:
        top_k = plan.top_k or site.top_k
        rows[site.name], losses[site.name] = _projected(
            how[site.name], plan.routers[site.name], seen[site.name], top_k
        )
    return replace(plan, routers=rows, router_space="rows"), losses


def _projected(
    how: Mixing, map_NE: Tensor, logits_TE: Tensor, top_k: int
) -> tuple[Tensor, ProjectionLoss]:
    is_softmax = how.routing == "softmax"
    probs_TE = logits_TE.softmax(-1) if is_softmax else logits_TE.sigmoid()
    mixed_TN = (probs_TE @ map_NE.T).clamp(0, None if is_softmax else 1)
    target_TN = mixed_TN
    if is_softmax:
        target_TN = mixed_TN / mixed_TN.sum(-1, keepdim=True).clamp(min=1e-30)
    start_NE = F.one_hot(map_NE.argmax(1), map_NE.shape[1]).double()
    loss_of = _SoftmaxLoss(target_TN) if is_softmax else _SigmoidLoss(target_TN)
    rows_NE = _fitted(loss_of, logits_TE, start_NE)
    chosen = (logits_TE @ rows_NE.T).topk(top_k).indices.sort(-1).values
    asked = mixed_TN.topk(top_k).indices.sort(-1).values
    others = all_sum((chosen != asked).any(-1).sum().double())
    tokens = all_sum(torch.tensor(float(len(logits_TE)), dtype=torch.float64))
    return rows_NE, ProjectionLoss(
        divergence=float(_mean(loss_of, logits_TE, rows_NE)),
        divergence_of_likeness=float(_mean(loss_of, logits_TE, start_NE)),
        other_choices=float(others / tokens),
        tokens=int(tokens),
    )


class _SoftmaxLoss:
    """Sum over tokens of the divergence between target shares and a softmax of logits."""

    def __init__(self, target_TN: Tensor) -> None:
        self._target_TN = target_TN
        self._entropy = torch.special.entr(target_TN).sum()

    def __call__(self, logits_TN: Tensor) -> Tensor:
        return -(self._target_TN * logits_TN.log_softmax(-1)).sum() - self._entropy


class _SigmoidLoss:
    """Sum over tokens and experts of the divergence between two probabilities."""

    def __init__(self, target_TN: Tensor) -> None:
        self._target_TN = target_TN
        self._entropy = (torch.special.entr(target_TN) + torch.special.entr(1 - target_TN)).sum()

    def __call__(self, logits_TN: Tensor) -> Tensor:
        cross = F.binary_cross_entropy_with_logits(logits_TN, self._target_TN, reduction="sum")
        return cross - self._entropy


def _mean(loss_of: _SoftmaxLoss | _SigmoidLoss, logits_TE: Tensor, rows_NE: Tensor) -> Tensor:
    """Collective: return the loss per token of all ranks."""
    total = torch.stack([loss_of(logits_TE @ rows_NE.T), logits_TE.new_tensor(len(logits_TE))])
    total = all_sum(total.detach())
    return total[0] / total[1]


def _fitted(loss_of: _SoftmaxLoss | _SigmoidLoss, logits_TE: Tensor, start_NE: Tensor) -> Tensor:
    """Return the coefficients of the old rows; a small penalty holds them near the start."""
    rows_NE = nn.Parameter(start_NE.clone())
    tokens = float(all_sum(torch.tensor(float(len(logits_TE)), dtype=torch.float64)))
    solver = torch.optim.LBFGS([rows_NE], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def closure() -> float:
        with torch.enable_grad():
            loss = loss_of(logits_TE @ rows_NE.T)
            (gradient,) = torch.autograd.grad(loss, rows_NE)
        both = all_sum(torch.cat([gradient.flatten(), loss.detach().reshape(1)])) / tokens
        moved = rows_NE.detach() - start_NE
        rows_NE.grad = both[:-1].reshape(rows_NE.shape) + 2 * _PENALTY * moved
        return float(both[-1] + _PENALTY * moved.square().sum())

    solver.step(closure)
    return rows_NE.detach()


def _router_logits(
    model: PreTrainedModel,
    sites: tuple[MoESite, ...],
    batches: Iterable[Mapping[str, Tensor]],
    max_tokens: int,
) -> dict[str, Tensor]:
    """Return MoE layer name -> logits of the old experts, shape ``(T, E)``, float64."""
    watched = _Watched(model, sites)
    try:
        with evaluating(model), failing_together():
            for batch in batches:
                if watched.tokens >= max_tokens:
                    break
                inputs = model_inputs(batch, model.device)
                watched.mask = inputs.get("attention_mask")
                run_body(model, inputs)
            if not watched.tokens:
                raise CalibrationError(
                    "projecting mixed routers onto rows needs calibration text, but there are no "
                    "tokens"
                )
    finally:
        watched.remove()
    return {name: torch.cat(pieces)[:max_tokens] for name, pieces in watched.pieces.items()}


class _Watched:
    """Keeps the router logits of real tokens while the model runs."""

    def __init__(self, model: PreTrainedModel, sites: tuple[MoESite, ...]) -> None:
        adapter = adapter_for(model.config)
        self.mask: Tensor | None = None
        self.pieces: dict[str, list[Tensor]] = {site.name: [] for site in sites}
        self._handles = [
            model.get_submodule(site.router).register_forward_hook(self._keep(adapter, site))
            for site in sites
        ]

    @property
    def tokens(self) -> int:
        """Tokens that the first router has seen."""
        return sum(len(piece) for piece in next(iter(self.pieces.values())))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _keep(self, adapter: MoEAdapter, site: MoESite) -> Callable[..., None]:
        def keep(_: nn.Module, __: object, output: object) -> None:
            logits = adapter.router_logits(output)
            logits_TE = logits.reshape(-1, logits.shape[-1])[:, : site.num_experts]
            if self.mask is not None and self.mask.numel() == len(logits_TE):
                logits_TE = logits_TE[self.mask.reshape(-1).bool()]
            self.pieces[site.name].append(logits_TE.double().cpu())

        return keep
