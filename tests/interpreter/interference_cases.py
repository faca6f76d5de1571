"Run in a process of its own with TRITON_INTERPRET=1: see test_kernels_interference.py."
import pytest
import torch
from interference_grid import BLOCKS, DTYPES, SHAPES, factors, literal, loose, relative

from tsv_nb.kernels import interference_triton as kernels
from tsv_nb.kernels.interference import ROUTES, _batched, _rows, interference_score
from tsv_nb.kernels.interference_triton import CONFIGS, triton_score


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    "Every output starts as NaN: an element that no program writes, or that is read before it is written, shows."
    empty = torch.empty
    monkeypatch.setattr(kernels.torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(float("nan")))


def kernel_rows(f): return _rows(*(o[None] for o in f))


def score(U, S, Vh, route, precision="ieee"): return _batched(triton_score, U, S, Vh, route, precision)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype, T, m, n, k", [(d, *s) for d in DTYPES[1:] for s in SHAPES[:10 if d != torch.bfloat16 else 4]])
def test_against_the_formula(T, m, n, k, dtype, route):
    "Bfloat16 is widened before an interpreted kernel: few cases say enough."
    f = factors(T, m, n, k, dtype=dtype)
    assert relative(triton_score(*kernel_rows(f), T, route, "ieee"), literal(*f)[None]) < 1e-5


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("config", range(len(CONFIGS)))
@pytest.mark.parametrize("T, m, n, k", BLOCKS)
def test_every_configuration(T, m, n, k, config, route, monkeypatch):
    monkeypatch.setattr(kernels, "CONFIGS", CONFIGS[config:config + 1])
    f = loose(T, m, n, k)
    assert relative(score(*f, route), literal(*f)) < 1e-5


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("lead", [(0,), (1,), (3,), (2, 2)])
def test_batches(lead, route):
    f = factors(3, 20, 16, 17, lead) if 0 in lead else factors(3, 20, 18, 17, lead)
    assert relative(score(*f, route), literal(*f)) < 1e-5


@pytest.mark.parametrize("route", ROUTES)
def test_strides(route):
    U, S, Vh = factors(3, 20, 24, 7, (2,))
    want = literal(U, S, Vh)
    wide = torch.full((2, 3, 7, 50), float("nan"))
    wide[..., 1:49:2] = Vh
    assert relative(score(U.mT.contiguous().mT, torch.stack([S, S], -1)[..., 0], wide[..., 1:49:2], route), want) < 1e-5


@pytest.mark.parametrize("route", ROUTES)
def test_exact_zeros(route):
    for k in (5, 40, 70): assert not triton_score(*kernel_rows(factors(1, 80, 75, k)), 1, route, "ieee").any()
    e = torch.eye(80)
    U, Vh = torch.stack([e[:, 20 * t:20 * t + 20] for t in range(4)]), torch.stack([e[20 * t:20 * t + 20] for t in range(4)])
    assert not score(U, torch.rand(4, 20), Vh, route).any()


@pytest.mark.parametrize("route", ROUTES)
def test_padded_ranks(route):
    U, S, Vh = factors(3, 40, 36, 20)
    U[0, :, 11:], S[0, 11:], Vh[0, 11:] = 0, 0, 0
    U[2, :, 3:], S[2, 3:], Vh[2, 3:] = 0, 0, 0
    assert relative(score(U, S, Vh, route), literal(U, S, Vh)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES[1:3], ids=str)
def test_gram_matrices_are_symmetric_and_empty_within_a_task(dtype):
    X, S, _ = kernel_rows(factors(3, 63, 50, 26, dtype=dtype))
    X, S, N, task = kernels._aligned(X), S.float(), 78, torch.arange(78) // 26
    G, A = (kernels._launch(kernels._gram_kernel, (X, S), (64, 80, 26), 1, N, True, SCALED=scaled, NEXT="ieee", PRECISION="ieee")[0] for scaled in (False, True))
    assert G.shape == A.shape == (78, 80) and G[:, N:].isnan().all() # nothing is written between the rows
    G, A, want = G[:, :N].double(), A[:, :N].double(), X[0].double() @ X[0].double().T * (task[:, None] != task)
    assert not G[task[:, None] == task].any() and torch.allclose(G, want, atol=1e-6) and torch.allclose(G, G.T, atol=1e-6)
    assert torch.allclose(A, want * S.double(), atol=1e-6)


def test_repeated_runs_are_identical():
    f = factors(3, 40, 36, 20)
    for route in ROUTES: assert len({score(*f, route).item() for _ in range(3)}) == 1


def test_the_operator_agrees():
    f = factors(4, 63, 50, 21)
    for route in ROUTES: assert relative(score(*f, route), interference_score(*f, route=route)) < 1e-5


@pytest.mark.parametrize("route", ROUTES)
def test_one_tf32_pass_is_not_biased(route):
    "Numbers are rounded to TF32, up as often as down, so that errors cancel in the sum; cut off, as the chip does by itself, they were all too small, and the score by 2e-3."
    f = factors(3, 200, 180, 50)
    assert relative(score(*f, route, "tf32"), literal(*f)) < 2e-4
    X = f[0]
    rounded = kernels._rounded(X, "tf32")
    assert not (rounded.view(torch.int32) & 0x1FFF).any() and 0 < (rounded - X).abs().max() <= 2**-11 * X.abs().max() and abs((rounded / X - 1).mean()) < 2e-5
    assert kernels._rounded(X, "tf32x3") is X and kernels._rounded(X.half(), "tf32").dtype == torch.half
    nan = torch.tensor([0x7fffffff, -1], dtype=torch.int32).view(torch.float32)
    assert kernels._rounded(nan, "tf32").isnan().all()
