"""SIGKILL at random moments: every run is started again until it has finished, and ends with the files of an undisturbed one (see kills.py).

The normal run kills each work ten times. `pytest -m long tests/reliability/test_kills.py` kills each 200 times (minutes, on one core).
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kills import WORKS, MergeWork, Work, files_digest, killed

from tsv_nb.scale.stream import run_plan
from tsv_nb.scale.work import WorkFolder

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")


@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=pytest.mark.long)])
@pytest.mark.parametrize("work", WORKS)
def test_kills(work, kills):
    run = subprocess.run([sys.executable, Path(__file__).with_name("kills.py"), work, "--kills", str(kills)], env=os.environ | dict(OMP_NUM_THREADS="1"), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    figures = json.loads(run.stdout.splitlines()[-1])
    assert figures["kills"] >= kills and figures["resumed_to_the_reference"] == figures["runs"] >= 2
    assert figures["computed_again"] <= figures["kills"] * WORKS[work].again # a kill costs what was being done at that moment


class Careless(Work):
    "Writes under the final name, in pieces."
    name, watched = "careless", (__file__,)
    def run(self, folder):
        folder.mkdir(exist_ok=True)
        with open(folder / "final", "w", buffering=1) as file:
            for i in range(50): file.write(f"{i}\n")
    def result(self, folder): return (folder / "final").read_text()
    def check(self, folder, expected):
        if not (folder / "final").exists(): return "absent"
        assert self.result(folder) == expected, "not complete"
        return "complete"


class Forgetful(Careless):
    "Goes on where it was, and takes what it finds for finished."
    name = "forgetful"
    def run(self, folder):
        folder.mkdir(exist_ok=True)
        done = len((folder / "part").read_text().splitlines()) if (folder / "part").exists() else 0
        with open(folder / "part", "a", buffering=1) as file:
            for i in range(done, 50): file.write(f"number {i}\n")
        os.replace(folder / "part", folder / "final")


@pytest.mark.parametrize("work, message", [(Careless, "not complete"), (Forgetful, "not complete|other files than")])
def test_the_harness_sees_what_goes_wrong(work, message, tmp_path):
    with pytest.raises(AssertionError, match=message): killed(work(), 100, 0, tmp_path)


# moments that the kills above found, or would find only now and then


class Killed(BaseException): "As if the process had ended here."


@pytest.fixture
def work(tmp_path):
    work = MergeWork()
    work.prepare(tmp_path / "model")
    run_plan(*work.plan(), tmp_path / "expected", progress=False)
    work.expected = files_digest(tmp_path / "expected")
    return work


def run_until(work, out, **options):
    with pytest.raises(Killed): run_plan(*work.plan(), out, progress=False, **options)


@pytest.mark.parametrize("last", ["plan.json", "report.json"])
def test_killed_while_cleaning_up(work, tmp_path, last, monkeypatch):
    "The output is there, and so is a part of the folder of the run: going on is no error, whatever had been deleted by then."
    out, remove = tmp_path / "out", Path.unlink
    def unlink(path, **options):
        if path.parent.name == "out.partial" and path.name == last: raise Killed
        remove(path, **options)
    with monkeypatch.context() as m:
        m.setattr(Path, "unlink", unlink)
        run_until(work, out)
    assert out.exists() and (tmp_path / "out.partial").exists()
    run_plan(*work.plan(), out, progress=False)
    assert files_digest(out) == work.expected and not (tmp_path / "out.partial").exists()


@pytest.fixture
def half_replaced(work, tmp_path, monkeypatch):
    "An output of another run, moved away by one that was killed before the new one got its name; and its digest."
    out, real = tmp_path / "out", os.replace
    run_plan(*work.plan(rank=2), out, progress=False)
    old = files_digest(out)
    def replace(a, b):
        if Path(b) == out: raise Killed
        real(a, b)
    with monkeypatch.context() as m:
        m.setattr(os, "replace", replace)
        run_until(work, out, overwrite=True)
    assert not out.exists() and files_digest(tmp_path / "out.partial" / "replaced") == old != work.expected
    return out, old


@pytest.mark.parametrize("steps", range(1, 4))
def test_killed_while_starting_over(work, half_replaced, steps, monkeypatch):
    "An old output is not taken for the new one, however much of the unfinished run had been deleted by then."
    (out, old), real, removed = half_replaced, shutil.rmtree, []
    def rmtree(path, **options):
        real(path, **options)
        removed.append(path)
        if len(removed) == steps: raise Killed
    with monkeypatch.context() as m:
        m.setattr(shutil, "rmtree", rmtree)
        run_until(work, out, overwrite=True, restart=True)
    assert files_digest(out) == old
    run_plan(*work.plan(), out, progress=False, overwrite=True)
    assert files_digest(out) == work.expected


@pytest.mark.parametrize("restart", [False, True])
def test_killed_between_two_renames(work, half_replaced, restart):
    "The old output gets its name back, whatever the next run is to do."
    out, old = half_replaced
    def engine(job, units): raise Killed; yield
    if restart: run_until(work, out, overwrite=True, restart=True, engine=engine)
    else:
        with pytest.raises(ValueError, match="out' exists; choose another output"): run_plan(*work.plan(), out, progress=False)
    assert files_digest(out) == old
    run_plan(*work.plan(), out, progress=False, overwrite=True)
    assert files_digest(out) == work.expected and not (out.parent / "out.partial").exists()


def test_an_output_made_by_hand_while_the_old_one_is_moved_away(work, half_replaced):
    "Neither is lost."
    out, old = half_replaced
    shutil.copytree(out.parent / "expected", out)
    for restart in (False, True):
        with pytest.raises(ValueError, match="holds 'replaced'; move that folder away"): run_plan(*work.plan(), out, progress=False, overwrite=True, restart=restart)
    assert files_digest(out.parent / "out.partial" / "replaced") == old


def test_another_run_after_one_that_was_killed_while_cleaning_up(work, half_replaced, monkeypatch):
    out, _ = half_replaced
    with monkeypatch.context() as m:
        m.setattr(WorkFolder, "_clear", lambda *_, **__: (_ for _ in ()).throw(Killed))
        run_until(work, out, overwrite=True)
    assert files_digest(out) == work.expected
    run_plan(*work.plan(rank=2), out, progress=False, overwrite=True)
    run_plan(*work.plan(), out, progress=False, overwrite=True)
    assert files_digest(out) == work.expected


def test_the_next_process_is_left_alone(work, tmp_path, monkeypatch):
    "One process has finished and has deleted its folder; another makes its own before the first has let go."
    def folder(): return WorkFolder(work.plan()[0], tmp_path / "out")
    with folder() as first:
        first._clear(all=True)
        second = folder().__enter__()
        (tmp_path / "out.partial" / "plan.json").unlink()
        for name in ("parts", "done", "out"): (tmp_path / "out.partial" / name).rmdir()
    assert [p.name for p in (tmp_path / "out.partial").iterdir()] == ["lock"] # of the second
    rmdir = Path.rmdir
    def late(path): (path / "lock").touch(); rmdir(path) # comes in at the last moment
    monkeypatch.setattr(Path, "rmdir", late)
    second.__exit__()
    assert (tmp_path / "out.partial" / "lock").exists()
