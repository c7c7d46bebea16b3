"""Plain routers in place of mixed ones."""

import copy

import pytest
import torch

from lit_moe.adapters import find_sites
from lit_moe.errors import CalibrationError, PlanError
from lit_moe.merge_plan import MergePlan
from lit_moe.merging import merge
from lit_moe.mixing import mixed_layers
from lit_moe.projection import project_routers
from lit_moe.testing import example_inputs, run_distributed, tiny_moe

FAMILIES = ("mixtral", "olmoe", "gpt_oss", "glm4_moe", "flint")


def maps_of(model, noise, count=4):
    generator = torch.Generator().manual_seed(3)
    maps = {}
    for site in find_sites(model):
        dust = torch.randn(count, site.num_experts, generator=generator)
        maps[site.name] = torch.eye(site.num_experts)[1::2][:count] + noise * dust.abs()
    return maps


def mixing_plan(model, noise):
    maps = maps_of(model, noise)
    return MergePlan(maps_of(model, 0.0), maps, router_space="probabilities")


def texts(model, count=6):
    return [example_inputs(model, batch=4, length=16, seed=seed) for seed in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_hot_maps_are_rows_already(family):
    model = tiny_moe(family)
    plan, losses = project_routers(model, mixing_plan(model, 0.0), texts(model))
    assert plan.router_space == "rows"
    for layer, loss in losses.items():
        assert loss.divergence == pytest.approx(0.0, abs=1e-9)
        assert loss.tokens == 6 * 64
        torch.testing.assert_close(plan.routers[layer], plan.experts[layer], atol=1e-3, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_come_closer_to_mixed_probabilities_than_those_of_single_experts(family):
    model = tiny_moe(family)
    mixing = mixing_plan(model, 0.3)
    plan, losses = project_routers(model, mixing, texts(model))
    for loss in losses.values():
        assert 0 < loss.divergence < 0.7 * loss.divergence_of_likeness
        assert 0 <= loss.other_choices <= 1
    merged = copy.deepcopy(model)
    merge(merged, plan)
    assert mixed_layers(merged) == ()


def test_the_model_is_left_as_it_was():
    model = tiny_moe("mixtral")
    before = copy.deepcopy(model.state_dict())
    project_routers(model, mixing_plan(model, 0.2), texts(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(not m._forward_hooks for m in model.modules())


def test_padding_does_not_count():
    model = tiny_moe("mixtral")
    plain = texts(model, 2)
    padded = [{k: torch.nn.functional.pad(v, (0, 5)) for k, v in batch.items()} for batch in plain]
    plan, losses = project_routers(model, mixing_plan(model, 0.3), plain)
    _, same = project_routers(model, mixing_plan(model, 0.3), padded)
    for layer in plan:
        assert same[layer].tokens == losses[layer].tokens
        assert same[layer].divergence == pytest.approx(losses[layer].divergence, rel=1e-3)


def test_two_ranks_find_the_rows_of_one():
    model = tiny_moe("mixtral")
    batches = texts(model)
    alone, losses = project_routers(model, mixing_plan(model, 0.3), batches)

    def rank(index):
        plan, seen = project_routers(model, mixing_plan(model, 0.3), batches[index::2])
        return {k: v.tolist() for k, v in plan.routers.items()}, seen

    for routers, seen in run_distributed(rank, 2):
        for layer, rows in routers.items():
            assert seen[layer].tokens == losses[layer].tokens
            assert seen[layer].divergence == pytest.approx(losses[layer].divergence, rel=1e-4)
            torch.testing.assert_close(
                torch.tensor(rows, dtype=torch.float64), alone.routers[layer], atol=0.05, rtol=0
            )


def test_what_cannot_be_projected_is_refused():
    model = tiny_moe("mixtral")
    with pytest.raises(CalibrationError, match="there are no tokens"):
        project_routers(model, mixing_plan(model, 0.3), [])
    with pytest.raises(PlanError, match="made for another model"):
        project_routers(tiny_moe("mixtral", num_experts=6), mixing_plan(model, 0.3), texts(model))
