"""Learned coefficients: what is fitted, on which tokens, and how much of it is held."""

import pytest
import torch

from lit_moe.adapters import find_sites
from lit_moe.criteria.replay import capture_calls
from lit_moe.errors import CalibrationError, LitMoEError, NoEffectWarning, UnsupportedModelError
from lit_moe.grouping import LearnOptions, MergeOptions, captures, decide
from lit_moe.grouping.learned import learn_coefficients
from lit_moe.grouping.merged_layer import Kind, MergedLayer, combine_rows, outline_of
from lit_moe.merge_plan import MergePlan
from lit_moe.merging import merge
from lit_moe.models import sharing_copy
from lit_moe.testing import run_distributed, tiny_moe
from tests.grouping.models import counts_of, logits_of, text_for
from tests.peaks import HeldTensors

MIB = 1 / 1024


def options_of(gib=2.0, **learn):
    options = LearnOptions(**{"epochs": 1, **learn})
    return MergeOptions("weights", coefficients="learned", memory_gib=gib, learn=options)


def test_learned_coefficients_find_the_expert_that_does_the_work():
    """The second of each pair is never asked, so all weight should go to the first."""
    model = tiny_moe("mixtral", num_experts_per_tok=1)
    sites = find_sites(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight[4] = layer.mlp.gate.weight[1] * 0.5
    groups = {s.name: ((0,), (1, 4), (2,), (3,), (5,), (6,), (7,)) for s in sites}
    batches = text_for(model, rows=16)
    options = LearnOptions(epochs=15)
    learned = learn_coefficients(
        model, groups, batches, max_tokens=10**6, memory_gib=2.0, options=options
    ).maps
    uniform = {s.name: torch.zeros(7, 8) for s in sites}
    for name, members in groups.items():
        for row, ids in zip(uniform[name], members, strict=True):
            row[list(ids)] = 1 / len(ids)
    for map_NE in learned.values():
        torch.testing.assert_close(map_NE.sum(1), torch.ones(7, dtype=torch.float64))
        assert float(map_NE[1, 1]) > 0.6
    inputs, losses = batches[0], []
    full = logits_of(model, inputs)
    for maps in (uniform, learned):
        merged = sharing_copy(model)
        merge(merged, MergePlan(maps, maps))
        losses.append(float((logits_of(merged, inputs) - full).square().mean()))
    assert losses[1] < 0.8 * losses[0]


def test_learning_needs_four_rows():
    model = tiny_moe("mixtral")
    batches = text_for(model, rows=3, batches=1)
    with pytest.raises(LitMoEError, match="at least 4 calibration rows, there are 3"):
        decide(model, counts_of(model, 4), batches, MergeOptions(coefficients="learned"))


def test_a_gradient_of_one_row_after_the_other_is_that_of_all_at_once():
    model = tiny_moe("mixtral")
    site = find_sites(model)[0]
    rows = text_for(model, rows=4, batches=4)
    outline = outline_of(model, find_sites(model), counts_of(model, 4))
    calls = capture_calls(model, [site], rows)[site.name]
    kinds: list[Kind] = ["fitted", "fitted", "mixed", "judged"]
    with torch.no_grad():
        layer = MergedLayer(model, outline, site, calls, kinds)
        block, merged = model.get_submodule(site.name), sharing_copy(model)
        targets = [call.run(block) for call in calls]
    map_NE = torch.rand(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    merge(merged, MergePlan(*2 * ({s.name: map_NE for s in find_sites(model)},)))
    map_NE.requires_grad_()
    tensors = {
        axis.name.removeprefix(f"{site.name}."): combine_rows(
            model.get_parameter(axis.name).detach(), axis, map_NE
        )
        for axis in site.axes
    }
    block = merged.get_submodule(site.name)
    errors = [
        (torch.func.functional_call(block, tensors, call.args) - target.view(call.args[0].shape))
        .double()
        .square()
        .sum()
        for call, target in zip(calls, targets, strict=True)
    ]
    energy = [target.double().square().sum() for target in targets]
    (gradient,) = torch.autograd.grad(sum(errors[:3]) / sum(energy[:3]), map_NE)
    assert torch.equal(layer.gradient(map_NE.detach()), gradient)
    assert gradient.abs().max() > 0.01
    assert layer.loss(map_NE.detach()) == float((errors[3] / energy[3]).detach())
    assert all(tensor.is_meta for tensor in outline.parameters())


@pytest.mark.parametrize("mixed_rows", [0, 2])
def test_the_tokens_that_were_fitted_and_judged_are_reported(mixed_rows):
    model = tiny_moe("mixtral")
    batches = text_for(model, rows=8, length=12, batches=4)
    batches[1]["attention_mask"][:, 9:] = 0
    options = options_of(mixed_rows=mixed_rows)
    assert decide(model, counts_of(model, 4), batches, options).tokens == 8 * 12 - 2 * 3


def test_no_more_tokens_are_reported_than_were_read():
    model = tiny_moe("mixtral")
    options = MergeOptions("coactivation", coefficients="learned", max_tokens=60)
    batches = text_for(model, rows=8, length=12)
    assert decide(model, counts_of(model, 4), batches, options).tokens == 8 * 12  # routing saw all
    options = MergeOptions("weights", coefficients="learned", max_tokens=60)
    assert decide(model, counts_of(model, 4), batches, options).tokens == 5 * 12


def deep_moe():
    return tiny_moe("mixtral", num_hidden_layers=6)


@pytest.mark.parametrize("mixed_rows", [0, 1])
def test_a_small_budget_captures_layers_in_parts_to_the_same_end(mixed_rows, monkeypatch):
    model, batches, parts = deep_moe(), text_for(tiny_moe("mixtral"), rows=8, length=32), []

    def counted(model, sites, rows):
        parts.append(len(sites))
        return capture_calls(model, sites, rows)

    monkeypatch.setattr(captures, "capture_calls", counted)
    one_layer = 4 * 32 * 32 * (8 + 6 * mixed_rows) / 2**30  # H = 32; outputs are as large
    plans = []
    for gib in (2.0, 8.1 * one_layer, 4.1 * one_layer, 2.01 * one_layer):
        options = options_of(gib, mixed_rows=mixed_rows)
        plans.append(decide(model, counts_of(model, 4), batches, options).plan)
    assert parts == [6, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
    for plan in plans[1:]:
        for layer, map_NE in plan.experts.items():
            assert torch.equal(map_NE, plans[0].experts[layer])


@pytest.mark.parametrize("mixed_rows", [0, 1])
def test_a_budget_below_one_layer_is_refused_with_the_number_that_works(mixed_rows):
    model, batches = deep_moe(), text_for(tiny_moe("mixtral"), rows=8, length=32)

    def run(gib):
        options = options_of(gib, mixed_rows=mixed_rows)
        return decide(model, counts_of(model, 4), batches, options)

    rows = 8 + 6 * mixed_rows
    message = f"inputs and outputs of one layer on the {rows} rows of one rank"
    with pytest.raises(LitMoEError, match=message) as refused:
        run(1e-5)
    enough = float(str(refused.value).split("at least ")[1].split(",")[0])
    assert run(enough).tokens == 8 * 32
    with pytest.raises(LitMoEError, match="fewer max_tokens or mixed_rows"):
        run(enough * 0.98)


def peak_of(*, layers, rows, mib):
    """Return MiB that deciding takes at most."""
    model = tiny_moe("mixtral", num_hidden_layers=layers)
    batches = text_for(model, rows=rows, length=32, batches=rows)
    with HeldTensors() as held:
        decide(model, counts_of(model, 4), batches, options_of(mib * MIB))
    return held.peak / 2**20


def test_the_peak_stays_within_the_budget_beside_one_row_and_one_layer_of_experts():
    """A layer's inputs on 8 rows take 0.031 MiB, its outputs as much; half of that on 4."""
    fixed = peak_of(layers=1, rows=4, mib=64)
    assert fixed < 0.2
    plenty, half, little = (peak_of(layers=4, rows=8, mib=mib) - fixed for mib in (64, 0.19, 0.065))
    assert plenty > 0.11  # four layers' inputs
    assert 0.05 < half <= 0.19 / 2  # two layers'
    assert 0.02 < little <= 0.065


def test_blocks_that_are_not_called_keep_uniform_coefficients_with_a_warning():
    model = tiny_moe("jetmoe", num_hidden_layers=1)
    attention = "model.layers.0.self_attention.experts"
    with pytest.warns(NoEffectWarning, match=f"does not call {attention} as one block"):
        plan = decide(model, counts_of(model, 4), text_for(model), options_of()).plan
    uniform = decide(model, counts_of(model, 4), (), MergeOptions("weights")).plan
    assert torch.equal(plan.experts[attention], uniform.experts[attention])
    assert not torch.equal(
        plan.experts["model.layers.0.mlp"], uniform.experts["model.layers.0.mlp"]
    )


def test_tables_of_token_ids_are_refused_before_anything_runs():
    model = tiny_moe("deepseek_v4")
    with pytest.raises(UnsupportedModelError, match="table of token ids, which cannot be merged"):
        decide(model, counts_of(model, 4), text_for(model), options_of())


@pytest.mark.parametrize(("kind", "empty"), [("judged", [3, 7]), ("fitted", [0, 1, 2, 4, 5, 6])])
def test_rows_of_padding_alone_are_neither_fitted_nor_judged(kind, empty):
    model = tiny_moe("mixtral")
    (batch,) = text_for(model, rows=8, batches=1)
    batch["attention_mask"][empty] = 0
    with pytest.raises(CalibrationError, match=f"'learned' \\({kind} rows\\) looks at text"):
        decide(model, counts_of(model, 4), [batch], options_of())
    batch["attention_mask"][empty[0], :5] = 1
    tokens = decide(model, counts_of(model, 4), [batch], options_of()).tokens
    assert tokens == 12 * (8 - len(empty)) + 5


@pytest.mark.distributed
def test_two_ranks_report_all_tokens_and_refuse_little_memory_alike():
    model = tiny_moe("mixtral")
    (batch,) = text_for(model, rows=8, batches=1)
    batch["attention_mask"][2, 7:] = 0

    def work(rank):
        rows = [{k: v[rank::2] for k, v in batch.items()}]
        tokens = decide(model, counts_of(model, 4), rows, options_of()).tokens
        rows = [{k: v[: 3 if rank else 5] for k, v in batch.items()}]
        with pytest.raises(LitMoEError) as refused:
            decide(model, counts_of(model, 4), rows, options_of(1e-6))
        return tokens, str(refused.value)

    first, second = run_distributed(work)
    assert first == second
    assert first[0] == 7 * 12 + 7
    assert "on the 5 rows of one rank" in first[1]
