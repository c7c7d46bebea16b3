"""MC-Suite's sixteen on three experts, worked out by hand, in both directions.

Four tokens with ids 7, 7, 5, 9; two of the experts 0, 1, 2 per token; outputs of two entries:

    token  id  expert 0   expert 1   expert 2
    0      7   (3, 4)     (0, 2)
    1      7   (0, 1)     (4, 3)
    2      5   (0, 5)                (2, 0)
    3      9              (0, 1)     (1, 0)
"""

import math
from dataclasses import replace

import pytest
import torch

from lit_moe.adapters import find_sites
from lit_moe.criteria import Evidence, get_criterion, score
from lit_moe.criteria.direction import ranks_by_pairs
from lit_moe.criteria.mc_weights import stable_rank
from lit_moe.errors import LitMoEError
from lit_moe.stats import GradientObservation, GradientStats, LayerStats, Observation
from lit_moe.testing import example_inputs, tiny_moe


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


ZEROS = f64(0, 0, 0)
STATS = LayerStats(
    tokens=4,
    count=f64(3, 3, 2),
    gate_sum=ZEROS,
    probability_sum=ZEROS,
    norm_sum=ZEROS,
    weighted_norm_sum=ZEROS,
    squared_norm_sum=ZEROS,
    max_abs=ZEROS,
    pair_count=f64([3, 2, 1], [2, 3, 1], [1, 1, 2]),
    vocabulary_overlap=f64([2, 1, 1], [1, 2, 1], [1, 1, 2]),
    vocabulary_size=10,
    output_sum=f64([3, 10], [4, 6], [3, 0]),
    output_square_sum=f64([9, 42], [16, 14], [5, 0]),
    direction_sum=f64([0.6, 0.8 + 1 + 1], [0.8, 1 + 0.6 + 1], [2, 0]),
    outlier_count=f64(1, 0, 2),
)
# Mean directions: (0.2, 2.8/3), (0.8/3, 2.6/3), (1, 0).
SIMILAR = (0.16 / 3 + 2.8 * 2.6 / 9, 0.2, 0.8 / 3)  # of 01, 02, 12
# Per entry: mean square minus squared mean.
VARIANCES = ((3 - 1, 14 - 100 / 9), (16 / 3 - 16 / 9, 14 / 3 - 4), (2.5 - 2.25, 0.0))
EPS = 1e-12

GRADIENTS = GradientStats(
    gram=f64([4, 3, 0], [3, 9, 6], [0, 6, 16]),
    deviation=f64([1, math.e], [math.e, math.e], [1, 1]),
    outlier_count=f64(5, 1, 3),
    count=f64(1, 2, 1),
)

FORWARD = {
    "euf": (0.75, 0.75, 0.5),
    # The pair 01 is met most; both are used equally, so the higher id goes; then 02, and 2.
    "ecc": (2.0, 0.0, 1.0),
    "evtc": (0.2, 0.2, 0.2),
    # All pairs share one id: the least used member of all goes first.
    "ets": (2.0, 1.0, 0.0),
    "eas": (
        -(SIMILAR[0] + SIMILAR[1]),
        -(SIMILAR[0] + SIMILAR[2]),
        -(SIMILAR[1] + SIMILAR[2]),
    ),
    "eae": tuple(sum(math.log(math.sqrt(v) + EPS) for v in row) for row in VARIANCES),
    "eao": (1.0, 0.0, 2.0),
    "ean": (3 + math.sqrt(42), 4 + math.sqrt(14), math.sqrt(5)),
}
BACKWARD = {
    "egs": (-0.5, -(0.5 + 0.5), -0.5),
    "ege": (1.0, 2.0, 0.0),
    "ego": (5.0, 1.0, 3.0),
    "egn": (2.0, 3.0, 4.0),
}
# With the other extreme, pairs are another order, not the same one backwards: 02 or 12 is met
# least, and 2 is the least used; then 01, and 1.
OPPOSITE = {"ecc": (2.0, 1.0, 0.0), "ets": (2.0, 1.0, 0.0)}


def evidence_of(name):
    if name in BACKWARD:
        return GradientObservation({"mlp": GRADIENTS}, 4, 3), BACKWARD[name]
    return Observation({"mlp": STATS}), FORWARD[name]


@pytest.mark.parametrize("name", [*FORWARD, *BACKWARD])
def test_three_experts_by_hand(name):
    seen, expected = evidence_of(name)
    torch.testing.assert_close(score(seen, name)["mlp"], f64(*expected), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", [*FORWARD, *BACKWARD])
def test_the_opposite_direction_drops_the_other_extreme(name):
    seen, paper = evidence_of(name)
    expected = f64(*OPPOSITE[name]) if name in OPPOSITE else -f64(*paper)
    opposite = score(seen, get_criterion(name, direction="opposite"))["mlp"]
    torch.testing.assert_close(opposite, expected, rtol=1e-12, atol=1e-15)


def test_the_norm_per_token_does_not_reward_usage():
    (scores,) = score(Observation({"mlp": STATS}), get_criterion("ean", per_token=True)).values()
    expected = f64(*FORWARD["ean"]) / f64(3, 3, 2).sqrt()
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=0)


def test_entropy_of_fewer_than_two_tokens_is_the_least():
    few = replace(STATS, count=f64(3, 3, 1))
    scores = score(Observation({"mlp": few}), "eae")["mlp"]
    assert scores[2] == pytest.approx(2 * math.log(EPS))
    assert scores.argmin() == 2


@pytest.fixture
def model():
    """Three experts; gate (1, 2), up (1, 2), down (2, 1), flattened (6 weights) easy to compare."""
    model = tiny_moe(
        "mixtral", num_experts=3, hidden_size=2, intermediate_size=1, num_hidden_layers=1
    )
    block = model.model.layers[0].mlp
    flat = torch.tensor([[3.0, 0, 0, 4, 0, 0], [0, 0, 0, 2, 0, 0], [1, 1, 1, 1, 1, 1]])
    block.experts.gate_up_proj.data.copy_(flat[:, :4].view(3, 2, 2))
    block.experts.down_proj.data.copy_(flat[:, 4:].view(3, 2, 1))
    block.gate.weight.data.copy_(torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, -2.0]]))
    return model


COSINES = (0.8, 7 / (5 * math.sqrt(6)), 1 / math.sqrt(6))  # of 01, 02, 12


@pytest.mark.parametrize(
    ("name", "measure", "sign"),
    [
        ("ews", (COSINES[0] + COSINES[1], COSINES[0] + COSINES[2], COSINES[1] + COSINES[2]), -1),
        ("rwn", (5.0, 1.0, 2.0), -1),
        # A matrix of one row or column has rank 1, one of zeros 0.
        ("wsr", (2 / 3, 1 / 3, 1.0), -1),
        ("ewn", (5.0, 2.0, math.sqrt(6)), 1),
    ],
)
def test_three_experts_by_their_weights(model, name, measure, sign):
    (paper,) = score(model, name).values()
    (opposite,) = score(model, get_criterion(name, direction="opposite")).values()
    torch.testing.assert_close(paper, sign * f64(*measure), rtol=1e-6, atol=1e-12)
    assert torch.equal(opposite, -paper)


def test_similarity_of_weights_leaves_hidden_experts_out(model):
    criterion = get_criterion("ews")
    sites = find_sites(model)
    evidence = Evidence(model=model, sites=sites, alive={sites[0].name: (0, 2)})
    scores = criterion.scores(evidence)[sites[0].name]
    torch.testing.assert_close(scores[[0, 2]], -f64(COSINES[1], COSINES[1]), rtol=1e-6, atol=0)


def test_stable_rank_of_a_known_matrix():
    assert float(stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0])))) == pytest.approx(1.5)
    assert float(stable_rank(torch.zeros(2, 3))) == 0.0
    rotated = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))[0]
    known = rotated[:, :3] @ torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    assert float(stable_rank(known)) == pytest.approx(14 / 9, rel=1e-6)


def test_pairs_lose_members_until_one_is_left():
    pairs = f64([0, 5, 1, 1], [5, 0, 4, 1], [1, 4, 0, 3], [1, 1, 3, 0])
    usage = f64(9, 8, 7, 6)
    # 01 loses 1; then 23 (3) loses 3; then 02 loses 2.
    assert ranks_by_pairs(pairs, usage, "largest").tolist() == [3.0, 0.0, 2.0, 1.0]


@pytest.mark.parametrize("name", ["ews", "rwn", "wsr", "ewn", *FORWARD, *BACKWARD])
def test_an_unknown_direction_is_refused(name):
    with pytest.raises(LitMoEError, match="direction='max' is unknown; use 'paper' or 'opposite'"):
        get_criterion(name, direction="max")


@pytest.mark.parametrize("name", ["eae", "ege"])
def test_an_eps_of_zero_is_refused(name):
    with pytest.raises(LitMoEError, match=f"{name}: eps=0 must be above 0"):
        get_criterion(name, eps=0)


@pytest.mark.parametrize(
    ("name", "kind"), [("ecc", "pairs"), ("evtc", "vocabulary"), ("ets", "vocabulary")]
)
def test_a_pass_that_did_not_gather_what_is_needed_says_how(name, kind):
    plain = LayerStats(4, *[f64(1, 2, 3)] * 7)
    with pytest.raises(LitMoEError, match=rf"'{name}' needs .* gather=\['{kind}'\]"):
        score(Observation({"mlp": plain}), name)


def test_gradients_are_not_in_an_observation():
    with pytest.raises(LitMoEError, match=r"'egn' scores gradients, .*score\(model, 'egn', batch"):
        score(Observation({"mlp": STATS}), "egn")


def test_gradients_are_taken_where_there_are_batches_and_given_ones_are_used():
    model = tiny_moe("mixtral")
    taken = score(model, "egn", batches=[example_inputs(model)])
    assert all(bool((values > 0).any()) for values in taken.values())
    given = GradientObservation({"mlp": GRADIENTS}, 4, 3)
    assert score(given, "egn")["mlp"].tolist() == [2.0, 3.0, 4.0]
