from __future__ import annotations

import json

import pytest
from transformers import Aimv2TextConfig, AutoModelForCausalLM, MixtralForCausalLM

from lit_moe.checkpoints import check_weights, load, model_class, read_config
from lit_moe.errors import LitMoEError, UnsupportedModelError
from lit_moe.testing import tiny_moe


@pytest.fixture
def folder(tmp_path):
    tiny_moe("mixtral").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path):
    tiny_moe("mixtral").save_pretrained(tmp_path / "sharded", max_shard_size="50kB")
    return tmp_path / "sharded"


def test_load_gives_the_saved_model_in_eval_mode_and_its_own_dtype(folder):
    model = load(folder)
    assert type(model) is MixtralForCausalLM
    assert not model.training
    assert model.dtype == AutoModelForCausalLM.from_pretrained(folder).dtype


@pytest.mark.parametrize("size", [0, 5, 300, 20_000])
def test_a_truncated_weight_file_is_named_with_its_sizes(folder, size):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:size])
    with pytest.raises(
        LitMoEError, match=rf"model\.safetensors is truncated: .*{size} bytes"
    ) as error:
        load(folder)
    if size > 10_000:
        assert f"its header asks for {len(content)}" in str(error.value)


def test_a_truncated_or_missing_shard_is_named(sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].write_bytes(shards[1].read_bytes()[:-1])
    with pytest.raises(LitMoEError, match=f"{shards[1].name} is truncated"):
        check_weights(sharded)
    shards[1].unlink()
    with pytest.raises(LitMoEError, match=f"{shards[1].name}, which is not there"):
        check_weights(sharded)


def test_weight_files_that_are_something_else_are_named(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"more")
    with pytest.raises(LitMoEError, match="longer than its header says"):
        check_weights(folder)
    file.write_bytes((5).to_bytes(8, "little") + b"hello")
    with pytest.raises(LitMoEError, match="header is not JSON"):
        check_weights(folder)
    file.unlink()
    with pytest.raises(LitMoEError, match="holds no weights"):
        check_weights(folder)


def test_a_damaged_index_is_named(sharded):
    (sharded / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(LitMoEError, match=r"index\.json is damaged"):
        check_weights(sharded)


def test_folders_without_a_usable_config_are_explained(folder, tmp_path):
    with pytest.raises(LitMoEError, match=r"model folder .*nowhere does not exist"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(LitMoEError, match="is a file"):
        read_config(folder / "config.json")
    config = folder / "config.json"
    content = json.loads(config.read_text())
    config.write_text("{")
    with pytest.raises(LitMoEError, match=r"config\.json is not JSON"):
        read_config(folder)
    config.write_text("{}")
    with pytest.raises(LitMoEError, match="has no `model_type`"):
        read_config(folder)
    config.write_text(json.dumps({**content, "model_type": "mixtral9"}))
    with pytest.raises(UnsupportedModelError, match="does not know its model type.*mixtral9"):
        read_config(folder)
    config.write_text(json.dumps({**content, "num_hidden_layers": "many"}))
    with pytest.raises(LitMoEError, match=r"the config of .* cannot be read"):
        read_config(folder)
    config.unlink()
    with pytest.raises(LitMoEError, match=r"holds no config\.json"):
        load(folder)


def test_an_unknown_hub_id_is_one_sentence():
    with pytest.raises(LitMoEError, match="'nobody/nothing' is no folder here"):
        read_config("nobody/nothing")


def test_model_class_does_without_architectures_but_not_without_a_class(folder):
    config = read_config(folder)
    config.architectures = None
    assert model_class(config) is MixtralForCausalLM
    with pytest.raises(UnsupportedModelError, match="no model class"):
        model_class(Aimv2TextConfig(architectures=["NoSuchModel"]))
