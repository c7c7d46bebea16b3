"""Optimal brain surgeon on experts: the arithmetic against brute force, and the criterion."""

import pytest
import torch

from lit_moe.criteria import get_criterion, score
from lit_moe.criteria.obs import OBS
from lit_moe.criteria.surgeon import Removal, as_scores, eliminate, eliminate_alone
from lit_moe.errors import LitMoEError
from lit_moe.testing import example_inputs, run_distributed, tiny_moe

EXPERTS, WIDTH, HIDDEN = 5, 3, 4


@pytest.fixture
def layer():
    """Second moments of 5 experts with 3 features each, and their weights."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(40, EXPERTS * WIDTH, generator=generator, dtype=torch.float64)
    features[:, 6:9] = features[:, 0:3] + 0.1 * features[:, 6:9]  # experts 0 and 2 are alike
    weights = torch.randn(EXPERTS, WIDTH, HIDDEN, generator=generator, dtype=torch.float64)
    return features.T @ features, weights


def least_cost(matrix, weights, removed, penalty):
    """Squared error of the best weights that are zero for the removed experts."""
    rows = torch.arange(EXPERTS * WIDTH)
    gone = torch.isin(rows // WIDTH, torch.tensor(removed))
    full = matrix + penalty * torch.eye(len(matrix), dtype=matrix.dtype)
    change = torch.zeros(len(matrix), HIDDEN, dtype=matrix.dtype)
    change[gone] = -weights.reshape(-1, HIDDEN)[gone]
    if not gone.all():
        right = -full[~gone][:, gone] @ change[gone]
        change[~gone] = torch.linalg.solve(full[~gone][:, ~gone], right)
    return float((change * (full @ change)).sum())


def test_costs_are_those_of_the_best_weights_without_the_experts(layer):
    removals = eliminate(layer[0], layer[1], penalty=0.5)
    total = 0.0
    for step, (_, cost) in enumerate(removals):
        total += cost
        removed = [r.expert for r in removals[: step + 1]]
        assert total == pytest.approx(least_cost(layer[0], layer[1], removed, 0.5), rel=1e-9)


def test_the_cheapest_expert_goes_first_at_every_step(layer):
    removals = eliminate(layer[0], layer[1], penalty=0.5)
    gone: list[int] = []
    for expert, _ in removals:
        left = [e for e in range(EXPERTS) if e not in gone]
        costs = {e: least_cost(layer[0], layer[1], [*gone, e], 0.5) for e in left}
        assert expert == min(costs, key=lambda e: costs[e])
        gone.append(expert)


def test_of_two_experts_alike_one_is_cheap_and_then_the_other_is_dear(layer):
    removals = eliminate(layer[0], layer[1], penalty=1e-3)
    blocks, weights = as_blocks(layer)
    alone = dict(eliminate_alone(blocks, weights, penalty=1e-3))
    first, other = [r for r in removals if r.expert in (0, 2)]
    assert removals[0] == first
    assert first.cost < 0.1 * alone[first.expert]
    assert other.cost > 0.5 * alone[other.expert]


def as_blocks(layer):
    matrix, weights = layer
    blocks = [matrix[i : i + WIDTH, i : i + WIDTH] for i in range(0, len(matrix), WIDTH)]
    return torch.stack(blocks), weights


def test_alone_an_expert_costs_its_own_energy(layer):
    blocks, weights = as_blocks(layer)
    for expert, cost in eliminate_alone(blocks, weights, penalty=0.25):
        own = blocks[expert] + 0.25 * torch.eye(WIDTH, dtype=torch.float64)
        energy = torch.trace(weights[expert].T @ own @ weights[expert])
        assert cost == pytest.approx(float(energy), rel=1e-12)


def test_scores_follow_the_order_even_where_a_later_step_is_cheaper():
    scores = as_scores([Removal(2, 1.0), Removal(0, 5.0), Removal(1, 3.0)])
    assert scores.argsort().tolist() == [2, 0, 1]
    assert scores[1] == pytest.approx(5.0)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "switch_transformers"])
def test_families_are_scored_layer_by_layer(family):
    model = tiny_moe(family)
    criterion = OBS()
    scores = score(model, criterion, batches=[example_inputs(model)])
    assert set(criterion.curves_) == set(scores)
    for name, removals in criterion.curves_.items():
        assert sorted(r.expert for r in removals) == list(range(len(scores[name])))
        assert all(r.cost >= 0 for r in removals)


def test_several_passes_over_the_text_give_the_same_scores():
    model = tiny_moe("mixtral")
    batches = [example_inputs(model)]
    whole = score(model, OBS(joint=False), batches=batches)
    layer_bytes = 8 * model.config.num_local_experts * model.config.intermediate_size**2
    parts = score(model, OBS(joint=False, memory_gib=3.5 * layer_bytes / 2**30), batches=batches)
    for name, values in whole.items():
        torch.testing.assert_close(parts[name], values, rtol=0, atol=0)


def test_without_room_for_the_joint_matrix_each_expert_counts_alone():
    model = tiny_moe("mixtral")
    batches = [example_inputs(model)]
    small = OBS(memory_gib=1e-6)
    alone = score(model, OBS(joint=False), batches=batches)
    for name, values in score(model, small, batches=batches).items():
        torch.testing.assert_close(values, alone[name], rtol=0, atol=0)
    with pytest.raises(LitMoEError, match=r"needs .* GiB, memory_gib is 1e-06: raise it"):
        score(model, OBS(joint=True, memory_gib=1e-6), batches=batches)


def test_two_ranks_with_half_the_rows_each_score_as_one():
    inputs = example_inputs(tiny_moe("mixtral"), batch=4)

    def scores(rank):
        mine = {k: v[rank::2] for k, v in inputs.items()}
        return score(tiny_moe("mixtral"), "obs", batches=[mine])

    alone = score(tiny_moe("mixtral"), "obs", batches=[inputs])
    for found in run_distributed(scores):
        for name, values in alone.items():
            torch.testing.assert_close(found[name], values, rtol=1e-4, atol=0)


@pytest.mark.parametrize("option", ["lam", "memory_gib"])
def test_impossible_options_are_refused(option):
    with pytest.raises(LitMoEError, match=f"obs: {option}=0 must be positive"):
        get_criterion("obs", **{option: 0})
