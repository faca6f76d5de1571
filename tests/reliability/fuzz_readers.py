"""A fuzz target for everything that reads bytes of strangers: headers of safetensors, indexes, PyTorch files, archives of compress, adapters of PEFT;
and for what an unfinished run has left: its parts, and the receipts of its shards.

python tests/reliability/fuzz_readers.py --seconds 60 --seed 0 [--crashes FOLDER]

Valid files are damaged (bits, cuts, splices, edits of their JSON and of their pickles) and read whole. A reader may return what it read or
raise one of ALLOWED with a message that names the file. Everything else is a crash: another exception, a message without the file, a signal,
more than ten seconds, more than a gigabyte. Crashes are written to a folder; put one into tests/reliability/crashes/ and test_fuzz.py replays it.
Input number i of seed s is always the same.
"""
import argparse
import contextlib
import faulthandler
import functools
import io
import json
import os
import random
import re
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save, save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tsv_nb.compress import CompressedTaskVector, compress
from tsv_nb.scale.checkpoints import open_checkpoint
from tsv_nb.scale.lora import Adapter, LoraLayer, read_adapter
from tsv_nb.scale.lora_files import adapter_config, adapter_tensors
from tsv_nb.scale.outputs import input_digests, metadata_of
from tsv_nb.scale.parts import assemble, part_path, read_part
from tsv_nb.scale.plan import make_plan
from tsv_nb.scale.stream import run_plan, run_unit
from tsv_nb.scale.work import WorkFolder, _check

ALLOWED = (ValueError, KeyError, FileNotFoundError, PermissionError, IsADirectoryError)
CRASHES = Path(__file__).parent / "crashes"


def read_all(checkpoint):
    "Every tensor as its header says it is."
    for name in checkpoint:
        t, head = checkpoint[name], checkpoint.header(name)
        assert (t.shape, t.dtype) == (head.shape, head.dtype) and t.nbytes == checkpoint.nbytes(name) and t.is_contiguous(), name
    assert checkpoint.total_bytes <= sum(map(checkpoint.nbytes, checkpoint)) and all(n in checkpoint for n in checkpoint.tied.values())
    json.dumps(checkpoint.fingerprint())


def read_archive(path):
    "An archive, and what follows from it."
    vector = CompressedTaskVector.load(path)
    assert vector.nbytes >= 0 and vector.dense_nbytes >= 0 and set(vector) == set(vector.dtypes)
    base = {n: torch.zeros(f.matrix_shape, dtype=torch.float32) for n, f in vector.factors.items()} | {n: torch.zeros(t.shape) for n, t in vector.dense.items()}
    if sum(t.numel() for t in base.values()) < 10**6:
        try: vector.apply_to(base)
        except ValueError as e:
            if "NaN" not in str(e) and "not finite" not in str(e): raise


def read_lora(path):
    "An adapter, one of whose two files is damaged."
    adapter = read_adapter(path.parent)
    for name in adapter: assert tuple(adapter[name].shape) == tuple(adapter.header(name).shape), name
    for layer in adapter.layers.values(): layer.factors()
    assert adapter.nbytes > 0


def read_left_part(path):
    "A part of an unfinished run, put into a file."
    part = read_part(path)
    assemble(path.with_name("whole.safetensors"), [part], {})
    json.dumps(part.facts)


def read_receipt(path):
    "The receipt of a shard of an unfinished run: accepted, or its shard is to be done again."
    work = WorkFolder(left()["plan"], path.with_name("out"))
    for name in ("done", "out"): (work.folder / name).mkdir(parents=True)
    (work.folder / "out" / "model.safetensors").write_bytes(left()["shard"])
    os.rename(path, work.receipt(0))
    if not work._finished(0): raise ValueError(f"{path} is not accepted")
    input_digests(work.done.values()); metadata_of(work.plan, work.done[0])
    assert {e["how"] for e in work.done[0]["report"].values()} == {"merge"}


@functools.cache
def left() -> dict: # plan; bytes of a part, of a receipt and of its shard
    "What a run has left."
    base, tasks = open_checkpoint({"w": torch.eye(4)}), {t: open_checkpoint({"w": torch.eye(4) * i}) for i, t in enumerate("ab", 2)}
    found = {"plan": make_plan("merge", base, tasks, threads=1)}
    with tempfile.TemporaryDirectory() as made:
        def stopped(job, units):
            run_unit(job, 0)
            found["part"] = part_path(job.folder, 0).read_bytes()
            yield 0
            for name, path in (("receipt", "done/00000.json"), ("shard", "out/model.safetensors")): found[name] = Path(job.folder, path).read_bytes()
            raise KeyboardInterrupt
        with contextlib.suppress(KeyboardInterrupt): run_plan(found["plan"], base, tasks, Path(made) / "out", stopped, progress=False)
    receipt = json.loads(found["receipt"])
    for entry in receipt["report"].values(): entry["seconds"] = 1. # the same in every run
    return found | {"receipt": json.dumps(receipt | {"check": _check(receipt)}, indent=1).encode()}


TARGETS = {"a.safetensors": lambda p: read_all(open_checkpoint(p)), "a.bin": lambda p: read_all(open_checkpoint(p)), "model.safetensors.index.json": lambda p: read_all(open_checkpoint(p.parent)), "archive.safetensors": read_archive,
           "adapter_model.safetensors": read_lora, "adapter_config.json": read_lora, "part.safetensors": read_left_part, "receipt.json": read_receipt}


def beside(name): # file name -> bytes
    "Valid files that a reader expects beside the damaged one."
    if name == "model.safetensors.index.json": return {"one.safetensors": SHARDS["w"], "two.safetensors": SHARDS["v"]}
    return {k: v for k, v in ADAPTER.items() if k != name} if name in ADAPTER else {}


def fuzz_one(data: bytes, folder: Path | None = None) -> dict[str, str]: # what each reader said; raises AssertionError for a crash
    "Give the same bytes to every reader."
    said = {}
    with tempfile.TemporaryDirectory(dir=folder) as made:
        for name, target in TARGETS.items():
            path = Path(made) / name.replace(".", "_") / name
            path.parent.mkdir()
            path.write_bytes(data)
            for file, content in beside(name).items(): (path.parent / file).write_bytes(content)
            try: target(path)
            except ALLOWED as e:
                text = str(e.args[0]) if isinstance(e, KeyError) and e.args else str(e)
                assert str(path.parent) in text, f"{name}: the message does not name the file: {type(e).__name__}: {text[:300]}"
                assert len(text) < 2000, f"{name}: a message of {len(text)} characters"
                said[name] = text
            except AssertionError: raise
            except BaseException as e: raise AssertionError(f"{name}: {type(e).__name__}: {str(e)[:300]}") from e
            else: said[name] = "read"
    return said


# Valid files

SHARDS = {k: save({k: torch.ones(3)}) for k in "wv"}
LORA = Adapter({"h.0.q.weight": LoraLayer(torch.ones(6, 2), torch.ones(2, 4)), "h.1.q.weight": LoraLayer(torch.ones(6, 3), torch.ones(3, 4), 2.), "conv.weight": LoraLayer(torch.ones(5, 2), torch.ones(2, 12), 1., "conv", (2, 2))},
               {"h.0.q.bias": torch.ones(6)}, {"head.weight": torch.ones(3, 4)}, dict(base_model_name_or_path="base", modules_to_save=["head"]))
ADAPTER = {"adapter_model.safetensors": save(adapter_tensors(LORA), metadata={"format": "pt"}), "adapter_config.json": json.dumps(adapter_config(LORA), indent=2, sort_keys=True).encode()}


def repeatable(kind: str, data: bytes) -> bytes:
    "The same file without what differs from run to run: the order of metadata, the addresses in an old file."
    if kind in ("safetensors", "archive"):
        n, = struct.unpack("<Q", data[:8])
        raw = json.dumps(json.loads(data[8:8 + n]), sort_keys=True).encode()
        return struct.pack("<Q", len(raw)) + raw + data[8 + n:]
    if kind != "old": return data
    found = {}
    for old in re.findall(rb"X.\0\0\0(\d{8,20})", data, re.S): found.setdefault(old, b"X\x0f\0\0\0%015d" % len(found))
    return re.sub(rb"X.\0\0\0(\d{8,20})", lambda m: found[m[1]], data, flags=re.S)


def seeds() -> dict[str, bytes]:
    "Valid files of every kind."
    torch.manual_seed(0)
    state = {"layer.0.weight": torch.randn(4, 6), "layer.0.bias": torch.randn(4).bfloat16(), "half": torch.ones(3).half(), "ids": torch.arange(3), "empty": torch.zeros(0, 2), "number": torch.tensor(2.), "flags": torch.tensor([True, False])}
    tied = state | {"head": state["layer.0.weight"], "view": state["layer.0.weight"].T, "column": state["layer.0.weight"][:, 1], "parameter": torch.nn.Parameter(torch.ones(2))}
    views = {k: tied[k] for k in ("layer.0.weight", "head", "view", "column")} # one storage: several are written in the order of their addresses
    def stored(what, **options): torch.save(what, buffer := io.BytesIO(), **options); return buffer.getvalue()
    with tempfile.TemporaryDirectory() as made:
        low = torch.randn(20, 2) @ torch.randn(2, 30)
        compress({"m": low, "n.m": low.T.half(), "b": torch.randn(7), "zero": torch.zeros(9, 9)}).save(f"{made}/c.safetensors")
        archive = Path(made, "c.safetensors").read_bytes()
    made = {"safetensors": save(state, metadata={"format": "pt"}), "one": SHARDS["w"], "torch": stored(tied), "run": stored({"state_dict": tied, "epoch": 3, "lr": .1}), "old": stored(views, _use_new_zipfile_serialization=False), "archive": archive,
            "adapter": ADAPTER["adapter_model.safetensors"], "config": ADAPTER["adapter_config.json"], "part": left()["part"], "receipt": left()["receipt"],
            "index": json.dumps({"metadata": {"total_size": 24}, "weight_map": {"w": "one.safetensors", "v": "two.safetensors"}}, indent=1).encode()}
    return {kind: repeatable(kind, data) for kind, data in made.items()}


# Damage

WORDS = [0, 1, -1, 2, 7, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30, 1.5, 1e308, True, None, "", "F32", "BF16", "F4", "I64", "x" * 300, "a\0b", "\ud800", "../a.safetensors", "/etc/passwd", "one.safetensors", ".", [], {}, [0], [0, 0], [3, 3], [[1]], {"a": 1}, "float32", "nn", "int64", "__doc__"]
BYTES = [b"\0", b"\xff", b"{", b"}", b"[", b'"', b"\\u0000", b"\\ud800", b"NaN", b"-0", b"1e9", b"9" * 400, b"[" * 3000, b'{"a":' * 3000, b"../", b"\x80\x02", b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"cos\nsystem\n", b"R", b"b", b".", b"(", b"t", b"\x85", b"}", b"u", b"h\0", b"q\0",
         b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n", b"cbuiltins\nbytearray\n", b"ccollections\nOrderedDict\n", b"\x8a\x08" + b"\xff" * 8, b"J\xff\xff\xff\x7f", b"ctorch._utils\n_rebuild_sparse_tensor\n", b"ctorch._utils\n_rebuild_qtensor\n", b"ctorch.nn.parameter\nParameter\n", b"ctorch\nUntypedStorage\n"]


def damaged_bytes(rng: random.Random, data: bytes) -> bytes:
    "Bits, cuts, insertions, copies, integers at the edge."
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        if not data: break
        at, n = rng.randrange(len(data)), rng.choice((1, 1, 2, 4, 8, 16, 64))
        kind = rng.randrange(7)
        if kind == 0: data[at] ^= 1 << rng.randrange(8)
        elif kind == 1: data[at] = rng.randrange(256)
        elif kind == 2: del data[at:at + n]
        elif kind == 3: data[at:at] = rng.choice(BYTES)
        elif kind == 4: data[at:at] = data[rng.randrange(len(data)):][:n]
        elif kind == 5: struct.pack_into(rng.choice("<I >I <Q <H".split()), data, min(at, max(0, len(data) - 8)), rng.choice((0, 1, 0xff, 0xffff))) if len(data) >= 8 else None
        else: del data[at if rng.random() < .5 else len(data):]
    return bytes(data)


def damaged_json(rng: random.Random, value: object) -> object:
    "A JSON value with some parts exchanged, removed, renamed or doubled."
    if rng.random() < .12: return rng.choice(WORDS)
    if isinstance(value, dict):
        items = list(value.items())
        for _ in range(rng.choice((0, 1, 1, 2))):
            if not items: break
            i, kind = rng.randrange(len(items)), rng.randrange(4)
            if kind == 0: items[i] = items[i][0], damaged_json(rng, items[i][1])
            elif kind == 1: del items[i]
            elif kind == 2: items[i] = str(rng.choice(WORDS)), items[i][1]
            else: items.append((rng.choice(items)[0] + rng.choice(("", "2")), rng.choice(items)[1]))
        return dict(items)
    if isinstance(value, list):
        value = list(value)
        if value: value[rng.randrange(len(value))] = rng.choice(WORDS) if rng.random() < .5 else damaged_json(rng, value[0])
        return value
    if isinstance(value, int) and not isinstance(value, bool): return value + rng.choice((-1, 1, 4, -4, 2**63))
    return rng.choice(WORDS)


def dumped(rng: random.Random, value: object) -> bytes:
    text = json.dumps(value, ensure_ascii=rng.random() < .8)
    return text.encode("utf-8", "surrogatepass")


def damaged_safetensors(rng: random.Random, data: bytes) -> bytes:
    "The header as JSON, also JSON within its metadata; the length is right, most of the time."
    n, = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8:8 + n]), data[8 + n:]
    meta = header.get("__metadata__", {})
    inner = next((key for key in ("dtypes", "tsv_nb part") if key in meta), None) # JSON in JSON
    if inner and rng.random() < .5: meta[inner] = dumped(rng, damaged_json(rng, json.loads(meta[inner]))).decode("utf-8", "replace")
    else: header = damaged_json(rng, header)
    raw = dumped(rng, header)
    if rng.random() < .2: rest = damaged_bytes(rng, rest)
    return struct.pack("<Q", len(raw) if rng.random() < .95 else rng.choice((0, 1, n, 2**63, len(raw) + 1))) + raw + rest


def damaged_zip(rng: random.Random, data: bytes) -> bytes:
    "The parts of an archive, most often its pickle; the directory is right."
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if rng.random() < .03 else zipfile.ZIP_STORED) as new:
        names = old.namelist()
        victim = next(n for n in names if n.endswith("data.pkl")) if rng.random() < .8 else rng.choice(names)
        for name in names:
            part = old.read(name)
            if name == victim:
                if rng.random() < .05: continue
                part = damaged_bytes(rng, part)
            new.writestr(zipfile.ZipInfo(name), part, new.compression) # not the time of today
    return buffer.getvalue()


def mutated(seed: int, i: int, valid: dict[str, bytes]) -> bytes:
    "Input number `i` of a seed."
    rng = random.Random(f"{seed} {i}")
    kind = rng.choice(list(valid))
    data = valid[kind]
    if rng.random() < .35: return damaged_bytes(rng, data)
    if kind in ("torch", "run"): return damaged_zip(rng, data)
    if kind in ("index", "config", "receipt"): return dumped(rng, damaged_json(rng, json.loads(data)))
    return damaged_bytes(rng, data) if kind == "old" else damaged_safetensors(rng, data)


# The driver

def in_child(seed: int, first: int, n: int, valid: dict[str, bytes], deadline: float) -> tuple[int, str | None, dict]:
    "Inputs `first` to `first + n` in a process of their own: how many were read, what was wrong with the next one, and counts of answers."
    there, here = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(there)
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + 2**30,) * 2)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            faulthandler.disable(); warnings.simplefilter("ignore")
            for i in range(first, first + n):
                if time.monotonic() > deadline: break
                signal.alarm(10)
                try: said = fuzz_one(mutated(seed, i, valid))
                except AssertionError as e: os.write(here, json.dumps([i, str(e)]).encode() + b"\n")
                else: os.write(here, json.dumps([i, None, sum(o == "read" for o in said.values())]).encode() + b"\n")
            os._exit(0)
        except BaseException: traceback.print_exc() # a fault of this program
        finally: os._exit(1)
    os.close(here)
    with open(there) as f: lines = [json.loads(line) for line in f if line.endswith("\n")]
    status = os.waitpid(pid, 0)[1]
    wrong = {i: why for i, why, *_ in lines if why}
    if os.WIFEXITED(status) and status: raise SystemExit(f"input {first + len(lines)} cannot be made or given to the readers")
    if status: wrong[first + len(lines)] = "no answer in ten seconds" if os.WTERMSIG(status) == signal.SIGALRM else f"killed by signal {os.WTERMSIG(status)}"
    return len(lines) + bool(status), wrong, sum(o[2] for o in lines if len(o) > 2)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--crashes", type=Path, default=Path("fuzz_crashes"))
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    valid, done, read, crashes, deadline = seeds(), 0, 0, {}, time.monotonic() + options.seconds
    while time.monotonic() < deadline:
        n, wrong, good = in_child(options.seed, done, 500, valid, deadline)
        for i, why in wrong.items():
            kind = why[:90]
            if kind not in crashes:
                options.crashes.mkdir(parents=True, exist_ok=True)
                (options.crashes / f"seed{options.seed}-{i}").write_bytes(mutated(options.seed, i, valid))
                print(f"input {i}: {why}", flush=True)
            crashes[kind] = crashes.get(kind, 0) + 1
        done, read = done + n, read + good
    print(f"seed {options.seed}: {done} inputs to {len(TARGETS)} readers, {read} read whole, {sum(crashes.values())} crashes of {len(crashes)} kinds" + (f", the first of each in {options.crashes}" if crashes else ""))
    return bool(crashes)


if __name__ == "__main__": sys.exit(main())
