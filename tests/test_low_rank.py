import pytest
import torch

from tsv_nb import Factors, energy_rank, numerical_rank, reconstruct, truncated_svd

SHAPES = [(1, 1), (1, 7), (7, 1), (8, 8), (63, 100), (100, 63), (3, 781)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_best_approximation_in_float64(g, shape, dtype):
    "Eckart-Young: the error of rank k is the norm of the singular values left out, and no less."
    delta = torch.randn(shape, generator=g).to(dtype)
    k = max(1, min(shape) // 2)
    f = truncated_svd(delta, k)
    assert f.U.dtype == dtype and f.matrix_shape == delta.shape and f.rank == k
    sigma = torch.linalg.svdvals(delta.double())
    error = (delta.double() - f.U.double() * f.S.double() @ f.Vh.double()).norm()
    tol = 4 * torch.finfo(dtype).eps * delta.double().norm()
    assert abs(error - sigma[k:].norm()) < tol + 1e-12
    assert (f.S.double() - sigma[:k]).abs().max() < tol


def test_batched_equals_one_by_one(g):
    batch = torch.randn(2, 3, 9, 5, generator=g)
    f = truncated_svd(batch, 2)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(reconstruct(f)[i, j], reconstruct(truncated_svd(batch[i, j], 2)), rtol=1e-4, atol=1e-5)


def test_non_contiguous_input(g):
    big = torch.randn(40, 40, generator=g)
    view = big[::3, 1::2]
    assert not view.is_contiguous()
    before = big.clone()
    torch.testing.assert_close(reconstruct(truncated_svd(view, 14)), view, rtol=1e-4, atol=1e-5)
    assert torch.equal(big, before)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (4, 20, 6)])
def test_lapack_failure_falls_back(g, shape, monkeypatch):
    "With an SVD that never converges, the factors still are those of the SVD."
    delta = torch.randn(shape, generator=g)
    exact = truncated_svd(delta, 5)
    def fail(*args, **kwargs): raise torch.linalg.LinAlgError("did not converge")
    monkeypatch.setattr(torch.linalg, "svd", fail)
    f = truncated_svd(delta, 5)
    torch.testing.assert_close(f.S, exact.S, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(reconstruct(f), reconstruct(exact), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(f.U.mT @ f.U, torch.eye(5).expand(f.U.shape[:-2] + (5, 5)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [0, -1, 9])
def test_bad_rank(rank):
    with pytest.raises(ValueError, match=r"between 1 and min\(m, n\) = 8"): truncated_svd(torch.ones(8, 10), rank)


def test_bad_method_and_shape():
    with pytest.raises(ValueError, match="unknown SVD method 'qr'; known: 'auto', 'svd'"): truncated_svd(torch.ones(2, 2), 1, "qr")
    with pytest.raises(ValueError, match="expected a matrix"): truncated_svd(torch.ones(2), 1)


def test_reconstruct_onto_a_base(g):
    base, f = torch.randn(9, 7, generator=g).bfloat16(), truncated_svd(torch.randn(9, 7, generator=g), 3)
    want = (base.double() - .7 * (f.U.double() * f.S.double() @ f.Vh.double())).bfloat16()
    got = reconstruct(f, base, -.7)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want.float(), rtol=1e-2, atol=0)


def test_rank_zero_factors_add_nothing():
    f = Factors(torch.zeros(4, 0), torch.zeros(0), torch.zeros(0, 3))
    assert torch.equal(reconstruct(f), torch.zeros(4, 3)) and torch.equal(reconstruct(f, torch.ones(4, 3)), torch.ones(4, 3))


@pytest.mark.parametrize("true_rank", [0, 1, 4, 12])
def test_numerical_rank(g, true_rank):
    x = torch.randn(60, true_rank, generator=g) @ torch.randn(true_rank, 40, generator=g)
    assert numerical_rank(torch.linalg.svdvals(x), x.shape) == true_rank


def test_energy_rank():
    S = torch.tensor([3., 2., 1., 0.]) # energies 9, 4, 1 of 14
    assert [int(energy_rank(S, f)) for f in (.1, 9 / 14, .65, 13 / 14, 13.5 / 14, 1.)] == [1, 1, 2, 2, 3, 3]
    assert energy_rank(torch.stack([S, torch.zeros(4)]), .5).tolist() == [1, 0]
    for bad in (0, -1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="fraction must be in"): energy_rank(S, bad)
