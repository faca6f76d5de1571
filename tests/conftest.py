import os

os.environ.setdefault("MPLBACKEND", "Agg")
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


def pytest_collection_modifyitems(items):
    "Tests marked `cuda` are skipped where there is no NVIDIA GPU."
    if torch.cuda.is_available(): return
    for item in items:
        if item.get_closest_marker("cuda"): item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
