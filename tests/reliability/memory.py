"""Merge a checkpoint that is several times larger than the memory that is allowed.

Usage: python tests/reliability/memory.py [--times 4]        prints a JSON object
       python tests/reliability/memory.py merge|load|many FOLDER ALLOWED     (what it starts: the work under a limit; `many`: of tiny tensors, 0 for no limit)

The system enforces the limit (RLIMIT_DATA: what a process allocates beyond what it had after a small merge); an allocation beyond it fails.
"""
import argparse
import functools
import json
import math
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).resolve().parent))
TASKS, SIDE, LAYER = 2, (8192, 64), 8192 * 64 * 4 # tall matrices: many bytes that are decomposed quickly


def known(field): # bytes
    "A line of /proc/self/status."
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)[1])


def make_model(folder, nbytes):
    "A base and two fine-tuned models in shards of 64 MiB, `nbytes` each; what is held is a shard."
    layers, g = math.ceil(nbytes / LAYER), torch.Generator().manual_seed(0)
    block = [torch.randn(SIDE, generator=g) for _ in range(4)]
    for name, tune in (("base", 0.), *((f"task{t}", .01 * (t + 1)) for t in range(TASKS))):
        (folder / name).mkdir()
        files, shards = {}, [range(i, min(i + 32, layers)) for i in range(0, layers, 32)]
        for s, shard in enumerate(shards, 1):
            file = f"model-{s:05d}-of-{len(shards):05d}.safetensors"
            save_file({f"layers.{i}.weight": block[i % 4].roll(i) + tune * block[(i + 1 + round(100 * tune)) % 4].roll(3 * i) for i in shard}, folder / name / file)
            files |= {f"layers.{i}.weight": file for i in shard}
        (folder / name / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=files)))


def plan_of(folder):
    import tsv_nb.scale.plan as plan
    from tsv_nb.scale.checkpoints import open_checkpoint
    base, *tasks = (open_checkpoint(folder / name) for name in ("base", *(f"task{t}" for t in range(TASKS))))
    tasks = {f"task{t}": c for t, c in enumerate(tasks)}
    small = functools.partial(plan.cut_units, limit=2**24) # units of less memory, so that a smaller checkpoint is too large
    with patch.object(plan, "cut_units", small): return plan.make_plan("merge", base, tasks, threads=1, shard_size="256MB"), base, tasks


def everything(folder, out):
    "The naive way: all checkpoints in memory, a merge, a file."
    from tsv_nb import apply_task_vector, task_vector, tsv_merge
    def load(name): return {k: t for file in sorted((folder / name).glob("*.safetensors")) for k, t in load_file(file).items()}
    base = load("base")
    save_file(apply_task_vector(base, tsv_merge([task_vector(base, load(f"task{t}")) for t in range(TASKS)])), out)


def streamed(folder, out):
    from tsv_nb.scale.stream import run_plan
    run_plan(*plan_of(folder), out, progress=False)


def make_many(folder, n):
    "A base and fine-tuned models of so many tiny tensors."
    for t, name in enumerate(("base", *(f"task{t}" for t in range(TASKS)))):
        save_file({f"layers.{i // 4}.block.{i % 4}.weight": torch.full((16,), float(t)) for i in range(n)}, folder / f"{name}.safetensors")


def many(folder, out):
    "Merge tiny tensors."
    from tsv_nb.scale.checkpoints import open_checkpoint
    from tsv_nb.scale.plan import make_plan
    from tsv_nb.scale.stream import run_plan
    if not (folder / "base.safetensors").exists(): make_many(folder, 4) # the small model before the measurement
    base, tasks = open_checkpoint(folder / "base.safetensors"), {f"task{t}": open_checkpoint(folder / f"task{t}.safetensors") for t in range(TASKS)}
    plan = make_plan("merge", base, tasks, threads=1)
    run_plan(plan, base, tasks, out, progress=False)
    return plan


def limited(work, folder, allowed):
    "In a process of its own: warm up on a small model, then the large one under the limit; what was measured."
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as small: # libraries load what they load, and keep their buffers
        make_model(Path(small), LAYER)
        work(Path(small), Path(small) / "out.safetensors")
    Path("/proc/self/clear_refs").write_text("5") # the high-water mark starts again here
    data, resident, start = known("VmData"), known("VmRSS"), time.perf_counter()
    if allowed: resource.setrlimit(resource.RLIMIT_DATA, (data + allowed, resource.RLIM_INFINITY))
    try: plan = work(folder, folder / f"out of {work.__name__}")
    except (RuntimeError, MemoryError) as e: plan, error = None, str(e).splitlines()[0] or type(e).__name__
    else: error = None
    return dict(error=error, estimate=plan and plan.peak_bytes, units=plan and len(plan.units), peak=known("VmHWM") - resident, baseline=resident, seconds=round(time.perf_counter() - start, 1))


def started(name, folder, allowed):
    "Figures of a child."
    run = subprocess.run([sys.executable, __file__, name, folder, str(allowed)], capture_output=True, text=True)
    if run.returncode: raise AssertionError(f"{name} ended with {run.returncode}: {run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def figures(times, folder):
    "The plan's estimate is what is allowed; the checkpoint is `times` as large."
    folder = Path(folder)
    (folder / "probe").mkdir()
    make_model(folder / "probe", 80 * LAYER)
    allowed = plan_of(folder / "probe")[0].peak_bytes
    make_model(folder, times * allowed)
    plan, base, _ = plan_of(folder)
    allowed = plan.peak_bytes
    return dict(checkpoint=base.total_bytes, inputs=(1 + TASKS) * base.total_bytes, allowed=allowed, times=round(base.total_bytes / allowed, 2), estimate=plan.peak_bytes, estimated_seconds=round(plan.seconds, 1),
                streamed=started("merge", folder, allowed), load_everything=started("load", folder, allowed))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=("merge", "load", "many"), nargs="?")
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("allowed", type=int, nargs="?")
    parser.add_argument("--times", type=float, default=4.1)
    args = parser.parse_args()
    if args.work: print(json.dumps(limited(dict(merge=streamed, load=everything, many=many)[args.work], args.folder, args.allowed))); return
    with tempfile.TemporaryDirectory() as folder: print(json.dumps(figures(args.times, folder)))


if __name__ == "__main__": main()
