"""Run notebooks from top to bottom, each in a fresh kernel, and store what a reader sees.

Usage: python tools/run_notebooks.py [PATH ...]             all pages, or these notebooks and folders
       python tools/run_notebooks.py --record [PATH ...]    also note the running times in nbs/running_times.json
       python tools/run_notebooks.py --fix-times            run nothing; write the recorded times into the pages' first lines
       python tools/run_notebooks.py --record --fix-times   all of it

Cells marked notest, cuda, slow or eval: false are not run and keep their stored outputs. Progress bars are left out, the state of widgets is
kept, and the file is as nbdev_clean leaves it. A notebook with a failing cell stays as it was; the exit code is then 1.
"""
import argparse
import hashlib
import json
import os
import platform
import re
import sys
import time
from datetime import date
from importlib.metadata import version
from math import log
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from site_checks import BAR, WIDGET, is_bar, read_pages, skipped, stated_time

STATE = "application/vnd.jupyter.widget-state+json"


def execute(notebook, folder, root=ROOT, timeout=1800):
    "Run a notebook (nbformat) in place; the seconds it took, kernel start included. An error names the cell."
    from nbclient import NotebookClient
    from nbclient.exceptions import CellControlSignal, CellExecutionError, DeadKernelError
    environment = {k: v for k, v in os.environ.items() if k not in ("MPLBACKEND", "IN_TEST")} # pictures inline, as in Jupyter
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", store_widget_state=True, coalesce_streams=True, record_timing=False, resources=dict(metadata=dict(path=str(folder))))
    start = time.perf_counter()
    client.reset_execution_trackers()
    with client.setup_kernel(env=environment):
        for i, cell in enumerate(notebook.cells):
            if cell.cell_type != "code" or not cell.source.strip() or skipped(cell.source) or "nbdev_export(" in cell.source: continue
            try: client.execute_cell(cell, i)
            except CellExecutionError as e: raise RuntimeError(f"cell {i}, {cell.source.strip().splitlines()[0]!r}: {e.ename}: {e.evalue}") from e
            except (CellControlSignal, DeadKernelError) as e: raise RuntimeError(f"cell {i}, {cell.source.strip().splitlines()[0]!r}: {str(e).strip().splitlines()[0]}") from e
        seconds = time.perf_counter() - start
        client.set_widgets_metadata()
    return seconds


def without_bars(outputs):
    "Outputs without progress bars: widgets of tqdm, and its lines among others."
    kept = []
    for output in outputs:
        if output["output_type"] == "stream" and is_bar(output):
            lines = [line for line in re.split(r"(?<=[\n\r])", "".join(output["text"])) if not BAR.search(line) and line.strip()]
            if lines: kept.append(output | {"text": [line.rstrip("\r\n") + "\n" for line in lines]})
        elif not (is_bar(output) and output["output_type"] == "display_data"): kept.append(output)
    return kept


def widget_state(cells, state, page):
    "The models that the stored views of a page need, and new names for them: the same in every run."
    todo = [o["data"][WIDGET]["model_id"] for c in cells for o in c.get("outputs", []) if WIDGET in o.get("data", {})]
    kept = {} # from the views inwards: the order of the state is that of random names
    while todo:
        if (model := todo.pop(0)) in kept or model not in state: continue
        kept[model] = state[model]
        todo += re.findall(r"IPY_MODEL_(\w+)", json.dumps(state[model], sort_keys=True))
    return kept, {old: hashlib.sha256(f"{page} {i}".encode()).hexdigest()[:32] for i, old in enumerate(kept)}


def store(original, ran, page):
    "A notebook's JSON with the outputs of the run, cleaned as nbdev_clean does."
    from nbdev.clean import clean_nb
    from nbdev.config import get_config
    for old, new in zip(original["cells"], ran["cells"], strict=True):
        if old["cell_type"] == "code" and not skipped("".join(old["source"])): old["outputs"] = without_bars(new["outputs"])
    saved = [n["metadata"].pop("widgets", {}).get(STATE, {}).get("state", {}) for n in (original, ran)]
    state, names = widget_state(original["cells"], saved[0] | saved[1], page)
    if state: original["metadata"]["widgets"] = {STATE: dict(state=state, version_major=2, version_minor=0)}
    text = json.dumps(original)
    if names: text = re.sub("|".join(names), lambda m: names[m[0]], text)
    original, config = json.loads(text), get_config(path=ROOT)
    clean_nb(original, allowed_metadata_keys=config.get("allowed_metadata_keys", "").split(), allowed_cell_metadata_keys=config.get("allowed_cell_metadata_keys", "").split(), clean_ids=config.clean_ids)
    return original


def write_whole(path, text):
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8"); os.replace(part, path)


def run(path, page, root=ROOT):
    "Execute one notebook and store its outputs; the seconds."
    import nbformat
    from execnb.nbio import nb2str
    text = path.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    seconds = execute(notebook, path.parent, root)
    write_whole(path, nb2str(store(json.loads(text), json.loads(nbformat.writes(notebook)), page)))
    return seconds


def machine():
    return f"{os.cpu_count()} CPU cores, {platform.machine()}, Python {platform.python_version()}, torch {version('torch').split('+')[0]}"


def record(page, seconds, path):
    "Merge a running time into the file."
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    known[page] = dict(seconds=round(seconds, 1), date=date.today().isoformat(), machine=machine())
    write_whole(path, json.dumps(known, indent=1, sort_keys=True) + "\n")


def rounded(seconds):
    "A time as one says it."
    steps = (5, 10, 15, 20, 30, 45, *range(60, 7260, 60))
    best = min(steps, key=lambda s: abs(log(s / max(seconds, 1e-3))))
    return f"{best} s" if best < 60 else "1 minute" if best == 60 else f"{best // 60} minutes"


def fix_time(path, seconds):
    "Write a running time into a page, and leave the words around it; is the page another one now?"
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        found, _ = stated_time(source)
        if cell["cell_type"] != "markdown" or not found: continue
        cell["source"] = (source[:found.start("time")] + rounded(seconds) + source[found.end("time"):]).splitlines(keepends=True)
        new = json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
        if new != text: write_whole(path, new)
        return new != text
    return False


def main(argv=None, root=ROOT):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("paths", nargs="*", type=Path, help="notebooks or folders (default: all pages)")
    p.add_argument("--record", action="store_true", help="note the running times in nbs/running_times.json")
    p.add_argument("--fix-times", action="store_true", help="write recorded times into the pages; without --record nothing is run")
    a = p.parse_args(argv)
    nbs, failed = root / "nbs", []
    if missing := [str(o) for o in a.paths if not o.exists()]: p.error(f"no such notebook or folder: {', '.join(missing)}")
    outside = [o for o in a.paths if nbs not in (o.resolve(), *o.resolve().parents)]
    if outside: p.error(f"{outside[0]} is not in {nbs}")
    chosen = [n for n in read_pages(nbs) if n.endswith(".ipynb") and (not a.paths or any((nbs / n).resolve() == o.resolve() or o.resolve() in (nbs / n).resolve().parents for o in a.paths))]
    known = nbs / "running_times.json"
    if a.record or not a.fix_times:
        for page in chosen:
            try: seconds = run(nbs / page, page, root)
            except RuntimeError as e: failed.append(f"{page}: {e}"); print(failed[-1], file=sys.stderr, flush=True); continue
            if a.record: record(page, seconds, known)
            print(f"{seconds:7.1f} s  {page}", flush=True)
        print(f"{len(chosen) - len(failed)} of {len(chosen)} notebooks ran")
    if a.fix_times:
        times = json.loads(known.read_text(encoding="utf-8")) if known.exists() else {}
        for page in chosen:
            if page in times and fix_time(nbs / page, times[page]["seconds"]): print(f"{page}: {rounded(times[page]['seconds'])}")
    return int(bool(failed))


if __name__ == "__main__": sys.exit(main())
