"""Streaming runs on whatever hypothesis thinks of: an output that is right, or an error that names the tensor or option and leaves nothing.

The normal run tries a few cases, always the same; `-m long` 1,000 (about three minutes on one core).
"""
import math
import os
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from cases import BROKEN, DTYPES, EXTREME, ORDINARY, Refused, check_result, distance, entries, eps, layouts_of_models, outcome
from hypothesis import HealthCheck, given, seed, settings
from safetensors.torch import load_file

from tsv_nb import CompressedTaskVector, apply_task_vector, task_vector, tsv_merge
from tsv_nb.polar import POLAR_METHODS
from tsv_nb.scale.checkpoints import open_checkpoint
from tsv_nb.scale.plan import make_plan
from tsv_nb.scale.stream import run_plan

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


@st.composite
def checkpoints(draw):
    "A base and up to three fine-tuned models, of one or of several precisions, with a buffer; sometimes one of them has a defect."
    model, trouble = draw(layouts_of_models()), draw(st.sampled_from((None,) * 6 + ("missing", "extra", "shape", "broken", "extreme")))
    kinds = ORDINARY + EXTREME if trouble == "extreme" else ORDINARY
    states = [{name: draw(entries(shape, dtype if draw(st.integers(0, 5)) else draw(st.sampled_from(DTYPES)), kinds)) for name, (shape, dtype) in model.items()} for _ in range(draw(st.integers(2, 4)))]
    if trouble == "broken":
        i, name = draw(st.integers(0, len(states) - 1)), draw(st.sampled_from(sorted(model)))
        states[i] = states[i] | {name: states[i][name]._replace(values=draw(st.sampled_from(BROKEN)), layout="plain")}
    return states, trouble


def made(case):
    states, trouble = case
    models = [{name: e.make() for name, e in state.items()} | {"steps": torch.tensor(3)} for state in states]
    name = next(iter(states[0]))
    if trouble == "missing": del models[-1][name]
    elif trouble == "extra": models[-1]["one too many"] = torch.ones(2)
    elif trouble == "shape": models[-1][name] = torch.ones(7, *models[-1][name].shape)
    return models


options = st.fixed_dictionaries({}, optional=dict(
    rank=st.sampled_from((1, 1, 2, "full", "full", 50, 0, -1, 1.5)), orthogonalize=st.sampled_from((*POLAR_METHODS, None, None, "qr")), split=st.sampled_from(("qkv", "kqv")), alpha=st.sampled_from((.3, 0., -1., math.nan)),
    dtype=st.sampled_from(("float32", "float16", "bfloat16", "int8")), exclude=st.sampled_from(((), ("*",), ("w", "*.weight"))), include=st.sampled_from(((), ("*",))), missing=st.sampled_from(("base", "skip")), extra=st.sampled_from(("ignore",))))
NAMED = ("exclude", "rank", "orthogonalize", "split", "alpha", "dtype", "missing", "extra", "singular values", "name")


def run(command, models, folder, shard_size, **options):
    "The plan, and the tensors that were written."
    base, *tasks = map(open_checkpoint, models)
    tasks = {f"task {i}": c for i, c in enumerate(tasks)}
    plan = make_plan(command, base, tasks, threads=1, shard_size=shard_size, **options)
    run_plan(plan, base, tasks, folder / "out", progress=False)
    return plan, {k: t for file in (folder / "out").glob("*.safetensors") for k, t in load_file(file).items()}


def merges(case, options):
    states, trouble = case
    models = made(case)
    with tempfile.TemporaryDirectory(dir=MEMORY) as whole, tempfile.TemporaryDirectory(dir=MEMORY) as shards:
        done = outcome(lambda m: run("merge", m, Path(whole), "5GB", **options), models, says=[*states[0], "one too many", *NAMED])
        if isinstance(done, Refused):
            assert not (Path(whole) / "out").exists()
            return done
        plan, merged = done
        assert [p.name for p in Path(whole).iterdir()] == ["out"] and not list(Path(whole).rglob("*.tmp"))
        base = models[0]
        check_result({n: merged[n] for n in base}, {n: t.to(getattr(torch, options["dtype"])) if "dtype" in options and t.is_floating_point() else t.clone() for n, t in base.items()})
        pieces = run("merge", models, Path(shards), 400, **options)[1] # in other units, in other files: the same numbers
        assert pieces.keys() == merged.keys() and all(torch.equal(pieces[n], t) for n, t in merged.items())
    return plan, merged, models


@pytest.mark.parametrize("examples", [12, pytest.param(1000, marks=pytest.mark.long)])
def test_merges(examples):
    @settings(max_examples=examples, deadline=None, database=None, derandomize=examples == 12, suppress_health_check=list(HealthCheck))
    @given(case=checkpoints(), options=options)
    def check(case, options):
        states, trouble = case
        done = merges(case, options)
        ordinary = trouble is None and not set(options) & {"split"} and options.get("dtype") in (None, "float32", "bfloat16") and all(t.dtype != torch.float16 for t in made(case)[0].values())
        ordinary = ordinary and not (len({e.dtype for s in states for e in s.values()}) > 1 and any(e.values == "large" for s in states for e in s.values())) # those of float64 do not fit into a float32 base
        wrong = options.get("rank", 1) in (0, -1, 1.5) or options.get("orthogonalize") == "qr" or options.get("split") == "kqv" or math.isnan(options.get("alpha", 1.)) or options.get("dtype") == "int8" or options.get("missing") == "skip"
        plain = all(c.isprintable() for s in states for n in s for c in n)
        if isinstance(done, Refused):
            if "rank" in options and "rank" in str(done.error): return # which no matrix has
            if options.get("exclude") and "fits no tensor" in str(done.error): return # a pattern for names that this model has not
            assert wrong or not ordinary or not plain or "" in states[0] or "__metadata__" in states[0], done.error
            return
        broken = any(e.values in BROKEN and math.prod(e.shape) for state in states for e in state.values())
        assert not wrong and not broken and trouble != "shape"
        plan, merged, models = done
        same = len({t.dtype for m in models for t in m.values()} - {torch.int64}) == 1 and models[0][next(iter(states[0]))].dtype in (torch.float32, torch.float64)
        if not same or trouble or "dtype" in options or options.get("orthogonalize", "auto") is not None or options.get("rank") != "full": return
        how = {t.name: t.how for t in plan.tensors} # nothing is ill-conditioned in a plain sum of all components
        vectors = [task_vector(models[0], m) for m in models[1:]]
        whole = apply_task_vector(models[0], tsv_merge(vectors, rank="full", orthogonalize=None, exclude=tuple(n for n in vectors[0] if n and how[n] != "merge")), options.get("alpha", 1.))
        for n, t in whole.items():
            if n and t.is_floating_point(): assert distance(merged[n], t) <= 1e3 * eps(t.dtype), n
    if examples > 12: check = seed(int(os.environ.get("SEED", 0)))(check)
    check()


@pytest.mark.parametrize("shape", [(5,), (6, 5)])
def test_an_output_that_overflows_is_an_error(shape, tmp_path):
    "Bfloat16 and float32 models hold numbers that float16 does not."
    models = [{"some.name": torch.full(shape, x)} for x in (1e5, 1.1e5)]
    with pytest.raises(ValueError, match="output tensor 'some.name': .* do not fit into torch.float16"): run("merge", models, tmp_path, "5GB", dtype="float16")
    assert [p.name for p in tmp_path.iterdir()] == ["out.partial"]
    assert torch.isfinite(run("merge", models, tmp_path / "b", "5GB", dtype="bfloat16")[1]["some.name"]).all()


def test_the_largest_numbers_of_float64(tmp_path):
    "The unit of the score is a power of two, which must be a number itself."
    models = [{"w": torch.tensor([[1.5e308, 1e307]], dtype=torch.float64)}, {"w": torch.tensor([[.3, 1.]], dtype=torch.float64)}]
    assert (run("merge", models, tmp_path, "5GB")[1]["w"] - models[1]["w"]).abs().max() < 1e-14 * 1.5e308
