"""The neurons of a gated MLP, sorted into a shared part and balanced clusters, and a router.

A neuron is a row of the gate and up projections with its column of the down projection. Relatives:
MoEfication (Zhang et al., arXiv 2110.01786), LLaMA-MoE (Zhu et al., arXiv 2406.16554).

T tokens, D hidden, N neurons, E experts, W neurons per expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

GATE_DEVIATION = 1e-4
"""Root mean square of gate - 1. Smaller is nearer to a sum of experts, but the scores that choose
the experts are fp32 numbers near 0.5, 6e-8 apart: at 1e-4 the choice is a tie for 0.4 % of the
tokens of SmolLM2's layers, at 1e-5 for 3 %."""

_RIDGE = 0.1
_PROFILE_TOKENS = 2048
_LLOYD_STEPS = 15
_SIGMOID_SLOPE = 0.25


@dataclass(frozen=True)
class GatedMLP:
    """The three matrices of a bias-free gated MLP in fp32, and what its neurons do.

    Attributes:
        gate: shape ``(N, D)``.
        up: shape ``(N, D)``.
        down: shape ``(D, N)``.
        activation: applied to the gate.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    activation: nn.Module

    def activations(self, x_TD: Tensor) -> Tensor:
        """Return ``a = act(W_gate x) * (W_up x)``, shape ``(T, N)``."""
        activated: Tensor = self.activation(x_TD @ self.gate.T)
        return activated * (x_TD @ self.up.T)

    def contributions(self, activations_TN: Tensor) -> Tensor:
        """Return the length of what each neuron adds to the stream, ``|a_i| * ||d_i||``."""
        return activations_TN.abs() * self.down.norm(dim=0)

    def output_norms(self, activations_TN: Tensor, expert_EW: Tensor) -> Tensor:
        """Return the length of what each group of neurons adds together, shape ``(T, E)``."""
        norms = [
            (activations_TN[:, ids_W] @ self.down[:, ids_W].T).norm(dim=1) for ids_W in expert_EW
        ]
        return torch.stack(norms, dim=1)


@dataclass(frozen=True)
class Partition:
    """Which neuron goes where; every neuron is in exactly one place, ids ascend in each.

    Attributes:
        shared: neurons that every token uses, shape ``(S,)``.
        experts: neurons of each expert, shape ``(E, W)``.
    """

    shared: Tensor
    experts: Tensor


def partition_neurons(
    contribution_TN: Tensor, *, num_experts: int, num_shared: int, generator: torch.Generator
) -> Partition:
    """Put the strongest neurons in the shared part and cluster the others by co-activation.

    Args:
        contribution_TN: length of what each neuron added for each token.
        num_experts: clusters, all equally large; must divide ``N - num_shared``.
        num_shared: neurons with the largest mean contribution that every token uses.
        generator: chooses the tokens of the profiles and the first centres.
    """
    order = contribution_TN.mean(dim=0).argsort(descending=True, stable=True)
    shared, rest = order[:num_shared].sort().values, order[num_shared:].sort().values
    num_tokens = contribution_TN.shape[0]
    sample = torch.randperm(num_tokens, generator=generator)[:_PROFILE_TOKENS]
    profile_NT = contribution_TN[sample][:, rest].T.contiguous()
    cluster_N = balanced_clusters(profile_NT, num_experts, generator=generator)
    return Partition(shared, torch.stack([rest[cluster_N == e] for e in range(num_experts)]))


def balanced_clusters(
    profile_NT: Tensor, num_clusters: int, *, generator: torch.Generator
) -> Tensor:
    """Return the cluster of each row: k-means whose clusters are equally large.

    Lloyd steps from k-means++ centres; rows are assigned by increasing distance to the nearest
    centre that has room. Stops when the squared distances no longer fall.

    Args:
        profile_NT: one row per neuron; ``num_clusters`` must divide the rows.
        num_clusters: how many.
        generator: chooses the first centres.

    Returns:
        Shape ``(N,)``, int64, each cluster ``N / num_clusters`` times.
    """
    centres = _spread_rows(profile_NT, num_clusters, generator)
    best, best_cost = torch.empty(0), float("inf")
    for _ in range(_LLOYD_STEPS):
        cluster_N = _assign_evenly(torch.cdist(profile_NT, centres))
        member_EN = nn.functional.one_hot(cluster_N, num_clusters).T.to(profile_NT)
        centres = member_EN @ profile_NT * (num_clusters / len(profile_NT))
        cost = float((profile_NT - centres[cluster_N]).square().sum())
        if cost >= best_cost:
            break
        best, best_cost = cluster_N, cost
    return best


def fit_router(x_TD: Tensor, norm_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Fit a sigmoid router that picks the experts with the largest output and weighs all by 1.

    Ridge regression of ``norm`` on ``x`` with an intercept gives rows ``w_e`` and offsets ``b_e``;
    what is the same for all experts is taken out, since it decides nothing. With a small ``eps``

        ``2 sigmoid(eps w_e x) = 1 + O(eps)``   and   ``sigmoid(eps w_e x) + eps b_e / 4``

    is in the order of ``w_e x + b_e``: the first is the gate, the second chooses.

    Args:
        x_TD: inputs of the MLP.
        norm_TE: length of each expert's output.

    Returns:
        Router rows ``(E, D)`` and selection biases ``(E,)``, fp32, for a router with
        ``routed_scaling_factor`` 2.
    """
    mean_D, mean_E = x_TD.mean(dim=0), norm_TE.mean(dim=0)
    x_TD, norm_TE = (x_TD - mean_D).double(), (norm_TE - mean_E).double()
    gram_DD = x_TD.T @ x_TD
    gram_DD.diagonal().add_(_RIDGE * gram_DD.diagonal().mean() + torch.finfo(torch.float32).tiny)
    row_DE = torch.linalg.solve(gram_DD, x_TD.T @ norm_TE)
    row_DE -= row_DE.mean(dim=1, keepdim=True)
    logit_TE = (x_TD + mean_D) @ row_DE
    bias_E = mean_E - mean_E.mean() - mean_D.double() @ row_DE
    eps = 2 * GATE_DEVIATION / logit_TE.square().mean().sqrt().clamp_min(1e-12)
    return (eps * row_DE.T).float(), (eps * _SIGMOID_SLOPE * bias_E).float()


def _spread_rows(row_NT: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return rows far from each other (k-means++; Arthur and Vassilvitskii 2007)."""
    chosen = torch.randint(len(row_NT), (1,), generator=generator)
    square_N = torch.full((len(row_NT),), float("inf"), dtype=torch.float64)
    while len(chosen) < count:
        from_last_N = (row_NT - row_NT[chosen[-1]]).square().sum(dim=1)
        square_N = square_N.minimum(from_last_N.double().cpu())
        weight_N = square_N + torch.finfo(torch.float32).tiny
        chosen = torch.cat([chosen, torch.multinomial(weight_N, 1, generator=generator)])
    return row_NT[chosen]


def _assign_evenly(distance_NE: Tensor) -> Tensor:
    """Return the cluster of each row: nearest pairs first, a full cluster takes no more."""
    num_rows, num_clusters = distance_NE.shape
    room = [num_rows // num_clusters] * num_clusters
    cluster = [-1] * num_rows
    for pair in distance_NE.flatten().argsort(stable=True).tolist():
        row, candidate = divmod(pair, num_clusters)
        if cluster[row] < 0 and room[candidate]:
            cluster[row] = candidate
            room[candidate] -= 1
    return torch.tensor(cluster, device=distance_NE.device)
