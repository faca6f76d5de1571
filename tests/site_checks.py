"""What a reader of the site could stumble over, found without Quarto: links, equations, figures, stored outputs, running times.

A check takes pages and returns a list of complaints, each of which names the page. `python tests/site_checks.py` processes the
notebooks as nbdev does before Quarto, runs all checks, and prints what was counted.
"""
import ast
import html
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

import yaml

ROOT = Path(__file__).resolve().parent.parent


# Pages

@dataclass
class Cell:
    kind: str # markdown, code or raw
    source: str
    outputs: list


@dataclass
class Page:
    name: str # its path in the folder of pages, as in "method/05_merge.ipynb"
    cells: list
    metadata: dict

    def markdown(self):
        "Every (place, markdown) that a reader sees: cells, the title block, and outputs that are markdown."
        for i, cell in enumerate(self.cells):
            if cell.kind == "markdown": yield f"{self.name}, cell {i}", cell.source
            elif cell.kind == "raw": yield f"{self.name}, title block", "\n\n".join(str(v) for k, v in front_matter(cell.source).items() if k in ("title", "description"))
            for output in cell.outputs:
                for mime in ("text/markdown", "text/latex"):
                    if mime in output.get("data", {}): yield f"{self.name}, output of cell {i}", "".join(output["data"][mime])

    @property
    def html(self):
        "Where Quarto writes it: nbdev says so in the title block."
        said = [front_matter(c.source).get("output-file") for c in self.cells[:1] if c.kind == "raw"]
        path = PurePosixPath(self.name)
        return path.with_name(said[0]).as_posix() if said and said[0] else path.with_suffix(".html").as_posix()


def front_matter(source):
    found = re.match(r"\s*---\n(.*?)\n---\s*$", source, re.S)
    return (yaml.safe_load(found[1]) or {}) if found else {}


def read_page(folder, path):
    name = path.relative_to(folder).as_posix()
    if path.suffix != ".ipynb": return Page(name, [Cell("markdown", path.read_text(encoding="utf-8"), [])], {})
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return Page(name, [Cell(c["cell_type"], "".join(c["source"]), c.get("outputs", [])) for c in notebook["cells"]], notebook["metadata"])


def read_pages(folder):
    "{name: page} of a folder of pages. Folders that start with `_` or `.` hold none."
    folder = Path(folder)
    paths = [p for p in sorted(folder.rglob("*")) if p.suffix in (".ipynb", ".qmd") and not any(part.startswith(("_", ".")) for part in p.relative_to(folder).parts)]
    return {page.name: page for page in (read_page(folder, p) for p in paths)}


def process(target):
    "What nbdev_docs does before Quarto, on a copy of the sources: the folder of processed pages, and what was printed on the way."
    target = Path(target)
    for name in ("nbs", "tsv_nb"): shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "_quarto.yml"): shutil.copy(ROOT / name, target)
    code = "from nbdev.serve import proc_nbs; proc_nbs(force=True)"
    done = subprocess.run([sys.executable, "-c", code], cwd=target, capture_output=True, text=True, timeout=900, env=os.environ | {"PYTHONPATH": str(target)})
    if done.returncode: raise RuntimeError(done.stderr[-3000:])
    for extra in (p for p in (target / "nbs").rglob("*") if p.is_file()): # what Quarto finds beside the pages: pictures, references.bib
        copy = target / "_proc" / extra.relative_to(target / "nbs")
        if not copy.exists() and extra.suffix != ".ipynb": copy.parent.mkdir(parents=True, exist_ok=True); shutil.copy(extra, copy)
    return target / "_proc", done.stdout + done.stderr


# Markdown as pandoc reads it

TOKEN = re.compile(r"""
    (?P<fence>^[ \t>]*(?P<ticks>`{3,}|~{3,})[^\n]*\n(?:.*?\n)??[ \t>]*(?P=ticks)[`~]*[ \t]*$)
  | (?P<block>(?:\A|(?<=\n\n))(?:[ ]{4}[^\n]*(?:\n|\Z)|[ \t]*\n(?=[ ]{4}))+)
  | (?P<comment><!--.*?-->)
  | (?P<code>(?<!`)(?P<tick>`+)(?!`)(?P<span>(?:(?!\n[ \t]*\n).)+?)(?<!`)(?P=tick)(?!`))
  | (?P<escape>\\.)
  | (?P<display>\$\$(?P<shown>(?:\\.|(?!\n[ \t]*\n)[^$\\])+?)\$\$)
  | (?P<inline>\$(?=\S)(?P<tex>(?:\\.|(?!\n[ \t]*\n)[^$\\])+?)(?<=\S)\$(?!\d))
""", re.S | re.M | re.X)


def prose(text, keep=()):
    "Markdown with code, comments, escapes and mathematics blanked, except the kinds to keep."
    return TOKEN.sub(lambda m: m[0] if m.lastgroup in keep or any(m[k] for k in keep) else re.sub(r"[^\n]", "·", m[0]), text)


def code_spans(text): return [" ".join(m["span"].split()) for m in TOKEN.finditer(text) if m["code"]]


def equations(text):
    "(tex, is it a displayed one?) of every equation."
    return [(m["shown"] or m["tex"], bool(m["display"])) for m in TOKEN.finditer(text) if m["display"] or m["inline"]]


def stray_math(text):
    "Mathematics that pandoc does not take for mathematics: a dollar without partner or beside a blank, an environment outside dollars."
    return re.findall(r".{0,20}(?:\$|\\begin\{).{0,20}", prose(text, keep=("escape",)).replace(r"\$", "··"))


# Anchors, links and references

HEADING = re.compile(r"^[ ]{0,3}(#{1,6})[ \t]+(.+?)[ \t]*#*[ \t]*$", re.M)


def slug(heading):
    "Pandoc's identifier of a heading: its words without formatting, in lower case, from the first letter on."
    text = re.sub(r"!?\[([^\]]*)\](\([^)]*\)|\{[^}]*\})?", r"\1", re.sub(r"[`*$\\]|<[^>]+>", "", heading))
    text = re.sub(r"(?<!\w)_+|_+(?!\w)", "", html.unescape(text)).replace("---", "").replace("--", "").replace("...", "")
    words = "-".join("".join(c for c in text if c.isalnum() or c in "_-. \t").split()).lower()
    return re.sub(r"^[^a-zA-Z\u00c0-\uffff]+", "", words) or "section"


def github_slug(heading):
    return re.sub(r"[^\w\- ]", "", re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()).replace(" ", "-")


def anchors(page, slug=slug):
    "Everything on a page that `#name` can point to; a repeated heading gets -1, -2, …"
    found = set()
    for _, text in page.markdown():
        plain = prose(text)
        found |= set(re.findall(r"\{[^{}\n]*?#([\w:.-]+)[^{}\n]*\}", plain)) | set(re.findall(r"<[^>]*?\b(?:id|name)=[\"']([^\"']+)", plain))
        for line in HEADING.finditer(plain):
            original = text[line.start(2):line.end(2)]
            if "{#" in line[2]: continue
            name, n = slug(re.sub(r"\{[^}]*\}\s*$", "", original)), 0
            while (one := f"{name}-{n}" if n else name) in found: n += 1
            found.add(one)
    for cell in page.cells:
        if cell.kind == "code": found |= set(re.findall(r"^#\|\s*label:\s*([\w-]+)", cell.source, re.M))
    return found


HOSTS = {"arxiv.org", "github.com", "raw.githubusercontent.com", "colab.research.google.com", "mybinder.org", "tsv-nb.github.io", "doi.org",
         "docs.pytorch.org", "pytorch.org", "triton-lang.org", "quarto.org", "nbdev.fast.ai", "fastcore.fast.ai", "nbgrader.readthedocs.io", "huggingface.co",
         "openaccess.thecvf.com", "proceedings.mlr.press", "openreview.net", "aclanthology.org", "en.wikipedia.org", "jupyter.org", "katex.org", "www.apache.org", "kellerjordan.github.io"}
SITE = "https://tsv-nb.github.io/tsv-nb"
REPOSITORY = re.compile(r"https://(?:github\.com/tsv-nb/tsv-nb/(?:blob|tree|edit|raw)|colab\.research\.google\.com/github/tsv-nb/tsv-nb/blob|raw\.githubusercontent\.com/tsv-nb/tsv-nb)/main/([^#?]+)(?:#L(\d+))?")
TARGET = re.compile(r"\]\(\s*<?((?:[^()\s<>]|\([^()\s]*\))*)>?(?:\s+(?:\"[^\"]*\"|'[^']*'))?\s*\)|\b(?:href|src)=[\"']([^\"']*)[\"']")


def links(text):
    "The targets of all links and pictures, also of reference definitions and of HTML."
    plain = prose(text)
    found = [m[1] if m[1] is not None else m[2] for m in TARGET.finditer(plain)]
    found += re.findall(r"^\s*-?\s*href: (\S+)$", text, re.M) if text.startswith("---\n") else []
    found += re.findall(r"^\[[^\]]+\]:\s*(\S+)", plain, re.M) + re.findall(r"<(https?://[^>\s]+)>", plain)
    return found


def broken_link(target, page, pages, folder, root=ROOT):
    "What is wrong with the target of a link on a page, or None."
    parts = urlsplit(target)
    if not target: return "an empty target"
    if target.startswith(f"{SITE}/notebooks/"): return None if target.removeprefix(f"{SITE}/notebooks/") in pages else "no such notebook to download"
    if target.startswith(SITE): target, page = target.removeprefix(SITE).lstrip("/") or "index.html", Page("index.ipynb", page.cells, {})
    elif found := REPOSITORY.match(target):
        path = root / unquote(found[1])
        if not path.exists(): return f"no {found[1]} in the repository"
        return f"{found[1]} has no line {found[2]}" if found[2] and int(found[2]) > len(path.read_text(encoding="utf-8").splitlines()) else None
    elif parts.scheme in ("http", "https"):
        if not re.fullmatch(r"[a-z0-9.-]+\.[a-z]{2,}", parts.netloc): return "no valid address"
        return None if parts.netloc in HOSTS else f"the host {parts.netloc} is not among HOSTS in tests/site_checks.py"
    elif parts.scheme: return f"the scheme {parts.scheme}:"
    path, _, anchor = target.partition("#")
    if not path: there = page
    else:
        path = os.path.normpath(PurePosixPath(page.name).parent / unquote(path.partition("?")[0])).replace(os.sep, "/")
        if path.startswith(".."): return "leads out of the site"
        there = pages.get(path) or next((p for p in pages.values() if p.html == path), None)
        if there is None:
            if path.endswith((".ipynb", ".html", ".qmd")) or not (Path(folder) / path).exists(): return "no such page or file"
            return "a file has no anchors" if anchor else None
    return f"no #{anchor} on {there.name}" if anchor and unquote(anchor) not in anchors(there) else None


def check_links(pages, folder, root=ROOT):
    wrong = []
    for page in pages.values():
        block = [(f"{page.name}, title block", c.source) for c in page.cells[:1] if c.kind == "raw"] # links to Colab and the like
        for place, text in [*page.markdown(), *block]:
            plain = prose(text)
            wrong += [f"{place}: {target}: {why}" for target in links(text) if (why := broken_link(target, page, pages, folder, root))]
            wrong += [f"{place}: {bad}: a link with a blank in it" for bad in re.findall(r"\]\([^()\"'\n]*\s[^()\"'\n]+\)|\]\s+\((?:https?:|[\w/]+\.ipynb)[^)]*\)", plain) if not TARGET.match(bad)]
            defined = {d.lower() for _, t in page.markdown() for d in re.findall(r"^\[([^\]]+)\]:", prose(t), re.M)}
            wrong += [f"{place}: [{label}]: no definition of this label" for label in re.findall(r"\][ ]?\[([^\]]+)\]", plain) if label.lower() not in defined]
    return wrong


def check_readme(root=ROOT):
    "README.md, as GitHub shows it: files of the repository, and its own headings in GitHub's spelling."
    page, wrong = read_page(root, root / "README.md"), []
    for target in links(page.cells[0].source):
        if urlsplit(target).scheme: why = broken_link(target, page, {}, root, root) if not target.startswith(SITE) else None
        else:
            path, _, anchor = target.partition("#")
            why = None if not path or (root / path).exists() else "no such file"
            if anchor and not path and anchor not in anchors(page, github_slug): why = f"no heading #{anchor}"
        if why: wrong.append(f"README.md: {target}: {why}")
    return wrong


def references(text):
    "Every @key of a text: cross-references and citations."
    return re.findall(r"(?<![\w@/.\\])@([A-Za-z][\w:.#$%&+?<>~/-]*\w|\{[^}]+\})", re.sub(r"<?https?://\S+|\]\([^)]*\)", "", prose(text)))


def check_references(pages, folder):
    "Cross-references lead to a label of the same page (a website has no others); citations to an entry of references.bib."
    bib, wrong = Path(folder) / "references.bib", []
    entries = set(re.findall(r"@\w+\s*\{\s*([^,\s]+)\s*,", bib.read_text(encoding="utf-8"))) if bib.exists() else set()
    for page in pages.values():
        labels = anchors(page)
        for place, text in page.markdown():
            for key in references(text):
                if re.match(r"(?i:eq|fig|tbl|sec|lst|thm|lem|def|exm|exr)-", key): missing = (key[:1].lower() + key[1:]) not in labels
                else: missing = key.strip("{}") not in entries
                if missing: wrong.append(f"{place}: @{key} is no label of this page and no entry of references.bib")
    return wrong


# Equations

def all_equations(pages): return [(place, tex, display) for page in pages.values() for place, text in page.markdown() for tex, display in equations(text)]


def install_katex(cache, source=ROOT / "tools" / "katex"):
    "The pinned KaTeX, in a folder of a cache that is named after its lock file; OSError says why there is none."
    import hashlib

    from filelock import FileLock
    if not (shutil.which("node") and shutil.which("npm")): raise OSError("node and npm are needed to parse the equations")
    folder = Path(cache) / f"katex-{hashlib.sha256((source / 'package-lock.json').read_bytes()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if not (folder / "complete").exists():
            for name in ("package.json", "package-lock.json"): shutil.copy(source / name, folder)
            done = subprocess.run([shutil.which("npm"), "ci", "--no-audit", "--no-fund", "--ignore-scripts"], cwd=folder, capture_output=True, text=True, timeout=300)
            if done.returncode: raise OSError(f"npm ci could not install KaTeX: {done.stderr.strip()[-300:]}")
            (folder / "complete").touch()
    return folder


def install_html_manager(cache, source=ROOT / "tools" / "html-manager" / "packages.json"):
    """The scripts that show saved widgets on a page, in the order in which they are loaded, from a folder of a cache named after the list of packages.

    They are bundles, so only the packages themselves are fetched, not the hundred that they were built from. OSError says why there are none.
    """
    import base64
    import hashlib
    import tarfile

    from filelock import FileLock
    if not shutil.which("npm"): raise OSError("npm is needed to fetch the scripts that show saved widgets")
    packages = json.loads(source.read_text())["packages"]
    folder = Path(cache) / f"html-manager-{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    scripts = [folder / p["script"] for p in packages]
    with FileLock(folder / "lock"):
        for p, script in zip(packages, scripts):
            if script.exists(): continue
            done = subprocess.run([shutil.which("npm"), "pack", "--json", f"{p['name']}@{p['version']}"], cwd=folder, capture_output=True, text=True, timeout=300)
            if done.returncode: raise OSError(f"npm pack could not fetch {p['name']}: {done.stderr.strip()[-300:]}")
            archive = folder / json.loads(done.stdout)[0]["filename"]
            found = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
            if found != p["integrity"]: raise ValueError(f"{archive.name} is not what tools/html-manager/packages.json names: {found}")
            script.parent.mkdir(parents=True, exist_ok=True)
            with tarfile.open(archive) as tar: part = tar.extractfile(f"package/{p['script']}").read()
            script.with_suffix(".part").write_bytes(part)
            script.with_suffix(".part").replace(script)
            archive.unlink()
    return scripts


def check_equations(pages, katex):
    "What KaTeX's strict parser says, for all equations in one process; and dollars that are not mathematics for pandoc."
    found = all_equations(pages)
    asked = json.dumps([dict(tex=tex, display=display) for _, tex, display in found])
    done = subprocess.run(["node", ROOT / "tools" / "katex" / "check.js", katex], input=asked, capture_output=True, text=True, timeout=120)
    if done.returncode: raise RuntimeError(done.stderr[-2000:])
    wrong = [f"{place}: ${tex}$: {message}" for (place, tex, _), message in zip(found, json.loads(done.stdout), strict=True) if message]
    return wrong + [f"{place}: {bad!r} is not mathematics for pandoc" for page in pages.values() for place, text in page.markdown() for bad in stray_math(text)]


# Figures

ALT_LENGTH = 40 # characters: "A plot of the accuracy" says nothing
WIDGET = "application/vnd.jupyter.widget-view+json"


def options(source):
    "Quarto's options of a cell, which are YAML; nbdev's directives, which are not, are left out."
    lines = re.findall(r"^#\|[ ]?(.*)$", source, re.M)
    return yaml.safe_load("\n".join(line for line in lines if re.match(r"[\w-]+:(\s|$)|\s", line))) or {}


def pictures(cell): return [o for o in cell.outputs if any(k.startswith("image/") for k in o.get("data", {}))]


def widgets(cell): return [o for o in cell.outputs if WIDGET in o.get("data", {}) and not is_bar(o)]


def poor(alt): return len(str(alt).strip()) < ALT_LENGTH or len(str(alt).split()) < 6


def check_figures(pages):
    "Pictures, also those of widgets, have a text alternative of a useful length; options are YAML, as Quarto needs them."
    wrong = []
    for page in pages.values():
        saved = page.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
        seen = set()
        for i, cell in enumerate(page.cells):
            if cell.kind == "code":
                place = f"{page.name}, cell {i}"
                try: alt = options(cell.source).get("fig-alt", "")
                except (yaml.YAMLError, AttributeError) as error:
                    wrong.append(f"{place}: its options are not YAML; put quotes around a text with a colon ({str(error).splitlines()[0]})"); continue
                alts = alt if isinstance(alt, list) else [alt] * bool(alt)
                n = len(pictures(cell))
                if n > len(alts): wrong.append(f"{place}: {n} pictures, {len(alts)} `#| fig-alt:`")
                if widgets(cell) and not alts and all(poor(t := "".join(o["data"].get("text/plain", ""))) or re.match(r"\w+\(", t) for o in widgets(cell)):
                    wrong.append(f"{place}: a widget without `#| fig-alt:` or a plain text that describes it")
                wrong += [f"{place}: the text alternative {a!r} says too little" for a in alts if (n or widgets(cell)) and poor(a)]
                wrong += [f"{place}: the text alternative {a!r} is that of another figure" for a in alts if a in seen]
                seen |= set(alts)
                wrong += [f"{place}: no saved state of its widget: the site cannot show it" for o in widgets(cell) if o["data"][WIDGET]["model_id"] not in saved]
                for tag in re.findall(r"<img[^>]*>", "".join("".join(o.get("data", {}).get("text/html", "")) for o in cell.outputs)):
                    if poor((re.search(r"\balt=[\"']([^\"']*)", tag) or ["", ""])[1]): wrong.append(f"{place}: an <img> without a useful alt=")
            elif cell.kind == "markdown":
                text = cell.source
                found = [m[1] for m in re.finditer(r"!\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:)", prose(text))] # a badge needs a word, not a description
                wrong += [f"{page.name}, cell {i}: the text alternative {a!r} says too little" for a in found if poor(a)]
                wrong += [f"{page.name}, cell {i}: a picture without a text alternative" for a in re.findall(r"!\[\s*\]\(", prose(text))]
    return wrong


# Stored outputs

BAR = re.compile(r"\d+%\|.*?\|\s*[\d.]+\w*/[\d.?]+\w*\s*\[|\b\d+\w*\s\[\d\d:\d\d[,<]")
BARE = re.compile(r"<[\w.]+( object)?(\(op=[^)]*\))?( at 0x[0-9a-f]+)?>\Z") # what Python shows for a value that nobody wants to see
MACHINE = re.compile(r"(?<![\w.~])/(?:home|root|tmp|work|Users|private|var|usr|opt|mnt|content|kaggle)/[\w.-]*|\b[A-Za-z]:\\+\w+|[\w./]*(?:site|dist)-packages\b")
WARNING = re.compile(r"\b\w*Warning\b|\bdeprecated\b|^Traceback \(most recent call last\)", re.M)


HIDDEN = re.compile(r"^#\|\s*(hide|output:\s*false|include:\s*false)\b", re.M)


def output_text(output):
    "The words of an output: what was printed, and every textual form of a value."
    parts = ["".join(output.get("text", ""))] + ["".join(v) for k, v in output.get("data", {}).items() if k.startswith("text/")]
    return "\n".join(parts)


def is_bar(output): return bool(BAR.search(output_text(output)))


def makes_output(source):
    "Does a cell print, display or plot as it stands, outside functions?"
    try: tree = ast.parse(re.sub(r"^[%!].*$", "pass", source, flags=re.M))
    except SyntaxError: return False
    todo, calls = list(tree.body), []
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)): continue
        if isinstance(node, ast.With) and any(isinstance(getattr(w.context_expr, "func", 0), (ast.Name, ast.Attribute)) and re.search("redirect|expect_fail|captur", ast.unparse(w.context_expr)) for w in node.items): continue
        if isinstance(node, ast.Call): calls.append(ast.unparse(node.func))
        todo += ast.iter_child_nodes(node)
    return any(c in ("print", "display", "plt.figure", "plt.subplots", "plt.show") for c in calls)


def skipped(source):
    "Cells that neither the tests nor tools/run_notebooks.py execute."
    return bool(re.search(r"^#\|\s*(notest|cuda|slow)\b|^#\|\s*eval:\s*false", source, re.M))


def check_outputs(pages):
    "No stored output is an error, a warning, a progress bar or a path of somebody's machine, and none is missing. Takes notebooks as they are, not processed."
    wrong = []
    for page in pages.values():
        for i, cell in enumerate(page.cells):
            if cell.kind != "code": continue
            place = f"{page.name}, cell {i}"
            for output in cell.outputs:
                text = output_text(output)
                if output["output_type"] == "error": wrong.append(f"{place}: an error is stored: {output.get('ename')}")
                elif is_bar(output): wrong.append(f"{place}: a progress bar is stored; tools/run_notebooks.py leaves it out")
                elif found := WARNING.search(text): wrong.append(f"{place}: a warning is stored: {found[0]}")
                elif output["output_type"] == "execute_result" and BARE.match(text.strip()) and not any(k.startswith("image/") for k in output["data"]) and not HIDDEN.search(cell.source): wrong.append(f"{place}: {text.strip()} is stored: end the cell with a semicolon")
                if found := MACHINE.search(text): wrong.append(f"{place}: a path of somebody's machine is stored: {found[0]}")
            if re.search(r"^expect_fail\(", cell.source, re.M): wrong.append(f"{place}: expect_fail without `with` tests nothing")
            if not (cell.outputs or HIDDEN.search(cell.source) or skipped(cell.source)) and makes_output(cell.source): wrong.append(f"{place}: its output is not stored: run the notebook")
    return wrong


# What gets lost, and running times

def spoken(text): return re.sub(r"\W+", " ", re.sub(r"\]\([^)]*\)|\{[^{}\n]*#[^{}\n]*\}", "", text))


def check_nothing_lost(sources, pages):
    "nbdev makes the title block from the cell of the H1 and drops the rest of that cell: every line of it must have come through."
    wrong = []
    for name, source in sources.items():
        first = next((c.source for c in source.cells if c.kind == "markdown" and re.search(r"^#\s", c.source, re.M)), "")
        kept = spoken("\n".join(text for _, text in pages[name].markdown())) if name in pages else ""
        lost = [line for line in first.splitlines() if spoken(line).strip() and spoken(line).strip() not in kept]
        if lost: wrong.append(f"{name}: the site does not show {lost[0][:60]!r}: begin a new cell after the summary")
    return wrong


TIME = re.compile(r"Running time:\s*(?:about\s+)?(?P<time>(?P<n>\d+(?:\.\d+)?)\s*(?P<unit>s|seconds?|min|minutes?)\b(?:\s*\((?P<exact>\d+)\s*s\))?)")
UNTIMED = {"index.ipynb"} # the title page


def stated_time(text):
    "The match of a page's running time and its seconds, or (None, None)."
    found = TIME.search(text)
    return (found, float(found["exact"] or float(found["n"]) * (60 if found["unit"].startswith("m") else 1))) if found else (None, None)


def agrees(stated, recorded): return max(stated, recorded) <= 10 or stated / 2 <= recorded <= 2 * stated


def check_times(pages, record):
    "The running time that a page states is that of the last recorded run within a factor of two, and every page has both."
    wrong = []
    for page in pages.values():
        if page.name in UNTIMED or not page.name.endswith(".ipynb"): continue
        _, seconds = stated_time("\n\n".join(c.source for c in page.cells if c.kind == "markdown"))
        if seconds is None: wrong.append(f"{page.name}: no line `Running time: N s on a 2-core CPU.`")
        elif page.name not in record: wrong.append(f"{page.name}: no recorded run: tools/run_notebooks.py --record nbs/{page.name}")
        elif not agrees(seconds, actual := record[page.name]["seconds"]): wrong.append(f"{page.name}: states {seconds:g} s, the last run took {actual:g} s: tools/run_notebooks.py --fix-times")
    return wrong + [f"nbs/running_times.json: {name} is no page" for name in record if name not in pages]


def named_pages(config):
    "Every page that a part of _quarto.yml names, at whatever depth."
    if isinstance(config, str): return [config] if re.fullmatch(r"[\w/.-]+\.(?:ipynb|qmd)", config) else []
    return [name for part in (config.values() if isinstance(config, dict) else config if isinstance(config, list) else ()) for name in named_pages(part)]


def check_sidebar(pages, config):
    "Every page is in the sidebar once; the sidebar and everything else of the site's frame lead to pages."
    website = yaml.safe_load(config)["website"]
    listed = named_pages(website["sidebar"])
    wrong = [f"{name} is not in the sidebar of _quarto.yml" for name in pages if name not in listed]
    wrong += [f"{name} is in the sidebar of _quarto.yml {listed.count(name)} times" for name in dict.fromkeys(listed) if listed.count(name) > 1]
    return wrong + [f"_quarto.yml names {name}, which is no page" for name in dict.fromkeys(named_pages(website)) if name not in pages]


def read_record(path=ROOT / "nbs" / "running_times.json"): return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def main():
    import tempfile

    from platformdirs import user_cache_dir
    from site_names import check_names, check_notation
    sources = read_pages(ROOT / "nbs")
    with tempfile.TemporaryDirectory() as folder:
        proc, _ = process(folder)
        pages = read_pages(proc)
        found = all_equations(pages)
        names, wrong_names = check_names(sources)
        rows, wrong_rows = check_notation(sources["method/00_notation.ipynb"])
        texts = [(page, text) for page in pages.values() for _, text in page.markdown()]
        code = [c for page in pages.values() for c in page.cells if c.kind == "code"]
        counts = [
            (len(sources), "pages in the sidebar", check_sidebar(sources, (ROOT / "_quarto.yml").read_text(encoding="utf-8")) + check_nothing_lost(sources, pages)),
            (sum(len(links(t)) for _, t in texts), "links", check_links(pages, proc) + check_readme()),
            (sum(len(anchors(p)) for p in pages.values()), "anchors", []),
            (sum(len(references(t)) for _, t in texts), "cross-references and citations", check_references(pages, proc)),
            (len(found), f"equations ({sum(d for *_, d in found)} displayed)", check_equations(pages, install_katex(os.environ.get("TSV_NB_CACHE") or user_cache_dir("tsv-nb")))),
            (sum(len(pictures(c)) for c in code), "figures", check_figures(pages)),
            (sum(len(widgets(c)) for c in code), "widgets", []),
            (names, "names in backticks", wrong_names),
            (rows, "rows of the notation table", wrong_rows),
            (sum(len(c.outputs) for p in sources.values() for c in p.cells), "stored outputs", check_outputs(sources)),
            (len(read_record()), "recorded running times", check_times(sources, read_record()))]
    for n, what, wrong in counts: print(f"{n:6d} {what:32s} {f'{len(wrong)} wrong' if wrong else ''}")
    wrong = [w for *_, several in counts for w in several]
    print(*(f" - {w}" for w in wrong), sep="\n")
    return bool(wrong)


if __name__ == "__main__": sys.exit(main())
