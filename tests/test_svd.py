"""The routes of the truncated SVD against float64, over shapes, spectra, batches and failures."""
import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tsv_nb import numerical_rank, truncated_svd
from tsv_nb.polar import orthogonalize
from tsv_nb.svd import SVD_METHODS, exact_svd, gram, gram_eigh, gram_svd, leading_svd, randomized_svd, rayleigh_ritz, row_panels, svd_residual

METHODS = list(SVD_METHODS)
SHAPES = [(200, 80), (80, 200), (100, 100), (781, 100), (63, 64), (5, 3), (1, 9)]


def with_spectrum(s, m, g):
    "An (m, n) float64 matrix with the n given singular values."
    P, Q = (torch.linalg.qr(torch.randn(d, len(s), generator=g, dtype=torch.float64))[0] for d in (m, len(s)))
    return P * torch.as_tensor(s, dtype=torch.float64) @ Q.T


def truncation_error(f, x, k):
    "Relative distance of U S Vh from numpy's rank-k truncation in float64."
    u, s, vh = np.linalg.svd(x.double().numpy(), full_matrices=False)
    want = torch.from_numpy(u[..., :k] * s[..., None, :k] @ vh[..., :k, :])
    U, S, Vh = (o.double() for o in f)
    return ((U * S.unsqueeze(-2) @ Vh - want).norm() / want.norm()).item()


def assert_orthonormal(f, tol=2e-5):
    for X in (f[0], f[2].mT): assert (X.mT @ X - torch.eye(X.shape[-1], dtype=X.dtype)).abs().max() < tol


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_random_matrices(g, shape, method):
    "Flat spectra, the hard case: the gap between kept and dropped is small."
    x, k = torch.randn(shape, generator=g), max(1, min(shape) // 8)
    f = leading_svd(x, k, method)
    assert truncation_error(f, x, k) < 1e-4
    assert_orthonormal(f)
    assert (f[1].diff() <= 0).all()
    assert svd_residual(x, *f) < 1e-5


@pytest.mark.parametrize("decay", [0, 1, 2, 4, 6, 8])
@pytest.mark.parametrize("method", METHODS)
def test_steep_spectra(g, method, decay):
    "Singular values over `decay` powers of ten, down to below float32's noise: float32 Gram matrices alone would lose the small ones."
    s = np.logspace(0, -decay, 96) if decay else np.linspace(1.2, .8, 96)
    x = with_spectrum(s, 160, g).float()
    f = leading_svd(x, 48, method)
    assert truncation_error(f, x, 48) < 1e-4
    assert_orthonormal(f)
    exact = np.linalg.svd(x.double().numpy(), compute_uv=False)[:48]
    seen = exact > 160 * 1.2e-7
    assert np.abs(f[1].numpy()[seen] / exact[seen] - 1).max() < 5e-3


def test_the_float64_step_is_needed(g):
    "Without it, the Gram route is off by percents where sigma_k is 1e-3 of sigma_1: the test above can fail."
    x = with_spectrum(np.logspace(0, -4, 96), 160, g).float()
    exact = np.linalg.svd(x.double().numpy(), compute_uv=False)[:80]
    plain = rayleigh_ritz(x, gram_eigh(x, 80)[1])[1].numpy()
    assert np.abs(plain / exact - 1).max() > 1e-2 > 1e-4 > np.abs(gram_svd(x, 80)[1].numpy() / exact - 1).max()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("true_rank", [0, 1, 4])
def test_tiny_ranks(g, method, true_rank):
    "More components are asked for than there are: the rest is noise below the threshold, with orthonormal vectors all the same."
    x = torch.randn(160, true_rank, generator=g) @ torch.randn(true_rank, 96, generator=g)
    f = truncated_svd(x, 16, method)
    assert numerical_rank(f.S, x.shape) == true_rank
    assert_orthonormal(f)
    assert torch.isfinite(torch.cat([o.flatten() for o in f])).all()


@pytest.mark.parametrize("method", METHODS)
def test_batches_of_unequal_difficulty(g, method):
    "A batch gives what its matrices give one by one, although some of them need float64 and some are zero."
    x = torch.stack([torch.randn(130, 70, generator=g), with_spectrum(np.logspace(0, -5, 70), 130, g).float(), torch.zeros(130, 70), with_spectrum(1 / np.arange(1, 71), 130, g).float()])
    x = torch.stack([x, x.flip(0)])
    f = truncated_svd(x, 9, method)
    assert f.U.shape == (2, 4, 130, 9) and f.S.shape == (2, 4, 9) and f.Vh.shape == (2, 4, 9, 70)
    for i in range(2):
        for j in range(4):
            one = truncated_svd(x[i, j], 9, method)
            torch.testing.assert_close(f.S[i, j], one.S, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(f.U[i, j] * f.S[i, j] @ f.Vh[i, j], one.U * one.S @ one.Vh, rtol=0, atol=2e-5 * max(1, one.S[0].item()))


@pytest.mark.parametrize("method", METHODS)
def test_transposed_input_gives_transposed_factors(g, method):
    x = torch.randn(70, 150, generator=g)
    f, h = truncated_svd(x, 8, method), truncated_svd(x.mT, 8, method)
    torch.testing.assert_close(f.S, h.S, rtol=1e-5, atol=0)
    torch.testing.assert_close(f.U * f.S @ f.Vh, (h.U * h.S @ h.Vh).T, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(g, dtype):
    x = torch.randn(100, 70, generator=g).to(dtype)
    f = truncated_svd(x, 7)
    assert all(o.dtype == dtype for o in f)
    assert truncation_error(f, x, 7) < {torch.float64: 1e-12, torch.float32: 1e-4}.get(dtype, 8 * torch.finfo(dtype).eps)


def test_the_residual_is_honest(g):
    "It is large where the factors are wrong, and as large as the injected error; a fixed number of steps is not enough on a flat spectrum."
    x = with_spectrum(np.linspace(1.2, .8, 96), 160, g).float()
    *f, residual = randomized_svd(x, 16, max_iter=1)
    assert residual > 1e-3 and truncation_error(f, x, 16) > 1e-2
    *f, residual = randomized_svd(x, 16)
    assert residual < 1e-6 and truncation_error(f, x, 16) < 1e-4
    U, S, Vh = f
    wrong = S.clone(); wrong[3] *= 1.01
    assert svd_residual(x, U, wrong, Vh).item() == pytest.approx(.01 * (S[3] / S[0]).item(), rel=.05)
    assert svd_residual(x, U.flip(-1), S, Vh) > .5
    assert svd_residual(torch.zeros(9, 4), torch.eye(9)[:, :2], torch.zeros(2), torch.eye(4)[:2]) == 0


def test_randomized_hands_over_what_has_not_converged(g, monkeypatch):
    "An iteration that stops early is noticed by its residual, and the Gram route answers."
    import tsv_nb.svd as module
    x = with_spectrum(np.linspace(1.2, .8, 96), 160, g).float()
    monkeypatch.setattr(module, "_eigenblock", lambda G, Q, rank, tol, max_iter, least, inner=module._eigenblock: inner(G, Q, rank, tol, 1, least))
    assert truncation_error(leading_svd(x, 16, "randomized"), x, 16) < 1e-4


@pytest.fixture
def counted(monkeypatch):
    "How many filters and small eigenproblems there were."
    import tsv_nb.svd as module
    n = {"_filtered": 0, "_small_eigh": 0}
    def counting(name, inner): return lambda *args: (n.__setitem__(name, n[name] + 1), inner(*args))[1]
    for name in n: monkeypatch.setattr(module, name, counting(name, getattr(module, name)))
    return n


def test_filters_end_at_the_rounding_errors(g, counted):
    "A tolerance that no residual reaches, as the ordinary one is on a GPU, whose sums round otherwise: thirty filters would be in vain."
    x = with_spectrum(np.linspace(1.2, .8, 96), 160, g).float()
    *f, residual = randomized_svd(x, 16, tol=2.**-26)
    assert 2.**-26 < residual < 1e-6 and counted["_filtered"] <= 16 and truncation_error(f, x, 16) < 1e-4


def test_slow_convergence_is_not_taken_for_its_end(g, counted):
    "Small filters (a steep spectrum) gain little each, and several go between two small eigenproblems."
    x = with_spectrum(np.exp(-np.linspace(0, 6, 400)), 400, g).float()
    *f, residual = randomized_svd(x, 130, oversample=16)
    assert residual <= 4 * 2.**-23 and truncation_error(f, x, 130) < 1e-4 and 8 <= counted["_filtered"] and counted["_small_eigh"] - 1 <= .6 * counted["_filtered"]


def test_hopeless_matrices_stop_early_unless_one_is_not(g, counted):
    steep, flat = (with_spectrum(s, 160, g).float() for s in (np.r_[np.ones(4), np.linspace(.012, .008, 92)], np.linspace(1.2, .8, 96)))
    assert randomized_svd(steep, 16, least=.03)[3] == math.inf and counted["_filtered"] == 1
    assert randomized_svd(torch.stack([steep, flat]), 16, least=.03)[3].isfinite().all()
    assert randomized_svd(torch.zeros(160, 96), 9, least=.03)[3] == 0


def test_a_tolerance_of_zero_ends(g):
    *f, residual = randomized_svd(torch.randn(120, 80, generator=g), 8, tol=0.)
    assert residual < 4e-6


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("method", METHODS)
def test_all_routes_refuse_alike(g, method, bad):
    x = torch.randn(2, 120, 80, generator=g)
    x[1, 5, 6] = bad
    with pytest.raises(torch.linalg.LinAlgError): leading_svd(x, 8, method)


@pytest.mark.parametrize("allow", [lambda: torch.set_float32_matmul_precision("high"), lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
                                   lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")], ids=["torch", "allow_tf32", "fp32_precision"])
def test_products_are_not_shortened(g, monkeypatch, allow):
    "Whoever allowed TF32 for a network, by any of torch's ways, did not mean decompositions."
    import tsv_nb.polar as polar
    import tsv_nb.svd as module
    settings, seen = torch.backends.cuda.matmul, []
    if not hasattr(settings, "fp32_precision"): pytest.skip("torch before 2.9")
    before = settings.fp32_precision
    def noting(f): return lambda *args: (seen.append(settings.fp32_precision), f(*args))[1]
    monkeypatch.setitem(module.SVD_METHODS, "gram", noting(module.gram_svd))
    monkeypatch.setitem(polar.POLAR_METHODS, "eigh", noting(polar.POLAR_METHODS["eigh"]))
    try:
        allow()
        leading_svd(torch.randn(120, 80, generator=g), 8, "gram"); polar.orthogonalize(torch.randn(120, 80, generator=g), "eigh")
        assert seen == ["ieee"] * 2 and settings.fp32_precision == "tf32"
    finally: settings.fp32_precision = before; torch.set_float32_matmul_precision("highest")


def test_randomized_is_reproducible(g):
    x = torch.randn(2, 120, 80, generator=g)
    a, b, c = (randomized_svd(x, 8, seed=s) for s in (0, 0, 1))
    assert all(torch.equal(p, q) for p, q in zip(a, b)) and not torch.equal(a[0], c[0])
    torch.testing.assert_close(a[1], c[1], rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", ["rows", "columns", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_of_any_layout(g, layout, dtype):
    x = torch.randn(60, 40, generator=g, dtype=dtype)
    view = {"rows": x[:30], "columns": x.T, "strided": x[::2, ::3]}[layout]
    torch.testing.assert_close(gram(view).tril(), (view.double().T @ view.double()).tril().to(dtype), rtol=1e-5, atol=1e-5)
    assert torch.equal(gram(torch.zeros(0, 3)), torch.zeros(3, 3))


@pytest.fixture
def panels(monkeypatch):
    "Panels of 256 rows."
    monkeypatch.setattr("tsv_nb.svd.PANEL", 1)


class Float64Sizes(TorchDispatchMode):
    "Numbers of the largest float64 tensor that any operation returns."
    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for o in torch.utils._pytree.tree_leaves(result):
            if isinstance(o, torch.Tensor) and o.dtype == torch.float64: self.largest = max(self.largest, o.numel())
        return result


@pytest.mark.parametrize("rows", [255, 256, 257, 800])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_panels_cover_every_row_once(g, panels, rows, batch):
    x = torch.randn(*batch, rows, 70, generator=g)
    assert torch.equal(torch.cat(row_panels(x), -2), x) and len(row_panels(x)) == -(-rows // 256)
    want = x.double().numpy()
    np.testing.assert_allclose(gram(x, torch.float64).tril().numpy(), np.tril(want.swapaxes(-1, -2) @ want), atol=1e-12 * rows)


@pytest.mark.parametrize("method", ["auto", "gram", "randomized"])
@pytest.mark.parametrize("batch", [1, 3])
def test_panels_change_nothing(g, panels, method, batch):
    "Steep spectra (float64) beside a flat one, in panels."
    x = torch.stack([with_spectrum(s, 900, g).float() for s in (np.logspace(0, -5, 96), np.linspace(1.2, .8, 96), np.logspace(0, -8, 96))[:batch]])
    f = leading_svd(x, 40, method)
    assert truncation_error(f, x, 40) < 1e-4
    assert_orthonormal(f)


@pytest.mark.parametrize("d, K", [(900, 96), (96, 900), (300, 300)])
def test_polar_factors_in_panels(g, panels, d, K):
    x = with_spectrum(np.logspace(0, -3, min(d, K)), max(d, K), g)
    x = (x if d >= K else x.mT).float()
    u, _, vh = np.linalg.svd(x.double().numpy(), full_matrices=False)
    assert np.abs(orthogonalize(x).numpy() - u @ vh).max() < 1e-4


def test_no_float64_copy_of_a_large_matrix(g, panels):
    "The memory that plans count on: panels of 256 rows, Gram matrices, and k columns."
    x = with_spectrum(np.logspace(0, -6, 96), 4000, g).float()
    with Float64Sizes() as sizes: leading_svd(x, 30) # sigma_30 < 0.03 sigma_1
    assert 4000 * 30 == sizes.largest
    with Float64Sizes() as sizes: orthogonalize(x)
    assert 0 < sizes.largest <= 256 * 96


@pytest.mark.parametrize("method", ["auto", "gram", "randomized"])
def test_eigensolver_failure_falls_back(g, method, monkeypatch):
    "Where the eigendecomposition does not converge, the SVD answers."
    x = torch.randn(150, 90, generator=g)
    def fail(*args, **kwargs): raise torch.linalg.LinAlgError("did not converge")
    monkeypatch.setattr(torch.linalg, "eigh", fail)
    assert truncation_error(leading_svd(x, 10, method), x, 10) < 1e-4


def test_auto_takes_the_exact_route_where_it_should(g, monkeypatch):
    "Small matrices, most of the components, float64."
    import tsv_nb.svd as module
    calls = []
    monkeypatch.setattr(module, "exact_svd", lambda x, k: calls.append(tuple(x.shape)) or exact_svd(x, k))
    for x, k in ((torch.randn(90, 63), 5), (torch.randn(90, 70), 36), (torch.randn(90, 70).double(), 5), (torch.randn(90, 70), 35)): leading_svd(x, k)
    assert calls == [(90, 63), (90, 70), (90, 70)]


@pytest.mark.parametrize("method", METHODS)
def test_parameters_are_taken_as_numbers(g, method):
    x = torch.nn.Parameter(torch.stack([with_spectrum(np.logspace(0, -d, 70), 90, g).float() for d in (0, 6)]))
    for o, want in zip(leading_svd(x, 20, method), leading_svd(x.data, 20, method)): assert torch.equal(o, want) and not o.requires_grad


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (3, 0, 4, 4)])
def test_empty_input(shape):
    U, S, Vh = leading_svd(torch.zeros(shape), 0)
    assert U.shape == (*shape[:-1], 0) and S.shape == (*shape[:-2], 0) and Vh.shape == (*shape[:-2], 0, shape[-1])


def test_unknown_method():
    with pytest.raises(ValueError, match="unknown SVD method 'qr'; known: 'auto', 'svd', 'gram', 'randomized'"): truncated_svd(torch.ones(2, 2), 1, "qr")


@pytest.mark.cuda
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape, rank", [((20, 512, 128), 12), ((3, 200, 1024), 12), ((4, 96, 96), 12), ((2, 300, 257), 150), ((2, 700, 600), 170)])
def test_on_the_device(g, method, shape, rank):
    "Few components, and more than 128 columns in the small problem. Last run on an H200, November 2026."
    x = torch.randn(shape, generator=g)
    f = leading_svd(x.cuda(), rank, method)
    assert f[0].is_cuda and truncation_error([o.cpu() for o in f], x, rank) < 1e-4
    assert_orthonormal([o.cpu() for o in f])
    assert svd_residual(x.cuda(), *f).max() < 1e-5


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_components_on_the_device(g, dtype):
    "cuSOLVER's routine for float32 that torch takes by default is off by 3e-4 of the largest singular value here."
    x = torch.stack([torch.randn(500, 400, generator=g, dtype=torch.float64), with_spectrum(np.logspace(0, -5, 400), 500, g)]).to(dtype)
    f = [o.cpu() for o in leading_svd(x.cuda(), 400, "svd")]
    want = torch.linalg.svdvals(x.double())
    tol = 2e-6 if dtype == torch.float32 else 1e-13
    assert ((f[1] - want).abs().amax(-1) / want[:, 0]).max() < tol and ((f[0] * f[1].unsqueeze(-2) @ f[2] - x).norm() / x.norm()) < tol
    assert_orthonormal(f, 1e-4 if dtype == torch.float32 else 1e-12)


@pytest.mark.cuda
@pytest.mark.parametrize("method", METHODS)
def test_steep_spectra_on_the_device(g, method):
    x = torch.stack([with_spectrum(np.logspace(0, -d, 96), 160, g).float() for d in (1, 4, 6)])
    f = [o.cpu() for o in leading_svd(x.cuda(), 48, method)]
    assert all(truncation_error([o[i] for o in f], x[i], 48) < 1e-4 for i in range(3))
    assert_orthonormal(f)


@pytest.mark.cuda
def test_few_filters_on_the_device(g, counted):
    "With the spectra of fine-tuned layers; the tolerance is below what a GPU's sums reach for matrices of this size."
    x = with_spectrum(np.exp(-np.linspace(0, 5, 1024)), 1024, g).float().cuda()
    *f, residual = randomized_svd(x, 128)
    assert residual < 4e-6 and counted["_filtered"] <= 20
