"""What holds for every criterion: one row per criterion, all tests on every row.

A new criterion gets these tests by adding its row.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import pytest
import torch

from lit_moe.adapters import find_sites
from lit_moe.criteria import Evidence, available, get_criterion
from lit_moe.stats import GradientObservation, GradientStats
from lit_moe.stats.observation import LayerStats, Observation
from lit_moe.testing import example_inputs, tiny_moe

NUM_EXPERTS, HIDDEN = 6, 7


@dataclass(frozen=True)
class Row:
    """What is expected of one criterion.

    Attributes:
        needs: what it declares.
        permutes: whether relabelling the experts relabels the scores.
        rtol: how exactly; sums over experts in another order are rounded otherwise.
    """

    needs: frozenset[str]
    permutes: bool = True
    rtol: float = 1e-12


ROUTING, WEIGHTS, FORWARD, GRADIENTS = (
    frozenset({need}) for need in ("routing", "weights", "forward", "gradients")
)
PAIRS, VOCABULARY, OUTPUTS = (ROUTING | {kind} for kind in ("pairs", "vocabulary", "outputs"))

TABLE: Mapping[str, Row] = {
    "aimer": Row(WEIGHTS),
    "eae": Row(OUTPUTS),
    "ean": Row(OUTPUTS),
    "ean_mean": Row(ROUTING),
    "ean_sum": Row(ROUTING),
    "eao": Row(OUTPUTS),
    "eas": Row(OUTPUTS),
    "ecc": Row(PAIRS),
    "ege": Row(GRADIENTS),
    "egn": Row(GRADIENTS),
    "ego": Row(GRADIENTS),
    "egs": Row(GRADIENTS),
    "ets": Row(VOCABULARY),
    "euf": Row(ROUTING),
    "evtc": Row(VOCABULARY),
    "ewn": Row(WEIGHTS),
    "ews": Row(WEIGHTS, rtol=1e-4),
    "frequency": Row(ROUTING),
    "gate_sum": Row(ROUTING),
    "importance": Row(ROUTING),
    "man": Row(ROUTING),
    "msan": Row(ROUTING),
    "naee": Row(FORWARD),
    "obs": Row(FORWARD, rtol=1e-4),
    "random": Row(frozenset(), permutes=False),
    "reap": Row(ROUTING),
    "router_norm": Row(WEIGHTS),
    "rwn": Row(WEIGHTS),
    "soft_count": Row(ROUTING),
    "weight_norm": Row(WEIGHTS),
    "weighted_ean_sum": Row(ROUTING),
    "wsr": Row(WEIGHTS),
}


def test_every_registered_criterion_has_a_row():
    # router_change compares two checkpoints: tests/criteria/test_router_change.py
    assert sorted([*TABLE, "router_change"]) == available()


@pytest.fixture(scope="module")
def evidence():
    """Of all kinds; the observation is random and has an expert without tokens per layer."""
    model = tiny_moe("mixtral", num_experts=NUM_EXPERTS)
    sites = find_sites(model)
    generator = torch.Generator().manual_seed(0)
    layers = {site.name: random_stats(generator) for site in sites}
    return Evidence(
        observation=Observation(layers),
        gradients=GradientObservation({s.name: random_gradients(generator) for s in sites}, 9, 8),
        model=model,
        sites=sites,
        batches=[example_inputs(model)],
        keep={site.name: 3 for site in sites},
        seed=5,
    )


def random_stats(generator):
    count = 1 + torch.randperm(89, generator=generator)[:NUM_EXPERTS].double()
    count[4] = 0
    sums = [torch.rand(NUM_EXPERTS, generator=generator).double() * count for _ in range(6)]
    pairs, overlap = (
        torch.randint(1, 50, (NUM_EXPERTS, NUM_EXPERTS), generator=generator).double()
        for _ in range(2)
    )
    first, direction = torch.randn(2, NUM_EXPERTS, HIDDEN, generator=generator).double()
    return LayerStats(
        100,
        count,
        *sums,
        pair_count=pairs + pairs.T,
        vocabulary_overlap=overlap + overlap.T,
        vocabulary_size=200,
        output_sum=first,
        output_square_sum=first.square() + count[:, None],
        direction_sum=direction,
        outlier_count=torch.rand(NUM_EXPERTS, generator=generator).double(),
    )


def random_gradients(generator):
    flat = torch.randn(NUM_EXPERTS, 20, generator=generator).double()
    deviation = torch.rand(NUM_EXPERTS, HIDDEN, generator=generator).double()
    outliers = torch.rand(NUM_EXPERTS, generator=generator).double()
    return GradientStats(flat @ flat.T, deviation, outliers, torch.ones(NUM_EXPERTS))


@pytest.mark.parametrize("name", TABLE)
def test_needs_are_declared(name):
    assert get_criterion(name).needs == TABLE[name].needs


@pytest.mark.parametrize("name", TABLE)
def test_scores_are_finite_float64_on_cpu_of_shape_experts_for_every_layer(name, evidence):
    scores = get_criterion(name).scores(evidence)
    assert list(scores) == [site.name for site in evidence.sites]
    for values in scores.values():
        assert values.shape == (NUM_EXPERTS,)
        assert values.dtype == torch.float64
        assert values.device.type == "cpu"
        assert values.isfinite().all()
        assert not values.requires_grad


@pytest.mark.parametrize("name", TABLE)
def test_scores_tell_experts_apart(name, evidence):
    for values in get_criterion(name).scores(evidence).values():
        assert values.unique().numel() > 1


@pytest.mark.parametrize("name", TABLE)
def test_same_seed_gives_the_same_scores(name, evidence):
    first, second = (get_criterion(name).scores(evidence) for _ in range(2))
    assert all(torch.equal(first[layer], second[layer]) for layer in first)


@pytest.mark.parametrize("name", TABLE)
def test_evidence_is_left_as_it_was(name, evidence):
    tensors = [*evidence.model.state_dict().values()]
    for seen in (evidence.observation, evidence.gradients):
        tensors += [t for s in seen.layers.values() for t in tensors_of(s).values()]
    before = [tensor.clone() for tensor in tensors]
    get_criterion(name).scores(evidence)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


@pytest.mark.parametrize("name", [name for name, row in TABLE.items() if row.permutes])
def test_relabelling_experts_relabels_scores(name, evidence):
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    scores = get_criterion(name).scores(evidence)
    moved = get_criterion(name).scores(relabelled(evidence, order))
    for layer, values in scores.items():
        torch.testing.assert_close(moved[layer], values[order], rtol=TABLE[name].rtol, atol=0.0)


def relabelled(evidence, order):
    """Return evidence of the same model with expert ``order[i]`` at place ``i``."""
    observation, gradients = (
        replace(seen, layers={name: moved(stats, order) for name, stats in seen.layers.items()})
        for seen in (evidence.observation, evidence.gradients)
    )
    model = tiny_moe("mixtral", num_experts=NUM_EXPERTS)
    for site in evidence.sites:
        for axis in site.axes:
            parameter = model.get_parameter(axis.name)
            parameter.data = parameter.data.index_select(axis.dim, order)
    return replace(evidence, observation=observation, gradients=gradients, model=model)


def moved(stats, order):
    """Relabel the first axis, and the second where it counts experts too."""
    changes = {key: value[order] for key, value in tensors_of(stats).items()}
    square = {k: v[:, order] for k, v in changes.items() if v.shape == (len(order),) * 2}
    return replace(stats, **{**changes, **square})


def tensors_of(stats):
    values = {field.name: getattr(stats, field.name) for field in fields(stats)}
    return {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}
