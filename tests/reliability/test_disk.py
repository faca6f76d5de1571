"""Disks that are full, disks that cannot be read, files that change while they are read: an error with the file's name, nothing half-written, and the run goes on when the trouble is over."""
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from kills import MergeWork, files_digest

from tsv_nb import CompressedTaskVector, TaskMasks, compress, magnitude_masks
from tsv_nb.compress import save_atomic
from tsv_nb.scale.checkpoints import open_checkpoint
from tsv_nb.scale.plan import make_plan
from tsv_nb.scale.stream import local_engine, run_plan
from tsv_nb.vision.records import Records, write_json

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="limits of a POSIX system")


class SmallDisk:
    "A folder on a disk that can be too small."
    def __init__(self, folder): self.folder = folder
    @contextmanager
    def limited(self, nbytes): raise NotImplementedError


class Tmpfs(SmallDisk):
    "A file system of its own, whose size is changed; needs root."
    @contextmanager
    def limited(self, nbytes):
        subprocess.run(["mount", "-o", f"remount,size={nbytes}", self.folder], check=True)
        try: yield
        finally: subprocess.run(["mount", "-o", "remount,size=256m", self.folder], check=True)


class LongestFile(SmallDisk):
    "A limit on the length of a file, which the system enforces for this process."
    @contextmanager
    def limited(self, nbytes):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
        try: yield
        finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(params=["tmpfs", "longest file"])
def disk(request, tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param != "tmpfs": yield LongestFile(folder); return
    mounted = shutil.which("mount") and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", folder], capture_output=True).returncode == 0
    if not mounted: pytest.skip("no file system may be mounted here")
    try: yield Tmpfs(folder)
    finally: subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "Checkpoints, and what merging them gives."
    work, folder = MergeWork(), tmp_path_factory.mktemp("model")
    work.prepare(folder)
    run_plan(*work.plan(), folder / "merged", progress=False)
    work.expected = files_digest(folder / "merged")
    return work


def nothing_half_done(folder, *final):
    "No output, and no temporary file outside the folder of the unfinished run."
    assert not [p for p in folder.iterdir() if p.name in final]
    assert not [p.name for p in folder.rglob("*.tmp")]


def test_a_full_disk_and_then_more_room(disk, model):
    "Each time some more: the run goes a bit further, says what is missing, and in the end gives what it gives otherwise."
    out, errors, largest = disk.folder / "merged", 0, 0
    for size in (8_000, 30_000, 60_000, 90_000, 150_000, 200_000):
        with disk.limited(size):
            try: run_plan(*model.plan(), out, progress=False)
            except OSError as e:
                errors += 1
                assert e.errno in (errno.ENOSPC, errno.EFBIG) and str(disk.folder) in str(e) and "run the same command again" in str(e)
                nothing_half_done(disk.folder, "merged")
            else: break
        parts = len(model.finished(disk.folder))
        assert parts >= largest
        largest = parts
    assert errors >= 2
    if not out.exists(): run_plan(*model.plan(), out, progress=False)
    assert files_digest(out) == model.expected and [p.name for p in disk.folder.iterdir()] == ["merged"]


@pytest.mark.parametrize("command", ["compress", "expand"])
def test_archives_of_checkpoints_on_a_full_disk(disk, model, tmp_path, command):
    "The same for one task vector that is compressed to a file, and for the checkpoint that is made of it."
    base, task, archive = open_checkpoint(model.base), open_checkpoint(model.tasks["task0"]), tmp_path / "archive.safetensors"
    def run(command, out):
        tasks = {"task0": task if command == "compress" else open_checkpoint(archive)}
        return run_plan(make_plan(command, base, tasks, threads=1, **dict(ratio=.5) if command == "compress" else {}), base, tasks, out, progress=False)
    run("compress", archive)
    expected, out = tmp_path / "expected.safetensors", disk.folder / "out.safetensors"
    run(command, expected)
    with disk.limited(20_000), pytest.raises(OSError, match="run the same command again") as e: run(command, out)
    assert str(disk.folder) in str(e.value)
    nothing_half_done(disk.folder, "out.safetensors", "out.report.json")
    run(command, out)
    assert out.read_bytes() == expected.read_bytes() and {p.name for p in disk.folder.iterdir()} == {"out.safetensors", "out.report.json"}
    if command == "compress": assert set(CompressedTaskVector.load(out)) == {k for k in base if base.header(k).is_floating_point()}


def contents(folder): return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.mark.parametrize("kind", ["archive", "masks", "tensors", "json"])
def test_files_of_the_library_on_a_full_disk(disk, kind):
    "The old file stays as it was; the message names the new one."
    g = torch.Generator().manual_seed(0)
    vector = {"w": torch.randn(300, 200, generator=g), "b": torch.randn(300, generator=g)}
    write = {"archive": lambda p, k: compress(vector, rank=k).save(p), "masks": lambda p, k: magnitude_masks([vector] * 8 * k).save(p),
             "tensors": lambda p, k: save_atomic({"x": torch.ones(10_000 * k)}, p), "json": lambda p, k: write_json(p, {str(i): i for i in range(4_000 * k)})}[kind]
    path = disk.folder / "file"
    write(path, 1)
    before = contents(disk.folder)
    with disk.limited(len(before["file"]) + 4096):
        with pytest.raises(OSError, match="'.*file'|No space left|File too large") as e: write(path, 6)
    assert str(disk.folder) in str(e.value) or kind == "json"
    assert contents(disk.folder) == before
    write(path, 6)
    assert len(path.read_bytes()) > len(before["file"])


def test_records_on_a_full_disk(disk):
    "What was written before the disk was full is there, whole; what did not fit is not."
    with Records(disk.folder) as records:
        with disk.limited(8192), pytest.raises(OSError):
            for i in range(1000): records.add(f"key {i}", value=i, seconds=1.)
        written = len(records)
        assert 20 < written < 1000
        records.add("last", value=-1, seconds=1.)
    with Records(disk.folder) as again: assert len(again) == written + 1 and again["last"]["value"] == -1


# reading


@pytest.mark.parametrize("after", [0, 3, 11, 20])
def test_a_disk_that_cannot_be_read(model, tmp_path, monkeypatch, after):
    read, calls = os.preadv, []
    def failing(*args):
        calls.append(args)
        if len(calls) > after: raise OSError(errno.EIO, "Input/output error")
        return read(*args)
    plan, base, tasks = model.plan()
    with monkeypatch.context() as m:
        m.setattr(os, "preadv", failing)
        with pytest.raises(OSError, match="Input/output error") as e: run_plan(plan, base, tasks, tmp_path / "merged", progress=False)
    assert e.value.errno == errno.EIO and any(str(p) in str(e.value) for p in (model.base, *model.tasks.values()))
    nothing_half_done(tmp_path, "merged")
    run_plan(*model.plan(), tmp_path / "merged", progress=False)
    assert files_digest(tmp_path / "merged") == model.expected


CHANGES = {"cut": lambda p: os.truncate(p, p.stat().st_size // 2), "emptied": lambda p: os.truncate(p, 0), "longer": lambda p: p.write_bytes(p.read_bytes() + b"\0" * 64),
           "replaced": lambda p: os.replace(shutil.copy(p, p.with_suffix(".new")), p), "other numbers": lambda p: p.write_bytes(p.read_bytes()[:-1] + b"\x11"), "deleted": lambda p: p.unlink()}


@pytest.fixture
def own(model, tmp_path):
    "The checkpoints in a folder of this test."
    work = MergeWork()
    shutil.copytree(model.base.parent, tmp_path / "model", ignore=shutil.ignore_patterns("merged*"))
    work.base, work.tasks, work.expected = tmp_path / "model" / "base", {t: tmp_path / "model" / p.name for t, p in model.tasks.items()}, model.expected
    return work


@pytest.mark.parametrize("which", ["task", "shard"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_during_the_run(own, tmp_path, change, which):
    "It is an error that names the file; going on with the other file is refused, starting over is not."
    path = own.tasks["task1"] if which == "task" else sorted(own.base.glob("*.safetensors"))[-1]
    before, out = path.read_bytes(), tmp_path / "merged"
    def engine(job, units):
        for done, unit in enumerate(local_engine(job, units)):
            if done == 1: CHANGES[change](path)
            yield unit
    plan, base, tasks = own.plan()
    with pytest.raises((ValueError, OSError), match="changed|damaged|no checkpoint") as e: run_plan(plan, base, tasks, out, engine, progress=False)
    assert path.name in str(e.value)
    nothing_half_done(tmp_path, "merged")
    path.write_bytes(before)
    with pytest.raises(ValueError, match=f"the input '{'task1' if which == 'task' else 'base'}' is another one.*--restart"): run_plan(*own.plan(), out, progress=False)
    run_plan(*own.plan(), out, progress=False, restart=True)
    assert {p.name: p.read_bytes() for p in out.glob("*.safetensors")}.keys() and [p.name for p in tmp_path.iterdir() if "merged" in p.name] == ["merged"]


@pytest.mark.parametrize("rounds", [12, pytest.param(200, marks=pytest.mark.long)])
def test_a_file_that_is_cut_while_it_is_read(rounds):
    "At many moments, in children: each ends with the result or with an error, and none by a signal."
    run = subprocess.run([sys.executable, Path(__file__).with_name("kills.py"), "--cut", str(rounds)], env=os.environ | dict(OMP_NUM_THREADS="1"), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    ends = json.loads(run.stdout.splitlines()[-1])["ends"]
    assert set(ends) <= {"finished", "refused"} and ends["refused"] > max(1, rounds // 20)


def test_archives_that_are_cut_after_they_were_loaded(tmp_path):
    "What was loaded is in memory. (Numbers that are mapped from a file end the process when the file is cut.)"
    vector = {"w": torch.randn(300, 200, generator=torch.Generator().manual_seed(0))}
    archive, masks = compress(vector), magnitude_masks([vector])
    script = """import os, sys
from tsv_nb import CompressedTaskVector, TaskMasks
loaded = CompressedTaskVector.load(sys.argv[1]), TaskMasks.load(sys.argv[2])
for path in sys.argv[1:]: os.truncate(path, 64)
for tensors in (loaded[0].factors["w"], loaded[1].packed.values()): print(sum(float(t.double().sum()) for t in tensors))"""
    paths = archive.save(tmp_path / "archive.safetensors"), masks.save(tmp_path / "masks.safetensors")
    run = subprocess.run([sys.executable, "-c", script, *paths], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    for said, tensors in zip(run.stdout.split(), (archive.factors["w"], masks.packed.values())): assert float(said) == pytest.approx(sum(float(t.double().sum()) for t in tensors))
    for kind, path in zip((CompressedTaskVector, TaskMasks), paths):
        with pytest.raises(ValueError, match=f"{path.name}' is damaged"): kind.load(path)
