"TALL masks, magnitude masks and consensus merging against loops over single numbers; packing, files and what is wrong with bad ones."
import errno
import json
import math
from importlib import import_module

import numpy as np
import pytest
import torch
from conftest import make_vectors
from safetensors import safe_open
from safetensors.torch import save_file

from tsv_nb.baselines import ties_merge
from tsv_nb.checks import StateDictKeyError
from tsv_nb.compress import compress
from tsv_nb.masks import LAMBDAS, TaskMasks, choose_lambdas, consensus_merge, magnitude_masks, pack_bits, tall_masks, unpack_bits
from tsv_nb.lazy import LazyTaskVector
from tsv_nb.task_vectors import apply_task_vector, task_arithmetic

SHAPES = {"w": (20, 12), "odd": (9, 7), "b": (7,), "scale": (), "conv": (4, 3, 3, 3), "one": (1,), "none": (0, 3)}


def whole_numbers(g, T, shapes=SHAPES):
    "Task vectors of small whole numbers: comparisons that come out exactly equal, and zeros."
    return {f"task{t}": {k: torch.randint(-3, 4, s, generator=g).float() for k, s in shapes.items()} for t in range(T)}


def tall_reference(tau, multi, lam):
    "One task, one number after the other."
    return {k: np.array([abs(a) >= abs(m - a) * lam for a, m in zip(e.double().flatten().tolist(), multi[k].double().flatten().tolist())], dtype=bool).reshape(e.shape) for k, e in tau.items()}


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 63, 64, 65, 1000])
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3)])
def test_packing(g, n, lead):
    bits = torch.rand(*lead, n, generator=g) > .5
    packed = pack_bits(bits)
    assert packed.dtype == torch.uint8 and np.array_equal(packed.numpy(), np.packbits(bits.numpy(), axis=-1))
    assert torch.equal(unpack_bits(packed, n), bits) and unpack_bits(packed, n).dtype == torch.bool


def test_packing_all_bytes():
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pack_bits(unpack_bits(every, 2048)), every)


@pytest.mark.parametrize("lam", [0., .25, .5, 1., 3.])
@pytest.mark.parametrize("T", [1, 2, 5])
def test_tall_against_loops_with_exact_equality(g, T, lam):
    v = whole_numbers(g, T)
    m = tall_masks(v, lam)
    for t in v:
        want = tall_reference(v[t], task_arithmetic(v), lam)
        for k, mask in m.masks(t).items(): assert mask.shape == v[t][k].shape and np.array_equal(mask.numpy(), want[k]), (t, k)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_tall_against_loops_in_every_precision(g, dtype):
    v, lams = make_vectors(g, 4, SHAPES, dtype), {"task1": .2, "task0": .6, "task3": .4, "task2": .3}
    multi, m = task_arithmetic(v), tall_masks(v, lams)
    for t in v:
        want = tall_reference(v[t], multi, lams[t])
        wrong = sum(int((mask.numpy() != want[k]).sum()) for k, mask in m.masks(t).items())
        assert wrong <= (0 if dtype != torch.bfloat16 else 1) # numbers of 8 bits can be equal up to the rounding of lambda
    assert m.settings == lams and m.tasks == tuple(v)


def test_tall_on_another_multi_task_vector(g):
    v = make_vectors(g, 3, SHAPES)
    multi = ties_merge(v, 50, function="sum")
    for t in v:
        want = tall_reference(v[t], multi, .4)
        for k, mask in tall_masks(v, multi=multi).masks(t).items(): assert np.array_equal(mask.numpy(), want[k])


@pytest.mark.parametrize("lam", [.2, 1., 1e6])
def test_one_task_keeps_all(g, lam):
    v = make_vectors(g, 1, SHAPES)
    m = tall_masks(v, lam)
    assert all(mask.all() for mask in m.masks("task0").values())
    for k, e in m.apply(task_arithmetic(v), "task0").items(): assert torch.equal(e, v["task0"][k])


def test_larger_lambdas_keep_fewer(g):
    v = make_vectors(g, 4, SHAPES)
    for t in v:
        kept = [tall_masks(v, lam).masks(t) for lam in (0., .2, .4, 1., 10.)]
        assert all(m.all() for m in kept[0].values())
        for a, b in zip(kept, kept[1:]): assert all((b[k] <= a[k]).all() for k in a) and sum(int(b[k].sum()) for k in b) < sum(int(a[k].sum()) for k in a)


@pytest.mark.parametrize("density", [1, 10, 33.3, 100])
def test_magnitude_against_sort(g, density):
    for v in (make_vectors(g, 3, SHAPES), whole_numbers(g, 3)):
        m = magnitude_masks(v, density)
        for t, x in v.items():
            flat = np.abs(np.concatenate([e.numpy().ravel() for e in x.values()]))
            cut = np.sort(flat)[::-1][int(len(flat) * density / 100 + 1e-9) - 1]
            got = np.concatenate([k.numpy().ravel() for k in m.masks(t).values()])
            assert np.array_equal(got, (flat >= cut) & (flat > 0))
        assert m.settings == dict.fromkeys(v, density) and m.method == "magnitude"


def test_the_order_of_tasks_permutes_masks_only(g):
    v = whole_numbers(g, 5)
    for make in (tall_masks, magnitude_masks):
        a, b = make(v), make(dict(reversed(v.items())))
        assert b.tasks == a.tasks[::-1]
        for t in v:
            for k, mask in a.masks(t).items(): assert torch.equal(mask, b.masks(t)[k])


def test_scaling_all_tasks_changes_no_mask(g):
    v = make_vectors(g, 3, SHAPES)
    for c in (4., -.5):
        scaled = {t: {k: c * e for k, e in x.items()} for t, x in v.items()}
        for make in (tall_masks, magnitude_masks):
            for k, p in make(v).packed.items(): assert torch.equal(p, make(scaled).packed[k])


def test_apply_and_count(g):
    v = make_vectors(g, 5, SHAPES)
    m, multi = tall_masks(v), task_arithmetic(v)
    for k in SHAPES:
        each = torch.stack([m.masks(t)[k] for t in v])
        assert torch.equal(m.count(k), each.sum(0)) and m.count(k).shape == torch.Size(SHAPES[k])
        for t, mask in zip(v, each): assert torch.equal(m.apply(multi, t)[k], multi[k] * mask)
    half = {k: e.bfloat16() for k, e in multi.items()}
    assert all(e.dtype == torch.bfloat16 for e in m.apply(half, "task0").values())


def header_bytes(path): return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def test_bytes_are_exact(g, tmp_path):
    for T in (1, 3):
        m = tall_masks(make_vectors(g, T, SHAPES))
        want = T * sum(-(-math.prod(s) // 8) for s in SHAPES.values())
        path = m.save(tmp_path / "m.safetensors")
        assert m.nbytes == want == path.stat().st_size - header_bytes(path)


@pytest.mark.parametrize("make", [tall_masks, magnitude_masks, lambda v: tall_masks(v, {"task0": .2, "task1": .6, "task2": .3})])
def test_save_and_load(g, tmp_path, make):
    m = make(make_vectors(g, 3, SHAPES | {"mask/w": (3, 3), "naïve.ключ": (2,), "a b\"c": ()}))
    back = TaskMasks.load(m.save(tmp_path / "deep" / "m.safetensors"))
    assert (back.tasks, back.shapes, back.method, back.settings, back.digest, back.nbytes) == (m.tasks, m.shapes, m.method, m.settings, m.digest, m.nbytes)
    for k, p in m.packed.items(): assert torch.equal(back.packed[k], p)
    for t in m.tasks:
        for k, mask in m.masks(t).items(): assert torch.equal(back.masks(t)[k], mask)


def test_the_header_says_what_the_masks_are(g, tmp_path):
    m = tall_masks(make_vectors(g, 2, SHAPES), {"task0": .2, "task1": .6})
    with safe_open(m.save(tmp_path / "m"), "pt") as f: facts = json.loads(f.metadata()["facts"])
    assert facts["tasks"] == ["task0", "task1"] and facts["method"] == "tall" and facts["settings"] == {"task0": .2, "task1": .6}
    assert facts["shapes"] == {k: list(s) for k, s in SHAPES.items()} and facts["digest"] == m.digest


def test_digests_tell_models_apart(g):
    digest = lambda shapes: tall_masks(make_vectors(g, 1, shapes)).digest
    assert digest({"a": (2, 3), "b": (4,)}) == digest({"b": (4,), "a": (2, 3)})
    assert len({digest(s) for s in ({"a": (2, 3)}, {"a": (3, 2)}, {"a": (6,)}, {"b": (2, 3)}, {"a": (2, 3), "b": ()})}) == 5


def test_an_interrupted_save_leaves_the_old_file(g, tmp_path, monkeypatch):
    m = tall_masks(make_vectors(g, 2, SHAPES))
    path = m.save(tmp_path / "m")
    before = path.read_bytes()
    def full(*args, **kwargs): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(import_module("tsv_nb.compress"), "save_file", full)
    with pytest.raises(OSError): magnitude_masks(make_vectors(g, 2, SHAPES)).save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["m"]


def test_truncated_files(g, tmp_path):
    data = tall_masks(make_vectors(g, 2, SHAPES)).save(tmp_path / "m").read_bytes()
    for size in (0, 1, 7, 8, 20, len(data) // 2, len(data) - 1):
        (tmp_path / "cut").write_bytes(data[:size])
        with pytest.raises(ValueError, match="cut' is damaged"): TaskMasks.load(tmp_path / "cut")
    (tmp_path / "cut").write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(ValueError, match="cut' is damaged"): TaskMasks.load(tmp_path / "cut")


def test_foreign_files(g, tmp_path):
    compress(make_vectors(g, 1)["task0"]).save(tmp_path / "archive")
    save_file({"mask/w": torch.ones(2)}, tmp_path / "plain")
    for name in ("archive", "plain"):
        with pytest.raises(ValueError, match=f"{name}' is a safetensors file, but holds no task masks"): TaskMasks.load(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no task masks at .*nothing"): TaskMasks.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no task masks at"): TaskMasks.load(tmp_path)


@pytest.mark.parametrize("tamper, message", [
    (lambda f, t: f["shapes"].update(w=[12, 20]), "header"), (lambda f, t: f["shapes"].pop("w"), "header"), (lambda f, t: f.pop("tasks"), "header"),
    (lambda f, t: f.update(shapes={"w": "x"}), "header"), (lambda f, t: f.pop("digest"), "header"),
    (lambda f, t: t.pop("mask/conv"), "mask of tensor 'conv' is missing"), (lambda f, t: t.update({"mask/new": torch.zeros(3, 1, dtype=torch.uint8)}), "tensor 'new'"),
    (lambda f, t: t.update({"mask/b": t["mask/b"].int()}), "mask of tensor 'b'"), (lambda f, t: t.update({"mask/w": t["mask/w"][:, :-1].clone()}), "mask of tensor 'w'"),
    (lambda f, t: f["tasks"].append("more"), "mask of tensor"),
])
def test_files_that_do_not_fit_together(g, tmp_path, tamper, message):
    m = tall_masks(make_vectors(g, 3, SHAPES))
    with safe_open(m.save(tmp_path / "m"), "pt") as f: meta, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    facts = json.loads(meta["facts"])
    tamper(facts, tensors)
    save_file(tensors, tmp_path / "bad", metadata=meta | {"facts": json.dumps(facts)})
    with pytest.raises(ValueError, match=f"bad' is damaged: .*{message}"): TaskMasks.load(tmp_path / "bad")


@pytest.mark.parametrize("facts", ["", "[]", "{", "null", '"x"'])
def test_headers_that_cannot_be_read(tmp_path, facts):
    save_file({"mask/w": torch.zeros(1, 1, dtype=torch.uint8)}, tmp_path / "bad", metadata={"kind": "tsv_nb.TaskMasks/1", "facts": facts})
    with pytest.raises(ValueError, match="bad' is damaged: its header"): TaskMasks.load(tmp_path / "bad")


def test_masks_of_another_model_or_task(g):
    v = make_vectors(g, 2, SHAPES)
    m, multi = tall_masks(v), task_arithmetic(v)
    with pytest.raises(ValueError, match=r"'odd': the masks are for shape \(9, 7\), the task vector has \(7, 9\)"): m.apply(multi | {"odd": torch.zeros(7, 9)}, "task0")
    with pytest.raises(StateDictKeyError, match=r"1 missing \('conv'\)"): m.check({k: e for k, e in multi.items() if k != "conv"})
    with pytest.raises(StateDictKeyError, match=r"1 unexpected \('head'\)"): m.apply(multi | {"head": torch.zeros(2)}, "task0")
    with pytest.raises(ValueError, match="unknown task 'cars'; known: 'task0', 'task1'"): m.apply(multi, "cars")
    with pytest.raises(ValueError, match="unknown tensor 'x'"): m.count("x")
    with pytest.raises(StateDictKeyError, match="multi-task vector.*1 missing .'w'"): tall_masks(v, multi={k: e for k, e in multi.items() if k != "w"})
    with pytest.raises(ValueError, match="multi-task vector.*'b': expected shape"): tall_masks(v, multi=multi | {"b": torch.zeros(8)})
    with pytest.raises(ValueError, match="multi-task vector: tensor 'b' has 1 of 7"): tall_masks(v, multi=multi | {"b": torch.tensor([0., 1, 2, 3, 4, 5, math.nan])})


@pytest.mark.parametrize("call, error, message", [
    (lambda v: tall_masks(v, -.1), ValueError, "lam of task 'task0' must be a finite number of at least 0, got -0.1"), (lambda v: tall_masks(v, math.nan), ValueError, "got nan"),
    (lambda v: tall_masks(v, {"task0": .4}), StateDictKeyError, "lambdas: keys differ.*2 missing"), (lambda v: magnitude_masks(v, 0), ValueError, r"in \(0, 100\]"),
    (lambda v: magnitude_masks(v, .1), ValueError, "nothing would be kept"), (lambda v: tall_masks([]), ValueError, "no task vector given"),
    (lambda v: consensus_merge(v, threshold=-1), ValueError, "at least 0, got -1"), (lambda v: consensus_merge(v, threshold=1.5), ValueError, "whole and at least 0, got 1.5"),
    (lambda v: consensus_merge(v, "tsv"), ValueError, "unknown base 'tsv'; known: 'task_arithmetic', 'ties'"), (lambda v: consensus_merge(v, density=20), ValueError, "option of task_arithmetic 'density'"),
    (lambda v: choose_lambdas(v, lambda t, e: 0., []), ValueError, "no lambda to try"), (lambda v: choose_lambdas(v, lambda t, e: math.nan), ValueError, "task 'task0': a score is NaN"),
])
def test_bad_options(vectors, call, error, message):
    with pytest.raises(error, match=message): call(vectors)


@pytest.mark.parametrize("make", [tall_masks, magnitude_masks, consensus_merge])
def test_nan_is_named_and_inputs_are_left_alone(g, make):
    v = make_vectors(g, 3, SHAPES)
    copy = {t: {k: e.clone() for k, e in x.items()} for t, x in v.items()}
    make(v)
    for t in v:
        for k in SHAPES: assert torch.equal(v[t][k], copy[t][k])
    v["task2"]["odd"][1, 1] = math.inf
    with pytest.raises(ValueError, match="task 'task2': tensor 'odd' has 1 of 63"): make(v)


def test_choose_lambdas_takes_the_best_of_each_task(g):
    v = make_vectors(g, 3, SHAPES)
    multi, best = task_arithmetic(v), {"task0": .2, "task1": .5, "task2": .6}
    seen = {}
    def score(task, estimate):
        "Highest for the lambda in `best`, recognized by its mask."
        for lam in LAMBDAS:
            want = tall_reference(v[task], multi, lam)
            if all(np.array_equal(estimate[k].numpy(), multi[k].numpy() * want[k]) for k in SHAPES): break
        else: raise AssertionError("an estimate that belongs to no lambda")
        seen.setdefault(task, []).append(lam)
        return -abs(lam - best[task])
    assert choose_lambdas(v, score, reversed(LAMBDAS)) == best
    assert all(sorted(s) == list(LAMBDAS) for s in seen.values()) and set(seen) == set(v)


def test_choose_lambdas_prefers_the_smallest_of_equals(vectors):
    assert choose_lambdas(vectors, lambda t, e: 1., (.6, .2, .4)) == dict.fromkeys(vectors, .2)
    assert choose_lambdas(vectors, lambda t, e: 0., [3]) == dict.fromkeys(vectors, 3)


def consensus_reference(v, multi, threshold, lams):
    masks = [tall_reference(x, multi, lams[t]) for t, x in v.items()]
    return {k: np.where(sum(m[k].astype(int) for m in masks) >= threshold, e.double().numpy(), 0) for k, e in multi.items()}


@pytest.mark.parametrize("threshold", range(7))
@pytest.mark.parametrize("base, options", [("task_arithmetic", {}), ("task_arithmetic", dict(weights=[1., 2., 3., 4., 5.])), ("ties", {}), ("ties", dict(density=60, function="sum"))])
def test_consensus_against_loops(g, base, options, threshold):
    v, lams = make_vectors(g, 5, SHAPES), {f"task{t}": .2 + .1 * t for t in range(5)}
    multi = (ties_merge if base == "ties" else task_arithmetic)(v, **options)
    want, got = consensus_reference(v, multi, threshold, lams), consensus_merge(v, base, threshold, lams, **options)
    for k in SHAPES: assert np.array_equal(got[k].double().numpy(), want[k])
    if threshold == 0: assert all(torch.equal(got[k], multi[k]) for k in SHAPES) # the base itself
    if threshold == 6: assert not any(e.any() for e in got.values()) # more than there are tasks


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_consensus_dtype_scale_and_order(g, dtype):
    v = whole_numbers(g, 4)
    v = {t: {k: e.to(dtype) for k, e in x.items()} for t, x in v.items()}
    for base in ("task_arithmetic", "ties"):
        out, turned = consensus_merge(v, base), consensus_merge(dict(reversed(v.items())), base)
        minus = consensus_merge({t: {k: -2 * e for k, e in x.items()} for t, x in v.items()}, base)
        for k, e in out.items(): assert e.dtype == dtype and torch.equal(e, turned[k]) and torch.equal(minus[k], -2 * e)


def test_one_task_is_its_own_consensus(g):
    v = make_vectors(g, 1, SHAPES)
    for k, e in consensus_merge(v, threshold=1).items(): assert torch.equal(e, v["task0"][k])


def test_task_vectors_on_disk(g, tmp_path):
    shapes = {k: s for k, s in SHAPES.items() if k != "none"}
    base = {k: torch.randn(s, generator=g) for k, s in shapes.items()}
    save_file(base, tmp_path / "base")
    for t, x in make_vectors(g, 3, shapes).items(): save_file(apply_task_vector(base, x, .1), tmp_path / t)
    lazy = {t: LazyTaskVector(tmp_path / "base", tmp_path / t) for t in ("task0", "task1", "task2")}
    whole = {t: dict(x.items()) for t, x in lazy.items()}
    for make in (tall_masks, magnitude_masks):
        for k, p in make(whole).packed.items(): assert torch.equal(p, make(lazy).packed[k])
    for k, e in consensus_merge(whole).items(): assert torch.equal(consensus_merge(lazy)[k], e)
    own = tall_masks(lazy, multi=lazy["task1"])
    assert all(mask.all() for mask in own.masks("task1").values()) and torch.equal(own.apply(lazy["task1"], "task1")["w"], whole["task1"]["w"])
