import numpy as np
import pytest
import torch

from lit_moe.adapters import find_sites
from lit_moe.errors import PlanError, UnsupportedModelError
from lit_moe.masking import masked
from lit_moe.merging import merge
from lit_moe.search import Genome, LiveModel, Maps, group_layers, one_hot
from lit_moe.search.material import ByteCache
from lit_moe.testing import example_inputs, tiny_moe

FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "gpt_oss", "granitemoe")
SPACES = ("probabilities", "rows")


def logits_of(model, inputs=None):
    with torch.no_grad():
        return model(**(inputs or example_inputs(model))).logits


def free_genome(num_groups=2, experts=5, seed=0):
    draw = np.random.default_rng(seed)
    return Genome(
        tuple(
            Maps(
                np.eye(8)[:experts] + 0.1 * draw.standard_normal((experts, 8)),
                np.eye(8)[1 : experts + 1] + 0.1 * draw.standard_normal((experts, 8)),
            )
            for _ in range(num_groups)
        )
    )


def live_of(model, groups="per_layer", **options):
    return LiveModel(model, group_layers(find_sites(model), groups), **options)


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_candidate_computes_what_the_merged_model_does_and_leaves_nothing_behind(family, space):
    model = tiny_moe(family)
    live = live_of(model, router_space=space)
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    values = {name: tensor.clone() for name, tensor in tensors.items()}
    config, plain = model.config.to_dict(), logits_of(model)
    dropping = Genome((one_hot((0, 2, 3, 6, 7), 8), one_hot((1, 2, 3, 4, 5), 8)))
    for genome in (free_genome(), dropping):
        with live.applied(genome):
            candidate = logits_of(model)
        merged = tiny_moe(family)
        merge(merged, live.plan(genome))
        # A mask and a cut router multiply other shapes, which some processors round differently.
        torch.testing.assert_close(candidate, logits_of(merged), rtol=0, atol=1e-5)
        assert not torch.allclose(candidate, plain, atol=1e-3)
    assert torch.equal(logits_of(model), plain)
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert all(after[name] is tensor for name, tensor in tensors.items())
    assert all(torch.equal(after[name], value) for name, value in values.items())
    assert list(after) == list(tensors)
    assert model.config.to_dict() == config


@pytest.mark.parametrize("space", SPACES)
def test_the_identity_changes_nothing_at_all(space):
    model = tiny_moe("olmoe")
    live = live_of(model, 1, router_space=space)
    everyone = Genome((one_hot(range(8), 8),))
    assert live.tags(everyone) == {}
    with live.applied(everyone):
        assert torch.equal(logits_of(model), logits_of(tiny_moe("olmoe")))


def test_dropping_is_the_keep_plan_where_weights_are_renormalised():
    model = tiny_moe("mixtral")
    live = live_of(model, 1)
    genome = Genome((one_hot((6, 1, 3), 8),))
    plan = genome.keep_plan(live.groups)
    assert plan is not None
    with masked(model, plan):
        expected = logits_of(model)
    with live.applied(genome):
        assert torch.equal(logits_of(model), expected)


def test_dropping_leaves_others_their_weights_where_they_are_not_renormalised():
    model = tiny_moe("olmoe", norm_topk_prob=False)
    genome = Genome((one_hot((0, 1, 3), 8),))
    candidates = {}
    for space in SPACES:
        with live_of(model, 1, router_space=space).applied(genome):
            candidates[space] = logits_of(model)
    plan = genome.keep_plan(group_layers(find_sites(model), 1))
    assert plan is not None
    with masked(model, plan):
        assert torch.equal(logits_of(model), candidates["rows"])
    assert (candidates["probabilities"] - candidates["rows"]).abs().max() > 1e-2


def test_fewer_active_experts_come_and_go():
    model = tiny_moe("mixtral")
    live, plain = live_of(model, 1), logits_of(model)
    everyone = Genome((one_hot(range(8), 8),))
    merged = tiny_moe("mixtral")
    merge(merged, live.plan(free_genome(1), top_k=1))
    with live.active(1):
        assert len(live.tags(everyone)) == 2
        assert not torch.allclose(logits_of(model), plain, atol=1e-3)
        with live.applied(free_genome(1)):
            assert torch.equal(logits_of(model), logits_of(merged))
    assert torch.equal(logits_of(model), plain)
    with live.active(2):
        assert live.tags(everyone) == {}


def test_a_candidate_that_breaks_leaves_the_model_whole():
    model = tiny_moe("mixtral")
    live, plain = live_of(model), logits_of(model)
    experts = model.get_submodule("model.layers.1.mlp.experts")
    handle = experts.register_forward_hook(lambda *_: 1 // 0)
    with live.applied(free_genome()), pytest.raises(ZeroDivisionError):
        logits_of(model)
    handle.remove()
    assert torch.equal(logits_of(model), plain)


def test_merged_layers_are_made_when_needed_and_no_more_is_kept_than_allowed():
    model = tiny_moe("mixtral")
    small, large = live_of(model, cache_bytes=20_000), live_of(model)
    for live in (small, large):
        with live.applied(free_genome()):
            assert live.cache.num_bytes == 0
            logits_of(model)
    per_expert = 4 * 3 * 24 * 32
    assert large.cache.num_bytes == 2 * 2 * 5 * per_expert  # each expert, and each layer
    assert 0 < small.cache.num_bytes <= 20_000
    with small.applied(free_genome()):
        a = logits_of(model)
    with large.applied(free_genome()):
        assert torch.equal(a, logits_of(model))


def test_what_was_not_used_for_longest_goes_first():
    cache = ByteCache(8)
    made: list[str] = []

    def make(name):
        def tensors():
            made.append(name)
            return {name: torch.zeros(1)}

        return tensors

    for name in ("a", "b", "a", "c", "a", "b"):
        cache.get((name,), make(name))
    assert made == ["a", "b", "c", "b"]
    assert cache.num_bytes == 8
    cache.clear()
    assert cache.num_bytes == 0


def within_groups(maps):
    """Maps of which a row is made of experts of its own half only, as many of each half."""
    half = np.arange(8) // 4
    keep = (np.arange(4) // 2)[:, None] == half
    return Maps(maps.experts * keep, maps.routers * keep)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "switch_transformers"])
def test_routing_within_groups_and_experts_that_are_modules_compute_what_the_merged_model_does(
    family,
):
    model, merged = tiny_moe(family), tiny_moe(family)
    sites = find_sites(model)
    live, plain = live_of(model, router_space="rows"), logits_of(model)
    draw = np.random.default_rng(0)
    start = Maps(np.eye(8)[[0, 2, 4, 7]], np.eye(8)[[0, 2, 4, 7]])
    noise = [0.1 * draw.standard_normal((2, 4, 8)) for _ in sites]
    maps = [Maps(start.experts + a, start.routers + b) for a, b in noise]
    genome = Genome(
        tuple(within_groups(m) for m in maps) if sites[0].num_groups > 1 else tuple(maps)
    )
    with live.applied(genome):
        candidate = logits_of(model)
    merge(merged, live.plan(genome))
    assert torch.equal(candidate, logits_of(merged))
    assert not torch.allclose(candidate, plain, atol=1e-3)
    assert torch.equal(logits_of(model), plain)


def test_families_that_cannot_be_merged_live_can_still_be_searched_for_what_to_drop():
    with pytest.raises(UnsupportedModelError, match="table of token ids; search for what to drop"):
        live_of(tiny_moe("deepseek_v4"))
    model = tiny_moe("deepseek_v3")
    with pytest.raises(UnsupportedModelError, match="set router_space: rows, or search for what"):
        live_of(model)
    live = live_of(model, merges=False)
    genome = Genome((one_hot((0, 1, 4, 7), 8),))
    plan = genome.keep_plan(live.groups)
    assert plan is not None
    with masked(model, plan):
        expected = logits_of(model)
    with live.applied(genome):
        assert torch.equal(logits_of(model), expected)
    with pytest.raises(PlanError, match="router maps act on rows"):
        live_of(tiny_moe("dbrx"))
