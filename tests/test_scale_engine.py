"""What a run does when its surroundings are not as expected: addresses, plans of other inputs, other processors, numbers that are too large."""
import dataclasses
import errno
import functools
import http.server
import os
import pickle
import threading
import warnings

import fsspec
import pytest
import torch
from safetensors.torch import save, save_file
from scale_models import fine

from tsv_nb.scale.checkpoints import open_checkpoint
from tsv_nb.scale.outputs import file_sha256
from tsv_nb.scale.parts import part_path
from tsv_nb.scale.plan import make_plan
from tsv_nb.scale.safetensors_reader import strict_json
from tsv_nb.scale.stream import arithmetic, local_engine, run_plan, run_unit
from tsv_nb.scale.tensor_work import WORK


# Addresses

class Service(fsspec.AbstractFileSystem):
    "A service with one file, and with words of its own for a version."
    protocol, cachable, data, said = "teststore", False, b"", {}
    def info(self, path, **_): return dict(name=path, size=len(self.data), type="file", **self.said)
    def cat_file(self, path, start=None, end=None, **_): return self.data[start:end]


@pytest.fixture
def service(monkeypatch):
    "The service, with a checkpoint in it."
    fsspec.register_implementation("teststore", Service, clobber=True)
    def holds(number, **said): monkeypatch.setattr(Service, "data", save({"w": torch.full((8, 6), number)})); monkeypatch.setattr(Service, "said", said)
    return holds


VERSIONS = { # what file systems put into `info`, of two versions of a file
    "http": ({"Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT", "url": "x"}, {"Last-Modified": "Mon, 01 Jan 2024 00:00:07 GMT", "url": "x"}),
    "http, digest": ({"Content-MD5": "a"}, {"Content-MD5": "b"}),
    "hf": (dict(blob_id="a1", lfs=None, xet_hash=None, last_commit=None, security=None), dict(blob_id="b2", lfs=None, xet_hash=None, last_commit=None, security=None)),
    "hf bucket": (dict(xet_hash="a1"), dict(xet_hash="b2")),
    "s3": (dict(ETag='"a"', VersionId=None, StorageClass="STANDARD"), dict(ETag='"b"', VersionId=None, StorageClass="STANDARD")),
    "gcs": (dict(generation="1", md5Hash="a"), dict(generation="2", md5Hash="b")),
    "az": (dict(etag="0x1", last_modified=1), dict(etag="0x2", last_modified=2)),
    "github": (dict(sha="a"), dict(sha="b"))}


@pytest.mark.parametrize("kind", VERSIONS)
def test_a_remote_file_that_was_replaced(service, kind):
    one, two = VERSIONS[kind]
    service(1., **one)
    c = open_checkpoint("teststore://a.safetensors")
    seen = c.fingerprint()
    c.check_unchanged(); assert open_checkpoint("teststore://a.safetensors").fingerprint() == seen
    service(2., **two)
    with pytest.raises(ValueError, match="has changed since it was opened"): c.check_unchanged()
    with pytest.raises(ValueError, match="has changed since it was opened"): c["w"]
    assert open_checkpoint("teststore://a.safetensors").fingerprint() != seen


def test_without_a_version_the_fingerprint_says_so(service):
    service(1., blob_id=None)
    [facts] = open_checkpoint("teststore://a.safetensors").fingerprint()["files"].values()
    assert facts["mtime_ns"] == "unknown: the service tells the size only"


class Quiet(http.server.SimpleHTTPRequestHandler):
    "A web server that does not know ranges."
    def log_message(self, *_): pass


@pytest.fixture
def web(tmp_path):
    "(folder, its address)."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path, f"http://127.0.0.1:{server.server_port}"
    server.shutdown(); server.server_close()


def test_a_web_server_without_ranges(web, monkeypatch):
    folder, url = web
    save_file({"w": torch.ones(8, 6)}, folder / "m.safetensors")
    with pytest.raises(ValueError, match="the server of .*m.safetensors' does not answer ranges of bytes.*download the file first"): open_checkpoint(f"{url}/m.safetensors")
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*n.safetensors'; check the address"): open_checkpoint(f"{url}/n.safetensors")
    end = Quiet.end_headers
    monkeypatch.setattr(Quiet, "end_headers", lambda self: (self.send_header("Accept-Ranges", "none"), end(self))[1])
    monkeypatch.setattr(Quiet, "do_GET", None) # nothing was asked for
    with pytest.raises(ValueError, match="does not answer ranges"): open_checkpoint(f"{url}/m.safetensors")


@pytest.mark.parametrize("name", ["m.safetensors", "m"])
def test_nobody_at_an_address(name):
    with pytest.raises(ConnectionError, match=f"cannot reach 'http://127.0.0.1:9/{name}' .*check the address and the network, or download it and give the folder"): open_checkpoint(f"http://127.0.0.1:9/{name}")


@pytest.mark.parametrize("name", ["m.safetensors", "m"])
def test_errors_of_other_libraries_on_opening(service, monkeypatch, name):
    class ConnectError(Exception): "As httpx has it: no OSError."
    def down(self, path, **_): raise ConnectError("[Errno -2] Name or service not known")
    service(1.)
    monkeypatch.setattr(Service, "info", down); monkeypatch.setattr(Service, "ls", down)
    if name == "m.safetensors": monkeypatch.setattr(Service, "invalidate_cache", down) # as the hub's
    with pytest.raises(ConnectionError, match=rf"cannot reach 'teststore://{name}' \(ConnectError: .Errno -2. Name or service not known\)"): open_checkpoint(f"teststore://{name}")
    def broken(self, path, **_): raise RuntimeError("quota")
    for what in ("info", "ls", "invalidate_cache"): monkeypatch.setattr(Service, what, broken)
    with pytest.raises(OSError, match=rf"'teststore://{name}' cannot be read \(RuntimeError: quota\)"): open_checkpoint(f"teststore://{name}")


# Plans and the checkpoints they are given

def abc(folder, **scales):
    "A base and tasks in files; (base, tasks) as checkpoints."
    g = torch.Generator().manual_seed(0)
    base = {f"h.{i}.weight": torch.randn(16, 12, generator=g) for i in range(3)}
    save_file(base, folder / "base.safetensors")
    for name, scale in scales.items(): save_file({n: x + scale * torch.randn(16, 12, generator=g) for n, x in base.items()}, folder / f"{name}.safetensors")
    return opened(folder, *scales)


def opened(folder, *names): return open_checkpoint(folder / "base.safetensors"), {n: open_checkpoint(folder / f"{n}.safetensors") for n in names}


def test_a_plan_of_other_checkpoints_is_refused(tmp_path):
    base, tasks = abc(tmp_path, a=.1, b=.1)
    plan = make_plan("merge", base, tasks, weights=dict(a=1, b=3), threads=1)
    def refused(text, base, tasks):
        with pytest.raises(ValueError, match=text): run_plan(plan, base, tasks, tmp_path / "out", progress=False)
        assert not list(tmp_path.glob("out*"))
    refused(r"the plan is for the tasks a, b, and was given b, a \(weights go by the order\); pass those of the plan in its order", *opened(tmp_path, "b", "a"))
    refused("the plan is for the tasks a, b, and was given a; pass", *opened(tmp_path, "a"))
    refused("the plan is for the tasks a, b, and was given a, base; pass", *opened(tmp_path, "a", "base"))
    then = base.fingerprint()["files"]["base.safetensors"]["mtime_ns"]
    abc(tmp_path, a=.2, b=.1)
    with pytest.raises(ValueError, match="base.safetensors' has changed since it was opened"): base.fingerprint()
    os.utime(tmp_path / "base.safetensors", ns=(then,) * 2) # as it was
    refused("the input 'a' .*a.safetensors'. is not what the plan was made for", *opened(tmp_path, "a", "b"))


def test_a_plan_of_other_tensors_in_memory_is_refused(tmp_path):
    base, task = open_checkpoint({"w": torch.ones(9, 9)}), open_checkpoint({"w": torch.eye(9)})
    plan = make_plan("merge", base, {"a": task}, threads=1)
    with pytest.raises(ValueError, match="the input 'base' .the dict in memory. is not what"): run_plan(plan, open_checkpoint({"w": torch.zeros(9, 9)}), {"a": task}, tmp_path / "out", progress=False)
    run_plan(plan, open_checkpoint({"w": torch.ones(9, 9)}), {"a": task}, tmp_path / "out", progress=False)


def damaging(times):
    "An engine whose first parts are damaged, so often."
    calls = []
    def engine(job, units):
        calls.append(len(units))
        for u in local_engine(job, units):
            if len(calls) <= times: part_path(job.folder, u).write_bytes(part_path(job.folder, u).read_bytes()[:-1])
            yield u
    return engine, calls


def test_the_third_try_may_succeed(tmp_path):
    base, tasks = abc(tmp_path, a=.1)
    plan = make_plan("merge", base, tasks, threads=1)
    engine, calls = damaging(2)
    run_plan(plan, base, tasks, tmp_path / "out", engine, progress=False)
    assert calls == [1] * 3 and (tmp_path / "out").exists()
    engine, calls = damaging(3)
    with pytest.raises(OSError, match="damaged again and again"): run_plan(plan, base, tasks, tmp_path / "other", engine, progress=False)
    assert calls == [1] * 3 and not (tmp_path / "other").exists()


# Processors

@pytest.mark.parametrize("late", ["before", "after", "found"])
def test_a_part_of_another_plan_is_not_taken(tmp_path, late):
    """A worker of an earlier run, with other options, leaves its part here after its driver was killed: before the new run's part comes, after it, or between two sessions."""
    start, tuned = abc(tmp_path, v=.1)
    old, new = (dataclasses.replace(p, units=tuple((t.name,) for t in p.tensors)) for p in (make_plan("merge", start, tuned, rank=r, threads=1) for r in (2, 12)))
    run_plan(new, start, tuned, tmp_path / "good.safetensors", progress=False)
    def engine(job, units):
        for unit in units:
            theirs = [dataclasses.replace(job, plan=old)] * (unit == 0 and not stale)
            for one in theirs + [job] if late == "before" else [job] + theirs: run_unit(one, unit)
            stale.extend(theirs)
            if late == "found" and theirs: raise KeyboardInterrupt
            yield unit
    stale = []
    if late == "found":
        with pytest.raises(KeyboardInterrupt): run_plan(new, start, tuned, tmp_path / "out.safetensors", engine, progress=False)
    report = run_plan(new, start, tuned, tmp_path / "out.safetensors", engine, progress=False)
    assert stale and report["session"]["resumed"] == 0 and {e["rank"]["v"] for e in report["tensors"].values() } == {12}
    assert file_sha256(tmp_path / "out.safetensors") == file_sha256(tmp_path / "good.safetensors")


def stopping(after):
    def engine(job, units):
        yield from local_engine(job, units[:after])
        raise KeyboardInterrupt
    return engine


@pytest.mark.parametrize("save, end", [(save_file, "safetensors"), (torch.save, "pt")], ids=["safetensors", "pt"])
def test_going_on_with_another_file_of_the_same_size_and_time(tmp_path, save, end):
    """Fine-tuned models share header and size; `cp -p`, images and package stores keep or fix the time."""
    g, task, file = torch.Generator().manual_seed(0), tmp_path / f"a.{end}", tmp_path / f"base.{end}"
    states = [{f"w{i}": torch.randn(120, 80, generator=g) for i in range(4)} for _ in range(3)]
    def put(path, state): save(state, path); os.utime(path, (1, 1))
    put(file, states[0]); put(task, states[1])
    def go(engine=local_engine):
        base, tasks = open_checkpoint(file), {"a": open_checkpoint(task)}
        assert open_checkpoint(task).fingerprint() == tasks["a"].fingerprint() == pickle.loads(pickle.dumps(tasks["a"])).fingerprint() # which says if another process sees something else
        return run_plan(fine(make_plan("merge", base, tasks, threads=1)), base, tasks, tmp_path / "out", engine, progress=False)
    with pytest.raises(KeyboardInterrupt): go(stopping(2))
    first = open_checkpoint(task).fingerprint()
    put(task, states[2])
    assert {n: f for n, f in open_checkpoint(task).fingerprint()["files"][task.name].items() if f != first["files"][task.name][n]}.keys() == {"sampled"} # nothing else has changed
    with pytest.raises(ValueError, match="the input 'a' is another one, or its files have changed"): go()
    put(task, states[1])
    assert go()["session"]["resumed"] == 2


def test_going_on_with_another_arithmetic_warns(tmp_path, monkeypatch):
    base, tasks = abc(tmp_path, a=.1)
    plan = fine(make_plan("merge", base, tasks, threads=1))
    def run(engine=local_engine): return run_plan(plan, base, tasks, tmp_path / "out", engine, progress=False)
    with pytest.raises(KeyboardInterrupt): run(stopping(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(KeyboardInterrupt): run(stopping(1)) # the same machine
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    with pytest.warns(UserWarning, match="out.partial' was begun with .*and this process computes with .*'MKL_CBWR': 'COMPATIBLE'.*last bits"): report = run()
    assert report["session"]["resumed"] == 2 and {m.get("MKL_CBWR") for m in report["session"]["machines"]} == {None, "COMPATIBLE"}
    assert report["session"]["notes"] == ["parts were computed by several kinds of machines: last bits may differ from those of a run on one"]
    monkeypatch.delenv("MKL_CBWR")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = run_plan(plan, base, tasks, tmp_path / "whole", progress=False)
    assert report["session"]["machines"] == [arithmetic()] and "notes" not in report["session"]


def test_a_finished_run_does_not_warn(tmp_path, monkeypatch):
    "All parts are there: nothing is computed here."
    base, tasks = abc(tmp_path, a=.1)
    plan = make_plan("merge", base, tasks, threads=1)
    def late(job, units):
        yield from local_engine(job, units)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): run_plan(plan, base, tasks, tmp_path / "out", late, progress=False)
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(run_plan(plan, base, tasks, tmp_path / "out", progress=False)["session"]["machines"]) == 1


# Numbers

def one(tmp_path, command, base, *tasks, **options):
    base, tasks = open_checkpoint({"h.w": base}), {f"t{i}": open_checkpoint(t if isinstance(t, dict) else {"h.w": t}) for i, t in enumerate(tasks)}
    out = tmp_path / ("i.json" if command == "interference" else "m.safetensors")
    return run_plan(make_plan(command, base, tasks, threads=1, **options), base, tasks, out, progress=False)["tensors"]["h.w"]


@pytest.mark.parametrize("command", ["interference", "merge"])
@pytest.mark.parametrize("scale", [2.**-60, 2.**100, 2.**120])
def test_scores_and_residuals_of_huge_and_tiny_numbers(tmp_path, command, scale):
    g = torch.Generator().manual_seed(0)
    zero, tasks = torch.zeros(64, 48), [torch.randn(64, 48, generator=g) for _ in "ab"]
    (tmp_path / "x").mkdir()
    want, got = one(tmp_path, command, zero, *tasks), one(tmp_path / "x", command, zero, *(scale * t for t in tasks))
    score = lambda entry: entry["interference"] if command == "interference" else entry["interference"]["before"]
    assert score(got) / scale == pytest.approx(score(want), rel=1e-3) and got["residual"] < 1e-4
    strict_json(next((tmp_path / "x").glob("*.json")).read_bytes()) # no Infinity, no NaN


def test_scores_beyond_float64_are_refused(tmp_path):
    g = torch.Generator().manual_seed(0)
    tasks = [1e306 * torch.randn(64, 48, generator=g, dtype=torch.float64) for _ in "ab"]
    with pytest.raises(ValueError, match="tensor 'h.w': the interference of its tasks does not fit into float64"): one(tmp_path, "interference", torch.zeros(64, 48, dtype=torch.float64), *tasks)


@pytest.mark.parametrize("command, base, task, text", [
    ("merge", torch.full((16, 12), -3e38), torch.full((16, 12), 3e38), "the dict in memory: difference of tensor 'h.w': 192 of 192 values do not fit into torch.float32"),
    ("merge", torch.zeros(70, 70), 3e37 * torch.randn(70, 70, generator=torch.Generator().manual_seed(0)), "tensor 'h.w': singular values 'S': "),
    ("merge", torch.full((12,), -3e38), torch.full((12,), 3e38), "output tensor 'h.w': 12 of 12 values do not fit"),
    ("compress", torch.full((16, 12), -6e4).half(), torch.full((16, 12), 6e4).half(), "difference of tensor 'h.w': 192 of 192 values do not fit into torch.float16")], ids=["difference", "singular values", "average", "float16"])
def test_numbers_that_do_not_fit_are_named(tmp_path, command, base, task, text):
    with pytest.raises(ValueError) as e: one(tmp_path, command, base, task)
    assert text in str(e.value)


def test_errors_keep_their_type_and_get_a_name(tmp_path, monkeypatch):
    def fails(read, planned): raise torch.linalg.LinAlgError("no convergence")
    monkeypatch.setitem(WORK["merge"], "merge", fails)
    with pytest.raises(torch.linalg.LinAlgError, match="^tensor 'h.w': no convergence$"): one(tmp_path, "merge", torch.zeros(16, 12), torch.ones(16, 12))
    def full(read, planned): raise OSError(errno.ENOSPC, "No space left", "x")
    monkeypatch.setitem(WORK["merge"], "merge", full)
    with pytest.raises(OSError) as e: one(tmp_path, "merge", torch.zeros(16, 12), torch.ones(16, 12))
    assert e.value.errno == errno.ENOSPC and "h.w" not in str(e.value)


def test_eight_bits_are_refused_by_name(tmp_path):
    save_file({"h.w": torch.ones(16, 12).to(torch.float8_e4m3fn)}, tmp_path / "base.safetensors")
    base, archive = open_checkpoint(tmp_path / "base.safetensors"), {"archive": open_checkpoint({"dense/h.w": torch.ones(16, 12)})}
    with pytest.raises(ValueError, match="base.safetensors': tensor 'h.w' is torch.float8_e4m3fn, a type to store numbers in"): run_plan(make_plan("expand", base, archive, threads=1), base, archive, tmp_path / "out", progress=False)
