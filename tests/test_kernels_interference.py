import importlib
import subprocess
import sys

import pytest
import torch
from kernel_runs import assert_report_is_current, compile_variants, interpret, too_big
from interference_grid import BLOCKS, DTYPES, SHAPES, factors, literal, loose, relative
from torch.utils.flop_counter import FlopCounterMode

from tsv_nb import Factors, stack_factors, truncated_svd
from tsv_nb.kernels import interference as module
from tsv_nb.kernels.interference import ROUTES, interference_score, interference_traffic

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 1e-5} # the factors are given: half precision costs nothing


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, m, n, k", SHAPES)
def test_routes_against_the_formula(T, m, n, k, dtype, route):
    f = factors(T, m, n, k, dtype=dtype)
    got = interference_score(*f, route=route)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative(got, literal(*f)) < TOLERANCE[dtype]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("lead", [(1,), (3,), (2, 3)])
def test_batches(lead, route, monkeypatch):
    f = factors(3, 20, 16, 4, lead)
    want = literal(*f)
    assert relative(interference_score(*f, route=route), want) < 1e-5
    monkeypatch.setattr(module, "WORKSPACE", 5000) # two layers at a time
    assert relative(interference_score(*f, route=route), want) < 1e-5


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("lead, T, m, n, k", [((), 0, 5, 4, 2), ((), 3, 5, 4, 0), ((), 3, 0, 4, 0), ((), 3, 5, 0, 0), ((0,), 3, 5, 4, 2), ((2, 0), 2, 5, 4, 2), ((2,), 0, 5, 4, 2)])
def test_empty(lead, T, m, n, k, route):
    U, S, Vh = torch.ones(*lead, T, m, k), torch.ones(*lead, T, k), torch.ones(*lead, T, k, n)
    got = interference_score(U, S, Vh, route=route)
    assert got.shape == lead and got.dtype == torch.float32 and not got.any()


@pytest.mark.parametrize("route", ROUTES)
def test_exact_zeros(route):
    "One task, also in half precision; tasks apart on both sides."
    for dtype in DTYPES: assert interference_score(*factors(1, 60, 50, 30, dtype=dtype), route=route).item() == 0
    e = torch.eye(12)
    U, Vh = torch.stack([e[:, 3 * t:3 * t + 3] for t in range(4)]), torch.stack([e[3 * t:3 * t + 3] for t in range(4)])
    assert interference_score(U, torch.rand(4, 3), Vh, route=route).item() == 0


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ranks_padded_with_zeros(g, dtype, route):
    factors = [truncated_svd(torch.randn(m, n, generator=g), k) for m, n, k in [(20, 16, 5), (20, 16, 2), (20, 16, 16), (20, 16, 1)]]
    f = Factors(*(o.to(dtype) for o in stack_factors(factors)))
    got, want = interference_score(*f, route=route), literal(*f)
    assert relative(got, want) < TOLERANCE[dtype]
    U, S, V = (torch.cat([o.to(dtype).double() for o in p], -1) for p in zip(*((f.U, f.S, f.Vh.T) for f in factors)))
    task = torch.tensor([0] * 5 + [1] * 2 + [2] * 16 + [3])
    between = task[:, None] != task
    ragged = ((U.T @ U * between) * S @ (V.T @ V * between)).abs().sum() # the formula without any padding
    assert relative(got, ragged) < TOLERANCE[dtype]


@pytest.mark.parametrize("route", ROUTES)
def test_vectors_need_not_be_orthonormal(route):
    f = loose(4, 10, 9, 6)
    assert relative(interference_score(*f, route=route), literal(*f)) < 1e-5


@pytest.mark.parametrize("route", ROUTES)
def test_invariants(route):
    "Permuting tasks, swapping the two sides, scaling."
    U, S, Vh = factors(5, 20, 14, 6, dtype=torch.float64)
    score = lambda *f: interference_score(*f, route=route).item()
    base, order = score(U, S, Vh), torch.tensor([3, 0, 4, 1, 2])
    assert score(U[order], S[order], Vh[order]) == pytest.approx(base, rel=1e-12)
    assert score(Vh.mT, S, U.mT) == pytest.approx(base, rel=1e-12)
    assert score(U, 3 * S, Vh) == pytest.approx(3 * base, rel=1e-12)
    assert score(-U, S, Vh) == pytest.approx(base, rel=1e-12)


@pytest.mark.parametrize("route", ROUTES)
def test_strides_and_dtypes_of_S(route):
    U, S, Vh = factors(3, 20, 14, 6, (2,))
    want = literal(U, S, Vh)
    wide = torch.full((2, 3, 6, 30), float("nan"))
    wide[..., 1:29:2] = Vh
    f = U.mT.contiguous().mT, torch.stack([S, S], -1)[..., 0], wide[..., 1:29:2]
    assert not any(o.is_contiguous() for o in f)
    before = [o.clone() for o in f]
    assert relative(interference_score(*f, route=route), want) < 1e-5
    assert all(torch.equal(a, b) for a, b in zip(f, before))
    assert relative(interference_score(U, S.double(), Vh, route=route), want) < 1e-5
    half = U.bfloat16(), S, Vh.bfloat16()
    assert relative(interference_score(*half, route=route), literal(*half)) < 1e-5
    one = U[:1].expand(2, 3, 20, 6), S[:1].expand(2, 3, 6), Vh[:1].expand(2, 3, 6, 14)
    assert relative(interference_score(*one, route=route), literal(*one)) < 1e-5


@pytest.mark.parametrize("T, m, n, k", SHAPES)
def test_operations_counted_in_a_run(T, m, n, k):
    "FlopCounterMode sees every product of the torch implementation; it does not know the in-place form by itself."
    rows = module._rows(*(o[None] for o in factors(T, m, n, k)))
    known = {torch.ops.aten.baddbmm_: lambda out, a, b, *_, out_shape=None, **__: 2 * a[0] * a[1] * a[2] * b[2]}
    for name, run in ROUTES.items():
        with FlopCounterMode(display=False, custom_mapping=known) as counter: run(*rows, T)
        assert counter.get_total_flops() == interference_traffic(T, m, n, k, route=name).flops


def test_router():
    assert interference_traffic(2, 1024, 1024, 512).route == "gram"
    assert interference_traffic(8, 1024, 1024, 1024).route == "push"
    for T, m, n, k in SHAPES:
        routes = {r: interference_traffic(T, m, n, k, route=r) for r in ROUTES}
        assert interference_traffic(T, m, n, k).flops == min(o.flops for o in routes.values())
    half, full = (interference_traffic(8, 64, 64, 8, d, "gram").bytes for d in (torch.bfloat16, torch.float32))
    assert half < full


def test_operator(g):
    for lead in ((), (2,)):
        f = factors(3, 10, 8, 2, lead)
        torch.library.opcheck(torch.ops.tsv_nb.interference_score.default, (*f, "", ""))
        for dtype in DTYPES: torch.library.opcheck(torch.ops.tsv_nb.interference_score.default, (*(o.to(dtype) for o in f), "ieee", "push"))


def test_compiled_without_a_graph_break():
    f = factors(3, 10, 8, 2, (2,))
    compiled = torch.compile(lambda *f: 2 * interference_score(*f), fullgraph=True)
    assert relative(compiled(*f), 2 * literal(*f)) < 1e-5


def test_gradients_autocast_and_inference_mode():
    f = factors(3, 10, 8, 2)
    want = literal(*f)
    assert not interference_score(*(torch.nn.Parameter(o) for o in f)).requires_grad
    with torch.autocast("cpu", torch.bfloat16): assert relative(interference_score(*f), want) < 1e-5
    with torch.inference_mode(): assert relative(interference_score(*f), want) < 1e-5


def test_nan_is_not_swallowed():
    U, S, Vh = factors(3, 10, 8, 2)
    U[1, 0, 0] = float("nan")
    for route in ROUTES: assert interference_score(U, S, Vh, route=route).isnan()


def test_errors():
    U, S, Vh = factors(3, 10, 8, 2)
    for bad, message in [((U, S, Vh[:, :1]), r"expected U \(..., T, m, k\).*Vh \(3, 1, 8\)"), ((U[0], S[0], Vh[0]), "stack the tasks first"), ((U, S[:2], Vh), "same leading dimensions"),
                         ((U[None], S, Vh), "same leading dimensions")]:
        with pytest.raises(ValueError, match=message): interference_score(*bad)
    with pytest.raises(TypeError, match="U is torch.float32 and Vh is torch.float64"): interference_score(U, S, Vh.double())
    with pytest.raises(TypeError, match="floating-point"): interference_score(U.long(), S, Vh.long())
    with pytest.raises(ValueError, match="U is on meta, S on cpu"): interference_score(U.to("meta"), S, Vh.to("meta"))
    with pytest.raises(ValueError, match="unknown precision 'fp8'; known: None, 'ieee', 'tf32x3', 'tf32'"): interference_score(U, S, Vh, precision="fp8")
    with pytest.raises(ValueError, match="unknown route 'fast'; known: None, 'gram', 'push'"): interference_score(U, S, Vh, route="fast")


def test_loaded_twice():
    "A notebook may reload the module; the operator is registered once."
    importlib.reload(module)
    assert relative(module.interference_score(*factors(3, 10, 8, 2)), literal(*factors(3, 10, 8, 2))) < 1e-5


def test_import_does_not_need_triton():
    code = "import sys; sys.modules['triton'] = None; from tsv_nb.kernels.interference import interference_score; import torch; print(interference_score(torch.ones(2, 3, 1), torch.ones(2, 1), torch.ones(2, 1, 3)).item())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "18.0"


def test_in_the_interpreter(): interpret("interference_cases.py", 80)


MODULE = "tsv_nb.kernels.interference_triton"


def test_compiles_and_fits(tmp_path):
    "A choice that has every tile size, type and precision on every chip; all combinations are in the slow test and in benchmarks/compile_report.py."
    report = compile_variants(MODULE, tmp_path)
    assert report["compiled"] >= 27 and not too_big(report["bad"]), report["bad"]


@pytest.mark.slow
def test_all_compile_and_fit(tmp_path, request):
    if "slow" not in request.config.getoption("-m"): pytest.skip("takes minutes; run with -m slow")
    report = compile_variants(MODULE, tmp_path, "all")
    assert report["compiled"] == report["listed"] == 160 and not report["bad"], report["bad"]


def test_the_committed_report_is_of_these_programs():
    pytest.importorskip("triton")
    from tsv_nb.kernels.interference_triton import CONFIGS, aot_variants
    assert len(CONFIGS) <= 6
    assert_report_is_current(aot_variants())


@pytest.fixture
def poisoned(monkeypatch):
    "On the device, new memory starts as NaN."
    if not torch.cuda.is_available(): pytest.skip("needs a GPU")
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: o.fill_(float("nan")) if (o := empty(*shape, **options)).is_cuda and o.is_floating_point() and not o.requires_grad else o)


@pytest.mark.cuda
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, m, n, k", SHAPES)
def test_cuda_against_the_formula(poisoned, T, m, n, k, dtype, route):
    f = factors(T, m, n, k, dtype=dtype, device="cuda")
    errors = {p: relative(interference_score(*f, precision=p, route=route), literal(*f)) for p in ("ieee", "tf32x3", "tf32")}
    assert max(errors["ieee"], errors["tf32x3"]) < 1e-5 and errors["tf32"] < 1e-2, errors


@pytest.mark.cuda
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("config", range(4))
@pytest.mark.parametrize("T, m, n, k", BLOCKS)
def test_cuda_every_configuration(poisoned, T, m, n, k, config, route, monkeypatch):
    "Also: twenty runs give the same bits."
    from tsv_nb.kernels import interference_triton
    monkeypatch.setattr(interference_triton, "CONFIGS", interference_triton.CONFIGS[config:config + 1])
    f = tuple(o.cuda() for o in loose(T, m, n, k))
    for precision in ("ieee", "tf32x3"):
        scores = torch.stack([interference_score(*f, precision=precision, route=route) for _ in range(20)])
        assert relative(scores[0], literal(*f)) < 1e-5 and (scores == scores[0]).all(), precision


@pytest.mark.cuda
@pytest.mark.parametrize("route", ROUTES)
def test_cuda_batches_zeros_and_strides(poisoned, route):
    for lead in ((0,), (3,), (2, 2)):
        f = factors(3, 20, 18, 17, lead or (1,)) if 0 not in lead else (torch.ones(0, 3, 20, 17), torch.ones(0, 3, 17), torch.ones(0, 3, 17, 18))
        assert relative(interference_score(*(o.cuda() for o in f), route=route), literal(*f)) < 1e-5
    U, S, Vh = factors(3, 20, 24, 7, (2,), device="cuda")
    wide = torch.full((2, 3, 7, 50), float("nan"), device="cuda")
    wide[..., 1:49:2] = Vh
    assert relative(interference_score(U.mT.contiguous().mT, torch.stack([S, S], -1)[..., 0], wide[..., 1:49:2], route=route), literal(U, S, Vh)) < 1e-5
    assert not interference_score(*factors(1, 80, 75, 40, device="cuda"), route=route).any()


@pytest.mark.cuda
def test_cuda_operator(poisoned):
    f = factors(3, 40, 30, 20, (2,), device="cuda")
    torch.library.opcheck(torch.ops.tsv_nb.interference_score.default, (*f, "", ""))
    assert relative(torch.compile(interference_score, fullgraph=True)(*f), literal(*f)) < 1e-5
