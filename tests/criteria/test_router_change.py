"""Router rows of two checkpoints: exact differences, little reading, plain refusals."""

import json
import struct
import time
import warnings

import pytest
import torch

from lit_moe.adapters import find_sites
from lit_moe.criteria import Evidence, get_criterion
from lit_moe.criteria.router_change import router_changes
from lit_moe.criteria.router_rows import CheckpointTensors, router_names
from lit_moe.errors import LitMoEError, NoEffectWarning
from lit_moe.plan import KeepPlan
from lit_moe.surgery import shrink
from lit_moe.testing import FAMILIES, tiny_moe
from lit_moe.testing.vision import tiny_vmoe

COMMON = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3", "switch_transformers")


@pytest.fixture
def pair(tmp_path):
    """An ancestor on disk and a descendant whose router rows are scaled by 1 + e / 10."""
    model = tiny_moe("mixtral")
    model.save_pretrained(tmp_path / "before")
    with torch.no_grad():
        for site in find_sites(model):
            weight = model.get_parameter(site.rows("router")[0].name)
            weight.mul_(1 + torch.arange(8)[:, None] / 10 - 0.3)
    model.save_pretrained(tmp_path / "after")
    return model, tmp_path


def scores_of(model, **options):
    evidence = Evidence(model=model, sites=find_sites(model))
    return get_criterion("router_change", **options).scores(evidence)


def rows(model):
    return [model.get_parameter(s.rows("router")[0].name).detach() for s in find_sites(model)]


@pytest.mark.parametrize("measure", ["signed", "absolute", "difference"])
def test_scores_are_the_changes_of_norms(pair, measure):
    model, folder = pair
    scores = scores_of(model, ancestor=str(folder / "before"), measure=measure)
    factors = 1 + torch.arange(8).double() / 10 - 0.3
    for now, values in zip(rows(model), scores.values(), strict=True):
        norms = now.double().norm(dim=1)
        expected = norms - norms / factors
        expected = expected if measure == "signed" else expected.abs()
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=2e-6)


def test_a_row_that_shrank_goes_first_and_inverse_turns_the_order(pair):
    model, folder = pair
    first = scores_of(model, ancestor=str(folder / "before"))
    second = scores_of(model, ancestor=str(folder / "before"), inverse=True)
    for values, turned in zip(first.values(), second.values(), strict=True):
        assert (values[:3] < 0).all()
        assert (values[4:] > 0).all()
        assert torch.equal(turned, -values)


def test_two_folders_give_the_same_as_a_model_and_a_folder(pair):
    model, folder = pair
    found = router_changes(folder / "before", folder / "after")
    expected = scores_of(model, ancestor=str(folder / "before"))
    for values, others in zip(found.values(), expected.values(), strict=True):
        torch.testing.assert_close(values, others)


def test_identical_checkpoints_give_zeros_and_say_so(pair):
    _, folder = pair
    with pytest.warns(NoEffectWarning, match="they are one checkpoint"):
        found = router_changes(folder / "before", folder / "before")
    assert not any(values.any() for values in found.values())


def test_frozen_routers_give_zeros_and_say_so(tmp_path):
    model = tiny_moe("mixtral")
    model.save_pretrained(tmp_path / "before")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(1)
    model.save_pretrained(tmp_path / "after")
    with pytest.warns(NoEffectWarning, match="they were frozen, or fine-tuned by LoRA$"):
        router_changes(tmp_path / "before", tmp_path / "after")
    with pytest.warns(NoEffectWarning, match="nothing tells experts apart"):
        scores_of(model, ancestor=str(tmp_path / "before"))


def test_routers_of_another_shape_are_refused(pair, tmp_path):
    model, folder = pair
    tiny_moe("mixtral", num_experts=6).save_pretrained(tmp_path / "six")
    words = "is 6 x 32 in .*, but 8 x 32 after fine-tuning"
    with pytest.raises(LitMoEError, match=words):
        scores_of(model, ancestor=str(tmp_path / "six"))
    with pytest.raises(LitMoEError, match=words):
        router_changes(tmp_path / "six", folder / "after")


def test_routers_of_other_names_are_refused(pair, tmp_path):
    model, folder = pair
    tiny_vmoe(num_hidden_layers=8).save_pretrained(tmp_path / "other")
    with pytest.raises(LitMoEError, match="different routers"):
        router_changes(tmp_path / "other", folder / "after")
    with pytest.raises(LitMoEError, match="has no router for"):
        scores_of(model, ancestor=str(tmp_path / "other"))


@pytest.fixture
def cut(tmp_path):
    """A V-MoE, half of it with dropped experts' rows behind the others, and that one tuned."""
    model = tiny_vmoe("zero")
    first, second = find_sites(model)
    model.save_pretrained(tmp_path / "whole")
    kept = {first.name: (1, 2, 5, 6, 7), second.name: (0, 5)}
    shrink(model, KeepPlan(kept, dict.fromkeys(kept, 8)))
    model.save_pretrained(tmp_path / "cut")
    with torch.no_grad():
        for row in rows(model):
            row.mul_(1 + torch.arange(8)[:, None] / 10)
    model.save_pretrained(tmp_path / "tuned")
    return model, tmp_path


def test_a_model_with_dropped_experts_is_compared_with_what_it_was_tuned_from(cut):
    model, folder = cut
    scores = scores_of(model, ancestor=str(folder / "cut"))
    found = router_changes(folder / "cut", folder / "tuned")
    assert [len(values) for values in scores.values()] == [5, 2]
    for row, values, others in zip(rows(model), scores.values(), found.values(), strict=True):
        norms = row.double().norm(dim=1)
        expected = norms - norms / (1 + torch.arange(8).double() / 10)
        torch.testing.assert_close(others, expected, rtol=1e-5, atol=2e-6)
        assert torch.equal(values, others[: len(values)])


def test_rows_that_dropping_moved_are_not_compared(cut):
    model, folder = cut
    words = "differ in router rows without an expert .none and .*num_null_experts=6"
    with pytest.raises(LitMoEError, match=words):
        router_changes(folder / "whole", folder / "tuned")
    with pytest.raises(LitMoEError, match=words):
        scores_of(model, ancestor=str(folder / "whole"))


def test_routers_with_further_rows_are_compared(tmp_path):
    model = tiny_moe("longcat_flash")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        for row in rows(model):
            row.mul_(2)
    for site, values in zip(
        find_sites(model), scores_of(model, ancestor=str(tmp_path)).values(), strict=True
    ):
        assert values.shape == (site.num_experts,)
        assert (values > 0).all()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.safetensors", "short", "model.safetensors cannot be read"),
        ("model.safetensors.index.json", "{", "index.json is not JSON"),
        ("model.safetensors.index.json", "{}", "index.json has no weight_map"),
        ("config.json", "[1", "config.json is not JSON"),
    ],
)
def test_damaged_files_are_told(name, content, words, pair):
    _, folder = pair
    (folder / "before" / name).write_text(content)
    with pytest.raises(LitMoEError, match=words):
        router_changes(folder / "before", folder / "after")


def test_an_adapter_alone_is_refused(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(LitMoEError, match="holds only a LoRA adapter"):
        CheckpointTensors(tmp_path)


@pytest.mark.parametrize("missing", ["folder", "weights", "config"])
def test_a_folder_that_cannot_be_compared_is_refused(missing, pair, tmp_path):
    _, folder = pair
    if missing == "weights":
        (tmp_path / "x").mkdir()
    if missing == "config":
        (folder / "before" / "config.json").rename(tmp_path / "gone")
    words = {"folder": "does not exist", "weights": "holds no model.safe", "config": "config.json"}
    target = folder / "before" if missing == "config" else tmp_path / "x"
    with pytest.raises(LitMoEError, match=words[missing]):
        router_changes(target, target)


def test_an_unknown_measure_is_refused():
    with pytest.raises(LitMoEError, match="'norm' is unknown; use signed, absolute, difference"):
        get_criterion("router_change", ancestor="x", measure="norm")


def write_sparse(folder, total_bytes):
    """A checkpoint of one large hole and two routers, with the header of all."""
    folder.mkdir()
    rows = torch.randn(8, 64)
    size = rows.numel() * 4
    hole = (total_bytes - 2 * size) // 4 * 4
    names = {f"model.layers.{i}.mlp.gate.weight": i for i in range(2)}
    header = {"model.experts.weight": {"dtype": "F32", "shape": [hole // 4]}}
    header["model.experts.weight"]["data_offsets"] = [0, hole]
    for name, i in names.items():
        offsets = [hole + i * size, hole + (i + 1) * size]
        header[name] = {"dtype": "F32", "shape": [8, 64], "data_offsets": offsets}
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.seek(hole, 1)
        for _ in names:
            file.write(rows.numpy().tobytes())
    (folder / "config.json").write_text('{"model_type": "mixtral", "num_local_experts": 8}')


def test_ten_gigabytes_take_milliseconds(tmp_path):
    for name in ("before", "after"):
        write_sparse(tmp_path / name, 10_000_000_000)
    resident = peak()
    start = time.perf_counter()
    found = router_changes(tmp_path / "before", tmp_path / "after")
    seconds = time.perf_counter() - start
    assert [len(values) for values in found.values()] == [8, 8]
    assert seconds < 0.5
    assert peak() - resident < 100_000_000


def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def check_names(model, folder):
    model.save_pretrained(folder)
    tensors = CheckpointTensors(folder)
    own = [row for row in rows(model) if row.ndim == 2]
    found = [tensors.read(name) for name in router_names(tensors)]
    assert len(found) == len(own)
    assert all(any(torch.equal(a, b) for b in found) for a in own)


@pytest.mark.parametrize("family", COMMON)
def test_routers_are_told_by_name_and_shape(family, tmp_path):
    check_names(tiny_moe(family), tmp_path)


def test_routers_of_a_vision_model_are_told(tmp_path):
    check_names(tiny_vmoe(), tmp_path)


# Other names, routers of several matrices, or other matrices with as many rows.
NOT_TOLD = {"ernie4_5_vl_moe", "inkling", "inkling_multimodal", "jetmoe", "zaya"}
NOT_TOLD |= {"qwen4_exp", "qwen4_exp_multimodal"}


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(COMMON) - NOT_TOLD))
def test_routers_of_all_families_are_told(family, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_names(tiny_moe(family), tmp_path)
