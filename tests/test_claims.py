"""Paper claims as directions with margins, on the embedded real model."""

import copy
import statistics
from itertools import pairwise

import pytest
import torch

import lit_moe
from lit_moe.data import TextDataModule
from lit_moe.evaluate import evaluate_perplexity
from lit_moe.models import build_model

GOOD = ("reap", "weighted_ean_sum", "ean_sum", "frequency", "soft_count")


@pytest.fixture(scope="module")
def setting():
    torch.set_num_threads(2)
    data = TextDataModule(
        sequence_length=128, batch_size=32, calibration_tokens=8192, test_tokens=12288
    )
    model = build_model("embedded", dtype="float32")
    return model, data, lit_moe.observe(model, data.calibration_dataloader())


def perplexity(setting, scores, keep_ratio):
    model, data, _ = setting
    smaller = copy.deepcopy(model)
    if scores is not None:
        lit_moe.shrink(smaller, lit_moe.select(scores, keep_ratio=keep_ratio))
    loader, domains = data.test_share(rank=0, world_size=1)
    return evaluate_perplexity(smaller, loader, domains).perplexity


def test_good_criteria_beat_random_choice_and_random_beats_the_worst(setting):
    stats = setting[2]
    random = [perplexity(setting, lit_moe.score(stats, "random", seed=s), 0.5) for s in range(4)]
    reverse = {k: -v for k, v in lit_moe.score(stats, "weighted_ean_sum").items()}
    worst = perplexity(setting, reverse, 0.5)
    for criterion in GOOD:
        good = perplexity(setting, lit_moe.score(stats, criterion), 0.5)
        assert good < 0.75 * statistics.mean(random), criterion
    assert statistics.mean(random) < 0.75 * worst


def test_damage_grows_with_the_experts_dropped(setting):
    scores = lit_moe.score(setting[2], "weighted_ean_sum")
    curve = [perplexity(setting, None, 1.0)]
    curve += [perplexity(setting, scores, ratio) for ratio in (0.75, 0.5, 0.25)]
    assert all(later > 1.15 * earlier for earlier, later in pairwise(curve))


def test_calibrating_on_one_domain_spares_that_domain(setting):
    model, data, mixed = setting
    blocks = data.blocks("test")
    code = blocks.domains.index("code")
    texts = [{"input_ids": blocks.input_ids[blocks.domain == code][::2]}]
    own = lit_moe.observe(model, texts)

    def code_perplexity(stats):
        smaller = copy.deepcopy(model)
        plan = lit_moe.select(lit_moe.score(stats, "weighted_ean_sum"), keep_ratio=0.5)
        lit_moe.shrink(smaller, plan)
        loader, domains = data.test_share(rank=0, world_size=1)
        return evaluate_perplexity(smaller, loader, domains).domains["code"]

    assert code_perplexity(own) < 0.8 * code_perplexity(mixed)
