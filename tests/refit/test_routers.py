"""Router rows that follow the teacher's choices, where that is asked for."""

from typing import Any

import pytest
import torch

from lit_moe.adapters import adapter_for, find_sites
from lit_moe.refit import RefitOptions, api, refit
from lit_moe.refit.routers import RouterProblem, matching_rows
from lit_moe.testing import tiny_moe
from tests.refit.models import assert_same_state, half_of, halved, state_of, text_for

WITH_ROUTERS = RefitOptions(router=True)


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_logits_of_held_out_tokens_come_closer_and_only_routers_and_downs_change(family, no_judge):
    teacher, student = half_of(family, num_hidden_layers=3)
    before, of_teacher = state_of(student), state_of(teacher)
    report: Any = refit(student, teacher, text_for(teacher, rows=128), WITH_ROUTERS)
    routers = [layer for layer in report.layers.values() if layer.target == "router logits"]
    assert len(routers) == len(report.layers) // 2
    taken = [layer for layer in routers if layer.kept]
    assert taken
    for layer in taken:
        assert layer.held_out_after < layer.held_out_before
    changed = [k for k, v in student.state_dict().items() if not torch.equal(v, before[k])]
    rows = [name for name in changed if "down_proj" not in name]
    assert len(rows) == len(taken)
    assert all(name.endswith(("gate.weight", "router.weight")) for name in rows)
    assert_same_state(teacher, of_teacher)


@torch.no_grad()
def test_the_rows_are_ridge_regressions_of_the_missing_logits():
    teacher = tiny_moe("mixtral")
    student = halved(teacher)
    site = find_sites(student)[0]
    router: Any = student.get_submodule(site.router)
    theirs: Any = teacher.get_submodule(site.router)
    generator = torch.Generator().manual_seed(0)
    seen, noise = (torch.randn(200, 32, generator=generator) for _ in range(2))
    turned = torch.eye(32) + 0.2 * torch.randn(32, 32, generator=generator)
    wanted = seen @ turned + 0.1 * noise
    fit = (torch.arange(200) % 8 != 7).float()
    problem = RouterProblem(student, teacher, site)
    kept = matching_rows(router.weight, theirs.weight)
    own = router.weight.detach().clone()
    problem.add((seen,), theirs(wanted), fit, 1 - fit)
    solved: Any = problem.solve((seen,))
    update, record = solved
    assert update is not None
    assert record.kept
    missing = (wanted @ theirs.weight[kept].T - seen @ own.T).detach()
    missing = (missing - missing.mean(1, keepdim=True)).double()
    x = seen.double()[fit > 0]
    unit = x.square().sum(0).mean()
    left = x.T @ x + record.lam * unit * torch.eye(32, dtype=torch.float64)
    expected = torch.linalg.solve(left, x.T @ missing[fit > 0]).T
    torch.testing.assert_close(update.double(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(router.weight.detach(), own + update.float())


def test_rows_are_matched_by_their_values():
    model = tiny_moe("mixtral")
    rows = adapter_for(model.config).router_weight(model, find_sites(model)[0])
    assert matching_rows(rows[[6, 1, 3]], rows) == [6, 1, 3]
    assert matching_rows(rows[[6]] + 1, rows) is None
    assert matching_rows(rows[:, :8], rows) is None


def test_undoing_a_refit_puts_the_routers_back_too(monkeypatch):
    losses = iter([1.0, 2.0])
    monkeypatch.setattr(api, "held_out_loss", lambda *_: next(losses))
    teacher, student = half_of("mixtral", num_hidden_layers=3)
    state = state_of(student)
    report = refit(student, teacher, text_for(teacher, rows=128), WITH_ROUTERS)
    assert any(r.kept for r in report.layers.values() if r.target == "router logits")
    assert not report.kept
    assert_same_state(student, state)


def test_a_refit_with_routers_goes_on_where_it_was_interrupted(tmp_path, no_judge):
    def run(folder, on_layer=None):
        teacher, student = half_of("mixtral", num_hidden_layers=3)
        text = text_for(teacher, rows=128)
        refit(student, teacher, text, WITH_ROUTERS, progress_folder=folder, on_layer=on_layer)
        return state_of(student)

    seen: list[str] = []

    def stop(name, _):
        seen.append(name)
        if len(seen) == 5:
            raise KeyboardInterrupt

    whole = run(None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stop)
    resumed = run(tmp_path)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())
