import pytest
import torch
from safetensors.torch import save_file

from tsv_nb import StateDictKeyError, task_arithmetic, task_vector, tsv_merge
from tsv_nb.lazy import LazyTaskVector


@pytest.fixture
def files(g, tmp_path):
    "A base, two fine-tuned checkpoints of it, and their task vectors in memory."
    base = {"w": torch.randn(20, 12, generator=g), "b": torch.zeros(20), "frozen": torch.ones(9, 9), "ids": torch.arange(3)}
    tasks = [{k: v + .1 * torch.randn(v.shape, generator=g) if k in "wb" else v for k, v in base.items()} for _ in range(2)]
    for name, state in zip(("base", "a", "b"), (base, *tasks)): save_file(state, tmp_path / f"{name}.safetensors")
    return tmp_path, [task_vector(base, t) for t in tasks]


def test_lazy_task_vectors_give_the_same_merge(files):
    folder, eager = files
    lazy = [LazyTaskVector(folder / "base.safetensors", folder / f"{t}.safetensors") for t in "ab"]
    for method in (tsv_merge, task_arithmetic):
        got, want = method(lazy), method(eager)
        assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)
    mixed = tsv_merge([lazy[0], eager[1]])
    assert all(torch.equal(mixed[k], tsv_merge(eager)[k]) for k in mixed)


def test_lazy_task_vectors_from_bad_files(files):
    folder, _ = files
    base, task = folder / "base.safetensors", folder / "a.safetensors"
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*missing.safetensors"): LazyTaskVector(base, folder / "missing.safetensors")
    cut = folder / "cut.safetensors"
    for size in (0, 40, task.stat().st_size - 8):
        cut.write_bytes(task.read_bytes()[:size])
        with pytest.raises(ValueError, match="cut.safetensors' is damaged"): LazyTaskVector(base, cut)
    save_file({"w": torch.ones(20, 12)}, cut)
    with pytest.raises(StateDictKeyError, match="3 missing .'b', 'frozen', 'ids'"): LazyTaskVector(base, cut)
    state = {"w": torch.ones(12, 20), "b": torch.zeros(20), "frozen": torch.ones(9, 9), "ids": torch.arange(3)}
    save_file(state, cut)
    with pytest.raises(ValueError, match=r"'w': expected shape .20, 12., got .12, 20."): tsv_merge([LazyTaskVector(base, task), LazyTaskVector(base, cut)])
    save_file(state | {"w": torch.full((20, 12), float("nan"))}, cut)
    with pytest.raises(ValueError, match="'w' has 240 of 240 values that are NaN"): tsv_merge([LazyTaskVector(base, task), LazyTaskVector(base, cut)])
