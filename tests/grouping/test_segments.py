import pytest
import torch
from torch.nn import functional as F

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.errors import LitMoEError
from lit_moe.grouping import SegmentOptions
from lit_moe.grouping.align import neurons
from lit_moe.grouping.segments import as_tensors, recombine, router_shares, spherical_means
from lit_moe.testing import tiny_moe
from tests.grouping.models import copies


def weights_of(model):
    found = adapter_for(model.config).expert_weights(model, find_sites(model)[0])
    return {name: tensor.detach() for name, tensor in found.items()}


def random_weights(num_experts=4, width=6, hidden=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    return {k: torch.randn(num_experts, *s, generator=generator) for k, s in shapes.items()}


def test_the_segments_of_an_expert_sum_to_the_expert():
    weights, x = random_weights(), torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    whole = (F.silu(x @ weights["gate"][2].T) * (x @ weights["up"][2].T)) @ weights["down"][2].T
    total = torch.zeros_like(whole)
    for segment in neurons(weights, 2):
        gate, up, down = segment.split(5)
        total += (F.silu(x @ gate) * (x @ up))[:, None] * down
    torch.testing.assert_close(total, whole)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "nemotron_h"])
def test_segments_become_the_tensors_that_they_were(family):
    weights = weights_of(tiny_moe(family))
    for name, tensor in as_tensors(neurons(weights, 3), weights).items():
        assert torch.equal(tensor, weights[name][3]), name


def test_above_the_largest_cosine_nothing_is_handed_on():
    weights = random_weights()
    found = recombine(weights, (0, 3), torch.ones(4), SegmentOptions(tau=1.0))
    assert int(found.moved.sum()) == 0
    for name, tensor in found.weights.items():
        assert torch.equal(tensor, weights[name][[0, 3]])


def test_below_every_cosine_all_segments_go_to_somebody():
    found = recombine(random_weights(), (0, 3), torch.ones(4), SegmentOptions(tau=-1.0))
    assert found.moved.sum(dim=0).tolist() == [0, 6, 6, 0]


def test_a_copy_goes_to_its_twin_and_changes_nothing():
    weights = weights_of(copies())
    found = recombine(weights, (0, 1, 2, 3, 5, 7), torch.ones(8), SegmentOptions(tau=0.99, steps=3))
    assert found.moved[1].tolist() == [0, 0, 0, 0, 24, 0, 0, 0]
    assert found.moved[3].tolist() == [0, 0, 0, 0, 0, 0, 24, 0]
    for name, tensor in found.weights.items():
        torch.testing.assert_close(tensor, weights[name][[0, 1, 2, 3, 5, 7]])


def test_the_gate_takes_part_in_the_cosine_only_when_asked():
    weights = random_weights(2)
    for name in ("up", "down"):
        weights[name][1] = weights[name][0]
    blind = recombine(weights, (0,), torch.ones(2), SegmentOptions(tau=0.99))
    seeing = recombine(weights, (0,), torch.ones(2), SegmentOptions(tau=0.99, gate=True))
    assert int(blind.moved[0, 1]) == 6
    assert int(seeing.moved[0, 1]) == 0


def test_spherical_means_by_hand():
    pool = torch.tensor([[2.0, 0.0], [0.0, 1.0], [4.0, 0.1]])
    means = spherical_means(pool, torch.tensor([3.0, 1.0, 1.0]), pool[:2], steps=5)
    length = (3 * 2 + 1 * (16.01**0.5)) / 4
    unit = pool[2] / pool[2].norm()
    expected = (3 * torch.tensor([1.0, 0.0]) + unit) / 4 * length
    torch.testing.assert_close(means, torch.stack([expected, pool[1]]))


def test_a_centre_that_nobody_joins_stays():
    pool = torch.tensor([[1.0, 0.0], [1.0, 0.01]])
    centres = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    assert spherical_means(pool, torch.ones(2), centres, steps=2)[1].tolist() == [-1.0, 0.0]


def test_important_experts_pull_more():
    weights = random_weights(2)
    light, heavy = (
        recombine(weights, (0,), torch.tensor([1.0, mass]), SegmentOptions(tau=-1.0))
        for mass in (0.01, 100.0)
    )
    change = [float((r.weights["up"][0] - weights["up"][0]).norm()) for r in (light, heavy)]
    assert change[0] < 0.3 * change[1]


@pytest.mark.parametrize("start", ["own", "largest_gate"])
def test_a_rebuilt_expert_has_its_old_shape(start):
    weights = random_weights()
    found = recombine(weights, (1,), torch.ones(4), SegmentOptions(tau=-1.0, start=start))
    assert {k: v.shape for k, v in found.weights.items()} == {
        k: (1, *v.shape[1:]) for k, v in weights.items()
    }
    assert all(v.isfinite().all() for v in found.weights.values())


def test_router_shares_by_hand():
    moved = torch.tensor([[0, 3, 0, 0], [0, 1, 0, 0]])
    shares = router_shares(moved, (0, 3), width=4)
    expected = [[1 / 1.75, 0.75 / 1.75, 0, 0], [0, 0.25 / 1.25, 0, 1 / 1.25]]
    torch.testing.assert_close(shares, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"tau": 1.5}, "tau=1.5 is no cosine"), ({"start": "random"}, "start"), ({"steps": 0}, "st")],
)
def test_options_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(LitMoEError, match=message):
        SegmentOptions(**fields)
