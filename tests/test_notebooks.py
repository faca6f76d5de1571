"""Every notebook runs from top to bottom, in a process of its own. Those that need the offline world share its cache."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "nbs").rglob("*.ipynb") if not any(part.startswith(("_", ".")) for part in p.relative_to(ROOT / "nbs").parts))


@pytest.mark.parametrize("path", NOTEBOOKS)
def test_notebook(path):
    code = ("from pathlib import Path; from nbdev.test import test_nb; import sys\n"
            f"ok, seconds = test_nb(Path({path!r}), skip_flags=['notest', 'cuda', 'slow']); print(f'{{seconds:.1f}} s'); sys.exit(not ok)")
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert out.returncode == 0, out.stdout[-3000:] + out.stderr[-3000:]
