from typing import Any, cast

import pytest

from lit_moe.errors import LitMoEError, NoEffectWarning
from lit_moe.search import Effort, Evolution, Genome, Problem, Rates, Score, SearchSpace, one_hot
from lit_moe.search.options import Racing
from tests.search.toy import RACING, SAMPLES, WANTED, ToyEvaluator, toy_groups, toy_run


def lines_of(run):
    return [
        {k: v for k, v in line.to_dict().items() if k != "seconds"} for line in run.history.lines
    ]


def test_the_search_finds_the_wanted_experts_and_then_a_better_mixture():
    run = toy_run(discrete=120, total=400)
    found = run.run()
    assert found.pruned is not None
    assert [maps.kept for maps in found.pruned.genome.maps] == [WANTED, WANTED]
    assert found.best.score.fitness > found.pruned.score.fitness
    assert not found.best.genome.only_drops
    assert found.evaluations == 400


def test_the_best_so_far_never_falls_and_the_phases_follow_each_other():
    seen: list = []
    toy_run(watch=seen.append).run()
    assert [p.best for p in seen] == sorted(p.best for p in seen)
    phases = [p.phase for p in seen]
    assert phases == sorted(phases, reverse=True)
    assert [p.evaluated for p in seen] == [10, *range(14, 39, 4), *range(40, 81, 4)]
    assert seen[-1].total == 80


def test_no_genome_is_ever_evaluated_twice():
    evaluator = ToyEvaluator()
    toy_run(evaluator=evaluator, counts=(2, 2), total=300, discrete=200).run()
    assert len(evaluator.asked) == len(set(evaluator.asked))


def test_every_candidate_keeps_the_counts_it_was_asked_to():
    run = toy_run(counts=(3, 5))
    run.run()
    for individual in run.evolution.population.ranked:
        assert individual.genome.counts == (3, 5)
        if individual.number < 40:
            assert individual.genome.only_drops


def test_by_cost_children_share_all_groups_but_one_with_a_parent():
    groups = toy_groups(4)
    rates = Rates(touch="by_cost", discrete_crossover=0.3, normalise=0.5)
    run = toy_run(groups=groups, counts=(3,) * 4, rates=rates, bound=False)
    run.run()
    known = {one.genome.key: one.genome for one in run.evolution.population.ranked}
    for line in run.history.lines:
        if line.split == "search" and line.details["parents"]:
            parent = known[line.details["parents"][0]]
            pairs = zip(parent.maps, known[line.genome].maps, strict=True)
            assert sum(old.key != new.key for old, new in pairs) == 1


def test_the_history_is_the_same_for_a_seed_and_another_for_another():
    first, same, other = toy_run(), toy_run(), toy_run(seed=1)
    for run in (first, same, other):
        run.run()
    assert lines_of(first) == lines_of(same)
    assert lines_of(first) != lines_of(other)


@pytest.mark.parametrize("racing", [None, RACING])
def test_the_history_does_not_depend_on_how_many_are_evaluated_at_once(racing):
    runs = [toy_run(evaluator=ToyEvaluator(width=width), racing=racing) for width in (1, 2, 3)]
    outcomes = [run.run() for run in runs]
    assert lines_of(runs[0]) == lines_of(runs[1]) == lines_of(runs[2])
    assert outcomes[0].best.genome == outcomes[2].best.genome


def test_all_choices_of_a_small_space_are_tried_once_and_then_merging_begins():
    run = toy_run(groups=toy_groups(1), counts=(1,), discrete=40, total=50)
    run.run()
    dropping = [one for one in run.evolution.population.ranked if one.genome.only_drops]
    assert len(dropping) == 8
    assert any("all choices were tried after 8" in note for note in run.evolution.notes)
    assert run.evolution.evaluated == 50


def test_a_small_space_without_a_continuous_phase_ends():
    run = toy_run(groups=toy_groups(1), counts=(1,), discrete=40, total=40)
    assert run.run().evaluations <= 40


def test_with_all_experts_the_search_begins_with_the_identity():
    run = toy_run(counts=(8, 8), total=20)
    run.run()
    first = run.history.lines[0]
    identity = Genome(tuple(one_hot(range(8), 8) for _ in range(2)))
    assert first.genome == identity.key
    assert first.details["how"] == "start"
    assert {line.details["phase"] for line in run.history.lines if line.split == "search"} == {
        "continuous"
    }


def test_a_warm_start_is_evaluated_first_and_its_size_is_checked():
    groups = toy_groups()
    good = Genome((one_hot(WANTED, 8), one_hot(WANTED, 8)))
    problem = Problem(groups, (3, 3), start=(good, good))
    generation = Evolution(problem, effort=Effort(initial=5, total=10)).ask()
    assert generation is not None
    assert generation.children[0].genome == good
    assert [child.how for child in generation.children] == ["start", *["random"] * 4]
    with pytest.raises(LitMoEError, match="a warm start keeps"):
        Problem(groups, (4, 4), start=(good,))


def test_without_a_discrete_phase_a_warm_start_is_all_that_merging_begins_with():
    good = Genome((one_hot(WANTED, 8), one_hot(WANTED, 8)))
    evolution = Evolution(
        Problem(toy_groups(), (3, 3), start=(good,)), effort=Effort(discrete=0, total=10)
    )
    generation = evolution.ask()
    assert generation is not None
    assert len(generation.children) == 1
    assert generation.phase == "continuous"


def test_counts_are_genes_under_one_budget():
    problem = Problem(toy_groups(4), (4,) * 4, floors=(2,) * 4, non_uniform=True)
    evolution = Evolution(problem, effort=Effort(initial=10, discrete=60, total=80, children=4))
    while (generation := evolution.ask()) is not None:
        scores = []
        for child in generation.children:
            counts = child.genome.counts
            assert sum(counts) == 16
            assert min(counts) >= 2
            scores.append(
                Score(-sum((a - b) ** 2 for a, b in zip(counts, (2, 6, 5, 3), strict=True)))
            )
        evolution.tell(generation, scores)
    assert evolution.population.best.genome.counts == (2, 6, 5, 3)


def test_a_constant_fitness_is_told_and_the_finer_one_searched_by():
    evaluator = ToyEvaluator(coarse=1e9)
    run = toy_run(evaluator=evaluator, discrete=120, total=120)
    with pytest.warns(NoEffectWarning, match=r"was -?0 for each of the first 10 candidates"):
        found = run.run()
    assert found.pruned is not None
    assert [maps.kept for maps in found.pruned.genome.maps] == [WANTED, WANTED]
    assert any("goes by the finer fitness" in note for note in found.notes)


def test_equally_fit_candidates_are_ranked_by_the_finer_fitness():
    evaluator = ToyEvaluator(coarse=20.0)
    run = toy_run(evaluator=evaluator)
    run.run()
    keys = [(-o.score.fitness, -o.score.finer) for o in run.evolution.population.ranked]
    assert keys == sorted(keys)
    assert len({o.score.fitness for o in run.evolution.population.ranked}) < 40


def test_racing_spares_samples_and_reports_what_it_missed():
    plain, raced = ToyEvaluator(), ToyEvaluator()
    toy_run(evaluator=plain, total=200, discrete=200, children=8).run()
    racing = Racing(first=8, growth=4.0)
    run = toy_run(evaluator=raced, total=200, discrete=200, children=8, racing=racing)
    found = run.run()
    spent = [sum(samples for *_, samples in e.asked) for e in (plain, raced)]
    assert spent[1] < 0.75 * spent[0]
    assert found.regrets
    assert all(regret >= 0 for regret in found.regrets)
    assert any("racing missed" in note for note in found.notes)
    in_full = {key for split, key, samples in raced.asked if samples == SAMPLES}
    assert {one.genome.key for one in run.evolution.population.ranked} <= in_full


def test_a_generation_without_an_audit_leaves_stopped_children_unknown():
    run = toy_run(racing=Racing(first=16, audit_every=0), children=8)
    assert run.run().regrets == []
    assert len(run.evolution.population) < run.evolution.evaluated == 80


def test_the_choice_falls_on_the_dev_split():
    run = toy_run(rerank=5)
    found = run.run()
    dev = [line for line in run.history.lines if line.split == "dev"]
    assert len(dev) == 10
    last = dev[5:]
    assert found.best.genome.key == max(last, key=lambda line: line.score.fitness).genome
    best = toy_run(rerank=0)
    assert best.run().best.genome == best.evolution.population.best.genome
    assert not [line for line in best.history.lines if line.split == "dev"]


def test_a_candidate_that_gives_no_number_is_the_worst():
    assert Score(float("nan")).fitness == -float("inf")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Effort(total=0), "effort.total=0 evaluations"),
        (lambda: Effort(children=0), "effort.children=0 must be at least 1"),
        (lambda: Rates(group=1.5), "rates.group=1.5 is a chance"),
        (lambda: Rates(row=0), "nothing would ever vary"),
        (lambda: Rates(noise=-1), "rates.noise=-1 must be at least 0"),
        (lambda: Rates(touch=cast(Any, "late")), "rates.touch='late' is unknown"),
        (lambda: Racing(keep=1.0), "keep=1 in"),
        (SearchSpace, "give keep_ratio or keep_experts"),
        (lambda: SearchSpace(keep_ratio=0.5, keep_experts=4), "only one of them"),
        (lambda: SearchSpace(keep_ratio=1.5), "above 0 and at most 1"),
        (lambda: SearchSpace(1.0, router=cast(Any, "soft")), "space.router='soft' is unknown"),
        (lambda: Problem(toy_groups(), (3, 9)), "cannot keep 9"),
        (lambda: Problem(toy_groups(routing_groups=2), (3, 4)), "cannot keep 3"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(make, said):
    with pytest.raises(LitMoEError, match=said):
        make()


def test_heats_grow_to_all_samples():
    assert Racing(first=10).heats(64) == [10, 20, 40, 64]
    assert Racing(first=100).heats(64) == [64]
    assert Racing(first=1, growth=1.01).heats(3) == [1, 2, 3]
