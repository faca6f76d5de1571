"""Re-enact the experiments of the TSV paper on the offline world: everything that nbs/vision/25_paper.ipynb shows.

Usage: python benchmarks/paper.py [SECTION ...] [--out benchmarks/results/paper.json] [--force]

Sections: single, ablation, tasks, rank, depth, times. All of them by default; a section that is in the file already is left alone unless --force is given,
and the file is written after each one. The table of all methods is made by `tsv_eval`, see benchmarks/paper.sh. About an hour on 2 cores.
"""
import argparse
import json
import os
import platform
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm

from tsv_nb import apply_task_vector, compress, interference_by_layer, merge_plan, task_arithmetic, tsv_merge, weight_average
from tsv_nb.beyond import isotropic_merge
from tsv_nb.methods import MERGE_METHODS
from tsv_nb.vision.evaluate import World, choose_alpha, load_world

COUNTS = (8, 14, 20)
FINE = [.05, .1, .15, .2, .25, .3, .4, .5, .6, .8, 1., 1.2, 1.4, 1.7, 2., 2.5]
STEPS = (2, 4, 6, 8, 11, 14, 17, 20)


def mean(accs): return sum(accs.values()) / len(accs)


def some(world, n):
    "The same world with its first n tasks only."
    names = world.names[:n]
    return World(names, world.pretrained, {t: world.finetuned[t] for t in names}, {t: world.heads[t] for t in names}, world.data, world.encoder)


def judged(world, vector, grid=None):
    "Test accuracy of a merged vector at alpha = 1, and at the alpha of the grid that validation images choose."
    row = {"at_1": mean(world.accuracy(apply_task_vector(world.pretrained, vector)))}
    if grid: row["alpha"], _ = choose_alpha(world, lambda a: apply_task_vector(world.pretrained, vector, a), grid)
    row["chosen"] = row["at_1"] if row.get("alpha", 1.) == 1. else mean(world.accuracy(apply_task_vector(world.pretrained, vector, row["alpha"])))
    return row


def single(world):
    "Every fine-tuned tower on every task: the diagonal is the single-task table."
    return {t: world.accuracy(state) for t, state in tqdm(world.finetuned.items(), desc="single")} | {"zero-shot": world.accuracy(world.pretrained)}


def ablation(world):
    "Low rank and orthogonalization, each with and without the other, at 8, 14 and 20 tasks."
    result = {}
    for n in COUNTS:
        w = some(world, n)
        vectors = {"neither": task_arithmetic(w.vectors), "low rank": tsv_merge(w.vectors, small="average", orthogonalize=None),
                   "orthogonalization": tsv_merge(w.vectors, small="average", rank="full"), "both": tsv_merge(w.vectors, small="average")}
        result[n] = {k: judged(w, v, FINE) for k, v in tqdm(vectors.items(), desc=f"ablation, {n} tasks")}
    return result


def tasks(world):
    "Accuracy of four methods from 2 to 20 tasks."
    result = {}
    for n in tqdm(STEPS, desc="tasks"):
        w = some(world, n)
        own = w.finetuned_accuracy()
        result[n] = {"fine-tuned": mean(own), "zero-shot": mean(w.accuracy(w.pretrained)), "weight average": judged(w, weight_average(w.vectors))["at_1"],
                     "Task Arithmetic": judged(w, task_arithmetic(w.vectors), [a for a in FINE if a <= 1])["chosen"],
                     "TSV-M": judged(w, tsv_merge(w.vectors, small="average"))["at_1"], "Iso-C": judged(w, isotropic_merge(w.vectors), [.3, .5, .7, 1., 1.5, 2., 2.5, 3.])["chosen"]}
    return result


def by_share(world, k):
    "TSV-M that keeps k of 448 components in the square layers, and the same share, at least one, in smaller matrices."
    groups = {}
    for name, treatment in merge_plan(world.vectors, small="average").items(): groups.setdefault(max(1, min(world.pretrained[name].shape) * k // 448) if treatment.how == "merge" else None, []).append(name)
    parts = [tsv_merge({t: {n: v[n] for n in names} for t, v in world.vectors.items()}, rank=r, small="average") for r, names in groups.items()]
    return {n: x for part in parts for n, x in part.items()}


def rank(world):
    "TSV-M and TSV-C, 8 tasks, against the number of components that each task keeps."
    w, result = some(world, 8), {"TSV-M": {}, "TSV-C": {}}
    own = w.finetuned_accuracy()
    for k in tqdm([1, 2, 3, 5, 8, 12, 18, 28, 40, 56], desc="rank of TSV-M"): result["TSV-M"][k] = w.accuracy(apply_task_vector(w.pretrained, by_share(w, k)))
    for k in tqdm([1, 2, 3, 5, 8, 12, 18, 28, 40, 56, 112, 224], desc="rank of TSV-C"):
        archives = {t: compress(v, rank=k) for t, v in w.vectors.items()}
        result["TSV-C"][k] = {"bytes": sum(a.ratio for a in archives.values()) / len(archives), "accuracy": {t: w.accuracy(a.apply_to(w.pretrained), tasks=[t])[t] for t, a in archives.items()}}
    return result | {"fine-tuned": own, "components": {n: min(w.pretrained[n].shape) for n, t in merge_plan(w.vectors, small="average").items() if t.how == "merge"}}


def depth(world):
    "Interference of each layer at 8, 14 and 20 tasks."
    return {n: interference_by_layer(some(world, n).vectors) for n in tqdm(COUNTS, desc="depth")}


def times(world):
    "Seconds of each method of the table for 8, 14 and 20 tasks, task vectors in memory; the fastest of two runs."
    result = {}
    for n in COUNTS:
        vectors, result[n] = dict(list(world.vectors.items())[:n]), {}
        for name, method in tqdm(MERGE_METHODS.items(), desc=f"times, {n} tasks"):
            runs = []
            for _ in range(2):
                start = time.perf_counter()
                method(vectors)
                runs.append(time.perf_counter() - start)
            result[n][name] = round(min(runs), 3)
    return result


SECTIONS = {f.__name__: f for f in (single, ablation, tasks, rank, depth, times)}
HERE = Path(__file__).parent


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "paper.json")
    parser.add_argument("--force", action="store_true", help="measure again what is in the file already")
    args = parser.parse_args()
    if unknown := set(args.sections) - set(SECTIONS): parser.error(f"unknown section {', '.join(unknown)}; known: {', '.join(SECTIONS)}")
    done = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else dict(command="python benchmarks/paper.py", seconds={})
    todo = [s for s in args.sections or SECTIONS if args.force or s not in done]
    world = load_world(20) if todo else None
    for section in todo:
        start = time.perf_counter()
        done[section] = SECTIONS[section](world)
        done["seconds"][section] = round(time.perf_counter() - start, 1)
        done["versions"] = dict(torch=torch.__version__, python=platform.python_version(), machine=platform.machine(), threads=torch.get_num_threads())
        partial = args.out.with_suffix(".tmp")
        args.out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, args.out)
        print(f"{section}: {done['seconds'][section]:.0f} s, written to {args.out}", flush=True)


if __name__ == "__main__": main()
