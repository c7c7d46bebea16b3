import json
from pathlib import Path

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_moe import MoEModule
from lit_moe.adapters import find_sites
from lit_moe.callbacks import ExportModel, OneShotPruning, ReportWriter
from lit_moe.errors import LitMoEError, PlanError
from lit_moe.module import LossWeights, OptimizerConfig
from lit_moe.plan import KeepPlan

NO_QUALITY = {"measure_quality": False, "figures": False}


def fit(trainer, module, data, **options):
    trainer.fit(module, datamodule=data, **options)
    return module


def test_fit_without_a_step_prunes_exports_and_reports(checkpoint, make_data, make_trainer):
    trainer = make_trainer(OneShotPruning("reap", keep_ratio=0.5), ExportModel("model"))
    module = fit(trainer, MoEModule(str(checkpoint)), make_data())
    run = Path(trainer.log_dir)
    report = json.loads((run / "report.json").read_text())
    assert report["status"] == "finished"
    assert report["source"] == str(checkpoint)
    assert report["family"] == "mixtral"
    assert report["calibration"]["tokens"] == 256
    assert report["parameters"]["after"] < report["parameters"]["before"]
    assert report["bytes"]["after"] < report["bytes"]["before"]
    for layer in report["experts"].values():
        assert layer["before"] == 8
        assert len(layer["kept"]) == 4
    assert set(report["quality"]) == {"before", "pruned"}
    assert report["quality"]["pruned"]["stderr"] > 0
    assert report["export"]["max_abs_logit_difference"] == 0.0
    assert {"observe", "score", "shrink", "export"} <= set(report["seconds"])
    exported = AutoModelForCausalLM.from_pretrained(run / "model")
    assert exported.config.num_local_experts == 4
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            exported(ids).logits, module.built_model.eval()(ids).logits, rtol=0, atol=0
        )


def test_a_replayed_plan_gives_the_identical_model(checkpoint, make_data, make_trainer):
    first = make_trainer(OneShotPruning("reap", keep_ratio=0.5), ReportWriter(**NO_QUALITY))
    module = fit(first, MoEModule(str(checkpoint)), make_data())
    plan_file = Path(first.log_dir) / "plan.json"
    second = make_trainer(OneShotPruning(plan=str(plan_file)), ReportWriter(**NO_QUALITY))
    replayed = fit(second, MoEModule(str(checkpoint)), make_data())
    assert replayed.plan == module.plan
    for (name, mine), (_, theirs) in zip(
        module.built_model.state_dict().items(),
        replayed.built_model.state_dict().items(),
        strict=True,
    ):
        assert torch.equal(mine, theirs), name


def test_resume_takes_the_plan_of_the_checkpoint_and_equals_the_uninterrupted_run(
    checkpoint, make_data, make_trainer, tmp_path
):
    def run(max_steps, ckpt_path=None, save=None):
        torch.manual_seed(0)
        pruning = OneShotPruning("reap", keep_ratio=0.5)
        trainer = make_trainer(pruning, ReportWriter(**NO_QUALITY), max_steps=max_steps)
        optimizer = OptimizerConfig(learning_rate=1e-3, schedule="constant")
        loss = LossWeights(distillation=0.5)
        module = MoEModule(str(checkpoint), optimizer=optimizer, loss=loss)
        # One batch with all blocks: the position in the data plays no part here.
        data = make_data(batch_size=len(make_data().blocks("train")))
        fit(trainer, module, data, ckpt_path=ckpt_path)
        if save:
            trainer.save_checkpoint(save)
        return module, pruning

    straight, _ = run(4)
    saved = tmp_path / "half.ckpt"
    run(2, save=saved)
    stored = torch.load(saved, weights_only=False)
    assert not [key for key in stored["state_dict"] if key.startswith("teacher.")]
    assert KeepPlan.from_dict(stored["lit_moe"]["plan"]) == straight.plan
    resumed, _ = run(4, ckpt_path=saved)
    assert resumed.plan == straight.plan
    for (name, mine), (_, theirs) in zip(
        straight.state_dict().items(), resumed.state_dict().items(), strict=True
    ):
        # Blocks come in another order within the batch, so sums round differently.
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5, msg=name)


class Recorder(L.Callback):
    """Keeps one logged value per step."""

    def __init__(self, name):
        self.name, self.values = name, []

    def on_train_batch_end(self, trainer, *_):
        self.values.append(float(trainer.callback_metrics[self.name]))


def test_distillation_pulls_the_pruned_model_back_to_the_teacher(
    checkpoint, make_data, make_trainer
):
    recorder = Recorder("train/distillation")
    pruning = OneShotPruning("random", keep_ratio=0.5)
    trainer = make_trainer(pruning, ReportWriter(**NO_QUALITY), recorder, max_steps=30)
    module = MoEModule(
        str(checkpoint),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="constant"),
        loss=LossWeights(next_token=0.0, distillation=1.0),
    )
    fit(trainer, module, make_data())
    assert recorder.values[-1] < 0.7 * recorder.values[0]
    assert module.teacher is not None
    assert not any(p.requires_grad for p in module.teacher.parameters())
    assert find_sites(module.teacher)[0].num_experts == 8
    assert find_sites(module.built_model)[0].num_experts == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_ratio": 0.0}, "keep_ratio"),
        ({"keep_ratio": 1.5}, "keep_ratio"),
        ({"keep_ratio": None}, "exactly one of keep_ratio, keep_experts, max_bytes"),
        ({"criterion": "reep", "keep_ratio": 0.5}, "reap"),
        ({"plan": "nowhere.json"}, "nowhere.json does not exist"),
    ],
)
def test_bad_fields_are_refused_at_construction(options, message):
    with pytest.raises(LitMoEError, match=message):
        OneShotPruning(**options)


def test_fewer_experts_than_top_k_are_refused_before_any_text_is_read(
    checkpoint, make_data, make_trainer
):
    trainer = make_trainer(OneShotPruning("reap", keep_ratio=0.1))
    data = make_data(calibration_files=["/no/such/file.txt"], test_files=["/no/such/file.txt"])
    with pytest.raises(LitMoEError, match=r"keep_ratio=0\.1 leaves 1 of 8 .* 2 per token"):
        trainer.fit(MoEModule(str(checkpoint)), datamodule=data)


def test_a_plan_of_another_model_is_refused(checkpoint, make_data, make_trainer, tmp_path):
    other = KeepPlan({"model.layers.0.mlp": (0, 1)}, {"model.layers.0.mlp": 4})
    other.save(tmp_path / "other.json")
    trainer = make_trainer(OneShotPruning(plan=str(tmp_path / "other.json")))
    with pytest.raises(PlanError, match="another model"):
        trainer.fit(MoEModule(str(checkpoint)), datamodule=make_data())


def test_a_taken_export_path_is_refused_before_calibration(
    checkpoint, make_data, make_trainer, tmp_path
):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    trainer = make_trainer(OneShotPruning("reap", keep_ratio=0.5), ExportModel(str(taken)))
    data = make_data(calibration_files=["/no/such/file.txt"], test_files=["/no/such/file.txt"])
    with pytest.raises(LitMoEError, match="taken"):
        trainer.fit(MoEModule(str(checkpoint)), datamodule=data)
    assert (taken / "notes.txt").read_text() == "mine"
