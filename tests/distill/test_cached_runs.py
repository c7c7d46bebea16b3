"""Whole runs whose teacher was asked once and then let go."""

import gc
from typing import Any

import lightning as L
import pytest
import torch
from transformers import MixtralForCausalLM

from lit_moe import MoEModule
from lit_moe.callbacks import OneShotPruning, ReportWriter
from lit_moe.distill.top_logits import top_logits
from lit_moe.errors import LitMoEError
from lit_moe.module import LossWeights, OptimizerConfig, TeacherConfig
from lit_moe.testing import tiny_moe

LOSS: dict[str, Any] = {"distillation": 1.0, "top_k": 16}


def count_models():
    gc.collect()
    return sum(type(found) is MixtralForCausalLM for found in gc.get_objects())


class Watch(L.Callback):
    """Keeps the losses, and counts the models in memory while training."""

    def __init__(self):
        self.losses, self.models, self.teachers = [], count_models(), []

    def on_train_end(self, *_):
        self.models = count_models() - self.models

    def on_train_batch_end(self, _, module, outputs, *__):
        self.losses.append(float(outputs["loss"]))
        self.teachers.append(module.teacher is not None)


def run(checkpoint, data, make_trainer, *, max_steps=4, teacher=None, seed=1, **loss):
    torch.manual_seed(seed)
    watch = Watch()
    trainer = make_trainer(
        OneShotPruning("weight_norm", keep_ratio=0.5),
        ReportWriter(measure_quality=False, figures=False),
        watch,
        max_steps=max_steps,
    )
    module = MoEModule(
        str(checkpoint),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        loss=LossWeights(**{**LOSS, **loss}),
        teacher=teacher,
    )
    trainer.fit(module, datamodule=data)
    return watch


def test_a_cached_run_has_the_losses_of_a_live_one_and_no_teacher(
    checkpoint, make_data, make_trainer, tmp_path
):
    live = run(checkpoint, make_data(), make_trainer)
    cached = run(checkpoint, make_data(), make_trainer, cache=str(tmp_path / "cache"))
    assert cached.losses == live.losses
    assert len(set(cached.losses)) == 4
    assert cached.teachers == [False] * 4
    assert (live.models, cached.models) == (2, 1)


def test_the_second_run_asks_no_teacher(checkpoint, make_data, make_trainer, tmp_path, monkeypatch):
    cache = str(tmp_path / "cache")
    first = run(checkpoint, make_data(), make_trainer, cache=cache)

    def never(*_, **__):
        raise AssertionError("the teacher was asked again")

    monkeypatch.setattr("lit_moe.teachers.top_logits", never)
    second = run(checkpoint, make_data(), make_trainer, cache=cache)
    assert second.losses == first.losses
    with pytest.raises(AssertionError, match="asked again"):  # a longer run needs more text
        run(checkpoint, make_data(seed=5), make_trainer, cache=cache, max_steps=6)


def test_an_interrupted_cache_is_completed(
    checkpoint, make_data, make_trainer, tmp_path, monkeypatch
):
    monkeypatch.setattr("lit_moe.distill.logits_cache._BYTES_PER_FILE", 1)
    right = top_logits
    asked: list[int] = []

    def breaks(logits, top_k):
        asked.append(len(asked))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return right(logits, top_k)

    monkeypatch.setattr("lit_moe.teachers.top_logits", breaks)
    cache = tmp_path / "cache"
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(checkpoint, make_data(), make_trainer, cache=str(cache))
    assert len(list(cache.glob("*.safetensors"))) == 2
    again = run(checkpoint, make_data(), make_trainer, cache=str(cache))
    assert len(asked) == 3 + 2
    monkeypatch.setattr("lit_moe.teachers.top_logits", right)
    assert again.losses == run(checkpoint, make_data(), make_trainer).losses


def test_a_cache_of_another_teacher_is_refused(checkpoint, make_data, make_trainer, tmp_path):
    cache = str(tmp_path / "cache")
    run(checkpoint, make_data(), make_trainer, cache=cache)
    other = tiny_moe("mixtral", vocab_size=1024)
    with torch.no_grad():
        other.lm_head.weight.add_(1.0)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(LitMoEError, match=r"is not of this run's teacher: it says teacher"):
        run(
            checkpoint,
            make_data(),
            make_trainer,
            cache=cache,
            teacher=TeacherConfig(str(tmp_path / "other")),
        )
    with pytest.raises(LitMoEError, match="top_k 16 and not 8"):
        run(checkpoint, make_data(), make_trainer, cache=cache, top_k=8)


def test_expert_terms_still_keep_the_teacher(checkpoint, make_data, make_trainer, tmp_path):
    options = {"experts": 1.0, "experts_lambda": 1.0}
    cached = run(checkpoint, make_data(), make_trainer, cache=str(tmp_path / "c"), **options)
    assert all(cached.teachers)
    assert cached.losses == run(checkpoint, make_data(), make_trainer, **options).losses


def test_a_bigger_teacher_is_loaded_for_the_cache_alone(
    checkpoint, make_data, make_trainer, tmp_path
):
    big = tiny_moe("mixtral", vocab_size=1024, num_hidden_layers=3, hidden_size=64)
    big.save_pretrained(tmp_path / "big")
    teacher = TeacherConfig(str(tmp_path / "big"))
    live = run(checkpoint, make_data(), make_trainer, teacher=teacher)
    cached = run(
        checkpoint, make_data(), make_trainer, teacher=teacher, cache=str(tmp_path / "cache")
    )
    assert cached.losses == live.losses
    assert live.losses != run(checkpoint, make_data(), make_trainer).losses
    assert cached.teachers == [False] * 4
