"""TSV-M of 8 LoRA adapters on one layer: in the small core against the dense route on the same deltas multiplied out.

    python benchmarks/lora.py                 # 4096 x 4096 last: some minutes, 3 GB of memory; writes results/lora.json
    python benchmarks/lora.py --sizes 512     # quick look

Both sides read the same adapter folders, in a process of its own each, so that the peak resident memory is its own; both are told the rank, so that
they keep the same components and their results can be compared. The dense side is this library's tsv_merge, which is several times faster than the
published algorithm (results/merge_cpu.json). Times are from adapters in memory to the merged layer: factors for the core, a matrix for the dense side. They are seconds of CPU
time in one thread, which other work on the machine hardly changes; the wall's clock is noted beside them.
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from measure import Timing, machine, relative_error, write_json
from merge_cpu import peak_mib

from tsv_nb.merge import tsv_merge
from tsv_nb.scale.lora import Adapter, LoraLayer
from tsv_nb.scale.lora_files import save_adapter
from tsv_nb.scale.lora_merge import lora_merge, named_adapters

HERE = Path(__file__).resolve().parent


def write_adapters(folder, size, rank, n_tasks):
    "Adapters of one square layer, B and A random, of a plausible size."
    g = torch.Generator().manual_seed(0)
    for t in range(n_tasks):
        left, right = torch.randn(size, rank, generator=g), torch.randn(rank, size, generator=g) / size
        save_adapter(Adapter({"layer.weight": LoraLayer(left, right, 2.)}), folder / f"task{t}")


def run_side(side, folder, rank):
    "Merge once (dense) or several times (core) in this process; the merged layer goes to a file."
    tasks, start = named_adapters(sorted(p for p in folder.iterdir() if p.is_dir())), peak_mib()
    torch.set_num_threads(1)
    times, wall = [], []
    for _ in range(1 if side == "dense" else 9):
        begin, clock = time.process_time(), time.perf_counter()
        merged = lora_merge(tasks, rank) if side == "core" else tsv_merge({t: {n: a[n] for n in a} for t, a in tasks.items()}, rank, exclude=())
        times.append(1e3 * (time.process_time() - begin)); wall.append(1e3 * (time.perf_counter() - clock))
    facts = dict(times_ms=times, wall_ms=Timing.of(wall).ms, start_mib=start, peak_mib=peak_mib())
    torch.save(merged["layer.weight"], folder / f"{side}.pt")
    return facts


def compare(size, rank, n_tasks):
    "Both sides on one size."
    with tempfile.TemporaryDirectory() as folder:
        write_adapters(Path(folder), size, rank, n_tasks)
        sides = {}
        for side in ("core", "dense"):
            out = subprocess.run([sys.executable, __file__, "--side", side, "--folder", folder, "--rank", str(rank)], capture_output=True, text=True, check=True)
            facts = json.loads(out.stdout.splitlines()[-1])
            timing = Timing.of(facts.pop("times_ms"))
            sides[side] = facts | dict(ms=timing.ms, low=timing.low, high=timing.high, repeats=timing.repeats, growth_mib=facts["peak_mib"] - facts["start_mib"])
        merged = {side: torch.load(Path(folder) / f"{side}.pt", weights_only=True) for side in sides}
    return dict(size=size, rank=rank, n_tasks=n_tasks, sides=sides, speedup=sides["dense"]["ms"] / sides["core"]["ms"], difference=relative_error(merged["core"], merged["dense"]))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sizes", default="512,1024,2048,4096", help="width of the square layer")
    p.add_argument("--rank", type=int, default=16, help="of each adapter")
    p.add_argument("--tasks", type=int, default=8)
    p.add_argument("--out", type=Path, default=HERE / "results" / "lora.json")
    p.add_argument("--side"); p.add_argument("--folder", type=Path)
    a = p.parse_args(argv)
    if a.side: print(json.dumps(run_side(a.side, a.folder, a.rank))); return 0
    results = []
    for size in map(int, a.sizes.split(",")):
        results.append(r := compare(size, a.rank, a.tasks))
        core, dense = r["sides"]["core"], r["sides"]["dense"]
        print(f"{size:5d}: core {core['ms']:9.1f} ms +{core['growth_mib']:7.1f} MiB, dense {dense['ms']:9.1f} ms +{dense['growth_mib']:7.1f} MiB, {r['speedup']:.0f} times, difference {r['difference']:.1e}", flush=True)
    write_json(a.out, dict(benchmark="lora", command="benchmarks/lora.py", machine=machine(), results=results))
    return 0


if __name__ == "__main__": sys.exit(main())
