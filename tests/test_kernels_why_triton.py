"""The exercise of 10_why_triton: the solution that its page shows must pass the check that its page offers."""
import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("triton")
NOTEBOOK = Path(__file__).resolve().parent.parent / "nbs/kernels/10_why_triton.ipynb"
pytestmark = pytest.mark.skipif(not NOTEBOOK.exists(), reason="needs the source tree")
IMPORTS = "import torch, triton, triton.language as tl\nfrom fastcore.test import test_eq, test_close\n"


def page():
    "The check and the solution, as the reader sees them."
    cells = [(c["cell_type"], "".join(c["source"])) for c in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]]
    check = next(s for kind, s in cells if kind == "code" and s.startswith("def check("))
    details = next(s for kind, s in cells if kind == "markdown" and "<details>" in s)
    return check, textwrap.dedent("\n".join(l for l in details.splitlines() if not l.strip() or l.startswith("    ")))


def run(tmp_path, check, solution):
    file = tmp_path / "solution.py" # a file, since triton reads a kernel's source from one
    file.write_text(f"{IMPORTS}\n{check}\n\n{solution}")
    return subprocess.run([sys.executable, file], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300)


def test_solution_passes_the_check(tmp_path):
    check, solution = page()
    assert "check(fused)" in solution
    out = run(tmp_path, check, solution)
    assert out.returncode == 0, out.stderr[-2000:]


@pytest.mark.parametrize("pattern,replacement", [
    (r"\(alpha \* s\)", "s"), # alpha forgotten
    (r"base \+ acc", "acc"), # base forgotten
    (r"base \+ acc, mask=mask_m & mask_n", "base + acc, mask=mask_m"), # writes past the last column
    (r"mask=offs_k < K, other=0.", "mask=offs_k < K, other=float('nan')"), # wrong `other`
])
def test_check_notices(tmp_path, pattern, replacement):
    check, solution = page()
    wrong, n = re.subn(pattern, replacement, solution)
    assert n == 1
    out = run(tmp_path, check, wrong)
    killed = "mask_m" in replacement and (out.returncode < 0 or "InterpreterError" in out.stderr) # a store past the last row may hit the heap's own records, or another array's, before the check sees it
    assert killed or out.returncode > 0 and "AssertionError" in out.stderr, out.stderr[-2000:]
