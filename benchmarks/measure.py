"""What the benchmarks share: timing with quantiles, what machine this is, its measured ceilings, relative errors, and a JSON file that is always complete.

A time is the median of many runs with the 20% and 80% quantiles beside it: on CUDA from events with the L2 cache flushed before each run
(`triton.testing.do_bench`), on a CPU from `perf_counter` after a warm-up. A difference smaller than the quantiles' distance is noise.
"""
import json
import os
import platform
import subprocess
import time
import uuid
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import torch

QUANTILES = [.5, .2, .8]
SLOW_MS = 100. # a CUDA call longer than this is timed a few times only: do_bench would make at least eight


class Timing(NamedTuple):
    "Milliseconds of one call: median, 20% and 80% quantile, and how many calls were timed (None where the tool does not say)."
    ms: float
    low: float
    high: float
    repeats: int | None = None

    @classmethod
    def of(cls, times): # a list of milliseconds
        "The quantiles of a list of times."
        return cls(*torch.tensor(times, dtype=torch.float64).quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist(), len(times))


def synchronize(device):
    "Wait for the device: its work is asynchronous."
    if torch.device(device).type == "cuda": torch.cuda.synchronize(device)


def _wall(fn, device):
    "Milliseconds of one call by the host's clock."
    start = time.perf_counter()
    fn(); synchronize(device)
    return (time.perf_counter() - start) * 1e3


def _time_cpu(fn, warmup, rep, least):
    spent, times = _wall(fn, "cpu"), []
    while spent < warmup: spent += _wall(fn, "cpu")
    spent = 0.
    while len(times) < least or spent < rep:
        times.append(_wall(fn, "cpu"))
        spent += times[-1]
    return Timing.of(times)


def _time_cuda(fn, device, warmup, rep):
    from triton.testing import do_bench # imported here: CPU benchmarks run where Triton is not installed
    with torch.cuda.device(device):
        _wall(fn, device) # compilation, handles and tuning stay out
        once = _wall(fn, device)
        if once > SLOW_MS: return Timing.of([_wall(fn, device) for _ in range(3 if once < 5 * SLOW_MS else 2)] + [once])
        return Timing(*do_bench(fn, warmup=warmup, rep=max(rep, 10 * once), quantiles=QUANTILES)) # ten calls at least, or quantiles say little


def measure(
    fn, # called without arguments; what it returns is dropped
    device, # where it runs: "cpu", "cuda", or a torch.device
    warmup=25., # milliseconds before the clock counts
    rep=100., # milliseconds of timed calls, about
    least=5, # timed calls at least (CPU)
) -> Timing:
    "Time one function."
    return _time_cuda(fn, device, warmup, rep) if torch.device(device).type == "cuda" else _time_cpu(fn, warmup, rep, least)


def measure_sides(
    sides, # name -> function, all working on the same tensors
    device,
    rounds=15, # timed calls of each (CPU)
    **options, # for `measure` (CUDA)
) -> dict: # name -> Timing
    "Time several functions against each other; on a CPU in turns, so that what else the machine does hits all of them alike."
    if torch.device(device).type == "cuda": return {name: measure(fn, device, **options) for name, fn in sides.items()}
    for fn in sides.values(): fn()
    times = {name: [] for name in sides}
    for _ in range(rounds):
        for name, fn in sides.items(): times[name].append(_wall(fn, device))
    return {name: Timing.of(t) for name, t in times.items()}


# --- the machine -----------------------------------------------------------------------------------------------------------------------------

def _version(package):
    "The installed version of a package, or None."
    try: return version(package)
    except PackageNotFoundError: return None


def _cpu():
    "The processor's name as the operating system gives it."
    try: lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError: lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor() or platform.machine())


def _driver():
    "The NVIDIA driver's version, or None."
    try: out = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired): return None
    return out.stdout.split("\n")[0].strip() or None


def kept_waiting():
    "Seconds in which this thread was ready but other work had the processor; 0 where the system does not count them."
    try: return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9
    except OSError: return 0.


def machine(device="cpu") -> dict:
    "What a result was measured on."
    facts = dict(device=_cpu(), device_type=torch.device(device).type, torch=torch.__version__, triton=_version("triton"), cuda=torch.version.cuda, driver=None,
                 python=platform.python_version(), system=f"{platform.system()} {platform.machine()}", cpu=_cpu(), threads=torch.get_num_threads(),
                 date=datetime.now(timezone.utc).isoformat(timespec="seconds"))
    if facts["device_type"] == "cuda":
        p = torch.cuda.get_device_properties(device)
        facts |= dict(device=p.name, driver=_driver(), compute_capability=f"{p.major}.{p.minor}", multiprocessors=p.multi_processor_count,
                      memory_bytes=p.total_memory, l2_bytes=getattr(p, "L2_cache_size", None))
    return facts


# --- its ceilings ----------------------------------------------------------------------------------------------------------------------------

@contextmanager
def tf32(allowed):
    "Float32 products of torch on CUDA: tf32 allowed or not. No effect elsewhere."
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try: yield
    finally: torch.set_float32_matmul_precision(before)


def measured_copy(device, nbytes=None, buffers=4) -> float: # bytes/s, read and write both counted
    "Achieved bandwidth of a large copy within the device; several buffers in turn, together far larger than any cache."
    nbytes = nbytes or (2**30 if torch.device(device).type == "cuda" else 2**26)
    pairs = cycle([[torch.empty(nbytes, dtype=torch.uint8, device=device).random_() for _ in range(2)] for _ in range(buffers)])
    def copy():
        src, dst = next(pairs)
        dst.copy_(src)
    return 2 * nbytes / (measure(copy, device).ms / 1e3)


def measured_matmul(device, dtype=torch.float32, n=None, allow_tf32=False) -> float: # FLOP/s
    "Achieved rate of a large square product of random matrices: the ceiling that a library reaches in practice."
    n = n or (8192 if torch.device(device).type == "cuda" else 512)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    with tf32(allow_tf32): return 2 * n**3 / (measure(lambda: torch.mm(a, b, out=out), device).ms / 1e3)


def relative_error(got, want) -> float: # NaN where `got` has any
    "Frobenius norm of the difference relative to that of `want`, in float64."
    want = want.double()
    return (torch.linalg.vector_norm(got.double() - want) / torch.linalg.vector_norm(want)).item()


# --- results ---------------------------------------------------------------------------------------------------------------------------------

def write_json(path, data) -> Path: # the path written
    "Write JSON under a temporary name, then rename it: a reader never sees half a file. NaN and infinity are refused."
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        tmp.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(tmp, path)
    finally: tmp.unlink(missing_ok=True)
    return path
