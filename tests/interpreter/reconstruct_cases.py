"""The reconstruction kernels in Triton's interpreter. Run by tests/test_kernels_reconstruct.py in a process of its own, with TRITON_INTERPRET=1."""
import pytest
import torch
import triton
from reconstruct_grid import CASES, F32, GROUPS, Case, check, group, problem

from tsv_nb.kernels import grouped_triton, tiles_triton
from tsv_nb.kernels import reconstruct_triton as rt
from tsv_nb.kernels.grouped_triton import GROUPED_CONFIGS, launch_grouped
from tsv_nb.kernels.reconstruct_triton import CONFIGS, launch_reconstruct


@pytest.mark.parametrize("case", [c for c in CASES if c.m * c.n * c.k < 1e7], ids=str) # the few large ones would take longer than all others
def test_plain(case):
    p = problem(case)
    launch_reconstruct(p.out, p.U, p.S, p.Vh, p.base, case.alpha)
    check(case, p)


@pytest.mark.parametrize("config", dict.fromkeys(CONFIGS + rt.OTHER_CONFIGS + GROUPED_CONFIGS), ids=str)
@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32"]) # ieee and tf32x3 are one arithmetic in the interpreter; the code paths differ
def test_every_config(config, precision):
    loose = 1e-3 if precision == "tf32" else None # factors are rounded to TF32, here too
    for case in (Case(100, 131, 33), Case(129, 63, 17, batch=(2,), layout="sliced")):
        p = problem(case)
        launch_reconstruct(p.out, p.U, p.S, p.Vh, p.base, case.alpha, precision, config)
        check(case, p, loose)
    cases, ps = group({}, [(100, 131, 33), (65, 20, 5)])
    launch_grouped(*zip(*[(p.out, p.U, p.S, p.Vh, p.base) for p in ps]), alpha=cases[0].alpha, precision=precision, config=config)
    for c, p in zip(cases, ps): check(c, p, loose)


@pytest.mark.parametrize("options", GROUPS, ids=str)
def test_grouped(options):
    cases, ps = group(options)
    out, U, S, Vh, base = zip(*[(p.out, p.U, p.S, p.Vh, p.base) for p in ps])
    for config in (None, GROUPED_CONFIGS[0]):
        for p, b in zip(ps, [problem(c).base for c in cases]):
            if options["in_place"]: p.out.copy_(b)
        launch_grouped(out, U, S, Vh, None if options["base"] is None else base, cases[0].alpha, config=config)
        for c, p in zip(cases, ps): check(c, p)


@pytest.mark.parametrize("shapes", [[(64, 32, 16), (128, 48, 32)], [(64, 32, 5), (128, 48, 7)], [(64, 32, 16), (1, 48, 16)]], ids=str)
def test_grouped_hints(shapes):
    "Aligned matrices, aligned rows with odd ranks, and a single row."
    cases, ps = group({}, shapes)
    outs = [torch.full_like(p.exact, float("nan"), dtype=F32) for p in ps] # aligned, unlike the views in the poisoned rooms
    launch_grouped(outs, *zip(*[(p.U, p.S, p.Vh, p.base) for p in ps]), alpha=cases[0].alpha)
    for o, c, p in zip(outs, cases, ps): check(c, p._replace(out=o, room=o))


@pytest.mark.parametrize("launch", ["plain", "grouped"])
def test_strides_beyond_32_bits_within_a_tile(launch):
    "Rows eight million numbers apart: the last of 300 would be beyond what an offset of 32 bits reaches, three are enough to take that path."
    case = Case(3, 40, 5)
    p, stride = problem(case), 2**23
    far = torch.full((2 * stride + 40,), float("nan"))
    out = far.as_strided((3, 40), (stride, 1))
    assert tiles_triton._wide(out) and not tiles_triton._wide(p.out)
    if launch == "plain": launch_reconstruct(out, p.U, p.S, p.Vh, p.base, case.alpha)
    else: launch_grouped([out], [p.U], [p.S], [p.Vh], [p.base], case.alpha)
    check(case, p._replace(out=out, room=far))


def test_strides_of_a_wide_factor():
    "Steps along the rank add up to more than 32 bits."
    room = torch.empty(2**26 * 39 + 8, dtype=torch.half) # 5 GB of addresses, of which some pages are touched
    V = room.as_strided((40, 8), (2**26, 1)).copy_(torch.randn(40, 8))
    U, S = torch.randn(20, 40).half(), torch.rand(40)
    for launch in (launch_reconstruct, lambda out, *f: launch_grouped([out], *([o] for o in f))):
        out = torch.full((20, 8), float("nan"))
        launch(out, U, S, V)
        assert torch.allclose(out, U.float() * S @ V.float(), atol=1e-4)


@pytest.mark.parametrize("bits", [0x7fffffff, -1, 0x7fc00000])
@pytest.mark.parametrize("precision", ["ieee", "tf32x3", "tf32"])
def test_nan_stays(bits, precision):
    "The first one is what NVIDIA's chips make; rounding carries over its bits, to zero."
    nan, out = torch.tensor(bits, dtype=torch.int32).view(torch.float32), torch.empty(40, 48)
    U, S, Vh = torch.randn(40, 17), torch.rand(17), torch.randn(17, 48)
    U[3, 2] = Vh[1, 5] = nan
    launch_reconstruct(out, U, S, Vh, precision=precision)
    assert torch.equal(out.isnan(), ((torch.arange(40) == 3)[:, None] | (torch.arange(48) == 5)))


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_small_components_keep_their_digits(dtype):
    "Orthonormal columns have small entries, and singular values fall: in float16 the second part must not sink below its smallest number."
    U, S = torch.linalg.qr(torch.randn(300, 64))[0].to(dtype), torch.arange(1., 65)**-2
    a, unit = rt._scaled(U[None], S[None], -1., "split")
    A = (a[0, 0].double() + a[0, 1].double()) * unit[0, :, None].double()
    want = -U.double() * S.double()
    assert ((A - want).norm(dim=0) / want.norm(dim=0)).max() < {torch.half: 1e-5, torch.bfloat16: 2e-5}[dtype]
    assert (A - want).norm() / want.norm() < {torch.half: 1e-6, torch.bfloat16: 1.5e-5}[dtype]
    b, units = rt._scaled(U.expand(3, -1, -1), S.expand(3, -1), -1., "split")
    assert b.stride(0) == units.stride(0) == 0 and torch.equal(b[2], a[0]) and len(b) == len(units) == 3


def test_hints_promise_no_more_than_is_true():
    even = torch.zeros(64, 48)
    odd = torch.zeros(65 * 49 + 8)
    for expected, tensors in [(16, [even]), (16, [even, torch.zeros(0, 5)]), (16, [odd[:48][None]]), (1, [even, even[:, 16:40]]), (1, [torch.zeros(64, 41)]), (1, [even[:, 1:17]]),
                              (1, [odd[: 65 * 49].view(65, 49)[:, :48]]), (0, [even.T]), (0, [even, even[:, ::2]]), (1, [torch.zeros(5, 7)[:, ::7]])]:
        assert grouped_triton._hint(tensors) == expected, [(o.shape, o.stride()) for o in tensors]


def test_plain_and_grouped_agree_bit_for_bit():
    cases, ps = group({})
    _, qs = group({})
    launch_grouped(*zip(*[(p.out, p.U, p.S, p.Vh, p.base) for p in ps]), alpha=.3, config=CONFIGS[0])
    for p, q in zip(ps, qs):
        launch_reconstruct(q.out, q.U, q.S, q.Vh, q.base, .3, config=CONFIGS[0])
        assert torch.equal(p.out, q.out)


def test_nothing_to_do():
    launch_grouped([], [], [], [])
    launch_reconstruct(torch.empty(0, 5), torch.empty(0, 3), torch.empty(3), torch.empty(3, 5))


def test_tables_are_built_once_and_dropped_when_old():
    cases, ps = group({}, [(20, 10, 3), (7, 9, 2)])
    args = list(zip(*[(p.out, p.U, p.S, p.Vh, p.base) for p in ps]))
    grouped_triton._TABLES.clear()
    launch_grouped(*args)
    first = next(iter(grouped_triton._TABLES.values()))
    launch_grouped(*args)
    assert len(grouped_triton._TABLES) == 1 and next(iter(grouped_triton._TABLES.values())) is first
    kept = [torch.empty(20, 10) for _ in range(grouped_triton._MAX_TABLES + 3)]
    for o in kept: launch_grouped([o, ps[1].out], *args[1:])
    assert len(grouped_triton._TABLES) == grouped_triton._MAX_TABLES and all(o is not first for o in grouped_triton._TABLES.values())


def test_the_tuner_never_touches_the_live_result(monkeypatch):
    "With a timer that runs each candidate three times, an in-place call still adds the update once."
    runs = []
    def fake_bench(run, **options): [run() for _ in range(3)]; runs.append(1); return -len(runs)
    def tune(key, configs, run, device): return max(configs, key=lambda c: fake_bench(lambda: run(c)))
    monkeypatch.setattr(rt, "best_config", tune)
    case = Case(63, 100, 17, in_place=True)
    p = problem(case)
    launch_reconstruct(p.out, p.U, p.S, p.Vh, p.base, case.alpha)
    assert len(runs) == len(rt.OTHER_CONFIGS)
    check(case, p)


def test_aligned_matrices_have_more_candidates(monkeypatch):
    seen = []
    monkeypatch.setattr(rt, "best_config", lambda key, configs, run, device: seen.append(configs) or configs[-1])
    for m, n, k in ((64, 128, 17), (64, 120, 16)):
        U, S, Vh, out = torch.randn(m, k), torch.rand(k), torch.randn(k, n), torch.full((m, n), float("nan"))
        launch_reconstruct(out, U, S, Vh)
        assert torch.allclose(out, (U * S) @ Vh, atol=1e-4)
    assert seen == [CONFIGS[:4], rt.OTHER_CONFIGS]


def test_the_tuner_measures_once_per_key(monkeypatch):
    timed = []
    monkeypatch.setattr(triton.testing, "do_bench", lambda run, **options: timed.append(run()) or {0: 3., 1: 1.}.get(len(timed) - 1, 2.))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tiles_triton, "_BEST", {})
    chosen = [tiles_triton.best_config("key", CONFIGS, lambda config: None, torch.device("cuda")) for _ in range(2)]
    assert chosen == [CONFIGS[1]] * 2 and len(timed) == len(CONFIGS)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tiles_triton.best_config("other", CONFIGS, None, torch.device("cuda")) is CONFIGS[0]
