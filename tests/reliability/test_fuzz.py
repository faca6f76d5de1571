"""A few hundred damaged files for every reader, and each file that once crashed one. `fuzz_readers.py` looks for more."""
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import fuzz_readers as fuzz

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol") # of PyTorch, for a damaged version number
SAVED = sorted(fuzz.CRASHES.glob("*")) if fuzz.CRASHES.is_dir() else []


@pytest.fixture(scope="module")
def valid(): return fuzz.seeds()


@pytest.mark.parametrize("kind, reads", [("safetensors", "a.safetensors"), ("one", "a.safetensors"), ("torch", "a.bin"), ("run", "a.bin"), ("old", "a.bin"), ("archive", "archive.safetensors"), ("index", "model.safetensors.index.json"),
                                         ("adapter", "adapter_model.safetensors"), ("config", "adapter_config.json"), ("part", "part.safetensors"), ("receipt", "receipt.json")])
def test_valid_files_are_read(kind, reads, valid, tmp_path):
    said = fuzz.fuzz_one(valid[kind], tmp_path)
    assert said[reads] == "read", said
    assert [k for k, o in said.items() if o == "read"] == (["a.safetensors"] if kind in ("archive", "adapter", "part") else []) + [reads] # those are checkpoints, too


@pytest.mark.parametrize("part", range(4))
def test_damaged_files_are_read_or_refused(part, valid, tmp_path):
    "600 inputs in four parts, to every reader; some must still be readable, or the damage is too coarse to test what follows the first check."
    read = refused = 0
    for i in range(part * 150, (part + 1) * 150):
        try: said = fuzz.fuzz_one(fuzz.mutated(2026, i, valid), tmp_path)
        except AssertionError as e: raise AssertionError(f"input {i} of seed 2026: {e}") from e
        read, refused = read + sum(o == "read" for o in said.values()), refused + sum(o != "read" for o in said.values())
    assert read > 10 and refused > 300


@pytest.mark.parametrize("path", SAVED, ids=lambda p: p.name)
def test_saved_crashes(path, tmp_path): fuzz.fuzz_one(path.read_bytes(), tmp_path)


def test_damage_can_be_repeated(valid, monkeypatch):
    first = [fuzz.mutated(3, i, valid) for i in range(50)]
    monkeypatch.setattr(fuzz.zipfile.time, "time", lambda: 0.) # archives know when their parts were written
    assert [fuzz.mutated(3, i, valid) for i in range(50)] == first and len(set(first)) > 45
    again = fuzz.seeds()
    assert all(again[kind] == valid[kind] for kind in valid), [kind for kind in valid if again[kind] != valid[kind]]


@pytest.mark.parametrize("fault, found", [
    (lambda p: 1 / 0, "ZeroDivisionError"), (lambda p: (_ for _ in ()).throw(ValueError("it is damaged")), "does not name the file"), (lambda p: os.kill(os.getpid(), 11), "killed by signal 11"), (lambda p: bytearray(2**32), "MemoryError")])
def test_the_driver_sees_a_fault(fault, found, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fuzz, "TARGETS", {"a.safetensors": fault})
    monkeypatch.setattr(fuzz, "seeds", lambda: {"one": fuzz.SHARDS["w"]})
    assert fuzz.main(["--seconds", "3", "--seed", "1", "--crashes", str(tmp_path / "found")])
    assert found in capsys.readouterr().out and len(list((tmp_path / "found").iterdir())) >= 1
