"""The course graded: points and seconds of three submissions per problem set. Usage: python benchmarks/course.py [ps1 ...]

The submissions are those of tests/course; each is graded by one `nbgrader autograde` command, alone. Writes benchmarks/results/course.json and prints a table."""
import json
import os
import platform
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "course"))
from grading import CASES, SECONDS, STUDENTS, exported, run_course # noqa: E402


def main(names):
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        course = Path(tmp) / "course"
        table = run_course(course, names)
        totals = exported(course)
        for (ps, student), (scores, seconds) in table.items():
            got, most = sum(p for p, _ in scores.values()), sum(m for _, m in scores.values())
            rows.append(dict(problem_set=ps, submission=student, points=got, automatic=most, by_hand=totals[ps, student][1] - most, seconds=round(seconds, 1),
                             lost={name: m - p for name, (p, m) in scores.items() if p < m}))
    print(f"{'':6s}{'submission':12s}{'points':>12s}{'by hand':>9s}{'seconds':>9s}  lost")
    for r in rows:
        lost = ", ".join(f"{name.removeprefix(r['problem_set'])[1:]} {m:g}" for name, m in r["lost"].items())
        print(f"{r['problem_set']:6s}{r['submission']:12s}{r['points']:5g} of {r['automatic']:3g}{r['by_hand']:9g}{r['seconds']:9.0f}  {lost or '-'}")
    where = dict(machine=platform.machine(), cores=os.cpu_count(), python=platform.python_version(), seconds_per_cell=SECONDS)
    (HERE / "results" / "course.json").write_text(json.dumps(dict(environment=where, submissions=rows), indent=1) + "\n")
    print(f"limit of a cell: {SECONDS} s; {STUDENTS[-1]} submissions hang in one cell at least")


if __name__ == "__main__": main(sys.argv[1:] or list(CASES))
