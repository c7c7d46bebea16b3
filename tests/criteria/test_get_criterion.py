"""Criteria by name, by class path and as instances."""

import pytest
import torch

from lit_moe.criteria import Criterion, RoutedCriterion, available, get_criterion, register, score
from lit_moe.criteria.activation import REAP
from lit_moe.criteria.weights import RouterNorm
from lit_moe.errors import LitMoEError
from lit_moe.stats.observation import LayerStats, Observation


class Newest(RoutedCriterion):
    """A criterion as an extender would write it."""

    def layer_scores(self, stats):
        return torch.arange(stats.num_experts, dtype=torch.float64)


def observation(num_experts=3):
    ones = torch.ones(num_experts, dtype=torch.float64)
    return Observation({"mlp": LayerStats(4, *[ones] * 7)})


def test_short_name_gives_the_registered_class():
    assert get_criterion("reap") == REAP()
    assert get_criterion("reap").name == "reap"


def test_fields_are_passed_on():
    assert get_criterion("router_norm", keep="largest") == RouterNorm(keep="largest")


def test_class_path_gives_a_class_that_is_not_registered():
    found = get_criterion(f"{__name__}.Newest")
    assert isinstance(found, Newest)
    assert found.name == "Newest"
    assert score(observation(), f"{__name__}.Newest")["mlp"].tolist() == [0.0, 1.0, 2.0]


def test_instance_is_returned_as_it_is():
    criterion = Newest()
    assert get_criterion(criterion) is criterion


def test_instance_with_fields_is_refused():
    with pytest.raises(LitMoEError, match=r"'reap' is already built; set \['keep'\]"):
        get_criterion(REAP(), keep="largest")


def test_unknown_name_is_refused_with_the_nearest_and_the_list():
    with pytest.raises(LitMoEError) as caught:
        get_criterion("reapp")
    message = str(caught.value)
    assert "unknown criterion 'reapp': did you mean 'reap'?" in message
    assert all(name in message for name in available())


def test_wrong_case_is_refused_with_the_right_one():
    with pytest.raises(LitMoEError, match="did you mean 'frequency'"):
        get_criterion("Frequency")


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("no_such_package.Thing", "cannot be imported"),
        ("lit_moe.criteria.NoSuchThing", "cannot be imported"),
        ("pathlib.Path", "no subclass|not a subclass"),
        (".reap", "cannot be imported"),
    ],
)
def test_bad_class_path_is_refused(path, reason):
    with pytest.raises(LitMoEError, match=reason):
        get_criterion(path)


def test_unknown_field_is_refused():
    with pytest.raises(LitMoEError, match=r"'router_norm' cannot be built.*'keeep'"):
        get_criterion("router_norm", keeep="largest")


@pytest.mark.parametrize("name", ["router_norm", "weight_norm"])
def test_unknown_extreme_is_refused(name):
    with pytest.raises(LitMoEError, match=rf"{name}: keep='max' is unknown; use 'largest'"):
        get_criterion(name, keep="max")


def test_name_cannot_be_taken_twice():
    with pytest.raises(LitMoEError, match="'reap' is taken by REAP"):
        register("reap")(type("Other", (Newest,), {}))
    assert get_criterion("reap") == REAP()


@pytest.mark.parametrize("base", [Criterion, RoutedCriterion])
def test_criterion_without_scores_cannot_be_built(base):
    with pytest.raises(TypeError, match="abstract"):
        base()
