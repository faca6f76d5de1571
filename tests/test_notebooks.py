"""Every notebook runs from top to bottom, in a process of its own. Those that need the offline world share its cache."""
import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "nbs").rglob("*.ipynb") if not any(part.startswith(("_", ".")) for part in p.relative_to(ROOT / "nbs").parts))
HEAVY = ["torch", "matplotlib.pyplot", "nbdev.test"] # imported once for all processes, which saves seconds for each of a hundred pages; nothing that imports Triton, whose interpreter is chosen before


def run_page(path, log):
    "In a process of its own: run a notebook and end with 1 if a cell fails."
    multiprocessing.set_start_method(None, force=True) # the system's own for what the page starts, not that of this process
    with open(log, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1); os.dup2(file.fileno(), 2)
        os.chdir(ROOT)
        sys.path.insert(0, str(ROOT)) # the pages run what they export
        from nbdev.test import test_nb
        ok, seconds = test_nb(ROOT / path, skip_flags=["notest", "cuda", "slow"])
        print(f"{seconds:.1f} s", flush=True)
    os._exit(not ok) # threads that a page has left do not hold it up


@pytest.fixture(scope="session")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    return context


def failing(tmp_path):
    "A page whose last cell fails."
    page = json.loads((ROOT / "nbs" / "method" / "00a_checks.ipynb").read_text(encoding="utf-8"))
    page["cells"].append(dict(cell_type="code", id="00000000", metadata={}, outputs=[], execution_count=None, source=["assert 1 == 2, 'so it is seen'"]))
    (tmp_path / "page.ipynb").write_text(json.dumps(page))
    return tmp_path / "page.ipynb"


def test_a_failing_cell_is_seen(processes, tmp_path):
    process = processes.Process(target=run_page, args=(failing(tmp_path), tmp_path / "log"))
    process.start()
    process.join(300)
    assert process.exitcode == 1 and "so it is seen" in (tmp_path / "log").read_text()


def test_triton_is_not_imported_before_its_interpreter_is_chosen():
    out = subprocess.run([sys.executable, "-c", f"import sys, {', '.join(HEAVY)}; print('triton' in sys.modules)"], capture_output=True, text=True)
    assert out.stdout.strip() == "False", out.stderr


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_notebook(path, processes, tmp_path):
    process = processes.Process(target=run_page, args=(path, tmp_path / "log"))
    process.start()
    process.join(1800)
    with contextlib.suppress(OSError): process.kill()
    assert process.exitcode == 0, (tmp_path / "log").read_text(errors="replace")[-6000:]
