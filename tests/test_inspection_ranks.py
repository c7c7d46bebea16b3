"""Memory of one rank: against arithmetic by hand, and against what autograd really saves."""

import io
import json

import pytest
import torch
from rich.console import Console

from lit_moe import cli
from lit_moe.adapters import find_sites
from lit_moe.distill.losses import next_token_loss
from lit_moe.errors import LitMoEError
from lit_moe.inspection import Held, RankNeeds, RankRequest, inspect_model, render
from lit_moe.inspection.activations import activation_bytes
from lit_moe.inspection.census import census, largest_layer, largest_module
from lit_moe.inspection.zero_memory import (
    gathered_bytes,
    gradient_bytes,
    optimizer_bytes,
    parameter_bytes,
    step_bytes,
)
from lit_moe.surgery import shrink
from lit_moe.testing import FAMILIES, random_plan, tiny_moe

SIZES = [1001, 10]  # P = 1011; on 4 ranks 253, under stage 3 251 + 3 = 254


@pytest.mark.parametrize(
    ("stage", "offload", "parameters", "gradients", "optimizer", "step"),
    [
        (1, "none", Held(2022), Held(2022), Held(12 * 253), Held(4 * 253)),
        (2, "none", Held(2022), Held(2 * 253), Held(12 * 253), Held(4 * 253)),
        (2, "optimizer", Held(2022), Held(2002, 2002), Held(0, 14 * 253), Held(0, 4 * 253)),
        (3, "none", Held(2 * 254 + 20), Held(2 * 254), Held(12 * 254), Held(4 * 254)),
        (3, "optimizer", Held(2 * 254 + 20), Held(0, 508), Held(0, 12 * 254), Held(0, 1016)),
        (3, "both", Held(20, 2 * 254), Held(0, 508), Held(0, 12 * 254), Held(0, 1016)),
    ],
)
def test_bytes_of_four_ranks_in_bf16(stage, offload, parameters, gradients, optimizer, step):
    request = RankRequest(4, stage=stage, offload=offload)
    assert parameter_bytes(SIZES, request, persistent=100) == parameters
    assert gradient_bytes(SIZES, request) == gradients
    assert optimizer_bytes(SIZES, request) == optimizer
    assert step_bytes(SIZES, request) == step


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp32_doubles_parameters_and_gradients(stage):
    single, half = (RankRequest(4, stage=stage, precision=p) for p in ("fp32", "bf16"))
    assert parameter_bytes(SIZES, single).device == 2 * parameter_bytes(SIZES, half).device
    assert gradient_bytes(SIZES, single).device == 2 * gradient_bytes(SIZES, half).device
    # Under stage 3 the parameters are their own master.
    spared = parameter_bytes(SIZES, single, persistent=0).device if stage == 3 else 0
    assert optimizer_bytes(SIZES, single).device == optimizer_bytes(SIZES, half).device - spared


def test_the_largest_module_is_whole_with_its_gradient_under_stage_3():
    assert gathered_bytes(100, 0, RankRequest(2, stage=3)) == Held(2 * 2 * 100)
    assert gathered_bytes(100, 300, RankRequest(2, stage=3, teacher=True)) == Held(2 * 300)
    assert gathered_bytes(100, 0, RankRequest(2, stage=2)) == Held()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_census_of_a_pruned_model_is_that_of_a_smaller_model(family):
    whole, smaller = tiny_moe(family), tiny_moe(family)
    plan = random_plan(smaller)
    shrink(smaller, plan)
    sites = find_sites(whole)
    kept = [len(plan.kept[site.name]) for site in sites]
    sizes = census(whole, sites, kept)
    assert sum(size.before for size in sizes) == sum(p.numel() for p in whole.parameters())
    assert sum(size.after for size in sizes) == sum(p.numel() for p in smaller.parameters())


def test_the_experts_of_a_layer_are_gathered_as_one_module():
    model = tiny_moe("mixtral")
    sizes = census(model, find_sites(model), [4] * len(find_sites(model)))
    layer = model.get_submodule("model.layers.0")
    experts = sum(p.numel() for p in layer.get_submodule("mlp.experts").parameters())
    assert largest_module(sizes, pruned=False) == experts
    assert largest_module(sizes, pruned=True) == experts // 2
    embeddings = model.get_input_embeddings().get_parameter("weight").numel()
    assert largest_layer(sizes) == max(sum(p.numel() for p in layer.parameters()), embeddings)


def test_eight_ranks_of_mixtral_by_hand(mixtral):
    found = needs(mixtral, RankRequest(8, teacher=True))
    whole, half = 46_702_792_704, 24_153_690_112  # 32 x 4 x (3 x 4096 x 14336 + 4096) less
    assert (found.whole.trained, found.pruned.trained) == (whole, half)
    assert found.pruned.experts == (4, 4)
    parts = found.pruned.parts
    small = 2 * (65 * 4096 + 32 * 4 * 4096)  # norms and routers stay whole
    assert parts["parameters"] == Held(2 * half // 8 + small)
    assert parts["gradients"] == Held(2 * half // 8)
    assert parts["optimizer state"] == Held(12 * half // 8)
    assert parts["teacher"] == Held(2 * whole // 8 + 2 * (65 * 4096 + 32 * 8 * 4096))
    assert parts["largest module, gathered"] == Held(2 * 2 * 4 * 3 * 4096 * 14336)
    sharded = found.loading[1]
    assert found.loading[0].host == found.loading[0].device == 2 * 2 * whole
    layer = 8 * 3 * 4096 * 14336 + 8 * 4096 + 2 * 4096 + 2 * 4096 * (4096 + 1024)
    assert sharded.device == 2 * 2 * whole // 8 + 2 * layer
    assert sharded.host == 2 * whole


def test_the_peak_counts_backward_and_step_in_turn(mixtral):
    request = RankRequest(8, tokens_per_rank=1024)
    training = needs(mixtral, request).pruned
    lasting = sum(held.device for held in training.lasting.values())
    backward = sum(held.device for held in training.backward.values())
    step = training.step["fp32 gradients of the step"].device
    assert training.peak == Held(lasting + max(backward, step))
    assert training.peak.device < sum(held.device for held in training.parts.values())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_the_estimate_of_activations_is_near_what_autograd_saves(family):
    model = tiny_moe(family, hidden_size=128, vocab_size=512).train()
    ids = torch.randint(3, 512, (4, 128), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        next_token_loss(model(input_ids=ids, attention_mask=mask).logits, ids, mask)
    really = sum(t.untyped_storage().nbytes() for at, t in saved.items() if at not in weights)
    said = activation_bytes(model, find_sites(model), tokens=512, itemsize=4, teacher=False)
    assert 0.65 * really < said < 1.35 * really


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ranks": 0}, "ranks=0: there must be at least 1"),
        ({"ranks": 2, "stage": 4}, "stage=4 is no ZeRO stage; there are 1, 2 and 3"),
        ({"ranks": 2, "stage": 2, "offload": "both"}, "which only stage 3 does; stage 2 knows"),
        ({"ranks": 2, "offload": "disk"}, "offload='disk' is unknown; known: none, optimizer"),
        ({"ranks": 2, "keep_ratio": 0}, "keep_ratio=0 must be in"),
        ({"ranks": 2, "tokens_per_rank": 0}, "tokens_per_rank=0: there must be at least 1"),
    ],
)
def test_impossible_requests_are_one_sentence(fields, message):
    with pytest.raises(LitMoEError, match=message):
        RankRequest(**fields)


def test_the_command_line_shows_tables_and_json(mixtral, capsys):
    words = ["inspect", str(mixtral), "--ranks", "8", "--teacher", "--keep-ratio", "0.75"]
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    for word in ("one of 8 ranks, ZeRO stage 3, bf16, with a teacher", "shard_on_load: true"):
        assert word in shown
    assert cli.main([*words, "--json"]) == 0
    ranks = json.loads(capsys.readouterr().out)["ranks"]
    assert ranks["pruned"]["experts"] == [6, 6]
    assert ranks["pruned"]["peak"]["device"] > ranks["pruned"]["lasting"]["teacher"]["device"] > 0
    assert cli.main(["inspect", str(mixtral), "--ranks", "8", "--stage", "5"]) == 2
    assert "stage=5 is no ZeRO stage" in capsys.readouterr().err


def test_the_tables_fit_80_columns(mixtral):
    request = RankRequest(1, offload="optimizer", teacher=True, tokens_per_rank=4096)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render(inspect_model(mixtral, ranks=request)))
    text = console.export_text()
    assert "activations, about" in text
    assert "…" not in text


def test_nothing_is_said_of_ranks_unless_asked(mixtral):
    assert inspect_model(mixtral).ranks is None
    assert inspect_model(mixtral).to_dict()["ranks"] is None


def needs(folder, request) -> RankNeeds:
    found = inspect_model(folder, ranks=request).ranks
    assert found is not None
    return found


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """Folder with Mixtral-8x7B's config (transformers' default) and no weights."""
    import transformers

    folder = tmp_path_factory.mktemp("mixtral")
    transformers.MixtralConfig(dtype="bfloat16").save_pretrained(folder)
    return folder
