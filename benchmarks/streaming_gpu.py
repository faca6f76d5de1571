"""A streaming merge whose matrices are decomposed on a GPU, against the same merge on the CPU of the same machine: the same files, and how far the results differ.

    python benchmarks/streaming_gpu.py --folder /tmp/models   # one block of a language model, 8 tasks (about 2 GB there); writes results/streaming_gpu.json
    python benchmarks/streaming_gpu.py --folder /tmp/models --device cpu --tiny # every line of it on small matrices, without a GPU

`tsv_merge --device cuda` and `--device cpu` are processes of their own; a time is that of the run's report, from checked inputs to the finished output. Each
merge on a GPU runs twice, for the first one tunes kernels. `--wide` adds a block 4096 wide (another 8 GB) on the GPU only: on a CPU it takes longer than a benchmark should.
"""
import argparse
import json
import shutil
from pathlib import Path

import torch
from measure import machine, relative_error, write_json
from streaming import COMMAND, HERE, make, run, session, shapes

from tsv_nb.scale.checkpoints import open_checkpoint


def merge(folder, names, out, device, seconds):
    "Merge on a device; what the report says, and where the output is."
    out = folder / out
    shutil.rmtree(out, ignore_errors=True)
    done = run([*COMMAND, *(str(folder / n) for n in names), "--out", str(out), "--device", device, "--quiet"], kill_after=seconds)
    if done["code"]: raise RuntimeError(f"tsv_merge --device {device} ended with {done['code']} after {done['seconds']:.0f} s:\n{done['text']}")
    return session(out), out


def difference(folder, one, two):
    "The largest relative difference of what two merges did to a matrix."
    base, a, b = (open_checkpoint(p) for p in (folder / "base", one, two))
    return max(relative_error(a[n].double() - base[n].double(), b[n].double() - base[n].double()) for n in base if base[n].ndim == 2 and not a[n].equal(base[n]))


def main():
    "Make the checkpoints, merge them on both devices, compare; print and write the figures after every merge."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--folder", type=Path, required=True); p.add_argument("--out", type=Path, default=HERE / "results" / "streaming_gpu.json")
    p.add_argument("--tasks", type=int, default=8); p.add_argument("--device", default="cuda"); p.add_argument("--tiny", action="store_true"); p.add_argument("--wide", action="store_true")
    p.add_argument("--seconds", type=float, default=200, help="the most that one merge may take")
    a = p.parse_args()
    result = dict(benchmark="streaming_gpu", tiny=a.tiny, machine=machine(a.device), tasks=a.tasks, rows=[])
    for hidden, mlp, both in [(64, 176, True), (96, 264, False)] if a.tiny else [(2048, 5632, True), (4096, 11008, False)][:1 + a.wide]:
        folder, sizes, names = a.folder / str(hidden), shapes(1, hidden, mlp, 1000), ["base", *(f"task{i}" for i in range(a.tasks))]
        for name in names: make(folder / name, sizes, None if name == "base" else name, 10**9)
        row = dict(hidden=hidden, mlp=mlp, layers=1, matrices=7, checkpoint_bytes=sum(f.stat().st_size for f in (folder / "base").glob("*.safetensors")))
        result["rows"].append(row)
        for _ in range(2): found, on_device = merge(folder, names, "on_device", a.device, a.seconds); row.setdefault("device_seconds", []).append(found["seconds"])
        row["machines"] = found["machines"]
        write_json(a.out, result)
        if both:
            found, on_cpu = merge(folder, names, "on_cpu", "cpu", a.seconds)
            row |= dict(cpu_seconds=found["seconds"], difference=difference(folder, on_device, on_cpu), ratio=found["seconds"] / row["device_seconds"][1])
            write_json(a.out, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__": main()
