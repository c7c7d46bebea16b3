import pytest
import torch

from lit_moe.refit.factor import Factor


def matrix_of(size, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(size, size + 20, generator=generator, dtype=dtype)
    return rows @ rows.T / size + 0.01 * torch.eye(size, dtype=dtype)


@pytest.mark.parametrize("size", [1, 100, 512, 640, 700])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 2e-3)])
def test_solutions_are_those_of_an_independent_solver(size, dtype, bound):
    matrix = matrix_of(size, dtype)
    kept = matrix.clone()
    right = torch.randn(size, 7, generator=torch.Generator().manual_seed(1), dtype=dtype)
    found = Factor(matrix).solve(right)
    expected = torch.linalg.solve(matrix.double(), right.double())
    assert float((found - expected).norm() / expected.norm()) < bound
    assert torch.equal(matrix, kept)


@pytest.mark.parametrize("size", [100, 700])
@pytest.mark.parametrize("row", [0, -1])
def test_a_matrix_that_is_not_definite_is_told(size, row):
    matrix = matrix_of(size, torch.float64)
    matrix[row, row] = -1.0
    assert not Factor(matrix).is_definite
    matrix[row, row] = float("nan")
    assert not Factor(matrix).is_definite


def test_a_matrix_of_lower_rank_is_told():
    rows = torch.randn(600, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert not Factor(rows @ rows.T - 1e-6 * torch.eye(600, dtype=torch.float64)).is_definite
