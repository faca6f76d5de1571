"""Measure the offline world: every method of Part I on 8 tasks with three fine-tuning seeds, then on 14 and 20 tasks.

Usage: python benchmarks/world.py [OUT]     (default benchmarks/results/world.json; about 20 minutes on 2 cores with an empty cache)

Prints one line per run and writes all per-task figures. Fine-tuned towers are taken from the cache if they are there.
"""
import json
import platform
import sys
import time
from itertools import combinations
from pathlib import Path

import torch

from tsv_nb import apply_task_vector, compress, task_arithmetic, tsv_merge, weight_average
from tsv_nb.vision.evaluate import choose_alpha, load_world

RUNS = [(8, 0), (8, 1), (8, 2), (14, 0), (20, 0)]
RATIOS = [.05, .1, .15, .2]


def flat(vector): return torch.cat([v.flatten() for v in vector.values()])


def measure(world):
    "Per-task test accuracy of every method, and what the task vectors look like."
    T, total, merged = len(world.names), task_arithmetic(world.vectors), tsv_merge(world.vectors, small="average")
    def on(vector, alpha=1.): return apply_task_vector(world.pretrained, vector, alpha)
    def own(states): return {t: world.accuracy(s, tasks=[t])[t] for t, s in states.items()}
    ta, ta_curve = choose_alpha(world, lambda a: on(total, a), sorted({1 / T, *(i / 20 for i in range(1, 9)), .5, .7, 1.}))
    best, curve = choose_alpha(world, lambda a: on(merged, a), [.6, .8, 1., 1.2, 1.4, 1.6])
    scores = {"zero-shot": world.accuracy(world.pretrained), "weight average": world.accuracy(on(weight_average(world.vectors))), "Task Arithmetic": world.accuracy(on(total, ta)),
              "TSV-M": world.accuracy(on(merged)), "TSV-M, alpha on validation": world.accuracy(on(merged, best)),
              "low-rank only": world.accuracy(on(tsv_merge(world.vectors, small="average", orthogonalize=None))), "fine-tuned": own(world.finetuned)}
    if T <= 8: scores["orthogonalize only"] = world.accuracy(on(tsv_merge(world.vectors, small="average", rank="full"))) # minutes for more tasks
    size = {}
    for r in RATIOS:
        archives = {t: compress(v, ratio=r) for t, v in world.vectors.items()}
        size[f"TSV-C {r:g}"] = sum(a.ratio for a in archives.values()) / T
        scores[f"TSV-C {r:g}"] = own({t: a.apply_to(world.pretrained) for t, a in archives.items()})
    units = [(lambda f: f / f.norm())(flat(v)) for v in world.vectors.values()]
    return dict(scores=scores, alpha={"Task Arithmetic": ta, "TSV-M, alpha on validation": best}, curves={"Task Arithmetic": ta_curve, "TSV-M": curve}, tsv_c_size=size,
                cosine=sum((a @ b).item() for a, b in combinations(units, 2)) / max(1, T * (T - 1) // 2),
                relative_length=sum((flat(v).norm() / flat(world.pretrained).norm()).item() for v in world.vectors.values()) / T)


def mean(accs): return 100 * sum(accs.values()) / len(accs)


out, results = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "results" / "world.json"), []
for tasks, seed in RUNS:
    start = time.perf_counter()
    row = dict(tasks=tasks, seed=seed) | measure(load_world(tasks, seed)) | dict(seconds=round(time.perf_counter() - start, 1))
    single = row["scores"]["fine-tuned"]
    row["mean"] = {m: dict(absolute=round(mean(a), 2), normalized=round(mean({t: a[t] / single[t] for t in a}), 2)) for m, a in row["scores"].items()}
    results.append(row)
    print(f"{tasks} tasks, seed {seed}: " + ", ".join(f"{m} {v['absolute']:.1f} ({v['normalized']:.1f})" for m, v in row["mean"].items()), flush=True)
facts = dict(torch=torch.__version__, python=platform.python_version(), machine=platform.machine(), threads=torch.get_num_threads())
out.parent.mkdir(parents=True, exist_ok=True)
out.write_text(json.dumps(dict(command="python benchmarks/world.py", versions=facts, runs=results), indent=1) + "\n", encoding="utf-8")
