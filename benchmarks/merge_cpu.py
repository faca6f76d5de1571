"""TSV-M of 8 tasks on the shapes of ViT-B-32, on the CPU: this library against the published algorithm, from files to the merged task vector.

    python benchmarks/merge_cpu.py            # about five minutes on 2 cores, 4.5 GB of temporary files; writes results/merge_cpu.json
    python benchmarks/merge_cpu.py --blocks 1 # quick look

Each side runs in a process of its own, on the same checkpoint files, so that its peak resident memory is its own. A second process per side would only
repeat the same work twelve times more: the twelve blocks have equal shapes, and the quantiles are taken over them. Errors are against the same
algorithm in float64, for every matrix of the first block.
"""
import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import Timing, machine, write_json
from merging import deltas_of, moves, published_entry, published_merge, relative_error, vit_shapes
from safetensors.torch import load_file, save_file

from tsv_nb import tsv_merge
from tsv_nb.lazy import LazyTaskVector
from tsv_nb.task_vectors import task_vector

HERE = Path(__file__).resolve().parent
GOALS = {"speedup": 4, "memory": .25, "error": 1e-4}


def write_checkpoints(folder, shapes, n_tasks, kind):
    "pretrained.safetensors and task0.safetensors …: weights of a plausible size plus the chosen changes, in float32."
    g, cache = torch.Generator().manual_seed(0), {}
    base = {n: .02 * torch.randn(s, generator=g) for n, s in shapes.items()}
    save_file(base, folder / "pretrained.safetensors")
    tasks = [dict() for _ in range(n_tasks)]
    for name, shape in shapes.items():
        if moves(name):
            for t, d in enumerate(deltas_of(name, shape, n_tasks, kind, cache)): tasks[t][name] = (base[name].double() + d).float()
        else:
            for task in tasks: task[name] = base[name]
    for t, task in enumerate(tasks): save_file(task, folder / f"task{t}.safetensors")


def peak_mib():
    "The most memory this process has had resident, in MiB. (Linux; getrusage would include what the parent had before the fork.)"
    status = Path("/proc/self/status")
    if status.exists(): return int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 # macOS counts bytes


class Clock:
    "A progress wrapper that notes the seconds spent on every entry."
    def __init__(self): self.seconds = {}
    def __call__(self, names):
        for name in names:
            start = time.perf_counter()
            yield name
            self.seconds[name] = time.perf_counter() - start


def side_published(files, clock):
    "Every checkpoint read, every task vector in memory."
    base, *tasks = files
    pretrained = load_file(base)
    vectors = [task_vector(pretrained, load_file(task)) for task in tasks]
    return published_merge(vectors, clock)


def side_ours(files, clock):
    "Task vectors that stay in their files; one layer at a time."
    base, *tasks = files
    return tsv_merge([LazyTaskVector(base, task) for task in tasks], progress=clock, batch_bytes=1)


def run_side(side, folder, out):
    "In a process of its own: merge, and write seconds, peak memory and the first block's matrices."
    files = [folder / "pretrained.safetensors", *sorted(folder.glob("task*.safetensors"))]
    clock, idle = Clock(), peak_mib()
    start = time.perf_counter()
    merged = {"published": side_published, "ours": side_ours}[side](files, clock)
    total = time.perf_counter() - start
    peak = peak_mib()
    save_file({n: t.contiguous() for n, t in merged.items() if "resblocks.0." in n and t.ndim == 2 or n == "visual.proj"}, out.with_suffix(".safetensors"))
    out.write_text(json.dumps(dict(total_s=total, peak_mib=peak, import_mib=idle, seconds=clock.seconds)))


def kind_of(name):
    "in_proj, out_proj, c_fc, c_proj, or other."
    return next((k for k in ("in_proj_weight", "out_proj.weight", "c_fc.weight", "c_proj.weight", "token_embedding") if k in name), "everything else")


def compare(folder, n_tasks, kind, threads):
    "Both sides on the files in a folder; the result as JSON-ready numbers."
    sides = {}
    for side in ("ours", "published"):
        out = folder / f"{side}.json"
        subprocess.run([sys.executable, __file__, "--side", side, "--folder", str(folder), "--out", str(out), "--threads", str(threads)], check=True)
        sides[side] = json.loads(out.read_text()) | {"merged": load_file(out.with_suffix(".safetensors"))}
    kinds = {}
    for side, r in sides.items():
        for name, s in r["seconds"].items(): kinds.setdefault(kind_of(name), {}).setdefault(side, []).append(1e3 * s)
    table = {k: {side: Timing.of(t)._asdict() for side, t in by.items()} | {"ratio": sum(by["published"]) / sum(by["ours"])} for k, by in kinds.items()}
    files = [folder / "pretrained.safetensors", *sorted(folder.glob("task*.safetensors"))]
    lazy = [LazyTaskVector(files[0], f) for f in files[1:]]
    errors = {side: {} for side in sides}
    for name in sides["ours"]["merged"]:
        exact = published_entry(name, [v[name].double() for v in lazy])
        for side, r in sides.items(): errors[side][name] = relative_error(r["merged"][name], exact)
    result = {side: {k: r[k] for k in ("total_s", "peak_mib", "import_mib")} | {"error": errors[side], "max_error": max(errors[side].values())} for side, r in sides.items()}
    without = {side: r["total_s"] - r["seconds"].get("token_embedding.weight", 0) for side, r in sides.items()}
    ratios = dict(speedup=result["published"]["total_s"] / result["ours"]["total_s"], speedup_without_token_embedding=without["published"] / without["ours"],
                  memory=result["ours"]["peak_mib"] / result["published"]["peak_mib"], error=result["ours"]["max_error"])
    return dict(kind=kind, n_tasks=n_tasks, sides=result, per_matrix_ms=table, ratios=ratios)


def show(r):
    "The comparison as a table."
    print(f"\n{r['kind']} task matrices, {r['n_tasks']} tasks\n{'':18s}{'published':>26s}{'ours':>26s}{'ratio':>8s}")
    for k, row in r["per_matrix_ms"].items():
        cells = [f"{row[s]['ms']:8.0f} [{row[s]['low']:.0f}, {row[s]['high']:.0f}] ms" for s in ("published", "ours")]
        print(f"{k:18s}{cells[0]:>26s}{cells[1]:>26s}{row['ratio']:8.1f}")
    for label, key, unit in (("total", "total_s", "s"), ("peak memory", "peak_mib", "MiB"), ("max error", "max_error", "")):
        a, b = (r["sides"][s][key] for s in ("published", "ours"))
        print(f"{label:18s}{a:>23.3g} {unit:3s}{b:>22.3g} {unit:3s}{a / b:8.1f}")
    x = r["ratios"]
    print(f"goals: speed-up {x['speedup']:.1f} (>= {GOALS['speedup']}; {x['speedup_without_token_embedding']:.1f} without the token embedding), memory {x['memory']:.0%} (<= {GOALS['memory']:.0%}), error {x['error']:.1e} (<= {GOALS['error']:.0e})")


def main():
    "Both spectra, both sides; prints the tables and writes the JSON."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--blocks", type=int, default=12); p.add_argument("--tasks", type=int, default=8); p.add_argument("--threads", type=int, default=2)
    p.add_argument("--kinds", nargs="+", default=["realistic", "random"]); p.add_argument("--side"); p.add_argument("--folder", type=Path)
    p.add_argument("--out", type=Path, default=HERE / "results" / "merge_cpu.json")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    if a.side: return run_side(a.side, a.folder, a.out)
    results = []
    for kind in a.kinds:
        with tempfile.TemporaryDirectory() as d:
            write_checkpoints(Path(d), vit_shapes(blocks=a.blocks), a.tasks, kind)
            results.append(compare(Path(d), a.tasks, kind, a.threads))
        show(results[-1])
    write_json(a.out, dict(benchmark="merge_cpu", command=" ".join(sys.argv), machine=machine(), model="ViT-B-32", blocks=a.blocks, goals=GOALS, results=results))


if __name__ == "__main__": main()
