"""Streaming runs: the numbers of the library's core, the same bytes after every interruption, and no output that is not whole."""
import dataclasses
import errno
import json
import os
import pickle
import shutil
import tracemalloc
from unittest.mock import patch

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scale_models import SHAPES, digests, fine, load_output, relative, report_of, save_all, save_folder, states, timeless

from tsv_nb import CompressedTaskVector, __version__, apply_task_vector, compress, interference_by_layer, pairwise_interference, task_vector, tsv_merge
from tsv_nb.scale.checkpoints import open_checkpoint
from tsv_nb.scale.outputs import file_sha256
from tsv_nb.scale.parts import CannotWrite, content_digest, entry_of, part_path, read_part
from tsv_nb.scale.plan import make_plan
from tsv_nb.scale.stream import local_engine, run_plan, run_unit
from tsv_nb.scale.summaries import interference_table, pair_sums
from tsv_nb.scale.tensor_work import Job
from tsv_nb.scale.work import WorkFolder

PAPER = ["text_projection"] # the rules of the method part


def opened(paths): return open_checkpoint(paths[0]), {f"task{t}": open_checkpoint(p) for t, p in enumerate(paths[1:])}


def merge(paths, out, run={}, change=lambda plan: plan, command="merge", **options):
    base, tasks = opened(paths)
    plan = change(make_plan(command, base, tasks, threads=1, **options))
    return run_plan(plan, base, tasks, out, progress=False, **run)


@pytest.fixture(scope="module")
def paths(tmp_path_factory): return save_all(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def done(paths, tmp_path_factory):
    "An output in three files, each tensor a unit, and its digests."
    out = tmp_path_factory.mktemp("done") / "out"
    merge(paths, out, change=fine, shard_size=15_000)
    return out, digests(out)


def again(paths, out, **run): return merge(paths, out, run, fine, shard_size=15_000)


# The numbers

@pytest.mark.parametrize("options", [{}, dict(rank=3), dict(rank="full"), dict(split="qkv"), dict(weights=[2., -1., .5]), dict(orthogonalize=None), dict(orthogonalize="svd")], ids=str)
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-5), (torch.float64, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=str)
def test_a_merge_is_that_of_the_core(tmp_path, options, dtype, tol):
    """Relative to the merged task vector. In half precision the core rounds each task vector and the merged one to the checkpoint's type before the sum is rounded again,
    and a run that streams rounds once, at the end: they may differ by roundings of the checkpoint (eps |theta| / |tau|)."""
    base, *tasks = states(dtype=dtype, step=1.)
    files = [base, *tasks]
    vectors = [task_vector(base, t) for t in tasks]
    want = apply_task_vector(base, tsv_merge(vectors, small="average", exclude=PAPER, **options), .7)
    start, tuned = open_checkpoint(base), {f"task{t}": open_checkpoint(s) for t, s in enumerate(tasks)}
    run_plan(make_plan("merge", start, tuned, alpha=.7, exclude=PAPER, threads=1, **options), start, tuned, tmp_path / "out", progress=False)
    got = load_output(tmp_path / "out")
    assert list(sorted(got)) == sorted(want) and all(got[n].dtype == base[n].dtype and got[n].shape == base[n].shape for n in want)
    for name in want:
        if base[name].is_floating_point() and base[name].numel(): assert relative(got[name].double() - base[name].double(), want[name].double() - base[name].double()) < tol, name
        else: assert got[name].equal(base[name])
    assert len(files) == 4


@pytest.mark.parametrize("n_tasks", [1, 24, 30])
def test_one_task_and_more_tasks_than_directions(tmp_path, n_tasks):
    base, *tasks = states(n_tasks)
    want = apply_task_vector(base, tsv_merge([task_vector(base, t) for t in tasks], small="average", exclude=PAPER))
    start, tuned = open_checkpoint(base), {f"task{t}": open_checkpoint(s) for t, s in enumerate(tasks)}
    report = run_plan(make_plan("merge", start, tuned, exclude=PAPER, threads=1), start, tuned, tmp_path / "out.safetensors", progress=False)
    for name, x in load_output(tmp_path / "out.safetensors").items(): assert relative(x, want[name]) < 1e-5, name
    assert report["tensors"]["h.0.mlp.weight"]["how"] == ("merge" if n_tasks <= 24 else "average")


def test_sources_of_every_kind_give_the_same_tensors(tmp_path, paths):
    base, *tasks = states()
    save_file(base, tmp_path / "b.safetensors")
    torch.save({n: x.T.contiguous().T if x.ndim == 2 else x for n, x in tasks[0].items()}, tmp_path / "t0.pt") # stored in another order of memory
    merge(paths, tmp_path / "folders")
    mixed = open_checkpoint(tmp_path / "b.safetensors"), dict(task0=open_checkpoint(tmp_path / "t0.pt"), task1=open_checkpoint(tasks[1]), task2=open_checkpoint(paths[3]))
    run_plan(make_plan("merge", *mixed, threads=1), *mixed, tmp_path / "mixed", progress=False)
    a, b = load_output(tmp_path / "folders"), load_output(tmp_path / "mixed")
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def test_types_may_differ_and_be_chosen(tmp_path):
    base, task = states(1)
    start, tuned = open_checkpoint(save_folder(tmp_path / "base", base, torch_dtype="float32")), dict(a=open_checkpoint({n: x.half() if x.is_floating_point() else x for n, x in task.items()}))
    run_plan(make_plan("merge", start, tuned, dtype="bfloat16", rank="full"), start, tuned, tmp_path / "out", progress=False)
    got = load_output(tmp_path / "out")
    for name, x in got.items():
        assert x.dtype == (torch.bfloat16 if base[name].is_floating_point() else base[name].dtype)
        if x.is_floating_point() and x.numel(): assert relative(x, task[name]) < 5e-3, name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def vocabulary(rows, seed=0): return {"embed_tokens.weight": torch.randn(60, 24, generator=torch.Generator().manual_seed(0))[:rows] + seed, "h.0.mlp.weight": torch.randn(30, 24, generator=torch.Generator().manual_seed(seed))}


@pytest.mark.parametrize("include", [(), ["embed_tokens*"]], ids=["averaged", "merged"])
def test_vocabularies_of_different_sizes(tmp_path, include):
    base, tasks = vocabulary(50), dict(a=vocabulary(53, 1), b=vocabulary(48, 2))
    start, tuned = open_checkpoint(base), {n: open_checkpoint(t) for n, t in tasks.items()}
    for vocab in ("common", "base"): run_plan(make_plan("merge", start, tuned, vocab=vocab, include=include), start, tuned, tmp_path / vocab, progress=False)
    got, kept, name = load_output(tmp_path / "common"), load_output(tmp_path / "base"), "embed_tokens.weight"
    assert kept[name].equal(base[name]) and got[name].shape == (50, 24) and got[name][48:].equal(base[name][48:])
    cut = lambda s: s | {name: s[name][:48]}
    want = apply_task_vector(cut(base), tsv_merge([task_vector(cut(base), cut(t)) for t in tasks.values()], exclude=() if include else ["embed"]))
    for n in base: assert relative(cut(got)[n], want[n]) < 1e-5, n


def test_a_task_without_a_tensor_counts_as_unmoved(tmp_path):
    base, *tasks = states(2)
    start, short = open_checkpoint(base), {n: x for n, x in tasks[1].items() if n not in ("h.0.mlp.weight", "h.1.norm")}
    tuned = dict(a=open_checkpoint(tasks[0]), b=open_checkpoint(short))
    run_plan(make_plan("merge", start, tuned, missing="base", exclude=PAPER), start, tuned, tmp_path / "out", progress=False)
    want = apply_task_vector(base, tsv_merge([task_vector(base, tasks[0]), task_vector(base, base | short)], small="average"))
    for n, x in load_output(tmp_path / "out").items(): assert relative(x, want[n]) < 1e-5, n


@pytest.mark.parametrize("options", [{}, dict(ratio=.3), dict(rank=2), dict(dtype="float16")], ids=str)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
def test_an_archive_is_that_of_compress(tmp_path, options, kind):
    base, task = states(1, kind)
    vector = task_vector(base, task)
    core = compress(vector, exclude=PAPER, **options | ({"dtype": torch.float16} if "dtype" in options else {}))
    start, tuned = open_checkpoint(base), dict(a=open_checkpoint(task))
    report = run_plan(make_plan("compress", start, tuned, exclude=PAPER, threads=1, **options), start, tuned, tmp_path / "a.safetensors", progress=False)
    want, got = (CompressedTaskVector.load(p) for p in (core.save(tmp_path / "core.safetensors"), tmp_path / "a.safetensors"))
    assert got.factors.keys() == want.factors.keys() and got.dense.keys() == want.dense.keys() and got.dtypes == want.dtypes and list(got.dtypes) == list(want.dtypes)
    for n, f in want.factors.items():
        for a, b in zip(got.factors[n], f): assert a.dtype == b.dtype and torch.allclose(a, b, atol=1e-6), n
        assert report["tensors"][n]["rank"] == {"a": f.rank}
    for n, x in want.dense.items(): assert got.dense[n].equal(x) and got.dense[n].dtype == x.dtype, n
    archive = dict(archive=open_checkpoint(tmp_path / "a.safetensors"))
    run_plan(make_plan("expand", start, archive, alpha=.5, threads=1, shard_size=15_000), start, archive, tmp_path / "out", progress=False)
    whole, expanded = got.apply_to(base, .5), load_output(tmp_path / "out")
    assert expanded.keys() == whole.keys() and all(expanded[n].dtype == x.dtype and torch.allclose(expanded[n], x) for n, x in whole.items())


def test_interference_is_that_of_the_core(tmp_path, paths):
    base, *tasks = states()
    vectors = [task_vector(base, t) for t in tasks]
    for options in ({}, dict(rank=4)):
        report = merge(paths, tmp_path / f"{len(options)}.json", command="interference", exclude=PAPER, **options)
        want = interference_by_layer(vectors, **options)
        got = {n: e["interference"] for n, e in report["tensors"].items() if "interference" in e}
        assert {n: x for n, x in got.items() if x or n in want} == pytest.approx({n: x for n, x in want.items() if n in got}, rel=1e-5, abs=1e-6) and not [n for n, x in want.items() if x and n not in got]
        torch.testing.assert_close(torch.tensor(pair_sums(report), dtype=torch.float64), pairwise_interference(vectors, **options), rtol=1e-5, atol=1e-5)
        assert timeless(json.loads((tmp_path / f"{len(options)}.json").read_text())) == json.loads(json.dumps(timeless(report)))


def test_the_report_of_a_merge_is_true(tmp_path, paths):
    "Energy against an SVD of each task matrix, interference against the core's, and a residual that is that of rounding: neither zero nor large."
    base, *tasks = states()
    vectors = [task_vector(base, t) for t in tasks]
    for options in ({}, dict(rank=4)):
        report = merge(paths, tmp_path / f"out{len(options)}", exclude=PAPER, **options)
        scores, merged = interference_by_layer(vectors, **options), {n: e for n, e in report["tensors"].items() if e["how"] == "merge"}
        assert len(merged) == 4 and set(merged) <= set(scores)
        for name, e in merged.items():
            assert e["interference"]["before"] == pytest.approx(scores[name], rel=1e-5) and 0 <= e["interference"]["after"] < 1e-3 * scores[name]
            assert 1e-9 < e["residual"] < 1e-5
            for task, v in zip(("task0", "task1", "task2"), vectors):
                squares = torch.linalg.svdvals(v[name].double()).square()
                assert e["energy"][task] == pytest.approx((squares[:e["rank"][task]].sum() / squares.sum()).item() if squares.any() else 1., rel=1e-5), (name, task)
                assert e["rank"][task] == (options.get("rank", min(v[name].shape) // 3) if squares.any() else 0)


def test_the_estimated_time_is_of_the_right_kind(tmp_path, paths):
    base, tasks = opened(paths)
    plan = make_plan("merge", base, tasks, threads=1)
    took = run_plan(plan, base, tasks, tmp_path / "out", progress=False)["session"]["seconds"]
    assert took / 100 < plan.seconds < 100 * took
    def seconds(layers, side):
        state = {f"h.{i}.weight": torch.empty(()).expand(side, side) for i in range(layers)}
        return make_plan("merge", state, dict(a=state, b=state), threads=1).seconds
    assert 5 < seconds(40, 512) / seconds(4, 512) < 20 and seconds(4, 1024) > 4 * seconds(4, 512) > 0


def test_scores_carry_the_names_of_their_tasks(tmp_path):
    "The first layer is read of b and c alone, and of d nothing at all."
    g = torch.Generator().manual_seed(0)
    base = {name: torch.randn(16, 12, generator=g) for name in ("w1", "w2")} | {"k": torch.ones(3)}
    def task(*names, scale=1.): return open_checkpoint({n: base[n] + scale * torch.randn(16, 12, generator=g) for n in names} | {"k": base["k"]})
    start, tuned = open_checkpoint(base), dict(a=task("w2"), b=task("w1", "w2"), c=task("w1", "w2", scale=5.), d=task())
    report = run_plan(make_plan("interference", start, tuned, missing="base", threads=1), start, tuned, tmp_path / "i.json", progress=False)
    assert list(report["inputs"]) == ["base", *tuned] and "content" not in report["inputs"]["d"] and all(len(report["inputs"][s]["content"]) == 64 for s in ("base", "a", "b", "c"))
    row = [line.split() for line in interference_table(report).splitlines() if line.split()[:1] == ["b"]]
    assert float(row[0][3]) == pytest.approx(max(x for pairs in pair_sums(report) for x in pairs), rel=1e-3) # b and c


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused_by_name(tmp_path, bad):
    base, task = states(1)
    task["h.0.mlp.weight"][3, 4] = bad
    start, tuned = open_checkpoint(base), dict(a=open_checkpoint(save_folder(tmp_path / "a", task)))
    with pytest.raises(ValueError, match=r"/a': tensor 'h.0.mlp.weight' has 1 of 2304 values that are NaN or infinite"): run_plan(make_plan("merge", start, tuned), start, tuned, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


# What is in the output

def test_files_and_what_they_say(done, paths):
    out, _ = done
    base, *tasks = states()
    assert {p.name for p in out.iterdir()} == {"config.json", "tokenizer.json", "tsv_report.json", "model.safetensors.index.json", *(f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3))}
    index, report = json.loads((out / "model.safetensors.index.json").read_text()), report_of(out)
    for name, file in index["weight_map"].items():
        with safe_open(out / file, "pt") as f: assert name in f.keys() and f.metadata()["format"] == "pt" and f.metadata()["method"] == "TSV-M" and json.loads(f.metadata()["options"])["alpha"] == 1 and f.metadata()["tsv_nb"] == __version__
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in load_output(out).values()) and set(index["weight_map"]) == set(base)
    read = {"base": base} | {f"task{t}": {n: x for n, x in s.items() if x.is_floating_point()} for t, s in enumerate(tasks)}
    want = {source: content_digest({n: entry_of(x) for n, x in s.items()}) for source, s in read.items()}
    assert json.loads(index["metadata"]["inputs"]) == want == {s: i["content"] for s, i in report["inputs"].items()}
    for file in set(index["weight_map"].values()): # a shard that is alone somewhere still says from what it was made
        there = open_checkpoint(out / file)
        assert json.loads(there.metadata["inputs"]) == {source: content_digest({n: entry_of(s[n]) for n in there if n in s}) for source, s in read.items()}
    assert (out / "tokenizer.json").read_text() == '{"version": "1.0", "é": 1}'
    entry = report["tensors"]["h.0.mlp.weight"]
    assert entry["rank"] == {f"task{t}": 8 for t in range(3)} and 0 < min(entry["energy"].values()) <= max(entry["energy"].values()) < 1
    assert entry["interference"]["after"] < 1e-3 * entry["interference"]["before"] and entry["residual"] < 1e-4 and entry["seconds"] > 0 and entry["shape"] == [96, 24]
    assert report["tensors"]["h.1.mlp.weight"]["rank"]["task1"] == 0 and list(report["tensors"]) == list(open_checkpoint(paths[0]))
    for file, facts in report["files"].items(): assert digests(out)[file] == facts["sha256"] and (out / file).stat().st_size == facts["bytes"]


def test_a_single_file_says_it_all(tmp_path, paths):
    report = merge(paths, tmp_path / "m.safetensors", shard_size=2**40)
    with safe_open(tmp_path / "m.safetensors", "pt") as f: said = f.metadata()
    assert said["format"] == "pt" and json.loads(said["inputs"]) == {s: i["content"] for s, i in report["inputs"].items()}
    assert {p.name for p in tmp_path.iterdir()} == {"m.safetensors", "m.report.json"} and timeless(report_of(tmp_path / "m.safetensors")) == json.loads(json.dumps(timeless(report)))
    with pytest.raises(ValueError, match="is one file and the plan has 3; name a folder"): merge(paths, tmp_path / "n.safetensors", shard_size=15_000)


def test_tensors_are_aligned_and_in_the_order_of_their_width(tmp_path):
    "torch cannot view bytes at an odd place as float32."
    state = {"flag": torch.tensor(True), "w": torch.ones(3), "h": torch.ones(3).half(), "d": torch.ones(2, dtype=torch.float64)}
    start, tuned = open_checkpoint(state), dict(a=open_checkpoint(state))
    run_plan(make_plan("merge", start, tuned), start, tuned, tmp_path / "o.safetensors", progress=False)
    assert all(x.equal(state[n]) for n, x in load_output(tmp_path / "o.safetensors").items())
    assert list(open_checkpoint(tmp_path / "o.safetensors")) == ["d", "w", "h", "flag"]


@pytest.mark.parametrize("command, name", [("merge", "out.json"), ("interference", "out.safetensors")])
def test_the_ending_of_an_output_says_what_it_is(tmp_path, paths, command, name):
    with pytest.raises(ValueError, match=f"{name}' cannot be the output .--out. of {command}: a name that ends in .safetensors is one file of tensors, in .json the scores"): merge(paths, tmp_path / name, command=command)
    assert not [*tmp_path.iterdir()]


def test_types_in_the_configurations_of_towers(tmp_path):
    state = {"w": torch.ones(3)}
    config = dict(dtype="float32", text_config=dict(torch_dtype="float32", inner=dict(dtype=None)), quantization_config=dict(dtype="int4"), layers=[1])
    start, tuned = open_checkpoint(save_folder(tmp_path / "base", state, 1, **config)), dict(a=open_checkpoint(state))
    for dtype in ("bfloat16", None): run_plan(make_plan("merge", start, tuned, dtype=dtype), start, tuned, tmp_path / f"{dtype}", progress=False)
    assert json.loads((tmp_path / "bfloat16" / "config.json").read_text()) == config | dict(dtype="bfloat16", text_config=dict(torch_dtype="bfloat16", inner=dict(dtype="bfloat16")))
    assert (tmp_path / "None" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()


@pytest.mark.skipif(os.name == "nt", reason="no such names there")
def test_a_backslash_in_a_name_is_no_folder(tmp_path):
    state = {"w": torch.ones(3)}
    base = save_folder(tmp_path / "base", state, 1)
    (base / "x\\config.json").write_text('{"evil": 1}')
    start, tuned = open_checkpoint(base), dict(a=open_checkpoint(state))
    run_plan(make_plan("merge", start, tuned), start, tuned, tmp_path / "out", progress=False)
    for name in ("config.json", "x\\config.json"): assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()


# The same bytes, whatever happens

def test_a_unit_gives_the_same_bytes_in_every_process(tmp_path, paths):
    base, tasks = opened(paths)
    plan = fine(make_plan("merge", base, tasks, threads=1))
    seen = []
    for i, make in enumerate((lambda job: job, lambda job: pickle.loads(pickle.dumps(job)))):
        folder = tmp_path / str(i)
        (folder / "parts").mkdir(parents=True)
        job = make(Job(plan, base, tasks, str(folder)))
        for _ in range(2):
            report = run_unit(job, 1)
            seen.append(part_path(folder, 1).read_bytes())
    assert seen == seen[:1] * 4 and list(report) == list(plan.units[1]) and read_part(part_path(folder, 1)).facts["unit"] == 1


class Killed(BaseException): pass


def steps(call, run):
    "How often a run calls a function of the system."
    real, count = getattr(os, call), 0
    def counted(*args):
        nonlocal count
        count += 1
        return real(*args)
    with patch(f"os.{call}", counted): run()
    return count


def test_killed_before_every_rename(tmp_path, paths, done):
    "Each file gets its name by a rename: the run ends before the k-th, and is run again. (All k: on 2026-11-26.)"
    n = steps("replace", lambda: again(paths, tmp_path / "count"))
    assert n > 30
    for k in (*range(1, n - 5, 4), *range(n - 5, n + 1)):
        out, real, count = tmp_path / str(k), os.replace, 0
        def replace(a, b):
            nonlocal count
            count += 1
            if count == k: raise Killed
            return real(a, b)
        with patch("os.replace", replace), pytest.raises(Killed): again(paths, out)
        assert not out.exists() and (tmp_path / f"{k}.partial").exists()
        again(paths, out)
        assert digests(out) == done[1] and not (tmp_path / f"{k}.partial").exists()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("command, name", [("merge", "out"), ("merge", "out.safetensors"), ("interference", "out.report.json")])
def test_killed_at_every_rename_of_a_replacement(tmp_path, paths, command, name, after):
    "Between the old output and the new one there is nothing that the next run would take for either; a file and its report are of one run in the end."
    def run(out, **options): return merge(paths, out, dict(overwrite=True), command=command, shard_size=2**40, rank=options.get("rank"))
    new, real, k = tmp_path / name, os.replace, 0
    run(new)
    while True:
        k, count, out = k + 1, 0, tmp_path / str(k) / name
        out.parent.mkdir()
        run(out, rank=2)
        old = digests(out)
        def replace(a, b):
            nonlocal count
            count += 1
            if after: real(a, b)
            if count == k: raise Killed
            if not after: real(a, b)
        with patch("os.replace", replace):
            try: run(out)
            except Killed: pass
            else: break
        run(out)
        assert digests(out) == digests(new) != old and {p.name for p in out.parent.iterdir()} == {p.name for p in tmp_path.glob("out*")}
    assert k > 6


@pytest.mark.parametrize("call, n", [("fsync", 90), ("replace", 40)])
def test_a_full_disk_at_every_write(tmp_path, paths, done, call, n):
    real, failures = getattr(os, call), 0
    for k in range(1, n, 5):
        out, count = tmp_path / str(k), 0
        def fail(*args):
            nonlocal count
            count += 1
            if count == k: raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)
        with patch(f"os.{call}", fail):
            try: again(paths, out); break
            except CannotWrite as e: assert e.errno == errno.ENOSPC and str(tmp_path) in str(e) and "No space left on device" in str(e)
        failures += 1
        assert not list((tmp_path / f"{k}.partial").rglob("*.tmp"))
        again(paths, out)
        assert digests(out) == done[1]
    assert failures > 6


def test_a_disk_that_is_full_in_the_middle_of_a_file(tmp_path, paths, done):
    "A file that takes only some bytes, as a real one."
    class Full:
        def __init__(self, file): self.file, self.left = file, 5000
        def write(self, data):
            if len(data) > self.left: self.file.write(bytes(data)[:self.left]); raise OSError(errno.ENOSPC, "No space left on device")
            self.left -= len(data)
            return self.file.write(data)
        def __getattr__(self, name): return getattr(self.file, name)
    def opening(path, mode="r", *args, **kwargs):
        file = open(path, mode, *args, **kwargs)
        return Full(file) if "w" in mode else file
    with patch("tsv_nb.scale.parts.open", opening, create=True), pytest.raises(CannotWrite, match=r"out.partial/\S+' cannot be written .No space left on device.; make room"): again(paths, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list((tmp_path / "out.partial").rglob("*.tmp"))
    again(paths, tmp_path / "out")
    assert digests(tmp_path / "out") == done[1]


def interrupted(n):
    "An engine that is killed after n units."
    def engine(job, units):
        yield from local_engine(job, units[:n])
        raise Killed
    return engine


def test_what_is_finished_is_not_done_again(tmp_path, paths, done):
    with pytest.raises(Killed): again(paths, tmp_path / "out", engine=interrupted(4))
    asked = []
    def engine(job, units):
        asked.extend(units)
        yield from local_engine(job, units)
    report = again(paths, tmp_path / "out", engine=engine)
    assert len(asked) == report["session"]["units"] - 4 and report["session"]["resumed"] == 4 and digests(tmp_path / "out") == done[1]
    assert all(e["seconds"] is not None for e in report["tensors"].values())


def test_units_may_come_in_any_order(tmp_path, paths, done):
    again(paths, tmp_path / "out", engine=lambda job, units: local_engine(job, units[::-1]))
    assert digests(tmp_path / "out") == done[1]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b"", lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b"\xff" * 20 + b[20:]], ids=["cut", "empty", "bit", "header"])
def test_a_damaged_part_is_computed_again(tmp_path, paths, done, damage):
    with pytest.raises(Killed): again(paths, tmp_path / "out", engine=interrupted(3))
    part = next(iter(sorted((tmp_path / "out.partial" / "parts").glob("*.safetensors"))))
    part.write_bytes(damage(part.read_bytes()))
    again(paths, tmp_path / "out")
    assert digests(tmp_path / "out") == done[1]


@pytest.mark.parametrize("what", ["receipt", "no receipt", "bit", "shorter", "plan"])
def test_a_finished_shard_that_is_damaged_between_two_sessions(tmp_path, paths, done, what):
    out = tmp_path / "out"
    def engine(job, units): yield from interrupted(len([u for u in units if job.plan.units[u][0] in job.plan.shards[0]]))(job, units)
    with pytest.raises(Killed): again(paths, out, engine=engine)
    (receipt,), (shard,) = ([*(tmp_path / "out.partial" / name).iterdir()] for name in ("done", "out"))
    path = {"bit": shard, "shorter": shard, "plan": tmp_path / "out.partial" / "plan.json"}.get(what, receipt)
    raw = path.read_bytes()
    path.write_bytes({"no receipt": b"[]", "bit": raw[:-1] + bytes([raw[-1] ^ 64]), "shorter": raw[:-1]}.get(what, raw[:50]))
    if what == "plan":
        with pytest.raises(ValueError, match="holds an unfinished run of another kind: its plan.json is damaged. .* start over with --restart"): again(paths, out)
    report = again(paths, out, restart=what == "plan")
    assert digests(out) == done[1] and report["session"]["resumed"] == 0 and all(digests(out)[f] == facts["sha256"] for f, facts in report["files"].items())


def test_a_finished_shard_is_read_once_in_a_session(tmp_path, paths):
    with pytest.raises(Killed): again(paths, tmp_path / "out", engine=interrupted(9))
    base, tasks = opened(paths)
    with patch("tsv_nb.scale.work.file_sha256", side_effect=file_sha256) as read, WorkFolder(fine(make_plan("merge", base, tasks, threads=1, shard_size=15_000)), tmp_path / "out") as work:
        assert work.todo() == work.todo() and read.call_count == len(work.done) > 0


def test_a_disk_that_damages_everything(tmp_path, paths):
    def engine(job, units):
        for u in local_engine(job, units):
            path = part_path(job.folder, u)
            path.write_bytes(path.read_bytes()[:-1] + b"?" + b"?")
            yield u
    with pytest.raises(OSError, match="damaged again and again"): again(paths, tmp_path / "out", engine=engine)
    assert not (tmp_path / "out").exists()


def test_killed_after_the_last_rename(tmp_path, paths, done):
    with patch.object(WorkFolder, "_clear", side_effect=Killed), pytest.raises(Killed): again(paths, tmp_path / "out")
    assert (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    report = again(paths, tmp_path / "out") # nothing but cleaning up
    assert digests(tmp_path / "out") == done[1] and not (tmp_path / "out.partial").exists() and timeless(report) == digests(tmp_path / "out")["report"]
    with pytest.raises(ValueError, match="out' exists; choose another output, or replace it with --overwrite"): again(paths, tmp_path / "out")


# Another run, another input

@pytest.mark.parametrize("options, said", [(dict(rank=3), "rank was None and is now 3"), (dict(alpha=.5), r"alpha was 1.0 and is now 0.5"), (dict(split="qkv"), "split was None and is now 'qkv'"), (dict(shard_size=10**9), "the work was divided in another way")])
def test_another_option_does_not_resume(tmp_path, paths, done, options, said):
    out = tmp_path / "out"
    with pytest.raises(Killed): again(paths, out, engine=interrupted(3))
    options = dict(shard_size=15_000) | options
    with pytest.raises(ValueError, match=f"holds an unfinished run of another kind: {said}. Repeat the command of then, or start over with --restart"): merge(paths, out, change=fine, **options)
    assert merge(paths, out, dict(restart=True), fine, **options)["session"]["resumed"] == 0
    again(paths, out, overwrite=True)
    assert digests(out) == done[1]


def test_an_input_that_changes(tmp_path):
    paths = save_all(tmp_path, 2)
    file = tmp_path / "task1" / "model-00002-of-00002.safetensors"
    out = tmp_path / "out"
    def change(): file.write_bytes(file.read_bytes()); os.utime(file, (1, 1))
    def engine(job, units):
        for u in local_engine(job, units):
            yield u
            if u == units[2]: change()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors"): merge(paths, out, dict(engine=engine), fine) # while it runs
    assert not out.exists()
    with pytest.raises(ValueError, match="the input 'task1' is another one, or its files have changed"): merge(paths, out, change=fine) # between two runs
    merge(paths, out, dict(restart=True), fine)


def test_an_input_that_changes_after_the_last_unit(tmp_path):
    "Every tensor has been read by then; but with which of the two files the first ones agree, nobody knows."
    paths = save_all(tmp_path / "models")
    def engine(job, units):
        yield from local_engine(job, units)
        os.utime(next((tmp_path / "models" / "task2").glob("*00001*.safetensors")), (1, 1))
    with pytest.raises(ValueError, match="task2/model-00001-of-00002.safetensors' has changed"): merge(paths, tmp_path / "out", dict(engine=engine), fine)
    assert not (tmp_path / "out").exists()


def test_one_process_at_a_time(tmp_path, paths):
    def engine(job, units):
        with pytest.raises(OSError, match="another process is working on .*out'"): merge(paths, tmp_path / "out")
        yield from local_engine(job, units)
    merge(paths, tmp_path / "out", dict(engine=engine))


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_an_output_that_exists(tmp_path, paths, name):
    out = tmp_path / name
    merge(paths, out)
    before, seen = digests(out), {*tmp_path.iterdir()}
    with pytest.raises(ValueError, match=f"{name}' exists; choose another output"): merge(paths, out)
    assert digests(out) == before and {*tmp_path.iterdir()} == seen
    merge(paths, out, dict(overwrite=True), rank=2)
    assert digests(out) != before and {*tmp_path.iterdir()} == seen


@pytest.mark.parametrize("name", ["out", "out.safetensors", "out.json"])
@pytest.mark.parametrize("content", ["text", "tensors", "json", "folder", "link"])
def test_what_no_run_has_made_is_not_replaced(tmp_path, paths, name, content):
    out, mine, asked = tmp_path / name, tmp_path / "elsewhere", []
    def engine(job, units): asked.append(units); yield from ()
    command = "interference" if name == "out.json" else "merge"
    if content == "folder": out.mkdir(); (out / "thesis.txt").touch()
    elif content == "tensors": save_file({"w": torch.ones(3)}, out)
    elif content == "link": out.symlink_to(mine)
    else: out.write_text(dict(text="mine", json='{"plan": "mine"}')[content])
    with pytest.raises(ValueError, match=f"{name}' is no output of tsv-nb, and --overwrite replaces nothing else; choose another output"): merge(paths, out, dict(overwrite=True, engine=engine), command=command)
    assert not asked and [*tmp_path.iterdir()] == [out]


@pytest.mark.parametrize("added", ["README.md", "eval", ".git", "model-00009-of-00009.safetensors"])
def test_what_a_person_has_put_into_an_output_is_not_replaced(tmp_path, paths, added):
    out, asked = tmp_path / "out", []
    def engine(job, units): asked.append(units); yield from local_engine(job, units)
    merge(paths, out, shard_size=15_000)
    (out / added).mkdir() if "." not in added or added == ".git" else (out / added).write_text("mine")
    with pytest.raises(ValueError, match=f"out' is not replaced, because '{added}' would be lost with it; move that away, or choose another output"): merge(paths, out, dict(overwrite=True, engine=engine))
    assert not asked and (out / added).exists()
    shutil.move(out / added, tmp_path / "mine")
    merge(paths[:2], out, dict(overwrite=True), shard_size=10**9) # its own files, the index and copies of the base's are
    assert {p.name for p in out.iterdir()} == {"model.safetensors", "config.json", "tokenizer.json", "tsv_report.json"}
    (tmp_path / "link").symlink_to(out)
    (out / "README.md").touch()
    merge(paths, tmp_path / "link", dict(overwrite=True)) # the link is replaced, and nothing is lost
    assert (out / "README.md").exists() and (tmp_path / "link" / "model.safetensors").exists()


def test_a_file_that_appears_in_an_old_output_meanwhile(tmp_path, paths):
    def engine(job, units):
        yield from local_engine(job, units)
        (tmp_path / "out" / "notes.txt").touch()
    merge(paths, tmp_path / "out")
    with pytest.raises(ValueError, match="'notes.txt' would be lost with it; move that away and run the same command again"): merge(paths, tmp_path / "out", dict(overwrite=True, engine=engine), alpha=.5)


def test_an_empty_folder_and_an_archive_of_the_core_may_be_replaced(tmp_path, paths):
    (tmp_path / "out").mkdir()
    merge(paths, tmp_path / "out", dict(overwrite=True))
    compress({"w": torch.ones(3, 3)}).save(tmp_path / "a.safetensors")
    merge(paths[:2], tmp_path / "a.safetensors", dict(overwrite=True), command="compress")
    assert load_output(tmp_path / "out") and "h.1.norm" in CompressedTaskVector.load(tmp_path / "a.safetensors").dense


def test_a_report_of_nobodys_is_not_replaced_with_its_file(tmp_path, paths):
    out, beside = tmp_path / "m.safetensors", tmp_path / "m.report.json"
    merge(paths, out)
    beside.write_text("mine")
    with pytest.raises(ValueError, match="m.report.json' is no output of tsv-nb"): merge(paths, out, dict(overwrite=True), rank=2)
    assert beside.read_text() == "mine"


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("where, name", [(".", "base"), ("task1", "task1"), ("link", "base"), ("task0.safetensors", "task0"), ("base/model-00001-of-00002.safetensors", "base"), ("real", "task2")])
def test_inputs_are_not_replaced(tmp_path, where, name, begun):
    "Neither by a run that begins nor by one that goes on; `models` is an output of ours, as far as its files say."
    models = tmp_path / "models"
    base, task0, *tasks = save_all(models, 3)
    save_file({n: t + 1 for n, t in load_output(task0).items()} | {n: t for n, t in load_output(task0).items() if not t.is_floating_point()}, models / "task0.safetensors", {"tsv_nb": "1"})
    shutil.rmtree(task0)
    os.rename(models / "task2", tmp_path / "real")
    (models / "task2").symlink_to(tmp_path / "real")
    (tmp_path / "link").symlink_to(models)
    for folder in (models, models / "task1"): (folder / "tsv_report.json").touch()
    out, paths = {"link": tmp_path / "link", "real": tmp_path / "real"}.get(where, models / where), [base, str(models / "task0.safetensors"), *tasks]
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    run = lambda **options: merge(paths, out, dict(overwrite=True) | options, shard_size=2**40)
    if begun:
        with patch.object(WorkFolder, "_check_inputs"), patch("tsv_nb.scale.work.made_by_a_run", return_value=True), patch("tsv_nb.scale.work.added_to", return_value=[]), pytest.raises(Killed): run(engine=interrupted(0))
    def engine(job, units): raise AssertionError("computed before it was refused")
    for overwrite in (True, False):
        with pytest.raises(ValueError, match=f"the input '{name}' .'.*'. would be deleted with '{out}'; choose another output"): run(engine=engine, overwrite=overwrite)
    assert {p: p.read_bytes() for p in before} == before


def test_an_output_inside_a_folder_of_inputs(tmp_path):
    "`base/merged` and `base.safetensors` beside `base` delete nothing."
    paths = save_all(tmp_path, 1)
    for out in (tmp_path / "base" / "merged", tmp_path / "base.safetensors"):
        for _ in range(2): merge(paths, out, dict(overwrite=True), shard_size=2**40)
        assert load_output(out).keys() == load_output(paths[0]).keys()


def test_an_input_in_the_folder_of_the_run(tmp_path, paths):
    shutil.copytree(paths[1], tmp_path / "out.partial" / "out")
    with pytest.raises(ValueError, match="the input 'task0' .* would be deleted with '.*out.partial'"): merge([paths[0], tmp_path / "out.partial" / "out"], tmp_path / "out", dict(restart=True))
    assert load_output(tmp_path / "out.partial" / "out")


def test_companions_are_looked_at_before_the_work_and_copied_piece_by_piece(tmp_path):
    state, asked = {"w": torch.ones(3)}, []
    base, size = save_folder(tmp_path / "base", state, 1), 9_000_001
    (tmp_path / "tokenizer.model").touch()
    (base / "tokenizer.model").symlink_to(tmp_path / "tokenizer.model")
    (base / "corpus.txt").write_bytes(bytes(range(256)) * (size // 256) + b"end")
    def run(): run_plan(plan, start, tuned, tmp_path / "out", lambda job, units: asked.append(units) or local_engine(job, units), progress=False)
    start, tuned = open_checkpoint(base), dict(a=open_checkpoint(state))
    plan = make_plan("merge", start, tuned, threads=1)
    with pytest.raises(ValueError, match="tokenizer.model' is a symbolic link"): run()
    assert not asked
    (base / "tokenizer.model").unlink()
    with patch("tsv_nb.scale.outputs._CHUNK", 2**16):
        tracemalloc.start()
        try: run(); assert tracemalloc.get_traced_memory()[1] < size / 3
        finally: tracemalloc.stop()
    assert (tmp_path / "out" / "corpus.txt").read_bytes() == (base / "corpus.txt").read_bytes()


def test_an_output_that_appears_meanwhile_is_not_touched(tmp_path, paths):
    out = tmp_path / "out"
    def engine(job, units):
        yield from local_engine(job, units)
        out.write_text("mine")
    with pytest.raises(ValueError, match="exists now"): again(paths, out, engine=engine)
    assert out.read_text() == "mine"


def test_the_report_beside_a_file_replaces_nobodys(tmp_path, paths):
    out, beside, asked = tmp_path / "m.safetensors", tmp_path / "m.report.json", []
    def engine(job, units):
        asked.append(units)
        yield from local_engine(job, units)
        out.write_text("mine")
    beside.write_text("mine")
    with pytest.raises(ValueError, match="m.report.json' exists; choose another output"): merge(paths, out, dict(engine=engine))
    assert beside.read_text() == "mine" and not asked and not out.exists()
    beside.unlink()
    with pytest.raises(ValueError, match="m.safetensors' exists now; move it away and run the same command again"): merge(paths, out, dict(engine=engine))
    assert not beside.exists() and out.read_text() == "mine" # no report without what it is about
    out.unlink()
    with patch("tsv_nb.scale.work.WorkFolder.cleaned", side_effect=Killed), pytest.raises(Killed): merge(paths, out)
    beside.write_text("mine")
    with pytest.raises(ValueError, match="m.report.json' exists now"): merge(paths, out)
    beside.unlink()
    merge(paths, out)
    assert report_of(out)["files"]["m.safetensors"]["bytes"] == out.stat().st_size and {*tmp_path.iterdir()} == {out, beside}


def test_links_are_replaced_and_not_followed(tmp_path, paths):
    real, out = tmp_path / "real", tmp_path / "out"
    merge(paths, real)
    before = digests(real)
    for _ in range(2):
        out.symlink_to(real)
        with pytest.raises(ValueError, match="out' exists"): merge(paths, out)
        merge(paths, out, dict(overwrite=True), rank=2)
        assert not out.is_symlink() and digests(real) == before != digests(out) and {*tmp_path.iterdir()} == {out, real}
        os.rename(out, tmp_path / "kept")
        shutil.rmtree(tmp_path / "kept")
    out.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="out' exists"): merge(paths, out)


def test_folders_that_cannot_be_made_or_are_not_ours(tmp_path, paths):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/out.partial' cannot be made"): merge(paths, tmp_path / "file" / "out")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "letter.txt").write_text("mine")
    for restart in (False, True):
        with pytest.raises(ValueError, match="holds 'letter.txt'; move that folder away"): merge(paths, tmp_path / "out", dict(restart=restart))
    assert [p.name for p in (tmp_path / "out.partial").iterdir() if p.name != "lock"] == ["letter.txt"]


def test_threads_are_as_they_were(tmp_path, paths):
    before = torch.get_num_threads()
    base, tasks = opened(paths)
    seen = []
    with patch("tsv_nb.scale.tensor_work.layer_factors", side_effect=lambda *args: seen.append(torch.get_num_threads()) or real(*args)) as _:
        from tsv_nb.interference import layer_factors as real
        run_plan(make_plan("merge", base, tasks, threads=2), base, tasks, tmp_path / "out", progress=False)
    assert set(seen) == {2} and torch.get_num_threads() == before


# Programs that load the output

def tiny(kind, **options):
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=60, n_positions=16) if kind == "gpt2" else LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=60, **options)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def moved(model):
    with torch.no_grad():
        for p in model.parameters(): p.add_(.02 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("kind, tied", [("gpt2", True), ("llama", False), ("llama", True)])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_a_merged_folder_loads_in_transformers(tmp_path, kind, tied, safe):
    from transformers import AutoModelForCausalLM
    options = dict(tie_word_embeddings=tied) if kind == "llama" else {}
    names = ["base", "a", "b"]
    for i, name in enumerate(names):
        model = tiny(kind, **options)
        if i: torch.manual_seed(i); moved(model)
        if safe: model.save_pretrained(tmp_path / name, max_shard_size="30KB")
        else: model.config.save_pretrained(tmp_path / name); torch.save(model.state_dict(), tmp_path / name / "pytorch_model.bin")
    start, tuned = open_checkpoint(tmp_path / "base"), {n: open_checkpoint(tmp_path / n) for n in names[1:]}
    run_plan(make_plan("merge", start, tuned, shard_size=30_000, dtype="float16" if tied else None), start, tuned, tmp_path / "out", progress=False)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True, dtype="auto")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert next(loaded.parameters()).dtype == (torch.float16 if tied else torch.float32)
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied
    got = load_output(tmp_path / "out")
    for name, x in loaded.state_dict().items():
        if name in got: assert torch.equal(x, got[name])
    with torch.no_grad(): assert torch.isfinite(loaded.float()(torch.arange(8)[None]).logits).all()


def test_open_clip_models_in_files_and_in_memory(tmp_path):
    import open_clip
    config = dict(embed_dim=16, vision_cfg=dict(image_size=32, layers=2, width=32, head_width=16, patch_size=16), text_cfg=dict(context_length=8, vocab_size=50, width=32, heads=2, layers=1))
    def clip(seed): torch.manual_seed(seed); return open_clip.CLIP(**config)
    base, models = clip(0), []
    for seed in (1, 2):
        models.append(clip(0)); torch.manual_seed(seed); moved(models[-1])
        torch.save(dict(state_dict=models[-1].state_dict(), epoch=3), tmp_path / f"{seed}.pt")
    start, tuned = open_checkpoint(base), {str(s): open_checkpoint(tmp_path / f"{s}.pt") for s in (1, 2)}
    run_plan(make_plan("merge", start, tuned, exclude=PAPER, threads=1), start, tuned, tmp_path / "out.safetensors", progress=False)
    got = load_output(tmp_path / "out.safetensors")
    want = apply_task_vector(base.state_dict(), tsv_merge([task_vector(base.state_dict(), m.state_dict()) for m in models], small="average"))
    assert got.keys() == want.keys() and all(relative(got[n], want[n]) < 1e-5 for n in want if want[n].is_floating_point())
    clip(5).load_state_dict(got, strict=True)


def test_a_hundred_shapes_of_nothing_odd(tmp_path):
    "Units of many tensors, several per shard."
    shapes = {f"h.{i}.weight": (4 + i % 5, 3 + i % 7) for i in range(60)} | {f"h.{i}.bias": (4,) for i in range(40)}
    base, *tasks = states(2, shapes=SHAPES | shapes)
    start, tuned = open_checkpoint(base), {f"task{t}": open_checkpoint(s) for t, s in enumerate(tasks)}
    plan = make_plan("merge", start, tuned, shard_size=10_000, exclude=PAPER)
    plan = dataclasses.replace(plan, units=tuple(u[i:i + 7] for u in plan.units for i in range(0, len(u), 7)))
    run_plan(plan, start, tuned, tmp_path / "out", progress=False)
    want = apply_task_vector(base, tsv_merge([task_vector(base, t) for t in tasks], small="average"))
    got = load_output(tmp_path / "out")
    assert got.keys() == want.keys() and all(relative(got[n], want[n]) < 1e-5 for n in want if want[n].is_floating_point())
