"""SIGKILL at random moments: every run is started again until it has finished, and ends with the files of an undisturbed one (see kills.py).

The normal run kills each work ten times. `pytest -m long tests/reliability/test_kills.py` kills each 200 times (minutes, on one core).
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kills import WORKS, Work, killed

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
