"""The commands for large checkpoints, as somebody types them: what they print, what they leave, how they end and go on."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from scale_models import digests, fine, load_output, relative, report_of, save_all, states, timeless

from tsv_nb import CompressedTaskVector, apply_task_vector, compress, interference_by_layer, task_vector, tsv_merge
from tsv_nb.scale import commands, running
from tsv_nb.scale.checkpoints import open_checkpoint
from tsv_nb.scale.parts import CannotWrite
from tsv_nb.scale.plan import make_plan
from tsv_nb.scale.stream import run_plan
from tsv_nb.scale.tables import size_text
from tsv_nb.scale.work import WorkFolder

ROOT = Path(__file__).resolve().parent.parent
PAPER = ["--exclude", "text_projection"]


@pytest.fixture(scope="module")
def paths(tmp_path_factory): return save_all(tmp_path_factory.mktemp("models"))


def said(capsys, name, *argv):
    "What a command that succeeds writes to standard output."
    getattr(commands, name)(list(map(str, argv)))
    return capsys.readouterr().out


def refused(name, *argv):
    with pytest.raises(SystemExit) as e: getattr(commands, name)(list(map(str, argv)))
    return e.value.code


SLOW = "import sys, time, dataclasses; import tsv_nb.scale.commands as c, tsv_nb.scale.stream as s; make, unit = c.make_plan, s.run_unit\n" \
       "c.make_plan = lambda *a, **k: (p := make(*a, **k), dataclasses.replace(p, units=tuple((n,) for u in p.units for n in u)))[1]\n" \
       "s.run_unit = lambda *a: (time.sleep({}), unit(*a))[1]\nc.{}()" # each tensor a unit, and a pause before each


def child(name, *argv, pause=0.):
    "A command in a process of its own."
    return subprocess.Popen([sys.executable, "-c", SLOW.format(pause, name), *map(str, argv), "--threads", "1"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


def here(name, *argv):
    "The same in this process, without a pause."
    make = commands.make_plan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands, "make_plan", lambda *args, **options: fine(make(*args, **options)))
        getattr(commands, name)([str(a) for a in (*argv, "--threads", 1)])


def wait_for(process, what, seconds=120):
    end = time.monotonic() + seconds
    while not what() and process.poll() is None and time.monotonic() < end: time.sleep(.01)
    assert process.poll() is None, process.communicate()


def test_merge(tmp_path, paths, capsys):
    out = said(capsys, "tsv_merge", *paths, "--out", tmp_path / "out", *PAPER, "--alpha", ".5", "--weights", "1,2,1")
    base, *tasks = states()
    want = apply_task_vector(base, tsv_merge([task_vector(base, t) for t in tasks], small="average", weights=[1, 2, 1]), .5)
    got = load_output(tmp_path / "out")
    assert got.keys() == want.keys() and all(relative(got[n], want[n]) < 1e-5 for n in want)
    assert "decomposed and merged" in out and "peak memory" in out and "Interference (STI, sum over layers)" in out and f"Written to {tmp_path / 'out'}: " in out
    assert max(map(len, out.replace(str(tmp_path), "").splitlines())) <= 80 and report_of(tmp_path / "out")["options"]["weights"] == [1, 2, 1]


def test_the_plan_comes_first_and_may_be_all(tmp_path, paths, capsys):
    plan = said(capsys, "tsv_merge", *paths, "--out", tmp_path / "out", "--plan")
    assert "text projection (excluded by default" in plan and "peak memory" in plan and not list(tmp_path.iterdir())
    known = json.loads(said(capsys, "tsv_merge", *paths, "--out", tmp_path / "out", "--plan", "--json"))
    assert {t["name"]: t["how"] for t in known["tensors"]}["h.0.mlp.weight"] == "merge" and known["peak_bytes"] > 0 and not list(tmp_path.iterdir())
    assert said(capsys, "tsv_merge", *paths, "--out", tmp_path / "out").startswith(plan.splitlines()[0])


def test_negative_numbers(tmp_path, paths, capsys):
    plan = json.loads(said(capsys, "tsv_merge", *paths, "--plan", "--json", "--alpha", "-1e-1", "--weights", "-0.5,1,-2e0"))
    assert plan["options"]["alpha"] == -.1 and plan["options"]["weights"] == [-.5, 1, -2]


@pytest.mark.skipif(sys.platform == "win32", reason="pipes")
@pytest.mark.parametrize("argv", [["tsv_compress", "--plan"], ["tsv_compress", "--plan", "--json"], ["tsv_compress"]])
def test_nobody_reads_on(tmp_path, paths, argv):
    "As in `tsv_compress … --plan | head -3`."
    run = child(argv[0], *paths[:2], "--out", tmp_path / "out.safetensors", *argv[1:])
    run.stdout.close()
    err = run.stderr.read()
    assert (run.wait(60), err) == (141, "")
    assert not (tmp_path / "out.safetensors").exists()


def test_json_is_the_report(tmp_path, paths, capsys):
    report = json.loads(said(capsys, "tsv_merge", *paths, "--out", tmp_path / "m.safetensors", "--json"))
    assert timeless(report) == timeless(report_of(tmp_path / "m.safetensors")) and report["command"] == "merge"


def test_compress_and_expand(tmp_path, paths, capsys):
    archive, back = tmp_path / "a.safetensors", tmp_path / "back"
    out = said(capsys, "tsv_compress", *paths[:2], "--out", archive, *PAPER, "--rank", 4)
    base, task, *_ = states()
    want, got = compress(task_vector(base, task), rank=4), CompressedTaskVector.load(archive)
    assert all(torch.allclose(a, b) for n, f in want.factors.items() for a, b in zip(got.factors[n], f)) and "tensors stored as factors" in out
    assert "rebuilt from factors" in said(capsys, "tsv_expand", paths[0], archive, "--out", back, "--alpha", "2")
    assert all(torch.allclose(x, load_output(back)[n]) for n, x in got.apply_to(base, 2.).items())
    save_file(base, tmp_path / "b.safetensors")
    assert "holds no compressed task vector; make one with tsv_compress" in refused("tsv_expand", paths[0], tmp_path / "b.safetensors", "--out", tmp_path / "x")


def other_base(folder, *names):
    "The base with one number of each of these tensors changed: the shapes are the same."
    state = {n: x.clone() for n, x in states()[0].items()}
    for name in names: state[name].view(-1)[0] += 1
    save_file(state, folder / "other.safetensors")
    return folder / "other.safetensors"


@pytest.mark.parametrize("changed, early", [(("h.0.attn.in_proj_weight",), True), (("h.1.norm",), False), (("h.1.norm", "h.0.mlp.weight"), True)])
def test_expanding_another_base(tmp_path, paths, capsys, changed, early):
    archive, back, asked, real = tmp_path / "a.safetensors", tmp_path / "back", [], running.local_engine
    said(capsys, "tsv_compress", *paths[:2], "--out", archive)
    other = other_base(tmp_path, *changed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "local_engine", lambda job, units: asked.append(units) or real(job, units))
        told = refused("tsv_expand", other, archive, "--out", back)
    digest = json.loads(open_checkpoint(archive).metadata["inputs"])["base"][:12]
    assert re.search(rf"a.safetensors' was made from another base than .*other.safetensors'.*{digest}.*a.report.json.*--any-base", told, re.S), told
    assert not back.exists() and bool(asked) != early # a sample of tensors is compared before the work, all of them before anything appears
    assert (f"tensor {changed[-1]!r} differs" in told) == early
    said(capsys, "tsv_expand", other, archive, "--out", back, "--any-base")
    assert report_of(back)["session"]["resumed"] == (0 if early else report_of(back)["session"]["units"]) # the work is kept
    assert all(torch.allclose(x, load_output(back)[n]) for n, x in CompressedTaskVector.load(archive).apply_to(open_checkpoint(other)).items())


def test_expanding_archives_that_do_not_know_their_base(tmp_path, paths, capsys):
    base, task, *_ = states()
    compress(task_vector(base, task), rank=4).save(tmp_path / "core.safetensors")
    said(capsys, "tsv_expand", other_base(tmp_path, "h.0.mlp.weight"), tmp_path / "core.safetensors", "--out", tmp_path / "back")
    said(capsys, "tsv_compress", *paths[:2], "--out", tmp_path / "a.safetensors")
    archive = open_checkpoint(tmp_path / "a.safetensors")
    for damage in ({"inputs": "{", "base": "[]"}, {"inputs": "[]", "base": '{"x": 3, "h.1.norm": null}'}, {"inputs": "{}"}):
        save_file({n: archive[n] for n in archive}, tmp_path / "b.safetensors", {k: v for k, v in archive.metadata.items() if k not in ("inputs", "base")} | damage)
        said(capsys, "tsv_expand", tmp_path / "other.safetensors", tmp_path / "b.safetensors", "--out", tmp_path / "back", "--overwrite")
    torch.save(base, tmp_path / "same.pt") # the same numbers in another file
    said(capsys, "tsv_expand", tmp_path / "same.pt", tmp_path / "a.safetensors", "--out", tmp_path / "same")


def test_interference(tmp_path, paths, capsys):
    out = said(capsys, "tsv_interference", *paths, "--out", tmp_path / "i.json", *PAPER)
    base, *tasks = states()
    total = sum(interference_by_layer([task_vector(base, t) for t in tasks]).values())
    assert f"{total:12.4g}  all layers together" in out and "task2" in out and max(map(len, out.replace(str(tmp_path), "").splitlines())) <= 80
    assert report_of(tmp_path / "i.json")["command"] == "interference"


def test_quiet(tmp_path, paths, capfd):
    here("tsv_merge", *paths, "--out", tmp_path / "out", "--quiet")
    assert tuple(capfd.readouterr()) == ("", "") and (tmp_path / "out").exists()


@pytest.mark.parametrize("argv, text", [
    (["--weights", "1;2"], "weights must be numbers with commas between them, got '1;2'"), (["--engine", "rey"], "unknown engine 'rey'; known: 'local', 'ray'. Did you mean 'ray'?"),
    (["--address", "auto"], "is for --engine ray"), (["--vocab", "comon"], "Did you mean 'common'?"), (["--rank", "0"], "rank must be at least 1"), (["--rank", "ful"], "rank must be at least 1 and whole, got 'ful'"),
    (["--exclude", "no_such_tensor"], "fits no tensor"), (["--shard-size", "5 apples"], "shard size must be"), (["--dtype", "int8"], "unknown dtype 'int8'"), (["--weights", "1,2"], "2 weights for 3 tasks")])
def test_wrong_values_are_named(tmp_path, paths, argv, text):
    assert text in refused("tsv_merge", *paths, "--out", tmp_path / "out", *argv) and not list(tmp_path.iterdir())


def test_a_shard_size_is_for_a_folder(tmp_path, paths):
    for argv in (["tsv_merge", *paths], ["tsv_expand", paths[0], archive_of(tmp_path, paths)]):
        assert f"--shard-size 5GB is for a folder, and --out {tmp_path}/m.safetensors is one file; leave one out, or name a folder" in refused(*argv, "--out", tmp_path / "m.safetensors", "--shard-size", "5GB")


def archive_of(tmp_path, paths):
    commands.tsv_compress([*paths[:2], "--out", str(tmp_path / "a.safetensors"), "--quiet"])
    return str(tmp_path / "a.safetensors")


def test_wrong_paths_are_named(tmp_path, paths):
    assert "no/such" in refused("tsv_merge", paths[0], "no/such", "--out", tmp_path / "out")
    assert "would be called 'task0'; give this one a name of its own: NAME=" in refused("tsv_merge", *paths, paths[1], "--out", tmp_path / "out")
    assert "must be a file that ends in .safetensors" in refused("tsv_compress", *paths[:2], "--out", tmp_path / "out")
    assert "must be a file that ends in .json" in refused("tsv_interference", *paths, "--out", tmp_path / "out")


@pytest.mark.parametrize("out", ["memory://bucket/x", "s3://bucket/x", "file:///x", "zip::memory://x"])
def test_an_output_is_no_address(tmp_path, paths, monkeypatch, out):
    """An address was once taken for a path, and written to a folder called `memory:` here."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    tsv = commands.tsv_compress(["--quiet", "--out", str(tmp_path / "a.safetensors"), *paths[:2]]) or str(tmp_path / "a.safetensors")
    for name, argv, end in (("tsv_merge", paths[:2], ""), ("tsv_merge", paths[:2], ".safetensors"), ("tsv_compress", paths[:2], ".safetensors"), ("tsv_expand", [paths[0], tsv], ""), ("tsv_interference", paths[:3], ".json")):
        assert re.search(r"^tsv_\w+: '.*x(\.\w+)?' is an address, and outputs are written to this machine's disks; give --out a path, ", refused(name, *argv, "--out", out + end)), name
        for restart in (False, True):
            with pytest.raises(ValueError, match="is an address"): WorkFolder(make_plan("merge", *opened(paths[:2])), out + end, restart)
    assert not list((tmp_path / "here").iterdir())


def opened(paths): return open_checkpoint(paths[0]), {f"task{t}": open_checkpoint(p) for t, p in enumerate(paths[1:])}


def test_tasks_have_names(tmp_path, paths, capsys):
    report = json.loads(said(capsys, "tsv_merge", paths[0], f"law={paths[1]}", "--out", tmp_path / "out", f"math={paths[1]}", "--json")) # an option between the tasks
    assert list(report["inputs"]) == ["base", "law", "math"]


def test_a_disk_too_small_for_the_output(tmp_path, paths, monkeypatch):
    monkeypatch.setattr(running.shutil, "disk_usage", lambda path: type("Usage", (), dict(free=1000)))
    assert "are free there; make room, or choose another --out" in refused("tsv_merge", *paths, "--out", tmp_path / "deep" / "out") and not list(tmp_path.iterdir())


def test_parts_and_the_file_made_of_them_must_fit(tmp_path, monkeypatch):
    base = open_checkpoint({f"h.{i}": torch.ones(50, 50) for i in range(4)}) # 10 kB each
    def check(free, out, **options):
        monkeypatch.setattr(running.shutil, "disk_usage", lambda path: type("Usage", (), dict(free=free)))
        running.check_space(make_plan("merge", base, {"a": base}, **options), tmp_path / out)
    check(80_000, "m.safetensors"); check(50_000, "m", shard_size=10_000)
    with pytest.raises(CannotWrite, match=r"takes 80.* kB while it is written .40.* kB in the end., and 79.* kB are free there; make room"): check(79_400, "m.safetensors")
    with pytest.raises(CannotWrite, match=r"takes 50.* kB while it is written"): check(49_900, "m", shard_size=10_000)
    (tmp_path / "m.partial").mkdir(); (tmp_path / "m.partial" / "x").write_bytes(bytes(200))
    check(49_900, "m", shard_size=10_000) # parts of an earlier run are taken over
    archive = make_plan("compress", base, {"a": base}, rank=1, shard_size=2**62)
    monkeypatch.setattr(running.shutil, "disk_usage", lambda path: type("Usage", (), dict(free=2 * archive.bytes_written)))
    running.check_space(archive, tmp_path / "a.safetensors") # factors, not matrices


def test_a_single_file_takes_twice_its_size_for_a_moment(tmp_path, monkeypatch):
    base, peak = open_checkpoint({f"h.{i}": torch.ones(200, 200) for i in range(4)}), [0]
    def watch(folder):
        peak[0] = max(peak[0], sum(p.stat().st_size for p in (tmp_path / "m.safetensors.partial").rglob("*.*") if p.is_file()))
    monkeypatch.setattr("tsv_nb.scale.parts.sync_folder", watch)
    plan = make_plan("merge", base, {"a": base}, threads=1)
    run_plan(plan, base, {"a": base}, tmp_path / "m.safetensors", progress=False)
    assert 2 <= peak[0] / plan.bytes_written < 2.05


def test_the_memory_at_the_end_is_that_of_the_plan(tmp_path, paths, capsys):
    "In a process of its own: growth, as in the plan, and the whole."
    run = child("tsv_merge", *paths, "--out", tmp_path / "out")
    out, err = run.communicate(timeout=60)
    grown, whole = re.search(r"; memory rose by at most ([\d.]+ [kM]B) to ([\d.]+ [MG]B)\.", out).groups()
    session = report_of(tmp_path / "out")["session"]
    assert grown == size_text(session["peak_rss"] - session["rss_at_start"]) and whole == size_text(session["peak_rss"]), err
    planned = json.loads(said(capsys, "tsv_merge", *paths, "--out", tmp_path / "x", "--plan", "--json", "--threads", 1))["peak_bytes"]
    assert session["peak_rss"] - session["rss_at_start"] <= planned


def test_ctrl_c_and_go_on(tmp_path, paths, capsys):
    out, ref = tmp_path / "out", tmp_path / "ref"
    here("tsv_merge", *paths, "--out", ref)
    run = child("tsv_merge", *paths, "--out", out, pause=1.)
    wait_for(run, lambda: len(list((tmp_path / "out.partial").glob("parts/*.safetensors"))) > 2)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130 and f"tsv_merge: stopped. What is finished is in {out}.partial; the same command goes on from there." in err and "Traceback" not in err and not out.exists()
    assert "holds an unfinished run of another kind: rank was None and is now 2" in refused("tsv_merge", *paths, "--out", out, "--rank", 2, "--threads", 1)
    capsys.readouterr()
    here("tsv_merge", *paths, "--out", out)
    assert "pieces were there already" in " ".join(capsys.readouterr().out.split()) and digests(out) == digests(ref)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_sigkill_and_go_on(tmp_path, paths):
    "Killed with the n-th part, at the first shard, and just after the start; the same process goes on each time."
    out, ref, partial = tmp_path / "out", tmp_path / "ref", tmp_path / "out.partial"
    options = ["--shard-size", "15000"]
    here("tsv_merge", *paths, "--out", ref, *options)
    for there in (lambda: partial.exists(), lambda: list(partial.glob("parts/*.safetensors")), lambda: list(partial.glob("done/*.json")), lambda: len(list(partial.glob("parts/*.safetensors"))) > 1):
        run = child("tsv_merge", *paths, "--out", out, *options, pause=.2)
        wait_for(run, there)
        run.kill()
        run.communicate()
        assert not out.exists()
    here("tsv_merge", *paths, "--out", out, *options)
    assert digests(out) == digests(ref) and not partial.exists()


def test_a_second_process_is_told(tmp_path, paths):
    first = child("tsv_merge", *paths, "--out", tmp_path / "out", pause=.5)
    wait_for(first, lambda: (tmp_path / "out.partial" / "plan.json").exists())
    assert f"another process is working on {str(tmp_path / 'out')!r}" in refused("tsv_merge", *paths, "--out", tmp_path / "out", "--threads", 1)
    first.kill(); first.communicate()


def test_a_bar_with_the_time_that_is_left(tmp_path, paths, capfd):
    here("tsv_merge", *paths, "--out", tmp_path / "out")
    err = capfd.readouterr().err
    assert "merge 100%|" in err and "<00:00" in err


def test_a_base_given_as_the_file_of_its_folder(tmp_path):
    "What it needs to be loaded comes along, as with the folder."
    for name in ("base", "a"):
        (tmp_path / name).mkdir()
        save_file({"w": torch.randn(9, 8)}, tmp_path / name / "model.safetensors")
        for other in ("config.json", "tokenizer.json"): (tmp_path / name / other).write_text("{}")
    commands.tsv_merge([str(tmp_path / name / "model.safetensors") for name in ("base", "a")] + ["--out", str(tmp_path / "out"), "--quiet"])
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json", "tokenizer.json", "model.safetensors", "tsv_report.json"}
