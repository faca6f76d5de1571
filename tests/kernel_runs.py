"""What the tests of both kernels run in processes of their own: the interpreter's cases, and ahead-of-time compilation."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def interpret(cases, least):
    "Run a file of tests/interpreter with the interpreter switched on; it must pass, with more than `least` cases."
    pytest.importorskip("triton")
    env = os.environ | dict(TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    out = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "interpreter" / cases], capture_output=True, text=True, timeout=900, env=env, cwd=HERE.parent)
    closing = (out.stdout.strip().splitlines() or [""])[-1]
    passed = re.search(r"(\d+) passed", closing)
    assert out.returncode == 0 and passed and int(passed[1]) > least, f"{closing}\n{out.stdout[-5000:]}{out.stderr[-2000:]}"
    print("interpreter:", closing)


def compile_variants(module, cache, *words):
    "What aot_cover.py reports of a module, in a process without the interpreter and with a cache of its own."
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | dict(TRITON_CACHE_DIR=str(cache))
    out = subprocess.run([sys.executable, HERE / "aot_cover.py", module, *words], capture_output=True, text=True, timeout=1800, env=env, cwd=HERE.parent)
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout.splitlines()[-1])


def assert_report_is_current(variants):
    "benchmarks/results/compile.json has every program, and all fit."
    from tsv_nb.kernels.aot import CHIPS, runs_on
    rows = {(o["kernel"], o["name"], o["target"]): o["fits"] for o in json.loads((HERE.parent / "benchmarks/results/compile.json").read_text())["programs"]}
    listed = [(v.kernel.__name__, v.name, t) for v in variants for t in CHIPS if runs_on(v, t)]
    assert len(set(listed)) == len(listed)
    assert set(listed) <= rows.keys() and all(rows[o] for o in listed), "run benchmarks/compile_report.py"


def too_big(rows):
    "Programs that do not fit, of those that did not fit without a spill. Compilers older than the report's may spill a register or two: Triton 3.8 spills 8 bytes in one program for sm_90."
    import triton
    from tsv_nb.kernels.aot import CHIPS, SPILLS
    number = lambda text: tuple(map(int, text.split(".")[:2]))
    older = number(triton.__version__) < number(json.loads((HERE.parent / "benchmarks/results/compile.json").read_text())["triton"])
    return [o for o in rows if o["shared"] > CHIPS[o["target"]].shared or o["spills"] > SPILLS + (16 if older else 0)]
