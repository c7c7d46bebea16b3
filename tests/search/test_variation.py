import numpy as np
import pytest

from lit_moe.errors import LitMoEError, PlanError
from lit_moe.plan import KeepPlan
from lit_moe.search import Genome, Maps, SearchSpace, genome_of_plan, one_hot
from lit_moe.search.options import Rates
from lit_moe.search.space import problem_of
from lit_moe.search.variation import (
    crossed,
    exchanges,
    given,
    group_by_cost,
    moved,
    random_genome,
    shaken,
)
from lit_moe.testing import tiny_moe
from tests.search.toy import toy_groups


def draw(seed=0):
    return np.random.Generator(np.random.PCG64(seed))


def test_a_random_genome_keeps_ascending_experts_and_both_maps_agree():
    generator = draw()
    for _ in range(20):
        genome = random_genome(generator, toy_groups(3), (4, 2, 8))
        assert genome.counts == (4, 2, 8)
        assert genome.only_drops
        for maps in genome.maps:
            assert np.array_equal(maps.experts, maps.routers)
            assert list(maps.experts.argmax(1)) == list(maps.kept or ())


def test_a_move_never_keeps_an_expert_twice_and_moves_about_as_many_rows_as_asked():
    generator, groups = draw(), toy_groups(4)
    parent = random_genome(generator, groups, (4,) * 4)
    changed = rows = 0
    for _ in range(500):
        child = moved(generator, parent, groups, Rates())
        for old, new in zip(parent.maps, child.maps, strict=True):
            assert new.kept is not None
            different = (old.experts != new.experts).any(axis=1).sum()
            rows += different
            changed += different > 0
    # 0.25 / (1 - 0.75^4) of the groups are touched, 0.15 of 4 rows move in each
    expected = 500 * 4 * 0.25 / (1 - 0.75**4) * 4 * 0.15
    assert rows == pytest.approx(expected, rel=0.1)
    assert 0 < changed < rows


def test_noise_and_crossing_stay_within_the_routing_group_of_each_row():
    generator, groups = draw(), toy_groups(2, routing_groups=2)
    counts = (4, 4)
    first, second = (random_genome(generator, groups, counts) for _ in range(2))
    first = given(generator, first, groups, (2, 2))  # rows of a new expert are put in order
    second = given(generator, second, groups, (2, 2))
    for child in (first, second):
        for _ in range(20):
            child = shaken(generator, child, groups, Rates(), router=True)  # noqa: PLW2901
        crossing = crossed(generator, child, child, Rates(), coupled=False)
        for maps in (*child.maps, *crossing.maps):
            half = len(maps.experts) // 2
            for values in (maps.experts, maps.routers):
                assert not values[:half, 4:].any()
                assert not values[half:, :4].any()
                assert np.count_nonzero(values[:half, :4]) > half


def test_experts_stay_within_their_routing_group():
    generator, groups = draw(), toy_groups(2, routing_groups=2)
    genome = random_genome(generator, groups, (4, 4))
    for _ in range(50):
        genome = moved(generator, genome, groups, Rates())
        for maps in genome.maps:
            assert sum(e < 4 for e in maps.kept or ()) == 2
    fewer = given(generator, genome, groups, (2, 2))
    assert sorted(fewer.counts) == [2, 6]
    for maps in fewer.maps:
        assert sum(e < 4 for e in maps.kept or ()) * 2 == len(maps.kept or ())


def test_giving_keeps_the_total_and_the_floors():
    generator, groups = draw(), toy_groups(3)
    genome = random_genome(generator, groups, (4, 4, 4))
    seen = set()
    for _ in range(200):
        genome = given(generator, genome, groups, (2, 2, 2))
        assert sum(genome.counts) == 12
        assert min(genome.counts) >= 2
        assert genome.only_drops
        seen.add(genome.counts)
    assert len(seen) > 5


def test_groups_of_unequally_many_layers_exchange_what_leaves_the_total():
    generator = draw()
    small, large = toy_groups(1, layers=2)[0], toy_groups(1, layers=3)[0]
    groups = (small, large, toy_groups(1, layers=2, routing_groups=2)[0])
    genome, seen = random_genome(generator, groups, (4, 4, 4)), set()
    for _ in range(200):
        genome = given(generator, genome, groups, (1, 1, 2))
        first, second, third = genome.counts
        assert 2 * first + 3 * second + 2 * third == 28
        assert third % 2 == 0
        assert genome.only_drops
        seen.add(genome.counts)
    assert {(7, 2, 4), (1, 6, 4), (2, 4, 6)} <= seen


def test_counts_that_cannot_vary_are_refused():
    model = tiny_moe("mixtral")
    spaces = (
        SearchSpace(keep_ratio=0.5, groups=1, non_uniform=True),
        SearchSpace(keep_ratio=0.5, groups=2, non_uniform=True, floor=4),
        SearchSpace(keep_ratio=1.0, groups=2, non_uniform=True),
    )
    for space in spaces:
        with pytest.raises(LitMoEError, match="space.non_uniform has nothing to vary"):
            problem_of(model, space)
    problem = problem_of(model, SearchSpace(keep_ratio=0.5, groups=2, non_uniform=True))
    assert exchanges(problem.groups, problem.counts, problem.floors) == [
        ((0, 1), (1, 1)),
        ((1, 1), (0, 1)),
    ]


def test_noise_touches_a_quarter_of_the_elements_of_touched_maps():
    generator, groups, rates = draw(), toy_groups(4), Rates(normalise=0.0)
    parent = random_genome(generator, groups, (4,) * 4)
    sizes, uncoupled = [], 0
    for _ in range(300):
        child = shaken(generator, parent, groups, rates, router=True)
        for old, new in zip(parent.maps, child.maps, strict=True):
            for name in ("experts", "routers"):
                noise = (getattr(new, name) - getattr(old, name))[
                    getattr(new, name) != getattr(old, name)
                ]
                sizes += noise.tolist()
            uncoupled += not np.array_equal(new.experts, new.routers)
    maps_touched = 300 * 8 * 0.25 / (1 - 0.75**8)
    assert len(sizes) == pytest.approx(maps_touched * 32 * 0.25, rel=0.1)
    assert np.std(sizes) == pytest.approx(0.065, rel=0.05)
    assert np.mean(sizes) == pytest.approx(0.0, abs=0.003)
    assert uncoupled > 0


def test_a_router_that_only_chooses_gets_no_noise():
    generator, groups = draw(), toy_groups(2)
    parent = random_genome(generator, groups, (4, 4))
    for _ in range(20):
        child = shaken(generator, parent, groups, Rates(), router=False)
        for old, new in zip(parent.maps, child.maps, strict=True):
            assert np.array_equal(old.routers, new.routers)


def test_normalising_divides_rows_of_expert_maps_but_not_by_nothing():
    groups = toy_groups(1)
    rows = np.zeros((2, 8))
    rows[0, :2], rows[1, :2] = (3.0, 1.0), (1.0, -1.0)
    rates = Rates(normalise=1.0, noise=0.0)
    child = shaken(draw(), Genome((Maps(rows, rows),)), groups, rates, router=True)
    assert child.maps[0].experts[:, :2].tolist() == [[0.75, 0.25], [1.0, -1.0]]
    assert np.array_equal(child.maps[0].routers, rows)


def test_a_crossing_takes_rows_and_maps_of_both_parents_and_nothing_else():
    generator = draw()
    first, second = (Genome((Maps(np.full((3, 8), v), np.full((3, 8), v)),)) for v in (1.0, 2.0))
    mixed, whole, parted = 0, set(), 0
    for _ in range(300):
        maps = crossed(generator, first, second, Rates(), coupled=False).maps[0]
        rows = maps.experts[:, 0].tolist()
        assert set(np.unique(maps.experts)) <= {1.0, 2.0}
        mixed += len(set(rows)) == 2
        whole.add(tuple(rows))
        parted += rows != maps.routers[:, 0].tolist()
        both = crossed(generator, first, second, Rates(), coupled=True).maps[0]
        assert np.array_equal(both.experts, both.routers)
    assert 0 < mixed < 150
    assert {(1.0,) * 3, (2.0,) * 3} <= whole
    assert parted > 0


def test_a_crossing_of_different_counts_has_the_counts_of_the_first():
    groups = toy_groups(2)
    first = random_genome(draw(), groups, (3, 5))
    second = random_genome(draw(1), groups, (5, 3))
    assert crossed(draw(), first, second, Rates(), coupled=False).counts == (3, 5)


def test_late_groups_are_touched_more_often_by_cost():
    generator, groups = draw(), toy_groups(12)
    parent = random_genome(generator, groups, (4,) * 12)
    rates = Rates(row=1.0)
    first = []
    for _ in range(600):
        only = group_by_cost(generator, groups)
        child = moved(generator, parent, groups, rates, only=only)
        pairs = zip(parent.maps, child.maps, strict=True)
        (place,) = [i for i, (old, new) in enumerate(pairs) if old.key != new.key]
        first.append(12 - place)
    # each group costs as much in all: 12 / H(12) layers of 12 run per candidate
    assert np.mean(first) == pytest.approx(12 / sum(1 / n for n in range(1, 13)), rel=0.1)


def test_a_child_differs_from_its_first_parent_in_the_one_group_that_is_touched():
    generator, groups = draw(), toy_groups(4)
    first, second = (random_genome(generator, groups, (4,) * 4) for _ in range(2))
    for _ in range(50):
        child = crossed(generator, first, second, Rates(), coupled=False, only=2)
        child = shaken(generator, child, groups, Rates(normalise=0.5), router=True, only=2)
        same = [a.key == b.key for a, b in zip(first.maps, child.maps, strict=True)]
        assert same == [True, True, False, True]


def test_equal_candidates_have_one_key_whatever_the_order_of_their_experts():
    groups = toy_groups(1)
    one, two = (Genome((one_hot(ids, 8),)) for ids in ((1, 4, 6), (6, 1, 4)))
    assert one.key == two.key
    assert one == two
    assert hash(one) == hash(two)
    assert one.key != Genome((one_hot((1, 4, 7), 8),)).key
    maps = np.eye(8)[[1, 4]]
    apart = Genome((Maps(maps, maps[::-1]),))
    assert apart.key != Genome((one_hot((1, 4), 8),)).key
    assert not apart.only_drops
    zero = Genome((Maps(maps * -0.0 + maps, maps),))
    assert zero.key == Genome((one_hot((1, 4), 8),)).key
    plan = KeepPlan({"layers.0.mlp.0": (1, 4, 6)}, {"layers.0.mlp.0": 8})
    assert genome_of_plan(plan, groups, (3,)) == one
    assert one.keep_plan(groups) == plan


def test_layers_of_one_group_vote_for_the_experts_of_a_plan():
    groups = toy_groups(1, layers=3)
    kept = [(0, 1, 2), (1, 2, 3), (2, 3, 7)]
    plan = KeepPlan(
        dict(zip(groups[0].layers, kept, strict=True)), dict.fromkeys(groups[0].layers, 8)
    )
    assert genome_of_plan(plan, groups, (3,)).maps[0].kept == (1, 2, 3)
    with pytest.raises(PlanError, match="another model"):
        genome_of_plan(plan, toy_groups(1), (3,))


def test_maps_must_fit_each_other():
    with pytest.raises(PlanError, match="one shape"):
        Maps(np.eye(4)[:2], np.eye(4)[:3])
    with pytest.raises(PlanError, match="one shape"):
        Maps(np.ones((5, 4)), np.ones((5, 4)))
