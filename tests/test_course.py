"""The course, as an instructor runs it: released, submitted by three students per problem set, graded, with feedback and export. No network."""
import html
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock
from safetensors import safe_open

pytest.importorskip("nbgrader")
sys.path.insert(0, str(Path(__file__).with_name("course")))
from grading import CASES, STUDENTS, environment, exported, hidden_lines, meta, nbgrader, read, run_course, scores, source, submit # noqa: E402
from messages import leaks # noqa: E402

SETS = sorted(CASES)


@pytest.fixture(scope="module")
def courses(tmp_path_factory):
    "One course folder per problem set, graded two at a time, once for all workers."
    base = tmp_path_factory.getbasetemp()
    root = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "courses"
    folders = {ps: root / ps for ps in SETS}
    with FileLock(f"{root}.lock"):
        if not (root / "done").exists():
            with ThreadPoolExecutor(2) as pool: list(pool.map(lambda ps: run_course(folders[ps] / "course", [ps], together=True), SETS))
            (root / "done").touch()
    return {ps: folder / "course" for ps, folder in folders.items()}


def test_there_are_three_problem_sets():
    from tsv_nb.course.setup import problem_sets
    assert problem_sets() == SETS == ["ps1", "ps2", "ps3"]


@pytest.mark.parametrize("ps", SETS)
def test_metadata(ps):
    "What nbgrader relies on, and that every code cell is either a solution or locked."
    from tsv_nb.course.setup import course_sources
    cells = read(course_sources() / ps / f"{ps}.ipynb")["cells"]
    ids = [meta(c)["grade_id"] for c in cells if meta(c)]
    assert len(set(ids)) == len(ids) and all(i.startswith(ps) for i in ids)
    for c in cells:
        if not meta(c): assert c["cell_type"] == "markdown"; continue
        m, text = meta(c), source(c)
        assert m["schema_version"] == 3 and m["task"] is False and m["locked"] is not m["solution"]
        assert m["solution"] or "SOLUTION" not in text
        assert text.count("### BEGIN ") == text.count("### END ")
        assert not m["grade"] or m["points"] > 0
        assert m["solution"] or not m["grade"] or c["cell_type"] == "code"
        assert not c.get("outputs")
    assert sum("BEGIN HIDDEN TESTS" in source(c) for c in cells) >= 4


@pytest.mark.parametrize("ps", SETS)
def test_student_version_holds_no_answers(courses, ps):
    released = (courses[ps] / "release" / ps / f"{ps}.ipynb").read_text(encoding="utf-8")
    text = "\n".join(source(c) for c in json.loads(released)["cells"])
    assert "NotImplementedError" in text and "HIDDEN" not in released and "SOLUTION" not in released
    lines = {line.strip() for line in text.splitlines()}
    for kind, secret in hidden_lines(courses[ps], ps).items():
        assert len(secret) > 5 and not secret & lines, (kind, secret & lines)
    assert not list((courses[ps] / "release").rglob("rubric*")) and (courses[ps] / "rubrics" / f"{ps}.md").stat().st_size > 500


@pytest.mark.parametrize("ps", SETS)
@pytest.mark.parametrize("student", STUDENTS)
def test_points(courses, ps, student):
    got = scores(courses[ps], ps, student)
    lost = {name for name, (points, most) in got.items() if points < most}
    assert lost == (set() if student == "reference" else set(CASES[ps][f"{student.upper()}_LOSES"]))
    assert all(got[name][0] == 0 for name in lost) and len(got) >= 3
    points, most = exported(courses[ps])[ps, student]
    assert points == sum(p for p, _ in got.values()) and most > sum(m for _, m in got.values()) # the written answers wait for a person


@pytest.mark.parametrize("ps", SETS)
@pytest.mark.parametrize("student", STUDENTS)
def test_feedback_leaks_nothing(courses, ps, student):
    page = (courses[ps] / "feedback" / student / ps / f"{ps}.html").read_text(encoding="utf-8")
    text = html.unescape(re.sub("<[^>]+>", "", page))
    secret = hidden_lines(courses[ps], ps)
    assert not [line for line in secret["tests"] if line in text]
    cells = read(courses[ps] / "source" / ps / f"{ps}.ipynb")["cells"]
    replaced = {} if student == "reference" else CASES[ps][student.upper()]
    theirs = "\n".join([*replaced.values(), *(source(c) for c in cells if meta(c).get("grade_id") not in replaced)]) # what the student wrote or was given
    assert not [line for line in secret["solutions"] if line in text and line not in theirs]
    assert "hidden tests, not shown" in text
    for name in scores(courses[ps], ps, student): assert f'id="{name}"' in page or f'name="{name}"' in page


@pytest.mark.parametrize("ps", SETS)
def test_messages_say_what_is_wrong(courses, ps):
    "A wrong answer fails with words of the checks; a hostile one is told what was stopped."
    def errors(student): return {meta(c).get("grade_id"): [o for o in c["outputs"] if o["output_type"] == "error"] for c in read(courses[ps] / "autograded" / student / ps / f"{ps}.ipynb")["cells"] if c["cell_type"] == "code"}
    for name in CASES[ps]["WRONG_LOSES"]:
        (error,) = errors("wrong")[name]
        assert error["ename"] == "CheckFailed" and len(error["evalue"]) > 20 and error["traceback"] == [f"CheckFailed: {error['evalue']}"]
    said = [o["evalue"] for outputs in errors("hostile").values() for o in outputs if o["ename"] in ("Stopped", "NotCounted")]
    for reason in ("did not finish within", "while a submission is graded"): assert any(reason in s for s in said), said
    assert any(o["ename"] in ("SyntaxError", "IndentationError") for outputs in errors("hostile").values() for o in outputs)


@pytest.mark.parametrize("ps", SETS)
def test_messages_do_not_tell_what_was_expected(ps):
    from tsv_nb.course.setup import course_sources
    assert leaks(read(course_sources() / ps / f"{ps}.ipynb")["cells"]) == []


@pytest.mark.parametrize("test", [
    'got, want = answer(3), 2 * 21\nif not (got == want): raise CheckFailed(f"{got}, it should be {want}")',
    'got, want = answer(3), 2 * 21\nif not (got == want): raise CheckFailed(f"off by {got - want}")',
    'for k, right in ((1, 14), (3, 42)):\n    if not (answer(k) == right): raise CheckFailed(f"k = {k}: not {right}")',
    'if not (answer(3) == 42): raise CheckFailed("there are 42 of them")',
    'want = 42\ncheck_equal(answer(3), want, "answer", f"Think of {want}.")'])
def test_a_message_that_tells_is_found(test):
    "The rule of the test above, on five messages that break it."
    def cell(source, **kinds): return dict(cell_type="code", source=source, metadata=dict(nbgrader=dict(dict(grade=False, solution=False, grade_id="a"), **kinds)))
    given = cell("def answer(k): return 14 * k", solution=True)
    assert len(leaks([given, cell(f"### BEGIN HIDDEN TESTS\n{test}", grade=True)])) == 1
    assert not leaks([given, cell('### BEGIN HIDDEN TESTS\nfor k in (1, 3):\n    got = answer(k)\n    if not (got == 14 * k): raise CheckFailed(f"k = {k}: {got} is not right")', grade=True)])


@pytest.mark.parametrize("ps", SETS)
def test_the_rubric_has_every_written_answer(ps):
    "A section for each, whose points add up to those of the cell."
    from tsv_nb.course.setup import course_sources
    sections = {title: text for title, text in re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", (course_sources() / ps / "rubric.md").read_text(encoding="utf-8"), re.S | re.M)}
    cells, seen = read(course_sources() / ps / f"{ps}.ipynb")["cells"], set()
    for text, c in zip(cells, cells[1:]):
        if not (meta(c).get("grade") and meta(c)["solution"]): continue
        (label, points), = re.findall(r"\*\*([^*(]+?) \((\d+) points", source(text))
        (title,) = [t for t in sections if re.match(rf"{label}\b", t)]
        assert int(points) == meta(c)["points"] == sum(map(int, re.findall(r"^- (\d+): ", sections[title], re.M))), meta(c)["grade_id"]
        assert title.endswith(f"({points} points)")
        seen.add(title)
    assert seen == set(sections)


def test_the_instructor_notes_are_complete():
    cells = read(Path(__file__).parents[1] / "nbs" / "course" / "52_instructor_notes.ipynb")["cells"]
    text = "\n".join(source(c) for c in cells)
    sections = {title: part for title, part in re.findall(r"^## ([^\n]*)\n(.*?)(?=^## |\Z)", text, re.S | re.M)}
    for title, words in {"Goals": ["PS1", "PS2", "PS3"], "Three weeks": ["week", "PS1", "PS2", "PS3"], "One day": ["time", "PS1", "PS2", "PS3"],
                         "What goes wrong, and what the tests say": ["| PS1 |", "| PS2 |", "| PS3 |"], "Another year, other numbers": ["--seed", "make_course("]}.items():
        assert title in sections and not [w for w in words if w not in sections[title]], title


def test_every_submission_is_graded_in_three_minutes():
    "The last record of benchmarks/course.py, which grades each submission alone."
    record = read(Path(__file__).parents[1] / "benchmarks" / "results" / "course.json")
    assert record["environment"]["cores"] <= 2
    seconds = {(r["problem_set"], r["submission"]): r["seconds"] for r in record["submissions"]}
    assert sorted(seconds) == sorted((ps, s) for ps in SETS for s in STUDENTS)
    assert max(seconds.values()) < 180


def test_grading_has_no_network(tmp_path):
    "What the tests run finds a proxy that nobody answers, so a request fails wherever it goes."
    code = "import urllib.request as u\nfor url in ('http://example.org', 'https://example.org'):\n    try: u.urlopen(url, timeout=20)\n    except OSError as e: print(e)"
    done = subprocess.run([sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True, timeout=60)
    assert done.stdout.lower().count("refused") == 2, done


# Ways to a file that is none of the submission's business; P is its path. The last one breaks os.path, so nothing follows it.
ATTACKS = {
    "open": "open(P).read()",
    "C library by ctypes": "ctypes.pythonapi.fopen(P.encode(), b'r')",
    "C library by its name": "ctypes.CDLL(None).fopen(P.encode(), b'r')",
    "C library by cffi": "pytest.importorskip('cffi').FFI().dlopen(None)",
    "torch": "bytes(torch.from_file(P, size=6, dtype=torch.uint8).tolist())",
    "torch operator": "bytes(torch.ops.aten.from_file(P, size=6, dtype=torch.uint8).tolist())",
    "storage": "bytes(torch.UntypedStorage.from_file(P, False, 6).tolist())",
    "typed storage": "bytes(torch.ByteStorage.from_file(P, False, 6).tolist())",
    "database": "sqlite3.connect(':memory:').execute(f'attach {P!r} as g')",
    "string that lies": "open(type('S', (str,), dict(partition=lambda s, x: ('tmp', '', ''), startswith=lambda s, *x: True, __getitem__=lambda s, i: 'tmp'))(P)).read()",
    "bytes that lie": "open(type('B', (bytes,), dict(decode=lambda s, *x: '/tmp'))(P.encode())).read()",
    "relative to a folder": "os.read(os.open('source/tests.py', os.O_RDONLY, dir_fd=os.open(os.path.dirname(os.path.dirname(P)), os.O_RDONLY)), 6)",
    "replaced rule": "[setattr(grading, 'refused', lambda *x: ''), setattr(grading, 'PRIVATE', ()), setattr(os.path, 'realpath', lambda p: '/tmp'), open(P).read()]",
}
GUARDED = "import ctypes, os, sqlite3, sys, pytest, torch\nfrom tsv_nb.course import grading\nP = sys.argv[1]\ngrading.guard(os.path.dirname(os.path.dirname(P)), sys.argv[2])\n"


def guarded(tmp_path, code):
    "What a program prints that runs under the guard, and what was refused."
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "tests.py").write_text("SECRET")
    done = subprocess.run([sys.executable, "-c", GUARDED + code, tmp_path / "source" / "tests.py", tmp_path / "log"], env=environment(tmp_path), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr, (tmp_path / "log").read_text()


def test_the_guard_refuses_and_notes(tmp_path):
    said, log = guarded(tmp_path, f"""for name, code in {ATTACKS}.items():
    before = os.stat(sys.argv[2]).st_size
    try: print(name, 'reached', eval(code))
    except OSError: pass
    if os.stat(sys.argv[2]).st_size == before: print(name, 'not noted')
print('end')""")
    assert "end" in said.splitlines() and not re.findall("(.*) (?:reached|not noted)", said) and "SECRET" not in said, said


def test_the_guard_lets_honest_work_pass(tmp_path):
    "Figures, weights and arrays are read and written, and a kernel runs in Triton's interpreter."
    pytest.importorskip("triton")
    (tmp_path / "kernel.py").write_text("import triton, triton.language as tl\n@triton.jit\ndef double(x_ptr, N: tl.constexpr):\n    offs = tl.arange(0, N)\n    tl.store(x_ptr + offs, 2 * tl.load(x_ptr + offs))\n")
    said, log = guarded(tmp_path, """os.environ['TRITON_INTERPRET'] = '1'
import matplotlib, numpy, safetensors.torch
matplotlib.use('agg')
import matplotlib.pyplot as plt
from kernel import double
x = torch.ones(16)
double[(1,)](x, 16)
plt.plot(x); plt.savefig('figure.png')
numpy.save('x.npy', x.numpy()); torch.save(x, 'x.pt'); safetensors.torch.save_file({'x': x}, 'x.safetensors')
print(numpy.load('x.npy').sum(), torch.load('x.pt', mmap=True).sum(), safetensors.torch.load_file('x.safetensors')['x'].sum(), torch.linalg.svdvals(torch.eye(3)).sum())""")
    assert said.split() == ["32.0", "tensor(32.)", "tensor(32.)", "tensor(3.)"] and log == "", (said, log)


def test_the_hostile_submission_of_the_first_set_meets_every_measure(courses):
    cells = read(courses["ps1"] / "autograded" / "hostile" / "ps1" / "ps1.ipynb")["cells"]
    text = json.dumps([o for c in cells for o in c.get("outputs", [])])
    for reason in ("the tests could not be trusted", "process died", "allocate memory", "notebooks cannot be opened", "ctypes.dlsym is not allowed", "torch.from_file is not allowed"): assert reason in text
    assert "read below Python" not in text
    page = (courses["ps1"] / "feedback" / "hostile" / "ps1" / "ps1.html").read_text(encoding="utf-8")
    assert "repeats a part of the hidden tests" in page # the error that quotes the test is not shown


def test_a_deleted_test_cell_comes_back(courses):
    course = courses["ps1"]
    submit(course, "ps1", "careless", {"ps1-bytes": "def factor_numbers(m, n, k): return 0\ndef archive_bytes(a): return 0"})
    path = course / "submitted" / "careless" / "ps1" / "ps1.ipynb"
    nb = read(path)
    nb["cells"] = [c for c in nb["cells"] if meta(c).get("grade_id") != "ps1-bytes-tests"]
    path.write_text(json.dumps(nb), encoding="utf-8")
    nbgrader(course, "autograde", "ps1", "--student=careless")
    assert [name for name, (points, most) in scores(course, "ps1", "careless").items() if points < most] == ["ps1-bytes-tests"]


COMMAND = "import sys; from tsv_nb.course.setup import tsv_course\nif __name__ == '__main__': sys.exit(tsv_course())"


def command(tmp_path, *args):
    "`tsv_course` as the console script calls it."
    (tmp_path / "tsv_course.py").write_text(COMMAND)
    return subprocess.run([sys.executable, tmp_path / "tsv_course.py", *map(str, args)], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True, timeout=300)


def content(path):
    "What a file holds; safetensors writes its metadata in an order that changes from run to run."
    if path.suffix != ".safetensors": return path.read_bytes()
    with safe_open(path, "pt") as f: return f.metadata(), {k: f.get_tensor(k).numpy().tobytes() for k in f.keys()}


def test_command(tmp_path):
    done = command(tmp_path, "here", "--seed", 3)
    assert done.returncode == 0, done.stderr
    assert [line.strip() for line in done.stdout.splitlines()[-2:]] == ["cd here", "nbgrader generate_assignment ps1"] and max(map(len, done.stdout.splitlines())) <= 80
    before = {p: p.read_bytes() for p in (tmp_path / "here").rglob("*") if p.is_file()}
    here = {p.relative_to(tmp_path / "here"): content(p) for p in before}
    again = command(tmp_path, "here")
    assert again.returncode != 0 and "already holds a course" in again.stderr and "Traceback" not in again.stderr
    assert before == {p: p.read_bytes() for p in (tmp_path / "here").rglob("*") if p.is_file()}
    quiet = command(tmp_path, "there", "--seed", 3, "--quiet")
    assert quiet.returncode == 0 and quiet.stdout == ""
    assert here == {p.relative_to(tmp_path / "there"): content(p) for p in (tmp_path / "there").rglob("*") if p.is_file()} # the seed decides everything


def test_nothing_half_written(tmp_path, monkeypatch):
    import tsv_nb.course.setup as setup
    def fail(*args): raise OSError("disk full")
    monkeypatch.setattr(setup, "save_course_world", fail)
    with pytest.raises(OSError, match="disk full"): setup.make_course(tmp_path / "course")
    assert not list(tmp_path.iterdir())


def test_another_seed_gives_other_numbers():
    from tsv_nb.course.data import make_course_world
    a, b = make_course_world(1, n_tasks=2), make_course_world(2, n_tasks=2)
    assert a.pretrained["layer1.weight"].sub(b.pretrained["layer1.weight"]).abs().max() > .1 and not (a.images["turned"] == b.images["turned"]).all()


def test_damaged_data(tmp_path):
    from safetensors.torch import save_file
    from tsv_nb.course.data import load_course_world, make_course_world, save_course_world
    path = save_course_world(make_course_world(0, n_tasks=1), tmp_path / "w.safetensors")
    (tmp_path / "cut").write_bytes(path.read_bytes()[:5000])
    save_file({}, tmp_path / "foreign")
    for name, says in (("cut", "damaged"), ("foreign", "holds no course data")):
        with pytest.raises(ValueError, match=says): load_course_world(tmp_path / name)
