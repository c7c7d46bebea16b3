"""lm-evaluation-harness on models in memory; what needs the harness itself is skipped without."""

import json
import random
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoTokenizer

import lit_moe
from lit_moe.adapters import count_experts, find_sites
from lit_moe.assets import model_folder, text_file
from lit_moe.errors import LitMoEError
from lit_moe.evaluate import evaluate_harness, evaluate_multiple_choice
from lit_moe.evaluate.multiple_choice import Question
from lit_moe.plan import KeepPlan

TASK = """\
task: what_comes_next
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture
def needs_harness():
    pytest.importorskip(
        "lm_eval", reason="lm-evaluation-harness is not installed: pip install 'lit-moe[eval]'"
    )


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(model_folder())


def questions(num=24):
    """Which words of held-out text come next: the true ones or those of three other places."""
    words = " ".join(row["text"] for row in pq.read_table(text_file("test")).to_pylist()).split()
    words = [word for word in words if word.isascii()]
    spans = [words[start : start + 16] for start in range(0, len(words), len(words) // num)][:num]
    ends = [" " + " ".join(span[12:]) for span in spans]
    return [
        Question(
            prompt=" ".join(span[:12]),
            choices=tuple(ends[(i - i % 4 + j) % num] for j in range(4)),
            answer=i % 4,
        )
        for i, span in enumerate(spans)
    ]


@pytest.fixture
def task(tmp_path):
    """Return the YAML file of a task over a local file."""
    rows = [vars(question) for question in questions()]
    (tmp_path / "questions.json").write_text(json.dumps(rows))
    file = tmp_path / "what_comes_next.yaml"
    file.write_text(TASK.format(file=tmp_path / "questions.json"))
    return file


def embedded():
    return lit_moe.load(model_folder(), dtype="float32")


def uneven():
    """The embedded model with a different number of experts in each layer."""
    model = embedded()
    counts = count_experts(find_sites(model))
    kept = {name: tuple(range(6 + i)) for i, name in enumerate(counts)}
    lit_moe.shrink(model, KeepPlan(kept, counts))
    return model


@pytest.mark.usefixtures("needs_harness")
@pytest.mark.parametrize("build", [embedded, uneven])
def test_the_harness_finds_the_accuracies_that_we_find(build, task, tokenizer):
    model = build()
    found = evaluate_harness(model, tokenizer, [task], batch_size=4)["what_comes_next"]
    tokenizer.bos_token = None  # the harness leaves the start to the tokenizer, which adds none
    ours = evaluate_multiple_choice(model, tokenizer, questions())
    assert ours.accuracy > ours.chance
    assert found["acc,none"] == ours.accuracy_sum
    assert found["acc_norm,none"] == ours.accuracy
    assert evaluate_harness(model, tokenizer, [task], limit=8)["what_comes_next"]["sample_len"] == 8


@pytest.mark.usefixtures("needs_harness")
def test_model_tokenizer_and_random_states_stay_as_they_were(task, tokenizer):
    model = embedded().train()
    tokenizer.pad_token = None
    states = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002
    evaluate_harness(model, tokenizer, [task], limit=2)
    assert all(module.training for module in model.modules())
    assert tokenizer.pad_token is None
    after = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002
    assert after == states


@pytest.mark.usefixtures("needs_harness")
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["arc_esy"], "has no task 'arc_esy', .* did you mean 'arc_easy'"),
        (["nowhere/task.yaml"], "no task 'nowhere/task.yaml', and there is no such file"),
        ([], "no task is given"),
        (["boolq"], "a data set of boolq is not here and could not be downloaded"),
    ],
)
def test_a_task_that_cannot_be_run_is_one_sentence(names, message, tokenizer):
    with pytest.raises(LitMoEError, match=message):
        evaluate_harness(embedded(), tokenizer, names)


@pytest.mark.usefixtures("needs_harness")
def test_only_the_first_process_of_a_machine_gets_numbers(task, tokenizer, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert evaluate_harness(embedded(), tokenizer, [task], limit=2) == {}


def test_without_the_harness_the_command_that_installs_it_is_named(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(LitMoEError, match=r"pip install 'lit-moe\[eval\]'"):
        evaluate_harness(embedded(), tokenizer, ["boolq"])
