"""What the verification of an export notices, whole and in pieces, and what it holds."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_moe.accounting import count_bytes
from lit_moe.errors import ExportError
from lit_moe.export import exporter, verification
from lit_moe.testing import FAMILIES, run_distributed, tiny_moe
from tests.peaks import HeldTensors
from tests.pruned import pruned


def tensors(change):
    """Corrupt the weight file of a folder by a function of its tensors, which may change them."""

    def corrupt(folder):
        file = folder / "model.safetensors"
        found = load_file(file)
        change(found)
        save_file(found, file, metadata={"format": "pt"})

    return corrupt


def config(**values):
    """Corrupt the config of a folder."""

    def corrupt(folder):
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return corrupt


def named(found, part):
    return next(name for name in sorted(found, reverse=True) if part in name)


def another_value(found):
    found[named(found, "experts.3.down_proj")][0, 0] += 0.001


def two_swapped(found):
    one, two = (named(found, f"experts.{i}.up_proj") for i in (1, 2))
    found[one], found[two] = found[two], found[one]


def a_missing_key(found):
    del found[named(found, "o_proj")]


def a_key_too_many(found):
    found["model.extra.weight"] = torch.zeros(3)


def a_narrow_bias(found):
    name = named(found, "e_score_correction_bias")
    found[name] = found[name].bfloat16()


CORRUPTIONS = {
    "another value": (tensors(another_value), "holds other values in .*down_proj"),
    "two swapped": (tensors(two_swapped), "holds other values in .*gate_up_proj"),
    "a missing key": (tensors(a_missing_key), "lacks 1 tensors: .*o_proj.weight"),
    "a key too many": (tensors(a_key_too_many), "model.extra.weight .* which the model does not"),
    "a narrow bias": (
        tensors(a_narrow_bias),
        r"correction_bias as torch.bfloat16 .* but it was to be torch.float32",
    ),
    "top-k": (config(num_experts_per_tok=1), "logits differ"),
    "groups": (config(n_group=1, topk_group=1), "logits differ"),
    "impossible groups": (config(n_group=4, topk_group=1), "does not run"),
    "scale": (config(routed_scaling_factor=0.5), "logits differ"),
    "rotary base": (config(rope_parameters={"rope_type": "default", "rope_theta": 99.0}), "logits"),
    "fewer experts": (config(n_routed_experts=3), "does not load|mismatched|other tensors"),
    "more experts": (config(n_routed_experts=5), "does not load|mismatched|other tensors"),
    "fewer layers": (config(num_hidden_layers=2), "unexpected_keys"),
    "another family": (config(model_type="glm4_moe", architectures=None), "does not load|_keys"),
}


@pytest.fixture
def corrupted(monkeypatch):
    """Return a function that lets a corruption happen between writing and verifying."""
    compare = verification.max_logit_difference

    def arrange(corrupt, **options):
        def corrupt_and_compare(model, folder, weights, own_loader):
            corrupt(folder)
            return compare(model, folder, weights, own_loader=own_loader, **options)

        monkeypatch.setattr(exporter, "max_logit_difference", corrupt_and_compare)

    return arrange


@pytest.mark.parametrize("in_pieces", [False, True])
@pytest.mark.parametrize("what", CORRUPTIONS)
def test_each_corruption_is_noticed(what, in_pieces, corrupted, tmp_path):
    corrupt, says = CORRUPTIONS[what]
    model, plan = pruned("deepseek_v3", dtype=torch.bfloat16)
    corrupted(corrupt, in_pieces=in_pieces)
    with pytest.raises(ExportError, match=says):
        exporter.export(model, tmp_path / "out", plan=plan)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("in_pieces", [False, True])
@pytest.mark.parametrize("layout", ["auto", "padded"])
def test_dead_experts_and_unequal_layers_are_compared_too(layout, in_pieces, corrupted, tmp_path):
    model, plan = pruned("deepseek_v3", uneven=True)
    corrupted(lambda _: None, in_pieces=in_pieces)
    result = exporter.export(model, tmp_path / "sound", plan=plan, layout=layout)
    assert result.max_abs_logit_difference == pytest.approx(0.0, abs=1e-6)
    corrupted(tensors(another_value), in_pieces=in_pieces)
    with pytest.raises(ExportError, match="holds other values in .*down_proj"):
        exporter.export(model, tmp_path / "out", plan=plan, layout=layout)


def in_pieces_families():
    quick = ("mixtral", "gpt_oss", "qwen3_next", "switch_transformers")
    slow = [pytest.param(f, marks=pytest.mark.slow) for f in sorted(FAMILIES) if f not in quick]
    return [*quick, *slow]


@pytest.mark.parametrize("family", in_pieces_families())
def test_families_are_verified_in_pieces_as_well_as_whole(family, corrupted, tmp_path):
    model = tiny_moe(family)
    for name, in_pieces in (("whole", False), ("pieces", True)):
        corrupted(lambda _: None, in_pieces=in_pieces)
        result = exporter.export(model, tmp_path / name)
        assert result.max_abs_logit_difference is not None
        assert result.max_abs_logit_difference < 1e-5  # 0 where products do not depend on addresses
    assert not [name for name, tensor in model.state_dict().items() if tensor.is_meta]


def export_and_measure(rank, folder, *, large):
    """Peak of exporting a model of 200 MB, as a fraction of its size."""
    model = tiny_moe(
        "mixtral", num_experts=16, hidden_size=256, intermediate_size=512, num_hidden_layers=8
    )
    verification.RELOADED_WHOLE = 0 if large else 1 << 40
    with HeldTensors() as held:
        exporter.export(model, folder / f"{large}-{rank}")
    return held.peak / count_bytes(model)


def test_a_large_export_holds_a_few_layers_and_a_small_one_a_second_model(tmp_path):
    measure = partial(export_and_measure, folder=tmp_path)
    (large,) = run_distributed(partial(measure, large=True), 1, group=False)
    (small,) = run_distributed(partial(measure, large=False), 1, group=False)
    assert large < 0.4
    assert small > 1.0


def test_among_several_ranks_none_reloads_a_second_model(tmp_path):
    def on_the_first(rank):
        return export_and_measure(rank, tmp_path, large=False) if rank == 0 else 0.0

    assert run_distributed(on_the_first)[0] < 0.4
