"""Make the table behind the merge playground: every subset of four tasks, merged by five methods, at every scale, on validation images.

Usage: python benchmarks/playground.py [--seconds N] [--tasks T] [--out FILE]     (about 6 minutes on one core with the offline world cached; each further task more than doubles that)

Each row is written down as soon as it is known, so a run that was stopped, or that ended after N seconds, goes on where it was: run the command again.
"""
import argparse
import platform
import sys
import time
from pathlib import Path

import torch
from platformdirs import user_cache_dir
from tqdm import tqdm

import tsv_nb
from tsv_nb.explore.merge_table import live_table, save_table
from tsv_nb.vision.evaluate import load_world
from tsv_nb.vision.finetune import FINETUNE, state_digest
from tsv_nb.vision.records import Records, code_digest, data_digest, fact_digest

ROOT = Path(__file__).resolve().parent.parent
TASKS, IMAGES = 4, 120


def inputs(table) -> dict:
    "Digests of all that the numbers depend on."
    world = table.world
    return dict(pretrained=state_digest(world.pretrained)[:16], finetuned={t: state_digest(world.finetuned[t])[:16] for t in table.tasks},
                images={t: data_digest(world.data[t, table.split])[:16] for t in table.tasks}, recipe=fact_digest(FINETUNE)[:16], code=code_digest()[:16])


def parts(table, width=12):
    "Methods, subsets and up to twelve of their scales: the subsets of the first tasks first, so that the table of fewer tasks is complete before the next one is begun."
    for s in sorted(table.subsets(), key=lambda s: table.tasks.index(s[-1])):
        for first in range(0, len(table.alphas), width):
            for m in table.methods:
                if alphas := [a for a in table.scales(m) if a][first:first + width]: yield m, s, alphas


def main(argv=None) -> int: # 0: the table is written; 3: time is up, run again
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many seconds")
    p.add_argument("--tasks", type=int, default=TASKS, help="the first so many tasks of the offline world")
    p.add_argument("--out", type=Path, default=ROOT / "tsv_nb" / "explore" / "playground.json", help="the table")
    p.add_argument("--records", type=Path, default=Path(user_cache_dir("tsv-nb")) / "playground", help="folder of the rows that are known")
    args, start = p.parse_args(argv), time.perf_counter()
    table = live_table(load_world(args.tasks), images=IMAGES)
    facts = inputs(table)
    rows = [(name, (t,), [1.]) for name in ("zero_shot", "finetuned") for t in table.tasks] + list(parts(table))
    spent = 0.
    with Records(args.records) as records, tqdm(total=sum(len(s) * len(a) for _, s, a in rows), unit="accuracy") as bar:
        for method, tasks, alphas in rows:
            own = {name: {t: digests[t] for t in tasks} for name, digests in facts.items() if isinstance(digests, dict)}
            key, before = fact_digest(facts | own, method, tasks, alphas), time.perf_counter()
            if key not in records:
                if before - start > args.seconds:
                    print(f"{bar.n} of {bar.total} accuracies are known; run the command again to go on.", file=sys.stderr)
                    return 3
                for a in alphas: table.accuracy(tasks, method, a)
                records.add(key, hits=[table.hits[method, tasks, a] for a in alphas], seconds=round(time.perf_counter() - before, 3))
            table.hits |= {(method, tasks, a): hits for a, hits in zip(alphas, records[key]["hits"])}
            spent += records[key]["seconds"]
            bar.update(len(tasks) * len(alphas))
    versions = dict(tsv_nb=tsv_nb.__version__, torch=torch.__version__, python=platform.python_version(), machine=platform.machine())
    table.about = dict(command="python benchmarks/playground.py" + f" --tasks {args.tasks}" * (args.tasks != TASKS), seconds=round(spent), threads=torch.get_num_threads(), versions=versions, inputs=facts)
    print(f"{save_table(table, args.out)}: {args.out.stat().st_size / 1e3:.0f} kB, {spent:.0f} s", file=sys.stderr)
    return 0


if __name__ == "__main__": sys.exit(main())
