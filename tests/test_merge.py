import numpy as np
import pytest
import torch
from conftest import make_vectors

from tsv_nb import StateDictKeyError, merge_plan, orthogonalize, task_arithmetic, tsv_merge, whiten_factors
from tsv_nb.interference import layer_factors

SHAPES = [(8, 8), (64, 48), (48, 64), (63, 100), (781, 40)]


def whiten(X):
    "X (X^T X)^(-1/2), float64, by numpy's eigendecomposition."
    lam, Q = np.linalg.eigh(X.T @ X)
    return X @ (Q / np.sqrt(lam)) @ Q.T


def reference(deltas, k):
    "TSV-M by symmetric whitening in float64 with numpy: none of the library's code."
    U, S, V = [], [], []
    for d in deltas:
        u, s, vh = np.linalg.svd(d.double().numpy(), full_matrices=False)
        U.append(u[:, :k]), S.append(s[:k]), V.append(vh[:k].T)
    return whiten(np.concatenate(U, 1)) @ np.diag(np.concatenate(S)) @ whiten(np.concatenate(V, 1)).T


def relative(a, b):
    b = torch.as_tensor(b).double()
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("T", [2, 3, 8])
def test_against_an_independent_formula_in_float64(g, shape, T):
    v = make_vectors(g, T, {"w": shape})
    assert relative(tsv_merge(v)["w"], reference([d["w"] for d in v.values()], min(shape) // T)) < 1e-4


@pytest.mark.parametrize("shape", SHAPES[1:])
@pytest.mark.parametrize("T", [2, 3])
def test_eigh_agrees_away_from_singular(g, shape, T):
    "With half the components the concatenated factors are well conditioned (at r // T, T k = r, they need not be)."
    v, k = make_vectors(g, T, {"w": shape}), min(shape) // (2 * T)
    assert relative(tsv_merge(v, rank=k, orthogonalize="eigh")["w"], reference([d["w"] for d in v.values()], k)) < 1e-4


@pytest.mark.parametrize("dtype, tol", [(torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float64, 1e-6)])
def test_dtypes(g, dtype, tol):
    v = make_vectors(g, 3, {"w": (60, 40), "b": (60,)}, dtype)
    out = tsv_merge(v)
    assert out["w"].dtype == out["b"].dtype == dtype
    assert relative(out["w"], reference([d["w"] for d in v.values()], 13)) < tol


def test_one_task_comes_back(g):
    v = make_vectors(g, 1, {"w": (30, 20), "wide": (5, 50), "column": (9, 1), "b": (7,), "conv": (4, 3, 2, 2)})
    out = tsv_merge(v)
    for k, want in v["task0"].items(): torch.testing.assert_close(out[k], want, rtol=1e-4, atol=1e-5)


def test_the_order_of_tasks_does_not_matter(vectors):
    a, b = tsv_merge(vectors), tsv_merge(dict(reversed(vectors.items())))
    for k in a: torch.testing.assert_close(a[k], b[k], rtol=1e-4, atol=1e-5)


def test_transposed_input_gives_the_transposed_result(vectors):
    a, b = tsv_merge(vectors)["w"], tsv_merge([{"w": d["w"].T} for d in vectors.values()])["w"]
    torch.testing.assert_close(a, b.T, rtol=1e-4, atol=1e-5)


def test_identical_tasks_count_once(g):
    "T copies of a task of low rank give the task, not T times the task, and no invented directions."
    low = {"w": torch.randn(24, 3, generator=g) @ torch.randn(3, 16, generator=g)}
    for T in (2, 5): assert relative(tsv_merge([low] * T)["w"], low["w"]) < 1e-4
    assert relative(tsv_merge([low] * 5, orthogonalize="eigh")["w"], low["w"]) < 1e-3


def test_orthogonal_tasks_add_up(g):
    "Tasks that do not interfere are simply added, at full strength."
    Q, R = (torch.linalg.qr(torch.randn(n, 12, generator=g))[0] for n in (40, 30))
    parts = [{"w": Q[:, 4 * t:4 * t + 4] * torch.tensor([4., 3., 2., 1.]) @ R[:, 4 * t:4 * t + 4].T} for t in range(3)]
    assert relative(tsv_merge(parts, rank=4)["w"], task_arithmetic(parts)["w"]) < 1e-5


@pytest.mark.parametrize("true_rank", [1, 4])
def test_rank_aware(g, true_rank):
    "Low-rank tasks: the answer must not depend on precision, orientation or on how many components were asked for."
    deltas = [torch.randn(96, true_rank, generator=g) @ torch.randn(true_rank, 128, generator=g) for _ in range(4)]
    merge = lambda ds, **kw: tsv_merge([{"w": d} for d in ds], **kw)["w"]
    want = reference(deltas, true_rank)
    for out in (merge(deltas), merge([d.double() for d in deltas]), merge([d.T for d in deltas]).T, merge(deltas, rank=16), merge(deltas, rank=true_rank)):
        assert relative(out, want) < 1e-4


@pytest.mark.parametrize("dtype, tol", [(torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_rank_aware_in_half_precision(g, dtype, tol):
    "Rounding a low-rank task matrix to half precision gives it full rank; that noise must not be orthogonalized either."
    deltas = [torch.randn(96, 4, generator=g) @ torch.randn(4, 128, generator=g) for _ in range(4)]
    got = tsv_merge([{"w": d.to(dtype)} for d in deltas])["w"]
    assert relative(got, reference(deltas, 4)) < tol


def test_lapack_failure_falls_back(g, vectors, monkeypatch):
    want = tsv_merge(vectors)["w"]
    def fail(*args, **kwargs): raise torch.linalg.LinAlgError("did not converge")
    monkeypatch.setattr(torch.linalg, "svd", fail)
    assert relative(tsv_merge(vectors)["w"], want) < 1e-4


def test_zero_tasks_and_zero_layers(g, monkeypatch):
    v = make_vectors(g, 3, {"w": (20, 12), "embedding": (500, 12)})
    for d in v.values(): d["embedding"].zero_()
    v["task1"]["w"].zero_()
    shapes, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda x, **kw: shapes.append(tuple(x.shape)) or svd(x, **kw))
    out = tsv_merge(v)
    assert not out["embedding"].any() and (500, 12) not in shapes # a zero matrix costs nothing
    assert relative(out["w"], reference([v["task0"]["w"], v["task2"]["w"]], 4)) < 1e-4


def test_interference_is_gone_and_directions_are_orthonormal(g):
    from tsv_nb import singular_task_interference, stack_factors
    f = layer_factors(list(torch.randn(4, 50, 40, generator=g)), 10)
    w = whiten_factors(f)
    U, V = torch.cat([x.U for x in w], 1), torch.cat([x.Vh.T for x in w], 1)
    for X in (U, V): torch.testing.assert_close(X.T @ X, torch.eye(40), rtol=0, atol=1e-4)
    sti = lambda fs: singular_task_interference(*stack_factors(fs)).item()
    assert sti(w) < 1e-5 * sti(f)


def test_more_components_than_dimensions_give_a_co_isometry(g):
    X = torch.randn(10, 25, generator=g, dtype=torch.float64)
    Q = orthogonalize(X)
    torch.testing.assert_close(Q @ Q.T, torch.eye(10, dtype=torch.float64))
    torch.testing.assert_close(orthogonalize(X, "eigh"), Q)


def test_full_rank_options(g, vectors):
    out = tsv_merge(vectors, rank="full", orthogonalize=None)
    for k, w in (("w", 1), ("b", 3)): assert relative(out[k] * w, task_arithmetic(vectors)[k]) < 1e-5
    U, S, V = zip(*((u, s, vh.T) for u, s, vh in (np.linalg.svd(v["w"].double().numpy(), full_matrices=False) for v in vectors.values())))
    polar = lambda X: (lambda p, _, q: p @ q)(*np.linalg.svd(X, full_matrices=False))
    want = polar(np.concatenate(U, 1)) * np.concatenate(S) @ polar(np.concatenate(V, 1)).T
    assert relative(tsv_merge(vectors, rank="full")["w"], want) < 1e-4


def test_weights_scale_tasks(vectors):
    out = tsv_merge(vectors, weights={"task0": 2., "task1": 0., "task2": -1.})
    torch.testing.assert_close(out["b"], (2 * vectors["task0"]["b"] - vectors["task2"]["b"]) / 3)
    twice = tsv_merge(vectors, weights=[2.] * 3)
    torch.testing.assert_close(twice["w"], 2 * tsv_merge(vectors)["w"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name, shape, dim", [("attn.in_proj_weight", (48, 16), 0), ("attn.qkv.weight", (48, 16), 0), ("attn.c_attn.weight", (16, 48), 1), ("attn.c_attn.weight", (48, 16), 0), ("to_qkv.weight", (24, 16), 0)])
def test_fused_layers_of_any_library_are_three_merges(g, name, shape, dim, dtype):
    "In two layers of one shape, which are merged as a batch, beside one that is not fused."
    vectors = [{f"{i}.{n}": torch.randn(shape, generator=g).to(dtype) for i in range(2) for n in (name, "w")} for _ in range(3)]
    merged, whole = tsv_merge(vectors, split="qkv"), tsv_merge(vectors)
    for i in range(2):
        parts = [tsv_merge([{"w": v[f"{i}.{name}"].chunk(3, dim)[p].contiguous()} for v in vectors])["w"] for p in range(3)]
        torch.testing.assert_close(merged[f"{i}.{name}"], torch.cat(parts, dim), rtol=1e-5, atol=1e-5)
        assert torch.equal(merged[f"{i}.w"], whole[f"{i}.w"]) and not torch.allclose(merged[f"{i}.{name}"].float(), whole[f"{i}.{name}"].float(), atol=.1)


def test_a_plan_says_what_is_not_split(g):
    plan = merge_plan([{"h.query_key_value.weight": torch.randn(48, 16, generator=g), "qkv.weight": torch.randn(48, 16, generator=g)}] * 2, split="qkv")
    assert plan["h.query_key_value.weight"].reason.endswith("not split, q, k and v of each head lie together") and "not split" not in plan["qkv.weight"].reason
    assert "not split" not in merge_plan([{"h.query_key_value.weight": torch.randn(48, 16, generator=g)}])["h.query_key_value.weight"].reason
    with pytest.raises(ValueError, match="'qkv.weight' of shape .10, 4. cannot be split"): merge_plan([{"qkv.weight": torch.ones(10, 4)}], split="qkv")


def test_split_qkv_is_three_merges(g):
    v = make_vectors(g, 2, {"attn.in_proj_weight": (36, 12)})
    out = tsv_merge(v, split="qkv")["attn.in_proj_weight"]
    for i in range(3):
        part = [d["attn.in_proj_weight"][12 * i:12 * i + 12] for d in v.values()]
        assert relative(out[12 * i:12 * i + 12], reference(part, 6)) < 1e-3
    assert relative(out, tsv_merge(v)["attn.in_proj_weight"]) > .1
    with pytest.raises(ValueError, match="'in_proj_weight' of shape .10, 4. cannot be split"): tsv_merge([{"in_proj_weight": torch.ones(10, 4)}], split="qkv")


def test_non_contiguous_and_untouched_inputs(g):
    big = {t: torch.randn(40, 60, generator=g) for t in "ab"}
    v = {t: {"w": b[::2, ::3], "b": b[0, ::2]} for t, b in big.items()}
    copies = {t: b.clone() for t, b in big.items()}
    out = tsv_merge(v)
    dense = tsv_merge({t: {k: e.contiguous() for k, e in d.items()} for t, d in v.items()})
    assert all(torch.equal(big[t], copies[t]) for t in big) and all(torch.equal(out[k], dense[k]) for k in out)


def test_progress_sees_every_entry(vectors):
    seen = []
    def watch(names):
        for n in names: seen.append(n); yield n
    tsv_merge(vectors, progress=watch)
    assert seen == ["w", "b"]


@pytest.mark.parametrize("options, message", [
    (dict(rank=0), "rank must be at least 1"), (dict(rank=-1), "rank must be at least 1"), (dict(rank=2.5), "rank must be at least 1"),
    (dict(rank="all"), "got 'all'"), (dict(rank=5), "tensor 'w': 3 tasks x 5 components do not fit into the 12 .* lower rank to at most 4"),
    (dict(orthogonalize="qr"), "unknown orthogonalize method 'qr'; known: 'auto', 'svd', 'eigh', 'newton_schulz'"), (dict(split="kqv"), "unknown split 'kqv'; known: None, 'qkv'"),
    (dict(small="skip"), "known: 'raise', 'average'"), (dict(weights=[1.]), "1 weights for 3 tasks"),
    (dict(weights=[1., float("nan"), 1.]), "weight of task 'task1' must be a finite number"),
])
def test_bad_options(vectors, options, message):
    with pytest.raises(ValueError, match=message): tsv_merge(vectors, **options)


def test_more_tasks_than_dimensions(g):
    v = make_vectors(g, 5, {"w": (20, 12), "pos": (4, 12)})
    with pytest.raises(ValueError, match="tensor 'pos': 5 tasks x 1 components do not fit into the 4 .* small='average'"): tsv_merge(v)
    plan, out = merge_plan(v, small="average"), tsv_merge(v, small="average")
    assert plan["pos"].how == "average" and "do not fit" in plan["pos"].reason and plan["w"] == ("merge", 2, "2 of 12 components for each of 5 tasks")
    torch.testing.assert_close(out["pos"], sum(d["pos"] for d in v.values()) / 5)
    assert torch.equal(tsv_merge(v, exclude=("pos",))["pos"], out["pos"])


def test_rank_is_an_integer_division():
    "int(r * (1 / T)) is 0 for r = T = 49."
    assert merge_plan([{"w": torch.ones(49, 60)}] * 49)["w"].rank == 1


def test_bad_tasks(g, vectors):
    with pytest.raises(ValueError, match="no task vector given"): tsv_merge([])
    with pytest.raises(StateDictKeyError, match="task 'task1'.*1 missing .'b'"): tsv_merge(vectors | {"task1": {"w": vectors["task1"]["w"]}})
    with pytest.raises(ValueError, match=r"task 'task2': tensor 'w': expected shape \(20, 12\), got \(12, 20\)"): tsv_merge(vectors | {"task2": {"w": torch.ones(12, 20), "b": torch.ones(20)}})
    vectors["task1"]["w"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="task 'task1': tensor 'w' has 1 of 240 values that are NaN"): tsv_merge(vectors)


@pytest.mark.parametrize("options", [{}, dict(split="qkv"), dict(orthogonalize=None), dict(orthogonalize="newton_schulz")])
def test_layers_taken_together_or_alone(g, options):
    "The memory bound decides how many layers of a shape are merged at once, not what comes out; a zero task and a low-rank layer are among them."
    shapes = {f"{i}.in_proj_weight": (210, 70) for i in range(3)} | {f"{i}.out": (70, 70) for i in range(3)} | {"b": (70,)}
    v = make_vectors(g, 4, shapes)
    v["task1"]["1.out"].zero_()
    for t in v.values(): t["2.out"] = torch.randn(70, 3, generator=g) @ torch.randn(3, 70, generator=g)
    together, alone = tsv_merge(v, batch_bytes=2**30, **options), tsv_merge(v, batch_bytes=1, **options)
    assert list(together) == list(alone) == list(shapes)
    for k in together: assert relative(together[k], alone[k]) < 2e-4, k


def test_parameters_that_want_a_gradient(vectors):
    "Task vectors of `named_parameters`, not of a state dict."
    wanting = {t: {k: torch.nn.Parameter(x) for k, x in v.items()} for t, v in vectors.items()}
    got, want = tsv_merge(wanting), tsv_merge(vectors)
    assert all(torch.equal(got[k], want[k]) and not got[k].requires_grad for k in want)
