"""Switch the expert of a whole model from its TSV-C archive: our one-launch kernel against the best that torch does, on a GPU.

Usage: python benchmarks/reconstruct_gpu.py [--out results/reconstruct_gpu.json] [--seconds 150] [--blocks 4] [--tuned] [--full]
       python benchmarks/reconstruct_gpu.py --device cpu --tiny     every path but the CUDA-only calls, on tiny shapes; its times mean nothing

Every matrix of an image tower (ViT-B-32, ViT-L-14) or of `blocks` blocks of a 4096-wide language model is rebuilt as W = W0 + alpha U diag(S) Vh,
from factors of 5, 10 or 20% of the matrices' size: "copy" reads W0 and writes the model's weights, "add" adds to the weights in place.
All matrices of one shape lie in one stacked tensor (of which the single matrices are views), so that torch's batched product needs no copying.
"""
import argparse
import math
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from compare import Run, Side, graphed
from measure import relative_error
from tsv_nb.compress import rank_for_ratio
from tsv_nb.kernels.reconstruct import lowrank_reconstruct, lowrank_reconstruct_grouped, reconstruct_traffic

ALPHA = .7 # not 1: a side that forgets it is wrong
CLIP = {"ViT-B-32": (768, 12, 512), "ViT-L-14": (1024, 24, 768), "tiny-ViT": (20, 2, 12)} # width, layers, embedding, as in open_clip's model configs
LANGUAGE = {"LM-4096": (4096, 11008), "tiny-LM": (16, 44)} # width and hidden width of a block, as in Llama-7B
PAIRS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RIGHT = {"ieee": 1e-5, "tf32x3": 1e-5, "tf32": 2e-3, "float16": 2e-3, "bfloat16": 2e-2} # relative error allowed, by the kind of product
ROUNDED = {torch.float32: 0., torch.float16: 5e-4, torch.bfloat16: 4e-3} # what storing the result may add
OURS = ("ieee", "tf32x3", "tf32")


def shapes_of(model, blocks=4) -> Counter: # (m, n) -> how many
    "The matrices of a model that TSV-C stores as factors."
    if model in CLIP:
        d, layers, embed = CLIP[model]
        return Counter({(3 * d, d): layers, (d, d): layers, (4 * d, d): layers, (d, 4 * d): layers, (d, embed): 1}) # in_proj, out_proj, c_fc, c_proj, visual.proj
    d, hidden = LANGUAGE[model]
    return Counter({(d, d): 4 * blocks, (hidden, d): 2 * blocks, (d, hidden): blocks}) # q k v o, gate up, down


class Stack(NamedTuple):
    "All matrices of one shape: what every side reads and writes."
    U: Tensor # (B, m, k)
    S: Tensor # (B, k), float32
    Vh: Tensor # (B, k, n)
    base: Tensor # (B, m, n): W0 and, for "add", what `out` is reset to
    out: Tensor # (B, m, n): the model's weights


def make(shapes, ratio, weights, factors, device, seed=0) -> list[Stack]:
    "Random factors and weights of equal norm, so that an error in either shows."
    g, stacks = torch.Generator(device).manual_seed(seed), []
    def normal(*shape, std): return torch.randn(shape, generator=g, device=device) * std
    for (m, n), B in shapes.items():
        k = rank_for_ratio((m, n), ratio)
        U, Vh = normal(B, m, k, std=m**-.5).to(factors), normal(B, k, n, std=n**-.5).to(factors)
        S = torch.linspace(1.5, .5, k, device=device).repeat(B, 1)
        base = normal(B, m, n, std=math.sqrt(k / (m * n))).to(weights)
        stacks.append(Stack(U, S, Vh, base, torch.empty_like(base)))
    return stacks


def reference(stacks) -> list[Tensor]:
    "Every result in float64, one product at a time."
    return [torch.stack([(b.double() + ALPHA * (u.double() * s.double()) @ v.double()) for u, s, v, b, _ in zip(*st)]) for st in stacks]


def counts(stacks) -> dict:
    "Bytes that must move (factors and base read, result written) and FLOPs, of all matrices."
    each = [reconstruct_traffic(st.out.shape, st.U.shape[-1], st.U.dtype, out_dtype=st.out.dtype) for st in stacks]
    return dict(bytes=sum(o.bytes for o in each), flops=sum(o.flops for o in each))


def checker(stacks, want, mode):
    "A function that runs a side on poisoned (or, for `add`, reset) weights and returns its largest relative error and its peak memory."
    def check(fn):
        for st in stacks: st.out.copy_(st.base) if mode == "add" else st.out.fill_(torch.nan)
        fn()
        peak = torch.cuda.max_memory_allocated(st.out.device) if st.out.is_cuda else 0
        errors = [relative_error(o, w) for st, ref in zip(stacks, want) for o, w in zip(st.out, ref)]
        return (math.nan if any(map(math.isnan, errors)) else max(errors)), peak
    return check


# --- the sides -------------------------------------------------------------------------------------------------------------------------------

def our_sides(stacks, mode, precisions) -> dict:
    "One launch for all, one per shape, one per matrix."
    bases = [st.out if mode == "add" else st.base for st in stacks]
    factors, flat, outs = [f for st in stacks for f in zip(*st[:3])], [b for base in bases for b in base], [o for st in stacks for o in st.out]
    def grouped(p): lowrank_reconstruct_grouped(factors, base=flat, alpha=ALPHA, out=outs, precision=p)
    def batched(p):
        for st, base in zip(stacks, bases): lowrank_reconstruct(*st[:3], base=base, alpha=ALPHA, out=st.out, precision=p)
    def single(p):
        for f, b, o in zip(factors, flat, outs): lowrank_reconstruct(*f, base=b, alpha=ALPHA, out=o, precision=p)
    U, main = stacks[0].U, precisions[1 % len(precisions)]
    work = [("grouped", grouped, p) for p in precisions] + [("batched", batched, main), ("per matrix", single, main)]
    kind = "tf32x3" if U.dtype != torch.float32 else None # half factors: their products are exact in float32, so float32's accuracy is asked for
    return {f"ours {n} {p or 'half'}": Side(lambda fn=fn, p=p: (lambda: fn(p)), "ours", RIGHT[kind or p] + ROUNDED[st_dtype(stacks)], p or "split", counts(stacks)) for n, fn, p in work}


def st_dtype(stacks): return stacks[0].out.dtype


def unit_of(dtype): return "ieee" if dtype == torch.float32 else str(dtype).removeprefix("torch.")


def torch_work(stacks, mode, compute) -> dict: # name -> function
    "Torch's ways to do it, with products in the dtype `compute`; all write the same weights."
    weights = st_dtype(stacks)
    bases = [st.out if mode == "add" else st.base for st in stacks]
    items = [(u, s, v, b, o) for st, base in zip(stacks, bases) for u, s, v, b, o in zip(*st[:3], base, st.out)]
    def scaled(U, S): return (U * S.unsqueeze(-2)).to(compute)
    def addmm():
        for u, s, v, b, o in items: torch.addmm(b, scaled(u, s), v.to(compute), alpha=ALPHA, out=o)
    def mm_add():
        for u, s, v, b, o in items: torch.add(b, scaled(u, s) @ v.to(compute), alpha=ALPHA, out=o)
    def baddbmm():
        for st, base in zip(stacks, bases): torch.baddbmm(base, scaled(st.U, st.S), st.Vh.to(compute), alpha=ALPHA, out=st.out)
    def bmm_add():
        for st, base in zip(stacks, bases): torch.add(base, scaled(st.U, st.S) @ st.Vh.to(compute), alpha=ALPHA, out=st.out)
    outs, flat = [i[4] for i in items], [i[3] for i in items]
    def foreach():
        products = [scaled(u, s) @ v.to(compute) for u, s, v, _, _ in items]
        if mode == "copy": torch._foreach_copy_(outs, flat)
        torch._foreach_add_(outs, products, alpha=ALPHA)
    def wide(): # half factors, float32 weights: the product's float32 sums are added unrounded
        for u, s, v, b, o in items: torch.addmm(b, scaled(u, s), v.to(compute), out_dtype=torch.float32, alpha=ALPHA, out=o)
    def wide_batched():
        for st, base in zip(stacks, bases): torch.baddbmm(base, scaled(st.U, st.S), st.Vh.to(compute), out_dtype=torch.float32, alpha=ALPHA, out=st.out)
    work = {"mm + add": mm_add, "bmm + add": bmm_add, "foreach": foreach}
    if weights == compute: work |= {"addmm": addmm, "baddbmm": baddbmm}
    elif compute != torch.float32 and weights == torch.float32 and stacks[0].out.is_cuda: work |= {"addmm out_dtype": wide, "baddbmm out_dtype": wide_batched}
    return work


def compiled(stacks, mode, compute, how):
    "One compiled function over all stacks: the scaling, the sum and the casts may be fused with each other, and products tuned."
    bases = [st.out if mode == "add" else st.base for st in stacks]
    def all_shapes(stacks, bases):
        for st, base in zip(stacks, bases):
            us, vh = (st.U * st.S.unsqueeze(-2)).to(compute), st.Vh.to(compute)
            st.out.copy_(torch.baddbmm(base, us, vh, alpha=ALPHA) if base.dtype == compute else base + ALPHA * (us @ vh))
    def build():
        torch.compiler.reset()
        fn = torch.compile(all_shapes, dynamic=False, **how)
        fn(stacks, bases)
        return lambda: fn(stacks, bases)
    return build


def folded(stacks, mode):
    "The batched product with S multiplied into U ahead of time: less work than every other side has, so only a note."
    def build():
        pre = [(st.U * st.S.unsqueeze(-2)).to(st.U.dtype) for st in stacks]
        def run():
            for us, st in zip(pre, stacks): torch.baddbmm(st.out if mode == "add" else st.base, us, st.Vh, alpha=ALPHA, out=st.out)
        return run
    return build


def torch_sides(stacks, mode, compilers) -> dict:
    "Every torch way in every precision that these dtypes allow."
    weights, factors, work = st_dtype(stacks), stacks[0].U.dtype, counts(stacks)
    computes = {torch.float32: [("fp32", False), ("tf32", True)]} # half factors on float32 weights: upcast (exact), or multiplied as they are
    if factors != torch.float32: computes[factors] = [("half", False)]
    if weights == factors != torch.float32: del computes[torch.float32]
    sides = {}
    for compute, modes in computes.items():
        for label, allow in modes:
            unit = ("tf32" if allow else "ieee") if compute == torch.float32 else unit_of(compute)
            limit = RIGHT[unit] + ROUNDED[weights]
            for name, fn in torch_work(stacks, mode, compute).items(): sides[f"torch {name} {label}"] = Side(lambda fn=fn: fn, "torch", limit, unit, work, allow)
            for tag, how in compilers.items(): sides[f"torch {tag} {label}"] = Side(compiled(stacks, mode, compute, how), "torch", limit, unit, work, allow)
            if weights == compute == factors: sides[f"torch S folded baddbmm {label}"] = Side(folded(stacks, mode), "note", limit, unit, work, allow)
    return sides


# --- the run ---------------------------------------------------------------------------------------------------------------------------------

def plan(models, full=False, tuned_first=False) -> list: # (model, ratio, weights, factors, mode, compile): the most telling first
    "Which configurations to measure, in the order of their worth: a time limit cuts the end."
    first = [(m, .1, w, f, mode, "default" if mode == "copy" and w == f and m in models[::2] else None)
             for mode in ("copy", "add") for w, f in (("fp32", "fp32"), ("bf16", "bf16"), ("fp32", "fp16")) for m in models]
    sizes = [(m, r, w, f, "copy", None) for r in (.05, .2) for w, f in (("fp32", "fp32"), ("bf16", "bf16")) for m in models]
    tuned = [(m, .1, w, w, "copy", "max-autotune") for w in ("fp32", "bf16") for m in models[::2]]
    mixed = [(m, .1, w, f, "copy", None) for w, f in (("fp16", "fp16"), ("bf16", "fp32"), ("fp16", "fp32"), ("fp32", "bf16")) for m in models]
    rest = [(m, r, w, f, "add", None) for r in (.05, .2) for w, f in (("fp32", "fp32"), ("bf16", "bf16")) for m in models]
    if full: rest += [(m, r, w, f, mode, None) for r in (.05, .2) for w, f in (("fp32", "fp16"), ("fp16", "fp16"), ("bf16", "fp32")) for mode in ("copy", "add") for m in models]
    return (tuned + first if tuned_first else first) + sizes + mixed + rest + ([] if tuned_first else tuned)


def compilers(which, cuda) -> dict: # name -> arguments of torch.compile
    "How the torch loop is compiled; on a CPU only that the path works is of interest."
    if which is None: return {}
    how = dict(options={"max_autotune": True}) if which == "max-autotune" else {}
    return {f"compiled {which}": how if cuda else dict(backend="eager")}


def configuration(run, model, blocks, ratio, weights, factors, mode, compile_as):
    "Measure one configuration: all sides, then the fastest of torch's and of ours as CUDA graphs."
    cuda = run.device.type == "cuda"
    stacks = make(shapes_of(model, blocks), ratio, PAIRS[weights], PAIRS[factors], run.device)
    ranks = {f"{m}x{n}": rank_for_ratio((m, n), ratio) for m, n in shapes_of(model, blocks)}
    key = dict(model=model, ratio=ratio, weights=weights, factors=factors, mode=mode) | (dict(compiled=compile_as) if compile_as else {})
    check = checker(stacks, reference(stacks), mode)
    sides = our_sides(stacks, mode, OURS if factors == "fp32" else (None,)) | torch_sides(stacks, mode, compilers(compile_as, cuda))
    results = run.sides(key, sides, check)
    if cuda: # a graph shrinks the gaps between launches: for torch's loops, and for ours
        again = {}
        for kind in ("torch", "ours"):
            for unit in {r["unit"] for r in results.values() if r["kind"] == kind}:
                best = min((n for n, r in results.items() if r["kind"] == kind and r["unit"] == unit), key=lambda n: results[n]["ms"])
                again[f"{best}, graph"] = sides[best]._replace(build=graphed(sides[best].build, run.device))
        results |= run.sides(key, again, check)
    half = PAIRS[weights] != torch.float32
    run.row(key | dict(matrices=sum(st.out.shape[0] for st in stacks), ranks=ranks), results, [2e-2] if half else [1e-5, 2e-3, 2e-2])


def main(args=None) -> int: # exit status
    "Measure until the plan or the time ends."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "reconstruct_gpu.json")
    p.add_argument("--device", default="cuda")
    p.add_argument("--tiny", action="store_true", help="tiny shapes: a check of this script, not a measurement")
    p.add_argument("--seconds", type=float, default=150., help="start no configuration after this time")
    p.add_argument("--blocks", type=int, default=4, help="blocks of the language model")
    p.add_argument("--tuned", action="store_true", help="begin with torch.compile's max-autotune (a minute each); by default it comes last")
    p.add_argument("--full", action="store_true", help="every ratio for every pair of dtypes")
    a = p.parse_args(args)
    models = ["tiny-ViT", "tiny-LM"] if a.tiny else ["ViT-B-32", "ViT-L-14", "LM-4096"]
    run = Run("reconstruct", a.device, a.out, a.seconds, a.tiny, dict(alpha=ALPHA, blocks=a.blocks, shapes={m: [[*s, n] for s, n in shapes_of(m, a.blocks).items()] for m in models},
              fp16_reduced_precision_reduction=torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction))
    for step in plan(models, a.full, a.tuned):
        model, ratio, weights, factors, mode, compile_as = step
        need = 45 if compile_as == "max-autotune" and not a.tiny else 0 # seconds that tuning may take
        if run.left() <= need:
            run.skip(step, "no time left")
            continue
        try: configuration(run, model, a.blocks, ratio, weights, factors, mode, compile_as)
        except torch.cuda.OutOfMemoryError as e: run.skip(step, str(e)[:200])
        if run.device.type == "cuda": torch.cuda.empty_cache()
    return run.finish()


if __name__ == "__main__": sys.exit(main())
