"""Isotropic merging, calibration and boosting against loops in float64 written from the formulas, and what must not change."""
import numpy as np
import pytest
import torch
from conftest import make_vectors

from tsv_nb.beyond import (BASE_METHODS, base_method, boost_singular_values, boosted_merge, calibrate_singular_values, calibrated_merge,
                           isotropic_merge)
from tsv_nb.task_vectors import task_arithmetic, weight_average

SHAPES = [(24, 24), (64, 48), (48, 64), (100, 63), (40, 781)]


def double(vectors, name="w"): return [v[name].double().numpy() for v in vectors.values()]


def svd(x): return np.linalg.svd(x, full_matrices=False)


def polar(x):
    u, _, vh = svd(x)
    return u @ vh


def iso_c(deltas):
    u, s, vh = svd(sum(deltas))
    return s.mean() * u @ vh


def iso_cts(deltas, fraction):
    "Section 4 of arXiv 2502.04959 with the counts of its reference code, one task after the other."
    T, r = len(deltas), min(deltas[0].shape)
    s = round((r - int(r * fraction)) / T)
    k = r - s * T
    u, sigma, vh = svd(sum(deltas))
    left, right, values = [u[:, :k]], [vh[:k].T], [sigma[:k]]
    for d in deltas:
        rest = np.zeros_like(d)
        for j in range(d.shape[1]): rest[:, j] = d[:, j] - sum((u[:, i] @ d[:, j]) * u[:, i] for i in range(k))
        a, b, c = svd(rest)
        left.append(a[:, :s]), values.append(b[:s]), right.append(c[:s].T)
    return np.concatenate(values).mean() * polar(np.concatenate(left, 1)) @ polar(np.concatenate(right, 1)).T


def svc(merged, deltas, floor):
    "One direction and one task at a time."
    u, s, vh = svd(merged)
    new = []
    for i in range(len(s)):
        counts = []
        for d in deltas:
            a = u[:, i] @ d
            counts.append(max(floor, (u[:, i] @ merged) @ a / (a @ a)))
        new.append(s[i] / (sum(counts) / len(counts)))
    return u @ np.diag(new) @ vh


def boost(merged, beta):
    u, s, vh = svd(merged)
    k, reached = 0, s[0]
    while reached < beta * s.sum() and k < len(s) - 1:
        k += 1
        reached += s[k]
    return u @ np.diag([max(x, s[k]) for x in s]) @ vh


def relative(a, b):
    b = torch.as_tensor(np.asarray(b)).double()
    return ((a.double() - b).norm() / b.norm()).item()


# ---- the formulas

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("T", [2, 5])
def test_isotropic_against_the_formula(g, shape, T):
    v = make_vectors(g, T, {"w": shape})
    assert relative(isotropic_merge(v)["w"], iso_c(double(v))) < 1e-4
    assert relative(isotropic_merge(v, common=.8)["w"], iso_cts(double(v), .8)) < 1e-4
    assert relative(isotropic_merge(v, common=.4)["w"], iso_cts(double(v), .4)) < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("floor", [.1, 1., 3.])
def test_calibration_against_the_formula(g, shape, floor):
    v = make_vectors(g, 4, {"w": shape})
    assert relative(calibrated_merge(v, floor=floor)["w"], svc(sum(double(v)), double(v), floor)) < 1e-4
    other = make_vectors(g, 1, {"w": shape})["task0"] # any merged vector will do
    assert relative(calibrate_singular_values(other, v, floor)["w"], svc(other["w"].double().numpy(), double(v), floor)) < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("beta", [0., .01, .2, .5, .9, .999])
def test_boosting_against_the_formula(g, shape, beta):
    v = make_vectors(g, 3, {"w": shape})
    assert relative(boosted_merge(v, beta=beta)["w"], boost(sum(double(v)), beta)) < 1e-4


@pytest.mark.parametrize("dtype, tol", [(torch.float16, 3e-3), (torch.bfloat16, 2e-2), (torch.float64, 1e-9)])
def test_dtypes(g, dtype, tol):
    v = make_vectors(g, 3, {"w": (60, 40), "b": (60,)}, dtype)
    d = double(v)
    for out, want in ((isotropic_merge(v), iso_c(d)), (isotropic_merge(v, .8), iso_cts(d, .8)),
                      (boosted_merge(v, beta=.3), boost(sum(d), .3))):
        assert out["w"].dtype == out["b"].dtype == dtype
        assert relative(out["w"], want) < tol
    rounded = task_arithmetic(v) # a base returns the inputs' dtype
    out = calibrated_merge(v)
    assert out["w"].dtype == dtype and relative(out["w"], svc(rounded["w"].double().numpy(), d, 1.)) < tol


# ---- identities

def merges(v): return {"iso": isotropic_merge(v), "cts": isotropic_merge(v, .8), "svc": calibrated_merge(v), "boost": boosted_merge(v, beta=.3)}


def test_order_and_scale_of_tasks(g):
    v = make_vectors(g, 4, {"w": (30, 22), "b": (30,)})
    a, b = merges(v), merges(dict(reversed(v.items())))
    c = merges({t: {k: -1e-4 * x for k, x in d.items()} for t, d in v.items()})
    for m in a:
        for k in ("w", "b"):
            torch.testing.assert_close(a[m][k], b[m][k], rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(-1e-4 * a[m][k], c[m][k], rtol=1e-3, atol=1e-8)


def test_transposed_layers(g):
    "Iso-C and boosting do not care; Iso-CTS and calibration look at the left singular vectors only, as published."
    v = make_vectors(g, 4, {"w": (30, 22)})
    a, b = merges(v), merges({t: {"w": d["w"].T} for t, d in v.items()})
    for m in a: assert (relative(b[m]["w"].T, a[m]["w"]) < 1e-4) == (m in ("iso", "boost")), m


@pytest.mark.parametrize("common", [None, .8, .3, 0.])
def test_isotropic_spectrum(g, common):
    v = make_vectors(g, 3, {"w": (40, 30)})
    S = torch.linalg.svdvals(isotropic_merge(v, common)["w"])
    assert S.max() / S.min() < 1 + 1e-4
    if common is None:
        total = task_arithmetic(v)["w"]
        assert relative(S.sum(), torch.linalg.svdvals(total).sum()) < 1e-5
        assert relative(isotropic_merge(v)["w"] / S.mean(), polar(total.double().numpy())) < 1e-4


def test_all_common_is_iso_c(g):
    v = make_vectors(g, 3, {"w": (40, 30), "pos": (2, 30), "b": (40,)})
    for k in v["task0"]: torch.testing.assert_close(isotropic_merge(v, 1.)[k], isotropic_merge(v)[k], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(isotropic_merge(v, .8)["pos"], isotropic_merge(v)["pos"], rtol=1e-4, atol=1e-5) # no place to give away


def test_calibration_of_copies_and_of_tasks_that_do_not_meet(g):
    w = torch.randn(30, 20, generator=g)
    assert relative(calibrated_merge([{"w": w}] * 5)["w"], w) < 1e-5
    rows = [torch.zeros(30, 20) for _ in range(3)] # orthogonal row spaces alone are enough: every count is one
    for i, x in enumerate(rows): x[:, 6 * i:6 * i + 6] = torch.randn(30, 6, generator=g)
    vectors = [{"w": x} for x in rows]
    assert relative(calibrated_merge(vectors)["w"], sum(rows)) < 1e-5
    blocks = [{"w": torch.block_diag(*(torch.randn(5, 4, generator=g) * (i == j) for j in range(3)))} for i in range(3)]
    assert relative(calibrated_merge(blocks)["w"], sum(b["w"] for b in blocks)) < 1e-5


@pytest.mark.parametrize("unit", [1., 1e-5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_calibration_does_not_listen_to_rounding_noise(g, unit, dtype):
    "Tasks that do not meet, in general position: where one has nothing to say, its response is rounding noise, not zero."
    Q, R = (torch.linalg.qr(torch.randn(n, 12, generator=g))[0] for n in (40, 30))
    v = [{"w": unit * ((Q[:, t::3] * torch.arange(12., 0., -1)[t::3]) @ R[:, t::3].T).to(dtype)} for t in range(3)]
    assert relative(calibrated_merge(v)["w"], sum(d["w"] for d in v)) < 1e-4


def test_calibration_only_shrinks_a_sum(g):
    v = make_vectors(g, 6, {"w": (50, 30)})
    U, S, Vh = torch.linalg.svd(task_arithmetic(v)["w"].double(), full_matrices=False)
    new = (U.T @ calibrated_merge(v)["w"].double() @ Vh.T).diagonal()
    assert (new < S * (1 + 1e-5)).all() and (new > 0).all()


def test_the_mean_with_a_floor_of_one_over_T_is_the_sum_with_one(g):
    v = make_vectors(g, 4, {"w": (30, 20), "b": (30,)})
    mean, total = calibrated_merge(v, weight_average, floor=1 / 4), calibrated_merge(v)
    assert relative(mean["w"], total["w"]) < 1e-4
    torch.testing.assert_close(mean["b"], weight_average(v)["b"]) # what is not a matrix stays as the base made it


def test_one_task(g):
    v = make_vectors(g, 1, {"w": (30, 20), "b": (30,), "conv": (4, 3, 2, 2)})
    for k, want in v["task0"].items():
        torch.testing.assert_close(calibrated_merge(v)[k], want, rtol=1e-4, atol=1e-5)
        assert torch.equal(boosted_merge(v, beta=1.)[k], want)


def test_low_rank_stays_low_rank(g):
    "Null-space noise is not lifted: rank-2 tasks give at most rank 2 T, in float32 and float64, padded or not."
    low = [{"w": torch.randn(40, 2, generator=g) @ torch.randn(2, 30, generator=g)} for _ in range(3)]
    padded = [{"w": torch.nn.functional.pad(v["w"], (0, 50, 0, 70))} for v in low]
    for dtype in (torch.float32, torch.float64):
        v = [{"w": x["w"].to(dtype)} for x in low]
        p = [{"w": x["w"].to(dtype)} for x in padded]
        for method in (isotropic_merge, lambda x: isotropic_merge(x, .8), boosted_merge, calibrated_merge):
            S = torch.linalg.svdvals(method(v)["w"].double())
            assert S[5] > 1e-2 * S[0] and S[6] < 1e-4 * S[0]
        for method in (isotropic_merge, boosted_merge, calibrated_merge): assert relative(method(p)["w"][:40, :30], method(v)["w"]) < 1e-4


def test_a_task_inside_the_common_subspace_gets_no_noise(g):
    "Ten tasks in one 3-dimensional column space: Iso-CTS has 2 places for each, and nothing to put there."
    basis = torch.linalg.qr(torch.randn(40, 3, generator=g))[0]
    for dtype, tol in ((torch.float32, 1e-4), (torch.float16, 2e-2)):
        v = [{"w": (basis @ torch.randn(3, 100, generator=g)).to(dtype)} for _ in range(10)]
        S = torch.linalg.svdvals(isotropic_merge(v, .5)["w"].double())
        assert S[2] > .9 * S[0] and S[3] < tol * S[0]


def test_zero_matrices_and_zero_tasks(g):
    v = make_vectors(g, 3, {"w": (20, 12), "b": (20,)})
    still = {**v, "idle": {k: torch.zeros_like(x) for k, x in v["task0"].items()}}
    for method in (isotropic_merge, lambda x: isotropic_merge(x, .5), calibrated_merge, boosted_merge):
        out = method(still)
        assert all(torch.isfinite(x).all() for x in out.values()) and out["w"].any()
        frozen = method([{k: torch.zeros_like(x) for k, x in v["task0"].items()}] * 2)
        assert not any(x.any() for x in frozen.values())
    assert relative(isotropic_merge(still)["w"], isotropic_merge(v)["w"]) < 1e-5
    assert relative(boosted_merge(still)["w"], boosted_merge(v)["w"]) < 1e-5


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 5)])
def test_small_matrices(g, shape):
    v = make_vectors(g, 4, {"w": shape})
    d = double(v)
    assert relative(isotropic_merge(v)["w"], iso_c(d)) < 1e-4
    assert relative(isotropic_merge(v, .8)["w"], iso_c(d) if min(shape) < 4 else iso_cts(d, .8)) < 1e-4
    assert relative(calibrated_merge(v)["w"], svc(sum(d), d, 1.)) < 1e-4
    if min(shape) < 4: assert relative(isotropic_merge(v, 0.)["w"], iso_c(d)) < 1e-4 # round(3 / 4) places would be more than there are


# ---- what is not a matrix, inputs, bases, errors

def test_other_entries(g):
    v = make_vectors(g, 3, {"text_projection": (12, 8), "positional_embedding": (12, 8), "b": (12,)})
    mean, total = weight_average(v), task_arithmetic(v)
    iso, svc_, up = isotropic_merge(v), calibrated_merge(v), boosted_merge(v)
    for k in ("text_projection", "b"):
        torch.testing.assert_close(iso[k], mean[k])
        assert torch.equal(svc_[k], total[k]) and torch.equal(up[k], total[k])
    assert torch.equal(svc_["positional_embedding"], total["positional_embedding"])
    assert not torch.equal(up["positional_embedding"], total["positional_embedding"])
    assert not torch.allclose(isotropic_merge(v, exclude=())["text_projection"], mean["text_projection"])


def test_inputs_stay_as_they_are(g):
    v = make_vectors(g, 3, {"w": (20, 12), "b": (20,)})
    before = {t: {k: x.clone() for k, x in d.items()} for t, d in v.items()}
    out = [*merges(v).values(), boost_singular_values(v["task0"], 1.), calibrate_singular_values(v["task0"], v)]
    for o in out:
        for x in o.values(): x.fill_(7.)
    for t, d in v.items():
        for k, x in d.items(): assert torch.equal(x, before[t][k])


def test_bases(g):
    v = make_vectors(g, 3, {"w": (20, 12), "b": (20,)})
    for name, base in BASE_METHODS.items():
        assert base_method(name) is base
        assert torch.equal(boosted_merge(v, name, beta=.5)["w"], boost_singular_values(base(v), .5)["w"])
        assert torch.equal(calibrated_merge(v, name)["w"], calibrate_singular_values(base(v), v)["w"])
    weighted = task_arithmetic(v, [2., 0., 1.])
    assert torch.equal(boosted_merge(v, beta=1., weights=[2., 0., 1.])["w"], weighted["w"])
    assert torch.equal(boosted_merge(v, lambda x: weighted, beta=1.)["w"], weighted["w"])


def test_errors(g):
    v = make_vectors(g, 2, {"w": (20, 12), "b": (20,)})
    for bad in (-.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match=r"common must be None \(Iso-C\) or a fraction in \[0, 1\]"): isotropic_merge(v, bad)
        with pytest.raises(ValueError, match=r"beta must be in \[0, 1\]"): boosted_merge(v, beta=bad)
    for bad in (0., -1., float("inf"), float("nan")):
        with pytest.raises(ValueError, match="floor must be a positive number"): calibrated_merge(v, floor=bad)
    with pytest.raises(ValueError, match="unknown base method 'mean'; known: 'task_arithmetic'"): boosted_merge(v, "mean")
    with pytest.raises(KeyError, match="merged task vector.*'b'"): calibrate_singular_values({"w": v["task0"]["w"]}, v)
    with pytest.raises(ValueError, match="merged task vector: tensor 'w'.*NaN"): calibrate_singular_values({**v["task0"], "w": v["task0"]["w"] * float("nan")}, v)
    with pytest.raises(ValueError, match="merged task vector: tensor 'w'.*NaN"): boost_singular_values({"w": torch.full((3, 3), float("nan"))})
    with pytest.raises(TypeError, match="merged task vector: expected a dict of tensors"): boost_singular_values(torch.ones(3))
    broken = {**v, "task1": {**v["task1"], "w": v["task1"]["w"] * float("inf")}}
    for method in (isotropic_merge, calibrated_merge, boosted_merge):
        with pytest.raises(ValueError, match="task 'task1': tensor 'w'"): method(broken)
        with pytest.raises(ValueError, match="no task vector given"): method([])
