"""Compile a covering choice of a module's Triton programs, or all, and print what does not fit.

Usage: python tests/aot_cover.py tsv_nb.kernels.reconstruct_triton [all]      (without TRITON_INTERPRET)

The covering choice has every tile size of every kernel on every chip, and every type, precision and other word of the variants' names on every chip.
"""
import importlib
import json
import sys

from tsv_nb.kernels.aot import CHIPS, compile_variant, runs_on


def jobs(module):
    variants = importlib.import_module(module).aot_variants()
    return [(v, target) for v in variants for target in CHIPS if runs_on(v, target)]


def facts(variant, target):
    "What a job covers."
    tile, *words = variant.name.split()
    return {(variant.kernel.__name__, target, tile), *((variant.kernel.__name__, target, o) for o in words)}


def cover(jobs):
    "Greedily, the jobs that cover something new."
    seen, chosen = set(), []
    for job in sorted(jobs, key=lambda o: -len(facts(*o))):
        if facts(*job) - seen: chosen.append(job)
        seen |= facts(*job)
    return chosen


if __name__ == "__main__":
    todo = jobs(sys.argv[1])
    rows = [compile_variant(*o) for o in (todo if "all" in sys.argv[2:] else cover(todo))]
    print(json.dumps(dict(listed=len(todo), compiled=len(rows), bad=[o for o in rows if not o["fits"]])))
