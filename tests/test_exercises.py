"""Every page of the method ends with an exercise, and with a solution that is collapsed, runs, and says only what its cells have measured."""
import ast
import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "nbs/method").glob("*.ipynb"))
OPEN, CLOSE = '<details class="solution"><summary>Solution</summary>\n\n**Answer.** ', '</details>'
FOLD, HIDDEN = ['#| code-summary: "Solution"', '#| code-fold: true'], {"outputs_hidden": True, "source_hidden": True}


def text(cell): return "".join(cell["source"])
def read(path): return json.loads(path.read_text(encoding="utf-8"))


def parts(nb):
    "The cell with the exercise, and those after it."
    at = [i for i, c in enumerate(nb["cells"]) if c["cell_type"] == "markdown" and "**Exercise.**" in text(c)]
    return (nb["cells"][at[-1]], nb["cells"][at[-1] + 1:]) if at else (None, [])


def asserts(source):
    "Whether Python code checks anything."
    nodes = list(ast.walk(ast.parse(source)))
    return any(isinstance(n, ast.Assert) or isinstance(n, ast.Call) and getattr(n.func, "id", "") in ("test_eq", "test_close", "expect_fail") for n in nodes)


def unmeasured(prose, outputs):
    "Numbers with a percent sign or a decimal point in the prose, outside of formulas, that no output shows to the same precision."
    shown = [float(x) for x in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", outputs.replace("−", "-").replace(",", ""))]
    plain = re.sub(r"\$[^$]*\$|`[^`]*`|\]\([^)]*\)|<[^>]*>", " ", prose)
    said = [n.rstrip("%") for n in re.findall(r"(?<![\w.])\d+(?:\.\d+)?%?", plain) if "%" in n or "." in n]
    return [n for n in said if not any(abs(abs(x) - float(n)) <= .501 * 10.**-len(n.partition(".")[2]) for x in shown)]


def faults(nb):
    "What is wrong with the end of a page, as a list."
    exercise, rest = parts(nb)
    if exercise is None: return ["no exercise"]
    found, order = [], [text(exercise).lower().find(o) for o in ("## recap", "limits", "**exercise.**")]
    if min(order) < 0 or order != sorted(order): found.append("the page does not end with recap, limits, exercise")
    if len(text(exercise)[order[-1]:]) < 200: found.append("the exercise is not precise enough to be checked")
    if len(rest) < 3 or not text(rest[0]).startswith(OPEN): return found + ["no collapsed solution after the exercise"]
    if text(rest[-1]).strip() != CLOSE or any(CLOSE in text(c) for c in rest[:-1]): found.append("the collapsed part ends too early, or not at all")
    cells, marked = rest[1:-1], lambda c: c["source"][:2] == [o + "\n" for o in FOLD]
    if not 1 <= len(cells) <= 3 or any(c["cell_type"] != "code" for c in cells): return found + ["a solution is one to three code cells"]
    if not all(map(marked, cells)): found.append("a code cell is not collapsed on the site")
    if any(c["metadata"].get("jupyter") != HIDDEN for c in cells): found.append("a code cell is not collapsed in JupyterLab")
    if any(re.search(r"#\|\s*(notest|cuda|slow|eval|hide)\b", text(c)) for c in cells): found.append("the tests would not run a code cell")
    if not asserts("\n".join(map(text, cells))): found.append("the solution asserts nothing")
    outputs = "\n".join("".join(o.get("text", [])) for c in cells for o in c["outputs"])
    if not re.search(r"\d", outputs): found.append("the solution shows no number")
    if gone := unmeasured(text(rest[0]), outputs): found.append(f"numbers that no cell has measured: {gone}")
    return found


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.stem)
def test_page_ends_with_a_solved_exercise(path): assert faults(read(path)) == []


def test_every_page_is_looked_at(): assert len(PAGES) >= 15


def _without(what):
    def change(nb):
        _, rest = parts(nb)
        for c in rest: c["source"] = [line for line in c["source"] if what not in line]
    return change


def _rest(change):
    def apply(nb):
        cells = nb["cells"]
        at = len(cells) - len(parts(nb)[1])
        cells[at:] = change(cells[at:])
    return apply


def _metadata(value):
    def change(nb): parts(nb)[1][-2]["metadata"] = value
    return change


def _source(cell, change):
    def apply(nb): c = parts(nb)[1][cell]; c["source"] = change(text(c)).splitlines(keepends=True)
    return apply


def _code(change):
    def apply(nb):
        for c in parts(nb)[1][1:-1]: change(c)
    return apply


def _no_asserts(c): c["source"] = [*(o + "\n" for o in FOLD), "print(1)\n"]
def _no_outputs(c): c["outputs"] = []
def _no_recap(nb): e = parts(nb)[0]; e["source"] = text(e).replace("## Recap", "## Summary").splitlines(keepends=True)


FAULTS = {"no collapsed solution": _rest(lambda rest: []), "collapsed part ends too early, or not at all": _rest(lambda rest: rest[:-1] + [rest[0]]),
          "ends too early": _source(0, lambda s: s + "\n\n</details>"), "one to three code cells": _rest(lambda rest: [*rest[:-1], rest[0], rest[-1]]),
          "not collapsed on the site": _without("code-fold"), "not collapsed in JupyterLab": _metadata({"jupyter": {"source_hidden": True}}),
          "tests would not run": _source(-2, lambda s: s + "\n#| notest"), "asserts nothing": _code(_no_asserts), "shows no number": _code(_no_outputs),
          "no cell has measured: ['98.76']": _source(0, lambda s: s + " It was 98.76%."), "does not end with recap": _no_recap}


@pytest.mark.parametrize("message", FAULTS)
def test_a_fault_is_noticed(message):
    nb = copy.deepcopy(read(ROOT / "nbs/method/00a_checks.ipynb"))
    assert faults(nb) == []
    FAULTS[message](nb)
    assert any(message in f for f in faults(nb)), faults(nb)


def test_marks_survive_cleaning_and_processing(tmp_path):
    "nbdev_clean keeps JupyterLab's marks (settings.ini allows them), and the notebooks that Quarto gets keep the directives, the frame and all cells."
    code = """
import sys; from pathlib import Path; from execnb.nbio import read_nb, write_nb; from nbdev.clean import _nbdev_clean; from nbdev.processors import FilterDefaults
for p in sys.argv[2:]:
    nb = read_nb(p); _nbdev_clean(nb); write_nb(nb, Path(sys.argv[1])/('clean-' + Path(p).name))
    FilterDefaults()(nb := read_nb(p)); write_nb(nb, Path(sys.argv[1])/('site-' + Path(p).name))
"""
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path), *map(str, PAGES)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert out.returncode == 0, out.stderr[-2000:]
    for path in PAGES:
        assert read(tmp_path / f"clean-{path.name}")["cells"] == read(path)["cells"], path.name # nothing left to clean, nothing lost
        want, got = parts(read(path))[1], parts(read(tmp_path / f"site-{path.name}"))[1]
        assert [(c["cell_type"], text(c).rstrip()) for c in got if c["cell_type"] == "code"] == [(c["cell_type"], text(c).rstrip()) for c in want if c["cell_type"] == "code"], path.name
        assert text(got[0]).startswith(OPEN) and text(got[-1]).strip() == CLOSE and len(got) == len(want), path.name
