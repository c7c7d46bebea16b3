"""Everything illegal is refused before calibration, with the numbers and what would work."""

import re

import pytest
import torch
from torch import nn

from lit_moe.adapters.site import ExpertAxis, MoESite
from lit_moe.errors import LitMoEError
from lit_moe.selection import (
    Budget,
    ModelBytes,
    as_patterns,
    check_budget,
    find_super_experts,
    layer_counts,
    measure_bytes,
    parse_bytes,
    parse_protection,
)
from lit_moe.stats.observation import LayerStats, Observation

MIXTRAL = tuple(MoESite(f"layers.{i}.mlp", i, "", "", 8, top_k=2) for i in range(4))
DEEPSEEK = (MoESite("mlp", 0, "", "", 32, top_k=4, num_groups=4, top_k_groups=1),)
SIZES = ModelBytes(fixed=1000, per_expert={s.name: 100 for s in MIXTRAL})


def refused(*parts, protect=(), sites=MIXTRAL, **budget):
    with pytest.raises(LitMoEError) as caught:
        check_budget(Budget(**budget), sites, protect)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("ratio", [0, 0.0, 1.5, -0.5, float("nan"), 50, True, "half"])
def test_ratio_outside_zero_and_one_is_refused(ratio):
    refused(f"keep_ratio={ratio!r}", "strictly between 0 and 1", keep_ratio=ratio)


def test_percentages_are_recognised():
    refused("keep_ratio=50", "for 50 % write 0.5", keep_ratio=50)


@pytest.mark.parametrize("ratio", [1, 1.0])
def test_ratio_one_is_refused_because_it_does_nothing(ratio):
    refused("keep_ratio=1 keeps every expert", "nothing would be pruned", keep_ratio=ratio)


def test_ratio_that_rounds_to_everything_is_refused():
    refused(
        "keep_ratio=0.97 keeps all 8 experts",
        "largest count that prunes is 7",
        "keep_ratio=0.875",
        keep_ratio=0.97,
    )
    refused("keep_ratio=0.99", "nothing would be pruned", keep_ratio=0.99, scope="global")


def test_fewer_than_top_k_is_refused_with_the_smallest_ratio_that_works():
    refused(
        "keep_ratio=0.1 leaves 1 of 8 experts in 'layers.0.mlp'",
        "router picks 2 per token",
        "nearest legal count is 2, keep_ratio=0.25",
        keep_ratio=0.1,
    )
    check_budget(Budget(keep_ratio=0.25), MIXTRAL)
    refused("keep_experts=1 leaves 1 of 8", "picks 2", "smallest legal count is 2", keep_experts=1)


def test_global_budget_below_what_all_layers_need_is_refused():
    refused(
        "keep_ratio=0.2 keeps 6 of 32 experts",
        "4 layers need at least 8",
        "smallest keep_ratio is 0.25",
        keep_ratio=0.2,
        scope="global",
    )
    check_budget(Budget(keep_ratio=0.25, scope="global"), MIXTRAL)


def test_count_not_divisible_by_groups_is_refused_with_the_nearest_that_is():
    refused(
        "keep_experts=18 is not divisible by the 4 groups of 'mlp'",
        "nearest legal count is 20",
        sites=DEEPSEEK,
        keep_experts=18,
    )
    refused("nearest legal count is 16", sites=DEEPSEEK, keep_experts=17)
    check_budget(Budget(keep_experts=16), DEEPSEEK)


def test_top_k_must_be_found_in_the_groups_that_a_token_may_use():
    refused(
        "keep_ratio=0.25 leaves 8 of 32 experts",
        "picks 4 per token from 1 of 4 groups, so each group needs 4",
        "nearest legal count is 16, keep_ratio=0.5",
        sites=DEEPSEEK,
        keep_ratio=0.25,
    )


def test_layer_in_which_no_expert_can_go_is_named():
    tight = (MoESite("mlp", 0, "", "", 16, top_k=4, num_groups=4, top_k_groups=1),)
    refused("leaves 8 of 16", "each group needs 4", sites=tight, keep_ratio=0.5)
    refused("no expert of 'mlp' can go", "only legal count", sites=tight, keep_ratio=0.9)


@pytest.mark.parametrize("count", [0, -3, 2.5, True])
def test_counts_that_are_no_counts_are_refused(count):
    refused(f"keep_experts={count!r}", "at least 1", keep_experts=count)
    refused(f"floor={count!r}", "at least 1", keep_ratio=0.5, floor=count)


def test_count_of_all_or_more_experts_is_refused():
    refused("keep_experts=8 keeps all 8", "largest count that prunes is 7", keep_experts=8)
    refused("keep_experts=9", "only 8 experts", "prunes is 7", keep_experts=9)


def test_exactly_one_amount_must_be_given():
    refused("exactly one", "got none")
    refused("got keep_ratio=0.5, keep_experts=4", keep_ratio=0.5, keep_experts=4)


def test_unknown_scope_is_refused():
    refused("scope='model'", "'layer' or 'global'", keep_ratio=0.5, scope="model")


def test_floor_raises_what_every_layer_keeps():
    refused("leaves 4 of 8", "floor=5", "nearest legal count is 5", keep_ratio=0.5, floor=5)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_byte_budget_that_cannot_be_met_names_the_smallest_possible(scope):
    # 1000 fixed + 4 layers x 2 experts x 100.
    refused(
        "max_bytes=1500 bytes",
        "1000 bytes (1e-06 GB) are no experts",
        "'layers.0.mlp': 2, its router picks 2 per token",
        "takes 1800 bytes",
        max_bytes=1500,
        sizes=SIZES,
        scope=scope,
    )
    check_budget(Budget(max_bytes=1800, sizes=SIZES, scope=scope), MIXTRAL)
    refused("prunes nothing", "takes 4200 bytes", max_bytes=4200, sizes=SIZES, scope=scope)


def test_byte_budget_needs_sizes():
    refused("max_bytes=1500 needs Budget(sizes=", max_bytes=1500)


def test_byte_budget_gives_every_layer_the_same_count():
    assert layer_counts(Budget(max_bytes=2999, sizes=SIZES), MIXTRAL) == dict.fromkeys(
        [s.name for s in MIXTRAL], 4
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [("13GB", 13_000_000_000), ("1.5 GiB", 1_610_612_736), ("500mb", 500_000_000), (7, 7)],
)
def test_sizes_are_read_with_their_units(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["13", "13 B"])
def test_numbers_without_unit_are_bytes(text):
    assert parse_bytes(text) == 13


@pytest.mark.parametrize("text", ["13 apples", "GB", "-3GB", "0", True, "0.1B"])
def test_unreadable_sizes_are_refused(text):
    with pytest.raises(LitMoEError, match=re.escape(repr(text))):
        parse_bytes(text)


def test_protected_experts_that_do_not_fit_are_refused():
    refused(
        "keep_ratio=0.25 leaves 2 of 8 experts in 'layers.1.mlp'",
        "3 of its experts are protected",
        "nearest legal count is 3",
        keep_ratio=0.25,
        protect=["layers.1.*:0,1,2"],
    )


def test_protecting_every_layer_is_refused():
    refused("all 4 MoE layers are protected", keep_ratio=0.5, protect=["*"])


def test_protection_that_names_nothing_is_refused():
    refused(
        "'layer.0.mlp' matches none of the 4 MoE layers",
        "nearest is 'layers.0.mlp'",
        keep_ratio=0.5,
        protect=["layer.0.mlp"],
    )
    refused("experts 0 to 7", "[8]", keep_ratio=0.5, protect=["layers.0.mlp:3,8"])
    refused("'layers.0.mlp:x'", "'layer:3,5'", keep_ratio=0.5, protect=["layers.0.mlp:x"])


def test_protection_from_strings_and_mappings_agree():
    strings = parse_protection(["layers.0.mlp", "layers.[12].mlp:5,3", "layers.1.mlp:0"], MIXTRAL)
    assert [sorted(ids) for ids in strings.values()] == [list(range(8)), [0, 3, 5], [3, 5], []]
    again = parse_protection(strings, MIXTRAL)
    assert again == strings
    assert parse_protection(as_patterns(strings), MIXTRAL) == strings


def test_counts_of_a_global_budget_are_not_known_before_scoring():
    with pytest.raises(LitMoEError, match="not known before scoring"):
        layer_counts(Budget(keep_ratio=0.5, scope="global"), MIXTRAL)


def observation(*max_abs):
    zeros = torch.zeros(len(max_abs[0]), dtype=torch.float64)
    return Observation(
        {
            f"layers.{i}": LayerStats(9, *[*[zeros] * 6, torch.tensor(values).double()])
            for i, values in enumerate(max_abs)
        }
    )


def test_super_experts_are_far_above_everyone_in_the_first_three_quarters():
    quiet = [1.0] * 100
    loud = [1.0] * 99 + [500.0]
    found = find_super_experts(observation(quiet, [400.0, *quiet[1:]], quiet, loud))
    assert found == {"layers.1": (0,)}


def test_super_experts_must_pass_both_thresholds():
    # The 50 % quantile alone would let in 30, but a tenth of the maximum is 40.
    found = find_super_experts(observation([1.0, 2.0, 30.0, 400.0], [1.0] * 4), quantile=0.5)
    assert found == {"layers.0": (3,)}
    found = find_super_experts(observation([1.0, 2.0, 60.0, 400.0], [1.0] * 4), quantile=0.5)
    assert found == {"layers.0": (2, 3)}


def test_even_activations_have_no_super_experts():
    assert find_super_experts(observation([2.0] * 4, [2.0] * 4)) == {}


def test_model_is_measured_in_what_goes_with_an_expert_and_what_stays():
    model = nn.Module()
    model.router = nn.Linear(3, 4, bias=False, dtype=torch.float32)
    model.up = nn.Parameter(torch.zeros(4, 5, 3, dtype=torch.bfloat16))
    model.embedding = nn.Embedding(7, 3, dtype=torch.bfloat16)
    model.head = nn.Linear(3, 7, bias=False)
    model.head.weight = model.embedding.weight
    model.register_buffer("bias", torch.zeros(6))
    axes = (
        ExpertAxis("router.weight", 0, 4, kind="router"),
        ExpertAxis("up", 0, 4),
        ExpertAxis("bias", 0, 4, tail=2, kind="select_bias"),
    )
    sizes = measure_bytes(model, [MoESite("mlp", 0, "", "router", 4, 2, axes=axes)])
    assert sizes.per_expert == {"mlp": 3 * 4 + 15 * 2 + 4}
    assert sizes.fixed == 7 * 3 * 2 + 2 * 4
    assert sizes.total({"mlp": 4}) == sum(
        t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]
    )
