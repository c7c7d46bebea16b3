import json

import pytest
import torch
from transformers import AutoTokenizer

from lit_moe.assets import model_folder
from lit_moe.errors import LitMoEError
from lit_moe.evaluate import evaluate_harness, evaluate_multiple_choice, load_questions
from lit_moe.evaluate.multiple_choice import Question
from lit_moe.models import build_model

QUESTIONS = [
    {"prompt": "And God said unto", "choices": [" Moses", " import sys"], "answer": 0},
    {"prompt": "import", "choices": [" os\nimport sys\n", " the LORD thy God"], "answer": 0},
    {"prompt": "def __init__(", "choices": ["zwischen den", "self, name"], "answer": 1},
    {"prompt": "And it came to", "choices": [" pass", " None", " nicht"], "answer": 0},
]


@pytest.fixture(scope="module")
def model():
    return build_model("embedded", dtype="float32")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(model_folder())


def test_the_embedded_model_knows_its_domains(model, tokenizer, tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text("\n".join(json.dumps(q) for q in QUESTIONS))
    result = evaluate_multiple_choice(model, tokenizer, load_questions(file))
    assert result.questions == 4
    assert result.accuracy == 1.0
    assert result.stderr == 0.0
    assert result.chance == pytest.approx((3 * 0.5 + 1 / 3) / 4)


def test_likelihoods_are_those_of_each_choice_alone(model, tokenizer):
    """Padding to the longest choice changes nothing: one choice per batch scores the same."""
    from lit_moe.evaluate.multiple_choice import _choice_nll

    together = _choice_nll(model, tokenizer, Question("And he", (" went", " went up into"), 0))
    for index, choice in enumerate((" went", " went up into")):
        alone = _choice_nll(model, tokenizer, Question("And he", (choice, choice), 0))
        torch.testing.assert_close(alone[0], together[index], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 1: expected an object"),
        ('{"prompt": "a", "choices": ["b"], "answer": 0}', "at least 2 choices"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 2}', "answer=2 is no index"),
        ('{"prompt": "a", "choices": ["b", ""], "answer": 0}', "a choice is empty"),
        ("", "holds no question"),
    ],
)
def test_malformed_questions_name_file_and_line(line, message, tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text(line)
    with pytest.raises(LitMoEError, match=message):
        load_questions(file)


def test_without_the_harness_its_bridge_says_how_to_get_it(model, tokenizer, monkeypatch):
    monkeypatch.setattr("lit_moe.evaluate.harness.find_spec", lambda _: None)
    with pytest.raises(LitMoEError, match=r"lit-moe\[eval\]"):
        evaluate_harness(model, tokenizer, ["boolq"])
