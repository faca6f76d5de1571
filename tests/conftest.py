import os

os.environ.setdefault("MPLBACKEND", "Agg")
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)): # before torch is imported: two pools of threads on the same cores slow each other down tenfold
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
import pytest
import torch


@pytest.fixture
def g():
    "A seeded generator: the same matrices in every run."
    return torch.Generator().manual_seed(0)


def make_vectors(g, n_tasks=3, shapes={"w": (20, 12), "b": (20,)}, dtype=torch.float32):
    "Random task vectors with the given entries."
    return {f"task{t}": {k: torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for k, s in shapes.items()} for t in range(n_tasks)}


@pytest.fixture
def vectors(g): return make_vectors(g)


def pytest_collection_modifyitems(config, items):
    "Notebooks, which take longest, come first; tests marked `long` are left out unless asked for; those marked `cuda` are skipped where there is no NVIDIA GPU."
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")
    left_out = [item for item in items if item.get_closest_marker("long")] if "long" not in config.getoption("-m") else []
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    if torch.cuda.is_available(): return
    for item in items:
        if item.get_closest_marker("cuda"): item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
