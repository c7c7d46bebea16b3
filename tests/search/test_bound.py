"""Evaluations that stop early because their candidate cannot count any more."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_moe.search import (
    Agreement,
    AnswerTokens,
    ChoiceAccuracy,
    Genome,
    Measures,
    NegativeLoss,
    Problem,
    Rates,
    Score,
    SplitData,
    SplitScorer,
    WrittenAnswers,
    one_hot,
)
from lit_moe.search.population import Individual, Population
from lit_moe.search.request import Floor
from tests.search.test_scoring import live_of, some_genomes, task_data, text_data
from tests.search.toy import RACING, ToyEvaluator, toy_groups, toy_run


@pytest.fixture
def model(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


def told(run):
    """What a search came to, candidate by candidate."""
    lines = run.history.lines
    return [(one.split, one.genome, dict(one.draws), one.details.get("parents")) for one in lines]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rerank": 0, "rates": Rates(mutation_extra=0, crossover_least=0)},
        {"children": 1, "rates": Rates(mutation_margin=20.0, crossover_margin=30.0)},
        {"evaluator": 5.0, "counts": (2, 5)},
        {"evaluator": 1e9},
    ],
)
@pytest.mark.filterwarnings("ignore:the fitness was")
def test_a_search_that_stops_hopeless_candidates_is_the_same_search(seed, options):
    coarse = options.get("evaluator", 0.0)
    runs = []
    for bound in (False, True):
        evaluator = ToyEvaluator(coarse=coarse)
        given = {**options, "evaluator": evaluator}
        runs.append(toy_run(total=160, discrete=80, seed=seed, bound=bound, **given))
    plain, bounded = runs[0].run(), runs[1].run()
    assert told(runs[0]) == told(runs[1])
    assert plain.best == bounded.best
    assert plain.pruned == bounded.pruned
    assert plain.bounded == 0 < bounded.bounded < plain.evaluations == bounded.evaluations
    known = {one.genome: one.score for one in runs[0].history.lines if one.split == "search"}
    for line in runs[1].history.lines:
        if line.split == "search":
            whole, found = known[line.genome], line.score
            assert found == whole or (found.is_bound and found.finer >= whole.finer)


def test_under_racing_nothing_is_bounded():
    assert toy_run(racing=RACING, total=200).run().bounded == 0


@pytest.mark.parametrize("seed", range(30))
def test_whoever_is_below_the_floor_is_never_drawn_and_never_listed(seed):
    draw = np.random.default_rng(seed)
    rates = Rates(
        mutation_margin=float(draw.choice([0.0, 3.0, 10.0])),
        crossover_margin=float(draw.choice([0.0, 1.0, 12.0])),
        crossover_least=int(draw.integers(8)),
        mutation_extra=int(draw.integers(4)),
    )
    listed = int(draw.integers(20))
    population = Population()

    def add(value, number):
        score = Score(float(value), float(draw.normal()))
        individual = Individual(Genome((one_hot([number % 8], 8),)), score, number)
        population.add(individual)
        return individual

    values = np.round(draw.normal(50, 15, size=60), 0)
    low: list = []
    for number, value in enumerate(values):
        floor = population.floor(rates, listed=listed) if population.ranked else -np.inf
        individual = add(value, number)
        if value < floor:
            low.append(individual)
        within = [population._within(m) for m in (rates.mutation_margin, rates.crossover_margin)]
        reach = max(within[0] + rates.mutation_extra, within[1], rates.crossover_least, listed, 1)
        assert not set(map(id, population.ranked[:reach])) & set(map(id, low))
    assert low or max(listed, rates.crossover_least) > 15 or rates.mutation_margin > 9


class Counting(AnswerTokens):
    """Counts the batches that were measured."""

    def __init__(self):
        self.batches = 0

    def points(self, logits_BSV, batch, whole):
        self.batches += 1
        return super().points(logits_BSV, batch, whole)


def test_an_evaluation_stops_once_it_is_certain_to_end_below_the_floor(model):
    measure = Counting()
    scorer = SplitScorer(live_of(model), text_data(8), Measures(measure, NegativeLoss(), 2))
    genome = some_genomes()[0]
    whole = SplitScorer(
        live_of(model), text_data(8), Measures(AnswerTokens(), NegativeLoss(), 2)
    ).score(genome)
    assert whole.fitness == 0.0
    found = scorer.score(genome, floor=Floor(60.0))
    assert measure.batches == 2
    assert found.is_bound
    assert found.fitness == 50.0
    assert found.finer >= whole.finer
    assert scorer.score(genome, floor=Floor(0.0)) == whole  # goes on where it stopped
    assert measure.batches == 4


def test_a_loss_is_bounded_by_what_is_on_record(model):
    data, genome = text_data(8), some_genomes()[0]
    measures = Measures(NegativeLoss(), NegativeLoss(), batch_size=2)
    whole = SplitScorer(live_of(model), data, measures).score(genome)
    for by_finer in (False, True):
        scorer = SplitScorer(live_of(model), data, measures)
        found = scorer.score(genome, floor=Floor(whole.fitness / 2 + 1, by_finer=by_finer))
        assert found.is_bound
        assert whole.fitness < found.fitness < whole.fitness / 2 + 1
        above = SplitScorer(live_of(model), data, measures)
        assert above.score(genome, floor=Floor(whole.fitness, by_finer=by_finer)) == whole


class _Unbounded(NegativeLoss):
    most = float("inf")


@pytest.mark.parametrize("fitness", [_Unbounded(), Agreement(), Agreement("kl")])
def test_a_measure_is_only_stopped_by_what_it_cannot_exceed(model, fitness):
    scorer = SplitScorer(live_of(model), text_data(), Measures(fitness, NegativeLoss(), 2))
    scorer.learn_whole()
    found = scorer.score(some_genomes()[0], floor=Floor(99.0))
    assert found.is_bound is not isinstance(fitness, _Unbounded)


def test_written_answers_stop_too(model, tokenizer):
    data = task_data(tokenizer)
    data.generation = type(data.generation)(max_new_tokens=3, batch_size=2)
    scorer = SplitScorer(
        live_of(model), data, Measures(WrittenAnswers(), NegativeLoss(), 4), tokenizer
    )
    whole = scorer.score(None)
    assert whole.fitness < 50
    found = scorer.score(None, floor=Floor(95.0))
    assert found.is_bound
    assert whole.fitness <= found.fitness < 95.0
    assert found.finer == 0.0  # no row was run


@pytest.mark.parametrize("fitness", [NegativeLoss(), ChoiceAccuracy(), Agreement()])
def test_the_hardest_samples_come_first_and_nothing_else_changes(model, tokenizer, fitness):
    data = task_data(tokenizer) if isinstance(fitness, ChoiceAccuracy) else text_data()
    measures = Measures(fitness, NegativeLoss(), batch_size=4)
    scorers = [SplitScorer(live_of(model), data, measures, tokenizer) for _ in range(2)]
    scorers[1].ask_hardest_first()
    for scorer in scorers:
        scorer.learn_whole()
    genome = some_genomes()[0]
    points = [scorer.points(genome) for scorer in scorers]
    assert points[1].fitness == pytest.approx(points[0].fitness, rel=1e-5)
    assert points[1].finer == pytest.approx(points[0].finer, rel=1e-5)
    firsts = [scorer.score(None, 4).finer for scorer in scorers]
    assert firsts[1] < firsts[0]
    asked = [sorted(scorer._data.identities()) for scorer in scorers]
    assert asked[0] == asked[1]


def test_samples_are_ordered_by_what_probes_do_worst_on(model):
    groups = live_of(model).groups
    probes = Problem(groups, (3, 3)).probes()
    measures = Measures(NegativeLoss(), NegativeLoss(), batch_size=1)
    before, after = (SplitScorer(live_of(model), text_data(), measures) for _ in range(2))
    after.ask_hardest_first(probes)
    rows = [one.input_ids for one in before.batches]

    def hardness(scorer, num):
        return np.mean([scorer.score(probe, num).finer for probe in probes])

    for num in range(1, len(rows)):
        assert hardness(after, num) <= hardness(after, num + 1) + 1e-9
    assert hardness(after, 1) < hardness(before, 1) or torch.equal(
        rows[0], after.batches[0].input_ids
    )
    assert hardness(after, len(rows)) == pytest.approx(hardness(before, len(rows)), rel=1e-5)


def test_probes_are_the_same_for_all_and_none_where_nothing_is_dropped():
    groups = toy_groups()
    first, same = (Problem(groups, (3, 5)).probes() for _ in range(2))
    assert first == same
    assert len({probe.key for probe in first}) == 4
    assert {probe.counts for probe in first} == {(3, 5)}
    assert Problem(groups, (8, 8)).probes() == []


def test_logits_are_made_where_something_is_predicted(model):
    ids = torch.randint(3, 1000, (4, 20), generator=torch.Generator().manual_seed(2))
    rows = []
    for index, row in enumerate(ids):
        labels = torch.full_like(row, -100)
        labels[14 + index % 3 : 18] = row[14 + index % 3 : 18]
        rows.append({"input_ids": row, "attention_mask": torch.ones_like(row), "labels": labels})
    seen: list[tuple[int, ...]] = []
    handle = model.lm_head.register_forward_hook(lambda _m, _i, out: seen.append(out.shape))
    scores = []
    for prefix in (0, 1 << 20):
        measures = Measures(NegativeLoss(), NegativeLoss(), 4, prefix)
        scorer = SplitScorer(live_of(model), SplitData(rows), measures)
        seen.clear()
        scores.append(scorer.score(None))
        assert {shape[1] for shape in seen} == {7}  # from 13, which predicts 14, to the last
    handle.remove()
    assert scores[0] == scores[1]
    with torch.no_grad():
        log = model(ids).logits.log_softmax(-1)
    each = []
    for row, labels in enumerate(r["labels"] for r in rows):
        places = (labels != -100).nonzero()[:, 0]
        each.append(float(log[row, places - 1, labels[places]].mean()))
    assert scores[0].fitness == pytest.approx(100 * np.mean(each), rel=1e-5)
