import math

import torch

from lit_moe.evaluate import Perplexity, evaluate_perplexity
from lit_moe.testing import tiny_moe


def update(metric, nll, domain, num_bytes=10):
    rows = torch.tensor(nll)
    mask = torch.ones_like(rows)
    metric.update(rows, mask, torch.tensor(domain), torch.full((len(nll),), num_bytes))


def test_perplexity_bits_and_error_by_hand():
    metric = Perplexity(["a", "b"])
    update(metric, [[1.0, 3.0], [2.0, 4.0]], [0, 1], num_bytes=4)
    quality = metric.quality()
    assert math.isclose(quality.perplexity, math.exp(2.5))
    assert quality.tokens == 4
    assert math.isclose(quality.bits_per_byte, 10.0 / math.log(2) / 8)
    # Block means 2 and 3: variance 0.25, error of the mean sqrt(0.25 / (2 - 1)).
    assert math.isclose(quality.stderr, math.exp(2.5) * 0.5, rel_tol=1e-9)
    assert math.isclose(quality.domains["a"], math.exp(2.0))
    assert math.isclose(quality.domains["b"], math.exp(3.0))


def test_two_updates_equal_one():
    together, apart = Perplexity(["a"]), Perplexity(["a"])
    update(together, [[1.0, 2.0], [3.0, 5.0]], [0, 0])
    update(apart, [[1.0, 2.0]], [0])
    update(apart, [[3.0, 5.0]], [0])
    assert together.quality() == apart.quality()


def test_masked_tokens_do_not_count():
    metric = Perplexity(["a"])
    metric.update(
        torch.tensor([[1.0, 0.0]]), torch.tensor([[1, 0]]), torch.tensor([0]), torch.tensor([3])
    )
    assert metric.quality().tokens == 1
    assert math.isclose(metric.quality().perplexity, math.e)


def test_evaluation_equals_the_models_own_loss_and_restores_the_mode(make_data):
    model = tiny_moe("mixtral", vocab_size=1024).train()
    loader, domains = make_data().test_share(rank=0, world_size=1)
    quality = evaluate_perplexity(model, loader, domains)
    assert model.training
    model.eval()
    ids = torch.cat([batch["input_ids"] for batch in loader])
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss
    assert math.isclose(quality.perplexity, math.exp(float(expected)), rel_tol=1e-5)
    assert quality.tokens_per_second > 0
    assert set(quality.domains) == set(domains)


def test_error_of_blocks_of_different_length_is_that_of_a_ratio():
    metric = Perplexity(["a"])
    nll = torch.tensor([[2.0, 2.0, 2.0, 2.0], [4.0, 0.0, 0.0, 0.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    metric.update(nll, mask, torch.tensor([0, 0]), torch.tensor([4, 1]))
    mean = 12 / 5
    residuals = [8 - 4 * mean, 4 - mean]
    expected = math.sqrt(sum(r * r for r in residuals) * 2 / 1) / 5
    assert math.isclose(metric.quality().stderr, math.exp(mean) * expected, rel_tol=1e-9)
