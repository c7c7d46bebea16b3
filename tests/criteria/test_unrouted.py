"""Experts that saw no token: keep, drop, or stop."""

import pytest
import torch

from lit_moe.criteria import apply_unrouted
from lit_moe.errors import LitMoEError
from lit_moe.stats.observation import LayerStats, Observation

INF = float("inf")


def layer(*counts):
    count = torch.tensor(counts, dtype=torch.float64)
    return LayerStats(8, *[count] * 7)


OBSERVATION = Observation({"a": layer(8, 0, 8, 0), "b": layer(4, 4, 4, 4), "c": layer(0, 8, 8, 8)})
SCORES = {name: torch.tensor([1.0, 2.0, 3.0, 4.0]).double() for name in "abc"}


@pytest.mark.parametrize(("rule", "value"), [("keep", INF), ("drop", -INF)])
def test_rule_sets_only_experts_without_tokens(rule, value):
    result = apply_unrouted(SCORES, OBSERVATION, rule)
    assert result["a"].tolist() == [1.0, value, 3.0, value]
    assert result["b"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert result["c"].tolist() == [value, 2.0, 3.0, 4.0]


def test_scores_given_are_left_alone():
    apply_unrouted(SCORES, OBSERVATION, "keep")
    assert SCORES["a"].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_error_lists_layers_and_ids():
    with pytest.raises(LitMoEError) as caught:
        apply_unrouted(SCORES, OBSERVATION, "error")
    assert "3 experts saw none of the 8 calibration tokens" in str(caught.value)
    assert "a: [1, 3]; c: [0]" in str(caught.value)


def test_error_is_silent_when_every_expert_was_used():
    scores = {"b": SCORES["b"]}
    assert apply_unrouted(scores, OBSERVATION, "error") == scores


@pytest.mark.parametrize("rule", ["skip", "", None])
def test_unknown_rule_is_refused(rule):
    with pytest.raises(LitMoEError, match=f"unrouted={rule!r} is no rule: use 'keep', 'drop'"):
        apply_unrouted(SCORES, OBSERVATION, rule)
