"""V-MoEs from dense ViTs and from JAX files: equal outputs, known names, plain refusals."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import ViTConfig, ViTForImageClassification

from lit_moe.errors import LitMoEError
from lit_moe.models.vision import upcycle, vmoe_from_npz
from lit_moe.testing import tiny_moe

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
    "num_channels": 3,
    "num_labels": 6,
}


@pytest.fixture
def dense():
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**SIZES)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@torch.no_grad()
def test_an_upcycled_model_with_all_experts_active_is_the_dense_one(dense):
    sparse = upcycle(dense, num_experts=4, top_k=4, eval_capacity_factor=None)
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(sparse(images).logits, dense(images).logits, rtol=1e-4, atol=1e-4)
    assert sparse.config.moe_layers == [1]
    assert sparse.config.num_labels == 6


def test_noise_makes_copies_different(dense):
    torch.manual_seed(0)
    sparse = upcycle(dense, noise=0.1)
    experts = sparse.get_parameter("vit.layers.1.mlp.experts.up_proj")
    assert not torch.equal(experts[0], experts[1])
    plain = upcycle(dense).get_parameter("vit.layers.1.mlp.experts.up_proj")
    assert torch.equal(plain[0], plain[7])


def test_what_cannot_be_upcycled_is_refused(dense):
    with pytest.raises(LitMoEError, match="MixtralForCausalLM cannot be upcycled"):
        upcycle(tiny_moe("mixtral"))
    with pytest.raises(LitMoEError, match="must name some of the layers 0 to 1"):
        upcycle(dense, moe_layers=[5])
    with pytest.raises(LitMoEError, match="router_type is 'both'; it can be token_choice or exp"):
        upcycle(dense, router_type="both")
    with pytest.raises(LitMoEError, match="cls_token is .1, 1, 16., the fields ask for .1, 1, 32"):
        upcycle(dense, hidden_size=32)
    with pytest.raises(LitMoEError, match="noise=-1 is a deviation"):
        upcycle(dense, noise=-1)


def test_other_labels_get_a_new_classifier(dense):
    sparse = upcycle(dense, num_labels=3)
    assert sparse(torch.randn(2, 3, 8, 8)).logits.shape == (2, 3)
    assert sparse.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


SPARSE = "Encoder/encoderblock_1"


def jax_arrays(prefix=""):
    """A checkpoint of the layout of google-research/vmoe: 2 blocks, the second sparse."""
    rng, d, i, e = np.random.default_rng(0), 16, 24, 4
    shapes = {
        "cls": (1, 1, d),
        "embedding/kernel": (4, 4, 3, d),
        "embedding/bias": (d,),
        "Encoder/posembed_input/pos_embedding": (1, 5, d),
        "Encoder/encoder_norm/scale": (d,),
        "Encoder/encoder_norm/bias": (d,),
        "head/kernel": (d, 6),
        "head/bias": (6,),
    }
    for block in range(2):
        base = f"Encoder/encoderblock_{block}"
        for name in ("LayerNorm_0", "LayerNorm_1"):
            shapes |= {f"{base}/{name}/scale": (d,), f"{base}/{name}/bias": (d,)}
        for name in ("query", "key", "value"):
            shapes[f"{base}/SelfAttention/{name}/kernel"] = (d, 2, 8)
            shapes[f"{base}/SelfAttention/{name}/bias"] = (2, 8)
        shapes[f"{base}/SelfAttention/out/kernel"] = (2, 8, d)
        shapes[f"{base}/SelfAttention/out/bias"] = (d,)
        mlp, lead = (f"{base}/Moe/Mlp", (e,)) if block else (f"{base}/Mlp", ())
        shapes |= {f"{mlp}/Dense_0/kernel": (*lead, d, i), f"{mlp}/Dense_0/bias": (*lead, i)}
        shapes |= {f"{mlp}/Dense_1/kernel": (*lead, i, d), f"{mlp}/Dense_1/bias": (*lead, d)}
    shapes["Encoder/encoderblock_1/Moe/Router/dense/kernel"] = (d, e)
    return {prefix + k: rng.normal(size=s).astype(np.float32) * 0.3 for k, s in shapes.items()}


def by_hand(arrays, image, sparse=None):
    """The forward of the JAX code in numpy's terms, one image (8, 8, 3), two experts per token."""
    sparse = sparse or experts
    p = {name: torch.from_numpy(value) for name, value in arrays.items()}
    patches = image.unfold(0, 4, 4).unfold(1, 4, 4).permute(0, 1, 3, 4, 2).reshape(4, 48)
    x = patches @ p["embedding/kernel"].reshape(48, 16) + p["embedding/bias"]
    x = torch.cat([p["cls"][0], x]) + p["Encoder/posembed_input/pos_embedding"][0]
    for block in range(2):
        base = f"Encoder/encoderblock_{block}"
        y = norm(x, p, f"{base}/LayerNorm_0")
        q, k, v = (
            torch.einsum("td,dhw->htw", y, p[f"{base}/SelfAttention/{n}/kernel"])
            + p[f"{base}/SelfAttention/{n}/bias"][:, None]
            for n in ("query", "key", "value")
        )
        heads = torch.softmax(q @ k.transpose(1, 2) / 8**0.5, dim=-1) @ v
        out = torch.einsum("htw,hwd->td", heads, p[f"{base}/SelfAttention/out/kernel"])
        x = x + out + p[f"{base}/SelfAttention/out/bias"]
        y = norm(x, p, f"{base}/LayerNorm_1")
        x = x + (sparse(y, p, f"{base}/Moe") if block else mlp(y, p, f"{base}/Mlp", ...))
    x = norm(x, p, "Encoder/encoder_norm")[0]
    if "pre_logits/kernel" in p:
        x = torch.tanh(x @ p["pre_logits/kernel"] + p["pre_logits/bias"])
    return x @ p["head/kernel"] + p["head/bias"]


def norm(x, p, name):
    return F.layer_norm(x, (16,), p[f"{name}/scale"], p[f"{name}/bias"], eps=1e-6)


def mlp(x, p, name, which):
    up = x @ p[f"{name}/Dense_0/kernel"][which] + p[f"{name}/Dense_0/bias"][which]
    down = F.gelu(up, approximate="tanh") @ p[f"{name}/Dense_1/kernel"][which]
    return down + p[f"{name}/Dense_1/bias"][which]


def experts(x, p, name):
    gates, chosen = torch.softmax(x @ p[f"{name}/Router/dense/kernel"], -1).topk(2)
    rows = [
        sum(g * mlp(t, p, f"{name}/Mlp", int(e)) for g, e in zip(gs, es, strict=True))
        for t, gs, es in zip(x, gates, chosen, strict=True)
    ]
    return torch.stack(rows)


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "params/"])
def test_a_jax_file_gives_the_logits_of_the_jax_code(prefix, tmp_path):
    np.savez(tmp_path / "vmoe.npz", **jax_arrays(prefix))
    model = vmoe_from_npz(tmp_path / "vmoe.npz", eval_capacity_factor=None)
    image = torch.randn(8, 8, 3)
    logits = model(image.permute(2, 0, 1)[None]).logits[0]
    torch.testing.assert_close(logits, by_hand(jax_arrays(), image), rtol=1e-4, atol=1e-4)
    assert model.config.moe_layers == [1]
    assert model.config.num_experts == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.pop("cls"), "has no cls"),
        (lambda a: a.pop(f"{SPARSE}/SelfAttention/query/kernel"), "has no .*query/kernel of 3 dim"),
        (lambda a: a.pop(f"{SPARSE}/Moe/Mlp/Dense_0/kernel"), "has no .*Dense_0/kernel of 3 dim"),
        (lambda a: a.update({"embedding/kernel": np.zeros((48, 16))}), "embedding/kernel of 4 dim"),
        (lambda a: a.update({"cls": np.array(["x"])}), "it holds <U1, no numbers"),
        (lambda a: a.pop("Encoder/encoder_norm/bias"), "lacks what becomes vit.layernorm.bias"),
        (lambda a: a.update({"pre_logits/kernel": np.zeros((16, 16))}), "holds pre_logits/kernel"),
        (lambda a: a.update({"head/kernel": np.zeros((16, 7))}), r"shape \(16, 7\), but"),
    ],
)
def test_odd_files_are_refused(change, words, tmp_path):
    arrays = jax_arrays()
    change(arrays)
    np.savez(tmp_path / "odd.npz", **arrays)
    with pytest.raises(LitMoEError, match=words):
        vmoe_from_npz(tmp_path / "odd.npz")


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "x.npz").write_text("no")
    with pytest.raises(LitMoEError, match="is no npz file that could be read"):
        vmoe_from_npz(tmp_path / "x.npz")
    np.savez(tmp_path / "y.npz", weights=np.zeros(3))
    with pytest.raises(LitMoEError, match="is no V-MoE checkpoint"):
        vmoe_from_npz(tmp_path / "y.npz")
    np.savez(tmp_path / "z.npz", **jax_arrays())
    whole = (tmp_path / "z.npz").read_bytes()
    (tmp_path / "z.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LitMoEError, match="is no npz file that could be read"):
        vmoe_from_npz(tmp_path / "z.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(LitMoEError, match="is no npz file that could be read"):
        vmoe_from_npz(tmp_path / "one.npy")


def test_halves_of_a_float_are_read_as_bfloat16(tmp_path):
    arrays = jax_arrays()
    halves = {k: (v.view(np.uint32) >> 16).astype(np.uint16) for k, v in arrays.items()}
    np.savez(tmp_path / "vmoe.npz", **{k: v.view("V2") for k, v in halves.items()})
    model = vmoe_from_npz(tmp_path / "vmoe.npz")
    kernel = torch.from_numpy(arrays["head/kernel"].T.copy())
    found = model.get_parameter("classifier.weight").detach()
    torch.testing.assert_close(found, kernel, rtol=2**-7, atol=0)
    assert torch.equal(found, found.bfloat16().float())
