"""Solvers against independent least squares on the dense feature matrix."""

import math
from dataclasses import replace

import pytest
import torch

from lit_moe.errors import LitMoEError
from lit_moe.refit import LayerRefit, RefitOptions, RefitReport, seidel
from lit_moe.refit.layer import LayerProblem, Weights
from lit_moe.refit.masked import solve_masked
from lit_moe.refit.memory import LayerSize, SolverChoice
from lit_moe.refit.ridge import SingularGramError, choose_penalty, solve_jacobi, solve_joint
from lit_moe.refit.seidel import GaussSeidel
from lit_moe.stats.grams import Gram
from tests.refit.pieces import EXPERTS, HIDDEN, SHAPE, WIDTH, random_pieces


def gram_of(pieces, *, joint=True):
    gram = Gram(*SHAPE, joint=joint)
    for piece in pieces:
        gram.add(piece)
    return gram


def rows_of(pieces):
    """Weighted dense rows ``(T, E D)`` and residuals of all tokens of the fit, in float64."""
    rows, residuals = [], []
    for piece in pieces:
        psi = torch.zeros(len(piece.residual), EXPERTS, WIDTH, dtype=torch.float64)
        psi[piece.token_ids, piece.expert_ids] = piece.features.double()
        root = piece.fit.double().sqrt()[:, None]
        rows.append(psi.flatten(1) * root)
        residuals.append(piece.residual.double() * root)
    return torch.cat(rows), torch.cat(residuals)


def least_squares(pieces, lam, support=None):
    """``lstsq`` on the rows with ``sqrt(lam m) I`` below, one output at a time on its support."""
    rows, residuals = rows_of(pieces)
    unit = rows.square().sum(0).mean()
    rows = torch.cat([rows, math.sqrt(lam * unit) * torch.eye(rows.shape[1], dtype=rows.dtype)])
    residuals = torch.cat([residuals, residuals.new_zeros(rows.shape[1], HIDDEN)])
    solution = torch.zeros(rows.shape[1], HIDDEN, dtype=torch.float64)
    for column in range(HIDDEN):
        used = slice(None) if support is None else support.flatten(0, 1)[:, column]
        solved = torch.linalg.lstsq(rows[:, used], residuals[:, column : column + 1]).solution
        solution[used, column] = solved[:, 0]
    return solution.view(SHAPE)


def half_support():
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(3)) < 0.5


@pytest.mark.parametrize("lam", [1e-6, 1e-2, 1.0, 100.0])
def test_the_joint_solution_is_that_of_least_squares(lam):
    pieces = random_pieces()
    found = solve_joint(gram_of(pieces), lam)
    torch.testing.assert_close(found, least_squares(pieces, lam), rtol=1e-4, atol=1e-6)


def test_solving_leaves_the_gram_matrix_bit_identical():
    gram = gram_of(random_pieces())
    before = gram.matrix.clone()
    solve_joint(gram, 0.1)
    assert torch.equal(gram.matrix, before)


def test_without_a_penalty_the_joint_solution_is_plain_least_squares():
    pieces = random_pieces()
    expected = torch.linalg.lstsq(*rows_of(pieces)).solution.view(SHAPE)
    torch.testing.assert_close(solve_joint(gram_of(pieces), 0.0), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lam", [1e-4, 0.1])
def test_the_masked_solution_is_least_squares_on_the_support_of_each_output(lam):
    pieces, support = random_pieces(), half_support()
    gram = gram_of(pieces)
    right, mask = (t.reshape(-1, HIDDEN) for t in (gram.cross, support))
    found = solve_masked(gram.matrix, right, lam * gram.mean_diagonal, mask).view(SHAPE)
    assert not found[~support].any()
    expected = least_squares(pieces, lam, support)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_full_support_is_no_mask():
    gram = gram_of(random_pieces())
    everywhere = torch.ones(EXPERTS * WIDTH, HIDDEN, dtype=torch.bool)
    penalty = 0.1 * gram.mean_diagonal
    found = solve_masked(gram.matrix, gram.cross.reshape(-1, HIDDEN), penalty, everywhere)
    torch.testing.assert_close(found.view(SHAPE), solve_joint(gram, 0.1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("keep_blocks", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_gauss_seidel_converges_to_the_joint_solution(keep_blocks, masked):
    pieces, support = random_pieces(), half_support() if masked else None
    sweeps = GaussSeidel(pieces, SHAPE, keep_blocks=keep_blocks, support_EDH=support)
    for lam in (1.0, 0.1, 0.01):  # each starts from the one before
        found = sweeps.solve(lam)
        assert sweeps.converged
        assert 1 < sweeps.sweeps < seidel.MAX_SWEEPS
        expected = least_squares(pieces, lam, support)
        assert float((found - expected).norm() / expected.norm()) < 1e-3
        if support is not None:
            assert not found[~support].any()


def test_sweeps_that_still_move_are_told(monkeypatch):
    monkeypatch.setattr(seidel, "MAX_SWEEPS", 2)
    sweeps = GaussSeidel(random_pieces(), SHAPE, keep_blocks=True)
    sweeps.solve(1e-3)
    assert (sweeps.sweeps, sweeps.converged) == (2, False)
    layer = LayerRefit(kept=True, sweeps=2, converged=False)
    said = RefitReport("sequential", layers={"a": layer}).sentences()
    assert any("still moving after 2 sweeps in 1 layers" in sentence for sentence in said)


def test_jacobi_with_one_expert_per_token_is_joint():
    pieces = random_pieces(top_k=1)
    joint = solve_joint(gram_of(pieces), 0.1)
    jacobi = solve_jacobi(gram_of(pieces, joint=False), 0.1, 1.0)
    torch.testing.assert_close(jacobi, joint, rtol=1e-9, atol=1e-12)


def test_jacobi_solves_each_expert_alone_and_damps_it():
    pieces = random_pieces()
    gram = gram_of(pieces, joint=False)
    found = solve_jacobi(gram, 0.1, 0.5)
    for expert in range(EXPERTS):
        penalty = 0.1 * gram.mean_diagonal * torch.eye(WIDTH, dtype=torch.float64)
        alone = torch.linalg.solve(gram.blocks[expert] + penalty, gram.cross[expert])
        torch.testing.assert_close(found[expert], 0.5 * alone, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("best", [1e-5, 1e-2, 0.3, 40.0, 1e3])
def test_the_penalty_walks_down_to_the_valley_and_tries_none_twice(best):
    tried = []

    def loss(lam):
        tried.append(lam)
        return (math.log10(lam) - math.log10(best)) ** 2

    found = choose_penalty(loss)
    assert abs(math.log10(found / best)) <= 0.25 + 1e-9
    assert len({round(math.log10(lam), 6) for lam in tried}) == len(tried)
    assert 1e-6 <= min(tried) <= max(tried) <= 1e4


def test_penalties_too_small_for_the_precision_are_passed_over():
    pieces = random_pieces()
    best = least_squares(pieces, 1e-6)
    size = LayerSize(EXPERTS, WIDTH, HIDDEN)
    choice = SolverChoice("joint", torch.float32, True, 0, "")
    problem = LayerProblem(Weights(size, 2), choice, RefitOptions(), keep_all=True)
    for piece in pieces:
        fitting = replace(piece, residual=piece.predict(best))
        problem.add(fitting, fitting.residual)

    def solve(lam):
        if lam < 2e-3:
            raise SingularGramError("singular")
        return best / (1 + lam)

    update, lam, left = problem._search(solve)
    assert lam == pytest.approx(10**-2.5)
    assert torch.equal(update, best / (1 + lam))
    assert left > 0


def test_no_penalty_and_fewer_tokens_than_features_is_refused():
    gram = gram_of(random_pieces(count=1, tokens=12))
    with pytest.raises(SingularGramError, match="of 24 features is singular with lam=0: give a"):
        solve_joint(gram, 0.0)
    assert isinstance(SingularGramError(), LitMoEError)
