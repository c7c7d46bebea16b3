"""Teachers that differ anywhere have other fingerprints; the same one has the same."""

import json
import shutil

import pytest
import torch

from lit_moe.distill import fingerprints
from lit_moe.distill.fingerprints import fingerprint, folder_fingerprint
from lit_moe.testing import tiny_moe


@pytest.fixture
def folder(tmp_path):
    """A folder with pickled weights, as older checkpoints have them."""
    model = tiny_moe("mixtral")
    model.config.save_pretrained(tmp_path / "a")
    torch.save(model.state_dict(), tmp_path / "a" / "pytorch_model.bin")
    return tmp_path / "a"


def changed_byte(folder, name, place):
    other = folder.parent / f"{name}-{place}"
    shutil.copytree(folder, other)
    file = other / name
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    return other


def test_any_single_weight_in_memory_counts():
    model = tiny_moe("mixtral")
    before = fingerprint(model)
    assert fingerprint(tiny_moe("mixtral")) == before
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[3, 5, 7] += 1e-3
    assert fingerprint(model) != before


def test_the_config_counts_and_where_a_model_came_from_does_not():
    model = tiny_moe("mixtral")
    before = fingerprint(model)
    model.config._name_or_path = "elsewhere"
    assert fingerprint(model) == before
    model.config.num_experts_per_tok = 1
    assert fingerprint(model) != before


def test_any_byte_of_pickled_weights_counts(folder):
    before = folder_fingerprint(str(folder), "auto")
    size = (folder / "pytorch_model.bin").stat().st_size
    for place in (0, 4097, size // 2, size - 1):
        other = changed_byte(folder, "pytorch_model.bin", place)
        assert folder_fingerprint(str(other), "auto") != before
    shutil.copytree(folder, folder.parent / "copy")
    assert folder_fingerprint(str(folder.parent / "copy"), "auto") == before
    assert folder_fingerprint(str(folder), "bfloat16") != before


def test_any_byte_of_safetensors_counts_and_the_config_too(tmp_path):
    tiny_moe("mixtral").save_pretrained(tmp_path / "a")
    before = folder_fingerprint(str(tmp_path / "a"), "auto")
    size = (tmp_path / "a" / "model.safetensors").stat().st_size
    for place in (size // 2 + 1, size // 3, size - 1):
        other = changed_byte(tmp_path / "a", "model.safetensors", place)
        assert folder_fingerprint(str(other), "auto") != before
    file = tmp_path / "a" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_experts_per_tok": 1}))
    assert folder_fingerprint(str(tmp_path / "a"), "auto") != before


def test_of_large_folders_pieces_are_read_up_to_both_ends(folder, monkeypatch):
    monkeypatch.setattr(fingerprints, "_WHOLE_BYTES", 0)
    monkeypatch.setattr(fingerprints, "_PIECE", 64)
    monkeypatch.setattr(fingerprints, "_PIECES", 16)
    before = folder_fingerprint(str(folder), "auto")
    size = (folder / "pytorch_model.bin").stat().st_size
    between = (size - 64) // 15 // 2
    found = {
        place: folder_fingerprint(str(changed_byte(folder, "pytorch_model.bin", place)), "auto")
        for place in (0, between, size - 1)
    }
    assert found[0] != before
    assert found[size - 1] != before
    assert found[between] == before  # what the docstring says that it misses
    with (folder / "pytorch_model.bin").open("ab") as stream:
        stream.write(b"more")
    assert folder_fingerprint(str(folder), "auto") != before
