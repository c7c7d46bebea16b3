"""Written answers: what transformers writes row by row, cut where it should be, scored as SQuAD."""

import math

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from lit_moe.assets import model_folder
from lit_moe.errors import LitMoEError
from lit_moe.evaluate import (
    AnswerScores,
    GenerationOptions,
    Prompting,
    PromptTemplate,
    TaskItem,
    evaluate_multiple_choice,
    evaluate_task,
    generate_answers,
    squad_exact_match,
    squad_f1,
    squad_normalised,
)
from lit_moe.evaluate.generation import _cut
from lit_moe.evaluate.multiple_choice import Question
from lit_moe.testing import run_distributed, tiny_moe

PROMPTS = ["In the beginning", "def", "What is the capital of a country?\nAnswer:", "Der", "The w"]
NEVER = ("\x00",)
SHORT = PromptTemplate("{question}", separator="\n")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_folder())


@pytest.fixture(scope="module", params=["mixtral", "deepseek_v3", "gpt_oss"])
def model(request):
    torch.manual_seed(0)
    return tiny_moe(request.param, vocab_size=1024)


@pytest.fixture
def mixtral():
    return tiny_moe("mixtral", vocab_size=1024)


def alone(model, tokenizer, prompt, num_tokens):
    """What transformers writes after one prompt without padding."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    settings = GenerationConfig(
        max_new_tokens=num_tokens, do_sample=False, eos_token_id=0, pad_token_id=0
    )
    with torch.no_grad():
        written = model.eval().generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=settings
        )
    return tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_padded_batches_write_what_each_prompt_gets_alone(model, tokenizer, batch_size):
    options = GenerationOptions(max_new_tokens=12, stop=NEVER, batch_size=batch_size)
    written = generate_answers(model, tokenizer, PROMPTS, options)
    expected = [alone(model, tokenizer, prompt, 12) for prompt in PROMPTS]
    assert written == expected
    assert len(set(written)) > 1


def test_answers_end_before_the_first_stop_text(mixtral, tokenizer):
    free = generate_answers(mixtral, tokenizer, PROMPTS, GenerationOptions(12, NEVER))
    stop = (free[0][2:5], free[3][1:3])
    cut = generate_answers(mixtral, tokenizer, PROMPTS, GenerationOptions(12, stop))
    assert cut == [_cut(text, stop) for text in free]
    assert len(cut[0]) <= 2
    assert not any(text in answer for answer in cut for text in stop)


def test_the_earliest_of_several_stop_texts_counts():
    assert _cut("one. two\nthree", ("\n", ".")) == "one"
    assert _cut("one two", ("\n",)) == "one two"
    assert _cut("\nlate", ("\n",)) == ""


def test_an_answer_ends_with_the_end_of_text(mixtral, tokenizer):
    two = generate_answers(mixtral, tokenizer, PROMPTS, GenerationOptions(2, NEVER))
    steps = []

    def end_at_the_third(module, inputs, logits):
        steps.append(1)
        if len(steps) == 3:
            logits[..., tokenizer.eos_token_id] = 1e9

    mixtral.lm_head.register_forward_hook(end_at_the_third)
    assert generate_answers(mixtral, tokenizer, PROMPTS, GenerationOptions(9, NEVER)) == two
    assert len(steps) == 3


def test_no_prompt_no_answer(mixtral, tokenizer):
    assert generate_answers(mixtral, tokenizer, [], GenerationOptions()) == []


def test_the_model_is_left_as_it_was(mixtral, tokenizer):
    generate_answers(mixtral.train(), tokenizer, PROMPTS, GenerationOptions(2))
    assert mixtral.training


def test_prompts_longer_than_the_context_are_refused_before_anything_runs(mixtral, tokenizer):
    context = mixtral.config.max_position_embeddings
    calls = []
    mixtral.register_forward_pre_hook(lambda *_: calls.append(1))
    long = "word " * context
    with pytest.raises(LitMoEError, match=rf"longest prompt has \d+ tokens.* context is {context}"):
        generate_answers(mixtral, tokenizer, ["short", long], GenerationOptions())
    with pytest.raises(LitMoEError, match="use fewer examples"):
        evaluate_task(
            mixtral, tokenizer, [asked("short"), asked(long)], prompting=Prompting(PromptTemplate())
        )
    assert not calls


def test_models_that_cannot_continue_a_prompt_are_refused(mixtral, tokenizer):
    with pytest.raises(LitMoEError, match="MixtralModel cannot generate"):
        generate_answers(mixtral.model, tokenizer, PROMPTS, GenerationOptions())
    with pytest.raises(LitMoEError, match="reads a prompt with an encoder"):
        generate_answers(tiny_moe("switch_transformers"), tokenizer, PROMPTS, GenerationOptions())


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The  Eiffel Tower.", "eiffel tower"),
        (" a cat, AN ant ", "cat ant"),
        ("theatre", "theatre"),
        ("U.S.", "us"),
        ("state-of-the-art", "stateoftheart"),
        ("Bogotá", "bogotá"),
        ("the", ""),
    ],
)
def test_answers_are_normalised_as_squad_does(text, plain):
    assert squad_normalised(text) == plain


@pytest.mark.parametrize(
    ("written", "answers", "exact", "f1"),
    [
        ("The Denver Broncos", ("Denver Broncos",), True, 1.0),
        ("Denver", ("Denver Broncos",), False, 2 / 3),  # precision 1, recall 1/2
        ("in Santa Clara, California", ("Santa Clara",), False, 2 / 3),  # precision 2/4, recall 1
        ("gold gold", ("gold",), False, 2 / 3),  # one of two counts
        ("gold gold", ("gold gold leaf",), False, 4 / 5),
        ("", ("gold",), False, 0.0),
        ("the", ("an",), True, 0.0),  # nothing is left of either: exact, yet no word shared
        ("Levi's", ("Santa Clara", "levis", "Levi's Stadium"), True, 1.0),
        ("Levi's field", ("Santa Clara", "Levi's Stadium"), False, 1 / 2),
    ],
)
def test_exact_match_and_f1_by_hand(written, answers, exact, f1):
    assert squad_exact_match(written, answers) is exact
    assert squad_f1(written, answers) == pytest.approx(f1, abs=1e-12)


def test_the_metric_adds_over_updates():
    scores = AnswerScores()
    scores.update(["Denver", "gold"], [("Denver Broncos",), ("gold",)])
    scores.update(["blue"], [("red", "green")])
    totals = scores.totals()
    assert (totals["num"], totals["exact"]) == (3, 1)
    assert totals["f1"] == pytest.approx(5 / 3)
    assert totals["f1_f1"] == pytest.approx(13 / 9)


def asked(question, *answers, choices=()):
    return TaskItem({"question": question}, answers or ("yes",), choices)


def known_task(model, tokenizer, num, prompting, options):
    """Questions of which every other one has what the model writes among its answers."""
    questions = [asked(f"What is {n}?") for n in range(num)]
    prompts = [prompting.prompt(question) for question in questions]
    written = generate_answers(model, tokenizer, prompts, options)
    return [
        asked(f"What is {n}?", "no such word", *([text] if n % 2 == 0 else []))
        for n, text in enumerate(written)
    ]


@pytest.mark.parametrize("num_shots", [0, 2])
def test_what_the_model_writes_is_what_is_scored(mixtral, tokenizer, num_shots):
    pool = [asked(f"Who is {n}?", f"number {n}") for n in range(8)]
    prompting = Prompting(SHORT, pool, num_shots)
    options = GenerationOptions(max_new_tokens=6, stop=NEVER)
    items = known_task(mixtral, tokenizer, 7, prompting, options)
    quality = evaluate_task(mixtral, tokenizer, items, prompting=prompting, generation=options)
    assert (quality.num_items, quality.num_shots) == (7, num_shots)
    assert quality.exact_match == pytest.approx(4 / 7)
    assert quality.exact_match_stderr == pytest.approx(math.sqrt(4 / 7 * 3 / 7 / 7))
    assert quality.f1 >= quality.exact_match
    assert quality.choice_accuracy is None


def choosing(num):
    names = ("red", "green", "blue")
    return [asked(f"Which is {n}?", names[n % 3], choices=names) for n in range(num)]


def test_choices_are_scored_after_the_same_prompt(mixtral, tokenizer):
    pool = [asked(f"Who is {n}?", f"number {n}") for n in range(8)]
    prompting = Prompting(SHORT, pool, 2)
    items = [*choosing(9), asked("And without choices?")]
    quality = evaluate_task(mixtral, tokenizer, items, prompting=prompting)
    questions = [
        Question(prompting.prompt(i), (" red", " green", " blue"), n % 3)
        for n, i in enumerate(items[:9])
    ]
    expected = evaluate_multiple_choice(mixtral, tokenizer, questions)
    assert quality.choice_accuracy == pytest.approx(expected.accuracy)
    assert quality.choice_stderr == pytest.approx(expected.stderr)
    assert quality.chance == pytest.approx(1 / 3)
    assert quality.num_items == 10


def test_an_empty_task_is_refused(mixtral, tokenizer):
    with pytest.raises(LitMoEError, match="at least one question"):
        evaluate_task(mixtral, tokenizer, [], prompting=Prompting(PromptTemplate()))


@pytest.mark.distributed
def test_two_ranks_find_what_one_finds(mixtral, tokenizer):
    prompting = Prompting(PromptTemplate(), [asked(f"Who is {n}?") for n in range(5)], 1)
    options = GenerationOptions(max_new_tokens=6, stop=NEVER, batch_size=2)
    items = known_task(mixtral, tokenizer, 7, prompting, options) + choosing(4)
    alone = evaluate_task(mixtral, tokenizer, items, prompting=prompting, generation=options)

    def rank(_):
        quality = evaluate_task(mixtral, tokenizer, items, prompting=prompting, generation=options)
        return vars(quality)

    for together in run_distributed(rank):
        assert together == pytest.approx(vars(alone))
