"""Measures look only at the places that predict something, and say the same to the last bit."""

import pytest
import torch

from lit_moe.distill.losses import next_token_nll
from lit_moe.search import AnswerTokens
from lit_moe.search.rows import RowBatch

ROWS, WIDTH, VOCABULARY = 6, 11, 500


def batch_of(labels):
    ids = torch.randint(VOCABULARY, (ROWS, WIDTH), generator=torch.Generator().manual_seed(3))
    labels = torch.where(labels, ids, -100)
    right = torch.ones(ROWS, dtype=torch.bool)
    return RowBatch(ids, torch.ones_like(ids), labels, torch.arange(ROWS), right, right.long())


def some_places(kind):
    draw = torch.Generator().manual_seed(4)
    if kind == "all":
        return torch.ones(ROWS, WIDTH, dtype=torch.bool)
    places = torch.rand(ROWS, WIDTH, generator=draw) < 0.3
    if kind == "a row without":
        places[2] = False
    return places


@pytest.mark.parametrize("kind", ["all", "some", "a row without"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nats_are_those_of_all_places_that_count(kind, dtype):
    batch = batch_of(some_places(kind))
    shape = (ROWS, WIDTH, VOCABULARY)
    logits = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    counted = batch.labels != -100
    nats, tokens = batch.nats(logits)
    expected = next_token_nll(logits, batch.input_ids, counted).double().sum(dim=1)
    assert torch.equal(nats, expected)
    assert torch.equal(tokens, counted[:, 1:].double().sum(dim=1))
    assert nats.count_nonzero() == (tokens > 0).sum()


@pytest.mark.parametrize("kind", ["all", "some", "a row without"])
def test_an_answer_counts_where_no_token_of_it_is_missed(kind):
    batch = batch_of(some_places(kind))
    logits = torch.zeros(ROWS, WIDTH, VOCABULARY)
    logits[:, :-1].scatter_(2, batch.input_ids[:, 1:, None], 1.0)
    row, place = (int(values[0]) for values in batch.predicting)
    logits[row, place] = 0.0
    logits[row, place, (batch.input_ids[row, place + 1] + 1) % VOCABULARY] = 1.0
    expected = torch.full((ROWS,), 100.0).double()
    expected[row] = 0.0
    assert torch.equal(AnswerTokens().points(logits, batch, None), expected)
