"""Several ways to the same result, on the same tensors, in one run: each is checked against float64 first and timed only if it is right.

A *side* is one way (ours or torch's). A side whose error is over its limit, or that raises, becomes an entry of `errors`, never a time in a row.
Like is compared with like: a time of ours is set against the fastest torch side that was measured to be at least as accurate (`classes`).

Usage: python benchmarks/compare.py FILE.json ...     prints a short table of results
A line: configuration, our side, its time, which share of it the binding ceiling (memory or compute) explains, relative error, torch's time / ours
[from pessimistic to optimistic quantiles], torch's side; in brackets what else was faster still, whatever its accuracy or preparation.
"""
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from measure import Timing, machine, measure, measured_copy, measured_matmul, synchronize, tf32, write_json

try: from triton.errors import TritonError
except ImportError: TritonError = RuntimeError # no Triton: nothing of it can fail

# what a side may raise without ending the run (torch's, Dynamo's and CUDA's errors are RuntimeErrors); each is recorded with its message
FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ImportError, TritonError)


class WrongResult(RuntimeError): "A side's result is too far from the float64 reference."


class Side(NamedTuple):
    "One way to the result."
    build: Callable # () -> function without arguments that does the work once; compilation and capture happen in here
    kind: str # "ours", "torch", or "note": shown, but never what ours is compared with
    limit: float # relative error allowed
    unit: str # which measured product rate bounds it: a key of `ceilings`
    work: dict # bytes that it must move and FLOPs that it takes
    tf32: bool = False # whether torch's float32 products may use tf32


def ceilings(device, tiny=False) -> dict:
    "Measured limits of the device: bytes/s of a copy, FLOP/s of a large product per kind of product."
    n, cuda = (64 if tiny else None), torch.device(device).type == "cuda"
    rates = {"ieee": measured_matmul(device, n=n), "float64": measured_matmul(device, torch.float64, n=n)}
    # the CPU's float32 products are the same whatever is allowed; half precision there has no place in these benchmarks but must have a number
    rates["tf32"] = measured_matmul(device, n=n, allow_tf32=True) if cuda else rates["ieee"]
    for dtype in (torch.float16, torch.bfloat16): rates[str(dtype).removeprefix("torch.")] = measured_matmul(device, dtype, n=n)
    # one float32 product as three of tf32; one of half factors and float32 singular values as two of half factors ("split")
    rates["tf32x3"], rates["split"] = (rates["tf32"] / 3, rates["float16"] / 2) if cuda else (rates["ieee"], rates["ieee"])
    return dict(copy_bytes_per_s=measured_copy(device, 2**20 if tiny else None), flops_per_s=rates)


def graphed(build, device):
    "The work of a side captured in a CUDA graph."
    def captured():
        fn, stream = build(), torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3): fn()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph, collecting = torch.cuda.CUDAGraph(), gc.isenabled()
        gc.disable() # a kernel module that the collector unloads during capture would spoil the graph
        try:
            with torch.cuda.graph(graph): fn()
        finally:
            if collecting: gc.enable()
        return lambda: (graph.replay(), fn)[0] # fn stays alive: the graph reads its tensors
    return captured


def host_ms(fn, device) -> float | None: # median milliseconds; None on a CPU
    "How long the host is busy with a call before the device is done: where this is the whole time, launching costs more than the work."
    if torch.device(device).type != "cuda": return None
    times = []
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        fn()
        times.append((time.perf_counter() - start) * 1e3)
    synchronize(device)
    return sorted(times)[2]


def rates(timing: Timing, counts, limits, unit) -> dict:
    "What a time means: bytes/s, FLOP/s, the shares of the ceilings, and the ceiling that binds."
    seconds = timing.ms / 1e3
    memory, compute = counts["bytes"] / limits["copy_bytes_per_s"], counts["flops"] / limits["flops_per_s"][unit]
    return dict(ms=timing.ms, low=timing.low, high=timing.high, repeats=timing.repeats, bytes=counts["bytes"], flops=counts["flops"],
                gb_per_s=counts["bytes"] / seconds / 1e9, copy_share=memory / seconds, flops_per_s=counts["flops"] / seconds, unit=unit,
                bound="memory" if memory >= compute else "compute", floor_ms=max(memory, compute) * 1e3, floor_share=max(memory, compute) / seconds)


class Run:
    "One benchmark's results: rows, errors and what was skipped, written after every row, so that a time limit loses only what is not there yet."
    def __init__(self, name, device, out, seconds, tiny=False, settings=None):
        self.device, self.out, self.start, self.seconds, self.tiny = torch.device(device), Path(out), time.perf_counter(), seconds, tiny
        self.timing = dict(warmup=1, rep=2, least=2) if tiny else dict(warmup=5, rep=30)
        self.data = dict(benchmark=name, tiny=tiny, machine=machine(device), settings=settings or {}, rows=[], errors=[], skipped=[], seconds=0., complete=False)
        self.data["ceilings"] = self.limits = ceilings(device, tiny)
        self.save() # an older result of this name is gone, whatever happens next

    def left(self): return self.seconds - (time.perf_counter() - self.start)

    def side(self, key, name, side, check) -> dict | None: # None: it failed, and `errors` says how
        "Check one side, then time it."
        cuda = self.device.type == "cuda"
        try:
            with tf32(side.tf32):
                fn = side.build()
                synchronize(self.device)
                before = torch.cuda.memory_allocated(self.device) if cuda else 0
                if cuda: torch.cuda.reset_peak_memory_stats(self.device)
                error, peak = check(fn)
                if not error <= side.limit: raise WrongResult(f"relative error {error:.3g} is over the limit of {side.limit:.3g}")
                timing, host = measure(fn, self.device, **self.timing), host_ms(fn, self.device)
        except FAILURES as e:
            self.data["errors"].append(key | dict(side=name, kind=side.kind, error=type(e).__name__, message=str(e)[:500]))
            self.save()
            synchronize(self.device) # after an illegal access nothing that follows can be trusted: this raises, and the run ends
            return None
        return dict(kind=side.kind, relative_error=error, limit=side.limit, tf32=side.tf32, peak_bytes=peak - before if peak else None, host_ms=host) | rates(timing, side.work, self.limits, side.unit)

    def sides(self, key, sides, check) -> dict:
        "Check and time several; those that fail are left out."
        results = {name: self.side(key, name, s, check) for name, s in sides.items()}
        return {name: r for name, r in results.items() if r}

    def row(self, key, results, classes):
        "Add a row: every side of one configuration, and ours against the fastest torch side at least as accurate."
        for r in results.values(): r["accuracy"] = next((i for i, c in enumerate(classes) if r["relative_error"] <= c), len(classes))
        ratios = {}
        for name, ours in results.items():
            if ours["kind"] != "ours": continue
            others = {n: r for n, r in results.items() if r["kind"] != "ours"}
            rivals = {n: r for n, r in others.items() if r["kind"] == "torch" and r["accuracy"] <= ours["accuracy"]}
            if not rivals: continue
            best, fastest = (min(o, key=lambda n: o[n]["ms"]) for o in (rivals, others)) # fastest: notes included, whatever its accuracy
            t = rivals[best] # the noise of a ratio: ours slow against torch fast, and the other way round
            ratios[name] = dict(torch=best, ratio=t["ms"] / ours["ms"], low=t["low"] / ours["high"], high=t["high"] / ours["low"],
                                fastest=fastest, ratio_fastest=others[fastest]["ms"] / ours["ms"])
        if results: self.data["rows"].append(key | dict(classes=list(classes), sides=results, ratios=ratios))
        self.save()

    def skip(self, step, why):
        "Note a configuration that was not measured."
        self.data["skipped"].append(dict(step=list(step), why=why))

    def save(self, complete=False):
        self.data |= dict(seconds=round(time.perf_counter() - self.start, 1), complete=complete)
        write_json(self.out, self.data)

    def finish(self) -> int: # exit status: 1 if one of our sides failed
        self.save(complete=True)
        table(self.data)
        return int(any(e["kind"] == "ours" for e in self.data["errors"]))


def table(data, limit=24):
    "Print a line per row: our fastest side of each accuracy class, and what it was compared with."
    print(f"{data['benchmark']} on {data['machine']['device']}: {len(data['rows'])} rows, {len(data['errors'])} errors, {len(data['skipped'])} skipped, {data['seconds']:g} s"
          + ("" if data["complete"] else ", CUT SHORT") + (", tiny shapes: no times are shown, they would mean nothing" if data["tiny"] else ""))
    lines = [line for row in data["rows"] for line in _lines(row)]
    if not data["tiny"]: print(*lines[:limit], sep="\n")
    if len(lines) > limit and not data["tiny"]: print(f"... and {len(lines) - limit} more lines in the file")
    ours_first = sorted(data["errors"], key=lambda e: e["kind"] != "ours")
    for e in ours_first[:8]: print("ERROR", *(v for k, v in e.items() if k != "message"), e["message"].split("\n")[0][:100])


def _lines(row):
    "A row's lines of the table."
    key = " ".join(str(v) for k, v in row.items() if k not in ("classes", "sides", "ratios", "ranks", "shapes", "matrices"))
    best = {}
    for name in sorted(row["ratios"], key=lambda n: -row["sides"][n]["ms"]): best[row["sides"][name]["accuracy"]] = name # the fastest comes last and stays
    for name in best.values():
        s, r = row["sides"][name], row["ratios"][name]
        line = (f"{key:34.34} {name.removeprefix('ours '):22.22} {s['ms']:8.3f} ms {s['floor_share']:4.0%} of {s['bound'][:3]} {s['relative_error']:.0e} "
                f"{r['ratio']:5.2f}x [{r['low']:.2f} {r['high']:.2f}] {r['torch']}")
        yield line + (f" ({r['ratio_fastest']:.2f}x {r['fastest']})" if r["fastest"] != r["torch"] else "")


if __name__ == "__main__":
    for name in sys.argv[1:]: table(json.loads(Path(name).read_text(encoding="utf-8")))
