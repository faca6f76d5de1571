"""The interference score of a layer: our fused kernels against the best that torch does, on a GPU.

Usage: python benchmarks/interference_gpu.py [--out results/interference_gpu.json] [--seconds 110]
       python benchmarks/interference_gpu.py --device cpu --tiny     every path but the CUDA-only calls, on tiny shapes; its times mean nothing

The four matrices of a block of ViT-B-32 and ViT-L-14, T = 8, 14 and 20 tasks, k = r // T components (for one layer, and for the layers of all blocks in one
batch) and k = r, where torch needs several (T k) x (T k) matrices. Every side's FLOPs are those of its own algorithm, so a rate is never that of work avoided.
"""
import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from compare import Run, Side
from tsv_nb.kernels import interference as kernels
from tsv_nb.kernels.interference import interference_score, interference_traffic

TOWERS = {"ViT-B-32": (768, 12), "ViT-L-14": (1024, 24), "tiny-ViT": (8, 2)} # width, blocks
MATRICES = {"out_proj": (1, 1), "c_fc": (4, 1), "in_proj": (3, 1), "c_proj": (1, 4)} # (m, n) in widths
TASKS = (8, 14, 20)
RIGHT = {"ieee": 1e-4, "tf32x3": 1e-4, "tf32": 1e-2} # relative error of the score that is allowed
CLASSES = [1e-4, 1e-2]


def orthonormal(shape, g, device) -> Tensor: # (..., d, k) in float64
    "Random orthonormal columns by two rounds of Cholesky-QR: products only, much faster on a GPU than a batch of QRs."
    X = torch.randn(shape, generator=g, device=device, dtype=torch.float64)
    for _ in range(2): X = torch.linalg.solve_triangular(torch.linalg.cholesky(X.mT @ X), X.mT, upper=False).mT
    return X


def make(m, n, T, k, batch, device, seed=0) -> tuple[Tensor, Tensor, Tensor]: # U (batch, T, m, k), S, Vh
    "Float32 factors of unrelated tasks, with singular values that fall by a factor of 100."
    g = torch.Generator(device).manual_seed(seed)
    U, V = (orthonormal((batch, T, d, k), g, device) for d in (m, n))
    S = torch.logspace(0, -2, k, dtype=torch.float64, device=device) * (1 + torch.rand(batch, T, 1, generator=g, device=device, dtype=torch.float64))
    return tuple(o.float().contiguous() for o in (U, S, V.mT))


def reference(U, S, Vh) -> Tensor: # (batch,) float64
    "The formula in float64, a task's block of rows at a time."
    U, S, Vh = (o.double() for o in (U, S, Vh))
    (_, T, m, k), scores = U.shape, []
    for u, s, v in zip(U.mT, S.flatten(1), Vh):
        X, Y = u.reshape(T * k, m), v.reshape(T * k, -1)
        B, total = Y @ Y.mT, torch.zeros((), dtype=torch.float64, device=U.device)
        for t in range(T): B[t * k:(t + 1) * k, t * k:(t + 1) * k] = 0
        for t in range(T):
            A = X[t * k:(t + 1) * k] @ X.mT
            A[:, t * k:(t + 1) * k] = 0
            total += ((A * s) @ B).abs().sum()
        scores.append(total)
    return torch.stack(scores)


# --- the sides -------------------------------------------------------------------------------------------------------------------------------

def literal(U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    "The formula as it is printed: a task's block with itself is computed, and its rounding noise summed."
    X, Y = U.movedim(-3, -2).flatten(-2), Vh.flatten(-3, -2)
    eye = torch.eye(X.shape[-1], device=U.device)
    return (((X.mT @ X - eye) * S.flatten(-2).unsqueeze(-2)) @ (Y @ Y.mT - eye)).abs().sum((-2, -1))


def masked(U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    "The formula with those blocks multiplied by zero."
    X, Y, task = U.movedim(-3, -2).flatten(-2), Vh.flatten(-3, -2), torch.arange(U.shape[-3], device=U.device).repeat_interleave(U.shape[-1])
    between = (task[:, None] != task).float()
    return ((X.mT @ X * between * S.flatten(-2).unsqueeze(-2)) @ (Y @ Y.mT * between)).abs().sum((-2, -1))


def dense_work(m, n, T, k, batch) -> dict:
    "Bytes and FLOPs of both formulas if every product were one pass: two Gram matrices, scaled, their product, its sum."
    N = T * k
    return dict(bytes=4 * batch * (2 * N * (m + n + 1) + 9 * N * N), flops=2 * batch * N * N * (m + n + N))


def route_work(m, n, T, k, batch, route=None) -> dict:
    "Bytes and FLOPs of a route of ours."
    cost = interference_traffic(T, m, n, k, torch.float32, route)
    return dict(bytes=batch * cost.bytes, flops=batch * cost.flops)


def other_route(m, n, T, k, batch) -> bool:
    "Whether the route not taken is near enough to be worth a measurement: is the choice by operations the right one?"
    costs = [interference_traffic(T, m, n, k, torch.float32, r).flops for r in kernels.ROUTES]
    return max(costs) < 3 * min(costs)


def build_sides(U, S, Vh, compile_it, device) -> dict:
    "Torch's formulas with and without tf32, ours in every precision; the route not taken, and our routes written in torch, as notes."
    (batch, T, m, k), n, cuda = U.shape, Vh.shape[-1], device.type == "cuda"
    sizes = m, n, T, k, batch
    taken = interference_traffic(T, m, n, k).route
    other = next(r for r in kernels.ROUTES if r != taken)
    def compiled():
        torch.compiler.reset()
        fn = torch.compile(masked, dynamic=False, **({} if cuda else dict(backend="eager")))
        fn(U, S, Vh)
        return lambda: fn(U, S, Vh)
    def call(fn): return lambda: (lambda: fn(U, S, Vh))
    def ours(p, route=None): return lambda: (lambda: interference_score(U, S, Vh, precision=p, route=route))
    def in_torch(): return lambda: kernels._batched(kernels._torch_score, U, S, Vh, taken, "")
    # the push route takes a few of its products from torch: "tf32" allows it there, too
    sides = {f"ours {p}": Side(ours(p), "ours", RIGHT[p], p, route_work(*sizes), p == "tf32") for p in RIGHT}
    if other_route(*sizes): sides[f"{other} route tf32x3"] = Side(ours("tf32x3", other), "note", RIGHT["tf32x3"], "tf32x3", route_work(*sizes, other))
    for label, allow in (("fp32", False), ("tf32", True)):
        unit = "tf32" if allow else "ieee"
        common = RIGHT[unit], unit, dense_work(*sizes), allow
        sides |= {f"torch literal {label}": Side(call(literal), "torch", *common), f"torch masked {label}": Side(call(masked), "torch", *common)}
        if compile_it: sides[f"torch compiled {label}"] = Side(compiled, "torch", *common)
        sides[f"{taken} route in torch {label}"] = Side(in_torch, "note", RIGHT[unit], unit, route_work(*sizes, taken), allow)
    return sides


def checker(U, S, Vh):
    "A function that runs a side and returns the largest relative error of its scores and its peak memory."
    want = reference(U, S, Vh)
    def check(fn):
        got = fn()
        peak = torch.cuda.max_memory_allocated(U.device) if U.is_cuda else 0
        if got.shape != want.shape: raise AssertionError(f"expected scores of shape {tuple(want.shape)}, got {tuple(got.shape)}")
        return ((got.double() - want).abs() / want).max().item(), peak
    return check


# --- the run ---------------------------------------------------------------------------------------------------------------------------------

def plan(towers) -> list: # (tower, matrix, T, "r // T" or "r", batch, compile): the most telling first
    "Which configurations to measure, in the order of their worth: a time limit cuts the end."
    def each(ranks, tasks, names, whole=False, compiled=()): return [(w, name, T, ranks, TOWERS[w][1] if whole else 1, (name, T) in compiled)
                                                                     for T in tasks for name in names for w in towers]
    two, more = ("out_proj", "c_fc"), ("in_proj", "c_proj")
    return (each("r // T", (8, 20), two, compiled=[("c_fc", 20)]) + each("r", (8,), two, compiled=[("c_fc", 8)]) + each("r // T", (8, 20), two, whole=True)
            + each("r", (20,), two) + each("r // T", (14,), two) + each("r", (14,), two) + each("r // T", TASKS, more) + each("r // T", (14,), two, whole=True)
            + each("r // T", TASKS, more, whole=True) + each("r", TASKS, more))


def expected(m, n, T, k, batch, run, compile_it) -> float: # seconds
    "About how long a configuration takes, so that none is started that the limit would cut: calls of every side at half the measured rates, ours tuned first."
    rate, dense, ours = run.limits["flops_per_s"], dense_work(m, n, T, k, batch)["flops"], route_work(m, n, T, k, batch)["flops"]
    calls = 8 * (3 if compile_it else 2) * (dense / rate["ieee"] + dense / rate["tf32"]) + 8 * 2 * ours / rate["ieee"]
    tuned = 8 * 5 * ours * (1 / rate["ieee"] + (3 if other_route(m, n, T, k, batch) else 1) / rate["tf32x3"] + 1 / rate["tf32"])
    return 2 * (calls + tuned + dense / rate["float64"]) + (0 if run.tiny else 20 if compile_it else 4)


def configuration(run, key, m, n, compile_it):
    "Measure all sides of one configuration."
    T, k = key["T"], key["k"]
    factors = make(m, n, T, k, key["batch"], run.device)
    results = run.sides(key, build_sides(*factors, compile_it, run.device), checker(*factors))
    run.row(key | dict(shapes=[m, n], route=interference_traffic(T, m, n, k).route), results, CLASSES)


def main(args=None) -> int: # exit status
    "Measure until the plan or the time ends."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "interference_gpu.json")
    p.add_argument("--device", default="cuda")
    p.add_argument("--tiny", action="store_true", help="tiny shapes: a check of this script, not a measurement")
    p.add_argument("--seconds", type=float, default=110., help="start no configuration that is expected to end after this time")
    a = p.parse_args(args)
    run = Run("interference", a.device, a.out, a.seconds, a.tiny)
    for step in plan(["tiny-ViT"] if a.tiny else ["ViT-B-32", "ViT-L-14"]):
        tower, name, T, ranks, batch, compile_it = step
        d, (p_m, p_n) = TOWERS[tower][0], MATRICES[name]
        m, n = p_m * d, p_n * d
        k = max(1, d // T) if ranks == "r // T" else d
        if expected(m, n, T, k, batch, run, compile_it) > run.left():
            run.skip(step, "no time left")
            continue
        try: configuration(run, dict(model=tower, matrix=name, T=T, k=k, batch=batch), m, n, compile_it)
        except torch.cuda.OutOfMemoryError as e: run.skip(step, str(e)[:200])
        if run.device.type == "cuda": torch.cuda.empty_cache()
    return run.finish()


if __name__ == "__main__": sys.exit(main())
