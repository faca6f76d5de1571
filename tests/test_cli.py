"""The command line, run as a user runs it."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tsv_nb import CompressedTaskVector
from tsv_nb.cli import demo_table
from tsv_nb.vision.evaluate import load_world

SCRIPT = Path(sys.executable).with_name("tsv_demo")


def demo(*args):
    return subprocess.run([SCRIPT, *map(str, args)], capture_output=True, text=True, timeout=1500)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "made" / "here"
    return demo("--tasks", 2, "--out", out), out


def test_demo_writes_what_it_says(made):
    done, out = made
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "report.json").read_text())
    tasks = report["options"]["tasks"]
    assert len(tasks) == 2 and str(out) in done.stdout
    for text in (*tasks, "TSV-M*", "normalized", "megabytes", "mean"): assert text in done.stdout
    assert {p.name for p in out.iterdir()} == {"report.json", "accuracy.png", "tasks.png", "interference.png", "merged.safetensors", "compressed"}
    for name in ("accuracy.png", "tasks.png", "interference.png"): assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_demo_files_give_the_numbers_of_the_report(made):
    _, out = made
    report, world = json.loads((out / "report.json").read_text()), load_world(n_tasks=2, progress=False)
    assert world.accuracy(load_file(out / "merged.safetensors")) == pytest.approx(report["scores"]["TSV-M"])
    for task in world.names:
        expert = CompressedTaskVector.load(out / "compressed" / f"{task}.safetensors").apply_to(world.pretrained)
        assert world.accuracy(expert, tasks=[task])[task] == pytest.approx(report["scores"]["TSV-C"][task])


def test_a_second_run_leaves_no_stale_archives(made):
    _, out = made
    (out / "compressed" / "runes.safetensors").write_bytes(b"of an earlier run")
    assert demo("--tasks", 1, "--out", out).returncode == 0
    assert [p.stem for p in (out / "compressed").iterdir()] == ["greek"] and len(json.loads((out / "report.json").read_text())["scores"]["TSV-M"]) == 1


def test_table_by_hand():
    scores = {"zero-shot": dict(a=.25, b=.5), "fine-tuned": dict(a=.5, b=1.)}
    lines = demo_table(scores, {"zero-shot": 1_000_000, "fine-tuned": 2_500_000}).splitlines()
    cells = [line.split() for line in lines]
    assert ["a", "25.0", "50.0"] in cells and ["mean", "37.5", "75.0"] in cells # absolute
    assert ["a", "50.0", "100.0"] in cells and ["mean", "50.0", "100.0"] in cells # normalized
    assert cells[-1] == ["megabytes", "1.0", "2.5"] and max(map(len, lines)) <= 80


@pytest.mark.parametrize("args, message", [(["--tasks", 0], "between 1 and 20"), (["--tasks", 21], "between 1 and 20"), (["--tasks", "eight"], "--tasks: 'eight' is no whole number"), (["--taks", 2], "did you mean --tasks?")])
def test_bad_options(tmp_path, args, message):
    done = demo(*args, "--out", tmp_path / "x")
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "x").exists()


def test_output_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    done = demo("--tasks", 1, "--out", tmp_path / "file")
    assert done.returncode != 0 and str(tmp_path / "file") in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_help():
    done = demo("--help")
    assert done.returncode == 0 and "--tasks" in done.stdout and "Example:" in done.stdout
