import json
from pathlib import Path

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lit_moe import MoEModule
from lit_moe.accounting import tensor_at
from lit_moe.adapters import find_sites
from lit_moe.assets import model_folder
from lit_moe.callbacks import ExportModel, OneShotPruning, ReportWriter
from lit_moe.errors import LitMoEError, PlanError
from lit_moe.export import whole_on_first_rank
from lit_moe.module import LossWeights, OptimizerConfig
from lit_moe.plan import KeepPlan
from lit_moe.testing import tiny_moe

NO_QUALITY = {"measure_quality": False, "figures": False}
LAYERS = ("model.layers.0.mlp", "model.layers.1.mlp")


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
    assert replayed.plan.family == "mixtral"
    assert replayed.plan.source == str(checkpoint)
    assert not warnings_of(second)
    for (name, mine), (_, theirs) in zip(
        module.built_model.state_dict().items(),
        replayed.built_model.state_dict().items(),
        strict=True,
    ):
        assert torch.equal(mine, theirs), name


def warnings_of(trainer):
    return json.loads((Path(trainer.log_dir) / "report.json").read_text())["warnings"]


def test_a_plan_may_be_replayed_on_a_sibling_and_the_report_says_so(
    checkpoint, make_data, make_trainer, tmp_path
):
    plan = KeepPlan(dict.fromkeys(LAYERS, (0, 1, 5)), dict.fromkeys(LAYERS, 8))
    plan.made_for(family="mixtral", source="somebody/base").save(tmp_path / "plan.json")
    writer = ReportWriter(**NO_QUALITY)
    trainer = make_trainer(OneShotPruning(plan=str(tmp_path / "plan.json")), writer)
    module = fit(trainer, MoEModule(str(checkpoint)), make_data())
    assert module.plan == plan
    (sentence,) = warnings_of(trainer)
    assert f"made for somebody/base, this model is {checkpoint}" in sentence
    again = KeepPlan.load(Path(trainer.log_dir) / "plan.json")
    assert again.source == "somebody/base"


def test_a_plan_names_no_source_for_weights_that_began_at_random(make_data, make_trainer):
    architecture = {**tiny_moe("mixtral", vocab_size=1024).config.to_diff_dict()}
    trainer = make_trainer(OneShotPruning("random", keep_ratio=0.5), ReportWriter(**NO_QUALITY))
    module = fit(trainer, MoEModule(architecture=architecture), make_data())
    assert (module.plan.family, module.plan.source) == ("mixtral", None)


def test_resume_takes_the_plan_and_the_numbers_of_the_checkpoint_and_equals_the_whole_run(
    checkpoint, make_data, make_trainer, tmp_path
):
    def run(max_steps, resume_from=None, save=None, **data_options):
        torch.manual_seed(0)
        pruning, writer = OneShotPruning("reap", keep_ratio=0.5), ReportWriter(figures=False)
        trainer = make_trainer(pruning, writer, max_steps=max_steps)
        optimizer = OptimizerConfig(learning_rate=1e-3, schedule="constant")
        loss = LossWeights(distillation=0.5)
        module = MoEModule(str(checkpoint), optimizer=optimizer, loss=loss)
        module.resume_from = resume_from
        # One batch with all blocks: the position in the data plays no part here.
        data = make_data(batch_size=len(make_data().blocks("train")), **data_options)
        fit(trainer, module, data, ckpt_path=resume_from)
        if save:
            trainer.save_checkpoint(save)
        return module, writer.report

    straight, whole = run(4)
    saved = tmp_path / "half.ckpt"
    run(2, save=saved)
    stored = torch.load(saved, weights_only=False)
    assert not [key for key in stored["state_dict"] if key.startswith("teacher.")]
    assert KeepPlan.from_dict(stored["lit_moe"]["plan"]) == straight.plan
    # Were it to calibrate again, it would not find the text.
    resumed, report = run(4, resume_from=str(saved), calibration_files=["/gone.txt"])
    assert resumed.plan == straight.plan
    assert list(report.quality) == ["before", "pruned", "recovered"]
    assert report.quality["pruned"].perplexity == whole.quality["pruned"].perplexity
    assert report.parameters == whole.parameters
    for (name, mine), (_, theirs) in zip(
        straight.state_dict().items(), resumed.state_dict().items(), strict=True
    ):
        # Blocks come in another order within the batch, so sums round differently.
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5, msg=name)
    reloaded = MoEModule.load_from_checkpoint(saved)
    assert find_sites(reloaded.built_model)[0].num_experts == 4
    (tested,) = make_trainer(ReportWriter(**NO_QUALITY)).test(
        MoEModule(str(checkpoint)), datamodule=make_data(), ckpt_path=saved, verbose=False
    )
    assert tested["test/loss"] > 0


def test_validation_alone_prunes_nothing_and_writes_nothing(checkpoint, make_data, make_trainer):
    trainer = make_trainer(OneShotPruning("reap", keep_ratio=0.5), ExportModel("model"))
    module = MoEModule(str(checkpoint))
    trainer.validate(module, datamodule=make_data(), verbose=False)
    assert module.plan is None
    assert find_sites(module.built_model)[0].num_experts == 8
    assert not (Path(trainer.log_dir) / "report.json").exists()


def test_a_report_written_first_in_the_list_still_knows_the_export(
    checkpoint, make_data, make_trainer
):
    trainer = make_trainer(
        ReportWriter(measure_quality=False, figures=False),
        OneShotPruning("random", keep_ratio=0.5, protect=["model.layers.0.mlp:7"]),
        ExportModel("model"),
    )
    fit(trainer, MoEModule(str(checkpoint)), make_data())
    run = Path(trainer.log_dir)
    assert str(run / "model") in (run / "report.md").read_text()
    report = json.loads((run / "report.json").read_text())
    assert json.loads((run / "model" / "report.json").read_text()) == report
    assert report["status"] == "finished"
    assert report["protected"] == {"model.layers.0.mlp": [7]}


def test_the_export_is_stored_as_its_source_was(make_data, make_trainer, tmp_path):
    source = tmp_path / "source"
    model = tiny_moe("mixtral", vocab_size=1024)
    torch.nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(source)
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(source)
    trainer = make_trainer(
        OneShotPruning("random", keep_ratio=0.5), ExportModel("model"), ReportWriter(**NO_QUALITY)
    )
    module = MoEModule(str(source), dtype="float32")
    fit(trainer, module, make_data())
    exported = AutoModelForCausalLM.from_pretrained(Path(trainer.log_dir) / "model")
    assert exported.dtype == torch.bfloat16


def test_an_interrupted_run_says_so_and_keeps_what_it_found(checkpoint, make_data, make_trainer):
    class Break(L.Callback):
        def on_train_batch_end(self, *_):
            raise OSError("the disk went away")

    trainer = make_trainer(OneShotPruning("random", keep_ratio=0.5), Break(), max_steps=2)
    with pytest.raises(OSError, match="went away"):
        fit(trainer, MoEModule(str(checkpoint)), make_data())
    report = json.loads((Path(trainer.log_dir) / "report.json").read_text())
    assert report["status"] == "interrupted"
    assert set(report["quality"]) == {"before", "pruned"}


def test_a_ratio_that_the_router_cannot_meet_exactly_is_noted(make_data, make_trainer, tmp_path):
    tiny_moe("mixtral", num_experts=6, vocab_size=1024).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(tmp_path)
    writer = ReportWriter(**NO_QUALITY)
    trainer = make_trainer(OneShotPruning("random", keep_ratio=0.6), writer)
    fit(trainer, MoEModule(str(tmp_path)), make_data())
    assert any("keep_ratio=0.6 was asked" in sentence for sentence in writer.report.warnings)


def test_casting_for_export_keeps_selection_biases_exact_and_the_model_as_it_was(tmp_path):
    model = tiny_moe("deepseek_v3")
    site = find_sites(model)[0]
    (name,) = [axis.name for axis in site.axes if axis.kind == "select_bias"]
    with whole_on_first_rank(model, tmp_path / "out", dtype=torch.bfloat16) as whole:
        assert whole is not None
        assert torch.equal(tensor_at(whole, name), tensor_at(model, name))
        assert torch.equal(whole.lm_head.weight, model.lm_head.weight.bfloat16())
    assert model.lm_head.weight.dtype == torch.float32
    assert not list(tmp_path.iterdir())


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


def test_a_plan_of_another_family_is_refused_before_any_text_is_read(
    checkpoint, make_data, make_trainer, tmp_path
):
    plan = KeepPlan(dict.fromkeys(LAYERS, (0, 1, 5)), dict.fromkeys(LAYERS, 8))
    plan.made_for(family="qwen3_moe").save(tmp_path / "plan.json")
    trainer = make_trainer(OneShotPruning(plan=str(tmp_path / "plan.json")))
    data = make_data(test_files=["/no/such/file.txt"])
    with pytest.raises(PlanError, match="family is 'qwen3_moe', this model is 'mixtral'"):
        trainer.fit(MoEModule(str(checkpoint)), datamodule=data)


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
