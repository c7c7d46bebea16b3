import itertools

import numpy as np
import pytest
import torch

from lit_moe.errors import LitMoEError
from lit_moe.grouping.partition import (
    cohesion,
    num_partitions,
    partition,
    partition_layer,
)

METHODS = ("auto", "exhaustive", "average", "spectral", "centroids")


def random_similarity(num_experts, seed=0):
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(num_experts, 5, generator=generator, dtype=torch.float64)
    return vectors @ vectors.T


def saliency(num_experts):
    return torch.rand(num_experts, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("num_experts", [1, 2, 7, 8])
def test_there_are_exactly_so_many_groups_and_none_is_empty(method, num_experts):
    for num_groups in range(1, num_experts + 1):
        found = partition(
            random_similarity(num_experts),
            num_groups,
            method=method,
            saliency_E=saliency(num_experts),
        )
        assert len(found) == num_groups
        assert all(found)
        assert sorted(itertools.chain(*found)) == list(range(num_experts))
        assert [group[0] for group in found] == sorted(group[0] for group in found)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_similarities_still_give_exactly_so_many_groups(method, value):
    for num_groups in range(1, 9):
        found = partition(
            torch.full((8, 8), value), num_groups, method=method, saliency_E=saliency(8)
        )
        assert len(found) == num_groups


@pytest.mark.parametrize("method", ["auto", "exhaustive", "average", "spectral"])
def test_two_clear_clusters_are_found(method):
    similarity = torch.full((6, 6), 0.1)
    for ids in ((0, 2, 5), (1, 3, 4)):
        similarity[np.ix_(ids, ids)] = 0.8
    similarity.fill_diagonal_(1)
    assert partition(similarity, 2, method=method) == ((0, 2, 5), (1, 3, 4))


@pytest.mark.parametrize("method", METHODS[:4])
def test_scale_and_offset_change_nothing(method):
    similarity = random_similarity(8)
    for changed in (3 * similarity, similarity - 100, similarity / 50 + 1):
        assert partition(changed, 4, method=method) == partition(similarity, 4, method=method)


@pytest.mark.parametrize(("num_experts", "num_groups"), [(6, 3), (7, 2), (7, 5)])
def test_the_exhaustive_search_is_never_beaten(num_experts, num_groups):
    similarity = random_similarity(num_experts)
    found = partition(similarity, num_groups, method="exhaustive")
    best = np.array([[next(n for n, g in enumerate(found) if e in g) for e in range(num_experts)]])
    tried = [
        labels
        for labels in itertools.product(range(num_groups), repeat=num_experts)
        if len(set(labels)) == num_groups
    ]
    values = cohesion(similarity.numpy(), np.array(tried))
    assert float(cohesion(similarity.numpy(), best)[0]) == pytest.approx(values.max(), rel=1e-12)
    assert num_partitions(num_experts, num_groups) == len({canonical(t) for t in tried})


def canonical(labels):
    names: dict[int, int] = {}
    return tuple(names.setdefault(label, len(names)) for label in labels)


def test_cohesion_by_hand():
    similarity = np.array([[1.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 1.0]])
    values = cohesion(similarity, np.array([[0, 0, 1], [0, 1, 1], [0, 0, 0]]))
    assert values.tolist() == pytest.approx([1.5 + 1, 1 + 1.2, 4.4 / 3])


def test_experts_gather_around_the_most_salient():
    similarity = torch.tensor(
        [[1.0, 0.9, 0.1, 0.2], [0.9, 1.0, 0.3, 0.8], [0.1, 0.3, 1.0, 0.7], [0.2, 0.8, 0.7, 1.0]]
    )
    weights = torch.tensor([5.0, 1.0, 4.0, 2.0])
    found = partition(similarity, 2, method="centroids", saliency_E=weights)
    assert found == ((0, 1), (2, 3))


def test_protected_experts_stay_alone_and_groups_do_not_cross_routing_groups():
    similarity = random_similarity(8)
    similarity[1, 6] = similarity[6, 1] = 1e3
    found = partition_layer(similarity, 4, protected=frozenset({2}), routing_groups=2)
    assert (2,) in found
    assert len(found) == 4
    assert [len({e // 4 for e in group}) for group in found] == [1, 1, 1, 1]
    assert [group[0] // 4 for group in found] == [0, 0, 1, 1]
    everyone = partition_layer(similarity, 8, protected=frozenset(range(8)))
    assert everyone == tuple((e,) for e in range(8))


def test_many_experts_are_linked_quickly():
    found = partition(random_similarity(128), 64)
    assert len(found) == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_groups": 0}, "8 experts cannot form 0 groups; 1 to 8"),
        ({"num_groups": 9}, "8 experts cannot form 9 groups; 1 to 8"),
        ({"method": "kmeans"}, "partition='kmeans' is unknown; there are auto"),
        ({"method": "centroids"}, "needs to know which experts matter"),
        ({"similarity_EE": torch.full((8, 8), float("nan"))}, "not finite"),
        ({"similarity_EE": torch.ones(8, 7)}, r"must be \(E, E\), not \(8, 7\)"),
        (
            {"similarity_EE": torch.ones(16, 16), "num_groups": 8, "method": "exhaustive"},
            "2,141,764,053 partitions into 8 groups, too many",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(change, message):
    asked = {"similarity_EE": random_similarity(8), "num_groups": 4, **change}
    with pytest.raises(LitMoEError, match=message):
        partition(asked.pop("similarity_EE"), asked.pop("num_groups"), **asked)


def test_protection_must_leave_a_group_for_the_others():
    with pytest.raises(LitMoEError, match="4 groups were asked for, but 4 of 8 experts are prot"):
        partition_layer(random_similarity(8), 4, protected=frozenset(range(4)))
