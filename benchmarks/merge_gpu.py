"""TSV-M of 20 tasks on the shapes of ViT-L-14, on a GPU: this library against the published algorithm on the same GPU and the same tensors.

    python benchmarks/merge_gpu.py                     # writes results/merge_gpu.json
    python benchmarks/merge_gpu.py --device cpu --tiny # every line of it on small matrices, without a GPU

The published side takes 1,920 full SVDs for the whole tower. It is timed on `--baseline-blocks` blocks and multiplied; the JSON says so. Ours is timed on all
blocks. Errors are against float64. Which route of the SVD and of the polar factor is the fastest on this device is measured as well, at the same accuracy.
"""
import argparse
import sys
import time
from pathlib import Path

import torch
from measure import machine, measure, synchronize, write_json
from merging import published_entry, published_merge, relative_error, task_matrices, vit_shapes

from tsv_nb import orthogonalize, tsv_merge
from tsv_nb.low_rank import Factors
from tsv_nb.polar import POLAR_METHODS
from tsv_nb.svd import SVD_METHODS, leading_svd, svd_residual

HERE = Path(__file__).resolve().parent
GOAL = 50


def seconds(fn, device):
    "Wall-clock seconds of one call, device included, and what it returned."
    synchronize(device)
    start = time.perf_counter()
    result = fn()
    synchronize(device)
    return time.perf_counter() - start, result


def make_vectors(shapes, n_tasks, device):
    "Task vectors on the device: one set of realistic matrices per shape, rows and columns permuted from block to block."
    g, cache, vectors = torch.Generator().manual_seed(0), {}, [{} for _ in range(n_tasks)]
    for name, shape in shapes.items():
        if len(shape) != 2: deltas = 1e-3 * torch.randn(n_tasks, *shape, generator=g).to(device)
        else:
            if shape not in cache: cache[shape] = task_matrices(shape, n_tasks, "realistic", len(cache)).float().to(device)
            rows, cols = (torch.randperm(n, generator=g).to(device) for n in shape)
            deltas = cache[shape][:, rows][:, :, cols]
        for t in range(n_tasks): vectors[t][name] = deltas[t]
    return vectors


def routes(vectors, names, device):
    "Milliseconds, and error or residual, of every route for the first matrix of every shape."
    table, T = {}, len(vectors)
    for name in names:
        x = torch.stack([v[name] for v in vectors])
        k = min(x.shape[1:]) // T
        f = Factors(*leading_svd(x, k))
        U = f.U.movedim(0, 1).flatten(1)
        exact = orthogonalize(U.double(), "svd", 8e-6)
        table[name] = dict(shape=list(x.shape), rank=k,
                           svd={m: measure(lambda: leading_svd(x, k, m), device)._asdict() | {"residual": svd_residual(x, *leading_svd(x, k, m)).max().item()} for m in SVD_METHODS},
                           polar={m: measure(lambda: orthogonalize(U, m, 8e-6), device)._asdict() | {"error": relative_error(orthogonalize(U, m, 8e-6), exact)} for m in POLAR_METHODS})
        for part in ("svd", "polar"): print(name, part, {m: f"{r['ms']:.1f} ms" for m, r in table[name][part].items()}, flush=True)
    return table


def main():
    "Ours, the published algorithm, errors, routes; prints and writes the JSON after every step."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda"); p.add_argument("--tiny", action="store_true"); p.add_argument("--tasks", type=int, default=20)
    p.add_argument("--baseline-blocks", type=int, default=1); p.add_argument("--out", type=Path, default=HERE / "results" / "merge_gpu.json")
    a = p.parse_args()
    shapes = {n: s for n, s in vit_shapes("ViT-L-14").items() if n.startswith("visual.")} # what does not move costs ours nothing, and the published side eight SVDs more
    if a.tiny:
        a.tasks = min(a.tasks, 4)
        shapes = {n: tuple(min(d, 96) if d < 2048 else 128 for d in s) for n, s in shapes.items() if "resblocks" not in n or "resblocks.0." in n or "resblocks.1." in n}
    blocks = len({n.split("resblocks.")[1].split(".")[0] for n in shapes if "resblocks." in n})
    vectors = make_vectors(shapes, a.tasks, a.device)
    data = dict(benchmark="merge_gpu", command=" ".join(sys.argv), machine=machine(a.device), model="ViT-L-14", n_tasks=a.tasks, blocks=blocks, tiny=a.tiny, goal=GOAL)
    tsv_merge([{n: e for n, e in v.items() if "resblocks.0." in n} for v in vectors]) # compilation and handles stay out
    runs = [seconds(lambda: tsv_merge(vectors), a.device) for _ in range(3)]
    merged, data["ours_s"] = runs[0][1], sorted(t for t, _ in runs)
    write_json(a.out, data)
    chosen = [n for n in shapes if any(f"resblocks.{i}." in n for i in range(a.baseline_blocks))]
    baseline, _ = seconds(lambda: published_merge([{n: v[n] for n in chosen} for v in vectors]), a.device)
    data |= dict(published_blocks=a.baseline_blocks, published_measured_s=baseline, published_s=baseline * blocks / a.baseline_blocks)
    data["speedup"] = data["published_s"] / data["ours_s"][1]
    write_json(a.out, data)
    first = [n for n in chosen if len(shapes[n]) == 2 and "resblocks.0." in n]
    data["error"] = {n: relative_error(merged[n], published_entry(n, [v[n].double() for v in vectors])) for n in first if "out_proj" in n or "c_proj" in n}
    data["routes"] = routes(vectors, first, a.device)
    write_json(a.out, data)
    print(f"ours {data['ours_s'][1]:.2f} s for {blocks} blocks; published {data['published_s']:.1f} s (from {a.baseline_blocks}); {data['speedup']:.0f} x, goal {GOAL} x; error {max(data['error'].values()):.1e}")


if __name__ == "__main__": main()
