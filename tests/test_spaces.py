"""KnOTS and Core Space against float64 loops from their papers, the identities that make them lossless, and the cost that is promised."""
import numpy as np
import pytest
import torch
from conftest import make_vectors
from torch.utils._python_dispatch import TorchDispatchMode

from tsv_nb.beyond import isotropic_merge
from tsv_nb.merge import tsv_merge
from tsv_nb.spaces import CORE_METHODS, core_space, core_space_merge, core_space_vectors, knots_merge, shared_basis
from tsv_nb.task_vectors import task_arithmetic, weight_average

SHAPES = [(24, 24), (50, 18), (18, 50), (30, 100), (100, 30)]


def svd(x): return np.linalg.svd(x, full_matrices=False)


def ties(tasks, density):
    "Trim over a task's matrices together, elect by mass, disjoint mean: number by number."
    flat = [np.concatenate([m.ravel() for m in task]) for task in tasks]
    keep = int(density / 100 * len(flat[0]))
    for x in flat: x[np.argsort(-np.abs(x), kind="stable")[keep:]] = 0
    merged = np.zeros_like(flat[0])
    for i in range(len(merged)):
        column = [x[i] for x in flat]
        sign = np.sign(sum(column))
        agree = [x for x in column if x * sign > 0]
        merged[i] = sum(agree) / len(agree) if agree else 0
    out, at = [], 0
    for m in tasks[0]:
        out.append(merged[at:at + m.size].reshape(m.shape))
        at += m.size
    return out


def knots(vectors, names, density):
    "arXiv 2410.19735: one SVD of the concatenation per layer; TIES on Sigma V_t^T over all layers."
    left, aligned = [], [[] for _ in vectors]
    for name in names:
        deltas = [v[name].double().numpy() for v in vectors.values()]
        u, s, vh = svd(np.concatenate(deltas, 1))
        keep = s > 1e-5 * s[0]
        left.append(u[:, keep])
        for t, part in enumerate(np.split((np.diag(s) @ vh)[keep], len(deltas), 1)): aligned[t].append(part)
    return {name: u @ m for name, u, m in zip(names, left, ties(aligned, density))}


def cores(pairs):
    "arXiv 2509.17786: reference bases from the stacked factors, and the cores between them."
    u, s, _ = svd(np.concatenate([b for b, _ in pairs], 1))
    _, z, vh = svd(np.concatenate([a for _, a in pairs], 0))
    u, vh = u[:, s > 1e-12 * s[0]], vh[z > 1e-12 * z[0]]
    return u, [u.T @ b @ a @ vh.T for b, a in pairs], vh


def make_adapters(g, ranks, shapes, dtype=torch.float32):
    randn = lambda *s: torch.randn(*s, generator=g, dtype=torch.float64).to(dtype)
    return {f"task{t}": {k: (randn(m, r), randn(r, n)) for k, (m, n) in shapes.items()} for t, r in enumerate(ranks)}


def multiplied_out(adapters): return {t: {k: b @ a for k, (b, a) in pairs.items()} for t, pairs in adapters.items()}


def relative(a, b):
    b = torch.as_tensor(np.asarray(b)).double()
    return ((a.double() - b).norm() / b.norm()).item()


# ---- KnOTS

@pytest.mark.parametrize("density", [20, 50, 100])
def test_knots_against_the_formula(g, density):
    "Two layers of different size: the threshold is one for both."
    v = make_vectors(g, 3, {"w": (20, 14), "b": (20,), "small": (6, 30)})
    v["task1"]["small"] *= 5
    out, want = knots_merge(v, density=density), knots(v, ["w", "small"], density)
    for name in want: assert relative(out[name], want[name]) < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_the_shared_basis_is_that_of_one_svd(g, shape):
    deltas = torch.randn(3, *shape, generator=g)
    U = shared_basis(deltas)
    u, s, vh = svd(np.concatenate(list(deltas.double().numpy()), 1))
    assert U.shape == (shape[0], min(shape[0], 3 * shape[1]))
    assert relative((U.double().T @ torch.as_tensor(u)).abs(), np.eye(U.shape[1])) < 1e-4
    low = torch.randn(3, shape[0], 2, generator=g) @ torch.randn(3, 2, shape[1], generator=g)
    for dtype, rank in ((torch.float32, 6), (torch.float64, 6)): assert shared_basis(low.to(dtype)).shape[1] == rank


@pytest.mark.parametrize("shape", SHAPES)
def test_knots_with_task_arithmetic_is_task_arithmetic(g, shape):
    for v in (make_vectors(g, 4, {"w": shape, "b": (5,), "text_projection": (6, 4)}), make_vectors(g, 1, {"w": shape})):
        out, want = knots_merge(v, "task_arithmetic"), task_arithmetic(v)
        for k in want: assert relative(out[k], want[k]) < 1e-5
    weighted = knots_merge(v, "task_arithmetic", weights=[2.5])
    assert relative(weighted["w"], 2.5 * v["task0"]["w"]) < 1e-5


def test_knots_symmetries(g):
    v = make_vectors(g, 4, {"w": (20, 14), "v": (14, 20)})
    out = knots_merge(v)
    back = knots_merge(dict(reversed(v.items())))
    Q = torch.linalg.qr(torch.randn(20, 20, generator=g))[0]
    turned = knots_merge({t: {"w": Q @ d["w"], "v": d["v"]} for t, d in v.items()})
    scaled = knots_merge({t: {k: -1e-3 * x for k, x in d.items()} for t, d in v.items()})
    for k in out:
        assert relative(back[k], out[k]) < 1e-4
        assert relative(-1e3 * scaled[k], out[k]) < 1e-4
    assert relative(Q.T @ turned["w"], out["w"]) < 1e-4 and relative(turned["v"], out["v"]) < 1e-4


def test_knots_leaves_the_rest_to_the_base(g):
    v = make_vectors(g, 3, {"w": (8, 6), "b": (10,), "text_projection": (6, 4)})
    seen = []
    def base(vectors):
        seen.append({k: x.shape for k, x in vectors["task0"].items()})
        return weight_average(vectors)
    out = knots_merge(v, base)
    assert seen == [{"w": (8, 6)}, {"b": (10,), "text_projection": (6, 4)}]
    for k, want in weight_average(v).items(): assert relative(out[k], want) < 1e-5


# ---- Core Space

@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 5, 2), (3,), (12, 12, 12)])
def test_cores_against_the_formula(g, shape, ranks):
    pairs = [p["w"] for p in make_adapters(g, ranks, {"w": shape}).values()]
    U, M, Vh = core_space(pairs)
    u, want, vh = cores([(b.double().numpy(), a.double().numpy()) for b, a in pairs])
    assert U.shape == u.shape and Vh.shape == vh.shape and U.dtype == M.dtype == Vh.dtype == torch.float64
    for (b, a), m, w in zip(pairs, M, want):
        assert relative(U @ m @ Vh, b.double() @ a.double()) < 1e-12 # lossless
        assert relative(m.abs(), np.abs(w)) < 1e-8 # up to the signs of basis vectors


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_task_arithmetic_in_the_core_is_the_sum(g, dtype, tol):
    for ranks in ((4, 4), (1, 6, 3), (5,)):
        adapters = make_adapters(g, ranks, {"w": (40, 30), "v": (30, 90)}, dtype)
        out = core_space_merge(adapters)
        for k in ("w", "v"):
            want = sum(p[k][0].double() @ p[k][1].double() for p in adapters.values())
            assert out[k].dtype == dtype and relative(out[k], want) < tol


def test_ties_in_the_core_against_the_formula(g):
    "Within each layer, not over both."
    adapters = make_adapters(g, (3, 4, 2), {"w": (20, 14), "v": (16, 30)})
    out = core_space_merge(adapters, "ties", density=30)
    for k in ("w", "v"):
        u, M, vh = cores([(b.double().numpy(), a.double().numpy()) for b, a in (p[k] for p in adapters.values())])
        assert relative(out[k], u @ ties([[m] for m in M], 30)[0] @ vh) < 1e-5


@pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 4, 2), (4,)])
def test_methods_without_coordinates_do_not_notice(g, ranks):
    adapters = make_adapters(g, ranks, {"w": (40, 30), "text_projection": (30, 40)})
    dense = multiplied_out(adapters)
    for name, want in (("tsv", tsv_merge(dense, exclude=())), ("isotropic", isotropic_merge(dense, exclude=()))):
        out = core_space_merge(adapters, name)
        for k in out: assert relative(out[k], want[k]) < 1e-4, (name, k)
    assert relative(core_space_merge(adapters, "isotropic", common=1.)["w"], isotropic_merge(dense)["w"]) < 1e-4


def test_tsv_in_the_core_where_the_share_would_be_too_small(g):
    "Ranks 12, 2, 2 in (30, 20): min(m, n) // T = 6 truncates the first task, the core does not; rank='full' does the same on both."
    adapters = make_adapters(g, (12, 2, 2), {"w": (30, 20)})
    dense, core = multiplied_out(adapters), core_space_merge(adapters, "tsv")["w"]
    assert relative(core, tsv_merge(dense, "full")["w"]) < 1e-4 < .05 < relative(core, tsv_merge(dense)["w"])
    assert relative(core_space_merge(adapters, "tsv", rank=2)["w"], tsv_merge(dense, 2)["w"]) < 1e-4 # options reach the base


def test_the_scale_of_the_factors_is_arbitrary(g):
    "B / c and c A are the same adapter; no task is lost because its B is small beside the others."
    adapters = make_adapters(g, (3, 3), {"w": (30, 20)})
    B, A = adapters["task1"]["w"]
    for c in (1e-7, 1e7):
        scaled = {**adapters, "task1": {"w": (B / c, c * A)}}
        for base in ("task_arithmetic", "tsv"): assert relative(core_space_merge(scaled, base)["w"], core_space_merge(adapters, base)["w"]) < 1e-4


def test_shared_frozen_factors(g):
    "All tasks with one A, or one B: a core as narrow as that factor, and still no loss."
    A, Bs = torch.randn(4, 30, generator=g), torch.randn(5, 40, 4, generator=g)
    assert core_space([(B, A) for B in Bs]).cores.shape == (5, 20, 4)
    assert core_space([(A.T, B.T) for B in Bs]).cores.shape == (5, 4, 20)
    for base in ("task_arithmetic", "tsv"):
        dense = [{"w": B @ A} for B in Bs]
        want = task_arithmetic(dense) if base == "task_arithmetic" else tsv_merge(dense, "full")
        assert relative(core_space_merge([{"w": (B, A)} for B in Bs], base)["w"], want["w"]) < 1e-4


class Shapes(TorchDispatchMode):
    "Notes every operation whose result has a given shape."
    def __init__(self, shape): super().__init__(); self.shape, self.found = shape, []
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and (x.shape[-2:] == self.shape or x.shape[-2:] == self.shape[::-1]): self.found.append(func.overloadpacket._qualified_op_name)
        return out


@pytest.mark.parametrize("base", CORE_METHODS)
def test_only_the_last_product_is_of_full_size(g, base):
    adapters = make_adapters(g, (3, 4, 2), {"w": (97, 61)})
    with Shapes((97, 61)) as mode: core_space_merge(adapters, base)
    products = [name for name in mode.found if name in ("aten::mm", "aten::bmm", "aten::addmm")]
    assert len(products) == 1 and mode.found[0] == products[0], mode.found


def test_order_of_tasks_and_names(g):
    adapters = make_adapters(g, (3, 4, 2), {"w": (20, 14), "v": (16, 30)})
    for base in CORE_METHODS:
        a, b = core_space_merge(adapters, base), core_space_merge(dict(reversed(adapters.items())), base)
        c = core_space_merge(list(adapters.values()), base)
        assert list(a) == ["w", "v"]
        for k in a: assert relative(b[k], a[k]) < 1e-4 and torch.equal(c[k], a[k])


# ---- dense task vectors

def test_dense_vectors(g):
    shapes = {"w": (40, 24), "b": (40,), "text_projection": (12, 8), "conv": (4, 3, 2, 2)}
    v = make_vectors(g, 3, shapes)
    whole = core_space_vectors(v, rank=24)
    for k, want in task_arithmetic(v).items(): assert relative(whole[k], want) < 1e-5
    cut = core_space_vectors(v, rank=5)
    for k in ("b", "text_projection", "conv"): assert torch.equal(cut[k], task_arithmetic(v)[k])
    want = 0
    for d in v.values():
        u, s, vh = svd(d["w"].double().numpy())
        want = want + u[:, :5] @ np.diag(s[:5]) @ vh[:5]
    assert relative(cut["w"], want) < 1e-4
    for k, w in core_space_vectors(v, base="tsv").items(): assert relative(w, tsv_merge(v)[k]) < 1e-4
    half = core_space_vectors({t: {k: x.half() for k, x in d.items()} for t, d in v.items()})
    assert all(x.dtype == torch.float16 for x in half.values())


def test_dense_ties_uses_the_even_split(g):
    v = make_vectors(g, 3, {"w": (20, 14)})
    pairs = []
    for d in v.values():
        u, s, vh = svd(d["w"].double().numpy())
        pairs.append((u[:, :3] * s[:3]**.5, s[:3, None]**.5 * vh[:3]))
    u, M, vh = cores(pairs)
    assert relative(core_space_vectors(v, 3, "ties")["w"], u @ ties([[m] for m in M], 20)[0] @ vh) < 1e-4


def test_what_nobody_has_moved(g):
    v = make_vectors(g, 3, {"w": (20, 12), "still": (9, 7), "b": (20,)})
    for d in v.values(): d["still"].zero_()
    for method in (knots_merge, lambda x: knots_merge(x, "task_arithmetic"), core_space_vectors, lambda x: core_space_vectors(x, base="ties"), lambda x: core_space_vectors(x, base="tsv")):
        out = method(v)
        assert list(out) == ["w", "still", "b"] and not out["still"].any() and out["w"].any()
    v["idle"] = {k: torch.zeros_like(x) for k, x in v["task0"].items()}
    for base in ("task_arithmetic", "tsv"): assert core_space_vectors(v, 3, base)["w"].isfinite().all()
    fresh = {t: {"w": (torch.zeros(20, 3), torch.randn(3, 12, generator=g))} for t in "ab"} # LoRA as initialized
    for base in CORE_METHODS: assert torch.equal(core_space_merge(fresh, base)["w"], torch.zeros(20, 12))
    fresh["a"]["w"] = torch.randn(20, 3, generator=g), fresh["a"]["w"][1]
    assert relative(core_space_merge(fresh)["w"], fresh["a"]["w"][0] @ fresh["a"]["w"][1]) < 1e-5


def test_inputs_stay_as_they_are(g):
    v, adapters = make_vectors(g, 2, {"w": (20, 12), "b": (20,)}), make_adapters(g, (2, 3), {"w": (20, 12)})
    before = {t: {k: x.clone() for k, x in d.items()} for t, d in v.items()}
    pairs = {t: tuple(x.clone() for x in p["w"]) for t, p in adapters.items()}
    for out in (knots_merge(v), core_space_vectors(v, 12), core_space_merge(adapters, "ties")):
        for x in out.values(): x.fill_(7.)
    for t in v: assert all(torch.equal(v[t][k], before[t][k]) for k in v[t]) and all(map(torch.equal, adapters[t]["w"], pairs[t]))


def test_errors(g):
    v, adapters = make_vectors(g, 2, {"w": (20, 12)}), make_adapters(g, (2, 3), {"w": (20, 12), "v": (8, 9)})
    with pytest.raises(ValueError, match="no adapters given"): core_space_merge({})
    with pytest.raises(ValueError, match="no task vector given"): knots_merge([])
    for method, x in ((knots_merge, v), (core_space_merge, adapters), (core_space_vectors, v)):
        with pytest.raises(ValueError, match="unknown base method 'mean'; known: 'task_arithmetic'"): method(x, base="mean")
    for bad in (0, 2.5, -1):
        with pytest.raises(ValueError, match="rank must be at least 1"): core_space_vectors(v, bad)
    def broken(pair): return {**adapters, "task1": {**adapters["task1"], "v": pair}}
    B, A = adapters["task1"]["v"]
    where = "task 'task1', adapter 'v': "
    for bad, error, message in (((B, A[:2]), ValueError, where + r"B \(8, 3\) and A \(2, 9\) have different ranks"), ((A, B), ValueError, where + r".*different ranks; pass \(B, A\)"),
                                ((B[:5], A), ValueError, where + r"B A has shape \(5, 9\), other tasks have \(8, 9\)"), ((B, A * float("inf")), ValueError, "task 'task1': A of adapter 'v' has 27 of 27 values that are NaN or infinite"),
                                (B, TypeError, where + r"expected a pair \(B, A\)"), ((B, A.long()), TypeError, where + r"expected a pair \(B, A\)"), ((B[0], A), TypeError, where + r"expected a pair \(B, A\)")):
        with pytest.raises(error, match=message): core_space_merge(broken(bad))
    with pytest.raises(KeyError, match="adapters of task 'task1'.*1 missing.*'v'"): core_space_merge({**adapters, "task1": {"w": adapters["task1"]["w"]}})
    with pytest.raises(TypeError, match="task 'task1': expected adapters"): core_space_merge({**adapters, "task1": (B, A)})
    with pytest.raises(ValueError, match="task 'task1': tensor 'w'"): knots_merge({**v, "task1": {"w": v["task1"]["w"] * float("nan")}})
