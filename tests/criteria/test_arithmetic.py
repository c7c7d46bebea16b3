"""Each criterion on three experts, worked out by hand.

Four tokens, two experts per token; (gate, output norm) of every slot:

    token  expert 0     expert 1     expert 2
    0      .75, 2       .25, 4
    1      .50, 6       .50, 8
    2      .60, 4       .40, 3
    3      .90, 8                    .10, 10
"""

import math

import pytest
import torch

from lit_moe.criteria import Evidence, get_criterion, score
from lit_moe.criteria.weights import frobenius_norms, mean_over_rms
from lit_moe.stats.observation import LayerStats, Observation
from lit_moe.testing import tiny_moe


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


STATS = LayerStats(
    tokens=4,
    count=f64(4, 3, 1),
    gate_sum=f64(2.75, 1.15, 0.1),
    probability_sum=f64(2.2, 1.2, 0.6),
    norm_sum=f64(20, 15, 10),
    weighted_norm_sum=f64(14.1, 6.2, 1.0),
    squared_norm_sum=f64(120, 89, 100),
    max_abs=f64(5, 6, 7),
)
OBSERVATION = Observation({"mlp": STATS})

ROUTED = {
    "frequency": (1.0, 0.75, 0.25),
    "soft_count": (2.2, 1.2, 0.6),
    "gate_sum": (2.75, 1.15, 0.1),
    "ean_sum": (20.0, 15.0, 10.0),
    "ean_mean": (5.0, 5.0, 10.0),
    "man": (5.0, 5.0, 10.0),
    "msan": (30.0, 89 / 3, 100.0),
    "weighted_ean_sum": (14.1, 6.2, 1.0),
    "reap": (3.525, 6.2 / 3, 1.0),
}


@pytest.mark.parametrize(("name", "expected"), ROUTED.items())
def test_routed_criterion_of_three_experts(name, expected):
    torch.testing.assert_close(
        score(OBSERVATION, name)["mlp"], f64(*expected), rtol=1e-15, atol=0.0
    )


@pytest.mark.parametrize("name", ["reap", "ean_mean", "man", "msan"])
def test_mean_over_no_tokens_is_zero(name):
    unused = LayerStats(4, f64(4, 0), *[f64(8, 0)] * 6)
    assert score(Observation({"mlp": unused}), name)["mlp"].tolist() == [2.0, 0.0]


# Six weights per expert: gate (1, 2), up (1, 2), down (2, 1).
WEIGHTS = {
    "gate": torch.tensor([[[3.0, 0.0]], [[1.0, -1.0]], [[0.0, 0.0]]]),
    "up": torch.tensor([[[0.0, -4.0]], [[1.0, 1.0]], [[12.0, 0.0]]]),
    "down": torch.tensor([[[0.0], [0.0]], [[-1.0], [1.0]], [[0.0], [0.0]]]),
    "up_bias": torch.full((3, 1), 100.0),
}


def test_frobenius_norm_of_three_experts_ignores_biases():
    torch.testing.assert_close(
        frobenius_norms(WEIGHTS), f64(5.0, math.sqrt(6), 12.0), rtol=1e-15, atol=0.0
    )


def test_mean_over_rms_of_three_experts():
    # 7/6 over sqrt(25/6), 1 over 1, 2 over sqrt(144/6)
    expected = f64(7 / (5 * math.sqrt(6)), 1.0, 1 / math.sqrt(6))
    torch.testing.assert_close(mean_over_rms(WEIGHTS), expected, rtol=1e-15, atol=0.0)


def test_mean_over_rms_of_zeros_is_one():
    assert mean_over_rms({"up": torch.zeros(1, 2, 2)}).tolist() == [1.0]


def test_experts_without_a_gate_are_scored_over_two_matrices():
    two = {key: WEIGHTS[key] for key in ("up", "down")}
    assert frobenius_norms(two).tolist() == [4.0, 2.0, 12.0]


@pytest.fixture
def model():
    """Three experts per layer; those of layer 0 hold the weights above."""
    model = tiny_moe(
        "mixtral", num_experts=3, hidden_size=2, intermediate_size=1, num_hidden_layers=1
    )
    block = model.model.layers[0].mlp
    gate_up = torch.cat([WEIGHTS["gate"], WEIGHTS["up"]], dim=1)
    block.experts.gate_up_proj.data.copy_(gate_up)
    block.experts.down_proj.data.copy_(WEIGHTS["down"])
    block.gate.weight.data.copy_(torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, -2.0]]))
    return model


@pytest.mark.parametrize(
    ("name", "init_args", "expected"),
    [
        ("weight_norm", {}, (5.0, math.sqrt(6), 12.0)),
        ("weight_norm", {"keep": "smallest"}, (-5.0, -math.sqrt(6), -12.0)),
        ("router_norm", {}, (-5.0, -1.0, -2.0)),
        ("router_norm", {"keep": "largest"}, (5.0, 1.0, 2.0)),
        ("aimer", {}, (-7 / (5 * math.sqrt(6)), -1.0, -1 / math.sqrt(6))),
    ],
)
def test_weight_criterion_of_three_experts(model, name, init_args, expected):
    (scores,) = score(model, get_criterion(name, **init_args)).values()
    torch.testing.assert_close(scores, f64(*expected), rtol=1e-14, atol=0.0)


def test_random_scores_depend_on_seed_and_name_of_the_layer_only():
    stats = {"a": STATS, "b": STATS}
    scores = score(Observation(stats), "random", seed=3)
    swapped = score(Observation(dict(reversed(stats.items()))), "random", seed=3)
    assert all(torch.equal(scores[name], swapped[name]) for name in stats)
    assert torch.equal(score(Observation({"b": STATS}), "random", seed=3)["b"], scores["b"])
    assert not torch.equal(scores["a"], scores["b"])
    assert not torch.equal(score(Observation(stats), "random", seed=4)["a"], scores["a"])


def test_random_scores_are_the_same_on_every_machine():
    expected = f64(0.018591267072, 0.363285205171, 0.208194869532)
    scores = get_criterion("random").scores(Evidence(observation=OBSERVATION))["mlp"]
    torch.testing.assert_close(scores, expected, rtol=0.0, atol=1e-12)
