"""Checkpoints of every kind against the libraries that write them, and everything that a damaged or hostile one may not do."""
import gc
import hashlib
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save, save_file
from torch import nn

from tsv_nb.scale import byte_files as bf
from tsv_nb.scale.byte_files import LocalFile
from tsv_nb.scale.checkpoints import Checkpoint, open_checkpoint
from tsv_nb.scale.safetensors_reader import DTYPES, SafetensorsReader


def bits(t): return t.contiguous().flatten().view(torch.uint8)


def numbers(dtype, shape, seed=0):
    "Random bits of a type, NaN and all."
    n = torch.Size(shape).numel()
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (n * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(dtype).view(shape) if n else torch.empty(shape, dtype=dtype)


def same(a, b): return a.dtype == b.dtype and a.shape == b.shape and bits(a).equal(bits(b))


def raw_file(header, data=b"\0" * 8, length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def entry(dtype="F32", shape=(2,), span=(0, 8)): return dict(dtype=dtype, shape=list(shape), data_offsets=list(span))


def one(name="w", **facts): return {name: entry(**facts)}


@pytest.fixture
def write(tmp_path):
    def write(data, name="bad.safetensors"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return path
    return write


def make_folder(path, parts, index=True, extra=None):
    "A folder of shards {file: {name: tensor}} with an index."
    path.mkdir(parents=True)
    for file, tensors in parts.items():
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (save_file if file.endswith(".safetensors") else torch.save)(tensors, path / file)
    if index: write_index(path, {k: file for file, part in parts.items() for k in part} | (extra or {}))
    return path


def write_index(path, weight_map, name="model.safetensors.index.json"):
    (path / name).write_text(weight_map if isinstance(weight_map, str) else json.dumps({"metadata": {"total_size": 1.5}, "weight_map": weight_map}))


# The library as an oracle

SHAPES = [(), (1,), (0,), (7,), (3, 5), (0, 4), (4, 0), (2, 3, 4), (1, 1, 1, 1), (5, 0, 2)]


@pytest.mark.parametrize("kind", DTYPES)
def test_every_type_and_shape_as_the_library_reads_it(kind, tmp_path):
    state = {f"t{i}": numbers(DTYPES[kind], shape, i) for i, shape in enumerate(SHAPES)}
    save_file(state, tmp_path / "a.safetensors", metadata={"made": "här"})
    reader = SafetensorsReader(tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as library:
        assert set(library.keys()) == set(reader.entries) and library.metadata() == reader.metadata
        for name in library.keys():
            ours = reader.read(name)
            assert same(ours, library.get_tensor(name)) and same(ours, state[name]) and ours.is_contiguous(), name
            assert reader.entries[name].shape == tuple(ours.shape) and reader.entries[name].nbytes == ours.nbytes
            blank = reader.entries[name].blank()
            assert (blank.shape, blank.dtype) == (ours.shape, ours.dtype) and blank.untyped_storage().nbytes() <= 8


def test_every_type_of_the_library_is_known():
    "It lists its types when it meets one that it does not know. What is missing here are those of which torch has none."
    try: load(raw_file(one(dtype="F33")))
    except Exception as e: known = set(re.findall(r"`([A-Z]+\d*(?:_\w+)?)`", str(e))) - {"F33"}
    assert known - set(DTYPES) <= {"F4", "F6_E2M3", "F6_E3M2"} and len(known) > 10


def test_a_tensor_has_memory_of_its_own(tmp_path):
    save_file({"a": torch.ones(3, 4), "b": torch.ones(5)}, tmp_path / "a.safetensors")
    c = open_checkpoint(tmp_path / "a.safetensors")
    first, second = c["a"], c["a"]
    assert first.untyped_storage().nbytes() == first.nbytes and first.data_ptr() != second.data_ptr()
    first += 1
    assert c["a"].equal(second)
    os.remove(tmp_path / "a.safetensors")
    assert first.sum() == 24 # no page of the file is behind it


def mutations(n):
    "Valid files, damaged in n ways: bits, cuts, and changes of the header as JSON."
    g = torch.Generator().manual_seed(1)
    def pick(k): return int(torch.randint(k, (1,), generator=g))
    base = save({"w": torch.ones(2, 3), "v": torch.ones(4, dtype=torch.bfloat16), "e": torch.zeros(0, 2), "n": torch.tensor(1, dtype=torch.uint8)}, metadata={"a": "b"})
    size = struct.unpack("<Q", base[:8])[0]
    values = [0, 1, -1, 2, 3, 6, 8, 24, 32, 33, 2**31, 2**62, 2**63, 2**64, 1.0, 1e3, True, None, "F32", "BF16", "F4", "", [], [0], [2, 3], [0, 0], [0, 24], [24, 32], [32, 33], [2**63, 2**63], {}, [-1, 24], "0"]
    for i in range(n):
        kind, data = i % 3, bytearray(base)
        if kind == 0:
            for _ in range(1 + pick(3)): data[pick(len(data) if i % 2 else size + 8)] ^= 1 << pick(8)
        elif kind == 1:
            at = pick(len(data)); data = data[:at] + (data[at + 1 + pick(8):] if i % 2 else b"")
        else:
            header = json.loads(base[8:8 + size]); name = ["w", "v", "e", "n"][pick(4)]
            field = ["dtype", "shape", "data_offsets", None][pick(4)]
            if field is None: header[name] = values[pick(len(values))] if i % 2 else header[["w", "v", "e", "n"][pick(4)]]
            else: header[name][field] = values[pick(len(values))]
            data = raw_file(header, base[8 + size:])
        yield bytes(data)


def test_what_the_library_refuses_is_refused_and_what_is_accepted_is_the_same(write):
    refused = accepted = 0
    for raw in mutations(1500):
        path = write(raw, "m.safetensors")
        try: theirs = load(raw)
        except Exception: theirs = None
        try:
            reader = SafetensorsReader(path)
            ours = {k: reader.read(k) for k in reader.entries}
        except ValueError as e:
            assert str(path) in str(e)
            ours, refused = None, refused + 1
        assert theirs is not None or ours is None, (raw, "accepted, and the library refuses it")
        if ours is not None:
            accepted += 1
            assert ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in ours)
    assert refused > 1000 and accepted > 20


# Malformed safetensors, each with its message

BAD = {
    "empty": (b"", "(it is empty)"), "three bytes": (b"abc", "it has 3 bytes, and the length of a header alone takes 8"), "eight bytes": (struct.pack("<Q", 0), "does not begin with {"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "pointer of Git LFS; run git lfs pull"), "html": (b"<!DOCTYPE html><html></html>", "it is a web page"), "text": (b"These are my notes.\n", "it is text"),
    "zip": (b"PK\x03\x04" + b"x" * 20, "it is a zip archive, as PyTorch writes them; name it .pt"), "pickle": (b"\x80\x02}q\x00(X\x01\0\0\0", "it is a pickle"), "gzip": (b"\x1f\x8b\x08\0abcdefgh", "it is compressed"), "gguf": (b"GGUF\x03\0\0\x01\0\0", "GGUF"),
    "2^63": (raw_file(one(), length=2**63), "would be 9223372036854775808 bytes long; the format allows 100000000"), "2^64-1": (raw_file(one(), length=2**64 - 1), "would be 18446744073709551615 bytes"), "above the limit": (raw_file(one(), length=100_000_001), "would be 100000001"),
    "beyond the file": (raw_file(one(), length=5000), "should be 5000 bytes long, and the whole file has"), "no json": (raw_file(b"{w: 1}  "), "header is not valid: Expecting property name"), "an array": (raw_file(b"[]"), "begin with {"), "a blank first": (raw_file(b' {"w":1}'), "begin with {"),
    "not utf-8": (raw_file(b'{"\xff\xfe": 1}'), "byte 2 is not UTF-8"), "overlong utf-8": (raw_file(b'{"\xc0\x80": 1}'), "is not UTF-8"), "nested": (raw_file(b'{"a":' * 50_000), "nested too deeply"), "twice": (raw_file(b'{"w":{},"w":{}}'), "'w' is there twice"),
    "field twice": (raw_file(b'{"w":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'), "'dtype' is there twice"), "metadata twice": (raw_file(b'{"__metadata__":{},"__metadata__":{}}'), "'__metadata__' is there twice"), "NUL": (raw_file(one("a\0b")), "control characters"), "escape": (raw_file(one("\x1b[2J")), "control characters"),
    "surrogate": (raw_file(b'{"\\ud83d": {}}'), "half of a character"), "NaN": (raw_file(b'{"w": NaN}'), "NaN is no number"), "metadata": (raw_file({"__metadata__": {"a": 1}} | one()), "metadata should be texts"), "metadata list": (raw_file({"__metadata__": []} | one()), "metadata should be texts"),
    "facts no object": (raw_file({"w": 3}), "should have dtype, shape and data_offsets"), "facts missing": (raw_file({"w": {"dtype": "F32"}}), "should have dtype, shape and data_offsets"), "facts too many": (raw_file({"w": entry() | {"strides": [1]}}), "and nothing else"),
    "type": (raw_file(one(dtype="F33")), "type 'F33', which is not supported; known: BOOL"), "type of case": (raw_file(one(dtype="f32")), "type 'f32'"), "type a number": (raw_file(one(dtype=32)), "type '32'"), "type of bits": (raw_file(one(dtype="F4")), "type 'F4'"),
    "negative": (raw_file(one(shape=[-2])), "shape [-2]; expected up to 64 whole numbers, none negative"), "minus zero": (raw_file(b'{"w":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}', b""), "-0 is no whole number"), "fraction": (raw_file(one(shape=[2.0])), "shape [2.0]"), "true": (raw_file(one(shape=[True, 2])), "shape [True, 2]"),
    "text": (raw_file(one(shape="2")), "shape"), "nested shape": (raw_file(one(shape=[[2]])), "shape [[2]]"), "many axes": (raw_file(one(shape=[1] * 65 + [2])), "up to 64"), "huge": (raw_file(one(shape=[2**62, 2**62])), "impossible shape"), "huge and empty": (raw_file(one(shape=[0, 2**62, 2**62], span=(0, 0)), b""), "impossible shape"),
    "digits": (raw_file(b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,8]}}'), "not valid"), "shape": (raw_file(one(shape=[3])), "takes 12 bytes (F32 of shape [3]), but its offsets hold 8"), "zero": (raw_file(one(shape=[0])), "takes 0 bytes"),
    "backwards": (raw_file(one(span=(8, 0))), "offsets [8, 0]; expected two whole numbers"), "offsets of three": (raw_file(one(span=(0, 4, 8))), "offsets [0, 4, 8]"), "negative offset": (raw_file(one(span=(-8, 0))), "offsets [-8, 0]"), "offset 2^63": (raw_file(one(span=(2**63, 2**63 + 8))), "offsets [9223372036854775808"),
    "overlap": (raw_file(one() | one("v", span=(4, 12)), b"\0" * 12), "tensors 'w' and 'v' overlap"), "the same bytes": (raw_file(one() | one("v")), "overlap"), "hole": (raw_file(one(span=(4, 12)), b"\0" * 12), "hole of 4 bytes before tensor 'w'"), "hole between": (raw_file(one() | one("v", span=(12, 20)), b"\0" * 20), "hole of 4 bytes before tensor 'v'"),
    "out of the file": (raw_file(one(span=(0, 8)), b"\0" * 7), "it was cut off"), "far out": (raw_file(one(span=(2**40, 2**40 + 8))), "it was cut off"), "appended": (raw_file(one(), b"\0" * 9), "1 bytes at its end belong to no tensor"), "empty tensor in a tensor": (raw_file(one() | one("e", shape=[0], span=(4, 4))), "overlap"),
}


@pytest.mark.parametrize("what", BAD)
def test_malformed_files(what, write):
    raw, message = BAD[what]
    path = write(raw)
    with pytest.raises(ValueError) as e: open_checkpoint(path)
    assert message in str(e.value) and str(e.value).startswith(f"{str(path)!r} is damaged") and len(str(e.value)) < 800
    url = f"memory://bad/{hashlib.sha256(raw).hexdigest()}.safetensors"
    fsspec.filesystem("memory").pipe_file(url.removeprefix("memory:/"), raw)
    with pytest.raises(ValueError) as far: open_checkpoint(url)
    assert message in str(far.value) and url in str(far.value)


def test_a_cut_at_every_byte_is_refused(write):
    whole = save({"w": torch.ones(2, 3), "e": torch.zeros(0), "n": torch.tensor(1.)})
    for size in range(len(whole)):
        with pytest.raises(ValueError, match="bad.safetensors' is damaged"): open_checkpoint(write(whole[:size]))


def test_the_length_of_a_header_may_look_like_another_format(write):
    "640 bytes begin like a pickle, 19280 like a zip archive, 60 like a web page."
    for n in (640, 19280, 60, 0x8b1f):
        raw = json.dumps(one()).encode().ljust(n)
        raw = raw if len(raw) == n else json.dumps(one(shape=(2,))).encode().replace(b" ", b"").ljust(n)
        for name in ("a.safetensors", "without_ending"): assert same(open_checkpoint(write(struct.pack("<Q", n) + raw + b"\0" * 8, name))["w"], torch.zeros(2))


def test_unused_bytes_can_be_allowed_and_overlaps_cannot(write):
    hole = write(raw_file(one(span=(4, 12)), b"\0\0\0\0\0\0\x80?\0\0\0\0 more"))
    assert open_checkpoint(hole, strict=False)["w"].tolist() == [1, 0]
    with pytest.raises(ValueError, match="overlap"): open_checkpoint(write(BAD["overlap"][0]), strict=False)
    with pytest.raises(ValueError, match="cut off"): open_checkpoint(write(BAD["out of the file"][0]), strict=False)


def test_a_file_without_tensors_is_no_checkpoint(write):
    for raw in (raw_file({}, b""), raw_file({"__metadata__": {"a": "b"}}, b""), raw_file({"__metadata__": None}, b"")):
        with pytest.raises(ValueError, match="holds no tensors"): open_checkpoint(write(raw))


def test_nothing_large_is_asked_for(write):
    "A header of 2^63 bytes, a tensor of a petabyte: refused before memory is asked for."
    import resource
    code = f"""
import resource, sys
from tsv_nb.scale.checkpoints import open_checkpoint
resource.setrlimit(resource.RLIMIT_AS, (int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize() + 2**24,) * 2)
for path in sys.argv[1:]:
    try: open_checkpoint(path)
    except ValueError as e: print('refused')
"""
    paths = [write(BAD[what][0], f"{i}.safetensors") for i, what in enumerate(("2^63", "huge", "far out", "above the limit", "offset 2^63"))]
    done = subprocess.run([sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True)
    assert done.stdout.split() == ["refused"] * 5, done.stderr[-2000:]


# Files that change, and files that cannot be read

def test_changes_are_noticed(tmp_path):
    path, w = tmp_path / "a.safetensors", torch.ones(1000)
    def fresh(): save_file({"w": w, "v": w + 1}, path); return open_checkpoint(path)
    def later(): os.utime(path, ns=(1, os.stat(path).st_mtime_ns + 1))
    def rename(): save_file({"w": w + 1, "v": w}, tmp_path / "b"); os.utime(tmp_path / "b", ns=(1, os.stat(path).st_mtime_ns)); os.replace(tmp_path / "b", path)
    for change in (later, rename, lambda: os.truncate(path, 5000), lambda: os.truncate(path, 0), lambda: os.remove(path), lambda: (os.remove(path), os.mkdir(path)), lambda: path.open("ab").write(b"x")):
        c = fresh(); assert c["w"].equal(w); c.check_unchanged(); sent = pickle.dumps(c)
        change()
        with pytest.raises(ValueError, match="a.safetensors' (has changed since it was opened|is a folder)"): c["w"]
        with pytest.raises(ValueError, match="a.safetensors' (has changed since it was opened|is a folder)"): c.check_unchanged()
        if change is rename: continue # the same size, time and header: only the inode is another, and a restart cannot know that
        with pytest.raises((ValueError, FileNotFoundError), match="a.safetensors"): pickle.loads(sent)
        if path.is_dir(): path.rmdir()


def test_a_change_during_a_read_is_noticed(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.zeros(1000)}, path)
    c, read = open_checkpoint(path), bf._read_at
    def torn(fd, view, start): # a program writes between two reads
        n = read(fd, view[:1000], start)
        with path.open("r+b") as f: f.seek(-4, 2); f.write(b"\1\2\3\4")
        os.utime(path, ns=(1, 1))
        return n
    monkeypatch.setattr(bf, "_read_at", torn)
    with pytest.raises(ValueError, match="has changed since it was opened"): c["w"]


def test_short_reads_and_errors_of_the_disk(tmp_path, monkeypatch):
    path, w = tmp_path / "a.safetensors", torch.arange(1000.)
    save_file({"w": w}, path)
    c, read = open_checkpoint(path), bf._read_at
    monkeypatch.setattr(bf, "_read_at", lambda fd, view, start: read(fd, view[:7], start)) # few bytes at a time are no error
    assert c["w"].equal(w)
    monkeypatch.setattr(bf, "_read_at", lambda fd, view, start: 0 if start > 2000 else read(fd, view[:512], start)) # a file system that lies about the size
    with pytest.raises(ValueError, match="a.safetensors' is damaged.*it ends at byte"): c["w"]
    def broken(fd, view, start): raise OSError(5, "Input/output error")
    monkeypatch.setattr(bf, "_read_at", broken)
    with pytest.raises(OSError, match=r"a.safetensors' cannot be read at byte \d+: Input/output error") as e: c["w"]
    assert e.value.errno == 5


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="needs users")
def test_permissions(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(2)}, path); os.chmod(path, 0)
    pid_code = f"""
import os, sys
from tsv_nb.scale.checkpoints import open_checkpoint
if os.geteuid() == 0: os.setuid(65534)
try: open_checkpoint({str(path)!r})
except PermissionError as e: print('refused', e)
"""
    for p in (tmp_path, *tmp_path.parents):
        if p.owner() == path.owner() and p != Path("/") and p != Path("/tmp"): os.chmod(p, 0o755)
    done = subprocess.run([sys.executable, "-c", pid_code], capture_output=True, text=True)
    assert "refused" in done.stdout and "a.safetensors' cannot be opened: Permission denied" in done.stdout, done.stderr[-2000:]


def test_things_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors"); (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="pipe.safetensors' is a device or pipe"): open_checkpoint(tmp_path / "pipe.safetensors")
    with pytest.raises(ValueError, match="'/dev/zero' is a device"): open_checkpoint("/dev/zero")
    with pytest.raises(FileNotFoundError, match="no weights in folder .*empty"): open_checkpoint(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*gone.safetensors"): open_checkpoint(tmp_path / "gone.safetensors")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"): open_checkpoint(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="no checkpoint at 'meta-llama/Llama-3.1-8B'; check the path.*hf download meta-llama/Llama-3.1-8B --local-dir Llama-3.1-8B"): open_checkpoint("meta-llama/Llama-3.1-8B")
    with pytest.raises(ValueError, match="null"): open_checkpoint(str(tmp_path / "a\0b.safetensors"))
    os.symlink("loop.safetensors", tmp_path / "loop.safetensors")
    with pytest.raises(OSError, match="loop.safetensors"): open_checkpoint(tmp_path / "loop.safetensors")
    for wrong in (3, None, [1], b"a"):
        with pytest.raises(TypeError, match="a path, an address, a model or a dict"): open_checkpoint(wrong)


def test_descriptors_are_few_and_given_back(tmp_path, monkeypatch):
    for i in range(12): save_file({f"w{i}": torch.full((3,), float(i))}, tmp_path / f"model-{i}.safetensors")
    gc.collect()
    monkeypatch.setattr(LocalFile, "most_held", LocalFile.held[0] + 4)
    before = set(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else None
    c = open_checkpoint(tmp_path)
    assert sum(r.file.fd is not None for r in c.readers) == 4
    for _ in range(2): assert all(c[f"w{i}"][0] == i for i in range(12))
    if before is not None: assert len(os.listdir("/proc/self/fd")) - len(before) == 4
    held = LocalFile.held[0]
    del c; gc.collect()
    assert LocalFile.held[0] == held - 4
    if before is not None: assert len(os.listdir("/proc/self/fd")) == len(before)


def test_threads_and_forks_read_the_same_file(tmp_path):
    state = {f"w{i}": torch.full((2000,), float(i)) for i in range(50)}
    save_file(state, tmp_path / "a.safetensors")
    c, wrong = open_checkpoint(tmp_path / "a.safetensors"), []
    def read():
        for _ in range(5): wrong.extend(k for k in state if not c[k].equal(state[k]))
    threads = [threading.Thread(target=read) for _ in range(4)]
    for t in threads: t.start()
    pid = os.fork()
    if not pid:
        try: ok = all(bytes(c[k].numpy()[:1]) == bytes(state[k].numpy()[:1]) for k in state)
        finally: os._exit(0 if ok else 1)
    for t in threads: t.join()
    assert not wrong and os.waitpid(pid, 0)[1] == 0


def test_a_hundred_thousand_tensors(tmp_path):
    "Seconds, one descriptor. The limits are wide because other tests run beside this one."
    import time
    state = {f"block.{i}.scale": torch.tensor([float(i)]) for i in range(100_000)}
    save_file(state, tmp_path / "a.safetensors")
    start = time.process_time()
    c = open_checkpoint(tmp_path / "a.safetensors")
    opened = time.process_time()
    total = sum(c.nbytes(k) for k in c), c.header("block.7.scale").shape, len(c.fingerprint()["files"])
    assert sum(float(c[k]) for k in c) == sum(range(100_000)) and total == (400_000, (1,), 1)
    assert opened - start < 20 and time.process_time() - opened < 40


# Folders and indexes

PARTS = {"model-00001-of-00002.safetensors": {"a": torch.ones(2, 3), "b": torch.zeros(2, dtype=torch.bfloat16)}, "model-00002-of-00002.safetensors": {"c": torch.arange(4)}}
ALL = {k: t for part in PARTS.values() for k, t in part.items()}


def test_folders_of_shards(tmp_path):
    folder = make_folder(tmp_path / "m", PARTS)
    for source in (folder, str(folder), str(folder) + "/", folder / "model.safetensors.index.json", f"file://{folder}"):
        c = open_checkpoint(source)
        assert set(c) == set(ALL) and all(same(c[k], t) for k, t in ALL.items()) and len(c.files) == 2 and all(os.path.isabs(f) for f in c.files) and c.total_bytes == sum(t.nbytes for t in ALL.values())
        assert "a" in c and "x" not in c and 3 not in c and c.index and len(c) == 3 and c.tied == {}
        with pytest.raises(KeyError): c["x"]
    assert set(c.fingerprint()["files"]) == set(PARTS) and json.loads(json.dumps(c.fingerprint())) == c.fingerprint()


def test_relative_paths_survive_a_change_of_folder(tmp_path, monkeypatch):
    make_folder(tmp_path / "m", PARTS); (tmp_path / "m" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    c = open_checkpoint("m"); sent = pickle.dumps(c)
    here = open_checkpoint("m/model.safetensors.index.json")
    assert c.where == "'m'" and c.companions() == [str(tmp_path / "m" / "config.json")]
    monkeypatch.chdir(tmp_path / "m")
    assert same(c["c"], ALL["c"]) and same(pickle.loads(sent)["c"], ALL["c"]) and same(open_checkpoint("model.safetensors.index.json")["a"], ALL["a"]) and same(open_checkpoint(".")["a"], ALL["a"]) and same(here["a"], ALL["a"])


def test_shards_without_an_index_and_in_subfolders(tmp_path):
    assert set(open_checkpoint(make_folder(tmp_path / "plain", PARTS, index=False))) == set(ALL)
    c = open_checkpoint(make_folder(tmp_path / "sub", {"weights/" + k: v for k, v in PARTS.items()}))
    assert same(c["c"], ALL["c"]) and list(c.fingerprint()["files"])[0].startswith("weights/")
    for ending in ("bin", "pt", "pth"):
        folder = make_folder(tmp_path / ending, {k.replace("safetensors", ending): v for k, v in PARTS.items()}, index=False)
        torch.save({"state": 1}, folder / "optimizer.pt"); torch.save([1], folder / "training_args.bin")
        assert all(same(open_checkpoint(folder)[k], t) for k, t in ALL.items())
    folder = make_folder(tmp_path / "binindex", {k.replace("safetensors", "bin"): v for k, v in PARTS.items()}, index=False)
    write_index(folder, {k: f.replace("safetensors", "bin") for f, part in PARTS.items() for k in part}, "pytorch_model.bin.index.json")
    assert all(same(open_checkpoint(folder)[k], t) for k, t in ALL.items()) and open_checkpoint(folder).index


@pytest.mark.parametrize("member", ["../out.safetensors", "x/../../out.safetensors", "/etc/out.safetensors", "..", ".", "", "./model-00001-of-00002.safetensors", "a//b.safetensors", "a/", r"..\out.safetensors", r"a\b.safetensors", r"C:\out.safetensors",
                                    "C:out.safetensors", "a\0.safetensors", "a\n.safetensors", "//host/out.safetensors", "s3://bucket/out.safetensors", "%2e%2e/out.safetensors", "a?.safetensors", 3, None, ["a"]])
def test_paths_of_an_index_stay_inside(member, tmp_path):
    folder = make_folder(tmp_path / "m", PARTS, extra={"x": member})
    save_file({"x": torch.ones(1)}, tmp_path / "out.safetensors")
    for strict in (True, False):
        with pytest.raises(ValueError, match="model.safetensors.index.json' is damaged.*no plain path inside its folder"): open_checkpoint(folder, strict)


@pytest.mark.parametrize("text, message", [
    ("", "not a checkpoint"), ("[]", "no weight_map"), ("{}", "no weight_map"), ('{"weight_map": []}', "no weight_map"), ('{"weight_map": {}}', "no weight_map"), ('{"weight_map": {"w": "a.safetensors"}', "Expecting"), ('{"weight_map": {"w": "a.bin", "w": "b.bin"}}', "'w' is there twice"),
    ('{"weight_map": {"w": "a.py"}}', "'a.py', which is no file of weights"), ('{"weight_map": {"w": "a.pkl"}}', "no file of weights"), ('{"weight_map": {"a\\u0000": "a.bin"}}', "control characters"), ('{"weight_map": {"\\ud800": "a.bin"}}', "half of a character"), ("[" * 100_000, "nested too deeply"), ("\xff", "UTF-8"), ('{"a": NaN}', "NaN")])
def test_malformed_indexes(text, message, tmp_path):
    folder = make_folder(tmp_path / "m", PARTS, index=False)
    (folder / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    for source in (folder, folder / "model.safetensors.index.json"):
        with pytest.raises(ValueError, match="model.safetensors.index.json' is damaged") as e: open_checkpoint(source)
        assert message in str(e.value)


def test_indexes_that_do_not_fit_their_shards(tmp_path):
    one, two = PARTS
    folder = make_folder(tmp_path / "m", PARTS)
    good = {k: f for f, part in PARTS.items() for k in part}
    for weight_map, message in ((good | {"a": two}, f"tensor 'a' should be in '{two}' and is not"), (good | {"x": one}, "tensor 'x' should be in"), ({"a": one, "c": two}, r"1 tensors of the shards are not in the index \(the first: 'b'\); .*remove the index")):
        write_index(folder, weight_map)
        with pytest.raises(ValueError, match=message): open_checkpoint(folder)
    assert set(open_checkpoint(folder, strict=False)) == {"a", "c"}
    write_index(folder, good | {"d": "model-00003-of-00003.safetensors"})
    with pytest.raises(FileNotFoundError, match="model-00003-of-00003.safetensors"): open_checkpoint(folder)
    write_index(folder, good); save_file(PARTS[two] | {"a": torch.zeros(9)}, folder / two)
    with pytest.raises(ValueError, match=f"tensor 'a' is in two files, .*{one}' and .*{two}'"): open_checkpoint(folder)
    assert same(open_checkpoint(folder, strict=False)["a"], ALL["a"]) # the index decides
    os.remove(folder / "model.safetensors.index.json")
    with pytest.raises(ValueError, match="tensor 'a' is in two files"): open_checkpoint(folder, strict=False)
    os.remove(folder / one)
    with pytest.raises(FileNotFoundError, match="lacks 1 of 2 shards, the first of them number 1"): open_checkpoint(folder)


def test_a_changed_index_is_a_changed_checkpoint(tmp_path):
    folder = make_folder(tmp_path / "m", PARTS)
    c = open_checkpoint(folder); sent = pickle.dumps(c)
    (folder / "model.safetensors.index.json").write_text((folder / "model.safetensors.index.json").read_text() + " ")
    with pytest.raises(ValueError, match="index.json' has changed"): c.check_unchanged()
    with pytest.raises(ValueError, match="its index has changed"): pickle.loads(sent)


def test_links(tmp_path):
    outside = make_folder(tmp_path / "outside", PARTS)
    folder, (one, two) = make_folder(tmp_path / "m", PARTS), PARTS
    (folder / "inner").mkdir(); os.replace(folder / one, folder / "inner" / one); os.symlink(f"inner/{one}", folder / one)
    assert same(open_checkpoint(folder)["a"], ALL["a"]) # stays inside
    os.symlink(folder, tmp_path / "alias")
    assert same(open_checkpoint(tmp_path / "alias")["a"], ALL["a"]) # what the caller names is the caller's choice
    os.symlink(outside / one, tmp_path / "file.safetensors")
    assert same(open_checkpoint(tmp_path / "file.safetensors")["a"], ALL["a"])
    os.remove(folder / two); os.symlink(outside / two, folder / two)
    with pytest.raises(ValueError, match=f"{two}' is a symbolic link to .*outside.*out of its folder; copy the folder with the files its links lead to .cp -rL.,"): open_checkpoint(folder)
    assert same(open_checkpoint(folder, strict=False)["c"], ALL["c"])
    os.remove(folder / two); os.symlink(two, folder / two)
    with pytest.raises(ValueError, match="leads to itself|out of its folder|cannot"): open_checkpoint(folder)
    folder = make_folder(tmp_path / "linked", {"sub/" + k: v for k, v in PARTS.items()})
    os.rename(folder / "sub", tmp_path / "elsewhere"); os.symlink(tmp_path / "elsewhere", folder / "sub")
    with pytest.raises(ValueError, match="out of its folder"): open_checkpoint(folder)
    os.remove(tmp_path / "m" / "model.safetensors.index.json"); os.symlink(outside / "model.safetensors.index.json", tmp_path / "m" / "model.safetensors.index.json")
    with pytest.raises(ValueError, match="index.json' is a symbolic link"): open_checkpoint(tmp_path / "m")


def test_the_cache_of_the_hub(tmp_path):
    "Links from snapshots to blobs are how huggingface_hub keeps files; links elsewhere are not."
    repo, snapshot = tmp_path / "models--a--b", tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    made = make_folder(tmp_path / "made", PARTS); (made / "config.json").write_text("{}")
    (repo / "blobs").mkdir(parents=True); snapshot.mkdir(parents=True)
    for file in made.iterdir():
        blob = hashlib.sha256(file.name.encode()).hexdigest()
        os.replace(file, repo / "blobs" / blob); os.symlink(f"../../blobs/{blob}", snapshot / file.name)
    c = open_checkpoint(snapshot)
    assert all(same(c[k], t) for k, t in ALL.items()) and [os.path.basename(o) for o in c.companions()] == ["config.json"]
    (tmp_path / "blobs").mkdir(); (tmp_path / "blobs" / "x").write_text("secret"); os.symlink("../../../blobs/x", snapshot / "tokenizer.json")
    with pytest.raises(ValueError, match="tokenizer.json' is a symbolic link"): c.companions()


def test_companions(tmp_path):
    folder = make_folder(tmp_path / "m", PARTS)
    copied = ["LICENSE", "chat_template.jinja", "config.json", "generation_config.json", "merges.txt", "preprocessor_config.json", "special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt"]
    others = ["modeling_x.py", "tokenization_x.py", "tokenizer.py", "README.md", "model.fp16.bin", "tf_model.h5", "flax_model.msgpack", "optimizer.pt", "adapter_config.json", "adapter_model.safetensors", "tsv_report.json", ".gitattributes", ".hidden.json", "pytorch_model.bin.index.json", "eval_results.json", "trainer_state.json", "a.onnx", "tokenizer.pkl", "vocab.npz"]
    for name in copied + others: (folder / name).write_bytes(b"x")
    (folder / "onnx").mkdir(); (folder / "onnx" / "config.json").write_text("{}"); (folder / "sub.json").mkdir()
    c = open_checkpoint(folder)
    assert [os.path.basename(o) for o in c.companions()] == sorted(copied) and c.ignored() == ["adapter_model.safetensors", "model.fp16.bin"]
    assert open_checkpoint(folder / next(iter(PARTS))).companions() == [] == open_checkpoint(ALL).companions() # a shard is not the model


@pytest.mark.parametrize("config", ["config.json", "open_clip_config.json"])
def test_the_file_of_a_folder_has_its_companions(tmp_path, config, monkeypatch):
    folder = tmp_path / "m"
    folder.mkdir()
    for name in (config, "tokenizer.json", "README.md"): (folder / name).write_text("{}")
    save_file(ALL, folder / "model.safetensors")
    def beside(path): return [os.path.relpath(o, folder) for o in open_checkpoint(path).companions()]
    monkeypatch.chdir(folder)
    for path in (folder, folder / "model.safetensors", "model.safetensors", f"file://{folder}/model.safetensors"): assert beside(path) == sorted([config, "tokenizer.json"])
    save_file(ALL, folder / "fp16.safetensors")
    assert beside(folder / "fp16.safetensors") == [] and len(beside(folder / "model.safetensors")) == 2 # not what the folder is opened as
    (folder / config).unlink()
    assert beside(folder / "model.safetensors") == [] # no folder of a model


# Addresses

def test_addresses(tmp_path):
    fs, (one, two) = fsspec.filesystem("memory"), PARTS
    folder = make_folder(tmp_path / "m", PARTS); (folder / "config.json").write_text("{}")
    for file in folder.iterdir(): fs.pipe_file(f"/far/m/{file.name}", file.read_bytes())
    for file in PARTS: fs.pipe_file(f"/far/plain/{file}", (folder / file).read_bytes())
    for source in ("memory://far/m", "memory://far/m/", "memory://far/m/model.safetensors.index.json", "memory://far/plain"):
        c = open_checkpoint(source)
        assert all(same(c[k], t) for k, t in ALL.items()) and len(c.files) == 2 and c.files[0].startswith("memory://far/"), source
        assert json.loads(json.dumps(c.fingerprint())) == c.fingerprint() and same(pickle.loads(pickle.dumps(c))["c"], ALL["c"])
    assert open_checkpoint("memory://far/m").companions() == ["memory://far/m/config.json"]
    c = open_checkpoint(f"memory://far/m/{two}"); assert same(c["c"], ALL["c"])
    fs.pipe_file(f"/far/m/{two}", (folder / two).read_bytes())
    with pytest.raises(ValueError, match=f"{two}' has changed"): c["c"]
    fs.rm(f"/far/m/{two}")
    with pytest.raises(ValueError, match=f"{two}' has changed|no checkpoint"): c["c"]
    with pytest.raises(FileNotFoundError, match="no checkpoint at 'memory://far/m/model-00002"): open_checkpoint("memory://far/m")
    with pytest.raises(FileNotFoundError, match="no folder at 'memory://far/nothing'"): open_checkpoint("memory://far/nothing")
    with pytest.raises(FileNotFoundError, match="memory://far/gone.safetensors"): open_checkpoint("memory://far/gone.safetensors")
    with pytest.raises(ValueError, match="nowhere://.* cannot be opened"): open_checkpoint("nowhere://far/gone.safetensors")
    with pytest.raises(ValueError, match="PyTorch files are not read from an address"): open_checkpoint("memory://far/model.pt")
    fs.pipe_file("/far/esc/model.safetensors.index.json", json.dumps({"weight_map": {"w": f"../m/{one}"}}).encode())
    with pytest.raises(ValueError, match="no plain path inside its folder"): open_checkpoint("memory://far/esc")


def test_large_tensors_come_in_pieces_and_short_answers_are_errors(tmp_path, monkeypatch):
    fs, w = fsspec.filesystem("memory"), torch.arange(100_000)
    fs.pipe_file("/far/big.safetensors", save({"w": w}))
    monkeypatch.setattr(bf.ByteFile, "piece", 1000)
    c = open_checkpoint("memory://far/big.safetensors")
    assert c["w"].equal(w)
    monkeypatch.setattr(type(fs), "cat_file", lambda self, path, start=None, end=None, **k: b"")
    with pytest.raises(ValueError, match="big.safetensors' is damaged.*it ends at byte"): c["w"]
    def down(self, path, start=None, end=None, **k): raise TimeoutError("no answer")
    monkeypatch.setattr(type(fs), "cat_file", down)
    with pytest.raises(OSError, match="big.safetensors' cannot be read .TimeoutError: no answer"): c["w"]


# PyTorch files

@pytest.mark.parametrize("kind", DTYPES)
def test_every_type_in_a_torch_file(kind, tmp_path):
    state = {f"t{i}": numbers(DTYPES[kind], shape, i) for i, shape in enumerate(SHAPES)}
    wide = numbers(DTYPES[kind], (6, 8), 99)
    state |= {"view": wide[1:4, 2:7:2], "transposed": wide.T, "column": wide[:, 3], "last": wide[5, 7]}
    torch.save(state, tmp_path / "a.pt")
    c, theirs = open_checkpoint(tmp_path / "a.pt"), torch.load(tmp_path / "a.pt", weights_only=True)
    for name, t in theirs.items():
        ours = c[name]
        assert same(ours, t) and ours.is_contiguous() and ours.untyped_storage().nbytes() == t.nbytes and (c.header(name).shape, c.header(name).dtype, c.nbytes(name)) == (t.shape, t.dtype, t.nbytes), name


def test_torch_files_of_all_sorts(tmp_path):
    lin = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    state = lin.state_dict()
    saved = {"state": state, "parameters": dict(lin.named_parameters()), "run": {"state_dict": state, "epoch": 3, "optimizer": {"lr": .1}}, "model": {"model": state, "args": None}, "texts": state | {"name": "x", "step": 3}}
    for name, what in saved.items():
        for old in (False, True):
            torch.save(what, tmp_path / f"{name}{old}.pt", _use_new_zipfile_serialization=not old)
            c = open_checkpoint(tmp_path / f"{name}{old}.pt")
            expected = {k: t for k, t in state.items() if name != "parameters" or k in dict(lin.named_parameters())}
            assert set(c) == set(expected) and all(same(c[k], t) for k, t in expected.items()) and not any(c[k].requires_grad for k in c), (name, old)
            assert c.nbytes_held == 0
    os.replace(tmp_path / "stateFalse.pt", tmp_path / "checkpoint") # no ending
    assert same(open_checkpoint(tmp_path / "checkpoint")["0.weight"], state["0.weight"])


def test_tied_weights(tmp_path):
    w, v = torch.ones(3, 2), torch.zeros(4)
    state = {"emb": w, "head": w, "other": w.clone(), "view": w[:2], "v": v, "v2": v.view(2, 2), "v3": v, "e": torch.zeros(0), "e2": torch.zeros(0)}
    for old in (False, True):
        torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
        c = open_checkpoint(tmp_path / "a.pt")
        assert c.tied == {"head": "emb", "v3": "v"} and set(c) == set(state) and all(same(c[k], t) for k, t in state.items())
        assert c.total_bytes == sum(c.nbytes(k) for k in c) - w.nbytes - v.nbytes
    memory = open_checkpoint(state)
    assert memory.tied == c.tied and pickle.loads(pickle.dumps(memory)).tied == c.tied and memory.nbytes_held == 2 * w.nbytes + v.nbytes


class Trap:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (self.path,)


def rezip(path, change, method=zipfile.ZIP_STORED):
    "The archive with some records changed: change(name, bytes) -> bytes or None."
    with zipfile.ZipFile(path) as old: parts = [(o.filename, old.read(o)) for o in old.infolist()]
    with zipfile.ZipFile(path, "w", method) as new:
        for name, data in parts:
            data = change(name.partition("/")[2], data)
            if data is not None: new.writestr(name, data)
    return path


def test_malformed_torch_files(tmp_path, write):
    def fresh(state={"w": torch.arange(6.).view(2, 3), "v": torch.ones(3)}): torch.save(state, tmp_path / "a.pt"); return tmp_path / "a.pt"
    trap = tmp_path / "the_trap_went_off"
    cases = {"program": (fresh({"w": torch.ones(2), "t": Trap(str(trap))}), r"mkdir\), not only tensors. Opening it could run any code")}
    with pytest.raises(ValueError, match=cases["program"][1]): open_checkpoint(cases["program"][0])
    for what, path, message in (
            ("module", lambda: fresh(nn.Linear(2, 2)), "torch.nn.modules.linear.Linear.*could run any code"), ("list", lambda: fresh([torch.ones(2)]), "no state dict but a list"), ("no tensors", lambda: fresh({"a": 1}), "no state dict but a dict without tensors"),
            ("number as name", lambda: fresh({0: torch.ones(2)}), "name '0' of a tensor is no text"), ("NUL", lambda: fresh({"a\0": torch.ones(2)}), "control characters"), ("sparse", lambda: fresh({"w": torch.eye(3).to_sparse()}), "."), ("conjugate", lambda: fresh({"w": torch.ones(2, dtype=torch.complex64).conj()}), "unusual way"),
            ("expanded", lambda: fresh({"w": torch.ones(1).expand(10**9)}), "would have 4000000000 bytes, more than the file"), ("compressed", lambda: rezip(fresh(), lambda n, d: d, zipfile.ZIP_DEFLATED), "is compressed or encrypted"), ("no pickle", lambda: rezip(fresh(), lambda n, d: None if n == "data.pkl" else d), "without data.pkl"),
            ("no storage", lambda: rezip(fresh(), lambda n, d: None if n == "data/0" else d), "storage '0' should have 24 bytes and has none"), ("short storage", lambda: rezip(fresh(), lambda n, d: d[:-1] if n == "data/0" else d), "should have 24 bytes and has 23"), ("big-endian", lambda: rezip(fresh(), lambda n, d: b"big" if n == "byteorder" else d), "byte order"),
            ("script", lambda: rezip(fresh(), lambda n, d: d + b"" if n != "version" else d) and add(tmp_path / "a.pt", "a/constants.pkl"), "TorchScript.*could run any code"), ("twice", lambda: add(fresh(), "b/data.pkl"), "is there twice"), ("empty", lambda: write(b"", "a.pt"), "it is empty"),
            ("text", lambda: write(b"hello", "a.pt"), "neither a zip archive nor a pickle"), ("half a pickle", lambda: write(b"\x80\x02}q\0", "a.pt"), "is damaged"), ("zip of nothing", lambda: write(b"PK\x03\x04", "a.pt"), "is damaged"), ("safetensors", lambda: write(save({"w": torch.ones(2)}), "a.pt"), "neither a zip archive nor a pickle")):
        with pytest.raises(ValueError, match=message) as e: open_checkpoint(path())
        assert "a.pt'" in str(e.value), what
    assert not trap.exists()


def test_refusing_sparse_tensors_leaves_nothing_for_torch_load(tmp_path):
    "PyTorch keeps a list of the sparse tensors to look at after loading; ours have no numbers and must not stay in it."
    torch.save({"w": torch.eye(3).to_sparse(), "v": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt'.*sparse"): open_checkpoint(tmp_path / "a.pt")
    torch.save({"v": torch.ones(2)}, tmp_path / "b.pt")
    assert torch.load(tmp_path / "b.pt", weights_only=True)["v"].sum() == 2


def add(path, name, data=b"x"):
    with zipfile.ZipFile(path, "a") as z: z.writestr(name, data)
    return path


def test_records_that_overlap(tmp_path):
    "Two records of one archive that lie over another: the directory says that the second begins inside the first."
    torch.save({"w": torch.arange(100.), "v": torch.arange(100.)}, tmp_path / "a.pt")
    raw = bytearray((tmp_path / "a.pt").read_bytes())
    with zipfile.ZipFile(tmp_path / "a.pt") as z: a, b = (z.getinfo(f"a/data/{i}") for i in range(2))
    at = raw.rindex(b"a/data/1") - 46 # its entry in the central directory
    assert raw[at:at + 4] == b"PK\x01\x02"
    struct.pack_into("<I", raw, at + 42, a.header_offset)
    (tmp_path / "a.pt").write_bytes(raw)
    with pytest.raises(ValueError, match="overlaps another|twice"): open_checkpoint(tmp_path / "a.pt")


def test_a_cut_torch_file_is_refused(tmp_path):
    for old in (False, True):
        torch.save({"w": torch.arange(40.)}, tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
        whole = (tmp_path / "a.pt").read_bytes()
        for size in range(0, len(whole), 7):
            (tmp_path / "b.pt").write_bytes(whole[:size])
            with pytest.raises(ValueError, match="b.pt' (is damaged|holds Python objects)"): open_checkpoint(tmp_path / "b.pt") # half a name of a type is the name of another


def test_a_torch_file_that_changes(tmp_path):
    torch.save({"w": torch.arange(40.)}, tmp_path / "a.pt")
    c = open_checkpoint(tmp_path / "a.pt"); sent = pickle.dumps(c)
    assert set(c.fingerprint()["files"]["a.pt"]) == {"size", "mtime_ns", "sha256", "sampled"}
    torch.save({"w": torch.arange(40.) + 1}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt' has changed"): c["w"]
    with pytest.raises(ValueError, match="a.pt has changed"): pickle.loads(sent)


# Models in memory

def test_models_in_memory():
    layer = nn.Linear(3, 2)
    c = open_checkpoint(layer)
    assert isinstance(c, Checkpoint) and c.path is None and c.files == [] and same(c["weight"], layer.weight.detach()) and not c["weight"].requires_grad and c.where == "the Linear in memory" and open_checkpoint(c) is c
    first, again = c.fingerprint(), open_checkpoint(layer.state_dict()).fingerprint()
    assert first == again and json.loads(json.dumps(first)) == first and same(pickle.loads(pickle.dumps(c))["bias"], layer.bias.detach())
    c["weight"].add_(1); c.check_unchanged()
    with torch.no_grad(): layer.weight[0, 0] += 1
    with pytest.raises(ValueError, match="the Linear in memory has changed"): c.check_unchanged()
    assert open_checkpoint(layer).fingerprint() != first
    assert open_checkpoint({"a": torch.ones(2)}).fingerprint() != open_checkpoint({"a": torch.ones(2, 1)}).fingerprint() != open_checkpoint({"b": torch.ones(2, 1)}).fingerprint()
    for state, error, message in (({"s": 3}, TypeError, "entry 's' is a int"), ({"s": torch.eye(2).to_sparse()}, ValueError, "sparse"), ({}, ValueError, "holds no tensors"), ({3: torch.ones(2)}, ValueError, "name '3'"), ({"w": torch.ones(2, device="meta")}, ValueError, "no numbers")):
        with pytest.raises(error, match=message): open_checkpoint(state)


def tiny_language_model(tie):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tie))


@pytest.mark.parametrize("tie", [True, False])
def test_transformers_in_memory_and_as_saved_in_shards(tie, tmp_path):
    model = tiny_language_model(tie)
    c = open_checkpoint(model)
    assert c.tied == ({"lm_head.weight": "model.embed_tokens.weight"} if tie else {}) and set(c) == set(model.state_dict())
    model.save_pretrained(tmp_path / "m", max_shard_size="5KB")
    saved = open_checkpoint(tmp_path / "m")
    assert len(saved.files) > 2 and saved.index and set(c) - set(saved) == set(c.tied) and all(same(saved[k], model.state_dict()[k]) for k in saved)
    assert {os.path.basename(o) for o in saved.companions()} == {"config.json", "generation_config.json"}
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert open_checkpoint(tmp_path / "pytorch_model.bin").tied == c.tied


def test_open_clip_in_memory():
    import open_clip
    torch.manual_seed(0)
    model = open_clip.CLIP(embed_dim=8, vision_cfg=dict(image_size=16, patch_size=8, width=16, layers=1, head_width=8), text_cfg=dict(vocab_size=40, context_length=8, width=16, heads=2, layers=1))
    c = open_checkpoint(model)
    assert all(same(c[k], t) for k, t in model.state_dict().items()) and len(c) == len(model.state_dict()) and c.where == "the CLIP in memory"


# Other processes

def test_another_process_opens_it_again(tmp_path):
    folder = make_folder(tmp_path / "m", PARTS)
    torch.save({"w": torch.arange(4)}, tmp_path / "a.pt")
    (tmp_path / "sent").write_bytes(pickle.dumps([open_checkpoint(folder), open_checkpoint(tmp_path / "a.pt"), open_checkpoint({"m": torch.ones(2)})]))
    code = "import pickle, sys; a, b, c = pickle.load(open(sys.argv[1], 'rb')); print(a['c'].tolist(), b['w'].tolist(), c['m'].tolist())"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "sent")], capture_output=True, text=True, cwd="/", env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.stdout.strip() == "[0, 1, 2, 3] [0, 1, 2, 3] [1.0, 1.0]", done.stderr[-2000:]


@pytest.mark.skipif(sys.platform != "linux", reason="signals of Linux")
def test_a_file_that_is_cut_off_is_an_error_and_not_the_end(tmp_path):
    "Mapped, this is SIGBUS; the child of the library must die of it, or the reader is not needed."
    code = """
import os, sys
from safetensors import safe_open
from tsv_nb.scale.checkpoints import open_checkpoint
path, ours = sys.argv[1], sys.argv[2] == 'ours'
if ours: c = open_checkpoint(path); w = c['w']
else: w = safe_open(path, framework='pt').get_tensor('w')
os.truncate(path, 500)
print(int(w.sum()), flush=True)
try: c['v']
except ValueError as e: print(str(e)[-30:])
"""
    for who, status in (("ours", 0), ("library", -7)):
        save_file({"w": torch.ones(10**6), "v": torch.ones(10**6)}, tmp_path / "a.safetensors")
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.safetensors"), who], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
        assert done.returncode == status and ("1000000" in done.stdout) == (who == "ours"), done.stderr[-2000:]
