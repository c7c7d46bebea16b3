import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_moe.adapters import find_sites
from lit_moe.data.task_rows import task_rows
from lit_moe.distill.losses import logits_distillation_loss, next_token_loss
from lit_moe.errors import LitMoEError
from lit_moe.evaluate.chat import chat_format
from lit_moe.evaluate.generation import GenerationOptions, generate_answers
from lit_moe.evaluate.multiple_choice import Question, evaluate_multiple_choice
from lit_moe.evaluate.prompts import Prompting, PromptTemplate, TaskItem
from lit_moe.evaluate.squad import squad_exact_match
from lit_moe.evaluate.task_quality import evaluate_task
from lit_moe.search import (
    Agreement,
    AnswerTokens,
    ChoiceAccuracy,
    Genome,
    LiveModel,
    Maps,
    Measures,
    ModelEvaluator,
    NegativeLoss,
    SplitData,
    SplitScorer,
    WrittenAnswers,
    check_splits,
    group_layers,
    one_hot,
)
from lit_moe.search.request import Request
from lit_moe.search.rows import text_batches
from lit_moe.testing import run_distributed, tiny_moe
from tests.evaluate.chats import LLAMA, VOCABULARY, beginning

WORDS = ("river", "stone", "a long road home", "gate")
GENERATION = GenerationOptions(max_new_tokens=6, batch_size=8)


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture
def model(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


def questions(num=10, first=0):
    draw = np.random.default_rng(first)
    return [
        TaskItem(
            {"question": f"What is number {first + i}?"},
            (WORDS[int(draw.integers(len(WORDS)))],),
            WORDS,
        )
        for i in range(num)
    ]


def task_data(tokenizer, items=None):
    items = questions() if items is None else items
    prompting = Prompting(PromptTemplate())
    rows = task_rows(items, tokenizer, [prompting], sequence_length=64, ending="\n")
    return SplitData([rows[i] for i in range(len(rows))], items, prompting, GENERATION)


def text_data(num=8, length=24, seed=0):
    ids = torch.randint(3, 1000, (num, length), generator=torch.Generator().manual_seed(seed))
    return SplitData([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids])


def live_of(model, groups="per_layer", **options):
    return LiveModel(model, group_layers(find_sites(model), groups), **options)


def some_genomes(num=6, seed=0):
    draw = np.random.default_rng(seed)
    found = [Genome((one_hot((0, 2, 5), 8), one_hot((1, 4, 7), 8)))]
    while len(found) < num:
        old = found[int(draw.integers(len(found)))]
        group = int(draw.integers(2))
        shaken = old.maps[group].experts + 0.1 * draw.standard_normal((3, 8))
        found.append(old.replaced({group: Maps(shaken, old.maps[group].routers)}))
    return found


def score_of(model, data, fitness, tokenizer=None, *, finer=None, **options):
    measures = Measures(fitness, finer or NegativeLoss(), batch_size=4, **options)
    scorer = SplitScorer(live_of(model), data, measures, tokenizer)
    scorer.learn_whole()
    return scorer.score(None)


def test_choices_are_those_of_the_multiple_choice_evaluation(model, tokenizer):
    data = task_data(tokenizer)
    found = score_of(model, data, ChoiceAccuracy(), tokenizer)
    asked = [
        Question(
            f"Question: {i.fields['question']}\nAnswer:",
            tuple(f" {c}" for c in i.choices),
            i.choices.index(i.answers[0]),
        )
        for i in data.items
    ]
    expected = evaluate_multiple_choice(model, tokenizer, asked)
    assert found.fitness == pytest.approx(100 * expected.accuracy)
    assert 0 < found.fitness < 100
    right = score_of(model, data, AnswerTokens(), tokenizer).finer
    assert found.finer != pytest.approx(right, rel=1e-6)  # without the end of the answer


def test_in_a_chat_answers_are_those_of_the_task_evaluation():
    tokenizer = beginning(LLAMA)
    model = tiny_moe("mixtral", vocab_size=VOCABULARY).eval()
    prompting = Prompting(PromptTemplate(), chat=chat_format(tokenizer))
    prompts = [prompting.prompt(item) for item in questions(12)]
    written = generate_answers(model, tokenizer, prompts, GENERATION, chat=prompting.chat)
    items = [
        TaskItem(item.fields, (item.answers[0], *([text] if i % 2 else [])), item.choices)
        for i, (item, text) in enumerate(zip(questions(12), written, strict=True))
    ]
    rows = task_rows(items, tokenizer, [prompting], sequence_length=64, ending="\n")
    data = SplitData([rows[i] for i in range(len(rows))], items, prompting, GENERATION)
    expected = evaluate_task(model, tokenizer, items, prompting=prompting, generation=GENERATION)
    found = score_of(model, data, WrittenAnswers(), tokenizer)
    assert found.fitness == pytest.approx(100 * expected.exact_match)
    assert found.fitness >= 50
    found = score_of(model, data, ChoiceAccuracy(), tokenizer)
    assert expected.choice_accuracy is not None
    assert found.fitness == pytest.approx(100 * expected.choice_accuracy)
    assert 0 < found.fitness < 100


def test_written_answers_are_those_of_the_task_evaluation(model, tokenizer):
    first = questions(6)
    prompts = [f"Question: {item.fields['question']}\nAnswer:" for item in first]
    written = generate_answers(model, tokenizer, prompts, GENERATION)
    items = [
        TaskItem(item.fields, (text if i % 2 and text.strip() else "no such words",))
        for i, (item, text) in enumerate(zip(first, written, strict=True))
    ]
    pairs = zip(written, items, strict=True)
    expected = 100 * np.mean([squad_exact_match(text, item.answers) for text, item in pairs])
    data = task_data(tokenizer, items)
    assert score_of(model, data, WrittenAnswers(), tokenizer).fitness == pytest.approx(expected)
    assert expected > 0
    f1 = score_of(model, data, WrittenAnswers("f1"), tokenizer).fitness
    assert f1 >= expected


def test_answers_of_likeliest_tokens_are_what_the_model_would_write(model):
    prompt = torch.randint(3, 1000, (4, 7), generator=torch.Generator().manual_seed(1))
    full = model.generate(
        prompt, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    labels = torch.cat([torch.full_like(prompt, -100), full[:, 7:]], dim=1)
    rows = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": row}
        for ids, row in zip(full, labels, strict=True)
    ]
    assert score_of(model, SplitData(rows), AnswerTokens()).fitness == 100.0
    for row in rows[:3]:
        row["labels"] = row["labels"].clone()
        row["labels"][-1] = (row["labels"][-1] + 1) % 1000
    assert score_of(model, SplitData(rows), AnswerTokens()).fitness == 25.0


def test_the_loss_is_a_hundred_nats_per_token(model):
    data = text_data()
    ids = torch.stack([row["input_ids"] for row in data.rows])
    with torch.no_grad():
        loss = next_token_loss(model(ids).logits, ids, torch.ones_like(ids))
    found = score_of(model, data, NegativeLoss())
    assert found.fitness == found.finer == pytest.approx(-100 * float(loss), rel=1e-5)


def test_padding_on_the_right_does_not_count(model):
    short = text_data(4, 12)
    padded = [
        {
            "input_ids": torch.cat([row["input_ids"], torch.full((5,), 7)]),
            "attention_mask": torch.cat([row["attention_mask"], torch.zeros(5, dtype=torch.long)]),
        }
        for row in short.rows
    ]
    (batch,) = text_batches(padded, 4)
    assert batch.input_ids.shape == (4, 12)
    found = score_of(model, SplitData(padded), NegativeLoss())
    assert found == score_of(model, short, NegativeLoss())


@pytest.mark.parametrize("measure", ["acceptance", "kl"])
def test_the_whole_model_agrees_with_itself_and_others_less(model, measure):
    data, live = text_data(), live_of(model)
    scorer = SplitScorer(live, data, Measures(Agreement(measure), NegativeLoss(), batch_size=4))
    scorer.learn_whole()
    best = 100.0 if measure == "acceptance" else 0.0
    assert scorer.score(None).fitness == pytest.approx(best, abs=1e-4)
    assert scorer.score(some_genomes()[0]).fitness < best - 5


def test_agreement_on_all_tokens_is_the_divergence_of_distillation(model):
    data, live = text_data(), live_of(model)
    genome = some_genomes()[0]
    ids = torch.stack([row["input_ids"] for row in data.rows])
    with torch.no_grad():
        teacher = model(ids).logits
        with live.applied(genome):
            student = model(ids).logits
    mask = torch.ones_like(ids)
    mask[:, -1] = 0  # predicts nothing
    expected = logits_distillation_loss(student, teacher, mask, temperature=1.0)
    overlap = torch.minimum(student.softmax(-1), teacher.softmax(-1)).sum(-1)[:, :-1].mean()
    values = {Agreement("kl", tokens=1024): -float(expected)}
    values[Agreement("acceptance", tokens=1024)] = float(overlap)
    for agreement, value in values.items():
        measures = Measures(agreement, NegativeLoss(), batch_size=4)
        scorer = SplitScorer(live, data, measures)
        scorer.learn_whole()
        assert scorer.score(genome).fitness == pytest.approx(100 * value, rel=1e-4)


@pytest.mark.parametrize("kind", ["choices", "text"])
def test_kept_hidden_states_change_no_bit_and_spare_layers(model, tokenizer, kind):
    data = task_data(tokenizer) if kind == "choices" else text_data()
    fitness = ChoiceAccuracy() if kind == "choices" else NegativeLoss()
    live = live_of(model)
    scorers = [
        SplitScorer(live, data, Measures(fitness, NegativeLoss(), 4, prefix_bytes=size), tokenizer)
        for size in (0, 1 << 26)
    ]
    genomes = some_genomes(12)
    scores = [[scorer.score(genome) for genome in genomes] for scorer in scorers]
    assert scores[0] == scores[1]
    num_batches = len(data.batches(fitness.rows or "answers", tokenizer, 4))
    assert 0 < scorers[1].layers_run < 2 * 12 * num_batches


def test_heats_go_on_where_the_one_before_ended(model):
    data, live = text_data(), live_of(model)
    scorer = SplitScorer(live, data, Measures(NegativeLoss(), NegativeLoss(), batch_size=2))
    genome = some_genomes()[0]
    forwards = []
    handle = model.lm_head.register_forward_hook(lambda *_: forwards.append(1))
    first = scorer.score(genome, 3)
    assert len(forwards) == 2
    whole = scorer.score(genome)
    assert len(forwards) == 4
    handle.remove()
    fresh = SplitScorer(live, data, Measures(NegativeLoss(), NegativeLoss(), batch_size=2))
    assert fresh.score(genome) == whole
    assert fresh.score(genome, 3) == first != whole


def test_top_k_holds_for_all_candidates_and_not_for_the_whole_model(model):
    data, live = text_data(), live_of(model)
    measures = Measures(Agreement(), NegativeLoss(), batch_size=4)
    scorers = {}
    for split in ("search", "dev"):
        scorers[split] = SplitScorer(live, data, measures)
        scorers[split].learn_whole()
    everyone = Genome(tuple(one_hot(range(8), 8) for _ in range(2)))
    (one,) = ModelEvaluator({"search": scorers["search"]}, live, top_k=1)(
        [Request(everyone, "search", 8)]
    )
    (two,) = ModelEvaluator({"search": scorers["dev"]}, live)([Request(everyone, "search", 8)])
    assert two.fitness == pytest.approx(100.0, abs=1e-4)
    assert one.fitness < 99


def test_each_rank_scores_its_own_candidate_and_all_know_all(checkpoint):
    genomes = some_genomes(5)

    def rank(number):
        torch.set_num_threads(1)
        model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
        live = live_of(model)
        scorer = SplitScorer(live, text_data(), Measures(NegativeLoss(), NegativeLoss(), 4))
        evaluator = ModelEvaluator({"search": scorer}, live)
        requests = [Request(genome, "search", 8) for genome in genomes]
        step = evaluator.width
        found = [evaluator(requests[i : i + step]) for i in range(0, len(requests), step)]
        return [score for part in found for score in part], scorer.layers_run

    alone = run_distributed(rank, 1)
    both = run_distributed(rank, 2)
    assert both[0][0] == both[1][0] == alone[0][0]
    assert max(layers for _, layers in both) < alone[0][1]


def test_splits_must_hold_something_and_share_nothing(tokenizer):
    with pytest.raises(LitMoEError, match="the dev split of the search has no sample"):
        check_splits({"search": text_data(), "dev": SplitData([])})
    with pytest.raises(LitMoEError, match="search and the test split of the search share a sample"):
        check_splits({"search": text_data(), "test": text_data(2)})
    splits = [task_data(tokenizer, questions(4, first=n)) for n in (0, 3)]
    with pytest.raises(LitMoEError, match="share a sample"):
        check_splits(dict(zip(("search", "dev"), splits, strict=True)))
    check_splits({"search": text_data(), "dev": text_data(seed=1), "test": text_data(seed=2)})


def test_measures_that_the_samples_cannot_serve_are_refused(model, tokenizer):
    with pytest.raises(LitMoEError, match="needs questions that all have choices"):
        score_of(model, text_data(), ChoiceAccuracy(), tokenizer)
    with pytest.raises(LitMoEError, match="plain text has none"):
        score_of(model, text_data(), WrittenAnswers(), tokenizer)
    with pytest.raises(LitMoEError, match="measure='bleu' is unknown"):
        WrittenAnswers("bleu")  # type: ignore[arg-type]
    with pytest.raises(LitMoEError, match="tokens=0 at least 1"):
        Agreement(tokens=0)


class _Comparing(NegativeLoss):
    needs_whole = True


def test_a_measure_that_keeps_nothing_of_the_whole_model_is_told_so(model):
    measures = Measures(_Comparing(), NegativeLoss(), batch_size=4)
    scorer = SplitScorer(live_of(model), text_data(), measures)
    with pytest.raises(LitMoEError, match="_Comparing compares with the whole model"):
        scorer.learn_whole()
