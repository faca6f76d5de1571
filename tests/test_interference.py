import numpy as np
import pytest
import torch
from conftest import make_vectors

from tsv_nb import interference_by_layer, pairwise_interference, singular_task_interference, stack_factors, truncated_svd


def reference(deltas, k, norm):
    "The formula, literally, in float64 with numpy; task-diagonal blocks included (they are zero but for rounding)."
    U, S, V = [], [], []
    for d in deltas:
        u, s, vh = np.linalg.svd(d.double().numpy(), full_matrices=False)
        U.append(u[:, :k]), S.append(s[:k]), V.append(vh[:k].T)
    U, S, V = np.concatenate(U, 1), np.diag(np.concatenate(S)), np.concatenate(V, 1)
    product = (U.T @ U - np.eye(len(S))) @ S @ (V.T @ V - np.eye(len(S)))
    return {"entrywise": np.abs(product).sum(), "nuclear": np.linalg.norm(product, "nuc"), "operator": np.linalg.norm(product, 2)}[norm]


@pytest.mark.parametrize("T, m, n, k", [(2, 8, 8, 4), (3, 63, 100, 7), (8, 100, 63, 7), (5, 781, 40, 8), (4, 9, 30, 9)])
@pytest.mark.parametrize("norm", ["entrywise", "nuclear", "operator"])
def test_against_the_formula_in_float64(g, T, m, n, k, norm):
    deltas = torch.randn(T, m, n, generator=g)
    got = singular_task_interference(*truncated_svd(deltas, k), norm=norm).item()
    assert got == pytest.approx(reference(deltas, k, norm), rel=1e-4)


def test_one_task_is_exactly_zero_also_in_half_precision(g):
    for dtype in (torch.float32, torch.bfloat16):
        f = truncated_svd(torch.randn(1, 300, 200, generator=g), 150)
        assert singular_task_interference(*(o.to(dtype) for o in f)).item() == 0


def test_invariants(g):
    "Scaling, permuting tasks, transposing, and rotating all inputs or all outputs."
    deltas = torch.randn(4, 30, 20, generator=g, dtype=torch.float64)
    sti = lambda d: singular_task_interference(*truncated_svd(d, 5)).item()
    base = sti(deltas)
    assert sti(3 * deltas) == pytest.approx(3 * base)
    assert sti(deltas[[2, 0, 3, 1]]) == pytest.approx(base)
    assert sti(deltas.mT) == pytest.approx(base)
    Q = torch.linalg.qr(torch.randn(30, 30, generator=g, dtype=torch.float64))[0]
    assert sti(Q @ deltas) == pytest.approx(base)


def test_no_interference_if_either_side_is_orthogonal(g):
    "Overlapping outputs do no harm when the inputs are orthogonal: the score multiplies both overlaps."
    Q = torch.linalg.qr(torch.randn(12, 12, generator=g, dtype=torch.float64))[0]
    shared = torch.linalg.qr(torch.randn(30, 4, generator=g, dtype=torch.float64))[0]
    deltas = torch.stack([shared @ torch.diag(torch.arange(4., 0, -1, dtype=torch.float64)) @ Q[4 * t:4 * t + 4] for t in range(3)])
    assert singular_task_interference(*truncated_svd(deltas, 4)).item() == pytest.approx(0, abs=1e-10)


def test_ragged_ranks_pad_with_nothing(g):
    deltas = torch.randn(3, 20, 16, generator=g)
    factors = [truncated_svd(d, k) for d, k in zip(deltas, (5, 2, 4))]
    U, S, V = (torch.cat(p, -1).double() for p in zip(*((f.U, f.S, f.Vh.T) for f in factors)))
    want = ((U.T @ U - torch.eye(11)) * S @ (V.T @ V - torch.eye(11))).abs().sum().item()
    assert singular_task_interference(*stack_factors(factors)).item() == pytest.approx(want, rel=1e-4)


def test_batched(g):
    f = truncated_svd(torch.randn(6, 3, 20, 16, generator=g), 4)
    batch = singular_task_interference(*f)
    assert batch.shape == (6,)
    for i in range(6): assert batch[i].item() == pytest.approx(singular_task_interference(f.U[i], f.S[i], f.Vh[i]).item(), rel=1e-5)


def test_layers_and_pairs(g):
    v = make_vectors(g, 3, {"a.weight": (20, 12), "zero": (9, 9), "pos": (2, 12), "b": (20,)})
    for d in v.values(): d["zero"].zero_()
    layers = interference_by_layer(v)
    assert list(layers) == ["a.weight", "zero", "pos"] and layers["zero"] == 0 and layers["pos"] > 0
    assert layers["a.weight"] == pytest.approx(reference([d["a.weight"] for d in v.values()], 4, "entrywise"), rel=1e-4)
    pw, names = pairwise_interference(v), list(v)
    for i in range(3):
        for j in range(3):
            pair = {names[i]: v[names[i]], names[j]: v[names[j]]}
            want = 0 if i == j else interference_by_layer(pair, rank=4)["a.weight"] + interference_by_layer(pair, rank=1)["pos"]
            assert pw[i, j].item() == pytest.approx(want, rel=1e-4)


def test_errors(g, vectors):
    with pytest.raises(ValueError, match="unknown norm 'fro'; known: 'entrywise', 'nuclear', 'operator'"): interference_by_layer(vectors, norm="fro")
    with pytest.raises(ValueError, match="rank must be at least 1 and whole, got 0"): interference_by_layer(vectors, rank=0)
    with pytest.raises(ValueError, match="no task vector"): interference_by_layer({})
    with pytest.raises(ValueError, match="no task vector"): pairwise_interference([])
