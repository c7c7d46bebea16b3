"""A model that reads its answers from a table: what it gets right is known beforehand."""

import json
import math

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Sequence, Split
from transformers import (
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutput

from lit_moe.errors import LitMoEError
from lit_moe.evaluate import Fact, exact_match, load_capitals, load_facts
from lit_moe.evaluate.exact_match import MatchRate, normalised
from lit_moe.testing import tiny_moe

CAPITALS = {"France": ["Paris"], "Peru": ["Lima"], "Malaysia": ["Kuala", "Lumpur"]}
WORDS = ["Question:", "Answer:", "of", "great", "?", "\n", "Rome", "Italy", *CAPITALS]
WORDS += [word for answer in CAPITALS.values() for word in answer]
IDS = {word: index for index, word in enumerate(["<unk>", "<end>", *WORDS])}


class TableConfig(PreTrainedConfig):
    model_type = "table"
    num_hidden_layers: int = 1


class Table(PreTrainedModel, GenerationMixin):
    """Continues ``<country> ? \\n Answer:`` with its capital, a line end, and a new question."""

    config_class = TableConfig

    def __init__(self, answers, end):
        super().__init__(TableConfig())
        self.config.eos_token_id = IDS["<end>"]
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.answers, self.end, self.batches = answers, end, []

    def forward(self, input_ids, attention_mask=None, **_):
        assert attention_mask is None or attention_mask.all()
        logits = torch.zeros(*input_ids.shape, len(IDS))
        for row, ids in enumerate(input_ids.tolist()):
            logits[row, -1, self._next(ids)] = 1.0
        self.batches.append(tuple(input_ids.shape))
        return CausalLMOutput(logits=logits)

    def _next(self, ids):
        at = max(i for i, token in enumerate(ids) if token == IDS["Answer:"])
        assert IDS["<end>"] not in ids[:at], "no prompt is padded"
        country = next(c for c in self.answers if IDS[c] in ids[at - 3 : at])
        script = [*(IDS[word] for word in self.answers[country]), IDS[self.end], IDS["Italy"]]
        return script[min(len(ids) - at - 1, len(script) - 1)]

    def prepare_inputs_for_generation(self, input_ids, *_, **kwargs):
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}


@pytest.fixture
def tokenizer():
    words = Tokenizer(WordLevel(IDS, unk_token="<unk>"))
    pieces = [Split(" ", "removed"), Split("\n", "isolated"), Split("?", "isolated")]
    words.pre_tokenizer = Sequence(pieces)
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", eos_token="<end>", pad_token="<end>"
    )


def facts():
    return [Fact(f"of {country}?", " ".join(words)) for country, words in CAPITALS.items()]


@pytest.mark.parametrize("end", ["\n", "<end>"])
def test_all_right_whether_the_answer_ends_with_its_line_or_with_the_text(tokenizer, end):
    result = exact_match(Table(CAPITALS, end), tokenizer, facts())
    assert (result.accuracy, result.stderr, result.num) == (1.0, 0.0, 3)


def test_a_wrong_a_longer_and_a_cut_answer_do_not_count(tokenizer):
    wrong = {"France": ["Rome"], "Peru": ["Lima", "Lima"], "Malaysia": ["Kuala"]}
    assert exact_match(Table(wrong, "\n"), tokenizer, facts()).accuracy == 0.0
    half = {**CAPITALS, "France": ["Rome"]}
    result = exact_match(Table(half, "\n"), tokenizer, facts())
    assert result.accuracy == pytest.approx(2 / 3)
    assert result.stderr == pytest.approx(math.sqrt(2 / 9 / 3))


def test_the_last_question_is_answered_not_the_examples(tokenizer):
    first, *rest = facts()
    model = Table(CAPITALS, "\n")
    assert exact_match(model, tokenizer, rest, shots=[first]).accuracy == 1.0
    zero_shot, one_shot = (
        len(tokenizer(text).input_ids)
        for text in (
            "Question: of Peru?\nAnswer:",
            "Question: of France?\nAnswer: Paris\n\nQuestion: of Peru?\nAnswer:",
        )
    )
    assert model.batches[0] == (2, one_shot)
    assert one_shot > zero_shot


def test_prompts_of_one_length_share_a_batch_and_batches_have_a_limit(tokenizer):
    asked = [*facts(), Fact("of great Peru?", "Lima")]
    model = Table(CAPITALS, "\n")
    assert exact_match(model, tokenizer, asked, batch_size=2).accuracy == 1.0
    lengths = [length for length, following in zip(model.batches, model.batches[1:], strict=False)]
    starts = {shape for shape in lengths if shape[1] in {6, 7}}
    assert {(2, 6), (1, 6), (1, 7)} <= starts
    assert max(rows for rows, _ in model.batches) == 2


def test_answers_are_compared_without_case_accents_and_punctuation():
    assert normalised(" Bogotá.\nQuestion: what") == "bogota"
    assert normalised("N'Djamena") == "ndjamena"
    assert normalised("  Port-au-Prince ") == "portauprince"
    assert normalised("the  Hague") == "the hague"
    assert normalised("Rome and Paris") != normalised("Rome")


def test_the_metric_counts_over_updates():
    metric = MatchRate()
    metric.update(["Lima", "Rome"], ["Lima", "Paris"])
    metric.update(["paris."], ["Paris"])
    assert metric.compute().tolist() == [2, 3]
    assert metric.result().num == 3
    assert metric.result().accuracy == pytest.approx(2 / 3)


def test_the_mode_of_the_model_is_left_as_it_was(tokenizer):
    model = Table(CAPITALS, "\n").train()
    exact_match(model, tokenizer, facts())
    assert model.training


def test_a_real_architecture_with_its_own_cache_can_be_asked(tokenizer):
    model = tiny_moe("mixtral", vocab_size=len(IDS))
    result = exact_match(model, tokenizer, facts(), shots=[Fact("of Italy?", "Rome")])
    assert result.num == 3


def test_the_capitals_are_unambiguous():
    shots, questions = load_capitals()
    assert [fact.answer for fact in shots] == ["Paris", "Tokyo", "Nairobi", "Lima", "Canberra"]
    assert len(questions) == 146
    everything = [*shots, *questions]
    assert len({fact.question for fact in everything}) == len(everything)
    assert len({normalised(fact.answer) for fact in everything}) == len(everything)
    assert Fact("What is the capital of Norway?", "Oslo") in questions


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 1: expected an object with the fields of 'of \{country\}\?'"),
        ('{"country": "Peru"}', "KeyError"),
        ("3", "TypeError"),
        ('{"country": "Peru", "capital": "?"}', "holds no word"),
        ("", "holds no question"),
    ],
)
def test_malformed_facts_name_file_and_line(line, message, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text(line)
    with pytest.raises(LitMoEError, match=message):
        load_facts(file, question="of {country}?", answer="{capital}")


def test_facts_are_read_by_any_field_names(tmp_path):
    file = tmp_path / "words.jsonl"
    file.write_text(json.dumps({"word": "big", "opposite": "small"}) + "\n\n")
    read = load_facts(file, question="Opposite of {word}?", answer="{opposite}")
    assert read == [Fact("Opposite of big?", "small")]
    with pytest.raises(LitMoEError, match="does not exist"):
        load_facts(tmp_path / "no.jsonl", question="{a}", answer="{b}")


def test_nothing_to_ask_and_nobody_to_ask_are_refused(tokenizer):
    with pytest.raises(LitMoEError, match="at least one question"):
        exact_match(Table(CAPITALS, "\n"), tokenizer, [])
    headless = tiny_moe("mixtral", vocab_size=len(IDS)).model
    with pytest.raises(LitMoEError, match="MixtralModel cannot generate"):
        exact_match(headless, tokenizer, facts())
