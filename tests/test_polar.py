"""The routes to the polar factor, against float64, for easy, aligned, nearly singular and singular concatenations."""
import numpy as np
import pytest
import torch

from tsv_nb import orthogonalize
from tsv_nb.polar import POLAR_METHODS, newton_schulz

ACCURATE = [m for m in POLAR_METHODS if m != "eigh"] # "eigh" is the plain route, wrong on purpose where columns are nearly parallel
TOL = 64 * torch.finfo(torch.float32).eps


def polar64(X, tol=1e-7):
    "numpy, float64."
    p, s, q = np.linalg.svd(X.double().numpy(), full_matrices=False)
    return torch.from_numpy((p * (s > tol * s[..., :1])[..., None, :]) @ q)


def error(got, want): return ((got.double() - want).norm() / want.norm()).item()


def blocks(d, k, T, g, spread=1.):
    "T orthonormal (d, k) blocks side by side; with a small spread they are nearly the same."
    common = torch.randn(d, k, generator=g)
    return torch.cat([torch.linalg.qr((1 - spread) * common + spread * torch.randn(d, k, generator=g))[0] for _ in range(T)], 1)


@pytest.mark.parametrize("method", ACCURATE)
@pytest.mark.parametrize("d, k, T", [(256, 32, 8), (512, 16, 8), (700, 9, 14), (300, 100, 3), (100, 12, 8), (9, 2, 3), (64, 64, 1)])
def test_random_tasks(g, method, d, k, T):
    "Square concatenations (T k = d) are nearly singular: condition numbers of thousands."
    X = blocks(d, k, T, g)
    assert error(orthogonalize(X, method, TOL), polar64(X)) < 1e-4


@pytest.mark.parametrize("method", ACCURATE)
@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-3])
def test_aligned_tasks(g, method, spread):
    "sigma_max is the root of T, and the differences between tasks are small. (Float32 factors carry them with an error of eps / spread.)"
    X = blocks(400, 20, 8, g, spread)
    assert torch.linalg.matrix_norm(X, 2) > 2.5
    assert error(orthogonalize(X, method, TOL), polar64(X)) < 1e-5 / spread


@pytest.mark.parametrize("method", POLAR_METHODS)
def test_identical_tasks_leave_one(g, method):
    "The null space is left out, not filled with noise."
    Q = blocks(200, 20, 1, g)
    X = torch.cat([Q] * 5, 1)
    assert error(orthogonalize(X, method, TOL), torch.cat([Q.double()] * 5, 1) / 5**.5) < (1e-3 if method == "eigh" else 1e-4)


@pytest.mark.parametrize("method", ACCURATE)
def test_batch_in_which_some_are_singular(g, method):
    easy, square, same = blocks(192, 12, 8, g), blocks(96, 12, 8, g), torch.cat([blocks(192, 12, 1, g)] * 8, 1)
    batch = torch.stack([easy, torch.cat([square, torch.zeros(96, 96)]), same, torch.zeros(192, 96)])
    got = orthogonalize(batch, method, TOL)
    for i in range(3): assert error(got[i], polar64(batch[i], 1e-5)) < 1e-4
    assert not got[3].any()


@pytest.mark.parametrize("method", POLAR_METHODS)
def test_wide_input_and_zero_columns(g, method):
    X = blocks(150, 10, 8, g)
    torch.testing.assert_close(orthogonalize(X.T, method, TOL), orthogonalize(X, method, TOL).T, rtol=0, atol=1e-5)
    padded = torch.cat([X, torch.zeros(150, 5)], 1)
    got = orthogonalize(padded, method, TOL)
    assert got[:, 80:].abs().max() < 1e-6
    torch.testing.assert_close(got[:, :80], orthogonalize(X, method, TOL), rtol=0, atol=1e-4)


def test_the_plain_gram_route_loses_directions(g):
    "What the float64 step is for."
    X = blocks(256, 32, 8, g)
    assert error(orthogonalize(X, "eigh", TOL), polar64(X)) > 1e-2


def test_newton_schulz_says_when_it_has_not_converged(g):
    X = blocks(300, 10, 8, g)
    assert newton_schulz(X, TOL)[1] < 1e-6
    noisy = torch.cat([X, X[:, :3] + 1e-7 * torch.randn(300, 3, generator=g)], 1) # three directions at rounding level
    assert newton_schulz(noisy, TOL)[1] > 1e-5
    Y, residual = newton_schulz(torch.stack([X, 1e-12 * X, 1e12 * X, 0 * X]), TOL) # any scale, and nothing at all
    assert residual.max() < 1e-6 and not Y[3].any()
    for i in (1, 2): torch.testing.assert_close(Y[i], Y[0], rtol=0, atol=1e-5)


def test_half_precision_and_empty(g):
    X = blocks(100, 10, 4, g).bfloat16()
    Q = orthogonalize(X)
    assert Q.dtype == torch.bfloat16 and error(Q, polar64(X.float())) < 1e-2
    for shape in ((0, 3), (3, 0), (0, 3, 3)): assert orthogonalize(torch.zeros(shape)).shape == shape
    with pytest.raises(ValueError, match="unknown orthogonalize method 'qr'; known: 'auto', 'svd', 'eigh', 'newton_schulz'"): orthogonalize(X, "qr")


@pytest.mark.parametrize("d, K", [(300, 80), (80, 300), (30, 10)])
@pytest.mark.parametrize("method", POLAR_METHODS)
def test_parameters_are_taken_as_numbers(g, method, d, K):
    X = torch.nn.Parameter(torch.randn(d, K, generator=g))
    Q = orthogonalize(X, method)
    assert torch.equal(Q, orthogonalize(X.data, method)) and not Q.requires_grad and X.grad is None


@pytest.mark.cuda
@pytest.mark.parametrize("method", ACCURATE)
def test_on_the_device(g, method):
    "Directions down to 3e-4 of the longest one: far enough from TOL that all routes must keep them. Last run on an H200, November 2026."
    X = torch.stack([blocks(256, 32, 7, g), blocks(256, 32, 7, g, 1e-2)])
    assert error(orthogonalize(X.cuda(), method, TOL).cpu(), polar64(X)) < 1e-3


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_other_numbers_are_an_error(dtype):
    with pytest.raises(TypeError, match=f"X is {dtype}; orthogonalize takes real floating-point numbers"): orthogonalize(torch.ones(4, 3).to(dtype))


@pytest.mark.parametrize("method", POLAR_METHODS)
def test_nan_is_an_error(method):
    "A comparison with NaN is false: every direction would be left out, and the answer be zeros."
    X = torch.eye(70, 5)
    X[3, 2] = torch.nan
    with pytest.raises(ValueError, match="'X' has 1 of 350 values that are NaN"): orthogonalize(X, method)
