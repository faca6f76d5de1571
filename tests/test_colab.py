"""The set-up cell of every page, and the tour on a host that has PyTorch but not this package, as Colab and Binder are."""
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from test_package import ROOT, run, settings, wheel # noqa: F401 (a fixture)

pytestmark = pytest.mark.skipif(not (ROOT / "tools" / "colab.py").exists(), reason="needs the source tree")
NOT_ON_COLAB = ("tsv_nb", "__editable__", "open_clip", "mlxtend")
CLEAN = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} # IPython adds the packages of an activated environment


@pytest.fixture(scope="module")
def colab():
    spec = importlib.util.spec_from_file_location("colab", ROOT / "tools" / "colab.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    "A Python that has what this environment has (pip, too), except this package and two of its requirements."
    folder = tmp_path_factory.mktemp("host")
    assert run(sys.executable, "-m", "venv", "--without-pip", folder / "env").returncode == 0
    python, there = folder / "env" / "bin" / "python", folder / "there"
    there.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.lower().startswith(NOT_ON_COLAB): (there / entry.name).symlink_to(entry)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    (site / "there.pth").write_text(f"{there}\n")
    return python, there, site


def test_every_page_has_the_cell(colab):
    assert not [p.name for p in colab.stale_pages()], "run python tools/colab.py"


def test_the_cell_is_written_once_and_only_where_there_is_code(colab, tmp_path):
    (tmp_path / "nbs" / "vision").mkdir(parents=True)
    (tmp_path / "settings.ini").write_text("[DEFAULT]\ngit_url = https://example.org/me/it\n")
    (tmp_path / "_quarto.yml").write_text("contents:\n  - a.ipynb\n  - words.ipynb\n  - graded.ipynb\n  - vision/23_x.ipynb\n")
    def cell(kind, text, **metadata): return dict(cell_type=kind, id="00000000", metadata=metadata, source=[text]) | (dict(outputs=[], execution_count=None) if kind == "code" else {})
    title, code = cell("markdown", "# Title"), cell("code", "1 + 1")
    for name, cells in {"a": [title, code], "words": [title], "graded": [title, cell("code", "1", nbgrader={})], "vision/23_x": [title, code]}.items():
        (tmp_path / "nbs" / f"{name}.ipynb").write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    stale = colab.stale_pages(tmp_path)
    assert {p.name for p in stale} == {"a.ipynb", "23_x.ipynb"}
    for path, text in stale.items(): path.write_text(text)
    assert not colab.stale_pages(tmp_path)
    a, x = (json.loads((tmp_path / "nbs" / f"{n}.ipynb").read_text())["cells"] for n in ("a", "vision/23_x"))
    assert [c["id"] for c in a] == ["00000000", colab.CELL_ID, "00000000"]
    assert "tsv-nb @ git+https://example.org/me/it" in "".join(a[1]["source"]) and "tsv-nb[data] @ git+" in "".join(x[1]["source"])
    a[1]["source"] = ["pip install something"] # somebody edits it
    (tmp_path / "nbs" / "a.ipynb").write_text(json.dumps(dict(cells=a, metadata={}, nbformat=4, nbformat_minor=5)))
    assert [p.name for p in colab.stale_pages(tmp_path)] == ["a.ipynb"]


def test_the_requirement_can_be_read(colab):
    for page in ("tour.ipynb", "vision/23_finetune.ipynb"):
        requirement = Requirement(re.search(r'"(tsv-nb[^"]*)"', colab.setup_source(page))[1])
        assert requirement.name == settings()["lib_name"] and requirement.url == f"git+{settings()['git_url']}"
        assert all(f"{extra}_requirements" in settings() for extra in requirement.extras)


def test_pip_replaces_nothing_that_the_host_has(host, wheel): # noqa: F811
    python, there, site = host
    out = run(python, "-m", "pip", "install", "--dry-run", "-q", "--report", "-", wheel, env=CLEAN)
    if out.returncode and re.search(r"ConnectionError|NewConnectionError|No matching distribution|Temporary failure", out.stderr): pytest.skip("no package index")
    assert out.returncode == 0, out.stderr
    assert {o["metadata"]["name"].lower().replace("_", "-") for o in json.loads(out.stdout)["install"]} == {"tsv-nb", "open-clip-torch", "mlxtend"}


RUN = """
import importlib, json, sys
from IPython.core.interactiveshell import InteractiveShell
assert importlib.util.find_spec("tsv_nb") is None
shell = InteractiveShell.instance()
for source in json.load(open(sys.argv[1])): shell.run_cell(source).raise_error()
import tsv_nb, torch, open_clip
print(json.dumps(dict(package=tsv_nb.__file__, torch=torch.__file__, open_clip=open_clip.__file__, tasks=shell.user_ns["world"].names, n=shell.user_ns["n_tasks"])))
"""


def test_tour_on_a_host_without_the_package(colab, host, wheel, tmp_path): # noqa: F811
    "The set-up cell as Colab runs it, with the wheel in place of the repository; then the first cells of the tour."
    python, there, site = host
    cells = [c for c in json.loads((ROOT / "nbs" / "tour.ipynb").read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "code"]
    assert cells[0]["id"] == colab.CELL_ID
    (tmp_path / "cells.json").write_text(json.dumps(["".join(c["source"]) for c in cells[:6]]))
    (tmp_path / "run.py").write_text(RUN)
    env = CLEAN | dict(TSV_NB_SOURCE=str(wheel), MPLBACKEND="agg")
    out = subprocess.run([python, "run.py", "cells.json"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=900)
    if re.search(r"ConnectionError|NewConnectionError|Temporary failure", out.stdout + out.stderr): pytest.skip("no package index")
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-2000:]
    facts = json.loads(out.stdout.splitlines()[-1])
    assert facts["package"].startswith(str(site)) and facts["open_clip"].startswith(str(site)) and facts["torch"].startswith(str(there))
    assert len(facts["tasks"]) == facts["n"] == 4 and "zero-shot" in out.stdout


def test_pages_that_show_files_of_the_repository_get_them(colab, tmp_path):
    "Opened alone, as on Colab; the repository is a stand-in with one file."
    (tmp_path / "origin" / "benchmarks").mkdir(parents=True)
    (tmp_path / "origin" / "nbs" / "method").mkdir(parents=True)
    for name in ("_quarto.yml", "benchmarks/x.json", "nbs/method/page.ipynb"): (tmp_path / "origin" / name).write_text("{}")
    git = ["git", "-C", str(tmp_path / "origin"), "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]): subprocess.run([*git, *command], check=True)
    page = json.loads((ROOT / "nbs" / "method" / "07_beyond.ipynb").read_text(encoding="utf-8"))["cells"]
    (cell,) = ["".join(c["source"]) for c in page if c["id"] == colab.CELL_ID]
    code = f"import os; from IPython.core.interactiveshell import InteractiveShell as S\nfor _ in range(2): os.chdir({str(tmp_path)!r}); S.instance().run_cell({cell!r}).raise_error(); print(os.path.getsize('../../benchmarks/x.json'), os.getcwd())"
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "TSV_NB_REPOSITORY": (tmp_path / "origin").as_uri()}, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0 and out.stdout.split() == ["2", str(tmp_path / "tsv-nb" / "nbs" / "method")] * 2, out.stdout + out.stderr
    reads = {p.name for p in (ROOT / "nbs").rglob("*.ipynb") if "tsv-nb/nbs" in p.read_text(encoding="utf-8")}
    assert {"07_beyond.ipynb", "11b_reconstruct_triton.ipynb", "13_benchmarks.ipynb", "24_evaluate.ipynb", "62_limits.ipynb", "64_references.ipynb"} <= reads and "05_merge.ipynb" not in reads


def test_cell_does_nothing_where_the_package_is(colab):
    "With a source that does not exist: pip would fail."
    code = f"from IPython.core.interactiveshell import InteractiveShell as S; r = S.instance().run_cell({colab.setup_source('tour.ipynb')!r}); r.raise_error()"
    out = subprocess.run([sys.executable, "-c", code], env={**os.environ, "TSV_NB_SOURCE": "/nowhere.whl"}, capture_output=True, text=True, timeout=300)
    assert (out.returncode, out.stdout, out.stderr) == (0, "", "")


def test_binder_has_a_pair_of_builds_without_cuda():
    "PyPI's torchvision does not work with a torch of another build."
    lines = (ROOT / ".binder" / "requirements.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line.startswith("torch"))
    assert all(v.endswith("+cpu") for v in pins.values()) and "--extra-index-url https://download.pytorch.org/whl/cpu" in lines
    torch, vision = ([int(x) for x in pins[p].removesuffix("+cpu").split(".")] for p in ("torch", "torchvision"))
    assert torch >= [2, 4] and vision == [0, torch[1] + 15, torch[2]]
    script = ROOT / ".binder" / "postBuild"
    assert os.access(script, os.X_OK) and "load_world(n_tasks=4)" in script.read_text()
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert "n_tasks = 4 " in (ROOT / "nbs" / "tour.ipynb").read_text()
