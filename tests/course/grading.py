"""The whole course in a folder: written, released, submitted three times per problem set, graded, with feedback and export."""
import csv
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
CASES = {p.stem: runpy.run_path(str(p)) for p in sorted(HERE.glob("ps*.py"))}
STUDENTS = ("reference", "wrong", "hostile")
SECONDS, MEMORY = int(os.environ.get("TSV_COURSE_SECONDS", 30)), 1.5 # per cell; GiB


def environment(home):
    "Variables for nbgrader: nothing of the user's, nothing left behind in his folders, and no way into the network."
    places = dict(JUPYTER_CONFIG_DIR="config", JUPYTER_DATA_DIR="data", JUPYTER_RUNTIME_DIR="run", IPYTHONDIR="ipython", MPLCONFIGDIR="mpl")
    proxies = {name: value for k, value in dict(http_proxy="http://127.0.0.1:9", https_proxy="http://127.0.0.1:9", no_proxy="localhost,127.0.0.1").items() for name in (k, k.upper())} # nobody answers there
    path = os.pathsep.join([str(HERE.parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, **proxies, **{k: str(home / v) for k, v in places.items()}, "JUPYTER_PLATFORM_DIRS": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1",
            "TSV_COURSE_SECONDS": str(SECONDS), "TSV_COURSE_MEMORY": str(MEMORY)}


def nbgrader(course, *args):
    "One nbgrader command in the course folder."
    done = subprocess.run([sys.executable, "-m", "nbgrader", *args], cwd=course, env=environment(course.parent / "home"), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def read(path): return json.loads(Path(path).read_text(encoding="utf-8"))
def source(cell): return "".join(cell["source"])
def meta(cell): return cell["metadata"].get("nbgrader", {})


def submit(course, ps, student, cells):
    "Hand in the released notebook with some cells replaced, and the reference's answers in the others."
    released, answers = read(course / "release" / ps / f"{ps}.ipynb"), {meta(c)["grade_id"]: source(c) for c in read(course / "source" / ps / f"{ps}.ipynb")["cells"] if meta(c).get("solution")}
    unknown = set(cells) - set(answers)
    assert not unknown, f"{ps}: no solution cell {unknown}"
    for c in released["cells"]:
        if meta(c).get("solution"): c["source"] = cells.get(meta(c)["grade_id"], answers[meta(c)["grade_id"]]).replace("COURSE", str(course))
    folder = course / "submitted" / student / ps
    shutil.copytree(course / "release" / ps, folder)
    (folder / f"{ps}.ipynb").write_text(json.dumps(released), encoding="utf-8")


def scores(course, ps, student):
    "{grade_id: (points, possible points)} of the cells that are graded automatically, from the gradebook."
    from nbgrader.api import Gradebook
    with Gradebook(f"sqlite:///{course / 'gradebook.db'}", "tsv") as book:
        notebook = book.find_submission_notebook(ps, ps, student)
        return {g.name: (g.auto_score, g.max_score) for g in notebook.grades if g.auto_score is not None}


def run_course(course, problem_sets=None, students=STUDENTS, seed=1, together=False):
    "{(problem set, student): (scores, seconds)}, all commands on the way; `together` grades all students by one command, which saves time and does not measure it."
    from tsv_nb.course.setup import make_course
    make_course(course, seed)
    table = {}
    for ps in problem_sets or CASES:
        nbgrader(course, "generate_assignment", ps)
        for student in students: submit(course, ps, student, {} if student == "reference" else CASES[ps][student.upper()])
        if together: nbgrader(course, "autograde", ps)
        for student in students:
            start = time.perf_counter()
            if not together: nbgrader(course, "autograde", ps, f"--student={student}")
            table[ps, student] = (scores(course, ps, student), time.perf_counter() - start)
        nbgrader(course, "generate_feedback", ps)
    nbgrader(course, "export")
    return table


def exported(course):
    "{(problem set, student): (points, possible points)} of grades.csv."
    with open(course / "grades.csv", newline="") as file: return {(r["assignment"], r["student_id"]): (float(r["raw_score"]), float(r["max_score"])) for r in csv.DictReader(file)}


def hidden_lines(course, ps):
    "The lines of hidden tests and solutions that are long enough to be told from a student's own."
    secret, shown = {"tests": set(), "solutions": set()}, set()
    for c in read(course / "source" / ps / f"{ps}.ipynb")["cells"]:
        left = source(c)
        for kind, name in (("tests", "HIDDEN TESTS"), ("solutions", "SOLUTION")):
            for part in re.findall(rf"BEGIN {name}\n(.*?)### END {name}", source(c), re.S):
                secret[kind] |= {line.strip() for line in part.splitlines() if len(line.strip()) > 20}
                left = left.replace(part, "")
        if meta(c).get("solution") and left == source(c): # without a region, the whole cell is the solution
            secret["solutions"] |= {line.strip() for line in left.splitlines() if len(line.strip()) > 20}
            continue
        shown |= {line.strip() for line in left.splitlines()}
    return {kind: lines - shown for kind, lines in secret.items()}
