"""Exports of several ranks: what is noticed, what is held, and what the model is afterwards."""

import re
from collections.abc import Callable
from pathlib import Path

import lightning as L
import pytest
from transformers import AutoTokenizer

from lit_moe.accounting import count_bytes
from lit_moe.assets import model_folder
from lit_moe.callbacks import ExportModel, ReportWriter
from lit_moe.errors import ExportError
from lit_moe.export import exporter, verification
from lit_moe.testing import tiny_moe
from tests.distributed.runs import Setup, some
from tests.peaks import HeldTensors
from tests.test_export_verification import CORRUPTIONS

pytestmark = pytest.mark.distributed


def saved(folder, family, **options):
    """Write a tiny checkpoint with a tokenizer, and return its folder."""
    tiny_moe(family, vocab_size=1024, **options).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(folder)
    return folder


class Exports(L.Callback):
    """Exports several times, each time with another corruption between writing and verifying."""

    current: Callable[[Path], None]

    def __init__(self):
        self.errors = {}

    def on_fit_end(self, trainer, pl_module):
        """After training. Collective."""
        for what, (corrupt, _) in CORRUPTIONS.items():
            Exports.current = corrupt
            try:
                ExportModel(path=what, dtype="bfloat16").on_fit_end(trainer, pl_module)
            except ExportError as error:
                self.errors[what] = str(error)
        Exports.current = lambda _: None
        ExportModel(path="sound", dtype="bfloat16").on_fit_end(trainer, pl_module)
        for module in pl_module.model.modules():
            if hasattr(module, "e_score_correction_bias"):
                module.top_k = 1  # which the config does not say
        try:
            ExportModel(path="other than its config").on_fit_end(trainer, pl_module)
        except ExportError as error:
            self.errors["other than its config"] = str(error)


@pytest.mark.parametrize("mode", some(["zero3"], ["single", "zero2", "zero3-sharded-load"]))
def test_each_corruption_is_noticed_on_every_rank(mode, chapters, tmp_path, monkeypatch):
    compare = verification.max_logit_difference

    def corrupt_and_compare(model, folder, *args, **options):
        Exports.current(folder)
        return compare(model, folder, *args, **options)

    monkeypatch.setattr(exporter, "max_logit_difference", corrupt_and_compare)
    source = saved(tmp_path / "source", "deepseek_v3", num_experts=4, num_hidden_layers=3)

    def errors(trainer, _):
        return next(c.errors for c in trainer.callbacks if isinstance(c, Exports))

    ranks = Setup(source, chapters, tmp_path).fit(
        mode, callbacks=lambda: [ReportWriter(False, False), Exports()], max_steps=1, look=errors
    )
    assert all(rank == ranks[0] for rank in ranks)
    found = ranks[0]
    assert found.keys() == {*CORRUPTIONS, "other than its config"}
    assert "logits differ" in found["other than its config"]
    for what, (_, says) in CORRUPTIONS.items():
        assert re.search(says, found[what]), (what, found[what])
    assert [path.name for path in (tmp_path / "run" / mode).iterdir() if path.is_dir()] == ["sound"]


class Measured(ExportModel):
    """Notes the peak of memory of its work, as a fraction of the whole model."""

    fraction = 0.0

    def on_fit_end(self, trainer, pl_module):
        """After training. Collective."""
        whole = count_bytes(pl_module.model)
        with HeldTensors() as held:
            super().on_fit_end(trainer, pl_module)
        self.fraction = held.peak / whole


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", some(["zero3"], ["ddp", "zero2", "zero3-sharded-load"]))
def test_no_rank_holds_a_second_whole_model(mode, dtype, chapters, tmp_path):
    source = saved(
        tmp_path / "source",
        "mixtral",
        num_experts=16,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=8,
    )

    def fraction(trainer, _):
        return next(c.fraction for c in trainer.callbacks if isinstance(c, Measured))

    ranks = Setup(source, chapters, tmp_path).fit(
        mode,
        callbacks=lambda: [ReportWriter(False, False), Measured(dtype=dtype)],
        max_steps=0,
        look=fraction,
    )
    assert max(ranks) < 0.3  # two of eight decoder layers


class OtherTopK(L.Callback):
    """Changes how many experts act, without a word in the config."""

    def on_fit_start(self, _, pl_module):
        """When the engine is there."""
        for module in pl_module.model.modules():
            if hasattr(module, "top_k"):
                module.top_k = 1


def test_what_rank_0_alone_finds_ends_the_others_too(chapters, tmp_path):
    source = saved(tmp_path / "source", "mixtral")

    def callbacks():
        return [ReportWriter(False, False), OtherTopK(), ExportModel(dtype="float32")]

    setup = Setup(source, chapters, tmp_path)
    with pytest.raises(RuntimeError, match="logits differ"):
        setup.fit("zero2", callbacks=callbacks, max_steps=1, precision="bf16-true")
    assert not list(tmp_path.rglob("run/**/model/config.json"))
