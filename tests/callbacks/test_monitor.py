import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lit_moe import MoEModule
from lit_moe.adapters import find_sites
from lit_moe.callbacks import ExpertMonitor, OneShotPruning, ReportWriter
from lit_moe.callbacks.monitor import kept_map, load_measures
from lit_moe.plan import KeepPlan


def test_load_measures_of_an_even_and_of_a_collapsed_load():
    even = load_measures(torch.tensor([5.0, 5.0, 5.0, 5.0]))
    assert even == {"load_cv": 0.0, "unrouted": 0.0, "entropy": 1.0}
    collapsed = load_measures(torch.tensor([8.0, 0.0, 0.0, 0.0]).double())
    assert collapsed["unrouted"] == 0.75
    assert abs(collapsed["load_cv"] - 3**0.5) < 1e-9
    assert abs(collapsed["entropy"]) < 1e-9


def test_kept_map_marks_kept_dropped_and_absent_experts():
    plan = KeepPlan({"a": (0, 2), "b": (1,)}, {"a": 3, "b": 2})
    squares = kept_map(plan)[::12, ::12]
    assert squares.tolist() == [[1.0, 0.3, 1.0], [0.3, 1.0, 0.0]]


def test_training_logs_scalars_images_and_the_plan_and_detaches(
    checkpoint, make_data, make_trainer
):
    monitor = ExpertMonitor(every_n_steps=2)
    trainer = make_trainer(
        OneShotPruning("frequency", keep_ratio=0.5),
        ReportWriter(measure_quality=False, figures=False),
        monitor,
        max_steps=4,
    )
    module = MoEModule(str(checkpoint))
    trainer.fit(module, datamodule=make_data())
    events = EventAccumulator(trainer.log_dir)
    events.Reload()
    tags = events.Tags()
    layer = find_sites(module.built_model)[0]
    for name in ("load_cv", "unrouted", "entropy"):
        assert len(events.Scalars(f"experts/{layer.name}/{name}")) == 2
    assert f"experts/load/{layer.name}" in tags["images"]
    assert "experts/kept" in tags["images"]
    assert any("experts/plan" in tag for tag in tags["tensors"])
    assert not module.built_model.get_submodule(layer.experts)._forward_pre_hooks
