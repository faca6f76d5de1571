"""Write README.md from nbs/index.ipynb: markdown as it is, code as fences with its printed output, links made relative to the root.

Usage: python tools/readme.py           writes README.md
       python tools/readme.py --check   exits 1 if README.md is not current
"""
import json
import re
import sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent


def source(cell): return "".join(cell["source"])


def fenced(cell):
    "A code cell without its directives, and what it printed."
    code = "\n".join(line for line in source(cell).splitlines() if not line.startswith("#|")).strip()
    if not code or "#| hide" in source(cell): return ""
    printed = "".join("".join(o.get("text", "")) for o in cell["outputs"] if o["output_type"] == "stream")
    return f"```python\n{code}\n```\n" + (f"\n```text\n{printed.rstrip()}\n```\n" if printed.strip() else "")


def relative(markdown):
    "Paths of the notebooks' folder as seen from the root."
    return re.sub(r"\]\((?!https?:|#|\.\./)([^)]+)\)", r"](nbs/\1)", markdown).replace("](../", "](")


def render(notebook):
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    parts = [relative(source(c)) + "\n" if c["cell_type"] == "markdown" else fenced(c) for c in cells]
    return "<!-- Written by tools/readme.py from nbs/index.ipynb: edit that notebook. -->\n\n" + "\n".join(p for p in parts if p.strip())


text, readme = render(root / "nbs" / "index.ipynb"), root / "README.md"
if "--check" not in sys.argv: readme.write_text(text, encoding="utf-8")
elif not readme.exists() or readme.read_text(encoding="utf-8") != text:
    sys.exit("README.md is not current: run python tools/readme.py and commit the result.")
