import json
from pathlib import Path

import pytest
import torch
from lightning import Callback
from transformers import AutoModelForCausalLM

from lit_moe import MoEModule
from lit_moe.adapters import count_experts, find_sites
from lit_moe.callbacks import ExpertMerging, ExportModel, OneShotPruning, Refit, ReportWriter
from lit_moe.callbacks.report import report_writer
from lit_moe.errors import LitMoEError, NoEffectWarning, PlanError
from lit_moe.grouping import SegmentOptions
from lit_moe.merge_plan import MergePlan
from lit_moe.refit import api
from lit_moe.testing import run_distributed

LAYERS = ["model.layers.0.mlp", "model.layers.1.mlp"]
QUIET = {"figures": False}


def fit(trainer, module, data, **options):
    trainer.fit(module, datamodule=data, **options)
    return module


def report_of(trainer):
    return json.loads((Path(trainer.log_dir) / "report.json").read_text())


def test_a_fourth_of_the_experts_goes_into_others_and_the_model_is_exported(
    checkpoint, make_data, make_trainer
):
    trainer = make_trainer(ExpertMerging(keep_ratio=0.75), ExportModel("model"))
    module = fit(trainer, MoEModule(str(checkpoint)), make_data())
    assert count_experts(find_sites(module.built_model)) == dict.fromkeys(LAYERS, 6)
    folder, report = Path(trainer.log_dir), report_of(trainer)
    assert list(report["quality"]) == ["before", "merged"]
    assert report["merging"]["recipe"] == "cka, auto partition, uniform"
    assert report["merging"]["tokens"] == report["calibration"]["tokens"] == 256 * 3 // 4
    for layer in LAYERS:
        groups = report["merging"]["layers"][layer]["groups"]
        assert len(groups) == 6
        assert sorted(e for ids in groups for e in ids) == list(range(8))
    assert report["parameters"]["after"] < report["parameters"]["before"]
    assert report["export"]["max_abs_logit_difference"] == 0.0
    exported = AutoModelForCausalLM.from_pretrained(folder / "model")
    theirs = exported.state_dict()
    for name, tensor in module.built_model.state_dict().items():
        assert torch.equal(tensor, theirs[name])
    text = (folder / "report.md").read_text()
    assert "16 routed experts became 12 (75%)" in text
    assert "![similarity.png](similarity.png)" in text
    for name in ("similarity.png", "dendrograms.png"):
        assert (folder / name).stat().st_size > 5000
    plan = MergePlan.load(folder / "merge_plan.json")
    assert plan.counts == dict.fromkeys(LAYERS, 6)
    assert (plan.family, plan.source) == ("mixtral", str(checkpoint))


def test_a_plan_is_replayed_without_text(checkpoint, make_data, make_trainer):
    first = make_trainer(ExpertMerging("weights", groups=4), ReportWriter(**QUIET))
    merged = fit(first, MoEModule(str(checkpoint)), make_data())
    plan = Path(first.log_dir) / "merge_plan.json"
    writer = ReportWriter(measure_quality=False, **QUIET)
    again = make_trainer(ExpertMerging(plan=str(plan)), writer)
    module = fit(again, MoEModule(str(checkpoint)), make_data(calibration_files=["/gone.txt"]))
    theirs = merged.built_model.state_dict()
    for name, tensor in module.built_model.state_dict().items():
        assert torch.equal(tensor, theirs[name])
    assert writer.report.merging is not None
    assert writer.report.merging.recipe == "replayed plan"


def test_recipes_of_weights_need_no_text(checkpoint, make_data, make_trainer):
    writer = ReportWriter(measure_quality=False, **QUIET)
    trainer = make_trainer(ExpertMerging("surrogate", groups=4), writer)
    fit(trainer, MoEModule(str(checkpoint)), make_data(calibration_files=["/gone.txt"]))
    assert writer.report.calibration.tokens == 0


def test_the_refit_behind_it_learns_from_the_model_before(
    checkpoint, make_data, make_trainer, monkeypatch
):
    monkeypatch.setattr(api, "held_out_loss", lambda *_: 0.0)
    writer = ReportWriter(**QUIET)
    merging = ExpertMerging(coefficients="frequency", groups=4, align=True)
    trainer = make_trainer(merging, Refit(), writer)
    fit(trainer, MoEModule(str(checkpoint)), make_data(calibration_tokens=1024))
    assert list(writer.report.quality) == ["before", "merged", "refitted"]
    refit = writer.report.refit
    assert refit is not None
    assert sorted(refit.layers) == LAYERS
    for layer in refit.layers.values():
        assert layer.kept
        assert (layer.held_out_after or 9) < (layer.held_out_before or 0)
    assert writer.report.merging is not None
    assert (writer.report.merging.neurons_moved or 0) > 0


def test_dern_keeps_no_plan_that_would_not_give_its_experts(checkpoint, make_data, make_trainer):
    segments = SegmentOptions(tau=0.1)
    writer = ReportWriter(measure_quality=False, **QUIET)
    trainer = make_trainer(ExpertMerging(keep_ratio=0.5, segments=segments), writer)
    module = fit(trainer, MoEModule(str(checkpoint)), make_data())
    assert count_experts(find_sites(module.built_model)) == dict.fromkeys(LAYERS, 4)
    assert not (Path(trainer.log_dir) / "merge_plan.json").exists()
    assert writer.report.merging is not None
    assert writer.report.merging.recipe == "dern, tau 0.1"
    layer = writer.report.merging.layers[LAYERS[0]]
    assert any(len(ids) > 1 for ids in layer.groups)


def test_the_merged_model_trains(checkpoint, make_data, make_trainer):
    trainer = make_trainer(
        ExpertMerging("router", groups=4), ReportWriter(measure_quality=False, **QUIET), max_steps=2
    )
    fit(trainer, MoEModule(str(checkpoint)), make_data())
    assert trainer.global_step == 2


def test_a_ratio_that_had_to_be_rounded_is_told(checkpoint, make_data, make_trainer):
    writer = ReportWriter(measure_quality=False, **QUIET)
    trainer = make_trainer(ExpertMerging("weights", keep_ratio=0.7), writer)
    fit(trainer, MoEModule(str(checkpoint)), make_data())
    (warning,) = writer.report.warnings
    assert "keep_ratio=0.7 was asked" in warning
    assert "make it 0.75" in warning


def test_protected_experts_stay(checkpoint, make_data, make_trainer):
    writer = ReportWriter(measure_quality=False, **QUIET)
    protect = ["model.layers.0.*", "model.layers.1.mlp:2,7"]
    trainer = make_trainer(ExpertMerging("weights", groups=4, protect=protect), writer)
    module = fit(trainer, MoEModule(str(checkpoint)), make_data())
    assert count_experts(find_sites(module.built_model)) == dict(zip(LAYERS, (8, 4), strict=True))
    assert writer.report.merging is not None
    groups = writer.report.merging.layers[LAYERS[1]].groups
    assert [2] in groups
    assert [7] in groups


def test_groups_of_one_everywhere_are_a_warning(checkpoint, make_data, make_trainer):
    trainer = make_trainer(
        ExpertMerging("weights", groups=8), ReportWriter(measure_quality=False, **QUIET)
    )
    module = MoEModule(str(checkpoint))
    with pytest.warns(NoEffectWarning, match="nothing is merged"):
        fit(trainer, module, make_data())
    assert count_experts(find_sites(module.built_model)) == dict.fromkeys(LAYERS, 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": 1}, "keep_experts=1"),
        ({"groups": 9}, "has only 8 experts"),
        ({"keep_ratio": 0.1}, r"keep_ratio=0\.1"),
    ],
)
def test_impossible_amounts_are_refused_before_any_text_is_read(
    fields, message, checkpoint, make_data, make_trainer
):
    trainer = make_trainer(ExpertMerging(**fields), ReportWriter(**QUIET))
    with pytest.raises(LitMoEError, match=message):
        fit(trainer, MoEModule(str(checkpoint)), make_data(calibration_files=["/gone.txt"]))


@pytest.mark.parametrize("fields", [{}, {"keep_ratio": 0.5, "groups": 4}])
def test_exactly_one_amount_must_be_given(fields):
    with pytest.raises(LitMoEError, match="give exactly one of keep_ratio, keep_experts"):
        ExpertMerging(**fields)


def test_a_plan_of_another_model_is_refused(checkpoint, make_data, make_trainer, tmp_path):
    maps = {"model.layers.0.mlp": torch.eye(4)}
    MergePlan(maps, maps, "mixtral").save(tmp_path / "plan.json")
    trainer = make_trainer(ExpertMerging(plan=str(tmp_path / "plan.json")), ReportWriter(**QUIET))
    with pytest.raises(PlanError, match="4 experts in the plan and 8 experts in the model"):
        fit(trainer, MoEModule(str(checkpoint)), make_data())


class SavedAt(Callback):
    """Writes a checkpoint after one step."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def merging_run(make_trainer, path, merging, *, at_step=1, **options):
    """Return a trainer that writes a checkpoint to ``path``."""
    quiet = ReportWriter(measure_quality=False, **QUIET)
    return make_trainer(merging, quiet, SavedAt(path, at_step), **options)


@pytest.mark.parametrize(
    "fields",
    [
        {"similarity": "weights", "groups": 4},
        {"similarity": "weights", "groups": 4, "align": True, "router": "keep"},
        {"segments": SegmentOptions(), "groups": 4},
    ],
    ids=["averages", "aligned", "segments"],
)
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(
    fields, checkpoint, make_data, make_trainer, tmp_path
):
    def run():
        merging = ExpertMerging(**fields)
        return merging_run(make_trainer, path, merging, at_step=2, max_steps=3)

    path = tmp_path / "two.ckpt"
    whole = fit(run(), MoEModule(str(checkpoint)), make_data())
    again, trainer = MoEModule(str(checkpoint)), run()
    again.resume_from = str(path)
    fit(trainer, again, make_data(), ckpt_path=again.resume_from)
    assert trainer.global_step == 3
    assert again.plan == whole.plan
    assert isinstance(again.plan, MergePlan)
    assert again.plan.replayable == ("segments" not in fields)
    parameters = report_writer(trainer).report.parameters
    assert parameters.after not in (None, parameters.before)
    theirs = whole.built_model.state_dict()
    for name, tensor in again.built_model.state_dict().items():
        assert torch.equal(tensor, theirs[name])


def test_a_checkpoint_of_a_merged_run_is_evaluated_without_the_callback(
    checkpoint, make_data, make_trainer, tmp_path
):
    path = tmp_path / "one.ckpt"
    trainer = merging_run(make_trainer, path, ExpertMerging("weights", groups=4), max_steps=1)
    merged = fit(trainer, MoEModule(str(checkpoint)), make_data())
    module = MoEModule(str(checkpoint))
    module.resume_from = str(path)
    quiet = ReportWriter(measure_quality=False, **QUIET)
    make_trainer(quiet).validate(module, datamodule=make_data(), ckpt_path=module.resume_from)
    theirs = merged.built_model.state_dict()
    for name, tensor in module.built_model.state_dict().items():
        assert torch.equal(tensor, theirs[name])


def test_a_checkpoint_of_another_amount_or_method_is_refused(
    checkpoint, make_data, make_trainer, tmp_path
):
    path = str(tmp_path / "one.ckpt")
    trainer = merging_run(make_trainer, path, ExpertMerging("weights", groups=4), max_steps=1)
    fit(trainer, MoEModule(str(checkpoint)), make_data())
    for callback, message in (
        (ExpertMerging("weights", groups=5), "merged experts and has 4 .* asks to merge them to 5"),
        (OneShotPruning("weight_norm", keep_ratio=0.5), "expert 2 of .* is made of"),
    ):
        module = MoEModule(str(checkpoint))
        module.resume_from = path
        trainer = merging_run(make_trainer, tmp_path / "no.ckpt", callback, max_steps=2)
        with pytest.raises(PlanError, match=message):
            fit(trainer, module, make_data(), ckpt_path=path)


def test_a_plan_of_rebuilt_experts_is_not_replayed(checkpoint, tmp_path):
    maps = {name: torch.eye(8)[:4] for name in LAYERS}
    MergePlan(maps, maps, replayable=False).save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="rebuilt from segments"):
        ExpertMerging(plan=str(tmp_path / "plan.json"))


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_validation_and_test_merge_nothing(stage, checkpoint, make_data, make_trainer):
    trainer = make_trainer(ExpertMerging(keep_ratio=0.5))
    module = MoEModule(str(checkpoint))
    getattr(trainer, stage)(module, datamodule=make_data(), verbose=False)
    assert count_experts(find_sites(module.built_model)) == dict.fromkeys(LAYERS, 8)


@pytest.mark.parametrize("first", [0, 1])
def test_a_pruned_model_is_not_merged_in_the_same_run(checkpoint, make_data, make_trainer, first):
    both = [OneShotPruning("frequency", keep_ratio=0.75), ExpertMerging(groups=4)]
    trainer = make_trainer(both[first], both[1 - first], ReportWriter(**QUIET))
    with pytest.raises(LitMoEError, match="ExpertMerging and OneShotPruning are both given"):
        fit(trainer, MoEModule(str(checkpoint)), make_data())


def test_two_mergers_are_refused(checkpoint, make_data, make_trainer):
    trainer = make_trainer(ExpertMerging(groups=6), ExpertMerging(groups=4))
    with pytest.raises(LitMoEError, match="2 ExpertMerging callbacks are given"):
        fit(trainer, MoEModule(str(checkpoint)), make_data())


@pytest.mark.distributed
def test_two_processes_merge_as_one(checkpoint, make_data, make_trainer):
    def run(**options):
        writer = ReportWriter(measure_quality=False, **QUIET)
        merging = ExpertMerging(coefficients="frequency", groups=4)
        trainer = make_trainer(merging, writer, **options)
        module = fit(trainer, MoEModule(str(checkpoint)), make_data())
        assert writer.report.merging is not None
        groups = {k: layer.groups for k, layer in writer.report.merging.layers.items()}
        return groups, {k: v.clone() for k, v in module.built_model.state_dict().items()}

    groups, weights = run()
    first, second = run_distributed(lambda _: run(devices=2, strategy="ddp"), group=False)
    assert first[0] == second[0] == groups
    for name, tensor in weights.items():
        assert torch.equal(first[1][name], second[1][name])
        torch.testing.assert_close(first[1][name], tensor, rtol=1e-4, atol=1e-5)


def test_neurons_may_be_aligned_by_what_they_do_on_the_calibration_text(
    checkpoint, make_data, make_trainer
):
    writer = ReportWriter(measure_quality=False, **QUIET)
    merging = ExpertMerging("router", groups=4, align="activations", effort=1.0)
    trainer = make_trainer(merging, writer)
    fit(trainer, MoEModule(str(checkpoint)), make_data())
    assert writer.report.merging is not None
    assert (writer.report.merging.neurons_moved or 0) > 0
    assert writer.report.calibration.tokens == 64  # a fourth: two of eight experts, effort 1
    plan = Path(trainer.log_dir) / "merge_plan.json"
    with pytest.raises(LitMoEError, match="a replayed plan reads no text, .* take align: weights"):
        ExpertMerging(plan=str(plan), align="activations")
