"""Numbers of rounds: experts and steps, and what is refused."""

import pytest

from lit_moe.adapters.site import MoESite
from lit_moe.callbacks.round_records import training_sentence
from lit_moe.callbacks.rounds import (
    FineTuning,
    TrainingData,
    counts_per_round,
    steps_per_round,
    totals_per_round,
)
from lit_moe.errors import LitMoEError


def site(name, num_experts, num_groups=1):
    return MoESite(name, 0, "", "", num_experts=num_experts, top_k=2, num_groups=num_groups)


def test_one_expert_per_layer_and_round_unless_said_otherwise():
    counts = counts_per_round([site("a", 8), site("b", 8)], {"a": 5, "b": 5}, None)
    assert counts == [{"a": n, "b": n} for n in (7, 6, 5)]


def test_rounds_share_what_goes_equally():
    assert counts_per_round([site("a", 16)], {"a": 4}, 3) == [{"a": 12}, {"a": 8}, {"a": 4}]
    assert counts_per_round([site("a", 16)], {"a": 4}, 1) == [{"a": 4}]


def test_groups_lose_an_expert_each():
    counts = counts_per_round([site("a", 16, num_groups=4)], {"a": 8}, None)
    assert counts == [{"a": 12}, {"a": 8}]


def test_a_protected_layer_keeps_all_and_unequal_layers_share_a_divisor():
    sites = [site("a", 8), site("b", 8), site("c", 16)]
    counts = counts_per_round(sites, {"a": 8, "b": 4, "c": 8}, None)
    assert counts[0] == {"a": 8, "b": 7, "c": 14}
    assert counts[-1] == {"a": 8, "b": 4, "c": 8}
    assert len(counts) == 4


@pytest.mark.parametrize("rounds", [5, 7, 24])
def test_rounds_that_do_not_divide_the_budget_are_refused_with_those_that_do(rounds):
    with pytest.raises(LitMoEError) as caught:
        counts_per_round([site("model.mlp", 16)], {"model.mlp": 4}, rounds)
    assert str(caught.value) == (
        f"rounds={rounds} does not divide what goes: 'model.mlp' drops 12 experts (16 -> 4); "
        "rounds can be 1, 2, 3, 4, 6, 12"
    )


def test_a_global_ranking_shares_its_total():
    assert totals_per_round(32, 20, 3) == [28, 24, 20]
    with pytest.raises(LitMoEError, match=r"rounds=5 .* the 12 of 32 .* can be 1, 2, 3, 4, 6, 12"):
        totals_per_round(32, 20, 5)
    with pytest.raises(LitMoEError, match="rounds=None is no number of rounds for the 12 of 32"):
        totals_per_round(32, 20, None)


DATA = TrainingData(tokens_per_step=1000, steps_per_epoch=50)


def test_budgets_grow_and_are_whole_steps():
    tuning = FineTuning(first=2500, growth=2.0)
    assert tuning.amounts(4) == [2500, 5000, 10000, 20000]
    assert steps_per_round(tuning, 4, DATA) == [3, 5, 10, 20]
    assert steps_per_round(None, 3, None) == [0, 0, 0]
    assert steps_per_round(FineTuning(first=4, growth=1.0, unit="steps"), 2, DATA) == [4, 4]
    assert steps_per_round(FineTuning(first=1, growth=1.0, unit="epochs"), 2, DATA) == [50, 50]


def test_more_tokens_than_text_are_refused_repeated_or_cut_off():
    def steps(when):
        return steps_per_round(FineTuning(first=20_000, when_data_ends=when), 3, DATA)

    with pytest.raises(LitMoEError) as caught:
        steps("error")
    assert "3 rounds of fine-tuning want 140,000 tokens (140 steps)" in str(caught.value)
    assert "one pass over the training text has 50,000 tokens (50 steps)" in str(caught.value)
    assert "'repeat' or 'stop'" in str(caught.value)
    assert steps("repeat") == [20, 40, 80]
    assert steps("stop") == [20, 30, 0]


def test_passes_that_the_trainer_does_not_allow_are_refused():
    data = TrainingData(1000, 50, max_epochs=2)
    tuning = FineTuning(first=20_000, when_data_ends="repeat")
    with pytest.raises(LitMoEError, match=r"3 passes .*\.max_epochs is 2: set it to -1"):
        steps_per_round(tuning, 3, data)


def test_tokens_of_data_without_a_length_are_refused():
    with pytest.raises(LitMoEError, match="'tokens' cannot be turned into steps.*unit: steps"):
        steps_per_round(FineTuning(), 2, TrainingData(None, None))
    assert steps_per_round(FineTuning(first=3, unit="steps"), 2, TrainingData(None, None)) == [3, 6]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"first": 0}, "first=0 and growth=2 must be above 0"),
        ({"growth": 0.0}, "growth=0 must be above 0"),
        ({"unit": "batches"}, "unit='batches' is unknown; use one of tokens, steps, epochs"),
        ({"optimizer": "new"}, "optimizer='new' is unknown"),
        ({"when_data_ends": "cycle"}, "when_data_ends='cycle' is unknown"),
    ],
)
def test_impossible_fields_are_refused(fields, message):
    with pytest.raises(LitMoEError, match=message):
        FineTuning(**fields)


def test_text_that_was_repeated_is_said():
    once = training_sentence([10, 20], 30, 960, left=0, name="ean", one_pass=30)
    assert once.endswith("fine-tuned on 960 tokens in total (30 steps)")
    again = training_sentence([10, 20], 30, 960, left=0, name="ean", one_pass=12)
    assert again.endswith("(30 steps), which repeated the training text: 2.5 passes")
