"""Merging a checkpoint four times as large as the memory that is allowed, and what the plan says of it (see memory.py)."""
import sys

import pytest
from memory import figures

from tsv_nb.scale.estimates import OVERHEAD

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def test_a_merge_of_more_than_fits(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    f = figures(4.1, tmp_path)
    assert f["checkpoint"] >= 4 * f["allowed"]
    assert f["streamed"]["error"] is None, f # it finished, although every allocation beyond the estimate would have failed
    assert f["streamed"]["peak"] <= f["estimate"] <= 2 * f["streamed"]["peak"] + OVERHEAD, f # an upper bound, and not one that says nothing
    assert "memory" in f["load_everything"]["error"], f
