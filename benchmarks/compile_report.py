"""Compile every Triton program of the package for the supported chips and report what each uses there. Needs Triton, but no GPU.

Usage: python benchmarks/compile_report.py [OUT]     (default benchmarks/results/compile.json)

The programs come from aot_variants() of every tsv_nb.kernels.*_triton module that has it. Prints a summary per kernel, chip and tile size, and lists all
that spill or do not fit; exits with 1 if there are any.
"""
import importlib
import json
import os
import pkgutil
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton

import tsv_nb.kernels
from tsv_nb.kernels.aot import CHIPS, compile_variant, runs_on


def modules():
    "The modules that list programs to compile."
    names = (o.name for o in pkgutil.iter_modules(tsv_nb.kernels.__path__, "tsv_nb.kernels.") if o.name.endswith("_triton"))
    return sorted(name for name in names if hasattr(importlib.import_module(name), "aot_variants"))


def compile_one(module, index, target):
    return compile_variant(importlib.import_module(module).aot_variants()[index], target)


def compile_report(target, pool=None):
    "Every program compiled for a target: a list of dicts with registers, spills, shared memory and whether it fits."
    jobs = [(m, i, target) for m in modules() for i, o in enumerate(importlib.import_module(m).aot_variants()) if runs_on(o, target)]
    return list((pool.map if pool else map)(compile_one, *zip(*jobs)))


def summary(rows):
    "One line per kernel, chip and tile size: the largest figures over types, precisions and bases."
    groups = {}
    for o in rows: groups.setdefault((o["kernel"], o["target"], o["name"].split()[0]), []).append(o)
    head = f"{'kernel':<22} {'chip':<7} {'tile':<11} {'programs':>8} {'registers':>9} {'spills':>6} {'shared KiB':>10}"
    lines = [f"{k:<22} {t:<7} {tile:<11} {len(g):>8} {max(o['registers'] for o in g):>9} {max(o['spills'] for o in g):>6} {max(o['shared'] for o in g) / 1024:>10.1f}"
             for (k, t, tile), g in sorted(groups.items())]
    return "\n".join([head, *lines])


def main(out="benchmarks/results/compile.json"):
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 8)) as pool: rows = [o for target in CHIPS for o in compile_report(target, pool)]
    Path(out).write_text(json.dumps(dict(triton=triton.__version__, limits={k: c.shared for k, c in CHIPS.items()}, programs=rows), indent=0) + "\n")
    print(summary(rows))
    bad = [o for o in rows if not o["fits"]]
    print(f"Triton {triton.__version__}: {len(rows)} programs compiled, {len(bad)} spill or do not fit")
    for o in bad: print("  ", o)
    return bool(bad)


if __name__ == "__main__": sys.exit(main(*sys.argv[1:]))
