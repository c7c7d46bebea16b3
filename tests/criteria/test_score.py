"""score(): what it takes, and what it says when something is missing."""

import pytest
import torch

from lit_moe.criteria import RoutedCriterion, score
from lit_moe.errors import LitMoEError
from lit_moe.stats.observation import LayerStats, Observation
from lit_moe.testing import example_inputs, tiny_moe

ONES = torch.ones(3, dtype=torch.float64)
OBSERVATION = Observation({"mlp": LayerStats(4, *[ONES] * 7)})


@pytest.fixture(scope="module")
def model():
    return tiny_moe("mixtral", num_experts=4)


@pytest.mark.parametrize("name", ["weight_norm", "router_norm", "aimer", "naee"])
def test_criterion_of_weights_without_a_model_says_so(name):
    with pytest.raises(LitMoEError, match=f"'{name}' reads the model's weights, but no model"):
        score(OBSERVATION, name)


def test_criterion_of_routing_without_an_observation_says_so(model):
    with pytest.raises(LitMoEError, match="'reap' scores what was observed, but no observation"):
        score(model, "reap")


def test_naee_without_batches_or_keep_says_so(model):
    with pytest.raises(LitMoEError, match="'naee' runs the model, but no calibration batches"):
        score(model, "naee", keep=2)
    with pytest.raises(LitMoEError, match=r"'naee' rates whole subsets.*layers.0.*layers.1"):
        score(model, "naee", batches=[example_inputs(model)])
    with pytest.raises(LitMoEError, match=r"no number for \['model.layers.1.mlp'\]"):
        score(model, "naee", batches=[example_inputs(model)], keep={"model.layers.0.mlp": 2})


@pytest.mark.parametrize(("given", "found"), [({"mlp": ONES}, "dict"), (None, "NoneType")])
def test_something_else_than_observation_or_model_is_refused(given, found):
    with pytest.raises(LitMoEError, match=f"an Observation .* or a model, not {found}"):
        score(given, "reap")


def test_random_needs_only_to_know_the_layers(model):
    assert set(score(OBSERVATION, "random")) == {"mlp"}
    assert set(score(model, "random")) == {"model.layers.0.mlp", "model.layers.1.mlp"}


class Broken(RoutedCriterion):
    """Returns whatever it is given."""

    def __init__(self, values):
        self.values = values

    def layer_scores(self, stats):
        return self.values.clone() if stats.tokens else self.values


def test_nan_scores_name_layer_and_experts():
    with pytest.raises(LitMoEError, match=r"'Broken' scored experts \[1\] of 'mlp' NaN"):
        score(OBSERVATION, Broken(torch.tensor([1.0, float("nan"), 1.0], dtype=torch.float64)))


@pytest.mark.parametrize(
    "values", [torch.ones(2, dtype=torch.float64), torch.ones(3), torch.ones(3, 1).double()]
)
def test_scores_of_wrong_shape_or_type_are_refused(values):
    with pytest.raises(LitMoEError, match=r"must return float64 scores of shape \(3,\)"):
        score(OBSERVATION, Broken(values))
