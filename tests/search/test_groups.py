import pytest

from lit_moe.adapters.site import MoESite
from lit_moe.errors import LitMoEError
from lit_moe.search import group_layers


def sites(num=6, experts=8):
    counts = experts if isinstance(experts, list) else [experts] * num
    return [
        MoESite(f"model.layers.{i}.mlp", i, "experts", "gate", n, 2) for i, n in enumerate(counts)
    ]


def names(groups):
    return [[int(layer.split(".")[2]) for layer in group.layers] for group in groups]


def test_groups_by_depth_are_neighbours_and_about_equally_large():
    assert names(group_layers(sites(), 4)) == [[0, 1], [2, 3], [4], [5]]
    assert [g.name for g in group_layers(sites(), 2)] == ["layers.[0-2]", "layers.[3-5]"]
    assert names(group_layers(sites(), "per_layer")) == [[0], [1], [2], [3], [4], [5]]
    assert names(group_layers(sites(), 1)) == [[0, 1, 2, 3, 4, 5]]


def test_patterns_name_layers_by_their_number_and_not_by_its_beginning():
    found = group_layers(sites(12), ["layers.1", "layers.[2-11]", "layers.0"])
    assert names(found) == [[0], [1], list(range(2, 12))]
    assert found[1].num_experts == 8


@pytest.mark.parametrize(
    ("grouping", "said"),
    [
        (["layers.[0-3]"], "leave out model.layers.4.mlp and 1 more"),
        (["layers.[0-3]", "layers.[3-5]"], "both hold model.layers.3.mlp"),
        (["layers.[0-5]", "layers.7"], "'layers.7' holds no MoE layer"),
        (["layer.N"], "is no pattern"),
        (7, "has 6 MoE layers; use 1 to 6"),
        (0, "has 6 MoE layers; use 1 to 6"),
    ],
)
def test_groups_that_do_not_fit_are_refused_in_one_sentence(grouping, said):
    with pytest.raises(LitMoEError, match=said):
        group_layers(sites(), grouping)


def test_layers_of_different_size_cannot_share_maps():
    with pytest.raises(LitMoEError, match=r"with 8 experts and model.layers.1.mlp with 6"):
        group_layers(sites(experts=[8, 6]), 1)
    assert len(group_layers(sites(experts=[8, 6]), "per_layer")) == 2
