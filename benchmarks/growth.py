"""How TSV-M's time and memory grow with the width of a layer, the number of tasks and the number of layers; both sides on the same tensors.

    python benchmarks/growth.py # about three minutes on 2 cores; writes results/growth.json

Every point is a process of its own, so that the peak of resident memory is its own; what the imports take is subtracted. A point merges (4 w, w) matrices
with realistic spectra, in memory, on the CPU.
"""
import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from measure import machine, measure_sides, write_json
from merge_cpu import peak_mib
from merging import published_merge, task_matrices

from tsv_nb import tsv_merge

HERE = Path(__file__).resolve().parent
CLEAR = Path("/proc/self/clear_refs")
WIDTHS, TASKS, LAYERS = (96, 192, 384, 768, 1152), (2, 4, 8, 14, 20), (1, 2, 4, 8)


def reset_peak():
    "Forget the peak of resident memory so far (making the inputs took more than merging them). Linux only; elsewhere the figure is a lower bound."
    if CLEAR.exists(): CLEAR.write_text("5")


def point(side, width, n_tasks, layers, threads, rounds):
    "Milliseconds (median, 20%, 80%) of merging, and the memory it took beyond its inputs, in MiB."
    torch.set_num_threads(threads)
    base = task_matrices((4 * width, width), n_tasks, "realistic", 0).float()
    vectors = [{f"layer{i}.w": d.roll(i, 0) for i in range(layers)} for d in base]
    merge = {"ours": tsv_merge, "published": published_merge}[side]
    small = [{"w": torch.randn(128, 96)} for _ in range(2)]
    merge(small) # imports and libraries' first calls stay out
    reset_peak()
    before = peak_mib()
    times = measure_sides({side: lambda: merge(vectors)}, "cpu", rounds=rounds)[side]
    return dict(side=side, width=width, n_tasks=n_tasks, layers=layers, ms=times.ms, low=times.low, high=times.high,
                input_mib=sum(t.nbytes for v in vectors for t in v.values()) / 2**20, extra_mib=max(0., peak_mib() - before))


def main():
    "Three sweeps; prints a table and writes the JSON."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--threads", type=int, default=2); p.add_argument("--point", nargs=4); p.add_argument("--rounds", type=int, default=3); p.add_argument("--tiny", action="store_true")
    p.add_argument("--out", type=Path, default=HERE / "results" / "growth.json")
    a = p.parse_args()
    if a.point: return print(json.dumps(point(a.point[0], *map(int, a.point[1:]), a.threads, a.rounds)))
    widths, tasks, layers = ((96, 128), (2, 3), (1, 2)) if a.tiny else (WIDTHS, TASKS, LAYERS)
    mid = widths[-3] if len(widths) > 2 else widths[0]
    sweeps = {"width": [(w, 8, 1) for w in widths], "n_tasks": [(mid, t, 1) for t in tasks], "layers": [(mid, 8, n) for n in layers]}
    results = {}
    for sweep, points in sweeps.items():
        results[sweep] = []
        for x in points:
            pair = []
            for side in ("published", "ours"):
                out = subprocess.run([sys.executable, __file__, "--point", side, *map(str, x), "--threads", str(a.threads), "--rounds", str(a.rounds)], check=True, capture_output=True, text=True)
                pair.append(json.loads(out.stdout.splitlines()[-1]))
            results[sweep] += pair
            pub, ours = pair
            print(f"{sweep:8s} width {x[0]:5d} tasks {x[1]:3d} layers {x[2]:2d}: published {pub['ms']:8.0f} ms {pub['extra_mib']:6.0f} MiB | ours {ours['ms']:8.0f} ms {ours['extra_mib']:6.0f} MiB | {pub['ms'] / ours['ms']:5.1f} x", flush=True)
    write_json(a.out, dict(benchmark="growth", command=" ".join(sys.argv), machine=machine(), results=results))


if __name__ == "__main__": main()
