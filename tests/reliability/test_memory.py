"""Merging a checkpoint four times as large as the memory that is allowed, and what the plan says of it (see memory.py)."""
import sys

import pytest
from memory import figures, make_many, started

from tsv_nb.scale.estimates import OVERHEAD

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def test_a_merge_of_more_than_fits(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    f = figures(4.1, tmp_path)
    assert f["checkpoint"] >= 4 * f["allowed"]
    assert f["streamed"]["error"] is None, f # it finished, although every allocation beyond the estimate would have failed
    assert f["streamed"]["peak"] <= f["estimate"] <= 3 * f["streamed"]["peak"] + OVERHEAD, f # an upper bound, and not one that says nothing; what the allocator has kept from the small model before is not in the peak
    assert "memory" in f["load_everything"]["error"], f


def test_twenty_thousand_tiny_tensors(tmp_path, monkeypatch):
    "What is remembered of every tensor is in the estimate, and a kill does not lose all of them."
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    make_many(tmp_path, 20_000)
    f = started("many", tmp_path, 0)
    assert f["error"] is None and f["units"] == 20
    assert OVERHEAD < f["peak"] <= f["estimate"] <= 3 * f["peak"], f # more than was once taken into account
