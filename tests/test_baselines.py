"Zero-shot, TIES and DARE against formulas written from the papers as loops over single numbers, in float64."
import math
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import make_vectors
from safetensors.torch import save_file

from tsv_nb.baselines import (BASES, dare_merge, disjoint_merge, drop_entries, elect_signs, _entries_kept, magnitude_threshold, ties_merge, zero_shot)
from tsv_nb.checks import StateDictKeyError
from tsv_nb.lazy import LazyTaskVector
from tsv_nb.task_vectors import apply_task_vector, task_arithmetic, weight_average

SHAPES = {"w": (20, 12), "b": (20,), "scale": (), "conv": (4, 3, 2, 2), "none": (0, 3)}


def flatten(vector): return np.concatenate([e.double().numpy().reshape(-1) for e in vector.values()])


def reference(vectors, density=20, elect="mass", function="mean", weights=None):
    "TIES, one number after the other."
    rows, weights = [flatten(v) for v in vectors], weights or [1.] * len(vectors)
    d, trimmed = len(rows[0]), []
    for row, w in zip(rows, weights):
        cut = sorted(abs(row), reverse=True)[math.floor(d * density / 100 + 1e-9) - 1]
        trimmed.append([w * x if abs(x) >= cut else 0. for x in row])
    sign = lambda x: int(x > 0) - int(x < 0)
    votes = [sign(math.fsum(x if elect == "mass" else sign(x) for x in column)) for column in zip(*trimmed)]
    majority, out = sign(sum(votes)), []
    for vote, column in zip(votes, zip(*trimmed)):
        agree = [x for x in column if sign(x) and sign(x) == (vote or majority)]
        out.append({"mean": lambda a: math.fsum(a) / len(a), "sum": math.fsum, "max": lambda a: max(a, key=abs)}[function](agree) if agree else 0.)
    return np.array(out)


def whole_numbers(g, T, shapes=SHAPES):
    "Task vectors of small whole numbers: full of equal magnitudes, draws and zeros."
    return {f"task{t}": {k: torch.randint(-2, 3, s, generator=g).float() for k, s in shapes.items()} for t in range(T)}


@pytest.mark.parametrize("function", ["mean", "sum", "max"])
@pytest.mark.parametrize("elect", ["mass", "count"])
@pytest.mark.parametrize("density", [2, 20, 37.5, 100])
@pytest.mark.parametrize("T", [1, 2, 5])
def test_ties_against_loops(g, T, density, elect, function):
    v = make_vectors(g, T, SHAPES)
    got = flatten(ties_merge(v, density, elect, function))
    np.testing.assert_allclose(got, reference(v.values(), density, elect, function), rtol=3e-7, atol=0)


@pytest.mark.parametrize("function", ["mean", "sum", "max"])
@pytest.mark.parametrize("elect", ["mass", "count"])
@pytest.mark.parametrize("density", [20, 50, 100])
@pytest.mark.parametrize("T", [2, 4, 7])
def test_ties_with_equal_magnitudes_and_draws(g, T, density, elect, function):
    v = whole_numbers(g, T)
    v = {t: {k: e + .25 * (e == 2) for k, e in x.items()} for t, x in v.items()} # so that the signs do not balance
    want = reference(v.values(), density, elect, function)
    np.testing.assert_allclose(flatten(ties_merge(v, density, elect, function)), want, rtol=1e-6, atol=0)
    draws = sum(1 for column in zip(*(flatten(x) for x in v.values())) if any(column) and sum(column) == 0)
    assert draws > 5 or density < 100 or T == 7


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-14), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_ties_in_other_precisions(g, dtype, tol):
    v = make_vectors(g, 3, SHAPES, dtype)
    out = ties_merge(v)
    assert {e.dtype for e in out.values()} == {dtype}
    np.testing.assert_allclose(flatten(out), reference(v.values()), rtol=tol, atol=0)


def test_ties_with_entries_of_different_precision(g):
    "A float64 entry lets all entries be ranked in float64; each comes back in its own dtype."
    dtypes = {"w": torch.float64, "b": torch.float32, "scale": torch.float16}
    v = [{k: torch.randn(SHAPES[k], generator=g, dtype=torch.float64).to(d) for k, d in dtypes.items()} for _ in range(3)]
    out = ties_merge(v, 30)
    assert {k: e.dtype for k, e in out.items()} == dtypes
    np.testing.assert_allclose(flatten(out), reference(v, 30), rtol=1e-3)
    np.testing.assert_allclose(out["w"].numpy().ravel(), reference(v, 30)[:240], rtol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("function", ["mean", "sum", "max"])
def test_one_task_at_full_density_comes_back_bit_for_bit(g, dtype, function):
    v = make_vectors(g, 1, SHAPES, dtype)
    for elect in ("mass", "count"):
        out = ties_merge(v, density=100, elect=elect, function=function)
        for k, e in v["task0"].items(): assert torch.equal(out[k], e) and out[k].dtype == dtype


def test_full_density_is_the_disjoint_merge(g):
    v = make_vectors(g, 4, SHAPES)
    x = torch.stack([e["conv"] for e in v.values()])
    assert torch.equal(ties_merge(v, 100)["conv"], disjoint_merge(x, elect_signs(x)))
    positive = {t: {k: e.abs() for k, e in x.items()} for t, x in v.items()}
    for k, e in task_arithmetic(positive).items(): torch.testing.assert_close(ties_merge(positive, 100, function="sum")[k], e)
    for k, e in weight_average(positive).items(): torch.testing.assert_close(ties_merge(positive, 100)[k], e)


@pytest.mark.parametrize("elect", ["mass", "count"])
@pytest.mark.parametrize("make", [make_vectors, whole_numbers])
def test_order_of_tasks_and_scale(g, make, elect):
    v = make(g, 5, SHAPES)
    out = ties_merge(v, elect=elect)
    again = ties_merge(dict(reversed(v.items())), elect=elect)
    for c in (2., -.5):
        scaled = ties_merge({t: {k: c * e for k, e in x.items()} for t, x in v.items()}, elect=elect)
        weighted = ties_merge(v, elect=elect, weights=[c] * 5)
        for k, e in out.items(): assert torch.equal(scaled[k], c * e) and torch.equal(weighted[k], c * e)
    for k, e in out.items(): assert torch.equal(again[k], e)


def test_the_order_of_entries_does_not_matter(g):
    v = whole_numbers(g, 3)
    turned = {t: dict(reversed(x.items())) for t, x in v.items()}
    for k, e in ties_merge(v).items(): assert torch.equal(ties_merge(turned)[k], e)


def test_weights(g):
    v, w = make_vectors(g, 3, SHAPES), {"task2": -1., "task0": 2., "task1": .5}
    for elect in ("mass", "count"):
        np.testing.assert_allclose(flatten(ties_merge(v, 40, elect, weights=w)), reference(v.values(), 40, elect, weights=[2., .5, -1.]), rtol=3e-7)
    without = ties_merge({t: v[t] for t in ("task0", "task2")})
    for k, e in ties_merge(v, weights=[1., 0., 1.]).items(): assert torch.equal(e, without[k]) # weight 0: no vote


def test_draws_go_to_the_majority_of_the_whole_model():
    pair = lambda balance: [{"x": torch.tensor([1., 0., 0.]), "y": torch.tensor(balance)}, {"x": torch.tensor([-1., 0., 0.]), "y": torch.tensor(balance)}]
    for balance, want in (([3., 4.], 1.), ([-3., -4.], -1.), ([3., -4.], 0.), ([0., 0.], 0.)):
        for function in ("mean", "sum", "max"):
            assert ties_merge(pair(balance), 100, function=function)["x"].tolist() == [want, 0., 0.], (balance, function)


def test_the_balance_of_signs_is_counted_exactly():
    "Beyond 2**24 a float32 count no longer sees a single vote: here + leads by one."
    n = 2**24
    a = {"x": torch.ones(n + 1), "y": -torch.ones(n), "z": torch.tensor([1.])}
    b = {"x": torch.zeros(n + 1), "y": torch.zeros(n), "z": torch.tensor([-1.])}
    assert ties_merge([a, b], 100)["z"].tolist() == [1.]


@pytest.mark.parametrize("values", [(1e8, 1., -1e8), (1e8, -1e8, 1.), (1., 1e8, -1e8)])
def test_an_election_by_mass_does_not_depend_on_rounding(values):
    "1e8 + 1 is 1e8 in float32, which would make a draw of a vote that + has won."
    assert ties_merge([{"x": torch.tensor([v, -3., -3.])} for v in values], 100, function="sum")["x"].tolist() == [1e8, -9., -9.]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("n, density", [(1, 100), (10, 10), (999, 20), (70_001, .5), (70_001, 100)])
def test_threshold_against_sort(g, dtype, n, density):
    x = torch.randn(n, generator=g, dtype=torch.float64).to(dtype) * (torch.rand(n, generator=g) > .3)
    parts = {"a": x[:n // 3].reshape(-1, 1), "b": x[n // 3:n // 2], "c": x[n // 2:]}
    want = np.sort(np.abs(x.double().numpy()))[::-1][int(n * density / 100) - 1]
    assert magnitude_threshold(parts, density) == want


def test_threshold_at_the_edges_of_the_number_format():
    tiny, huge = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
    x = torch.tensor([0., -0., 1e-45, -tiny, 1., -huge, huge / 2, 65536., 65535.996])
    want = sorted(x.double().abs().tolist(), reverse=True)
    for i in range(9): assert magnitude_threshold({"x": x}, 100 * (i + 1) / 9 + .01 * (i < 8)) == want[i]
    y = torch.tensor([1., 1 + 2**-52, 1 + 2**-51, 5e-324], dtype=torch.float64)
    for i, e in enumerate(sorted(y.tolist(), reverse=True)): assert magnitude_threshold({"y": y}, 25 * (i + 1)) == e


def test_threshold_of_a_view_is_that_of_its_numbers(g):
    x = torch.randn(30, 40, generator=g)
    assert magnitude_threshold({"x": x.T[::3]}, 20) == magnitude_threshold({"x": x.T[::3].contiguous()}, 20)


def test_percentages_are_exact():
    for p in range(1, 101): assert [_entries_kept(d, p) for d in (100, 1000, 10**9)] == [p, 10 * p, p * 10**7]
    assert [_entries_kept(1000, p) for p in (.1, .3, 33.3, np.float32(12.5), np.float64(99.9))] == [1, 3, 333, 125, 999]
    assert _entries_kept(999, 20) == 199 # rounded down


@pytest.mark.parametrize("density", [0, -1, 100.01, float("nan"), float("inf")])
def test_bad_densities(g, density):
    with pytest.raises(ValueError, match=r"in \(0, 100\]"): ties_merge(make_vectors(g), density)


def test_a_density_that_keeps_nothing(g):
    with pytest.raises(ValueError, match="nothing would be kept.*at least 0.384"): ties_merge(make_vectors(g), .2) # a fraction taken for a percentage
    with pytest.raises(ValueError, match="nothing would be kept"): magnitude_threshold({}, 100)


class Counting(LazyTaskVector):
    "Counts reads and the entries that are alive at a time."
    reads, alive, most = Counter(), weakref.WeakValueDictionary(), 0
    def __getitem__(self, name):
        x = super().__getitem__(name)
        Counting.reads[name] += 1
        Counting.alive[id(x)] = x
        Counting.most = max(Counting.most, len({tuple(y.shape) for y in Counting.alive.values()}))
        return x


@pytest.fixture
def lazy(g, tmp_path):
    shapes = {k: s for k, s in SHAPES.items() if k != "none"}
    base = {k: torch.randn(s, generator=g) for k, s in shapes.items()}
    save_file(base, tmp_path / "base")
    for t, v in make_vectors(g, 3, shapes).items(): save_file(apply_task_vector(base, v, .1), tmp_path / t)
    Counting.reads.clear()
    Counting.most = 0
    return {t: Counting(tmp_path / "base", tmp_path / t) for t in ("task0", "task1", "task2")}


@pytest.mark.parametrize("method, reads", [(zero_shot, 0), (ties_merge, 9), (lambda v: ties_merge(v, 100), 3), (dare_merge, 3), (lambda v: dare_merge(v, base="ties"), 9)])
def test_task_vectors_on_disk_are_read_an_entry_at_a_time(lazy, method, reads):
    out = method(lazy)
    assert all(Counting.reads[name] == reads for name in SHAPES if name != "none"), Counting.reads # 3 tasks: two passes for the threshold, one to merge
    assert Counting.most <= 1
    whole = method({t: dict(v.items()) for t, v in lazy.items()})
    for k, e in whole.items(): assert torch.equal(out[k], e)


def test_dare_ties_on_disk(lazy):
    whole = {t: dict(v.items()) for t, v in lazy.items()}
    for k, e in dare_merge(whole, base="ties", density=5).items(): assert torch.equal(dare_merge(lazy, base="ties", density=5)[k], e)


def test_dare_is_unbiased_with_the_right_variance(g):
    v = make_vectors(g, 2, {"w": (30, 20)})
    p, runs = .8, 400
    draws = torch.stack([dare_merge(v, drop=p, seed=s)["w"].double() for s in range(runs)])
    variance = p / (1 - p) * sum(x["w"].double().square() for x in v.values())
    z = (draws.mean(0) - task_arithmetic(v)["w"].double()) / (variance / runs).sqrt()
    assert z.mean().abs() < 4 / 600**.5 and .8 < z.square().mean() < 1.2
    torch.testing.assert_close(draws.var(0).sum(), variance.sum(), rtol=.05, atol=0)


@pytest.mark.parametrize("p", [.1, .5, .9, .99])
def test_dare_drops_the_expected_share_and_rescales_the_rest(p):
    x = torch.linspace(1, 2, 200_000)
    y = drop_entries(x, p, (0, "t", "x"))
    zeros = (y == 0).double().mean().item()
    assert abs(zeros - p) < 5 * (p * (1 - p) / len(x)) ** .5
    torch.testing.assert_close(y[y != 0], (x / (1 - p))[y != 0])
    left = (y != 0).double()
    assert abs(np.corrcoef(left[1:], left[:-1])[0, 1]) < .02 # neighbors are dropped independently


def test_dare_masks_depend_on_seed_task_and_entry_only(g):
    one = torch.ones(500)
    v = {"a": {"x": one, "y": one}, "b": {"x": one, "y": one}}
    alone = {t: dare_merge({t: v[t]}) for t in v}
    masks = [alone[t][k] != 0 for t in v for k in ("x", "y")] + [dare_merge({"a": v["a"]}, seed=1)["x"] != 0]
    for i, m in enumerate(masks):
        for other in masks[:i]: assert 20 < (m ^ other).sum() < 180 # 2 * .1 * .9 * 500 = 90 expected
    both = dare_merge(v)
    for k in both: assert torch.equal(both[k], alone["a"][k] + alone["b"][k])
    turned = dare_merge({t: dict(reversed(x.items())) for t, x in reversed(v.items())})
    for k in both: assert torch.equal(both[k], turned[k])


def test_dare_repeats_itself(g):
    v = make_vectors(g, 3, SHAPES)
    torch.manual_seed(1)
    first, state = dare_merge(v), torch.get_rng_state()
    torch.manual_seed(2)
    for k, e in dare_merge(v).items(): assert torch.equal(e, first[k])
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state()) # the global generator is left alone


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_dropping_nothing_is_the_base_method(g, dtype):
    v = make_vectors(g, 3, SHAPES, dtype)
    for k, e in task_arithmetic(v, [1., 2., -1.]).items(): assert torch.equal(dare_merge(v, drop=0, weights=[1., 2., -1.])[k], e)
    for k, e in ties_merge(v, 30, "count", "max").items():
        got = dare_merge(v, drop=0., base="ties", density=30, elect="count", function="max")[k]
        assert torch.equal(got, e) and got.dtype == dtype


@pytest.mark.parametrize("options", [{}, dict(density=5), dict(elect="count", function="sum")])
def test_dare_with_ties_is_ties_of_dropped_vectors(g, options):
    v = make_vectors(g, 3, SHAPES)
    dropped = [{k: drop_entries(e, .6, (3, t, k)) for k, e in x.items()} for t, x in v.items()]
    np.testing.assert_allclose(flatten(dare_merge(v, .6, "ties", 3, **options)), reference(dropped, **options), rtol=3e-7)


def test_dare_in_half_precision_is_computed_in_float32(g):
    v = {t: {"w": torch.full((2000,), x, dtype=torch.float16)} for t, x in (("a", 3e4), ("b", -3e4))}
    out = dare_merge(v, drop=.5) # each survivor is 6e4: their sum must not pass through infinity
    assert out["w"].dtype == torch.float16 and set(out["w"].tolist()) == {0., 6e4, -6e4}
    small = make_vectors(g, 2, {"w": (50, 40)}, torch.float16)
    wide = {t: {"w": x["w"].float()} for t, x in small.items()}
    assert torch.equal(dare_merge(small)["w"], dare_merge(wide)["w"].half())


def test_zero_shot(g):
    v = make_vectors(g, 2, SHAPES, torch.bfloat16)
    out = zero_shot(v)
    for k, e in v["task0"].items(): assert torch.equal(out[k], torch.zeros_like(e)) and out[k].dtype == e.dtype


@pytest.mark.parametrize("method", [zero_shot, ties_merge, dare_merge, lambda v: dare_merge(v, base="ties")])
def test_inputs_are_left_alone_and_checked(g, method):
    v = make_vectors(g, 3, SHAPES)
    copy = {t: {k: e.clone() for k, e in x.items()} for t, x in v.items()}
    out = method(v)
    for t in v:
        for k in SHAPES: assert torch.equal(v[t][k], copy[t][k]) and out[k].data_ptr() != v[t][k].data_ptr() or k == "none"
    with pytest.raises(ValueError, match="no task vector given"): method([])
    with pytest.raises(StateDictKeyError, match="task 'task1'.*1 missing .'b'"): method(v | {"task1": {k: e for k, e in v["task1"].items() if k != "b"}})
    with pytest.raises(ValueError, match="'w': expected shape"): method(v | {"task1": v["task1"] | {"w": torch.zeros(12, 20)}})


@pytest.mark.parametrize("density", [20, 100])
@pytest.mark.parametrize("method", [ties_merge, lambda v, density: dare_merge(v, base="ties", density=density), lambda v, density: dare_merge(v, 0)])
def test_nan_is_named(g, method, density):
    v = make_vectors(g)
    v["task1"]["w"][3, 4] = float("nan")
    with pytest.raises(ValueError, match="task 'task1': tensor 'w' has 1 of 240"): method(v, density=density)


@pytest.mark.parametrize("call, message", [
    (lambda v: ties_merge(v, elect="vote"), "unknown election 'vote'; known: 'mass', 'count'"),
    (lambda v: ties_merge(v, function="median"), "unknown function 'median'; known: 'mean', 'sum', 'max'"),
    (lambda v: ties_merge(v, weights=[1.]), "1 weights for 3 tasks"),
    (lambda v: dare_merge(v, 1.), r"in \[0, 1\), got 1.0"), (lambda v: dare_merge(v, -.1), "got -0.1"), (lambda v: dare_merge(v, float("nan")), "got nan"),
    (lambda v: dare_merge(v, 90, "ties"), r"in \[0, 1\), got 90"),
    (lambda v: dare_merge(v, base="average"), "unknown base 'average'; known: 'task_arithmetic', 'ties'"),
    (lambda v: dare_merge(v, density=3), "unknown option of task_arithmetic 'density'; known: 'weights'"),
    (lambda v: dare_merge(v, base="ties", lam=3), "unknown option of ties 'lam'; known: 'density'"),
    (lambda v: dare_merge(v, base="ties", function="median"), "unknown function 'median'"),
])
def test_bad_options(vectors, call, message):
    with pytest.raises(ValueError, match=message): call(vectors)


def test_the_bases_list_the_options_of_their_methods(vectors):
    import inspect
    for base, method in (("task_arithmetic", task_arithmetic), ("ties", ties_merge)): assert set(BASES[base]) == set(inspect.signature(method).parameters) - {"vectors"}
