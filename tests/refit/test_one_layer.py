"""Whole refits with each solver; one layer against least squares done by hand."""

from typing import Any

import pytest
import torch

from lit_moe.refit import RefitOptions, refit
from tests.refit.models import downs_of, half_of, held_rows, text_for


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_gauss_seidel_refits_a_model_as_the_joint_solver_does(mode, family, no_judge):
    found = {}
    for solver in ("joint", "gauss_seidel"):
        teacher, student = half_of(family)
        options = RefitOptions(mode=mode, solver=solver, lam=0.1)
        report = refit(student, teacher, text_for(teacher), options)
        assert report.solver == f"{solver}: asked for"
        found[solver] = downs_of(student)
    for name, tensors in found["joint"].items():
        for key, tensor in tensors.items():
            other = found["gauss_seidel"][name][key]
            assert float((other - tensor).norm() / tensor.norm()) < 1e-3


def test_jacobi_helps_less_than_joint_but_helps(no_judge):
    left = {}
    for solver in ("joint", "jacobi"):
        teacher, student = half_of("mixtral", num_hidden_layers=1)
        report: Any = refit(
            student, teacher, text_for(teacher, rows=64), RefitOptions(solver=solver)
        )
        (layer,) = report.layers.values()
        left[solver] = layer.held_out_after
    assert left["joint"] < left["jacobi"] < 0.95 * layer.held_out_before


@pytest.mark.parametrize("token_weights", ["equal", "relative"])
@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_a_one_layer_model_gets_the_least_squares_solution(mode, token_weights, no_judge):
    teacher, student = half_of("mixtral", num_hidden_layers=1)
    batch = text_for(teacher, batches=1)[0]
    expected = by_hand(teacher, student, batch, token_weights, lam=0.05)
    before = downs_of(student)["model.layers.0.mlp"]["down"]
    refit(student, teacher, [batch], RefitOptions(mode=mode, lam=0.05, token_weights=token_weights))
    change = downs_of(student)["model.layers.0.mlp"]["down"] - before
    torch.testing.assert_close(change.double(), expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def by_hand(teacher, student, batch, token_weights, *, lam):
    """The change of Mixtral's down projections, from the formulas of its layer."""
    layers = [model.model.layers[0] for model in (teacher, student)]
    caught: dict = {}
    for name, layer in zip(("teacher", "student"), layers, strict=True):
        layer.register_forward_hook(
            lambda _, __, y, name=name: caught.update({name: y.flatten(0, 1)})
        )
        layer.mlp.register_forward_pre_hook(
            lambda _, x, name=name: caught.update({f"{name} in": x[0].reshape(-1, 32)})
        )
    for model in (teacher, student):
        model(**batch)
    for layer in layers:
        layer._forward_hooks.clear()
        layer.mlp._forward_pre_hooks.clear()
    mlp, x_TH = layers[1].mlp, caught["student in"]
    gates_TK, index_TK = torch.softmax(x_TH @ mlp.gate.weight.T, dim=1).topk(2, dim=1)
    gates_TK = gates_TK / gates_TK.sum(dim=1, keepdim=True)
    gates_TE = torch.zeros(len(x_TH), 4).scatter(1, index_TK, gates_TK)
    gate, up = torch.einsum("th,eih->tei", x_TH, mlp.experts.gate_up_proj).chunk(2, dim=2)
    psi = (gates_TE[:, :, None] * torch.nn.functional.silu(gate) * up).flatten(1).double()
    residual = (caught["teacher"] - caught["student"]).double()
    length = batch["input_ids"].shape[1]
    fitted = (~held_rows(len(psi) // length)).repeat_interleave(length)
    weight = torch.ones(len(psi), dtype=torch.float64)
    if token_weights == "relative":
        weight = 1 / caught["teacher"].double().square().mean(1)
    root = weight[fitted].sqrt()[:, None]
    rows = psi[fitted] * root
    unit = rows.square().sum(0).mean()
    rows = torch.cat([rows, (lam * unit).sqrt() * torch.eye(rows.shape[1], dtype=rows.dtype)])
    wanted = torch.cat([residual[fitted] * root, torch.zeros(psi.shape[1], 32).double()])
    return torch.linalg.lstsq(rows, wanted).solution.view(4, -1, 32).transpose(1, 2)
