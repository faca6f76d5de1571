"""Low-rank reconstruction: the operators on the CPU, the Triton kernels in the interpreter, compiled for absent chips, and (where there is one) on a GPU."""
import importlib

import pytest
import torch
from kernel_runs import assert_report_is_current, compile_variants, interpret
from reconstruct_grid import BF16, CASES, EDGES, F16, F32, F64, GROUPS, KINDS, RAGGED, Case, check, error, group, problem

from tsv_nb.kernels import reconstruct as kr
from tsv_nb.kernels.reconstruct import lowrank_reconstruct, lowrank_reconstruct_grouped, reconstruct_traffic

ops = torch.ops.tsv_nb


def triple(m=20, k=3, n=12, batch=(), dtype=F32, g=None):
    g = g or torch.Generator().manual_seed(0)
    return [torch.randn(*batch, *s, generator=g).to(d) for s, d in (((m, k), dtype), ((k,), F32), ((k, n), dtype))]


# the operators on the CPU

@pytest.mark.parametrize("case", CASES, ids=str)
def test_into(case):
    p = problem(case)
    assert lowrank_reconstruct(p.U, p.S, p.Vh, p.base, case.alpha, out=p.out) is p.out
    check(case, p)


@pytest.mark.parametrize("case", [c for c in KINDS + EDGES if not c.in_place], ids=str)
def test_new(case):
    p = problem(case)
    before = [o.clone() for o in (p.U, p.S, p.Vh, p.U if p.base is None else p.base)]
    result = lowrank_reconstruct(p.U, p.S, p.Vh, p.base, case.alpha, out_dtype=case.out)
    assert result.dtype == case.out and result.shape == p.exact.shape and result.is_contiguous()
    check(case, p._replace(out=result, room=result))
    assert all(torch.equal(a, b) for a, b in zip(before, (p.U, p.S, p.Vh, p.U if p.base is None else p.base)))


def test_result_types():
    U, S, Vh = triple(dtype=BF16)
    base = torch.zeros(20, 12, dtype=F16)
    assert lowrank_reconstruct(U, S, Vh).dtype == BF16
    assert lowrank_reconstruct(U, S, Vh, base).dtype == F16
    assert lowrank_reconstruct(U, S, Vh, base, out_dtype=F32).dtype == F32
    assert lowrank_reconstruct(U, S, Vh, base, out=base).dtype == F16


@pytest.mark.parametrize("which", ["factors", "base"])
def test_float64_is_computed_in_float64(which):
    U, S, Vh = triple(dtype=F64 if which == "factors" else F32)
    base = torch.randn(20, 12, dtype=F64)
    exact = base + .3 * U.double() @ S.double().diag() @ Vh.double()
    assert error(lowrank_reconstruct(U, S.double(), Vh, base, .3), exact) < 1e-14


def test_half_is_not_rounded_in_between():
    "Sums that cancel: computed in half precision, these would lose everything."
    U, S, Vh = triple(64, 8, 64, dtype=BF16)
    exact = U.double() @ S.double().diag() @ Vh.double()
    result = lowrank_reconstruct(U, S, Vh, base=-exact.float() + 1e-3, out_dtype=F32)
    assert (result - 1e-3).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_in_place_is_out_of_place(dtype):
    U, S, Vh = triple(63, 7, 100, dtype=dtype)
    base = torch.randn(63, 100).to(dtype)
    expected = lowrank_reconstruct(U, S, Vh, base, .5)
    for other in (lambda w: w, lambda w: w.detach(), lambda w: w[:]): # the same object, and other objects for the same view
        w = base.clone()
        lowrank_reconstruct(U, S, Vh, other(w), .5, out=w)
        assert torch.equal(w, expected)


def test_live_parameter_and_gradients():
    "A parameter can be written; no graph is built, and the version counter notices."
    layer = torch.nn.Linear(12, 20)
    U, S, Vh = [o.requires_grad_() for o in triple()]
    version = layer.weight._version
    before = layer.weight.detach().clone()
    assert lowrank_reconstruct(U, S, Vh, layer.weight, out=layer.weight) is layer.weight
    assert layer.weight.requires_grad and layer.weight.is_leaf and layer.weight._version > version
    assert torch.allclose(layer.weight, before + (U * S) @ Vh, atol=1e-5)
    assert not lowrank_reconstruct(U, S, Vh, layer.weight).requires_grad
    layer(torch.randn(2, 12)).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("options", GROUPS, ids=str)
def test_grouped(options):
    cases, ps = group(options)
    factors, base = [(p.U, p.S, p.Vh) for p in ps], None if options["base"] is None else [p.base for p in ps]
    outs = [p.out for p in ps]
    results = lowrank_reconstruct_grouped(factors, base, cases[0].alpha, out=outs)
    assert all(a is b for a, b in zip(results, outs))
    for c, p in zip(cases, ps): check(c, p)


def test_grouped_makes_one_call_per_kind(monkeypatch):
    calls = []
    real = kr._reconstruct_grouped_op
    monkeypatch.setattr(kr, "_reconstruct_grouped_op", lambda *args: calls.append(len(args[0])) or real(*args))
    factors = [triple(5 + i, 2, 7, dtype=d) for i, d in enumerate((F32, BF16, F32, BF16, F32))]
    base = [torch.randn(5 + i, 7) for i in range(5)]
    results = lowrank_reconstruct_grouped(factors, base, 2.)
    assert sorted(calls) == [2, 3]
    for (U, S, Vh), b, r in zip(factors, base, results): assert error(r, b.double() + 2 * (U.double() * S) @ Vh.double()) < 1e-5
    assert lowrank_reconstruct_grouped([]) == [] and lowrank_reconstruct_grouped([], [], out=[]) == []


def test_grouped_in_place_and_new_side_by_side():
    factors, base = [triple(), triple()], [torch.randn(20, 12), torch.randn(20, 12)]
    expected = [lowrank_reconstruct(*f, b) for f, b in zip(factors, base)]
    other = torch.empty(20, 12)
    results = lowrank_reconstruct_grouped(factors, base, out=[base[0], other])
    assert results[0] is base[0] and results[1] is other and all(torch.equal(a, b) for a, b in zip(results, expected))


# what is refused

def test_errors():
    U, S, Vh = triple()
    W = torch.zeros(20, 12)
    for kind, match, call in [
        (ValueError, "unknown precision 'half'; known: None, 'ieee'", lambda: lowrank_reconstruct(U, S, Vh, precision="half")),
        (TypeError, "U is torch.int64", lambda: lowrank_reconstruct(U.long(), S, Vh)),
        (TypeError, "Vh is torch.float16 and U is torch.float32", lambda: lowrank_reconstruct(U, S, Vh.half())),
        (TypeError, "S is torch.float16", lambda: lowrank_reconstruct(U, S.half(), Vh)),
        (TypeError, "base and out must be", lambda: lowrank_reconstruct(U, S, Vh, W.long())),
        (TypeError, "base and out must be", lambda: lowrank_reconstruct(U, S, Vh, out_dtype=torch.int32)),
        (ValueError, "same k", lambda: lowrank_reconstruct(U, S[:2], Vh)),
        (ValueError, "same k", lambda: lowrank_reconstruct(U[0], S, Vh)),
        (ValueError, r"base has shape \(12, 20\)", lambda: lowrank_reconstruct(U, S, Vh, W.T)),
        (ValueError, "do not broadcast", lambda: lowrank_reconstruct(U.expand(2, 20, 3), S.expand(3, 3), Vh)),
        (ValueError, "out has shape", lambda: lowrank_reconstruct(U, S, Vh, out=W[1:])),
        (ValueError, "leave out_dtype out", lambda: lowrank_reconstruct(U, S, Vh, out=W, out_dtype=F16)),
        (ValueError, "expanded", lambda: lowrank_reconstruct(U, S, Vh, out=W[:1].expand(20, 12))),
        (ValueError, "Vh is on meta", lambda: lowrank_reconstruct(U, S, Vh.to("meta"))),
        (ValueError, "out has 1", lambda: lowrank_reconstruct_grouped([(U, S, Vh)] * 2, out=[W])),
        (ValueError, r"factors\[1\] is a batch", lambda: lowrank_reconstruct_grouped([(U, S, Vh), (U[None], S, Vh)])),
    ]:
        with pytest.raises(kind, match=match): call()


def test_overlap_is_refused_and_neighbours_are_not():
    U, S, Vh = triple(12, 3, 12)
    big = torch.zeros(25, 12)
    lowrank_reconstruct(U, S, Vh, base=big[:12], out=big[12:24])
    for base, out in ((big[:12], big[1:13]), (big[:12], big[:12].T), (big[0:24:2], big[1:25:2])):
        with pytest.raises(ValueError, match="shares memory"): lowrank_reconstruct(U, S, Vh, base=base, out=out)
    square = torch.randn(12, 12)
    with pytest.raises(ValueError, match="shares memory"): lowrank_reconstruct(square, torch.ones(12), torch.randn(12, 12), out=square)
    with pytest.raises(ValueError, match="shares memory"): lowrank_reconstruct_grouped([(U, S, Vh)] * 2, [big[:12], big[12:24]], out=[big[12:24], torch.zeros(12, 12)])


# what PyTorch requires of an operator

def op_calls():
    U, S, Vh = triple()
    W, B = torch.randn(20, 12), triple(batch=(2,))
    yield ops.lowrank_reconstruct.default, (U, S, Vh, W, .5, F32, None)
    yield ops.lowrank_reconstruct.default, (*B, None, 1., BF16, "tf32")
    yield ops.lowrank_reconstruct_.default, (W.clone(), U, S, Vh, None, .5, True, None)
    yield ops.lowrank_reconstruct_.default, (torch.empty(2, 20, 12), *B, W, .5, False, "ieee")
    yield ops.lowrank_reconstruct_grouped_.default, ([W.clone(), torch.empty(5, 7)], [U, U[:5]], [S, S], [Vh, Vh[:, :7]], [W, W[:5, :7]], .5, False, None)
    yield ops.lowrank_reconstruct_grouped_.default, ([W.clone()], [U], [S], [Vh], [], .5, True, None)


@pytest.mark.parametrize("op, args", list(op_calls()), ids=lambda o: str(o) if callable(o) else "")
def test_opcheck(op, args):
    assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}


@pytest.mark.parametrize("case", [c for c in KINDS + EDGES if not c.in_place], ids=str)
def test_fake_agrees_with_real(case):
    p = problem(case)
    args = (p.U, p.S, p.Vh, p.base)
    real = lowrank_reconstruct(*args, out_dtype=case.out)
    fake = lowrank_reconstruct(*(o if o is None else o.to("meta") for o in args), out_dtype=case.out)
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


def test_compile_has_no_breaks():
    U, S, Vh = triple()
    W, parameter = torch.randn(20, 12), torch.nn.Parameter(torch.randn(20, 12))
    def new(w): return lowrank_reconstruct(U, S, Vh, w, .5) * 2
    def into(w): return lowrank_reconstruct(U, S, Vh, w, .5, out=w).sum()
    def many(w, v): return [o + 1 for o in lowrank_reconstruct_grouped([(U, S, Vh)] * 2, [w, v], .5, out=[w, v])]
    low = .5 * (U * S) @ Vh
    def compiled(f): return torch.compile(f, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(new)(W), 2 * (W + low), atol=1e-5)
    for w in (W.clone(), parameter):
        expected = w.detach() + low
        compiled(into)(w)
        assert torch.allclose(w, expected, atol=1e-5)
    w, v = W.clone(), torch.zeros(20, 12)
    compiled(many)(w, v)
    assert torch.allclose(w, W + low, atol=1e-5) and torch.allclose(v, low, atol=1e-5)


def test_reloading_the_module_registers_again():
    module = importlib.reload(kr)
    U, S, Vh = triple()
    assert torch.allclose(module.lowrank_reconstruct(U, S, Vh), (U * S) @ Vh, atol=1e-5)
    assert torch.allclose(ops.lowrank_reconstruct(U, S, Vh, None, 1., F32, None), (U * S) @ Vh, atol=1e-5)


def test_traffic():
    assert reconstruct_traffic((2, 10, 20), 3, BF16, out_dtype=F32) == (2 * (3 * 30 * 2 + 3 * 4 + 200 * 8), 2 * (1200 + 30 + 200))
    assert reconstruct_traffic((10, 20), 0) == (1600, 200)


# the Triton kernels without a GPU

def test_in_the_interpreter(): interpret("reconstruct_cases.py", 150)


MODULES = ["tsv_nb.kernels.reconstruct_triton", "tsv_nb.kernels.grouped_triton"]


@pytest.mark.parametrize("module", MODULES)
def test_compiles_and_fits(tmp_path, module):
    "A choice that has every tile size, type and precision on every chip; all combinations are in the slow test and in benchmarks/compile_report.py."
    report = compile_variants(module, tmp_path)
    assert report["compiled"] >= 14 and not report["bad"], report["bad"]


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_all_compile_and_fit(tmp_path, request, module):
    if "slow" not in request.config.getoption("-m"): pytest.skip("takes minutes; run with -m slow")
    report = compile_variants(module, tmp_path, "all")
    assert report["compiled"] == report["listed"] > 100 and not report["bad"], report["bad"]


def test_the_committed_report_is_of_these_programs():
    pytest.importorskip("triton")
    from tsv_nb.kernels import grouped_triton, reconstruct_triton
    assert max(len(reconstruct_triton.CONFIGS), len(grouped_triton.GROUPED_CONFIGS)) <= 6
    assert_report_is_current(reconstruct_triton.aot_variants() + grouped_triton.aot_variants())


# on a GPU

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cuda(case, precision):
    p = problem(case, "cuda")
    lowrank_reconstruct(p.U, p.S, p.Vh, p.base, case.alpha, out=p.out, precision=precision)
    e = check(case, p, 1e-2 if precision == "tf32" else None)
    print(f"{precision}: {e:.1e}")


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("options", GROUPS, ids=str)
def test_cuda_grouped(options):
    cases, ps = group(options, RAGGED, "cuda")
    lowrank_reconstruct_grouped([(p.U, p.S, p.Vh) for p in ps], None if options["base"] is None else [p.base for p in ps], cases[0].alpha, out=[p.out for p in ps])
    for c, p in zip(cases, ps): check(c, p)


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32"])
def test_cuda_repeats_bit_for_bit(precision):
    case = Case(781, 1000, 100)
    p = problem(case, "cuda")
    def run(): return lowrank_reconstruct(p.U, p.S, p.Vh, p.base, precision=precision), *lowrank_reconstruct_grouped([(p.U, p.S, p.Vh)] * 3, [p.base] * 3, precision=precision)
    first = run()
    for _ in range(20): assert all(torch.equal(a, b) for a, b in zip(first, run()))
