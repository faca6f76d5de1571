"""Kill a program again and again, start it again each time, and look at what it leaves.

Usage: python tests/reliability/kills.py WORK [--kills 10] [--seed 0]     prints a JSON object; WORK is merge, merge-file, replace, suite or records

This process imports everything once and forks a child for each attempt, so a kill costs what the work costs and not an interpreter's start. A child gets
SIGKILL at a random moment: after a random time; at a random line of the package's code that writes; or at a random call of the operating system (before
it, after it, or with half of the bytes written). It is started again until it has finished; then its files must be those of an undisturbed run. After every
kill the final names are looked at: each is absent, or complete.
"""
import argparse
import builtins
import collections
import functools
import hashlib
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import torch
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
CALLS = ("replace", "rename", "fsync", "unlink", "remove", "mkdir", "rmdir", "write", "link", "ftruncate", "truncate")
KINDS = ("time", "time", "line", "call")


_open, _write, _close = os.open, os.write, os.close # as they are before they are watched


def _note(path, text):
    file = _open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    _write(file, text.encode())
    _close(file)


def die(): os.kill(os.getpid(), signal.SIGKILL)


class Countdown:
    "Counts what happens in this process; at the given number, the end."
    def __init__(self, left=None): self.left, self.seen = left, 0
    def last(self):
        self.seen += 1
        return self.left is not None and self.seen > self.left


def watch_lines(count, folders):
    "Count the lines that are executed in the given files or folders."
    watched = functools.cache(lambda name: any(name.startswith(f) for f in folders))
    def line(frame, event, arg):
        if event == "line" and count.last(): die()
        return line
    def call(frame, event, arg): return line if watched(frame.f_code.co_filename) else None
    sys.settrace(call)


class HalfWritten:
    "A file whose writes are counted; the last one stops in the middle."
    def __init__(self, file, count): self.__dict__.update(file=file, count=count)
    def __getattr__(self, name): return getattr(self.file, name)
    def __enter__(self): self.file.__enter__(); return self
    def __exit__(self, *error): return self.file.__exit__(*error)
    def __iter__(self): return iter(self.file)
    def write(self, data):
        if self.count.last():
            self.file.write(data[:len(data) // 2])
            self.file.flush()
            die()
        return self.file.write(data)


def watch_calls(count, after):
    "Count the calls that change files, and what is written to files that Python opens."
    def watched(call):
        @functools.wraps(call)
        def replacement(*args, **kwargs):
            last = count.last()
            if last and not after: die()
            result = call(*args, **kwargs)
            if last: die()
            return result
        return replacement
    for name in CALLS: setattr(os, name, watched(getattr(os, name)))
    opened = builtins.open
    def open_(file, mode="r", *args, **kwargs):
        result = opened(file, mode, *args, **kwargs)
        return HalfWritten(result, count) if set(mode) & set("wax+") else result
    builtins.open = open_


def attempt(work, folder, kind=None, at=None, after=False, report=None):
    "Run `work(folder)` in a child, perhaps killed; whether it finished. With `report`, the child says how much it did."
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            count = Countdown(at if kind in ("line", "call") else None)
            if kind == "line": watch_lines(count, work.watched)
            if kind == "call": watch_calls(count, after)
            work.run(folder)
            sys.settrace(None)
            if report is not None: os.write(report, json.dumps(count.seen).encode())
            status = 0
        except BaseException: traceback.print_exc()
        finally: os._exit(status)
    end = time.perf_counter() + at if kind == "time" else None
    while True:
        done, status = os.waitpid(pid, os.WNOHANG if end else 0)
        if done: break
        left = end - time.perf_counter()
        if left <= 0:
            os.kill(pid, signal.SIGKILL)
            end = None
        else: time.sleep(min(left, .001))
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL): raise AssertionError(f"{work.name}: the run after a kill ended with {code} (its error is above)")
    return code == 0


def measured(work, folder, kind):
    "How much of a kind an undisturbed run does: seconds, lines or calls."
    read, write = os.pipe()
    start = time.perf_counter()
    assert attempt(work, folder, kind if kind != "time" else None, report=write)
    seconds = time.perf_counter() - start
    os.close(write)
    counted = json.loads(os.read(read, 100))
    os.close(read)
    return seconds if kind == "time" else counted


def killed(work, kills, seed, folder, progress=False):
    "Kill until there have been `kills`, every run being started again until it has finished; figures, or an `AssertionError`."
    rng, folder, start = random.Random(seed), Path(folder), time.perf_counter()
    work.prepare(folder)
    work.run(folder / "warm") # in this process: what is imported and set up at the first use is there for all children
    amount = {kind: measured(work, folder / f"whole by {kind}", kind) for kind in set(KINDS)}
    expected = work.result(folder / "whole by time")
    assert all(work.result(folder / f"whole by {kind}") == expected for kind in set(KINDS)), "two undisturbed runs differ"
    by, attempts, attempts_most, repeated, runs, found = collections.Counter(), 0, 0, 0, 0, collections.Counter()
    while sum(by.values()) < kills:
        at, mine, done_before = folder / f"run {runs}", 0, 0
        while True:
            kind = rng.choice(KINDS)
            total = amount[kind]
            finished = attempt(work, at, kind, rng.uniform(0, total) if kind == "time" else rng.randrange(total), rng.random() < .5)
            attempts, mine = attempts + 1, mine + 1
            found[work.check(at, expected)] += 1
            if finished: break
            by[kind] += 1
            done = work.done(at)
            assert done >= done_before, f"{work.name}: work that was finished is gone"
            done_before = done
            if progress and sum(by.values()) % 20 == 0: print(f"{sum(by.values())} kills, {runs} runs, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        assert work.result(at) == expected, f"{work.name}: other files than those of an undisturbed run, after {mine - 1} kills ({at})"
        repeated += work.repeated(at)
        runs, attempts_most = runs + 1, max(attempts_most, mine)
        work.remove(at)
    return dict(work=work.name, kills=sum(by.values()), by_kind=dict(sorted(by.items())), runs=runs, resumed_to_the_reference=runs, most_attempts_of_a_run=attempts_most,
                final_name_after_an_attempt=dict(sorted(found.items())), computed_again=repeated, units=work.units(folder), undisturbed=dict(seconds=round(amount["time"], 3), lines=amount["line"], calls=amount["call"]),
                digest=expected[:16], seconds=round(time.perf_counter() - start, 1))


# what is killed


class Work:
    "Something to be killed. `run` starts or resumes it, `result` is a digest of its final files."
    watched, again = (), 0 # files whose lines are counted; how much may be computed again for each kill
    def prepare(self, folder): pass
    def done(self, folder): "How much is finished for good; may not become less."; return 0
    def repeated(self, folder): "How much was computed more than once in all attempts."; return 0
    def units(self, folder): return None
    def remove(self, folder): shutil.rmtree(folder)


def package(*parts):
    import tsv_nb
    return tuple(str(Path(tsv_nb.__file__).parent / p) for p in parts)


class SuiteWork(Work):
    "An evaluation of a few methods on a toy world: records, then a file of results."
    name = "suite"
    def prepare(self, folder):
        from test_suite import SMALL, toy_world
        from tsv_nb.vision.suite import evaluate_suite
        self.watched, self.call = package("vision/records.py", "vision/suite.py", "compress.py"), lambda out: evaluate_suite(toy_world(), out=out, **SMALL)
    def run(self, folder): self.call(folder)
    def lines(self, folder):
        path = folder / "records.jsonl"
        return [json.loads(o) for o in path.read_bytes().split(b"\n")[:-1]] if path.exists() else [] # every whole line is a record
    def final(self, folder): return [p for p in folder.glob("*.json") if not p.name.startswith(".")]
    def result(self, folder):
        "Of the results without the seconds, and of the keys and accuracies of the records."
        path, = self.final(folder)
        results = json.loads(path.read_text())
        for group in ("methods", "ranks"):
            for outcome in results[group].values(): outcome.pop("seconds")
        records = sorted([r["key"], r.get("accuracy")] for r in self.lines(folder))
        return hashlib.sha256(json.dumps([path.name, results, records], sort_keys=True).encode()).hexdigest()
    def check(self, folder, expected):
        if not self.final(folder): return "absent"
        assert self.result(folder) == expected, "a file of results that is not complete"
        return "complete"
    def done(self, folder): return len({r["key"] for r in self.lines(folder)})
    def repeated(self, folder):
        keys = [r["key"] for r in self.lines(folder)]
        return len(keys) - len(set(keys))


class RecordsWork(SuiteWork):
    "Records alone, each after a moment of work, then the file of results: as many writes in as little time as possible."
    name, numbers = "records", 40
    def prepare(self, folder):
        import tsv_nb.vision.records
        self.watched = package("vision/records.py", "compress.py")
    def run(self, folder):
        from tsv_nb.vision.records import Records, fact_digest, write_json
        with Records(folder) as records:
            for i in range(self.numbers):
                key = fact_digest("number", i)
                if key in records: continue
                x = torch.randn(64, 64, generator=torch.Generator().manual_seed(i))
                records.add(key, accuracy=float((x @ x).sigmoid().mean()), task="ant", seconds=.001)
            scores = {str(i): records[fact_digest("number", i)]["accuracy"] for i in range(self.numbers)}
        write_json(folder / "results.json", dict(methods={"all": dict(scores, seconds=1.)}, ranks={}))
    def units(self, folder): return self.numbers


def small_model(folder, tasks=3, layers=6, m=96, n=64):
    "A base in two shards with an index and companions, and fine-tuned models, one file each."
    from safetensors.torch import save_file
    g = torch.Generator().manual_seed(0)
    def tensors(start=None):
        shapes = {f"layers.{i}.{part}": shape for i in range(layers) for part, shape in (("weight", (m, n)), ("bias", (m,)))} | {"norm.weight": (n,), "embed_tokens.weight": (50, n)}
        return {k: (torch.randn(s, generator=g) if start is None else start[k].float() + .05 * torch.randn(s, generator=g)).to(torch.bfloat16 if k.endswith("bias") else torch.float32)
                for k, s in shapes.items()} | {"steps": torch.tensor([7])}
    base, shards = tensors(), collections.defaultdict(dict)
    (folder / "base").mkdir(parents=True)
    for i, (k, t) in enumerate(base.items()): shards[f"model-{1 + (i > len(base) // 2):05d}-of-00002.safetensors"][k] = t
    for file, part in shards.items(): save_file(part, folder / "base" / file)
    index = dict(metadata={}, weight_map={k: file for file, part in shards.items() for k in part})
    for name, content in (("model.safetensors.index.json", index), ("config.json", dict(model_type="toy", torch_dtype="float32"))): (folder / "base" / name).write_text(json.dumps(content))
    for t in range(tasks): save_file(tensors(base), folder / f"task{t}.safetensors")
    return folder / "base", {f"task{t}": folder / f"task{t}.safetensors" for t in range(tasks)}


def timeless(content):
    "A report without times and without what is said of the session."
    if isinstance(content, dict): return {k: timeless(v) for k, v in content.items() if k not in ("seconds", "session")}
    return [timeless(o) for o in content] if isinstance(content, list) else content


def files_digest(path):
    "Of the names and bytes of a file, or of all files below a folder; of a report, without the times."
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        data = file.read_bytes() if file.is_file() else b""
        if "report" in file.name: data = json.dumps(timeless(json.loads(data)), sort_keys=True).encode()
        digest.update(repr((file.relative_to(path).as_posix(), len(data))).encode() + data)
    return digest.hexdigest()


class MergeWork(Work):
    "A streaming merge of three models into a folder of shards."
    name, again, out, shard_size, options = "merge", 1, "merged", "60KB", {}
    def prepare(self, folder):
        import tsv_nb.scale.stream as stream
        self.stream, self.watched = stream, package("scale/", "compress.py")
        self.base, self.tasks = small_model(folder)
        self.plan() # measures how fast this machine is, once and for all children
    def plan(self, **options):
        from tsv_nb.scale.checkpoints import open_checkpoint
        from tsv_nb.scale.plan import make_plan
        base, tasks = open_checkpoint(self.base), {t: open_checkpoint(p) for t, p in self.tasks.items()}
        return make_plan("merge", base, tasks, **dict(shard_size=self.shard_size, threads=1) | options), base, tasks
    def run(self, folder):
        "Each unit that is begun is noted."
        folder.mkdir(exist_ok=True)
        run_unit = self.stream.run_unit
        def noted(job, unit):
            _note(folder / "begun", f"{unit}\n")
            return run_unit(job, unit)
        self.stream.run_unit = noted
        try: self.stream.run_plan(*self.plan(), folder / self.out, progress=False, **self.options)
        except ValueError as e: # killed when all was done and cleaned up, and only the folder was left
            if not ((folder / self.out).exists() and "exists; choose another output" in str(e) and not (folder / f"{self.out}.partial").exists()): raise
        finally: self.stream.run_unit = run_unit
    def result(self, folder):
        strange = [p.name for p in folder.iterdir() if not p.name.startswith(Path(self.out).stem) and p.name != "begun" or p.name.endswith((".partial", ".tmp"))]
        assert not strange, f"left behind: {strange}"
        report = folder / f"{Path(self.out).stem}.report.json" # beside a single file
        return files_digest(folder / self.out) + (files_digest(report) if report.exists() else "")
    def check(self, folder, expected):
        if not (folder / self.out).exists(): return "absent"
        assert files_digest(folder / self.out) == expected[:64], "an output that is not complete"
        return "complete"
    def finished(self, folder):
        "Units whose part is there, or whose shard is."
        return set(range(self.units(folder))) if (folder / self.out).exists() else self.parts(folder)
    def parts(self, folder):
        work, plan = folder / f"{self.out}.partial", self.plan()[0]
        done = {int(p.stem) for p in (work / "parts").glob("*.safetensors") if not p.name.startswith(".")}
        for receipt in (work / "done").glob("*.json"):
            if not receipt.name.startswith("."): done |= {u for u, names in enumerate(plan.units) if set(names) <= set(plan.shards[int(receipt.stem)])}
        return done
    def done(self, folder): return len(self.finished(folder))
    def repeated(self, folder):
        begun = (folder / "begun").read_text().split()
        return len(begun) - len(set(begun))
    def units(self, folder): return len(self.plan()[0].units)


class FileWork(MergeWork):
    "The same into a single file."
    name, out, shard_size = "merge-file", "merged.safetensors", "5GB"


class ReplaceWork(FileWork):
    "A merge into a file that exists: it is the old one or the new one at every moment."
    name, options, old = "replace", dict(overwrite=True), struct.pack("<Q", 33) + b'{"__metadata__":{"tsv_nb":"old"}}' # one of ours
    def run(self, folder):
        folder.mkdir(exist_ok=True)
        if not (folder / "begun").exists():
            (folder / self.out).unlink(missing_ok=True) # of a run that was killed here
            _note(folder / self.out, self.old.decode())
            _note(folder / "begun", "")
        super().run(folder)
    def check(self, folder, expected):
        if not (folder / "begun").exists(): return "absent"
        return "old" if (folder / self.out).read_bytes() == self.old else super().check(folder, expected)
    def finished(self, folder):
        out = folder / self.out
        return super().finished(folder) if out.exists() and out.read_bytes() != self.old else self.parts(folder)


WORKS = {w.name: w for w in (MergeWork, FileWork, ReplaceWork, SuiteWork, RecordsWork)}


def cut(rounds, seed, folder):
    "A file of a task is cut at some moment of a merge, from its beginning to after its end; how the merges end."
    rng, folder, work, ends, start = random.Random(seed), Path(folder), MergeWork(), collections.Counter(), time.perf_counter()
    work.prepare(folder)
    work.run(folder / "warm")
    seconds, expected = measured(work, folder / "whole by time", "time"), work.result(folder / "whole by time")
    path = work.tasks["task1"]
    whole, at = path.read_bytes(), path.stat().st_mtime_ns
    def run(folder):
        try: MergeWork.run(work, folder)
        except (ValueError, OSError) as e:
            assert str(path) in str(e), f"not named: {e}"
            _note(folder / "refused", str(e))
    for i in range(rounds):
        out, work.run = folder / f"run {i}", run
        pid = os.fork()
        if pid == 0:
            try: run(out); os._exit(0)
            except BaseException: traceback.print_exc(); os._exit(1)
        time.sleep(1.2 * seconds * i / rounds) # the first at once: it cannot finish
        os.truncate(path, rng.randrange(len(whole)))
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code: ends[f"signal {-code}" if code < 0 else "another error"] += 1
        elif (out / "refused").exists(): ends["refused"] += 1; assert not (out / work.out).exists()
        else: ends["finished"] += 1; assert work.result(out) == expected
        path.write_bytes(whole)
        os.utime(path, ns=(at, at))
        work.remove(out)
    return dict(work="merge, with a file that is cut meanwhile", rounds=rounds, ends=dict(sorted(ends.items())), seconds=round(time.perf_counter() - start, 1))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=WORKS, nargs="?", default="merge")
    parser.add_argument("--cut", type=int, metavar="ROUNDS", help="cut an input file instead of killing")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--progress", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1) # threads do not survive a fork: no pool of torch's, no monitor of tqdm's
    tqdm.monitor_interval = 0
    tqdm.set_lock(threading.RLock()) # its own is shared by all children: one that is killed while it holds it would stop the next ones
    import logging
    logging.disable(logging.WARNING) # that the last record is incomplete is what this is about
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None # a kill does not care where files are, and fsync is quick there
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        print(json.dumps(cut(args.cut, args.seed, folder)) if args.cut else json.dumps(killed(WORKS[args.work](), args.kills, args.seed, folder, args.progress)))


if __name__ == "__main__": main()
