"""Every function of the method part, on whatever hypothesis thinks of: a result that is right, or an error that says what is wrong; and never a changed input.

The normal run tries a few cases of each property, always the same. `pytest -m long tests/reliability/test_properties.py` tries 10,000 in all
(about four minutes on one core); SEED=… gives it other cases.
"""
import math
import os
import tempfile
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from cases import (BROKEN, DTYPES, EXTREME, LAYOUTS, ORDINARY, SIDES, Entry, Refused, check_result, distance, entries, eps, hidden, laid_out, layouts_of_models, outcome, seeds,
                   tasks)
from hypothesis import HealthCheck, given, seed, settings

from tsv_nb import (MERGE_METHODS, CompressedTaskVector, TaskMasks, apply_task_vector, compress, interference_by_layer, magnitude_masks, orthogonalize, pairwise_interference,
                    tall_masks, task_arithmetic, task_vector, tsv_merge)
from tsv_nb.interference import NORMS
from tsv_nb.low_rank import truncated_svd
from tsv_nb.polar import POLAR_METHODS
from tsv_nb.svd import SVD_METHODS

SHORT, LONG = 15, 10_000
PROPERTIES = []


def holds(share=1, **strategies):
    "A property, as a test of a few cases and as a long one; `share` is its part of the 10,000."
    def _test(check):
        PROPERTIES.append(share)
        @pytest.mark.parametrize("cases", [SHORT, pytest.param(share, marks=pytest.mark.long)], ids=["short", "long"])
        def test(cases):
            examples = cases if cases == SHORT else math.ceil(LONG * share / sum(PROPERTIES))
            options = settings(max_examples=examples, deadline=None, database=None, derandomize=cases == SHORT, print_blob=False, suppress_health_check=list(HealthCheck))
            run = options(given(**strategies)(check))
            if cases != SHORT: run = seed(int(os.environ.get("SEED", 0)))(run)
            run()
        test.__doc__, test.__name__ = check.__doc__, check.__name__
        return test
    return _test


def flawed(recipe): return recipe.defect is not None or recipe.broken


def spoken(recipe, *options):
    "What a message about these tasks may name."
    return [*options, *next(iter(recipe.recipe.values())), *recipe.recipe, "one too many", *["singular values"] * recipe.extreme]


def expect(result, fails, may_fail, like=None, dtype=None):
    "An error where there has to be one, a result where there must not be one."
    if isinstance(result, Refused):
        assert fails or may_fail, f"refused: {result.error}"
        return False
    assert not fails, "should have been refused"
    if like is not None: check_result(result, like, dtype)
    return True


# checkpoints and differences


@st.composite
def two_checkpoints(draw):
    "A base and a fine-tuned checkpoint, with a buffer, perhaps of two precisions, perhaps with something wrong."
    model = draw(layouts_of_models())
    kinds = ORDINARY + draw(st.sampled_from(((), (), EXTREME, BROKEN)))
    pair = [{name: draw(entries(shape, dtype if draw(st.integers(0, 4)) else draw(st.sampled_from(DTYPES)), kinds)) for name, (shape, dtype) in model.items()} for _ in range(2)]
    return (*pair, draw(st.sampled_from((None, None, None, "missing", "extra", "shape", "integers"))))


@holds(2, case=two_checkpoints(), alpha=st.sampled_from((1., .3, 0., -1.)))
def test_a_difference_leads_from_one_checkpoint_to_the_other(case, alpha):
    base, tuned = ({name: e.make() for name, e in recipe.items()} | {"steps": torch.tensor(3)} for recipe in case[:2])
    name, every = next(iter(case[0])), [e for recipe in case[:2] for e in recipe.values()]
    if case[2] == "missing": del tuned[name]
    elif case[2] == "extra": tuned["one too many"] = torch.ones(3)
    elif case[2] == "shape": tuned[name] = torch.ones(7, *tuned[name].shape)
    elif case[2] == "integers": tuned[name] = torch.ones(tuned[name].shape, dtype=torch.int32)
    broken = any(e.values in BROKEN and math.prod(e.shape) and not hidden(e) for e in every)
    mixed = len({e.dtype for e in every}) > 1
    extreme = any(e.values == "largest" or mixed and e.values == "large" for e in every)
    tau = outcome(task_vector, base, tuned, says=[*base, "one too many"])
    if not expect(tau, broken or case[2] is not None, extreme): return
    check_result(tau, {k: v for k, v in tuned.items() if k != "steps"})
    back = outcome(lambda b, t: apply_task_vector(b, t, alpha), base, tau, says=base)
    if not expect(back, False, extreme, base): return
    assert back["steps"] == 3 and back["steps"].data_ptr() != base["steps"].data_ptr()
    for k, t in tau.items():
        start, end = base[k].detach().double(), tuned[k].detach().double()
        want = start + alpha * (end - start)
        rough = max(torch.finfo(x.dtype).eps for x in (base[k], tuned[k]))
        size = float(max(start.abs().max(), end.abs().max())) if want.numel() else 0.
        smallest = max(torch.finfo(x.dtype).tiny for x in (base[k], tuned[k])) # below, numbers are rounded to subnormal ones, or flushed to zero
        assert not want.numel() or float((back[k].detach().double() - want).abs().max()) <= 6 * rough * size + smallest, k


# one matrix


@st.composite
def batches(draw, kinds=ORDINARY + EXTREME):
    lead = draw(st.sampled_from(((), (), (), (2,), (0,), (2, 2))))
    return Entry((*lead, draw(st.sampled_from((*SIDES, 0))), draw(st.sampled_from((*SIDES, 0)))), draw(st.sampled_from(DTYPES)), draw(st.sampled_from(kinds)), draw(st.sampled_from(LAYOUTS)), draw(seeds))


@holds(2, case=batches(ORDINARY + EXTREME + BROKEN), rank=st.sampled_from((1, 1, 2, 5, 30, 0, -1, 1000, "all")), method=st.sampled_from((*SVD_METHODS, "auto", "auto", "qr")))
def test_truncated_svd(case, rank, method):
    "Orthonormal vectors, descending values, and an error no larger than the next singular value."
    x = case.make()
    r = min(x.shape[-2:])
    k = r if rank == "all" else rank
    broken = case.values in BROKEN and x.numel() and not hidden(case)
    f = outcome(lambda x: truncated_svd(x, k, method), x, says=["rank", "delta", "SVD method", "singular values"])
    if not expect(f, broken or method == "qr" or not 1 <= k <= r, case.values == "largest" or case.dtype == torch.float16 and case.values == "large"): return
    assert f.matrix_shape == x.shape and f.rank == k and {o.dtype for o in f} == {x.dtype}
    if not x.numel(): return
    U, S, Vh = (o.detach().double() for o in f)
    assert all(torch.isfinite(o).all() for o in (U, S, Vh))
    assert (S >= 0).all() and (S[..., 1:] <= S[..., :-1] + 8 * eps(x.dtype) * S[..., :1]).all()
    whole = x.detach().double() / 2. ** min(1000, max(-1000, round(math.log2(float(x.detach().double().abs().max()) or 1.)))) # squares of the extreme numbers do not fit
    unit = whole.abs().max() / (x.detach().double().abs().max() or 1.)
    values, tol = torch.linalg.svdvals(whole), 8 * max(x.shape[-2:]) ** .5 * eps(x.dtype)
    live = values[..., :1] > 0
    assert ((U.mT @ U - torch.eye(k)).abs().amax((-2, -1))[..., None] * live <= 4 * tol).all() and ((Vh @ Vh.mT - torch.eye(k)).abs().amax((-2, -1))[..., None] * live <= 4 * tol).all()
    if case.values == "smallest": return # S itself is rounded to a few bits
    assert ((S * unit - values[..., :k]).abs() <= tol * values[..., :1] + 1e-300).all()
    error = torch.linalg.matrix_norm(whole - (U * (S * unit).unsqueeze(-2)) @ Vh, 2)
    bound = values[..., k] if k < r else torch.zeros_like(values[..., 0])
    assert (error <= bound + 2 * tol * values[..., 0]).all()


@holds(1, case=batches(ORDINARY + EXTREME + BROKEN), method=st.sampled_from((*POLAR_METHODS, "auto", "qr")))
def test_orthogonalize(case, method):
    "A partial isometry with the rank of its input, symmetric positive in its company, and the same for any scale."
    X = case.make()
    broken = case.values in BROKEN and X.numel() and not hidden(case)
    Q = outcome(lambda X: orthogonalize(X, method), X, says=["orthogonalize method", "X"])
    if not expect(Q, broken or method == "qr", case.values == "largest", {"X": X} if isinstance(Q, Refused) else None): return
    check_result({"Q": Q}, {"Q": X})
    if not X.numel(): return
    Q, tol = Q.double(), 64 * max(X.shape[-2:]) * eps(X.dtype) ** (.5 if method == "eigh" else 1)
    assert ((Q @ Q.mT @ Q - Q).abs() <= max(tol, 1e-4)).all()
    x = X.detach().double() / (X.detach().double().abs().amax((-2, -1), keepdim=True) + 1e-300)
    H = Q.mT @ x if x.shape[-2] >= x.shape[-1] else x @ Q.mT
    assert ((H - H.mT).abs() <= 1e-2 * max(X.shape[-2:])).all() if case.dtype in (torch.float16, torch.bfloat16) else ((H - H.mT).abs() <= max(tol, 1e-3) * max(X.shape[-2:])).all()


# compression and archives


compress_options = st.fixed_dictionaries({}, optional=dict(rank=st.sampled_from((1, 2, 7, 10_000, 0, -3, 1.5, True)), ratio=st.sampled_from((.1, .5, 1., 1e-9, 0., 1.5, math.nan)),
                                                           fraction=st.sampled_from((.25, 1., 0., 2.)), dtype=st.sampled_from((torch.float16, torch.bfloat16, torch.float64, torch.int8))))


def bad_compression(options, matrices):
    "Whether options of `compress` have to be refused; rank and fraction are looked at where there is a matrix."
    if not 0 < options.get("ratio", .1) <= 1 or options.get("dtype") == torch.int8: return True
    if "fraction" in options: return matrices and not 0 < options["fraction"] <= 1
    return matrices and "rank" in options and not (isinstance(options["rank"], int) and options["rank"] >= 1)


@holds(4, case=tasks(most=1), options=compress_options)
def test_compression_and_its_archive(case, options):
    "What is kept is the best of its size; the archive holds exactly that, and the base gets it back."
    vector = case.make()["task 0"]
    archive = outcome(lambda v: compress(v, **options), vector, says=spoken(case, "rank", "ratio", "fraction", "dtype", "task vector"))
    matrices = case.defect is None and any(x.ndim == 2 and "text_projection" not in n for n, x in vector.items())
    narrow = options.get("dtype") == torch.float16 and any(e.values == "large" for e in case.all())
    if not expect(archive, flawed(case) or bad_compression(options, matrices), case.extreme or narrow): return
    back = outcome(CompressedTaskVector.decompress, archive)
    assert list(archive) == list(back) and set(back) == set(vector)
    check_result({n: back[n] for n in vector}, vector)
    assert archive.nbytes <= sum(x.numel() * (options.get("dtype") or x.dtype).itemsize for x in vector.values())
    rough = {n: max(eps(x.dtype), eps(options.get("dtype") or x.dtype)) for n, x in vector.items()}
    other_range = "dtype" in options and any(e.values in ("small", "large") for e in case.all()) # numbers that are zero in another type
    for name, x in vector.items() if not case.extreme and not other_range else ():
        if name in archive.dense: assert distance(back[name], x) <= 2 * rough[name]; continue
        values = torch.linalg.svdvals(scaled(x))
        missing = float(values[archive.factors[name].rank:].norm() / values.norm()) if values.any() else 0.
        assert distance(back[name], x) <= missing + 32 * max(x.shape) ** .5 * rough[name], name
    again = outcome(lambda a, b: a.apply_to(b), archive, {n: torch.zeros_like(x) for n, x in vector.items()}, says=vector)
    check_result(again, vector)
    for name in vector: assert case.extreme or distance(again[name], back[name]) <= 4 * rough[name], name
    with tempfile.TemporaryDirectory() as folder:
        saved = outcome(lambda a: a.save(Path(folder) / "archive.safetensors"), archive, says=["half a character"])
        if expect(saved, any("\ud83d" in n for n in vector), False): same(archive, CompressedTaskVector.load(saved))


def same(a, b):
    assert a.dtypes == b.dtypes and a.factors.keys() == b.factors.keys() and a.dense.keys() == b.dense.keys()
    for x, y in [*((x, y) for n in a.factors for x, y in zip(a.factors[n], b.factors[n])), *((a.dense[n], b.dense[n]) for n in a.dense)]:
        assert x.dtype == y.dtype and torch.equal(x, y)


@holds(2, case=tasks(), density=st.sampled_from((10., 50., 100., 0., 101., math.nan)), lam=st.sampled_from((.4, 0., 2., -1., math.inf)), kind=st.sampled_from(("tall", "magnitude")))
def test_masks_and_their_archive(case, density, lam, kind):
    "Masks select from the merged vector; a file gives the same ones back."
    vectors = case.make()
    size = sum(math.prod(e.shape) for e in next(iter(case.recipe.values())).values())
    fails = not (math.isfinite(lam) and lam >= 0) if kind == "tall" else not 0 < density <= 100 or int(size * density / 100) == 0
    masks = outcome((lambda v: tall_masks(v, lam)) if kind == "tall" else (lambda v: magnitude_masks(v, density)), vectors, says=spoken(case, "density", "lam", "multi"))
    if not expect(masks, flawed(case) or fails, case.extreme): return
    total = {n: x.nan_to_num() for n, x in task_arithmetic(vectors).items()} if case.extreme else task_arithmetic(vectors)
    for task in vectors:
        kept = outcome(lambda m, t: m.apply(t, task), masks, total, says=total)
        check_result(kept, total)
        assert all(bool(((x == 0) | (x == total[n])).all()) for n, x in kept.items())
    with tempfile.TemporaryDirectory() as folder:
        saved = outcome(lambda m: m.save(Path(folder) / "masks.safetensors"), masks, says=["half a character"])
        if not expect(saved, any("\ud83d" in n for n in total), False): return
        loaded = TaskMasks.load(saved)
    assert loaded.tasks == masks.tasks and loaded.shapes == masks.shapes and all(torch.equal(loaded.packed[n], p) for n, p in masks.packed.items())


# merges


tsv_options = st.fixed_dictionaries({}, optional=dict(
    rank=st.sampled_from((1, 1, 2, "full", "full", 50, 0, -1, 1.5, "half")), orthogonalize=st.sampled_from((*POLAR_METHODS, None, None, "qr")), split=st.sampled_from(("qkv", "qkv", "kqv")),
    small=st.sampled_from(("average",) * 5 + ("raise", "skip")), weights=st.sampled_from(("halves", "halves", "too many", "nan")), batch_bytes=st.sampled_from((1, 2**20))))


def bad_merge(vectors, options):
    "Whether `tsv_merge` has to refuse its options for task vectors that are in order."
    T, rank, split = len(vectors), options.get("rank"), options.get("split")
    if options.get("orthogonalize") == "qr" or split == "kqv" or options.get("small") == "skip" or "weights" in options and options["weights"] != "halves": return True
    if not (rank in (None, "full") or isinstance(rank, int) and rank >= 1): return True
    for name, x in next(iter(vectors.values())).items():
        if x.ndim != 2 or "text_projection" in name or not any(v[name].any() for v in vectors.values()): continue
        parts = 3 if split == "qkv" and name.endswith("in_proj_weight") else 1
        r = min(x.shape[0] // parts, x.shape[1])
        k = r // T if rank is None else rank
        if x.shape[0] % parts or rank != "full" and (k < 1 or k * T > r) and options.get("small") != "average": return True
    return False


@holds(5, case=tasks(), options=tsv_options)
def test_tsv_merge(case, options):
    vectors = case.make()
    given_weights = {"halves": [.5] * len(vectors), "too many": [1.] * (len(vectors) + 1), "nan": [math.nan] * len(vectors)}.get(options.get("weights"))
    merged = outcome(lambda v: tsv_merge(v, **options | dict(weights=given_weights)), vectors,
                     says=spoken(case, "orthogonalize method", "value for small", "unknown split", "weights", "rank must"))
    fails = flawed(case) or bad_merge(vectors, options)
    if not expect(merged, fails, case.extreme, next(iter(vectors.values()))): return
    weights = given_weights or [1.] * len(vectors)
    for name, x in merged.items():
        if x.ndim == 2 and "text_projection" not in name or case.extreme: continue
        want = sum(w * v[name].detach().double() for w, v in zip(weights, vectors.values())) / len(vectors)
        size = sum(v[name].detach().double().abs() for v in vectors.values())
        assert bool(((x.double() - want).abs() <= 2 * eps(x.dtype) * size + torch.finfo(x.dtype).tiny).all()), name


@holds(4, case=tasks(most=3), name=st.sampled_from(sorted(MERGE_METHODS)))
def test_every_merge_method(case, name):
    vectors = case.make()
    merged = outcome(MERGE_METHODS[name], vectors, says=spoken(case, "density"))
    size = sum(math.prod(e.shape) for e in next(iter(case.recipe.values())).values())
    empty = "ties" in name and size // 5 == 0 # TIES keeps a fifth of the entries, and there are fewer than five
    fails = flawed(case) and not (name == "zero_shot" and case.defect is None) # which reads no numbers
    if fails or empty: expect(merged, True, False); return
    if name == "knots_ties" and isinstance(merged, Refused) and "density" in str(merged.error): return # it trims matrices and the rest apart; the rest has fewer than five
    expect(merged, False, case.extreme, next(iter(vectors.values())))


@holds(3, case=tasks(), rank=st.sampled_from((None, None, 1, 3, 1000, 0, "full")), norm=st.sampled_from((*NORMS, "entrywise", "trace")), pairs=st.booleans())
def test_interference(case, rank, norm, pairs):
    "Numbers that are not negative; none for one task, and for a pair what the two alone have."
    vectors = case.make()
    score = outcome(lambda v: (pairwise_interference if pairs else interference_by_layer)(v, rank=rank, norm=norm), vectors, says=spoken(case, "rank", "norm"))
    matrices = [] if flawed(case) else [n for n, x in next(iter(vectors.values())).items() if x.ndim == 2 and "text_projection" not in n]
    seen = any(e.values in BROKEN and len(e.shape) == 2 and "text_projection" not in n for v in case.recipe.values() for n, e in v.items()) # only matrices are read
    fails = case.defect is not None or case.broken and seen or rank in (0, "full") or norm == "trace" and (matrices or case.broken and seen)
    if not expect(score, fails, case.extreme): return
    if not pairs:
        if not case.broken: assert list(score) == matrices
        assert all(math.isfinite(s) and s >= 0 and (len(vectors) > 1 or s == 0) for s in score.values())
        return
    T = len(vectors)
    assert score.shape == (T, T) and torch.isfinite(score).all() and torch.equal(score, score.T) and not score.diagonal().any() and (score >= 0).all()


# what must not matter


def scaled(x):
    "In float64, with entries of at most 1: squares of large and small numbers do not fit."
    x = x.detach().double()
    return x / (x.abs().max() if x.numel() and x.any() else 1.)


@st.composite
def known_components(draw):
    "Task matrices of rank q with well separated singular values, so that nothing depends on where a spectrum is cut."
    T, q = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    m, n = (draw(st.integers((T + 1) * q, 24) | st.sampled_from((70, 130))) for _ in "mn")
    return T, q, m, n, draw(st.sampled_from(DTYPES)), draw(seeds), draw(st.sampled_from(LAYOUTS).filter(lambda o: o != "expanded"))


def components(T, q, m, n, dtype, number, layout):
    g = torch.Generator().manual_seed(number)
    def basis(d): return torch.linalg.qr(torch.randn(T, d, q, generator=g, dtype=torch.float64))[0]
    deltas = basis(m) * torch.tensor([4., 2., 1.][:q]) @ basis(n).mT
    return [laid_out(d.to(dtype), layout) for d in deltas]


def sensitivity(deltas, q, method):
    "How much the merge magnifies rounding: by the inverse of the shortest direction that is made orthonormal (of its square, for the Gram matrix)."
    f = [torch.linalg.svd(d.detach().double(), full_matrices=False) for d in deltas]
    shortest = min(float(torch.linalg.svdvals(torch.cat(o, 1))[-1]) for o in ([U[:, :q] for U, _, _ in f], [V[:q].mT for _, _, V in f]))
    return (1 / max(shortest, 1e-9)) ** (2 if method == "eigh" else 1)


@holds(4, case=known_components(), method=st.sampled_from((*POLAR_METHODS, None)), shift=st.integers(0, 2**16), data=st.data())
def test_what_tsv_merge_does_not_depend_on(case, method, shift, data):
    "The tasks' order, orientation, scale, coordinates; tasks of zeros, the same task again, weights given as factors."
    T, q, m, n, dtype, number, layout = case
    deltas = components(*case)
    def merge(ds, **options): return tsv_merge([{"w": d} for d in ds], **dict(rank=q, orthogonalize=method) | options)["w"]
    tol = 64 * max(m, n) ** .5 * eps(dtype) * (sensitivity(deltas, q, method) if method else 1)
    if tol > .1: return # the bases of two tasks nearly share a direction: no digit is certain
    merged, order = merge(deltas), data.draw(st.permutations(range(T)))
    power = shift % 5 if dtype == torch.float16 else shift % 41 - 20
    close = dict(order=(merge([deltas[i] for i in order]), merged), orientation=(merge([d.mT for d in deltas]).mT, merged),
                 scale=(merge([d * 2. ** power for d in deltas]).double() / 2. ** power, merged),
                 weights=(merge(deltas, weights=[2.] * T).double() / 2, merged), zeros=(merge([*deltas, torch.zeros_like(deltas[0])]), merged),
                 memory=(merge([d.detach().clone(memory_format=torch.contiguous_format) for d in deltas]), merged), alone=(merge(deltas[:1]), deltas[0]))
    if method: close["twice"] = merge([deltas[0], deltas[0]]), deltas[0] # a direction counts once, however many tasks have it
    for what, (got, want) in close.items(): assert distance(got, want) <= tol, (what, distance(got, want), tol)


@holds(2, case=known_components(), shift=st.integers(0, 2**16), norm=st.sampled_from(NORMS), data=st.data())
def test_what_interference_does_not_depend_on(case, shift, norm, data):
    T, q, m, n, dtype, number, layout = case
    deltas = components(*case)
    def score(ds): return interference_by_layer([{"w": d} for d in ds], rank=q, norm=norm)["w"]
    whole, power = score(deltas), shift % 5 if dtype == torch.float16 else shift % 41 - 20
    tol = 64 * T * q * max(m, n) ** .5 * eps(dtype) * 4 * T # absolute: singular values are 4 at most
    order = data.draw(st.permutations(range(T)))
    for got in (score([deltas[i] for i in order]), score([d.mT for d in deltas]), score([d * 2. ** power for d in deltas]) / 2. ** power): assert abs(got - whole) <= tol
    pairs = pairwise_interference([{"w": d} for d in deltas], rank=q, norm=norm)
    for i in range(T):
        for j in range(i): assert abs(float(pairs[i, j]) - score([deltas[i], deltas[j]])) <= tol


@holds(3, case=tasks(most=3, defects=False, broken=False, extreme=False, one_dtype=True), name=st.sampled_from(sorted(MERGE_METHODS)), power=st.integers(-12, 12), data=st.data())
def test_what_no_method_depends_on(case, name, power, data):
    "The tasks' order, and a power of two that all numbers are multiplied by."
    vectors = case.make()
    first = next(iter(vectors.values()))
    dtype = next(iter(first.values())).dtype
    if any(e.values in ("small", "large") for e in case.all()): return # scaled beyond the type
    if dtype == torch.float16: power = 0
    merged = outcome(MERGE_METHODS[name], vectors, says=["density"])
    if isinstance(merged, Refused): return
    shuffled = MERGE_METHODS[name]({t: vectors[t] for t in data.draw(st.permutations(sorted(vectors)))})
    other = MERGE_METHODS[name]({t: {n: x.detach() * 2. ** power for n, x in v.items()} for t, v in vectors.items()})
    for n, x in merged.items():
        tol = 64 * (sum(x.shape) + 1) ** .5 * eps(dtype) * condition([v[n] for v in vectors.values()])
        if tol > .05: continue
        assert distance(shuffled[n], x) <= tol, ("order", n, distance(shuffled[n], x), tol)
        assert distance(other[n].double() / 2. ** power, x) <= tol, ("scale", n, distance(other[n].double() / 2. ** power, x), tol)


def condition(deltas):
    "How much a method that equalizes or raises singular values magnifies rounding: S_1 over the smallest one that is not zero, of the sum and of each task."
    if deltas[0].ndim != 2 or not deltas[0].numel(): return 1.
    deltas = [d.detach().double() for d in deltas]
    worst = 1.
    for d in (sum(deltas), *deltas, torch.cat(deltas), torch.cat(deltas, 1)):
        values = torch.linalg.svdvals(d)
        values = values[values > 1e-13 * max(1e-300, float(values[0]))]
        if len(values): worst = max(worst, float(values[0] / values[-1]))
    return worst
