"""The value: one bit per weight, saved, loaded, replayed, refused where it does not belong."""

import copy

import pytest
import torch
from safetensors.torch import save_file

from lit_moe.errors import PlanError
from lit_moe.plan import KeepPlan
from lit_moe.sparsity import WeightMasks, apply_masks, sparsify, weight_masks
from lit_moe.sparsity.masks import pack, unpack
from lit_moe.surgery import shrink
from lit_moe.testing import example_inputs, random_plan, tiny_moe
from tests.sparsity.oracle import state_of

LAYERS = ["model.layers.0.mlp", "model.layers.1.mlp"]


@pytest.fixture(scope="module")
def masks():
    return weight_masks(tiny_moe("mixtral"), method="magnitude", pattern="2:4")


@pytest.mark.parametrize("width", [1, 7, 8, 9, 24])
def test_bits_go_in_and_come_out(width):
    keep = torch.rand(2, 3, width, generator=torch.Generator().manual_seed(width)) > 0.5
    bits = pack(keep)
    assert bits.shape == (2, 3, (width + 7) // 8)
    assert torch.equal(unpack(bits, width), keep)


def test_the_first_column_is_the_lowest_bit():
    assert pack(torch.tensor([[[True, False, False, True]]])).tolist() == [[[9]]]


def test_masks_survive_saving_and_loading(masks, tmp_path):
    masks.save(tmp_path / "masks.safetensors")
    loaded = WeightMasks.load(tmp_path / "masks.safetensors")
    assert loaded == masks
    for name in ("method", "pattern", "family", "widths"):
        assert getattr(loaded, name) == getattr(masks, name)
    assert (loaded.method, loaded.pattern, loaded.family) == ("magnitude", "2:4", "mixtral")
    assert WeightMasks.from_dict(masks.to_dict()) == masks
    weights = 2 * 8 * 3 * 24 * 32
    size = (tmp_path / "masks.safetensors").stat().st_size
    assert weights / 8 <= size <= weights / 8 + 2000


def test_loaded_masks_replay_the_pruning(tmp_path):
    model = tiny_moe("gpt_oss")
    again = copy.deepcopy(model)
    sparsify(model, [example_inputs(model)], pattern="2:4").masks.save(tmp_path / "masks")
    apply_masks(again, WeightMasks.load(tmp_path / "masks"))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())


def test_sparsity_counts_what_goes(masks):
    assert masks.sparsity() == {
        layer: dict.fromkeys(("gate", "up", "down"), 0.5) for layer in LAYERS
    }
    assert list(masks) == LAYERS


def test_masks_differ_when_a_bit_does(masks):
    bits = {layer: dict(matrices) for layer, matrices in masks.bits.items()}
    bits[LAYERS[1]]["up"] = bits[LAYERS[1]]["up"] ^ 1
    assert WeightMasks(bits, masks.widths) != masks
    assert WeightMasks(masks.bits, masks.widths, method="another") == masks
    assert masks != "masks"


def test_masks_follow_a_plan_that_drops_experts_later(masks):
    model = tiny_moe("mixtral")
    plan = random_plan(model)
    apply_masks(model, masks)
    shrink(model, plan)
    before = state_of(model)
    apply_masks(model, masks.shrunk(plan))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert masks.shrunk(plan).shapes[LAYERS[0]]["down"] == (4, 32, 24)


def test_a_plan_of_another_model_is_refused(masks):
    with pytest.raises(PlanError, match="another model"):
        masks.shrunk(KeepPlan.identity(dict.fromkeys(LAYERS, 4)))


def test_masks_of_another_model_are_refused_before_anything_is_touched(masks):
    other = tiny_moe("qwen3_moe")
    before = state_of(other)
    with pytest.raises(PlanError, match="family 'mixtral', this model is 'qwen3_moe'"):
        apply_masks(other, masks)
    fewer = tiny_moe("mixtral", num_experts=4)
    message = r"down of 'model.layers.0.mlp' is \(8, 32, 24\) in the masks and \(4, 32, 24\)"
    with pytest.raises(PlanError, match=message):
        apply_masks(fewer, masks)
    deeper = tiny_moe("mixtral", num_hidden_layers=3)
    with pytest.raises(PlanError, match=r"layers.2.mlp' is not there in the masks"):
        apply_masks(deeper, masks)
    assert all(torch.equal(v, before[k]) for k, v in other.state_dict().items())


def test_files_that_hold_no_masks_are_refused(tmp_path, masks):
    with pytest.raises(PlanError, match="does not exist"):
        WeightMasks.load(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors at all")
    with pytest.raises(PlanError, match="cannot be read"):
        WeightMasks.load(tmp_path / "text.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(PlanError, match="holds no weight masks: expected 'lit-moe/weight-masks/1'"):
        WeightMasks.load(tmp_path / "other.safetensors")
    with pytest.raises(PlanError, match="no weight masks"):
        WeightMasks.from_dict({"format": "lit-moe/keep-plan/1"})
    with pytest.raises(PlanError, match="damaged"):
        WeightMasks(
            masks.bits, {layer: dict.fromkeys(("gate", "up", "down"), 99) for layer in LAYERS}
        )
