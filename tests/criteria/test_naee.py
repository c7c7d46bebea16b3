"""NAEE against the naive way: one full forward of the block per subset."""

import itertools
import math

import pytest
import torch

from lit_moe.adapters import find_sites
from lit_moe.criteria import get_criterion, score
from lit_moe.criteria.naee import NAEE
from lit_moe.criteria.replay import cached_experts, combine, small_batches
from lit_moe.criteria.subsets import all_subsets, num_subsets, sampled_subsets
from lit_moe.errors import LitMoEError
from lit_moe.masking import masked
from lit_moe.plan import KeepPlan
from lit_moe.stats.observe import observe
from lit_moe.testing import example_inputs, run_distributed, tiny_moe


def naive_losses(model, site, batches, subsets):
    """Mask, run the whole block with its own experts, compare; the inputs are the full model's."""
    module = model.get_submodule(site.name)
    counts = {s.name: s.num_experts for s in find_sites(model)}
    inputs, valid = [], []
    hook = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].clone()))

    def block(x):
        output = module(x)
        return output[0] if isinstance(output, tuple) else output

    with torch.no_grad():
        for batch in batches:
            model(**batch)
            valid.append(batch["attention_mask"].bool())
        hook.remove()
        full = [block(x) for x in inputs]
        losses = {}
        for subset in subsets:
            plan = KeepPlan({**KeepPlan.identity(counts).kept, site.name: subset}, counts)
            with masked(model, plan):
                parts = [
                    (block(x) - y)[v].double().square().sum()
                    for x, y, v in zip(inputs, full, valid, strict=True)
                ]
            losses[subset] = math.sqrt(sum(parts))
    return losses


def padded(model, **kwargs):
    batch = example_inputs(model, **kwargs)
    batch["attention_mask"][0, -3:] = 0
    return batch


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "gpt_oss", "olmoe", "deepseek_v3"])
def test_losses_equal_those_of_a_full_forward_per_subset(family):
    model = tiny_moe(family, num_experts=6)
    batches = [padded(model, seed=1), padded(model, seed=2, length=7)]
    sites = find_sites(model)
    keep = 4 if sites[0].num_groups > 1 else 3
    criterion = NAEE()
    scores = score(model, criterion, batches=batches, keep=keep)
    for site in sites:
        losses = criterion.losses_[site.name]
        assert len(losses) == num_subsets(6, keep, site.num_groups)
        expected = naive_losses(model, site, batches, losses)
        assert max(losses.values()) > 0.01
        torch.testing.assert_close(
            torch.tensor(list(losses.values())),
            torch.tensor([expected[subset] for subset in losses]),
            rtol=1e-5,
            atol=1e-6,
        )
        best = min(expected, key=expected.get)
        assert scores[site.name].tolist() == [float(e in best) for e in range(6)]


def test_losses_do_not_depend_on_how_the_tokens_are_batched():
    model = tiny_moe("mixtral", num_experts=5)
    one = example_inputs(model, batch=6)
    rows = [{key: value[i : i + 1] for key, value in one.items()} for i in range(6)]
    together, apart, crowded = NAEE(), NAEE(), NAEE(cache_gib=5 * 32 * 4 * 13 / 2**30)
    score(model, together, batches=[one], keep=3)
    score(model, apart, batches=rows, keep=3)
    score(model, crowded, batches=[one], keep=3)
    for name, losses in together.losses_.items():
        for other in (apart, crowded):
            assert other.losses_[name] == pytest.approx(losses, rel=1e-6)


def test_keeping_every_expert_loses_nothing():
    model = tiny_moe("mixtral", num_experts=4)
    criterion = NAEE()
    scores = score(model, criterion, batches=[example_inputs(model)], keep=4)
    for name, values in scores.items():
        assert values.tolist() == [1.0] * 4
        assert criterion.losses_[name] == {(0, 1, 2, 3): 0.0}


def test_dropping_an_expert_that_no_token_uses_loses_nothing():
    model = tiny_moe("gpt_oss", num_experts=4)
    for site in find_sites(model):
        model.get_parameter(f"{site.router}.bias").data[2] = -1e4
    criterion = NAEE()
    scores = score(model, criterion, batches=[example_inputs(model)], keep=3)
    for name, values in scores.items():
        assert values.tolist() == [1.0, 1.0, 0.0, 1.0]
        losses = criterion.losses_[name]
        assert losses.pop((0, 1, 3)) == 0.0
        assert min(losses.values()) > 0.01


def test_model_is_left_as_it_was():
    model = tiny_moe("mixtral", num_experts=4).train()
    model.model.layers[1].eval()
    batch = example_inputs(model)
    modes = [module.training for module in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with torch.no_grad():
        before = model.eval()(**batch).logits
        for module, mode in zip(model.modules(), modes, strict=True):
            module.training = mode
        score(model, "naee", batches=[batch], keep=2)
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(model.eval()(**batch).logits, before)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all("forward" not in vars(module) for module in model.modules())


def test_experts_run_once_however_many_subsets_there_are():
    model = tiny_moe("mixtral", num_experts=6, num_hidden_layers=1)
    (site,) = find_sites(model)
    experts = model.get_submodule(site.experts)
    forward, tokens = experts.forward, []

    def counted(hidden, *routing):
        tokens.append(len(hidden))
        return forward(hidden, *routing)

    vars(experts)["forward"] = counted
    score(model, "naee", batches=[example_inputs(model)], keep=3)
    # One in the capturing forward, then one per expert: not one per subset, of which there are 20.
    assert tokens == [24] * (1 + 6)


def test_too_many_subsets_are_sampled_with_the_most_used_experts_among_them():
    model = tiny_moe("mixtral", num_experts=8)
    batches = [example_inputs(model)]
    first, second, other = NAEE(max_subsets=9), NAEE(max_subsets=9), NAEE(max_subsets=9)
    score(model, first, batches=batches, keep=4)
    score(model, second, batches=iter(batches), keep=4)
    score(model, other, batches=batches, keep=4, seed=1)
    usage = observe(model, batches)
    for name, losses in first.losses_.items():
        assert len(losses) == 9
        top = usage.layers[name].count.argsort(descending=True, stable=True)[:4]
        assert tuple(sorted(top.tolist())) in losses
        assert losses == second.losses_[name]
        assert set(losses) != set(other.losses_[name])


@pytest.mark.distributed
def test_two_ranks_with_half_the_rows_find_what_one_rank_with_all_finds():
    model = tiny_moe("mixtral", num_experts=8)
    batch = example_inputs(model, batch=4)

    def losses_of(rows):
        criterion = NAEE(max_subsets=12)
        own = {key: value[rows] for key, value in batch.items()}
        return score(model, criterion, batches=[own], keep=4), criterion.losses_

    scores, losses = losses_of(slice(None))
    for own_scores, own_losses in run_distributed(lambda rank: losses_of(slice(rank, None, 2))):
        assert all(torch.equal(own_scores[name], scores[name]) for name in scores)
        for name in losses:
            assert own_losses[name] == pytest.approx(losses[name], rel=1e-6)


def test_sampling_is_asked_for_only_where_subsets_are_too_many():
    model = tiny_moe("mixtral", num_experts=8)
    one, two = (site.name for site in find_sites(model))
    criterion = NAEE(max_subsets=20)
    score(model, criterion, batches=[example_inputs(model)], keep={one: 4, two: 7})
    assert [len(criterion.losses_[name]) for name in (one, two)] == [20, 8]


@pytest.mark.parametrize(
    ("family", "keep", "numbers"),
    [("mixtral", 1, "2, 3, 4"), ("mixtral", 9, "2, 3, 4"), ("deepseek_v3", 5, "4, 6, 8")],
)
def test_impossible_keep_is_refused_before_the_model_runs(family, keep, numbers):
    model = tiny_moe(family, num_experts=8)
    with pytest.raises(
        LitMoEError, match=rf"keep={keep} is impossible.*legal counts are {numbers}"
    ):
        score(model, "naee", batches=[], keep=keep)


def test_no_batches_are_refused():
    model = tiny_moe("mixtral", num_experts=4)
    with pytest.raises(LitMoEError, match="no calibration batch"):
        score(model, "naee", batches=[], keep=2)


def test_cache_too_small_for_one_row_is_refused_with_the_numbers():
    model = tiny_moe("mixtral", num_experts=4)
    with pytest.raises(LitMoEError, match=r"row has 12 tokens.* only 8 fit into cache_gib"):
        score(
            model, NAEE(cache_gib=4 * 32 * 4 * 8 / 2**30), batches=[example_inputs(model)], keep=2
        )


@pytest.mark.parametrize("field", ["max_tokens", "max_subsets", "cache_gib"])
def test_fields_must_be_positive(field):
    with pytest.raises(LitMoEError, match=f"naee: {field}=0 must be positive"):
        get_criterion("naee", **{field: 0})


def test_batches_are_cut_to_the_tokens_wanted():
    batch = {"input_ids": torch.zeros(5, 10, dtype=torch.long), "labels": None}
    sizes = [
        len(b["input_ids"])
        for b in small_batches([batch, batch], max_tokens=75, tokens_per_call=29)
    ]
    assert sizes == [2, 2, 1, 2, 1]


def test_batches_without_tokens_are_refused():
    with pytest.raises(LitMoEError, match=r"needs 'input_ids'; it has \['text'\]"):
        list(small_batches([{"text": "hello"}], max_tokens=9, tokens_per_call=9))


def test_combining_three_experts():
    outputs = torch.tensor([[[1.0, 2.0]], [[10.0, 20.0]], [[100.0, 200.0]]])
    assert combine(outputs, torch.tensor([[2, 0]]), torch.tensor([[0.5, 2.0]])).tolist() == [
        [52.0, 104.0]
    ]


def test_cached_experts_give_the_experts_back_even_after_an_error():
    model = tiny_moe("mixtral", num_experts=4)
    experts = model.get_submodule(find_sites(model)[0].experts)
    with pytest.raises(ZeroDivisionError), cached_experts(experts, 4):
        experts.train(mode=bool(1 / 0))
    assert "forward" not in vars(experts)


def test_subsets_of_groups_take_equally_many_of_each():
    subsets = list(all_subsets(6, 4, num_groups=2))
    assert len(subsets) == len(set(subsets)) == num_subsets(6, 4, 2) == 9
    assert all(sum(e < 3 for e in subset) == 2 for subset in subsets)
    assert list(all_subsets(5, 2)) == list(itertools.combinations(range(5), 2))


def test_sampled_subsets_are_distinct_and_hold_the_most_used():
    usage = torch.tensor([5.0, 1.0, 9.0, 1.0, 3.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    subsets = sampled_subsets(usage, 4, 2, limit=8, generator=generator)
    assert subsets[0] == (0, 2, 4, 5)
    assert len(set(subsets)) == 8
    assert all(sum(e < 3 for e in subset) == 2 for subset in subsets)
