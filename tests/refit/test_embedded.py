"""How much a refit repairs of a trained model: the embedded one, on text it was not fitted on."""

import copy
from typing import Any

import pytest
import torch

import lit_moe
from lit_moe.adapters import adapter_for, find_sites
from lit_moe.assets import EMBEDDED
from lit_moe.data import TextDataModule
from lit_moe.evaluate import evaluate_perplexity
from lit_moe.models import build_model
from lit_moe.refit import RefitOptions, refit
from lit_moe.testing import random_plan


class Trained:
    """The embedded model, its calibration text, and perplexity on its test text."""

    def __init__(self):
        data = TextDataModule(calibration_tokens=16384, test_tokens=4096)
        self.model = build_model(EMBEDDED, dtype="float32")
        self.calibration = list(data.calibration_dataloader())
        loader, self._domains = data.test_share(rank=0, world_size=1)
        self._test = list(loader)
        self.base = self.perplexity(self.model)

    def perplexity(self, model):
        return evaluate_perplexity(model, self._test, self._domains).perplexity

    def by_criterion(self, name, keep_ratio):
        stats = lit_moe.observe(self.model, self.calibration[:4])
        return lit_moe.select(lit_moe.score(stats, name), keep_ratio=keep_ratio)

    def without(self, plan):
        student = copy.deepcopy(self.model)
        lit_moe.shrink(student, plan)
        return student

    def refitted(self, student, batches=None, **options):
        """Perplexity before and after, and the report."""
        before = self.perplexity(student)
        wanted = RefitOptions(**options)
        report: Any = refit(student, self.model, batches or self.calibration, wanted)
        return before, self.perplexity(student), report

    def closed(self, before, after):
        """The part of the gap to the unpruned model that the refit closes."""
        return (before - after) / (before - self.base)


@pytest.fixture(scope="module")
def trained():
    torch.set_num_threads(1)
    return Trained()


def test_half_of_the_experts_by_reap_keep_most_of_the_perplexity(trained):
    student = trained.without(trained.by_criterion("reap", 0.5))
    before, after, report = trained.refitted(student, trained.calibration[:4])
    assert report.kept
    assert report.tokens + report.held_out_tokens == 8192
    assert before > 4 * trained.base
    assert trained.closed(before, after) > 0.6
    for layer in report.layers.values():
        assert layer.held_out_after < 0.95 * layer.held_out_before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "keep_ratio"),
    [("reap", 0.5), ("frequency", 0.5), ("weighted_ean_sum", 0.5), ("reap", 0.75)],
)
def test_a_refit_closes_most_of_the_gap_whatever_the_criterion(name, keep_ratio, trained):
    student = trained.without(trained.by_criterion(name, keep_ratio))
    before, after, report = trained.refitted(student)
    assert report.kept
    assert trained.closed(before, after) > (0.6 if keep_ratio == 0.5 else 0.45)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_refitted_is_never_worse_than_dropped_for_random_plans(mode, seed, trained):
    student = trained.without(random_plan(trained.model, ratio=0.5, seed=seed))
    before, after, report = trained.refitted(student, trained.calibration[:4], mode=mode)
    assert report.kept
    assert trained.closed(before, after) > 0.6


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["joint", "jacobi", "gauss_seidel"])
def test_every_solver_repairs(solver, trained):
    student = trained.without(trained.by_criterion("reap", 0.5))
    before, after, _ = trained.refitted(student, trained.calibration[:4], solver=solver)
    assert trained.closed(before, after) > 0.5


@pytest.mark.slow
def test_fewer_active_experts_are_never_made_worse(trained):
    student = copy.deepcopy(trained.model)
    adapter_for(student.config).set_top_k(student, 1)
    before, after, report = trained.refitted(student, trained.calibration[:4])
    assert before > 1.05 * trained.base
    assert after < 1.001 * before
    assert all(layer.held_out_after < layer.held_out_before for layer in report.layers.values())


@pytest.mark.slow
def test_weights_under_a_two_of_four_mask_make_up_for_a_part_of_the_loss(trained):
    student = copy.deepcopy(trained.model)
    adapter = adapter_for(student.config)
    zeros = {}
    for site in find_sites(student):
        down = adapter.expert_weights(student, site)["down"]
        order = down.unflatten(2, (-1, 4)).abs().argsort(dim=3).argsort(dim=3).flatten(2)
        adapter.set_expert_weights_(student, site, {"down": down * (order >= 2)})
        zeros[site] = order < 2
    before, after, report = trained.refitted(student, trained.calibration[:4], solver="jacobi")
    assert report.kept
    assert trained.closed(before, after) > 0.25
    for site, mask in zeros.items():
        assert torch.equal(adapter.expert_weights(student, site)["down"] == 0, mask)
