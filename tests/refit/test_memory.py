"""Budgets: features that go to disk, and the solver that fits."""

import re

import pytest
import torch

from lit_moe.errors import LitMoEError
from lit_moe.refit import RefitOptions, api, refit
from lit_moe.refit.memory import LayerSize, choose_solver
from lit_moe.refit.seidel import GaussSeidel
from lit_moe.refit.sequential import SequentialRefit
from lit_moe.refit.store import PieceStore
from tests.refit.models import assert_same_state, downs_of, half_of, state_of, text_for
from tests.refit.pieces import SHAPE, random_pieces


def test_features_beyond_the_budget_go_to_disk_and_come_back(tmp_path):
    pieces = random_pieces(count=4)
    size = pieces[0].features.numel() * 4
    store = PieceStore(2 * size, tmp_path)
    for piece in pieces:
        store.add(piece)
    assert store.spilled
    assert len(list(tmp_path.rglob("*.bin"))) == 2
    for piece, kept in zip(pieces, store, strict=True):
        assert torch.equal(kept.features, piece.features)
        assert torch.equal(kept.residual, piece.residual)
    in_memory, on_disk = (
        GaussSeidel(list(p), SHAPE, keep_blocks=True).solve(0.1) for p in (pieces, store)
    )
    assert torch.equal(in_memory, on_disk)
    store.clear()
    assert (len(store), store.spilled, list(tmp_path.iterdir())) == (0, False, [])


def test_a_refit_that_spills_gives_the_same_weights(monkeypatch, no_judge):
    spilled: list[int] = []
    on_disk = PieceStore._on_disk

    def noted(self, features):
        spilled.append(len(features))
        return on_disk(self, features)

    monkeypatch.setattr(PieceStore, "_on_disk", noted)
    found = []
    for memory_gib in (1.0, 5e-4):  # 268 kB for matrices, 134 kB for features
        teacher, student = half_of("mixtral", num_hidden_layers=1)
        options = RefitOptions(solver="gauss_seidel", lam=0.1, memory_gib=memory_gib)
        refit(student, teacher, text_for(teacher, rows=128, length=24), options)
        found.append((downs_of(student)["model.layers.0.mlp"]["down"], len(spilled)))
    (generous, none), (tight, some) = found
    assert none == 0 < some
    assert torch.equal(tight, generous)


@pytest.mark.parametrize("router", [False, True])
def test_features_of_one_batch_at_a_time_are_held_outside_the_budget(router, monkeypatch, no_judge):
    waiting: list[int] = []
    piece_of = SequentialRefit._piece

    def noted(self, *args):
        waiting.append(len(self._slots))
        return piece_of(self, *args)

    monkeypatch.setattr(SequentialRefit, "_piece", noted)
    teacher, student = half_of("mixtral", num_hidden_layers=2)
    text = text_for(teacher, rows=48, length=24, batches=6)
    refit(student, teacher, text, RefitOptions(lam=0.1, router=router))
    assert waiting == [1] * 12


@pytest.mark.parametrize(
    ("mode", "names"),
    [
        ("sequential", ["joint", "gauss_seidel"]),
        ("parallel", ["joint", "jacobi", "gauss_seidel"]),
    ],
)
def test_solvers_give_way_as_the_budget_shrinks_until_the_number_needed_is_named(mode, names):
    size = LayerSize(64, 128, 32)
    at_once = 8 if mode == "parallel" else 1
    chosen, refusal = shrinking_budgets(size, mode, at_once)
    assert list(dict.fromkeys(choice.name for choice in chosen)) == names
    assert [c.bytes for c in chosen] == sorted((c.bytes for c in chosen), reverse=True)
    assert chosen[0].dtype == torch.float64
    assert "fits memory_gib=64" in chosen[0].reason
    assert "does not fit" in chosen[-1].reason
    named = re.search(r"set memory_gib to (\S+) or more", refusal)
    assert named is not None
    enough = RefitOptions(mode=mode, memory_gib=float(named[1]))
    assert choose_solver(size, enough, at_once=at_once).name == names[-1]


def shrinking_budgets(size, mode, at_once):
    """The choices for ever smaller budgets, and the refusal of the smallest."""
    chosen, budget = [], 64.0
    while True:
        options = RefitOptions(mode=mode, memory_gib=budget)
        try:
            chosen.append(choose_solver(size, options, at_once=at_once))
        except LitMoEError as error:
            return chosen, str(error)
        assert chosen[-1].bytes <= options.matrix_bytes
        budget /= 1.3


def test_layers_in_parallel_share_the_budget():
    size, options = LayerSize(64, 128, 32), RefitOptions(mode="parallel", memory_gib=2.5)
    names = [choose_solver(size, options, at_once=n).name for n in (1, 5, 1000)]
    assert names == ["joint", "jacobi", "gauss_seidel"]


def test_a_solver_that_was_asked_for_is_taken_or_refused():
    size = LayerSize(64, 128, 32)
    for name in ("joint", "jacobi", "gauss_seidel"):
        choice = choose_solver(size, RefitOptions(solver=name))
        assert (choice.name, choice.reason) == (name, "asked for")
    with pytest.raises(LitMoEError, match="joint needs at least .* 64 experts of width 128"):
        choose_solver(size, RefitOptions(solver="joint", memory_gib=0.1))


@pytest.mark.parametrize("memory_gib", [1.0, 4e-4])
def test_undoing_is_exact_whatever_the_budget(memory_gib, monkeypatch):
    losses = iter([1.0, 2.0])
    monkeypatch.setattr(api, "held_out_loss", lambda *_: next(losses))
    teacher, student = half_of("gpt_oss")
    state = state_of(student)
    options = RefitOptions(solver="gauss_seidel", memory_gib=memory_gib)
    report = refit(student, teacher, text_for(teacher), options)
    assert all(layer.kept for layer in report.layers.values())
    assert not report.kept
    assert_same_state(student, state)
