"""Tiny teachers, students that need a refit, and text for both."""

from __future__ import annotations

import copy

import torch

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.refit.rows import Rows
from lit_moe.surgery import shrink
from lit_moe.testing import example_inputs, random_plan, tiny_moe

REFITTED = ("down", "down_bias")


def scrambled(teacher, sites=None, seed=1):
    """Return a copy whose experts have random down projections (and biases of them)."""
    student = copy.deepcopy(teacher)
    adapter = adapter_for(student.config)
    generator = torch.Generator().manual_seed(seed)
    for site in sites or find_sites(student):
        weights = adapter.expert_weights(student, site)
        values = {
            name: torch.randn(weights[name].shape, generator=generator) * weights[name].std()
            for name in REFITTED
            if name in weights
        }
        adapter.set_expert_weights_(student, site, values)
    return student


def halved(teacher, seed=0):
    """Return a copy without half of its experts."""
    student = copy.deepcopy(teacher)
    shrink(student, random_plan(student, seed=seed))
    return student


def half_of(family, **overrides):
    """Return a tiny teacher and a student with half of its experts."""
    teacher = tiny_moe(family, **overrides)
    return teacher, halved(teacher)


def text_for(model, *, rows=32, length=16, batches=2, seed=0):
    """Return random token batches, ``rows`` rows in all."""
    size = rows // batches
    return [
        example_inputs(model, batch=size, length=length, seed=seed * 100 + index)
        for index in range(batches)
    ]


def downs_of(model):
    """Return layer -> copies of what a refit may change."""
    adapter = adapter_for(model.config)
    found = {}
    for site in find_sites(model):
        weights = adapter.expert_weights(model, site)
        found[site.name] = {k: weights[k].detach().clone() for k in REFITTED if k in weights}
    return found


def state_of(model):
    """Return copies of all tensors of a model."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(model, state, *, but=()):
    """Assert that every tensor is bit-identical, but for names that contain one of ``but``."""
    for name, tensor in model.state_dict().items():
        if not any(part in name for part in but):
            assert torch.equal(tensor, state[name]), name


@torch.no_grad()
def logits_of(model, batch):
    """Return the logits on one batch."""
    return model(**batch).logits


def held_rows(num_rows, held_out=0.125):
    """Return a mask of the rows that a refit on one rank holds out."""
    batch = {"input_ids": torch.arange(num_rows)[:, None]}
    (held,) = Rows([batch], held_out, torch.device("cpu"), inputs=set(batch)).held_batches()
    mask = torch.zeros(num_rows, dtype=torch.bool)
    mask[held["input_ids"][:, 0]] = True
    return mask
