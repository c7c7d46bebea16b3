"""Comparing experts takes no more memory than it may, and no more calls of experts."""

import pytest
import torch

from lit_moe.adapters import find_sites
from lit_moe.errors import LitMoEError
from lit_moe.grouping import MergeOptions, decide
from lit_moe.grouping.memory import blocks_for
from lit_moe.inference import run_body
from lit_moe.testing import tiny_moe
from tests.grouping.models import copies, counts_of, text_for
from tests.peaks import HeldTensors

MIB = 1 / 1024


def wide_moe():
    """Return a model with 32 experts, 4 asked, whose outputs take much more than its inputs."""
    return tiny_moe("qwen3_moe", num_experts=32, num_experts_per_tok=4)


def peak_of(model, batches, options):
    """Return bytes that deciding takes beyond what a forward of one batch does."""
    with torch.no_grad(), HeldTensors() as forward:
        run_body(model, batches[0])
    with HeldTensors() as held:
        decide(model, counts_of(model, 16), batches, options)
    return held.peak - forward.peak


@pytest.mark.parametrize("similarity", ["cka", "output_cosine", "mean_output", "ream"])
@pytest.mark.parametrize("mib", [0.7, 1.5])
def test_the_peak_stays_within_the_budget(similarity, mib):
    model = wide_moe()
    batches = text_for(model, rows=16, length=32, batches=16)
    plenty = MergeOptions(similarity=similarity, effort=None)
    little = MergeOptions(similarity=similarity, effort=None, memory_gib=mib * MIB)
    assert peak_of(model, batches, plenty) > 2 * 2**20
    assert 0.3 * mib * 2**20 < peak_of(model, batches, little) <= mib * 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_surrogates_stay_within_the_budget_too(dtype):
    model = wide_moe().to(dtype)
    peaks, found = [], []
    for mib in (0.1, 64):
        options = MergeOptions(similarity="surrogate", memory_gib=mib * MIB)
        with HeldTensors() as held:
            found.append(decide(model, counts_of(model, 16), (), options).similarity)
        peaks.append(held.peak)
    assert peaks[0] <= 0.1 * 2**20 < peaks[1]
    for layer, similarity in found[0].items():
        torch.testing.assert_close(similarity, found[1][layer], rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("similarity", ["cka", "output_cosine"])
def test_a_small_budget_runs_layers_and_tokens_in_parts_to_the_same_end(similarity):
    model = wide_moe()
    batches = text_for(model, rows=64, length=32, batches=16)
    plenty, little = (
        decide(model, counts_of(model, 16), batches, MergeOptions(similarity, memory_gib=gib))
        for gib in (2.0, 3 * MIB)
    )
    sites = find_sites(model)
    assert blocks_for(model, sites, 768, 3 * MIB).tokens < blocks_for(model, sites, 768, 2).tokens
    assert (
        blocks_for(model, sites, 768, 0.45 * MIB).layers < blocks_for(model, sites, 768, 2).layers
    )
    assert plenty.tokens == little.tokens == 64 * 12
    for layer, one in plenty.similarity.items():
        torch.testing.assert_close(little.similarity[layer], one, rtol=1e-5, atol=1e-5)


def test_a_budget_below_one_block_is_refused_with_the_number_that_works():
    model = wide_moe()
    batches = text_for(model, rows=64, length=32, batches=16)

    def run(gib):
        return decide(model, counts_of(model, 16), batches, MergeOptions(memory_gib=gib))

    message = "does not hold 768 inputs of one layer and the outputs of its 32 experts on 16"
    with pytest.raises(LitMoEError, match=message) as refused:
        run(1e-4)
    enough = float(str(refused.value).split("at least ")[1].split(",")[0])
    assert run(enough).tokens == 768
    with pytest.raises(LitMoEError, match="at least"):
        run(enough * 0.98)


def test_a_budget_below_one_column_of_the_surrogates_is_refused():
    model = wide_moe()
    options = MergeOptions(similarity="surrogate", memory_gib=1e-6)
    with pytest.raises(LitMoEError, match="the surrogates of 32 experts, not even one column"):
        decide(model, counts_of(model, 16), (), options)


@pytest.mark.parametrize(("effort", "tokens"), [(None, 384), (8, 384), (3, 144), (0.5, 32)])
def test_effort_says_how_many_tokens_all_experts_are_asked_about(effort, tokens):
    model = wide_moe()
    batches = text_for(model, rows=16, length=24)
    options = MergeOptions(similarity="output_cosine", effort=effort)
    assert decide(model, counts_of(model, 16), batches, options).tokens == tokens


def test_copies_are_found_among_part_of_the_tokens():
    model = copies("olmoe")
    batches = text_for(model, rows=32, length=24)
    decision = decide(model, counts_of(model, 6), batches, MergeOptions(effort=1.0))
    assert decision.tokens == 32 * 6
    for layer in decision.plan:
        assert decision.plan.members(layer) == ((0,), (1, 4), (2,), (3, 6), (5,), (7,))
