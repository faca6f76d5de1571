"""The benchmark scripts, on tiny shapes with the CPU's operators: what they write, that they catch a wrong result, and that the GPU script stops when tests are red."""
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
if not (ROOT / "benchmarks" / "gpu.sh").exists(): pytest.skip("needs the source tree", allow_module_level=True)
sys.path.insert(0, str(ROOT / "benchmarks"))

import compare
import interference_gpu
import measure
import reconstruct_gpu
from tsv_nb.interference import singular_task_interference

SIDE = {"kind", "relative_error", "limit", "tf32", "peak_bytes", "host_ms", "ms", "low", "high", "repeats", "bytes", "flops", "gb_per_s", "copy_share", "flops_per_s", "unit", "bound",
        "floor_ms", "floor_share", "accuracy"}
TINY = ["--device", "cpu", "--tiny"]


def run(script, tmp_path, *args):
    out = tmp_path / "result.json"
    status = script.main([*TINY, "--out", str(out), *args])
    return status, json.loads(out.read_text())


def check_schema(data):
    assert data["tiny"] and data["complete"] and data["seconds"] > 0
    assert data["machine"]["torch"] == torch.__version__ and {"device", "triton", "cuda", "driver", "python", "cpu", "threads", "date"} <= data["machine"].keys()
    assert data["ceilings"]["copy_bytes_per_s"] > 0 and {"ieee", "tf32", "tf32x3", "float16", "bfloat16"} <= data["ceilings"]["flops_per_s"].keys()
    for row in data["rows"]:
        for name, s in row["sides"].items():
            assert s.keys() == SIDE, name
            assert 0 < s["low"] <= s["ms"] <= s["high"] and s["relative_error"] <= s["limit"] and s["bound"] in ("memory", "compute")
            assert math.isclose(s["gb_per_s"], s["bytes"] / s["ms"] / 1e6) and math.isclose(s["copy_share"] * data["ceilings"]["copy_bytes_per_s"], s["gb_per_s"] * 1e9)
        assert row["ratios"].keys() == {n for n, s in row["sides"].items() if s["kind"] == "ours"}
        for name, r in row["ratios"].items():
            ours, best = row["sides"][name], row["sides"][r["torch"]]
            rivals = [s for s in row["sides"].values() if s["kind"] == "torch" and s["accuracy"] <= ours["accuracy"]]
            assert best in rivals and best["ms"] == min(s["ms"] for s in rivals) and math.isclose(r["ratio"], best["ms"] / ours["ms"])
            assert r["low"] <= r["ratio"] <= r["high"]


# --- measure ---------------------------------------------------------------------------------------------------------------------------------

def test_timing():
    t = measure.Timing.of([5., 1., 2., 3., 4.])
    assert (t.ms, t.low, t.high, t.repeats) == (3., 1.8, 4.2, 5)
    calls = []
    t = measure.measure(lambda: calls.append(0), "cpu", warmup=0, rep=0, least=4)
    assert t.repeats == 4 and len(calls) == 5 # one to warm up
    order = []
    times = measure.measure_sides({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, "cpu", rounds=3)
    assert order == ["a", "b"] * 4 and times["a"].repeats == 3


@pytest.mark.parametrize("slow", [False, True])
def test_cuda_timing(slow, monkeypatch):
    "What CUDA's branch makes of the tool's answer; the device itself is replaced."
    testing = pytest.importorskip("triton.testing")
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(measure, "SLOW_MS", -1. if slow else math.inf)
    monkeypatch.setattr(testing, "do_bench", lambda fn, quantiles, **kw: [dict(zip((.2, .5, .8), (1., 2., 3.)))[q] for q in quantiles])
    t = measure.measure(lambda: calls.append(0), torch.device("cuda"))
    if slow: assert t.repeats == 3 and len(calls) == 4 # one call is compilation
    else: assert (t.ms, t.low, t.high, t.repeats) == (2., 1., 3., None)


def test_machine_and_ceilings():
    facts = measure.machine("cpu")
    assert facts["device_type"] == "cpu" and facts["threads"] == torch.get_num_threads() and json.dumps(facts)
    assert measure.measured_copy("cpu", 2**16) > 0 and measure.measured_matmul("cpu", n=16) > 0


def test_tf32_is_restored():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), measure.tf32(True):
        assert torch.get_float32_matmul_precision() == "high"
        raise KeyError
    assert torch.get_float32_matmul_precision() == before


def test_write_json_keeps_the_old_file(tmp_path):
    path = measure.write_json(tmp_path / "new" / "a.json", {"x": 1})
    with pytest.raises(ValueError): measure.write_json(path, {"x": math.nan})
    assert json.loads(path.read_text()) == {"x": 1} and [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_relative_error():
    want = torch.tensor([3., 4.])
    assert measure.relative_error(torch.tensor([3., 4.5]), want) == pytest.approx(.1)
    assert math.isnan(measure.relative_error(torch.tensor([3., math.nan]), want))


# --- reconstruction --------------------------------------------------------------------------------------------------------------------------

def test_reconstruct_writes_every_row(tmp_path, capsys):
    status, data = run(reconstruct_gpu, tmp_path, "--blocks", "1")
    assert (status, data["errors"], data["skipped"]) == (0, [], [])
    check_schema(data)
    rows = {(r["model"], r["ratio"], r["weights"], r["factors"], r["mode"], r.get("compiled")): r for r in data["rows"]}
    assert len(rows) == len(data["rows"])
    assert {k[1] for k in rows} == {.05, .1, .2} and {k[4] for k in rows} == {"copy", "add"} and {k[2:4] for k in rows} >= {("fp32", "fp32"), ("bf16", "bf16"), ("fp32", "fp16")}
    main, half = rows["tiny-ViT", .1, "fp32", "fp32", "copy", "default"], rows["tiny-LM", .1, "bf16", "bf16", "add", None]
    assert {f"ours grouped {p}" for p in ("ieee", "tf32x3", "tf32")} | {"ours per matrix tf32x3", "ours batched tf32x3"} <= main["sides"].keys()
    assert {f"torch {n} {p}" for n in ("addmm", "mm + add", "foreach", "baddbmm", "compiled default") for p in ("fp32", "tf32")} <= main["sides"].keys()
    assert {"ours grouped half", "torch addmm half", "torch baddbmm half"} <= half["sides"].keys()
    assert capsys.readouterr().out.count("\n") == 1 # tiny: no table of times


@pytest.mark.parametrize("weights, factors", [(torch.float32, torch.float32), (torch.bfloat16, torch.float16)])
def test_reconstruct_counts(weights, factors):
    stacks = reconstruct_gpu.make({(20, 12): 3, (8, 8): 1}, .5, weights, factors, torch.device("cpu"))
    k, l = stacks[0].U.shape[-1], stacks[1].U.shape[-1]
    work = reconstruct_gpu.counts(stacks)
    assert (k, l) == (3, 1) and work["bytes"] == sum(o.nbytes for st in stacks for o in st) # every tensor is moved once
    assert work["flops"] == 3 * (2 * 240 * k + 20 * k + 240) + 2 * 64 * l + 8 * l + 64


FIRST = [("tiny-ViT", .1, "fp32", "fp32", "copy", None), ("tiny-LM", .1, "bf16", "bf16", "add", None)]


def no_alpha(real): return lambda *a, alpha, **kw: real(*a, alpha=1., **kw)


def one_left_out(real):
    def fn(factors, *, base, out, **kw): real(factors[1:], base=base[1:], out=out[1:], **kw)
    return fn


def one_number(real):
    def fn(*a, out, **kw):
        real(*a, out=out, **kw)
        out[-1][-1, -1] += .5 * out[-1].abs().max()
    return fn


def raises(real):
    def fn(*a, **kw): raise RuntimeError("launch failed")
    return fn


@pytest.mark.parametrize("fault", [no_alpha, one_left_out, one_number, raises])
def test_reconstruct_catches(fault, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reconstruct_gpu, "plan", lambda *_: FIRST)
    monkeypatch.setattr(reconstruct_gpu, "lowrank_reconstruct_grouped", fault(reconstruct_gpu.lowrank_reconstruct_grouped))
    status, data = run(reconstruct_gpu, tmp_path)
    assert status == 1 and len(data["rows"]) == 2
    check_schema(data)
    assert not any("grouped" in name for row in data["rows"] for name in row["sides"]) # never a time of a wrong result
    assert {e["side"] for e in data["errors"]} == {"ours grouped ieee", "ours grouped tf32x3", "ours grouped tf32", "ours grouped half"}
    assert {e["error"] for e in data["errors"]} == {"RuntimeError" if fault is raises else "WrongResult"}
    assert "ERROR" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["copy", "add"])
def test_a_side_that_does_nothing_is_caught_after_a_right_one(mode):
    stacks = reconstruct_gpu.make({(20, 12): 2, (8, 8): 1}, .5, torch.float32, torch.float32, torch.device("cpu"))
    check = reconstruct_gpu.checker(stacks, reconstruct_gpu.reference(stacks), mode)
    for _ in range(2): # twice: in place is applied once per check
        for side in reconstruct_gpu.our_sides(stacks, mode, ("ieee",)).values(): assert check(side.build())[0] < 1e-6
        error, _ = check(lambda: None)
        assert math.isnan(error) if mode == "copy" else error > .3


def test_a_wrong_torch_side_is_no_failure_of_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(reconstruct_gpu, "plan", lambda *_: FIRST[:1])
    monkeypatch.setattr(torch, "_foreach_add_", lambda *a, **kw: None)
    status, data = run(reconstruct_gpu, tmp_path)
    assert status == 0 and {e["side"] for e in data["errors"]} == {"torch foreach fp32", "torch foreach tf32"}


def test_no_time(tmp_path):
    for script in (reconstruct_gpu, interference_gpu):
        status, data = run(script, tmp_path, "--seconds", "0")
        assert status == 0 and not data["rows"] and len(data["skipped"]) > 20 and data["skipped"][0]["why"] == "no time left"


def test_clip_shapes():
    open_clip = pytest.importorskip("open_clip")
    for model in ("ViT-B-32", "ViT-L-14"):
        config = open_clip.get_model_config(model)
        vision = config["vision_cfg"]
        assert reconstruct_gpu.CLIP[model] == (vision["width"], vision["layers"], config["embed_dim"])
        assert interference_gpu.TOWERS[model] == (vision["width"], vision["layers"])
    assert reconstruct_gpu.shapes_of("ViT-B-32") == {(2304, 768): 12, (768, 768): 12, (3072, 768): 12, (768, 3072): 12, (768, 512): 1}
    assert reconstruct_gpu.shapes_of("LM-4096", 2) == {(4096, 4096): 8, (11008, 4096): 4, (4096, 11008): 2}


def test_plans_have_no_doubles():
    for steps in (reconstruct_gpu.plan(["ViT-B-32", "ViT-L-14", "LM-4096"]), reconstruct_gpu.plan(["ViT-B-32"], full=True), interference_gpu.plan(["ViT-B-32", "ViT-L-14"])):
        assert len({tuple(s) for s in steps}) == len(steps)
    tuned = reconstruct_gpu.plan(["ViT-B-32"], tuned_first=True)
    assert tuned[0][-1] == "max-autotune" and sorted(map(str, tuned)) == sorted(map(str, reconstruct_gpu.plan(["ViT-B-32"])))


# --- interference ----------------------------------------------------------------------------------------------------------------------------

def test_interference_writes_every_row(tmp_path):
    status, data = run(interference_gpu, tmp_path)
    assert (status, data["errors"], data["skipped"]) == (0, [], [])
    check_schema(data)
    assert {(r["T"], r["k"], r["batch"]) for r in data["rows"]} == {(T, *kb) for T in (8, 14, 20) for kb in ((1, 1), (1, 2), (8, 1))}
    assert {r["matrix"] for r in data["rows"]} == {"in_proj", "out_proj", "c_fc", "c_proj"} and {r["route"] for r in data["rows"]} == {"gram", "push"}
    for row in data["rows"]: assert {f"ours {p}" for p in ("ieee", "tf32x3", "tf32")} | {f"torch {n} {p}" for n in ("literal", "masked") for p in ("fp32", "tf32")} <= row["sides"].keys()
    assert any("torch compiled tf32" in row["sides"] for row in data["rows"])


@pytest.mark.parametrize("m, n, T, k", [(9, 6, 4, 2), (6, 9, 3, 6)])
def test_interference_reference(m, n, T, k):
    U, S, Vh = interference_gpu.make(m, n, T, k, 2, torch.device("cpu"))
    assert U.shape == (2, T, m, k) and S.shape == (2, T, k) and Vh.shape == (2, T, k, n)
    for X in (U, Vh.mT): assert torch.allclose(X.mT @ X, torch.eye(k).expand(2, T, k, k), atol=1e-5)
    want = interference_gpu.reference(U, S, Vh)
    assert torch.allclose(want, singular_task_interference(U.double(), S.double(), Vh.double()), rtol=1e-12)
    assert torch.allclose(want.float(), interference_gpu.literal(U, S, Vh), rtol=1e-5)


@pytest.mark.parametrize("fault, kind", [(lambda r: r * 1.03, "WrongResult"), (lambda r: r * math.nan, "WrongResult"), (lambda r: r.sum(), "AssertionError")])
def test_interference_catches(fault, kind, tmp_path, monkeypatch):
    real = interference_gpu.interference_score
    monkeypatch.setattr(interference_gpu, "plan", lambda _: [("tiny-ViT", "c_fc", 8, "r // T", 2, False)])
    monkeypatch.setattr(interference_gpu, "interference_score", lambda *a, **kw: fault(real(*a, **kw)))
    status, data = run(interference_gpu, tmp_path)
    assert status == 1 and {e["side"] for e in data["errors"] if e["kind"] == "ours"} == {"ours ieee", "ours tf32x3", "ours tf32"}
    assert {e["error"] for e in data["errors"]} == {kind} and not any(name.startswith("ours") for name in data["rows"][0]["sides"])


# --- the table and the script ----------------------------------------------------------------------------------------------------------------

def test_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reconstruct_gpu, "plan", lambda *_: FIRST)
    _, data = run(reconstruct_gpu, tmp_path)
    capsys.readouterr()
    compare.table(data | dict(tiny=False))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and all("x [" in line and " ms " in line for line in lines[1:]) # one accuracy class on a CPU


STUB = """#!/usr/bin/env bash
echo "$@" >>"$CALLS"
case "$*" in
    "-c "*) exit 0 ;;
    "-m pytest"*) echo "3 passed"; exit "$RED" ;;
    *merge_gpu.py* | *compile_report.py*) exit 0 ;;
    *--out*) [ -z "$SLOW" ] || sleep 60 ;;
esac
"""


@pytest.mark.parametrize("red, slow", [(0, False), (1, False), (5, False), (0, True)])
def test_gpu_script(red, slow, tmp_path):
    if not shutil.which("timeout"): pytest.skip("needs coreutils")
    python, calls = tmp_path / "python", tmp_path / "calls"
    python.write_text(STUB)
    python.chmod(0o755)
    env = os.environ | dict(PYTHON=str(python), CALLS=str(calls), RED=str(red), SLOW="1" * slow, TOTAL="3" if slow else "60", LEAST="2")
    result = subprocess.run(["bash", ROOT / "benchmarks" / "gpu.sh", tmp_path / "out"], env=env, capture_output=True, text=True, timeout=120)
    called = calls.read_text()
    assert "-m pytest -m cuda" in called and (tmp_path / "out" / "gpu.log").exists()
    if red:
        assert result.returncode == 1 and "RED" in result.stdout and "_gpu.py" not in called
    elif slow: # the first benchmark uses up the time, the second is not started
        assert result.returncode == 1 and "reconstruct: stopped" in result.stdout and "interference: skipped, no time left" in result.stdout
    else:
        assert result.returncode == 0, result.stdout + result.stderr
        assert called.index("pytest") < called.index("reconstruct_gpu.py") < called.index("interference_gpu.py") and "status 0" in result.stdout


# --- merging ---------------------------------------------------------------------------------------------------------------------------------

def test_merge_cpu_on_one_narrow_block(tmp_path, monkeypatch):
    "Both sides in processes of their own, from files; every error within the goal; and the published side is the paper's algorithm."
    import merge_cpu
    import merging
    shapes = {n: tuple(min(d, 128) if d < 2048 else 160 for d in s) for n, s in merging.vit_shapes(blocks=1).items()}
    assert shapes["visual.transformer.resblocks.0.mlp.c_fc.weight"] == (160, 128)
    for kind in ("realistic", "random"):
        folder = tmp_path / kind
        folder.mkdir()
        merge_cpu.write_checkpoints(folder, shapes, 4, kind)
        r = merge_cpu.compare(folder, 4, kind, 1)
        assert r["sides"]["ours"]["max_error"] < 1e-4 and r["sides"]["published"]["max_error"] < 1e-3
        assert len(r["sides"]["ours"]["error"]) == 5 and 0 < r["ratios"]["memory"] < 1.5
        merge_cpu.show(r)


def test_published_shapes():
    "The published code's state dict of ViT-B-32: 113 million numbers, 49 matrices of the visual tower that move."
    import merging
    shapes = merging.vit_shapes()
    assert sum(math.prod(s) for s in shapes.values()) == 113_448_705
    assert sum(len(s) == 2 and merging.moves(n) for n, s in shapes.items()) == 12 * 4 + 2


def test_chosen_spectra():
    "Task matrices have the asked-for spectrum, share a part, and are the same in every run."
    import merging
    d = merging.task_matrices((160, 96), 3, "realistic", 0)
    s = torch.linalg.svdvals(d[0])
    assert torch.equal(d, merging.task_matrices((160, 96), 3, "realistic", 0))
    assert 0.03 < s[12] / s[0] < .3 and s[-1] / s[0] < .02
    cosine = (d[0] * d[1]).sum() / (d[0].norm() * d[1].norm())
    assert .25 < cosine < .5


def test_streaming_gpu_without_a_gpu(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "streaming_gpu.py"), "--folder", str(tmp_path), "--device", "cpu", "--tiny", "--tasks", "2", "--out", str(tmp_path / "out.json")],
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    narrow, wide = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert narrow["difference"] == 0 and len(narrow["device_seconds"]) == len(wide["device_seconds"]) == 2 and narrow["ratio"] > 0 and "cpu_seconds" not in wide


def test_merge_gpu_and_growth_without_a_gpu(tmp_path):
    for script, args in (("merge_gpu.py", ["--device", "cpu", "--tiny"]), ("growth.py", ["--tiny", "--threads", "1", "--rounds", "1"])):
        out = tmp_path / f"{script}.json"
        done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / script), *args, "--out", str(out)], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        data = json.loads(out.read_text())
        if script == "growth.py": assert {"width", "n_tasks", "layers"} == data["results"].keys() and all(p["ms"] > 0 for p in data["results"]["width"])
        else: assert max(data["error"].values()) < 1e-4 and data["speedup"] > 0 and data["ours_s"][1] > 0
