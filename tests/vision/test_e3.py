"""Ensembles (E3): from files of the JAX code, and in both of their configs, made small."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lit_moe.adapters import count_experts, find_sites
from lit_moe.cli import main
from lit_moe.errors import LitMoEError
from lit_moe.models.vision import vmoe_from_npz
from lit_moe.plan import KeepPlan
from lit_moe.surgery import shrink
from lit_moe.testing import random_plan
from tests.vision.test_conversion import by_hand, jax_arrays, mlp

CONFIGS = Path(__file__).parents[2] / "configs" / "vision"
ROUTER = "Encoder/encoderblock_1/Moe/Router/dense/kernel"
MEMBERS = 2


def e3_arrays(*, split):
    """A file of an E3: routers by member (as after fine-tuning) or in one piece; pre_logits."""
    rng, arrays = np.random.default_rng(1), jax_arrays()
    arrays["pre_logits/kernel"] = rng.normal(size=(16, 12)).astype(np.float32)
    arrays["pre_logits/bias"] = rng.normal(size=12).astype(np.float32)
    arrays["head/kernel"] = rng.normal(size=(12, 6)).astype(np.float32)
    if split:
        arrays[ROUTER] = arrays[ROUTER].reshape(16, MEMBERS, 2)
    return arrays


def of_member(member):
    """One expert per token among the member's own half of the experts."""

    def sparse(x, p, name):
        gates, chosen = torch.softmax(x @ p[f"{name}/Router/dense/kernel"][:, member], -1).max(-1)
        rows = [
            g * mlp(t, p, f"{name}/Mlp", 2 * member + int(e))
            for t, g, e in zip(x, gates, chosen, strict=True)
        ]
        return torch.stack(rows)

    return sparse


@torch.no_grad()
@pytest.mark.parametrize("split", [True, False])
def test_a_file_of_an_ensemble_gives_the_mean_of_its_members(split, tmp_path):
    np.savez(tmp_path / "e3.npz", **e3_arrays(split=split))
    options = {} if split else {"num_members": MEMBERS}
    model = vmoe_from_npz(
        tmp_path / "e3.npz", num_experts_per_tok=1, eval_capacity_factor=None, **options
    )
    image = torch.randn(8, 8, 3)
    probabilities = model(image.permute(2, 0, 1)[None]).logits[0].softmax(-1)
    arrays = e3_arrays(split=True)
    members = [by_hand(arrays, image, of_member(m)).softmax(-1) for m in range(MEMBERS)]
    expected = torch.stack(members).mean(dim=0)
    torch.testing.assert_close(probabilities, expected, rtol=1e-4, atol=1e-5)
    assert (members[0] - members[1]).abs().max() > 1e-3
    assert (model.config.num_members, model.config.representation_size) == (MEMBERS, 12)


@torch.no_grad()
def test_an_ensemble_from_a_file_is_pruned_saved_and_loaded(tmp_path):
    np.savez(tmp_path / "e3.npz", **e3_arrays(split=True))
    model = vmoe_from_npz(tmp_path / "e3.npz", num_experts_per_tok=1)
    shrink(model, random_plan(model))
    model.save_pretrained(tmp_path / "model")
    again = type(model).from_pretrained(tmp_path / "model").eval()
    image = torch.randn(2, 3, 8, 8)
    assert torch.equal(again(image).logits, model(image).logits)
    assert set(count_experts(find_sites(again)).values()) == {2}


def test_other_numbers_of_members_are_refused(tmp_path):
    np.savez(tmp_path / "e3.npz", **e3_arrays(split=True))
    with pytest.raises(LitMoEError, match="routers of 2 members, but num_members=4 was asked for"):
        vmoe_from_npz(tmp_path / "e3.npz", num_members=4)
    np.savez(tmp_path / "one.npz", **e3_arrays(split=False))
    with pytest.raises(LitMoEError, match="cannot become a V-MoE: 4 experts cannot be shared"):
        vmoe_from_npz(tmp_path / "one.npz", num_members=3)


@torch.no_grad()
def test_positions_are_scaled_to_larger_images(tmp_path):
    arrays = jax_arrays()
    np.savez(tmp_path / "vmoe.npz", **arrays)
    model = vmoe_from_npz(tmp_path / "vmoe.npz", image_size=12, eval_capacity_factor=None)
    found = model.get_parameter("vit.embeddings.position_embeddings")[0]
    old = torch.from_numpy(arrays["Encoder/posembed_input/pos_embedding"])[0]
    assert torch.equal(found[0], old[0])
    corners = found[[1, 3, 7, 9]]
    torch.testing.assert_close(corners, old[1:])
    torch.testing.assert_close(found[5], old[1:].mean(dim=0))
    assert model(torch.randn(1, 3, 12, 12)).logits.shape == (1, 6)
    with pytest.raises(LitMoEError, match="13 x 13 pixels cannot be cut into patches of 4 x 4"):
        vmoe_from_npz(tmp_path / "vmoe.npz", image_size=13)


def test_all_three_configs_of_an_ensemble_fit_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    words = [f"--model.init_args.architecture.{key}={value}" for key, value in small.items()]
    words.append("--model.init_args.architecture.moe_layers=[0,1]")
    assert fit("pretrain_e3", *words) == 0
    assert fit("finetune_e3") == 0
    assert fit("e3") == 0
    report = json.loads(Path("runs/vision/e3/report.json").read_text())
    assert list(report["images"]) == ["before", "pruned", "recovered"]
    assert {stage["images"] for stage in report["images"].values()} == {500}
    plan = KeepPlan.load(Path("runs/vision/e3/plan.json"))
    for kept in plan.kept.values():
        assert [e // 4 for e in kept] == [0, 0, 1, 1]
    config = json.loads(Path("runs/vision/e3/model/config.json").read_text())
    assert (config["n_group"], config["num_experts"], config["num_null_experts"]) == (2, 4, 4)


def fit(name, *words):
    """Run a config of ``configs/vision`` for six steps, here."""
    return main(["fit", "--config", str(CONFIGS / f"{name}.yaml"), "--trainer.max_steps=6", *words])


def test_an_ensemble_pretrains_like_the_digits():
    one, other = (
        yaml.safe_load((CONFIGS / f"pretrain_{name}.yaml").read_text()) for name in ("digits", "e3")
    )
    own = other["model"]["init_args"]["architecture"]
    assert own.pop("num_members") == MEMBERS
    assert one["model"] == other["model"]
    assert one["data"] == other["data"]
