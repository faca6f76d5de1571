import errno

import pytest
import torch
from conftest import make_vectors
from safetensors.torch import save_file

from tsv_nb import CompressedTaskVector, StateDictKeyError, compress, rank_for_ratio
from importlib import import_module

module = import_module("tsv_nb.compress")
SHAPES = {"w": (64, 48), "wide": (20, 200), "row": (1, 50), "b": (64,), "conv": (8, 3, 4, 4)}


@pytest.fixture
def vector(g): return make_vectors(g, 1, SHAPES)["task0"]


@pytest.mark.parametrize("shape", [(768, 768), (3072, 768), (50, 768), (8, 8)])
@pytest.mark.parametrize("ratio", [.05, .1, .37, 1.])
def test_rank_for_ratio_is_the_largest_that_fits(shape, ratio):
    (m, n), k = shape, rank_for_ratio(shape, ratio)
    size = lambda k: k * (m + n + 1) / (m * n)
    assert 1 <= k <= min(m, n) and (size(k) <= ratio or k == 1) and (size(k + 1) > ratio or k == min(m, n))


def test_best_approximation_and_exact_bytes(vector):
    c = compress(vector, rank=5)
    U, S, Vh = torch.linalg.svd(vector["w"].double())
    torch.testing.assert_close(c.decompress()["w"].double(), U[:, :5] * S[:5] @ Vh[:5], rtol=1e-4, atol=1e-5)
    sizes = {"w": 5 * (64 + 48 + 1), "wide": 5 * (20 + 200 + 1)}
    assert {n: f.numel for n, f in c.factors.items()} == sizes # a single row has no smaller form than itself
    assert c.nbytes == 4 * (sum(sizes.values()) + 50 + 64 + 8 * 3 * 16) and c.dense_nbytes == 4 * sum(v.numel() for v in vector.values())


def test_full_ratio_is_lossless(vector):
    c = compress(vector, ratio=1., fraction=1.)
    for k, v in vector.items(): torch.testing.assert_close(c.decompress()[k], v, rtol=1e-4, atol=1e-5)
    assert c.ratio <= 1


def test_error_falls_with_size(vector):
    errors = [(compress(vector, ratio=r).decompress()["w"] - vector["w"]).norm() for r in (.1, .2, .4, .8)]
    assert all(a > b for a, b in zip(errors, errors[1:]))


@pytest.mark.parametrize("dtype, eps", [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_half_precision_factors(vector, dtype, eps):
    "Rounding U and V relatively by eps / 2 each changes the matrix by about eps, at half the bytes."
    whole, half = compress(vector, rank=8), compress(vector, rank=8, dtype=dtype)
    f, h = whole.factors["w"], half.factors["w"]
    assert h.U.dtype == h.Vh.dtype == dtype and h.S.dtype == torch.float32 and torch.equal(h.S, f.S)
    a, b = whole.decompress()["w"], half.decompress()["w"]
    assert b.dtype == torch.float32 and 0 < (a - b).norm() / a.norm() < 2 * eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_input_dtype_comes_back(g, dtype):
    v = make_vectors(g, 1, SHAPES, dtype)["task0"]
    c = compress(v, rank=4)
    assert all(t.dtype == dtype for t in c.decompress().values())


def test_zero_and_low_rank_matrices_cost_what_they_hold(g):
    low = torch.randn(64, 3, generator=g) @ torch.randn(3, 48, generator=g)
    c = compress({"zero": torch.zeros(49408, 8), "low": low}, rank=8)
    assert c.factors["zero"].numel == 0 and c.factors["low"].rank == 3
    assert torch.equal(c.decompress()["zero"], torch.zeros(49408, 8))
    torch.testing.assert_close(c.decompress()["low"], low, rtol=1e-4, atol=1e-5)


def test_save_and_load(vector, tmp_path):
    for c in (compress(vector), compress(vector | {"zero": torch.zeros(9, 9)}, rank=2, dtype=torch.bfloat16)):
        back = CompressedTaskVector.load(c.save(tmp_path / "deep" / "er" / "x.safetensors"))
        assert back.nbytes == c.nbytes and back.dtypes == c.dtypes and set(back) == set(c)
        for k, v in c.decompress().items(): assert torch.equal(back.decompress()[k], v)
        for n, f in c.factors.items(): assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(f, back.factors[n]))


def test_files_have_the_permissions_of_ordinary_files(vector, tmp_path):
    (tmp_path / "ordinary").write_text("")
    assert compress(vector).save(tmp_path / "x").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_the_whole_archive_is_stored_in_the_chosen_precision(vector, tmp_path):
    c = compress(vector, rank=4, dtype=torch.float16)
    back = CompressedTaskVector.load(c.save(tmp_path / "x"))
    assert all(t.dtype == torch.float16 for t in back.dense.values()) and all(t.dtype == torch.float32 for t in back.decompress().values())
    assert c.dense_nbytes == sum(v.nbytes for v in vector.values())
    torch.testing.assert_close(back.decompress()["b"], vector["b"], rtol=2**-11, atol=0)


def test_awkward_names_survive(tmp_path, g):
    names = ["U/w", "dense/b", "a.b/c", "S", "naïve.ключ"]
    c = compress({n: torch.randn(30, 30, generator=g) for n in names}, ratio=.3)
    assert set(CompressedTaskVector.load(c.save(tmp_path / "x")).factors) == set(names)


def test_switching_tasks_never_drifts(g, vector):
    base = {k: torch.randn(v.shape, generator=g) for k, v in vector.items()} | {"ids": torch.arange(3)}
    copy = {k: v.clone() for k, v in base.items()}
    a, b = compress(vector), compress({k: 3 * v for k, v in vector.items()})
    first = a.apply_to(base)
    for _ in range(3): b.apply_to(base); again = a.apply_to(base)
    for k in base: assert torch.equal(first[k], again[k]) and torch.equal(base[k], copy[k]) and first[k].dtype == base[k].dtype
    want = base["w"].double() + .5 * a.decompress()["w"].double()
    torch.testing.assert_close(a.apply_to(base, alpha=.5)["w"].double(), want, rtol=1e-5, atol=1e-5)


def test_wrong_base(g, vector):
    c = compress(vector)
    base = {k: torch.zeros(v.shape) for k, v in vector.items()}
    with pytest.raises(StateDictKeyError, match="1 missing .'new'"): c.apply_to(base | {"new": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"'w' has shape \(64, 48\), the base has \(48, 64\)"): c.apply_to(base | {"w": torch.zeros(48, 64)})


@pytest.mark.parametrize("options, message", [
    (dict(ratio=0), r"ratio must be in \(0, 1\], got 0"), (dict(ratio=1.01), "got 1.01"), (dict(ratio=float("nan")), "got nan"), (dict(ratio=-.1), "got -0.1"),
    (dict(rank=0), "rank must be at least 1 and whole, got 0"), (dict(rank=-3), "got -3"), (dict(fraction=0), "fraction must be in"), (dict(fraction=2), "got 2"),
    (dict(dtype=torch.int8), "floating-point type"), (dict(rank=2.5), "whole, got 2.5"),
])
def test_bad_options(vector, options, message):
    with pytest.raises(ValueError, match=message): compress(vector, **options)


def test_what_the_stored_type_cannot_hold_is_an_error(vector):
    vector["b"][0] = 1e5
    with pytest.raises(ValueError, match="stored as torch.float16, the entry 'b' has 1 of 64 values that are NaN or infinite"): compress(vector, dtype=torch.float16)


def test_what_is_not_a_task_vector(vector):
    with pytest.raises(TypeError, match="expected a dict of tensors, got list"): compress([vector])
    with pytest.raises(ValueError, match="'ids' is torch.int64"): compress(vector | {"ids": torch.arange(3)})


def test_archives_hold_no_more_memory_than_they_report(vector):
    c = compress(vector, rank=2)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*c.dense.values(), *(o for f in c.factors.values() for o in f))}
    assert sum(held.values()) == c.nbytes


def test_a_damaged_header(vector, tmp_path):
    from safetensors import safe_open
    path = compress(vector).save(tmp_path / "x.safetensors")
    with safe_open(path, "pt") as f: meta, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    for dtypes in ("{", '{"w": "float33"}', "[]", "3", '{"w": null}', '{"w": 3}', '{"w": ["float32"]}', '{"w": "nn"}', '{"w": "int64"}', "[" * 10**5, "{}", meta["dtypes"].replace('"', '"x', 1)): # the fuzz target found those after the third
        save_file(tensors, path, metadata=meta | {"dtypes": dtypes})
        with pytest.raises(ValueError, match="x.safetensors.*is damaged"): CompressedTaskVector.load(path)


def test_an_archive_holds_what_its_header_lists(vector, tmp_path):
    "Found by the fuzz target: such files were read, and failed later with a message that did not name them."
    from safetensors import safe_open
    path = compress(vector).save(tmp_path / "x.safetensors")
    with safe_open(path, "pt") as f: meta, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    dense, part = next(k for k in tensors if k.startswith("dense/")), next(k for k in tensors if k.startswith("S/"))
    name = part.removeprefix("S/")
    for changed in (tensors | {"dense/more": torch.ones(2)}, tensors | {"other": torch.ones(2)}, tensors | {"U/more": torch.ones(2, 2)}, tensors | {f"dense/{name}": torch.ones(2)}, tensors | {dense: torch.ones(2, dtype=torch.int64)},
                    tensors | {part: tensors[part].long()}, tensors | {f"U/{name}": tensors[f"U/{name}"].double()}, {k: t for k, t in tensors.items() if k != part}, {k: t for k, t in tensors.items() if k != dense}):
        save_file(changed, path, metadata=meta)
        with pytest.raises(ValueError, match="x.safetensors.*is damaged"): CompressedTaskVector.load(path)


def test_not_finite(vector):
    vector["w"][3, 3] = float("inf")
    with pytest.raises(ValueError, match="'w' has 1 of 3072"): compress(vector)


def test_damaged_and_foreign_files(vector, tmp_path):
    whole = compress(vector).save(tmp_path / "whole.safetensors").read_bytes()
    for n in (0, 4, 8, 100, len(whole) // 2, len(whole) - 1):
        path = tmp_path / f"cut{n}.safetensors"
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match=f"cut{n}.safetensors.*damaged"): CompressedTaskVector.load(path)
    save_file(vector, tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="plain.safetensors.*holds no compressed task vector"): CompressedTaskVector.load(tmp_path / "plain.safetensors")
    torch.save(vector, tmp_path / "pickle.pt")
    with pytest.raises(ValueError, match="pickle.pt.*damaged or not a safetensors"): CompressedTaskVector.load(tmp_path / "pickle.pt")
    with pytest.raises(FileNotFoundError, match="missing.safetensors"): CompressedTaskVector.load(tmp_path / "missing.safetensors")
    with pytest.raises(FileNotFoundError): CompressedTaskVector.load(tmp_path)


def test_an_archive_with_a_part_missing_is_refused(vector, tmp_path):
    from safetensors import safe_open
    path = compress(vector).save(tmp_path / "x.safetensors")
    with safe_open(path, "pt") as f: meta, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}
    save_file({k: v for k, v in tensors.items() if k != "S/w"}, path, metadata=meta)
    with pytest.raises(ValueError, match="x.safetensors.*'w'"): CompressedTaskVector.load(path)
    save_file(tensors | {"Vh/w": tensors["Vh/w"][:1].clone()}, path, metadata=meta)
    with pytest.raises(ValueError, match="x.safetensors.*'w'"): CompressedTaskVector.load(path)


def test_a_full_disk_leaves_nothing_and_keeps_the_old_file(vector, tmp_path, monkeypatch):
    path = compress(vector, rank=1).save(tmp_path / "x.safetensors")
    before = path.read_bytes()
    def full(tensors, filename, metadata=None):
        open(filename, "wb").write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(OSError, match="No space left"): compress(vector, rank=2).save(path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
