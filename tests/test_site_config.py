"""The site without Quarto: its configuration, the processed notebooks, citations and labels, the API index, and the workflow that publishes it."""
import ast
import html
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "settings.ini").exists(), reason="needs the source tree")
yaml = pytest.importorskip("yaml")
SITE = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
PAGES = sorted(p.relative_to(ROOT / "nbs").as_posix() for p in (ROOT / "nbs").rglob("*.ipynb")
               if not {".ipynb_checkpoints", "course"} & set(p.relative_to(ROOT / "nbs").parts[:-1]) or p.parent == ROOT / "nbs" / "course")
LABEL = r"(?:eq|fig)-[\w-]+"


def settings():
    from configparser import ConfigParser
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def cells(path): return json.loads(Path(path).read_text(encoding="utf-8"))["cells"]


def source(cell): return "".join(cell["source"])


def prose(path):
    "Text of a notebook as Quarto sees it, without code and maths; markdown that a cell has printed counts, too."
    parts = [source(c) for c in cells(path) if c["cell_type"] == "markdown"]
    parts += ["".join(o["data"]["text/markdown"]) for c in cells(path) if c["cell_type"] == "code" for o in c["outputs"] if "text/markdown" in o.get("data", {})]
    text = re.sub(r"^```.*?^```|^ {4}(?! *- )[^\n]*$", "", "\n".join(parts), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(\$\$.*?\$\$)|`[^`\n]*`|<code>.*?</code>|(?<!\\)\$[^$\n]+\$", lambda m: "$$ $$" if m[1] else "", text, flags=re.DOTALL)


@pytest.fixture(scope="session")
def processed(tmp_path_factory):
    "proc_nbs on a copy of the notebooks, started as the console script nbdev_docs is: from a file elsewhere. One copy for all workers; what show_doc would run is left out here."
    shared = tmp_path_factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else tmp_path_factory.mktemp("site")
    copy, done = shared / "site_copy", shared / "site_done"
    with FileLock(shared / "site_config.lock"):
        if not done.exists():
            shutil.copytree(ROOT / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
            shutil.copy(ROOT / "_quarto.yml", copy)
            (copy / "settings.ini").write_text((ROOT / "settings.ini").read_text(encoding="utf-8") + "\nskip_procs = exec_show_docs\n", encoding="utf-8")
            script = shared / "process.py"
            script.write_text("from nbdev.serve import proc_nbs\nif __name__ == '__main__': proc_nbs(force=True, n_workers=2)\n")
            path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            out = subprocess.run([sys.executable, str(script)], cwd=copy, capture_output=True, text=True, timeout=900, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"})
            assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-2000:]
            done.touch()
    return copy / "_proc"


def front(page):
    "Front matter of a processed notebook."
    first = cells(page)[0]
    assert first["cell_type"] == "raw", page
    return yaml.safe_load(source(first).strip().strip("-"))


# what Quarto's schema knows: src/resources/schema of quarto-cli, definitions.yml (base-website) and document-*.yml
WEBSITE = set("""title description favicon site-url site-path repo-url repo-link-target repo-link-rel repo-subdir repo-branch issue-url repo-actions reader-mode google-analytics
    announcement cookie-consent search navbar sidebar body-header body-footer margin-header margin-footer page-navigation back-to-top-navigation bread-crumbs page-footer image image-alt
    comments open-graph twitter-card other-links code-links drafts draft-mode""".split())
KNOWN = {"project": {"type", "output-dir", "preview", "render", "resources", "pre-render", "post-render"}, "website": WEBSITE,
         "crossref": {f"{kind}-{what}" for kind in ("fig", "tbl", "eq", "lst", "sec") for what in ("prefix", "title", "labels")} | {"chapters", "title-delim", "labels", "ref-hyperlink"},
         "search": {"location", "type", "limit", "collapse-after", "copy-button", "merge-navbar-crumbs", "keyboard-shortcut", "show-item-context", "algolia"},
         "navbar": set("title logo logo-alt logo-href background foreground search pinned collapse collapse-below left right toggle-position tools-collapse".split()),
         "sidebar": set("id title logo logo-alt logo-href search tools contents style background foreground border alignment collapse-level pinned header footer".split()),
         "item": {"aria-label", "href", "icon", "text", "menu", "rel", "target"}, "code-tools": {"source", "toggle", "caption"},
         "html": {"theme", "css", "toc", "toc-depth", "code-copy", "code-tools", "html-math-method"}}


def test_only_keys_that_quarto_knows():
    "Quarto refuses a closed object with another key, and says so only when it renders."
    website, pages = SITE["website"], SITE["format"]["html"]
    assert set(SITE) == {"project", "lang", "bibliography", "link-citations", "crossref", "format", "website"}
    for name, used in dict(project=SITE["project"], website=website, crossref=SITE["crossref"], search=website["search"], navbar=website["navbar"], sidebar=website["sidebar"], html=pages).items():
        assert set(used) <= KNOWN[name], (name, set(used) - KNOWN[name])
    for item in website["navbar"]["left"] + website["navbar"]["right"]: assert set(item) <= KNOWN["item"] and (item["href"].startswith("https://") or item["href"] in PAGES), item
    assert set(pages["code-tools"]) <= KNOWN["code-tools"] and set(pages["theme"]) == {"light", "dark"} and pages["html-math-method"] == "katex" and pages["code-copy"] is True
    assert set(website["repo-actions"]) == {"source", "issue"} and website["page-navigation"] is True and SITE["lang"] == "en"


def test_configuration_agrees_with_settings(processed):
    cfg, website = settings(), SITE["website"]
    assert website["site-url"] == cfg["doc_host"] + cfg["doc_baseurl"] and website["repo-url"] == cfg["git_url"] and website["repo-branch"] == cfg["branch"]
    assert website["repo-subdir"] == cfg["nbs_path"] and website["title"] == cfg["title"] and SITE["project"]["output-dir"] == cfg["doc_path"]
    assert yaml.safe_load((processed / "_quarto.yml").read_text()) == {"metadata-files": ["../_quarto.yml"]}
    for path in (SITE["bibliography"], SITE["format"]["html"]["css"], website["favicon"], website["image"]): assert (processed / path).stat().st_size, path


def reading_order(page):
    "Number and letters of a page: 22b, 22b2, 22c."
    number, letters, more = re.match(r"(\d+)([a-z]*)(\d*)_|", page.rpartition("/")[2]).groups()
    return int(number or 0), letters or "", int(more or 0)


def test_sidebar_in_reading_order():
    contents = SITE["website"]["sidebar"]["contents"]
    parts, front_pages = [part for part in contents if isinstance(part, dict)], [page for page in contents if isinstance(page, str)]
    assert contents[:len(front_pages)] == front_pages and front_pages[0] == "index.ipynb" and SITE["website"]["sidebar"]["collapse-level"] == 1
    listed = [page for part in parts for page in part["contents"]]
    assert len({*listed, *front_pages}) == len(listed + front_pages) and {*listed, *front_pages} >= set(PAGES), set(PAGES) - set(listed)
    for part in parts:
        assert set(part) == {"section", "contents"}
        numbered = [p for p in part["contents"] if re.match(r"\d", p.rpartition("/")[2])]
        assert numbered == sorted(numbered, key=reading_order), part["section"]
    numbers = [[reading_order(p)[0] for p in part["contents"] if reading_order(p)[0] or p.endswith("00_notation.ipynb")] for part in parts]
    assert all(max(a) < min(b) for a, b in zip(filter(None, numbers), list(filter(None, numbers))[1:])) and listed[0] == "method/00_notation.ipynb"
    assert [p for p in listed if p.startswith("vision/20")] == [f"vision/{p}.ipynb" for p in ("20_clip", "20b_render", "20c_layouts")]


@pytest.mark.parametrize("page", PAGES)
def test_front_matter_and_links(processed, page):
    head = front(processed / page)
    own = {key for c in cells(ROOT / "nbs" / page) if c["cell_type"] == "raw" for key in yaml.safe_load(source(c).strip().strip("-")) or {}}
    assert set(head) <= {"title", "description", "output-file", "code-links"} | own and head["title"] and head["description"]
    assert {link["text"]: link["href"] for link in head["code-links"]} == {
        "Open in Colab": f"https://colab.research.google.com/github/tsv-nb/tsv-nb/blob/main/nbs/{page}",
        "Download notebook": f"https://tsv-nb.github.io/tsv-nb/notebooks/{page}",
        "Source of this page": f"https://github.com/tsv-nb/tsv-nb/blob/main/nbs/{page}"}
    assert all(set(link) == {"text", "icon", "href"} for link in head["code-links"])


@pytest.mark.parametrize("page", PAGES)
def test_nothing_of_the_introduction_is_lost(processed, page):
    "nbdev deletes the cell with the title; what else is in it, and the next text, has to be on the page."
    first = "\n".join(source(c) for c in [c for c in cells(ROOT / "nbs" / page) if c["cell_type"] == "markdown"][:2]).splitlines()
    rest = [line for line in first if line.strip() and not line.startswith(("# ", "> "))]
    unlinked = re.sub(r"\[(`[^`]+`)\]\(https://tsv-nb\.github\.io[^)]*\)", r"\1", "\n".join(source(c) for c in cells(processed / page) if c["cell_type"] == "markdown"))
    assert rest and not [line for line in rest if line not in unlinked.splitlines()]


def test_output_files_are_unique(processed):
    outputs = [(Path(page).parent, front(processed / page)["output-file"]) for page in PAGES]
    assert len(set(outputs)) == len(outputs)


@pytest.mark.parametrize("page", PAGES)
def test_cell_options_are_yaml(processed, page):
    "Quarto stops at a `#| key: value` that is not YAML, such as a colon in unquoted text."
    for c in cells(processed / page):
        if c["cell_type"] != "code": continue
        lines = []
        for line in source(c).splitlines():
            if not line.startswith("#|"): break
            lines.append(line[2:].removeprefix(" "))
        assert isinstance(yaml.safe_load("\n".join(lines)) or {}, dict), lines


def test_pages_outside_github_are_refused():
    from tsv_nb.pages import page_links
    with pytest.raises(ValueError, match="gitlab"): page_links("index.ipynb", dict(git_url="https://gitlab.com/a/b", branch="main", nbs_path="nbs", doc_host="h", doc_baseurl="/b"))
    with pytest.raises(KeyError): page_links("index.ipynb", dict(git_url="https://github.com/a/b"))


def test_library_does_not_need_nbdev():
    code = "import sys; sys.modules['nbdev'] = sys.modules['yaml'] = sys.modules['execnb'] = None\nimport tsv_nb.pages, tsv_nb; print(tsv_nb.pages.PageLinks.__name__)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert out.returncode == 0 and out.stdout.strip() == "PageLinks", out.stderr


# citations and labels

def bibliography():
    text = (ROOT / "nbs" / SITE["bibliography"]).read_text(encoding="utf-8")
    found = re.findall(r"^@(\w+)\{([\w-]+),\n(.*?)^\}", text, re.MULTILINE | re.DOTALL)
    assert len(found) == len(re.findall(r"^@", text, re.MULTILINE)) and text.count("{") == text.count("}")
    assert len({key for _, key, _ in found}) == len(found)
    return {key: {"type": kind} | dict(re.findall(r"^\s*(\w+) = \{(.*)\},?$", body, re.MULTILINE)) for kind, key, body in found}


def test_bibliography_entries():
    place = dict(inproceedings="booktitle", article="journal", techreport="institution")
    for key, entry in bibliography().items():
        assert {"title", "author", "year"} <= set(entry) and entry["year"] in key and entry["author"].split(",")[0].lower().encode("ascii", "ignore")[:3] in re.sub(r"\{\W*(\w)\}", r"\1", key).encode() + key.encode(), key
        assert entry["type"] not in place or place[entry["type"]] in entry, key
        if "eprint" in entry: assert re.fullmatch(r"\d{4}\.\d{5}", entry["eprint"]) and entry["url"] == f"https://arxiv.org/abs/{entry['eprint']}", key


def test_citations_and_entries_match(processed):
    keys = set(bibliography())
    at = {page: set(re.findall(r"(?<![\w/.@])@([\w-]*\w)", prose(processed / page))) for page in PAGES}
    unknown = {page: names - keys for page, names in at.items() if {n for n in names - keys if not re.fullmatch(LABEL, n)}}
    assert not unknown
    cited = set().union(*(names & keys for page, names in at.items() if not page.startswith("reference/64")))
    assert cited == keys, keys - cited
    table = prose(processed / "reference/64_references.ipynb")
    assert all(re.search(rf"\b{entry['year']}\b", table) for entry in bibliography().values()) and table.count("\n| ") >= len(keys)


def test_sources_of_the_methods_are_in_the_bibliography():
    from tsv_nb import MERGE_METHODS
    eprints = {entry.get("eprint") for entry in bibliography().values()}
    assert not [m.name for m in MERGE_METHODS.values() if (found := re.search(r"arXiv (\S+)", m.source)) and found[1] not in eprints]


def labels(path):
    "Labels of equations and figures that a page defines."
    markdown = "\n".join(source(c) for c in cells(path) if c["cell_type"] == "markdown")
    code = [source(c) for c in cells(path) if c["cell_type"] == "code"]
    return re.findall(rf"\{{#({LABEL})\}}", re.sub(r"`[^`\n]*`", "", markdown)), [m[1] for s in code if (m := re.search(r"^#\|\s*label:\s*(\S+)", s, re.MULTILINE))]


def test_labels(processed):
    seen = {}
    for page in PAGES:
        equations, figures = labels(processed / page)
        for label in equations + figures: assert seen.setdefault(label, page) == page and (equations + figures).count(label) == 1, f"{label} on {page} and {seen[label]}"
        text = prose(processed / page)
        assert len(re.findall(rf"\$\$ \{{#{LABEL}\}}", text)) == len(equations), f"{page}: a label has to follow $$ and a space"
        missing = set(re.findall(rf"(?<![\w/.@])@({LABEL})", text)) - set(equations + figures)
        assert not missing, f"{page} refers to {missing}"
        for c in cells(processed / page):
            if c["cell_type"] == "code" and re.search(r"^#\|\s*label:\s*fig-", source(c), re.MULTILINE): assert "#| fig-cap:" in source(c) and "#| fig-alt:" in source(c), page
    assert sum(label.startswith("eq-") for label in seen) >= 20 and any(label.startswith("fig-") for label in seen)


def test_links_to_equations_lead_to_one(processed):
    links = [(page, target, label) for page in PAGES for target, label in re.findall(rf"\]\(([^)#\s]*\.ipynb)#({LABEL})\)", prose(processed / page))]
    assert len(links) >= 10
    for page, target, label in links:
        equations, figures = labels((processed / page).parent / target)
        assert label in equations + figures, f"{page} links to {target}#{label}"


def written(page): return "\n".join(source(c) for c in cells(ROOT / "nbs" / page) if c["cell_type"] == "markdown")


def symbols(page):
    "How many formulas the text of a page has."
    return len(re.findall(r"\$\$.+?\$\$|(?<!\$)\$[^$\n]+\$(?!\$)", written(page), re.DOTALL))


@pytest.mark.parametrize("page", [p for p in PAGES if not p.endswith("00_notation.ipynb") and (p.startswith(("method/", "kernels/")) or symbols(p) >= 5)])
def test_pages_with_symbols_link_to_the_notation(page):
    first = "\n".join(source(c) for c in [c for c in cells(ROOT / "nbs" / page) if c["cell_type"] == "markdown"][:3])
    target = "00_notation.ipynb" if page.startswith("method/") else "method/00_notation.ipynb" if "/" not in page else "../method/00_notation.ipynb"
    assert f"]({target})" in first


@pytest.mark.parametrize("page", PAGES)
def test_displayed_equations_have_numbers(page):
    bare = re.findall(r"\$\$[^$]+\$\$(?! *\{#eq-[\w-]+\})", written(page))
    assert not bare, f"{page}: an equation without {{#eq-NAME}}: {bare[0]}"


# the API index

API = ROOT / "nbs" / "reference" / "60_api.ipynb"


def stored_index():
    "The markdown that is stored on the page of the index."
    texts = ["".join(o["data"]["text/markdown"]) for c in cells(API) for o in c.get("outputs", []) if "text/markdown" in o.get("data", {})]
    assert len(texts) == 1, "run nbs/reference/60_api.ipynb again"
    return texts[0]


def without_types(text): return re.sub(r"^(\| [^|]* \|)[^|]*\|", r"\1", text, flags=re.MULTILINE) # how a type is written differs between versions of Python


def test_api_index_is_current():
    namespace = {}
    for c in cells(API):
        if c["cell_type"] == "code" and "find_spec" not in source(c): exec(compile(source(c), str(API), "exec"), namespace)
    stored, fresh = (without_types(text).splitlines() for text in (stored_index(), namespace["text"]))
    assert stored == fresh, "run nbs/reference/60_api.ipynb again: " + next((f"{a!r} is now {b!r}" for a, b in zip(stored, fresh) if a != b), "its length has changed")


def exported():
    "{module: public names}, read from the files."
    for path in sorted((ROOT / "tsv_nb").rglob("*.py")):
        if path.name.startswith("_"): continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__": yield ".".join(path.relative_to(ROOT).with_suffix("").parts), ast.literal_eval(node.value)


def test_api_index_is_complete():
    text = html.unescape(stored_index())
    modules = dict(exported())
    assert set(re.findall(r"^### (\S+)$", text, re.MULTILINE)) == set(modules)
    ids = re.findall(r'<span id="([^"]+)"></span>', text)
    assert len(set(ids)) == len(ids) == sum(map(len, modules.values())) and set(ids) == set(re.findall(r"\]\(#([^)]+)\)", text))
    for name, public in modules.items():
        module = importlib.import_module(name)
        section = re.search(rf"^### {re.escape(name)}$(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)[1]
        assert re.search(r"Page: \[\w+\]\(\S+\.ipynb\)", section), name
        for o in public:
            obj, (head, block) = getattr(module, o), re.search(rf'<details><summary><code>((?:(?!</code>).)*)</code></summary>\s*<span id="[^"]*-{o}"></span>(.*?)</details>', section, re.DOTALL).groups()
            assert re.match(rf"{o}(\(|$)", head), f"{name}.{o}"
            if inspect.isfunction(obj) or inspect.isclass(obj): assert " ".join((inspect.getdoc(obj) or "?").splitlines()[0].split()) in block, f"{name}.{o}"
            if inspect.isfunction(obj): assert not [p for p in inspect.signature(obj).parameters if f"<code>{p}</code>" not in block], f"{name}.{o}"
    for path in re.findall(r"\]\((\.\./\S+\.ipynb)\)", text): assert (API.parent / path).exists(), path


# publishing

WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "docs.yml").read_text(encoding="utf-8"))


def test_workflow_builds_always_and_publishes_main():
    on, jobs = WORKFLOW[True], WORKFLOW["jobs"] # YAML reads the key `on` as true
    assert "pull_request" in on and on["push"] == {"branches": [settings()["branch"]]}
    steps = jobs["build"]["steps"]
    quarto = next(s for s in steps if "quarto-actions/setup" in s.get("uses", ""))
    assert re.fullmatch(r"\d+\.\d+\.\d+", quarto["with"]["version"])
    order = [next(i for i, s in enumerate(steps) if what in s.get("run", "") + s.get("uses", "")) for what in ("'.[dev]'", "tests/test_site", "nbdev_docs", "notebooks", "upload-pages-artifact")]
    assert order == sorted(order) and next(s for s in steps if "upload-pages" in s.get("uses", ""))["with"]["path"] == SITE["project"]["output-dir"]
    publish = jobs["publish"]
    assert publish["needs"] == "build" and "refs/heads/main" in publish["if"] and "pull_request" in publish["if"] and publish["permissions"] == {"pages": "write", "id-token": "write"}
    assert WORKFLOW["permissions"] == {"contents": "read"} and not any("deploy-pages" in s.get("uses", "") for s in steps)


@pytest.mark.skipif(sys.platform != "linux", reason="a step of a Linux workflow")
def test_every_download_link_has_its_file(processed, tmp_path):
    "The step of the workflow that puts the notebooks beside the pages, run on a clone."
    step = next(s for s in WORKFLOW["jobs"]["build"]["steps"] if "notebooks" in s.get("run", ""))
    for page in PAGES:
        (tmp_path / "nbs" / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "nbs" / page, tmp_path / "nbs" / page)
    for args in (["init", "-q"], ["add", "nbs"]): subprocess.run(["git", *args], cwd=tmp_path, check=True, capture_output=True)
    subprocess.run(["bash", "-euo", "pipefail", "-c", step["run"]], cwd=tmp_path / step["working-directory"], check=True, capture_output=True)
    base = settings()["doc_host"] + settings()["doc_baseurl"]
    for page in PAGES:
        href = next(link["href"] for link in front(processed / page)["code-links"] if link["text"].startswith("Download"))
        published = tmp_path / SITE["project"]["output-dir"] / href.removeprefix(base + "/")
        assert published.read_bytes() == (ROOT / "nbs" / page).read_bytes()
