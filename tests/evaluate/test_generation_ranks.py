"""Written answers do not depend on the strategy, nor on where the parameters lie."""

import lightning as L
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_moe.assets import model_folder
from lit_moe.evaluate import (
    GenerationOptions,
    Prompting,
    PromptTemplate,
    TaskItem,
    evaluate_task,
    generate_answers,
)
from tests.distributed.runs import Setup

PROMPTING = Prompting(PromptTemplate("{question}"))
OPTIONS = GenerationOptions(max_new_tokens=5, stop=(), batch_size=2)
NAMES = ("red", "green", "blue")


class Examination(L.Callback):
    """Asks the model when it is built and when it is trained."""

    def __init__(self, tokenizer, items):
        self.tokenizer, self.items, self.results = tokenizer, items, []

    def on_model_built(self, _, module):
        self.ask(module.built_model)

    def on_train_end(self, _, module):
        self.ask(module.built_model)

    def ask(self, model):
        quality = evaluate_task(
            model, self.tokenizer, self.items, prompting=PROMPTING, generation=OPTIONS
        )
        self.results.append(quality)


def examined(trainer, _):
    (callback,) = (c for c in trainer.callbacks if isinstance(c, Examination))
    return [vars(quality) for quality in callback.results]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "zero3", "zero3-sharded-load"])
def test_ranks_with_an_odd_number_of_questions_find_what_one_process_finds(
    checkpoint, pages, tmp_path, mode
):
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    texts = ["In the beginning", "def", "The word", "Der", "Text", "import", "Kind"]
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    written = generate_answers(model, tokenizer, texts, OPTIONS)
    items = [
        TaskItem(
            {"question": text},
            (NAMES[n % 3], *([answer] if n % 2 else [])),
            NAMES if n < 5 else (),
        )
        for n, (text, answer) in enumerate(zip(texts, written, strict=True))
    ]
    setup = Setup(checkpoint, pages, tmp_path)
    setup.options = {"max_steps": 2}
    alone, together = (
        setup.fit(m, callbacks=lambda: [Examination(tokenizer, items)], look=examined)
        for m in ("single", mode)
    )
    assert together[0] == together[1]
    for one, several in zip(alone[0], together[0], strict=True):
        assert several == pytest.approx(one)
    assert alone[0][0]["exact_match"] == pytest.approx(3 / 7)
