"""Give every page of the site a first cell that installs the package where it is not there, as on Colab; elsewhere the cell does nothing.

Usage: python tools/colab.py           writes the cell into the notebooks of the sidebar
       python tools/colab.py --check   exits 1 and names the notebooks that lack it or have another one

The cell is hidden on the site. It leaves alone what the host brings along: pip replaces an installed package only if it is too old for settings.ini.
A page that shows files of the repository (measurements, references) gets them, too, if it was opened outside of a checkout.
"""
import json
import re
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CELL_ID = "c01ab5e7" # the same in every notebook: it is how the cell is found again
EXTRAS = {"vision/22": "[data]", "vision/23": "[data]", "vision/24": "[data]", "vision/25": "[data]", "explore/41": "[widgets]", "course/": "[course]", "scale/32_": "[ray]"} # what a page needs beyond the library
FILES = re.compile(r"""["'](\.\./)*(benchmarks\b|references\.bib)|["'](\.\./)+tsv_nb""") # in code: the page reads files of the repository


def git_url(root=ROOT):
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(root / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]["git_url"]


def setup_source(page, root=ROOT, files=False):
    "The cell's text; `page` is relative to nbs/; `files`: it needs those of the repository."
    extra = next((e for start, e in EXTRAS.items() if page.startswith(start)), "")
    there = f'''
if not os.path.exists("{"../" * (page.count("/") + 1)}_quarto.yml"): # this page shows files of the repository
    repository = os.environ.get("TSV_NB_REPOSITORY", "{git_url(root)}")
    ![ -d tsv-nb ] || git clone -q --depth 1 "{{repository}}" tsv-nb
    %cd -q tsv-nb/{Path("nbs", page).parent.as_posix()}'''
    return f'''#| hide
#@title Set up: installs tsv-nb if it is not there, as on Colab
import importlib.util, os
if importlib.util.find_spec("tsv_nb") is None: # not on PyPI yet: from the repository, or from what TSV_NB_SOURCE names
    source = os.environ.get("TSV_NB_SOURCE", "tsv-nb{extra} @ git+{git_url(root)}")
    %pip install -q "{{source}}"''' + there * files


def with_setup(notebook, page, root=ROOT):
    "The notebook with the cell after its title; one without code, or for nbgrader, as it is."
    cells = [c for c in notebook["cells"] if c.get("id") != CELL_ID]
    if not any(c["cell_type"] == "code" for c in cells) or any("nbgrader" in c["metadata"] for c in cells): return {**notebook, "cells": cells}
    files = any(c["cell_type"] == "code" and FILES.search("".join(c["source"])) for c in cells)
    cell = dict(cell_type="code", execution_count=None, id=CELL_ID, metadata={}, outputs=[], source=setup_source(page, root, files).splitlines(keepends=True))
    return {**notebook, "cells": [cells[0], cell, *cells[1:]]}


def stale_pages(root=ROOT):
    "Pages of the sidebar that are not as they should be: path -> text to write."
    pages = re.findall(r"- (?:\{?(?:href|file): *)?([\w/]+\.ipynb)", (root / "_quarto.yml").read_text(encoding="utf-8"))
    found = {}
    for page in dict.fromkeys(pages):
        old = json.loads((root / "nbs" / page).read_text(encoding="utf-8"))
        if (new := with_setup(old, page, root)) != old: found[root / "nbs" / page] = json.dumps(new, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    return found


if __name__ == "__main__":
    stale = stale_pages()
    if "--check" in sys.argv:
        if stale: sys.exit("run python tools/colab.py and commit the result; the set-up cell is not current in:\n  " + "\n  ".join(str(p.relative_to(ROOT)) for p in stale))
    else:
        for path, text in stale.items(): path.write_text(text, encoding="utf-8")
        print(f"{len(stale)} notebooks written")
