"""The smallest of each group or row, for every size, and what becomes a zero."""

import pytest
import torch

from lit_moe.sparsity import selection
from lit_moe.sparsity.selection import (
    without_smallest,
    without_smallest_of_groups,
    zero_entries_,
)


def by_sorting(scores, count):
    order = scores.argsort(dim=-1, stable=True)
    return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, order[..., :count], False)


@pytest.mark.parametrize("values", [3, 2**20], ids=["many are equal", "hardly any are equal"])
@pytest.mark.parametrize("group", range(2, 20))
def test_groups_of_every_size_lose_their_smallest(group, values):
    torch.manual_seed(group)
    scores = torch.randint(0, values, (40, 5 * group)).double()
    for count in range(group):
        expected = by_sorting(scores.unflatten(-1, (-1, group)), count).flatten(-2)
        assert torch.equal(without_smallest_of_groups(scores, count, group), expected)


@pytest.mark.parametrize("count", [0, 1, 20, 49, 50])
def test_rows_lose_their_smallest_down_to_none_and_up_to_all(count):
    scores = torch.randint(0, 20, (8, 50), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(without_smallest(scores, count), by_sorting(scores, count))


@pytest.mark.parametrize("group", [2, 3, 4, 8, 13, 16])
def test_exchanges_that_are_left_out_change_nothing(group):
    members = torch.rand(group, 200, generator=torch.Generator().manual_seed(0))
    planes, expected = list(members.numpy()), members.sort(dim=0).values
    for count in range(1, group):
        ranked = selection._sorted_planes(planes, count)
        for rank in (count - 1, count):
            assert torch.equal(torch.from_numpy(ranked[rank]), expected[rank])


def test_ranks_by_pairs_agree_with_sorting():
    scores = torch.randint(0, 4, (30, 8), generator=torch.Generator().manual_seed(0)).float()
    for count in range(1, 8):
        assert torch.equal(selection._rank_in_groups(scores) >= count, by_sorting(scores, count))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_what_stays_keeps_every_bit_and_the_rest_is_plus_zero(dtype, is_transposed):
    torch.manual_seed(0)
    tensor = torch.randn(6, 10).to(dtype)
    tensor[0, :4] = torch.tensor([-0.0, float("inf"), -float("inf"), -0.0], dtype=dtype)
    if is_transposed:
        tensor = tensor.T
    stays, before = torch.rand(tensor.shape) < 0.5, tensor.clone()
    zero_entries_(tensor, stays)
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[tensor.element_size()]
    expected = torch.where(stays, before.contiguous().view(bits), 0)
    assert torch.equal(tensor.contiguous().view(bits), expected)


def test_zeros_count_as_a_change_in_place():
    tensor = torch.nn.Parameter(torch.ones(4))
    with torch.no_grad():
        zero_entries_(tensor, torch.tensor([True, False, True, True]))
    assert tensor._version == 1
    assert tensor.tolist() == [1, 0, 1, 1]
