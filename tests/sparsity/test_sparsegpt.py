"""SparseGPT against the same thing done with an explicit inverse at every column."""

import pytest
import torch

from lit_moe.errors import CalibrationError
from lit_moe.sparsity.patterns import GroupPattern, RatioPattern
from lit_moe.sparsity.sparsegpt import DAMPING, sparsegpt

PATTERNS = [GroupPattern(2, 4), GroupPattern(4, 8), GroupPattern(1, 3), RatioPattern(0.5)]


def problem(outputs, inputs, tokens=400, experts=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64)
    x = torch.randn(experts, tokens, inputs, generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(experts, outputs, inputs, generator=generator, dtype=torch.float64)
    return weight, x


def by_explicit_inverse(weight_OD, products_DD, pattern):
    """Prune column by column; each time invert what is left of the damped products."""
    weight = weight_OD.clone()
    width = weight.shape[1]
    damping = DAMPING * products_DD.diagonal().mean()
    damped = products_DD + damping * torch.eye(width, dtype=products_DD.dtype)
    keep = torch.ones_like(weight, dtype=torch.bool)
    step = pattern.columns()
    for column in range(width):
        if column % step == 0:
            stop = min(column + step, width)
            losses = [torch.linalg.inv(damped[c:, c:])[0, 0] for c in range(column, stop)]
            scores = weight[:, column:stop] ** 2 / torch.stack(losses)
            keep[:, column:stop] = pattern.keep_columns(scores, column, width)
        inverse = torch.linalg.inv(damped[column:, column:])
        lost = torch.where(keep[:, column], 0.0, weight[:, column])
        weight[:, column:] -= lost[:, None] / inverse[0, 0] * inverse[0]
    return weight * keep, keep


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("inputs", [24, 264])
def test_it_is_optimal_brain_surgery_column_by_column(pattern, inputs):
    weight, x = problem(5, inputs)
    products = x.transpose(1, 2) @ x
    new, keep = sparsegpt(weight, products, pattern)
    expected, mask = by_explicit_inverse(weight[0], products[0], pattern)
    assert torch.equal(keep[0], mask)
    torch.testing.assert_close(new[0], expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(new == 0, ~keep)
    assert (~keep).sum(dim=2).unique().tolist() == [pattern.zeros(inputs)]


def test_experts_together_are_experts_one_by_one():
    weight, x = problem(4, 32, experts=3)
    products = x.transpose(1, 2) @ x
    new, keep = sparsegpt(weight, products, GroupPattern(2, 4))
    for expert in range(3):
        one = slice(expert, expert + 1)
        alone, mask = sparsegpt(weight[one], products[one], GroupPattern(2, 4))
        assert torch.equal(keep[one], mask)
        torch.testing.assert_close(new[one], alone)


def test_what_stays_makes_up_for_what_goes():
    weight, x = problem(16, 64)
    x[0, :, 16:] = x[0, :, :16].repeat(1, 3) + 0.3 * x[0, :, 16:]  # inputs that resemble others
    new, keep = sparsegpt(weight, x.transpose(1, 2) @ x, RatioPattern(0.5))
    wanted = x[0] @ weight[0].T
    corrected, masked = (float((x[0] @ w[0].T - wanted).norm()) for w in (new, weight * keep))
    assert corrected < 0.6 * masked


def test_dtype_and_the_given_weights_stay():
    weight, x = problem(4, 16)
    half, before = weight.bfloat16(), weight.bfloat16().clone()
    new, _ = sparsegpt(half, (x.transpose(1, 2) @ x).float(), GroupPattern(2, 4))
    assert new.dtype == torch.bfloat16
    assert torch.equal(half, before)


def test_inputs_that_were_never_active_go_first_and_change_nothing_else():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 400, 16, generator=generator, dtype=torch.float64)
    x[:, :, [1, 6]] = 0
    weight = 1 + torch.rand(1, 4, 16, generator=generator, dtype=torch.float64)
    new, keep = sparsegpt(weight, x.transpose(1, 2) @ x, RatioPattern(2 / 16))
    assert (~keep).nonzero()[:, 2].unique().tolist() == [1, 6]
    assert torch.equal(new, weight * keep)


def test_products_that_are_no_products_are_refused():
    weight, _ = problem(4, 8)
    with pytest.raises(CalibrationError, match="not positive definite.* method: moe_pruner"):
        sparsegpt(weight, -torch.eye(8)[None], GroupPattern(2, 4))
