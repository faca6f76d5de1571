"""The package as its users get it: what importing costs, what the wheel holds, and that it works beside the newest fastcore."""
import ast
import configparser
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "settings.ini").exists(), reason="needs the source tree")


def run(*args, **kwargs):
    return subprocess.run([str(a) for a in args], capture_output=True, text=True, timeout=900, **kwargs)


def settings():
    config = configparser.ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def imported_by(statement):
    out = run(sys.executable, "-c", f"import sys; {statement}; print(*(m for m in sys.modules if '.' not in m))", cwd="/")
    assert out.returncode == 0, out.stderr
    return set(out.stdout.split())


def test_import_is_light():
    extra = imported_by("import tsv_nb") - imported_by("import torch")
    heavy = {"open_clip", "matplotlib", "triton", "torchvision", "sklearn", "mlxtend", "ray", "scipy", "PIL", "IPython", "ipywidgets", "datasets", "accelerate", "tensorboard"}
    assert not extra & heavy, extra & heavy


def test_import_takes_little_more_than_torch():
    def seconds(module):
        start = time.perf_counter()
        assert run(sys.executable, "-c", f"import {module}", cwd="/").returncode == 0
        return time.perf_counter() - start
    pairs = [(seconds("torch"), seconds("tsv_nb")) for _ in range(4)]
    torch_only, with_us = (min(p) for p in zip(*pairs))
    assert with_us < 1.5 * torch_only, pairs


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    "A wheel built from an sdist of the tracked files."
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    tracked = run("git", "ls-files", "-z", cwd=ROOT).stdout.split("\0")
    for name in filter(None, tracked):
        if name.startswith("tests/") or name.startswith("nbs/") and not name.startswith("nbs/course/_source/") or not (ROOT / name).exists(): continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    out = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source) # an sdist, and the wheel from it
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-2000:]
    return next(dist.glob("*.whl"))


def test_wheel_holds_package_and_tower(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "tsv_nb").rglob("*.py")}
    assert modules <= set(names), modules - set(names)
    assert "tsv_nb/vision/glyphclip.safetensors" in names and "tsv_nb/vision/glyphclip.md" in names and "tsv_nb/vision/paper_tasks.json" in names and "tsv_nb/explore/playground.json" in names
    assert not [n for n in names if n.startswith(("tests", "nbs", "benchmarks"))]
    sources = {p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs/course/_source").rglob("*") if p.is_file() and ".ipynb_checkpoints" not in p.parts}
    assert "course/_source/ps1/ps1.ipynb" in sources and {f"tsv_nb/{s}" for s in sources} == {n for n in names if "_source" in n}
    assert wheel.stat().st_size < 15e6
    meta = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert f"Version: {settings()['version']}" in meta and "Provides-Extra: course" in meta and "Requires-Dist: torch>=" in meta


def test_wheel_beside_the_newest_fastcore(wheel, tmp_path):
    "A new environment with the newest fastcore; the other dependencies are borrowed from this one."
    assert run(sys.executable, "-m", "venv", tmp_path / "env").returncode == 0
    python = tmp_path / "env" / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    out = run(python, "-m", "pip", "install", "-q", "fastcore", cwd=tmp_path)
    if out.returncode and re.search(r"ConnectionError|NewConnectionError|No matching distribution|Temporary failure", out.stderr): pytest.skip("no package index to take the newest fastcore from")
    assert out.returncode == 0, out.stderr
    out = run(python, "-m", "pip", "install", "-q", "--no-deps", wheel, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    (Path(site) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = """
import sys, json, torch, fastcore, tsv_nb, tsv_nb.cli
from tsv_nb.vision.clip import load_clip, image_state
vectors = [{'w': torch.randn(20, 12), 'b': torch.randn(20)} for _ in range(3)]
merged = tsv_nb.tsv_merge(vectors)
path = tsv_nb.compress(vectors[0], ratio=.3).save('x.safetensors')
back = tsv_nb.CompressedTaskVector.load(path).apply_to({k: torch.zeros_like(v) for k, v in vectors[0].items()})
tower = image_state(load_clip('glyph')[0])
print(json.dumps(dict(where=tsv_nb.__file__, fastcore=fastcore.__version__, fastcore_at=fastcore.__file__, merged=list(merged['w'].shape), back=list(back), tower=len(tower))))
"""
    out = run(python, "-c", code, cwd=tmp_path)
    assert out.returncode == 0, out.stderr
    facts = json.loads(out.stdout.splitlines()[-1])
    assert facts["where"].startswith(site) and facts["fastcore_at"].startswith(site)
    assert facts["merged"] == [20, 12] and facts["back"] == ["w", "b"] and facts["tower"] > 10
    command = "import sys; from tsv_nb.vision.command import tsv_eval; sys.argv[0] = 'tsv_eval'; tsv_eval()"
    shown, wrong = (run(python, "-c", command, *argv, cwd=tmp_path) for argv in (["--help"], ["--task", "3"]))
    assert shown.returncode == 0 and "--per-task" in shown.stdout and "where images are encoded (default: cpu)" in shown.stdout and "Example: tsv_eval" in shown.stdout
    assert wrong.returncode == 2 and "unknown option --task; did you mean --tasks?" in wrong.stderr
    print("newest fastcore:", facts["fastcore"])


def test_settings_are_the_single_source():
    cfg = settings()
    assert importlib.import_module("tsv_nb").__version__ == cfg["version"]
    assert f"## {cfg['version']}" in (ROOT / "CHANGELOG.md").read_text()
    for line in cfg["console_scripts"].split("\n"):
        if line.strip():
            module, function = line.split("=")[1].strip().split(":")
            assert callable(getattr(importlib.import_module(module), function))
    for extra in ("dev", "ray", "data", "course", "widgets"): assert shlex.split(cfg[f"{extra}_requirements"])


LAYERS = ["method", "kernels", "vision scale", "explore", "course", "cli"]
LEAVES = {f"tsv_nb.kernels.{o}" for o in ("aot", "tiles_triton", "reconstruct", "reconstruct_triton", "grouped_triton", "interference", "interference_triton")}
LEAF_IMPORTS = {"torch", "triton", "tsv_nb.checks"} | LEAVES # besides the standard library


def layer(module):
    "The layer of a module of the package, by its folder; the method part is the top level, and the leaves may be imported from everywhere."
    if module in LEAVES: return 0
    head = module.removeprefix("tsv_nb").strip(".").split(".")[0]
    return next((i for i, names in enumerate(LAYERS) if head in names.split()), 0)


@pytest.mark.parametrize("path", sorted((ROOT / "tsv_nb").rglob("*.py")), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_modules_import_only_from_layers_above(path):
    if path.name.startswith("_"): return
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, (ast.Import, ast.ImportFrom)): continue
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        if isinstance(node, ast.ImportFrom):
            assert not any(a.name == "*" for a in node.names), f"star import at line {node.lineno}"
            if node.level: names = [".".join(package.split(".")[:-node.level] + [node.module or ""])]
        for name in names:
            if name.startswith("tsv_nb"): assert layer(name) <= layer(package), f"{package} imports {name}"
            if package in LEAVES:
                parts = name.split(".")
                known = any(".".join(parts[:i]) in LEAF_IMPORTS for i in range(1, len(parts) + 1)) or parts[0] in sys.stdlib_module_names
                assert known, f"{package} imports {name}"
            elif not name.startswith("tsv_nb") and layer(package) == 0: assert name.split(".")[0] not in {"open_clip", "matplotlib", "ray", "datasets", "sklearn", "mlxtend", "torchvision", "triton"}


@pytest.mark.parametrize("module", sorted(LEAVES - {o for o in LEAVES if o.endswith("_triton")}))
def test_kernels_import_without_triton(module):
    if not (ROOT / (module.replace(".", "/") + ".py")).exists(): pytest.skip("not there yet")
    assert "triton" not in imported_by(f"import {module}") - imported_by("import torch")


def test_readme_has_exactly_two_commands():
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    commands = [line for block in blocks for line in block.strip().splitlines()]
    assert len(commands) == 2 and "tsv_demo" in commands[0] and "'.[dev]'" in commands[1] and "/pytest " in commands[1]
