"""Recipes that look at text refuse padding alone; those that do not go on."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lit_moe.errors import CalibrationError
from lit_moe.grouping import LearnOptions, MergeOptions, SegmentOptions, available, decide
from lit_moe.testing import run_distributed, tiny_moe
from tests.grouping.models import counts_of, text_for

CONFIGS = Path(__file__).parents[2] / "configs" / "merging"
MERGING = "lit_moe.callbacks.ExpertMerging"
NO_TEXT = {"weights", "surrogate", "router", "surrogate.yaml", "aligned"}


def recipe_in(path):
    (arguments,) = (
        callback["init_args"]
        for callback in yaml.safe_load(path.read_text())["trainer"]["callbacks"]
        if callback["class_path"] == MERGING
    )
    fields = {k: v for k, v in arguments.items() if k not in ("keep_ratio", "protect")}
    if "segments" in fields:
        fields["segments"] = SegmentOptions(**fields["segments"])
    return fields


RECIPES: dict[str, dict[str, Any]] = {
    **{path.name: recipe_in(path) for path in sorted(CONFIGS.glob("*.yaml"))},
    **{name: {"similarity": name} for name in available()},
    **{
        name: {"similarity": "weights", "coefficients": name}
        for name in ("frequency", "reap", "max_visited", "learned")
    },
    "mixed": {"coefficients": "learned", "learn": LearnOptions(mixed_rows=1)},
    "aligned": {"similarity": "weights", "align": "weights"},
    "activations": {"similarity": "weights", "align": "activations"},
}


def padding(model, **shape):
    batches = text_for(model, **shape)
    for batch in batches:
        batch["attention_mask"].zero_()
    return batches


def test_every_recipe_that_ships_is_among_them():
    assert {path for path in RECIPES if path.endswith(".yaml")} >= {"cka.yaml", "dern.yaml"}
    assert {name for name, fields in RECIPES.items() if not MergeOptions(**fields).needs_text} == (
        NO_TEXT
    )


@pytest.mark.parametrize("recipe", RECIPES)
def test_padding_alone_is_refused_where_text_is_looked_at(recipe):
    model, options = tiny_moe("mixtral"), MergeOptions(**RECIPES[recipe])
    batches = padding(model, rows=8)
    if recipe in NO_TEXT:
        decision = decide(model, counts_of(model, 4), batches, options)
        assert set(decision.plan.counts.values()) == {4}
        assert decision.tokens == 0
        return
    asked = "|".join(options.readers).replace("(", ".")
    message = f"({asked}).* looks at text, but there is no calibration token .* in the 8 rows"
    with pytest.raises(CalibrationError, match=message):
        decide(model, counts_of(model, 4), batches, options)
    batches[1]["attention_mask"][:, :4] = 1
    if "learned" not in options.coefficients:
        assert 0 < decide(model, counts_of(model, 4), batches, options).tokens <= 16


@pytest.mark.parametrize("recipe", ["cka", "learned", "activations"])
def test_text_behind_what_is_read_does_not_count(recipe):
    model = tiny_moe("mixtral")
    batches = [*padding(model, rows=4, batches=1), *text_for(model, rows=4, batches=1)]
    options = MergeOptions(**RECIPES[recipe], max_tokens=4 * 12)
    with pytest.raises(CalibrationError, match="max_tokens=48.* in the 4 rows"):
        decide(model, counts_of(model, 4), batches, options)


def test_encoders_and_decoders_need_text_of_their_own():
    model = tiny_moe("switch_transformers")
    options = MergeOptions("coactivation")
    batches = text_for(model)
    for batch in batches:
        batch["decoder_attention_mask"] = torch.zeros_like(batch["decoder_input_ids"])
    with pytest.raises(CalibrationError, match="no calibration token for decoder"):
        decide(model, counts_of(model, 4), batches, options)


@pytest.mark.distributed
@pytest.mark.parametrize("recipe", ["coactivation", "frequency", "dern.yaml", "cka", "learned"])
def test_two_ranks_refuse_alike_and_one_with_text_is_enough(recipe):
    model, options = tiny_moe("mixtral"), MergeOptions(**RECIPES[recipe])

    def work(rank):
        with pytest.raises(CalibrationError) as refused:
            decide(model, counts_of(model, 4), padding(model, rows=4), options)
        share = (padding, text_for)[rank](model, rows=4)
        return str(refused.value), decide(model, counts_of(model, 4), share, options).tokens

    (said, tokens), other = run_distributed(work)
    assert (said, tokens) == other
    assert "in the 8 rows" in said
    assert tokens == {"cka": 4 * 9}.get(recipe, 4 * 12)
