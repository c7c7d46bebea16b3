"""Packed 2:4 exports: read back exactly by the library, refused where they cannot be made."""

import json

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lit_moe import MoEModule
from lit_moe.adapters import find_sites
from lit_moe.callbacks import ExportModel
from lit_moe.checkpoints import load
from lit_moe.errors import ExportError, LitMoEError
from lit_moe.export import compressed, compressed_reading, export, load_compressed
from lit_moe.plan import KeepPlan
from lit_moe.sparsity import sparsify
from lit_moe.surgery import shrink
from lit_moe.testing import tiny_moe

STORED_ALIKE = ("mixtral", "qwen3_moe", "deepseek_v3", "nemotron_h")
FUSED = ("gpt_oss", "llama4", "granitemoe", "dbrx")


def thinned(family, dtype=torch.float32):
    model = tiny_moe(family).to(dtype)
    sparsify(model, method="magnitude", pattern="2:4")
    return model


def experts(tensors):
    return {name: t for name, t in tensors.items() if ".experts." in name}


@pytest.mark.parametrize("family", STORED_ALIKE)
def test_the_library_gives_back_every_tensor_of_the_plain_export(family, tmp_path):
    model = thinned(family)
    result = export(model, tmp_path / "packed", layout="compressed_2_4")
    assert result.layout == "compressed_2_4"
    assert result.max_abs_logit_difference == 0.0
    export(model, tmp_path / "plain")
    compressor = compressed.sparse_24().Sparse24BitMaskCompressor(config=None)
    found = dict(compressor.decompress(str(tmp_path / "packed")))
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    ("dtype", "share"),
    [(torch.float32, 17 / 32), (torch.bfloat16, 9 / 16), (torch.float16, 9 / 16)],
)
def test_experts_need_half_the_bytes_and_one_bit_per_weight(dtype, share, tmp_path):
    model = thinned("mixtral", dtype)
    export(model, tmp_path / "packed", layout="compressed_2_4")
    tensors = load_file(tmp_path / "packed" / "model.safetensors")
    parts = ("compressed", "bitmask")
    stored = sum(t.nbytes for n, t in experts(tensors).items() if n.endswith(parts))
    dense = sum(t.nbytes for n, t in model.state_dict().items() if ".experts." in n)
    assert stored == dense * share
    reloaded = load_compressed(tmp_path / "packed")
    assert reloaded.dtype == dtype
    own = model.state_dict()
    assert all(torch.equal(t, own[name]) for name, t in reloaded.state_dict().items())


def test_a_large_model_is_compared_tensor_by_tensor(tmp_path, monkeypatch):
    model = thinned("mixtral")
    monkeypatch.setattr(compressed_reading, "RELOADED_WHOLE", 0)
    result = export(model, tmp_path / "packed", layout="compressed_2_4")
    assert result.max_abs_logit_difference is None


def test_a_packed_weight_that_was_written_wrong_is_noticed(tmp_path, monkeypatch):
    model = thinned("mixtral")
    right = compressed.packed

    def wrong(tensors, names):
        stored = right(tensors, names)
        for name, tensor in stored.items():
            if name.endswith("experts.3.w2.compressed") and not tensor.is_meta:
                tensor[0, 0] += 1
        return stored

    monkeypatch.setattr("lit_moe.export.exporter.packed", wrong)
    with pytest.raises(ExportError, match=r"other values in .*experts\.3\.w2\.weight"):
        export(model, tmp_path / "packed", layout="compressed_2_4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("family", FUSED)
def test_families_that_store_all_experts_in_one_tensor_are_refused(family, tmp_path):
    model = tiny_moe(family)
    with pytest.raises(ExportError, match=f"{model.config.model_type}.*holds all experts"):
        export(model, tmp_path / "packed", layout="compressed_2_4")
    assert list(tmp_path.iterdir()) == []


def test_weights_without_the_zeros_are_refused_and_counted(tmp_path):
    model = thinned("mixtral")
    model.model.layers[1].mlp.experts.down_proj.data[2, 5, :4] = 1.0
    with pytest.raises(ExportError, match=r"but 1 of 1536 groups of the down projections of .*1"):
        export(model, tmp_path / "packed", layout="compressed_2_4")
    assert list(tmp_path.iterdir()) == []


def test_a_library_that_lacks_the_format_is_named(tmp_path, monkeypatch):
    module = "compressed_tensors.compressors.sparse_compressors"
    monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(ExportError, match=r"pip install 'lit-moe\[compressed\]'"):
        export(thinned("mixtral"), tmp_path / "packed", layout="compressed_2_4")


def test_other_loaders_say_that_they_cannot_read_it(tmp_path):
    export(thinned("mixtral"), tmp_path / "packed", layout="compressed_2_4")
    with pytest.raises(LitMoEError, match=r"packed 2:4 weights.*load_compressed"):
        load(tmp_path / "packed")
    with pytest.raises(ImportError, match="compressed-tensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    export(thinned("mixtral"), tmp_path / "plain")
    with pytest.raises(
        LitMoEError, match=r"holds no packed 2:4 weights; load it with lit_moe.load"
    ):
        load_compressed(tmp_path / "plain")


def test_a_cut_file_is_refused(tmp_path):
    export(thinned("mixtral"), tmp_path / "packed", layout="compressed_2_4")
    file = tmp_path / "packed" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(LitMoEError, match="truncated"):
        load_compressed(tmp_path / "packed")


def test_the_config_names_what_is_packed(tmp_path):
    export(thinned("mixtral"), tmp_path / "packed", layout="compressed_2_4")
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    sparsity = config["quantization_config"]["sparsity_config"]
    assert sparsity["format"] == "sparse-24-bitmask"
    layer = r"re:model\.layers\.\d+\.block_sparse_moe\.experts\.\d+\."
    assert sparsity["targets"] == [f"{layer}w{number}" for number in (1, 2, 3)]
    assert "load_compressed" in (tmp_path / "packed" / "README.md").read_text()


def test_unequal_layers_are_refused(tmp_path):
    model = tiny_moe("mixtral")
    first, second = (site.name for site in find_sites(model))
    shrink(model, KeepPlan({first: (0, 1, 2), second: (4, 5)}, {first: 8, second: 8}))
    sparsify(model, method="magnitude", pattern="2:4")
    with pytest.raises(ExportError, match=r"alike.*needs layout 'per_layer_config'"):
        export(model, tmp_path / "packed", layout="compressed_2_4")


def test_an_unknown_layout_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"layout='compressed' is unknown; .*'compressed_2_4'"):
        export(thinned("mixtral"), tmp_path / "packed", layout="compressed")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_width_that_four_does_not_divide_is_named(tmp_path):
    model = tiny_moe("mixtral", intermediate_size=30)
    with pytest.raises(
        ExportError, match=r"experts\.0\.w2\.weight has 30 inputs, which 4 does not"
    ):
        export(model, tmp_path / "packed", layout="compressed_2_4")


def test_a_model_that_was_cast_as_a_whole_has_equal_logits(tmp_path):
    model = thinned("mixtral", torch.bfloat16)
    with torch.no_grad():  # so that positions matter to the logits
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(30)
            layer.self_attn.k_proj.weight.mul_(30)
    assert export(model, tmp_path / "p", layout="compressed_2_4").max_abs_logit_difference == 0.0


@pytest.mark.parametrize("family", FUSED)
def test_a_run_that_could_not_pack_its_model_ends_before_anything_is_computed(
    family, make_data, make_trainer, tmp_path
):
    tiny_moe(family, vocab_size=1024).save_pretrained(tmp_path / "model")
    seen = Witness()
    trainer = make_trainer(seen, ExportModel("out", layout="compressed_2_4"), max_steps=1)
    with pytest.raises(ExportError, match="holds all experts"):
        trainer.fit(MoEModule(str(tmp_path / "model")), datamodule=make_data(tokenizer="embedded"))
    assert not seen.acted


def test_a_run_without_the_library_ends_before_the_model_is_built(
    checkpoint, make_data, make_trainer, monkeypatch
):
    module = "compressed_tensors.compressors.sparse_compressors"
    monkeypatch.setitem(__import__("sys").modules, module, None)
    model = MoEModule(str(checkpoint))
    trainer = make_trainer(ExportModel("out", layout="compressed_2_4"))
    with pytest.raises(ExportError, match=r"pip install 'lit-moe\[compressed\]'"):
        trainer.fit(model, datamodule=make_data())
    assert model.model is None
    with pytest.raises(ExportError, match="layout='packed' is unknown"):
        make_trainer(ExportModel("out", layout="packed")).fit(model, datamodule=make_data())  # type: ignore[arg-type]


class Witness(L.Callback):
    """Notes whether callbacks were let act on the model."""

    acted = False

    def on_model_built(self, *_):
        self.acted = True
