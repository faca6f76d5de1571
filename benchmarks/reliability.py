"""The reliability tests in their long form, and their figures: kills, cut files, memory, properties.

Usage: python benchmarks/reliability.py [PART ...]      PART: kills (or "kills merge", …), cut, memory, properties; all of them take about a quarter of an hour on one core

Writes benchmarks/results/reliability.json, keeping the parts that are not run, and prints a line for each. A failure ends it with the error.
"""
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from measure import machine, write_json

TESTS, OUT = Path(__file__).resolve().parent.parent / "tests" / "reliability", Path(__file__).resolve().parent / "results" / "reliability.json"
KILLS, ROUNDS = 200, 100


def figures(script, *args):
    "The JSON object that a script prints."
    return json.loads(subprocess.run([sys.executable, TESTS / script, *map(str, args)], env=os.environ | dict(OMP_NUM_THREADS="1"), stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def properties():
    "The 10,000 cases: how many tests, and how long."
    start = time.perf_counter()
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "long", TESTS / "test_properties.py"], env=os.environ | dict(OMP_NUM_THREADS="1"), cwd=TESTS.parent.parent, stdout=subprocess.PIPE, text=True)
    if run.returncode: raise SystemExit(run.stdout[-6000:])
    return dict(cases=10_000, properties=int(re.search(r"(\d+) passed", run.stdout)[1]), failed=0, seed=int(os.environ.get("SEED", 0)), seconds=round(time.perf_counter() - start, 1))


WORKS = ("merge", "merge-file", "replace", "suite", "records")
PARTS = {f"kills {work}": lambda work=work: figures("kills.py", work, "--kills", KILLS) for work in WORKS} | dict(cut=lambda: figures("kills.py", "--cut", ROUNDS), memory=lambda: figures("memory.py"), properties=properties)


def main(names):
    names = [part for name in names or ["kills", "cut", "memory", "properties"] for part in ([p for p in PARTS if p.startswith("kills")] if name == "kills" else [name])]
    if unknown := set(names) - set(PARTS): raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; known: kills, {', '.join(PARTS)}.")
    for name in names:
        known, found = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}, PARTS[name]()
        print(f"{name}: {json.dumps(found)}", flush=True)
        write_json(OUT, known | {"machine": machine(), name: found})


if __name__ == "__main__": main(sys.argv[1:])
