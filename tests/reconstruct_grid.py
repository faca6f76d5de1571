"""The cases that every implementation of the low-rank reconstruction has to pass: torch on the CPU, the interpreter, and a GPU share them."""
import itertools
from typing import NamedTuple, Optional

import torch

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
SIZES = (1, 63, 100, 781)


class Case(NamedTuple):
    m: int
    n: int
    k: int
    batch: tuple = ()
    dtype: torch.dtype = F32 # of U and Vh
    s_dtype: Optional[torch.dtype] = None # None: float32
    base: Optional[torch.dtype] = F32 # None: no base
    out: torch.dtype = F32
    layout: str = "dense" # dense, transposed, sliced, broadcast
    alpha: float = -.7
    in_place: bool = False

    def __str__(self):
        words = [f"{'x'.join(map(str, (*self.batch, self.m, self.n)))} rank {self.k}", str(self.dtype)[6:], self.layout if self.layout != "dense" else "",
                 f"S {self.s_dtype}"[:2] + str(self.s_dtype)[6:] if self.s_dtype else "", f"base {str(self.base)[6:]}" if self.base else "no base", f"out {str(self.out)[6:]}", "in place" if self.in_place else ""]
        return ", ".join(filter(None, words))


SHAPES = [Case(*o) for o in itertools.product(SIZES, SIZES, SIZES)] # every combination of odd sizes
KINDS = [Case(63, 100, 17, **o) for o in [
    *(dict(batch=b, layout=l) for b in ((0,), (1,), (3,), (2, 3), (2, 0)) for l in ("dense", "transposed", "sliced")),
    *(dict(batch=(3,), layout="broadcast", base=b) for b in (F32, None)), dict(batch=(2, 3), layout="broadcast"),
    *(dict(dtype=d, base=b, out=o) for d in (F16, BF16, F32) for b in (F16, BF16, F32, None) for o in (F16, BF16, F32)),
    *(dict(dtype=d, base=F32, layout=l) for d in (F16, BF16) for l in ("transposed", "sliced")),
    *(dict(dtype=d, base=d, out=d, in_place=True, layout=l) for d in (F32, BF16) for l in ("dense", "transposed", "sliced")),
    dict(batch=(3,), in_place=True), dict(batch=(2, 3), in_place=True, layout="sliced"), dict(dtype=BF16, base=F32, in_place=True),
    dict(s_dtype=F64), dict(dtype=F16, s_dtype=F16), dict(dtype=BF16, s_dtype=BF16), dict(alpha=0.), dict(alpha=1.), dict(alpha=2.5, base=None), dict(out=F64)]]
EDGES = [Case(*s, base=b) for s in ((63, 100, 0), (0, 5, 3), (5, 0, 3), (0, 0, 0), (1, 1, 0)) for b in (F32, None)] + [Case(63, 100, 0, batch=(3,)), Case(63, 100, 0, in_place=True)]
CASES = SHAPES + KINDS + EDGES
TOLERANCE = {F64: 1e-5, F32: 1e-5, F16: torch.finfo(F16).eps, BF16: torch.finfo(BF16).eps} # of the result, relative, Frobenius


def _matrix(g, batch, m, n, dtype, layout, device):
    "A random matrix in the given layout."
    def randn(*shape): return torch.randn(*shape, generator=g, dtype=F64).to(dtype).to(device)
    if layout == "transposed": return randn(*batch, n, m).mT
    if layout == "sliced": return randn(*batch, 2 * m + 3, n + 5)[..., 1:2 * m + 1:2, 3:n + 3]
    return randn(*batch, m, n)


def _room(batch, m, n, dtype, layout, device):
    "A NaN-poisoned tensor and the view in it that may be written."
    shape = (n + 4, m + 4) if layout == "transposed" else (2 * m + 4, n + 4) if layout == "sliced" else (m + 4, n + 4)
    room = torch.full((*batch, *shape), float("nan"), dtype=dtype, device=device)
    if layout == "transposed": return room, room[..., 1:n + 1, 2:m + 2].mT
    return room, room[..., 1:2 * m + 1:2, 2:n + 2] if layout == "sliced" else room[..., 1:m + 1, 2:n + 2]


class Problem(NamedTuple):
    U: torch.Tensor
    S: torch.Tensor
    Vh: torch.Tensor
    base: Optional[torch.Tensor]
    out: torch.Tensor
    room: torch.Tensor
    exact: torch.Tensor


def problem(case, device="cpu"):
    "The tensors of a case, and the result in float64, by a formula of its own."
    g = torch.Generator().manual_seed(hash(case[:4]) % 2**31)
    m, n, k, layout, shared = case.m, case.n, case.k, case.layout, () if case.layout == "broadcast" else case.batch
    U, Vh = _matrix(g, case.batch, m, k, case.dtype, layout, device), _matrix(g, shared, k, n, case.dtype, layout, device)
    S = torch.rand((*shared, 2 * k), generator=g).to(case.s_dtype or F32).to(device)[..., ::2]
    base = None if case.base is None else _matrix(g, shared, m, n, case.base, layout, device)
    exact = torch.einsum("...mk,...k,...kn->...mn", *(o.double() for o in (U, S, Vh))) * case.alpha + (0 if base is None else base.double())
    room, out = _room(case.batch, m, n, case.out, layout, device)
    if case.in_place: base = out.copy_(base)
    return Problem(U, S, Vh, base, out, room, exact)


def error(result, exact): return ((result.double() - exact).norm() / exact.norm().clamp(min=1e-30)).item() if exact.numel() else 0.


def check(case, p, tolerance=None):
    "Every element written, nothing else touched, the values right; the relative error."
    assert p.out.isfinite().all(), "an element was not written"
    assert int(p.room.isnan().sum()) == p.room.numel() - p.out.numel(), "something outside the result was written"
    e = error(p.out, p.exact)
    assert e < (tolerance or TOLERANCE[case.out]), f"{case}: relative error {e:.1e}"
    return e


RAGGED = [(63, 100, 17), (1, 781, 3), (100, 63, 0), (781, 1, 63), (64, 64, 16), (1, 1, 1), (0, 7, 2), (130, 70, 100)]
GROUPS = [dict(zip(("dtype", "base", "out", "layout", "in_place"), o)) for o in [
    (F32, F32, F32, "dense", False), (F32, None, F32, "dense", False), (F32, F32, F32, "transposed", False), (F32, F32, F32, "sliced", False), (F32, F32, F32, "dense", True),
    (BF16, BF16, BF16, "dense", True), (F16, F32, F32, "sliced", True), (BF16, F32, F16, "dense", False), (F16, None, BF16, "transposed", False)]]


def group(options, shapes=RAGGED, device="cpu"):
    "Cases and problems of a ragged group."
    cases = [Case(*s, **options) for s in shapes]
    return cases, [problem(c, device) for c in cases]
