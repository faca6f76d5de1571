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


@pytest.mark.parametrize("steps", range(1, 4))
def test_killed_while_starting_over(work, tmp_path, steps, monkeypatch):
    "An old output is not taken for the new one, however much of the unfinished run had been deleted by then."
    out, real, removed = tmp_path / "out", shutil.rmtree, []
    out.write_text("old")
    with monkeypatch.context() as m:
        m.setattr(WorkFolder, "_publish", lambda *_: (_ for _ in ()).throw(Killed))
        run_until(work, out, overwrite=True) # all is ready
    def rmtree(path, **options):
        real(path, **options)
        removed.append(path)
        if len(removed) == steps: raise Killed
    with monkeypatch.context() as m:
        m.setattr(shutil, "rmtree", rmtree)
        try: run_plan(*work.plan(), out, progress=False, overwrite=True, restart=True)
        except Killed: assert out.read_text() == "old"
    run_plan(*work.plan(), out, progress=False, overwrite=True)
    assert files_digest(out) == work.expected
