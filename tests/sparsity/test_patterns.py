"""Patterns on small rows, with numbers that can be checked by hand."""

import pytest
import torch

from lit_moe.errors import LitMoEError
from lit_moe.sparsity.patterns import GroupPattern, RatioPattern, parse_pattern


def kept(pattern, *rows):
    return pattern.keep(torch.tensor(rows, dtype=torch.float32)).int().tolist()


def test_two_of_four_keeps_the_two_largest_of_each_four():
    assert kept(GroupPattern(2, 4), [4, 1, 3, 2, 5, 6, 7, 8]) == [[1, 0, 1, 0, 0, 0, 1, 1]]


def test_of_equal_scores_the_first_go():
    assert kept(GroupPattern(2, 4), [1, 1, 1, 1]) == [[0, 0, 1, 1]]
    assert kept(GroupPattern(1, 3), [2, 2, 5, 0, 0, 0]) == [[0, 1, 1, 0, 1, 1]]
    assert kept(RatioPattern(0.5), [1, 1, 1, 1], [0, 3, 0, 0]) == [[0, 0, 1, 1], [0, 1, 0, 1]]


def test_a_ratio_counts_in_each_row():
    rows = [[9, 8, 7, 6], [1, 2, 3, 4], [5, 5, 0, 6]]
    assert kept(RatioPattern(0.25), *rows) == [[1, 1, 1, 0], [0, 1, 1, 1], [1, 1, 0, 1]]


@pytest.mark.parametrize(("zeros", "group"), [(2, 4), (4, 8), (1, 2), (3, 16), (5, 32), (1, 3)])
def test_groups_agree_with_sorting(zeros, group):
    scores = torch.randint(0, 5, (3, 7, group * 4), generator=torch.Generator().manual_seed(0))
    keep = GroupPattern(zeros, group).keep(scores.float()).unflatten(-1, (-1, group))
    order = scores.unflatten(-1, (-1, group)).argsort(dim=-1, stable=True)
    expected = torch.ones_like(keep).scatter_(-1, order[..., :zeros], False)
    assert torch.equal(keep, expected)


@pytest.mark.parametrize("ratio", [0.01, 0.33, 0.5, 0.77, 0.99])
def test_ratios_agree_with_sorting(ratio):
    scores = torch.randint(0, 40, (5, 6, 100), generator=torch.Generator().manual_seed(0))
    keep = RatioPattern(ratio).keep(scores.float())
    order = scores.argsort(dim=-1, stable=True)
    expected = torch.ones_like(keep).scatter_(-1, order[..., : round(ratio * 100)], False)
    assert torch.equal(keep, expected)


@pytest.mark.parametrize("width", [24, 100, 300])
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.7])
def test_parts_of_a_row_add_up_to_its_share(ratio, width):
    pattern, scores = RatioPattern(ratio), torch.rand(2, width)
    parts = [
        pattern.keep_columns(scores[:, start : start + 7], start, width)
        for start in range(0, width, 7)
    ]
    zeros = (~torch.cat(parts, dim=1)).sum(dim=1).tolist()
    assert zeros == [pattern.zeros(width)] * 2


def test_patterns_on_the_way_go_from_nothing_to_everything():
    assert [GroupPattern(4, 8).at(p).num_zeros for p in (0.0, 0.3, 0.6, 1.0)] == [0, 1, 2, 4]
    assert RatioPattern(0.5).at(0.5) == RatioPattern(0.25)
    assert RatioPattern(0.5).at(0.0).keep(torch.zeros(2, 4)).all()
    assert GroupPattern(2, 4).at(0.0).keep(torch.zeros(2, 4)).all()


def test_what_is_asked_is_what_is_said():
    assert str(parse_pattern("4:8", None)) == "4:8"
    assert str(parse_pattern(None, 0.5)) == "0.5"


@pytest.mark.parametrize(
    ("pattern", "ratio", "message"),
    [
        (None, None, "pattern=None and ratio=None are given; give one of them"),
        ("2:4", 0.5, "give one of them"),
        ("4:4", None, "pattern 4:4 zeroes 4 of every 4 weights; N must be .* below M"),
        ("5:4", None, "N must be at least 1 and below M, for instance 2:4"),
        ("0:4", None, "N must be at least 1"),
        ("2-4", None, "pattern='2-4' is not N:M"),
        (124, None, "pattern=124 is not N:M; .* with quotes"),
        (None, 0, "ratio=0 must be a number above 0"),
        (None, 0.0, "ratio=0.0 must be"),
        (None, 1, "ratio=1 must be .* below 1"),
        (None, 1.5, "ratio=1.5 must be"),
        (None, -0.5, "ratio=-0.5 must be"),
        (None, float("nan"), "ratio=nan must be"),
        (None, "half", "ratio='half' must be a number"),
    ],
)
def test_nonsense_is_refused(pattern, ratio, message):
    with pytest.raises(LitMoEError, match=message):
        parse_pattern(pattern, ratio)
