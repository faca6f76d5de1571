"""Kill a program again and again, start it again each time, and look at what it leaves.

Usage: python tests/reliability/kills.py WORK [--kills 10] [--seed 0]     prints a JSON object; WORK is merge, records or suite

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
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]
CALLS = ("replace", "rename", "fsync", "unlink", "remove", "mkdir", "rmdir", "write", "link", "ftruncate", "truncate")
KINDS = ("time", "time", "line", "call")


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
    "Something to be killed: `run` starts or resumes it, `result` is a digest of its final files."
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


WORKS = {w.name: w for w in (SuiteWork, RecordsWork)}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--progress", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1) # a pool of threads does not survive a fork
    import logging
    logging.disable(logging.WARNING) # that the last record is incomplete is what this is about
    with tempfile.TemporaryDirectory() as folder: print(json.dumps(killed(WORKS[args.work](), args.kills, args.seed, folder, args.progress)))


if __name__ == "__main__": main()
