"""The theorems in small: who changes, who can go; exact parts by hand."""

import json
from dataclasses import replace
from statistics import fmean

import lightning as L
import pytest
import torch

from lit_moe.callbacks import TwoPatternStudy
from lit_moe.data import ImageDataModule
from lit_moe.errors import LitMoEError
from lit_moe.models.vision.pattern_study import study_changes, study_pruning
from lit_moe.models.vision.two_patterns import (
    ExpertChoiceLayer,
    TwoPatterns,
    draw,
    proficiency,
)
from lit_moe.module import MoEModule
from lit_moe.testing.vision import TINY

TASK = TwoPatterns(steps=300, batch=64)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_each_input_has_one_deciding_pattern_that_tells_its_class():
    patterns, classes = draw(TASK, 32, 500, generator())
    assert ((patterns < 2).sum(dim=1) == 1).all()
    assert torch.equal((patterns == 0).any(dim=1), classes > 0)
    assert patterns.max() < 32


def test_the_network_is_the_formula_over_basis_vectors():
    layer = ExpertChoiceLayer(TASK, 32, generator())
    patterns, _ = draw(TASK, 32, 3, generator(1))
    scores = layer(patterns)
    for row, score in zip(patterns, scores, strict=True):
        tokens = torch.eye(32)[row]
        total = torch.zeros(())
        for s in range(TASK.experts):
            logits = tokens @ layer.router[s]
            top = logits.topk(TASK.chosen)
            active = (tokens[top.indices] @ layer.neurons[s].T).relu().sum(dim=1)
            total = total + layer.sign[s] * (torch.softmax(top.values, 0) * active).sum()
        torch.testing.assert_close(score, total)


def test_without_an_expert_the_others_score_as_before():
    layer = ExpertChoiceLayer(TASK, 32, generator())
    patterns, _ = draw(TASK, 32, 5, generator(1))
    dropped = torch.tensor([0, 3, 4])
    rest = torch.tensor([e for e in range(TASK.experts) if e not in (0, 3, 4)])
    parts = layer.without(dropped)(patterns) + layer.without(rest)(patterns)
    torch.testing.assert_close(parts, layer(patterns))


def test_a_router_that_prefers_its_pattern_is_proficient():
    layer = ExpertChoiceLayer(TASK, 32, generator())
    with torch.no_grad():
        layer.router.zero_()
        layer.router[0, 0] = 5  # votes for +1 and prefers its pattern
        layer.router[1, 0] = 5  # votes for -1
        layer.router[2, 0] = -5
    shares = proficiency(layer, TASK, 32, generator(1))
    assert shares[0] == 1
    assert shares[2] == 0
    assert shares[1] < 0.5


def test_relevant_experts_change_most_and_the_others_less_in_higher_dimensions():
    low, high = study_changes(TASK, (16, 128), 2)
    for row in (low, high):
        assert row.accuracy > 0.95
        assert row.relevant > 3 * row.irrelevant
    assert high.irrelevant < low.irrelevant / 2
    assert high.relevant / high.irrelevant > 2 * low.relevant / low.irrelevant


def test_irrelevant_experts_can_go_and_those_that_changed_cannot():
    whole, half, most = study_pruning(TASK, 64, (0.0, 0.5, 0.75), 2)
    assert min(whole.pruned) > 0.95
    assert whole.before == whole.pruned
    assert most.before == whole.before
    assert fmean(half.pruned) > 0.95
    assert fmean(half.inverse) < 0.75
    assert fmean(most.recovered) >= fmean(most.pruned) - 0.02


def test_odd_sizes_are_refused():
    with pytest.raises(LitMoEError, match="experts choose 20 of 16 tokens"):
        TwoPatternStudy(replace(TASK, chosen=20))
    with pytest.raises(LitMoEError, match="experts must be even"):
        study_changes(replace(TASK, experts=3), (16,), 1)
    amounts = {"dimensions": (2,)}, {"ratios": (1.0,)}, {"num_seeds": 0}, {"dimensions": ()}
    for fields in amounts:
        with pytest.raises(LitMoEError, match="must be above 2, ratios="):
            TwoPatternStudy(**fields)


def test_the_study_is_written_with_its_figure(tmp_path, capsys):
    study = TwoPatternStudy(replace(TASK, steps=20), (16, 32), 16, (0.0, 0.5), 1)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        default_root_dir=tmp_path,
        callbacks=[study],
    )
    architecture = {**TINY, "model_type": "lit_vmoe", "num_labels": 10}
    trainer.fit(MoEModule(architecture=architecture), ImageDataModule())
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["dimension"] for row in report["changes"]] == [16, 32]
    assert [row["ratio"] for row in report["pruned"]] == [0.0, 0.5]
    assert (tmp_path / "theory.png").stat().st_size > 1000
    assert "inverse order" in capsys.readouterr().out
