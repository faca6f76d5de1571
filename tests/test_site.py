"""The site as a reader meets it, checked without Quarto, and every check against a fault that it has to find."""
import dataclasses
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not (ROOT / "settings.ini").exists(), reason="needs the source tree")
sys.path.insert(0, str(ROOT / "tools"))
import run_notebooks
import site_checks as site
import site_names as names
from site_checks import Cell, Page


@pytest.fixture(scope="session")
def sources(): return site.read_pages(ROOT / "nbs")


@pytest.fixture(scope="session")
def processed(tmp_path_factory):
    "(folder, pages, what was printed): processed once, by whichever process of pytest-xdist comes first."
    from filelock import FileLock
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ: shared = shared.parent
    with FileLock(shared / "site.lock"):
        if not (shared / "site.pickle").exists():
            folder, printed = site.process(shared / "site")
            (shared / "site.pickle").write_bytes(pickle.dumps((folder, printed)))
    folder, printed = pickle.loads((shared / "site.pickle").read_bytes())
    return folder, site.read_pages(folder), printed


def no_katex(why):
    "Without the parser the equations are not checked: that may happen on somebody's machine, not in CI."
    (pytest.fail if os.environ.get("CI") else pytest.skip)(f"the equations are not checked: {why}")


@pytest.fixture(scope="session")
def katex():
    from platformdirs import user_cache_dir
    try: return site.install_katex(os.environ.get("TSV_NB_CACHE") or user_cache_dir("tsv-nb"))
    except OSError as e: no_katex(e)


def nothing(wrong): assert not wrong, f"{len(wrong)} complaints:\n" + "\n".join(wrong)


def page(*cells, name="method/x.ipynb", **metadata):
    "A page of markdown, given as text, and of code, given as (source, outputs)."
    return Page(name, [Cell("markdown", c, []) if isinstance(c, str) else Cell("code", *c) for c in cells], metadata)


def shown(data, kind="display_data"): return dict(output_type=kind, data=data, metadata={})


def printed(text, name="stdout"): return dict(output_type="stream", name=name, text=[text])


PNG = shown({"image/png": "iVBOR", "text/plain": "<Figure size 500x300 with 1 Axes>"})
ALT = "#| fig-alt: Accuracy of three methods against the number of tasks, all falling.\n"


# The pages

def test_the_site_can_be_processed(processed, sources):
    "What nbdev_docs does before Quarto: a cell that mixes imports and other code breaks it. Nothing gets lost but title and summary."
    _, pages, text = processed
    assert "imports and other code" not in text and "Failed to create YAML" not in text, text[-2000:]
    assert pages.keys() == sources.keys()
    nothing(site.check_nothing_lost(sources, pages))


def test_every_page_is_in_the_sidebar(sources): nothing(site.check_sidebar(sources, (ROOT / "_quarto.yml").read_text(encoding="utf-8")))


def test_links_and_references_lead_somewhere(processed, record_property):
    folder, pages, _ = processed
    n = sum(len(site.links(text)) for p in pages.values() for _, text in p.markdown())
    record_property("links", n); assert n > 300
    nothing(site.check_links(pages, folder) + site.check_readme() + site.check_references(pages, folder))


def test_equations_parse(processed, katex, record_property):
    "Hundreds of equations, by KaTeX's strict parser."
    n = len(site.all_equations(processed[1]))
    record_property("equations", n); print(f"{n} equations"); assert n > 500
    nothing(site.check_equations(processed[1], katex))


def test_figures_have_text(processed, record_property):
    n = sum(len(site.pictures(c)) for p in processed[1].values() for c in p.cells)
    record_property("figures", n); assert n > 50
    nothing(site.check_figures(processed[1]))


def test_names_resolve(sources, record_property):
    n, wrong = names.check_names(sources)
    record_property("names", n); assert n > 400
    nothing(wrong)


def test_every_exception_is_needed(sources, monkeypatch):
    exceptions = set(names.EXCEPTIONS)
    monkeypatch.setattr(names, "EXCEPTIONS", {})
    missed = {re.search(r"cell \d+: `(.*?)`: ", w)[1] for w in names.check_names(sources)[1] if "`" in w}
    assert exceptions <= missed, f"remove these from EXCEPTIONS: {exceptions - missed}"


def test_notation_is_true(sources):
    rows, wrong = names.check_notation(sources["method/00_notation.ipynb"])
    assert rows >= 11
    nothing(wrong)


def test_stored_outputs(sources): nothing(site.check_outputs(sources))


def test_running_times(sources): nothing(site.check_times(sources, site.read_record()))


# Markdown

@pytest.mark.parametrize("text, found", [
    ("a $x^2$ b $$y$$", [("x^2", False), ("y", True)]),
    ("it costs $5 and $6", []), (r"\$x$ and `$y$` and <!-- $z$ -->", []),
    ("```\n$x$\n```\n$a$", [("a", False)]), ("~~~ {.python}\n$x$\n~~~", []), ("text\n\n    $x$ in a block\n\n$b$", [("b", False)]),
    ("``a ` $x$`` $c$", [("c", False)]), ("$a\n+b$", [("a\n+b", False)]), ("$a\n\nb$", []), ("$20,000 and x$30", []),
    (r"$\text{a \$ b}$", [(r"\text{a \$ b}", False)]), ("$$\nx\n$$ {#eq-one}", [("\nx\n", True)]), ("| $a$ | $b$ |", [("a", False), ("b", False)])])
def test_equations_as_pandoc_finds_them(text, found): assert site.equations(text) == found


@pytest.mark.parametrize("text", ["$ x$", "a lone $ here", "$a\n\nb$", r"\begin{align}x\end{align}"])
def test_what_only_looks_like_mathematics_is_told(text): assert site.stray_math(text) and not site.stray_math(r"costs \$5, `$PATH`, $x$")


@pytest.mark.parametrize("heading, want", [ # the examples of pandoc's manual, and ours
    ("Heading identifiers in HTML", "heading-identifiers-in-html"), ("Maître d'hôtel", "maître-dhôtel"), ("*Dogs*?--in *my* house?", "dogs--in-my-house"),
    ("[HTML], [S5], or [RTF]?", "html-s5-or-rtf"), ("3. Applications", "applications"), ("33", "section"), ("`CompressedTaskVector.save`", "compressedtaskvector.save"),
    ("stack_factors", "stack_factors"), ("One  [link](a.ipynb) more", "one-link-more"), ("_gram_kernel", "gram_kernel"), ("The score, $T = 2$", "the-score-t-2")])
def test_slugs(heading, want):
    if "--" in want: want = "dogsin-my-house" # with pandoc's smart punctuation, which Quarto uses, -- is a dash and goes
    assert site.slug(heading) == want


def test_anchors_count_headings_labels_and_html():
    p = page("# T\n\n## Twice\n\n## Twice\n\n## Named {#sec-x}\n\n$$a$$ {#eq-a}\n\n<a id=\"here\"></a>\n\n```\n## no heading\n```", ("#| label: fig-one\nplot()", [shown({"text/markdown": "### made_by_nbdev\n"})]))
    assert site.anchors(p) == {"t", "twice", "twice-1", "sec-x", "eq-a", "here", "fig-one", "made_by_nbdev"}


# Faults that the checks must find, and neighbors of theirs that are right

@pytest.mark.parametrize("text, why", [
    ("[a](y.ipynb)", None), ("[a](y.ipynb#the-end)", None), ("[a](why.html#the-end)", None), ("[a](y.html)", "no such page"), ("[a](#here)", None), ("![A picture](../images/p.png)", None), ("`[a](none.ipynb)`", None),
    ("[a](https://arxiv.org/abs/2412.00081)", None), ("[a](https://tsv-nb.github.io/tsv-nb/method/why.html#the-end)", None), ("[a][b]\n\n[b]: y.ipynb", None),
    ("[a](https://github.com/tsv-nb/tsv-nb/blob/main/settings.ini#L1)", None), ("[a](https://colab.research.google.com/github/tsv-nb/tsv-nb/blob/main/nbs/index.ipynb)", None),
    ("[a](z.ipynb)", "no such page"), ("[a](y.ipynb#the-start)", "no #the-start on method/y.ipynb"), ("[a](why.html#the-start)", "no #the-start"), ("[a](#there)", "no #there"),
    ("![A picture](../images/q.png)", "no such page or file"), ("[a]()", "empty"), ("[a](y .ipynb)", "blank"), ("[a](../../README.md)", "out of the site"), ("[a](https://evil.example.com/x)", "HOSTS"),
    ("[a](https://)", "no valid address"), ("[a](javascript:x)", "scheme"), ("[a](https://tsv-nb.github.io/tsv-nb/method/why.html#_gone)", "no #_gone"), ("[a][c]\n\n[b]: y.ipynb", "no definition"),
    ("[b]: z.ipynb", "no such page"), ('<img src="../images/q.png">', "no such page or file"), ("[`f`](y.ipynb) and [![badge](../images/q.png)](y.ipynb)", "images/q.png"),
    ("[a](https://github.com/tsv-nb/tsv-nb/blob/main/setings.ini)", "no setings.ini"), ("[a](https://github.com/tsv-nb/tsv-nb/blob/main/settings.ini#L99999)", "no line"),
    ("[a](https://colab.research.google.com/github/tsv-nb/tsv-nb/blob/main/nbs/gone.ipynb)", "no nbs/gone.ipynb")])
def test_broken_links_are_found(text, why, tmp_path):
    (tmp_path / "images").mkdir(); (tmp_path / "images" / "p.png").touch()
    there = page("## The end", name="method/y.ipynb")
    there.cells.insert(0, Cell("raw", "---\ntitle: Why\noutput-file: why.html\n---", []))
    pages = {"method/x.ipynb": page("## Here", text), "method/y.ipynb": there}
    wrong = site.check_links(pages, tmp_path)
    assert not wrong if why is None else len(wrong) == 1 and why in wrong[0] and "method/x.ipynb, cell 1" in wrong[0], wrong


@pytest.mark.parametrize("text, wrong", [
    ("[a](#set-up) [b](nbs/x.ipynb)", 0), ("[a](#setup)", 1), ("[a](nbs/y.ipynb)", 1), ("[a](https://nowhere.example.org)", 1)])
def test_broken_links_in_the_readme_are_found(text, wrong, tmp_path):
    (tmp_path / "nbs").mkdir(); (tmp_path / "nbs" / "x.ipynb").touch()
    (tmp_path / "README.md").write_text(f"# A\n\n## Set up\n\n{text}\n")
    assert len(site.check_readme(tmp_path)) == wrong


@pytest.mark.parametrize("text, key", [
    ("see @eq-a and [@gargiulo2025, p. 3; @ilharco]", None), ("a@b.org, `@patch`, https://x.org/@me", None), ("see @fig-one, @sec-x", None),
    ("see @eq-b", "@eq-b"), ("see @tbl-one", "@tbl-one"), ("[@gargiulo2024]", "@gargiulo2024"), ("see -@fig-two", "@fig-two")])
def test_references_without_a_target_are_found(text, key, tmp_path):
    (tmp_path / "references.bib").write_text("@inproceedings{gargiulo2025,\n title={T}}\n@misc{ ilharco , title={U}}\n")
    wrong = site.check_references({"x": page("$$a$$ {#eq-a}\n\n## S {#sec-x}", ("#| label: fig-one\n1", []), text)}, tmp_path)
    assert not wrong if key is None else len(wrong) == 1 and key in wrong[0], wrong


def test_bad_equations_are_found(katex):
    bad = [r"$\frac{a}$", r"$$\begin{matrix}a$$", r"$\undefinedthing$", r"$x_\min$", "$a_b_c$", "$é$"]
    good = [r"$\|x\|_1$", r"$$\begin{aligned}a &= b\end{aligned}$$", r"$\text{é}$", r"$\operatorname{STI}$"]
    wrong = site.check_equations({"x": page(*bad, *good, ("f()", [shown({"text/markdown": r"*The $\frac x$ of a docstring.*"}), shown({"text/latex": r"$$\foo$$"})]))}, katex)
    assert [re.search(r"(cell|output of cell) \d+", w)[0] for w in wrong] == [*(f"cell {i}" for i in range(6)), "output of cell 10", "output of cell 10"], wrong
    assert "title block" in site.check_equations({"x": Page("x", [Cell("raw", "---\ndescription: The $\\foo$.\n---", [])], {})}, katex)[0]


def test_without_node_the_reason_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="node and npm are needed"): site.install_katex(tmp_path)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="not checked: x"): no_katex("x")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="not checked: x"): no_katex("x")


def test_katex_is_pinned_and_comes_from_the_public_registry():
    package, lock = (json.loads((ROOT / "tools" / "katex" / name).read_text()) for name in ("package.json", "package-lock.json"))
    assert lock["packages"]["node_modules/katex"]["version"] == package["dependencies"]["katex"]
    for name, entry in lock["packages"].items():
        assert not name or entry["integrity"].startswith("sha512-")
        assert entry.get("resolved", "https://registry.npmjs.org/").startswith("https://registry.npmjs.org/")


WIDGET = {site.WIDGET: {"model_id": "abc", "version_major": 2, "version_minor": 0}}
SAVED = {"application/vnd.jupyter.widget-state+json": {"state": {"abc": {}}}}


@pytest.mark.parametrize("cell, why", [
    ((ALT + "plot()", [PNG]), None), (("plot()", [PNG]), "1 pictures, 0"), ((ALT + "plot()", [PNG, PNG]), "2 pictures, 1"), (("#| fig-alt: A plot\nplot()", [PNG]), "says too little"),
    (("#| fig-alt: Two panels. Left: the accuracy of all methods, right: their bytes.\nplot()", [PNG]), "not YAML"), (('#| fig-alt: "Two panels. Left: the accuracy of all methods, right: their bytes."\nplot()', [PNG]), None),
    ((ALT + "show()", [shown(WIDGET)]), None), (("show()", [shown(WIDGET | {"text/plain": "VBox(children=(IntSlider(value=0, description='rank'), Output()))"})]), "a widget without"),
    (("show()", [shown(WIDGET | {"text/plain": "A slider for the rank above the spectrum of one task matrix and its bytes."})]), None),
    ((ALT + "show()", [shown({site.WIDGET: {"model_id": "gone"}})]), "no saved state"), (("show()", [shown({"text/html": "<img src='x.gif' alt='A film'>"})]), "useful alt="),
    ("![](a.png)", "says too little"), ("![A picture](a.png)", "says too little"), ("![badge](https://mybinder.org/badge.svg)", None), ("`![](a.png)`", None)])
def test_figures_without_words_are_found(cell, why):
    wrong = site.check_figures({"x": page(cell, widgets=SAVED)})
    assert not wrong if why is None else any(why in w for w in wrong), wrong


def test_two_figures_with_one_description_are_found():
    assert "of another figure" in site.check_figures({"x": page((ALT + "a()", [PNG]), (ALT + "b()", [PNG]))})[0]


@pytest.mark.parametrize("output, why", [
    (printed("accuracy 73.1%\n"), None), (printed("records.jsonl: the last record is dropped", "stderr"), None), (printed("https://x.org/home/page and a/tmp/b, 1/2\n"), None),
    (dict(output_type="error", ename="ValueError", evalue="x", traceback=[]), "an error is stored: ValueError"), (printed("x.py:3: UserWarning: old\n", "stderr"), "UserWarning"),
    (printed("  f() is deprecated\n", "stderr"), "deprecated"), (printed("tasks:  50%|#####     | 4/8 [00:01<00:01,  3.2it/s]", "stderr"), "a progress bar"), (printed("0step [00:00, ?step/s]", "stderr"), "a progress bar"),
    (shown({"application/vnd.jupyter.widget-view+json": {"model_id": "a"}, "text/plain": ["towers:   0%|          | 0/8 [00:00<?, ?it/s]"]}), "a progress bar"),
    *((printed(f"written to {path}\n"), "somebody's machine") for path in ("/home/me/x", "/root/.cache/x", "/tmp/tmpab12/x", "/work/x", "/Users/me/x", r"C:\Users\me", "lib/python3.11/site-packages/torch/x.py", "/content/x")),
    (shown({"text/plain": ["PosixPath('/tmp/x')"]}, "execute_result"), "somebody's machine"), (shown({"text/plain": "<contextlib._GeneratorContextManager>"}, "execute_result"), "semicolon"), (PNG, None)])
def test_bad_outputs_are_found(output, why):
    wrong = site.check_outputs({"x": page(("f(x)", [output]))})
    assert not wrong if why is None else len(wrong) == 1 and why in wrong[0], wrong


@pytest.mark.parametrize("source, missing", [
    ("print(1)", True), ("for x in y: print(x)", True), ("plt.figure()", True), ("def f(): print(1)", False), ("x = 1", False), ("#| hide\nprint(1)", False), ("#| cuda\nprint(1)", False),
    ("#| eval: false\nprint(1)", False), ("with redirect_stdout(io.StringIO()): print(1)", False)])
def test_missing_outputs_are_found(source, missing): assert bool(site.check_outputs({"x": page((source, []))})) == missing


def test_errors_that_are_never_asked_for_are_found(): assert "tests nothing" in site.check_outputs({"x": page(("expect_fail(lambda: f())", []))})[0]


@pytest.mark.parametrize("kept, lost", [("You will learn\n\n- how [`f`](x.html) works", 0), ("You will learn", 1), ("", 1)])
def test_words_that_the_site_drops_are_found(kept, lost):
    block = Cell("raw", "---\ntitle: T\ndescription: All of *it*.\n---", [])
    shown = Page("x", [block, Cell("markdown", kept, [])], {})
    assert len(site.check_nothing_lost({"x": page("# T\n\n> All of *it*.\n\nYou will learn\n\n- how `f` works")}, {"x": shown})) == lost


def test_a_wrong_sidebar_is_found():
    config = "website:\n  navbar: {left: [{text: Y, href: %s}]}\n  sidebar:\n    contents:\n    - index.ipynb\n    - section: One\n      contents: [method/x.ipynb%s]\n"
    index, x, y = (dict.fromkeys([name], 0) for name in ("index.ipynb", "method/x.ipynb", "y.ipynb"))
    assert not site.check_sidebar(index | x, config % ("index.ipynb", ""))
    assert site.check_sidebar(index | x | y, config % ("y.ipynb", "")) == ["y.ipynb is not in the sidebar of _quarto.yml"]
    assert site.check_sidebar(index, config % ("index.ipynb", "")) == ["_quarto.yml names method/x.ipynb, which is no page"] == site.check_sidebar(index | y, config % ("method/x.ipynb", ", y.ipynb"))
    assert "2 times" in site.check_sidebar(index | x, config % ("index.ipynb", ", index.ipynb"))[0]


def test_folders_with_an_underscore_hold_no_pages(tmp_path):
    for name in ("a.ipynb", "course/b.ipynb", "course/_source/c.ipynb", ".ipynb_checkpoints/d.ipynb"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True); (tmp_path / name).write_text('{"cells": [], "metadata": {}}')
    assert list(site.read_pages(tmp_path)) == ["a.ipynb", "course/b.ipynb"]


# Names

@pytest.fixture(scope="module")
def package(): return names.Package()


@pytest.mark.parametrize("span", ["tsv_merge", "tsv_nb.merge.tsv_merge", "compress(vector, ratio=…)", "CompressedTaskVector.save", "MERGE_METHODS[\"ties\"]", "orthogonalize=\"svd\"", "mine", "mine.shape", ".apply_to",
                                  "torch.linalg.svd", "tsv_eval --tasks 8 --points 10", "--points 10", "tsv_nb/cli.py", "benchmarks/", "tsv_merge()", "warmup=", "len(mine)"])
def test_right_names_pass(span, package): assert names.span_error(span, {"mine", "shape"}, package, "tsv_eval") is None


@pytest.mark.parametrize("span", ["tsv_murge", "tsv_nb.merge.tsv_murge", "compress(vector, percent=…)", "CompressedTaskVector.store", "MERGE_METHODS[\"knots_of_old\"]", "orthogonalize=\"qr_of_old\"", "yours_of_old", "mine.width_of_old",
                                  "torch.linalg.svdd", "tsv_eval --task 8", "--pointz 10", "tsv_nb/clii.py", "benchmarks/none.py", "tsv_murge()", "warmupp=", "rank_for_ratio(1, 2, 3, 4, 5, 6)", "tsv_evil --tasks 8", ".apply_two"])
def test_wrong_names_are_found(span, package): assert names.span_error(span, {"mine", "shape"}, package, "tsv_eval")


@pytest.mark.parametrize("span", ["sm_80 + …]", "(a!)", "@%p1", "ViT-B-32-quickgelu", "weights.pt", "nik-dim/tall_masks", "{task: (…)"])
def test_what_is_no_name_makes_no_claim(span, package): assert names.span_error(span, set(), package) is False


def test_names_on_pages_in_docstrings_and_in_shell_blocks(package):
    p = page("``tsv_murge``, and `mine` in\n```python\nmine = 1\n```\n", ('def f():\n    "Like `tsv_murgee`."', []), "```sh\ntsv_eval --task 8 \\\n  --points 3\npython benchmarks/none.py\n```")
    _, wrong = names.check_names({"x": p}, package)
    assert len(wrong) == 4 and all(a in b for a, b in zip(("cell 0: `tsv_murge`", "cell 1: `tsv_murgee`", "no option --task", "benchmarks/none.py"), wrong)), wrong


# The notation table

@pytest.mark.parametrize("old, new, why", [
    ("| $(m, n)$ |", "| $(n, m)$ |", "`delta` has the shape"), ("$(m,k)$, $(k,)$, $(k,n)$", "$(m,k)$, $(k,)$, $(n,k)$", "`U, S, Vh` has the shape"), ("$(k,)$", "$(r,)$", "`U, S, Vh` has the shape"),
    ("`delta`", "`delta_matrix`", "`delta_matrix`: unknown"), ("| as $U$ |", "| as $V$ |", "`orthogonalize(U)` has the shape"), ("| `alpha` | float |", "| `alpha` | int |", "is no int"),
    ("| `n_tasks` | int |", "| `n_tasks` | float |", "is no float"), ("lfloor r/T", "lceil r/T", None), ("| `rank` | int | singular", "| `rank` | $(q,)$ | singular", "unknown letter"), ("| symbol |", "| letter |", "no table")])
def test_a_wrong_notation_table_is_found(sources, old, new, why):
    right = sources["method/00_notation.ipynb"]
    assert any(old in c.source for c in right.cells)
    changed = dataclasses.replace(right, cells=[dataclasses.replace(c, source=c.source.replace(old, new)) for c in right.cells])
    _, wrong = names.check_notation(changed)
    assert not wrong if why is None else any(why in w for w in wrong), wrong


def test_a_library_that_left_its_table_is_found(sources, monkeypatch):
    import tsv_nb
    svd, merge = tsv_nb.truncated_svd, tsv_nb.tsv_merge
    monkeypatch.setattr(tsv_nb, "truncated_svd", lambda *a: svd(*a)._replace(Vh=svd(*a).Vh.mT))
    assert any("does not fit the table" in w for w in names.check_notation(sources["method/00_notation.ipynb"])[1])
    monkeypatch.setattr(tsv_nb, "truncated_svd", svd)
    monkeypatch.setattr(tsv_nb, "tsv_merge", lambda v, rank=None: merge(v, rank=rank or 1))
    assert any("default rank" in w for w in names.check_notation(sources["method/00_notation.ipynb"])[1])


# Running times and the recorder

@pytest.mark.parametrize("line, seconds", [
    ("Running time: 5 s on a 2-core CPU.", 5), ("Running time: about 1 minute on", 60), ("Running time: 2 minutes on", 120), ("Running time: about 1 minute (75 s) on", 75), ("Running time: 90 seconds", 90), ("It takes 5 s.", None)])
def test_stated_times(line, seconds): assert site.stated_time(line)[1] == seconds


@pytest.mark.parametrize("stated, recorded, right", [("5 s", 9.9, 1), ("10 s", .4, 1), ("10 s", 19, 1), ("10 s", 21, 0), ("30 s", 15.1, 1), ("30 s", 14, 0), ("about 1 minute", 119, 1), ("about 1 minute", 125, 0), ("5 s", 11, 0)])
def test_wrong_times_are_found(stated, recorded, right):
    wrong = site.check_times({"x.ipynb": page(f"Running time: {stated} on a 2-core CPU.", name="x.ipynb")}, {"x.ipynb": dict(seconds=recorded)})
    assert len(wrong) == 1 - right and all("--fix-times" in w for w in wrong)


def test_missing_times_are_found():
    x = page("Running time: 5 s", name="x.ipynb")
    assert "no recorded run" in site.check_times({"x.ipynb": x}, {})[0] and "is no page" in site.check_times({}, {"x.ipynb": dict(seconds=1)})[0]
    assert "no line" in site.check_times({"x.ipynb": page("It runs.", name="x.ipynb")}, {"x.ipynb": dict(seconds=1)})[0]


@pytest.mark.parametrize("seconds, words", [(.3, "5 s"), (8, "10 s"), (24, "20 s"), (26, "30 s"), (50, "45 s"), (70, "1 minute"), (100, "2 minutes"), (1000, "17 minutes")])
def test_times_are_rounded_as_one_says_them(seconds, words):
    assert run_notebooks.rounded(seconds) == words
    assert site.agrees(site.stated_time(f"Running time: {words}")[1], seconds)


def make_notebook(path, *cells):
    "A notebook file of markdown, given as text, and of code, given as a tuple of its source and stored outputs."
    made = [dict(cell_type="markdown", id=f"c{i}", metadata={}, source=[c]) if isinstance(c, str) else
            dict(cell_type="code", id=f"c{i}", metadata={}, source=c[0].splitlines(True), outputs=list(c[1:]), execution_count=None) for i, c in enumerate(cells)]
    kernel = dict(display_name="python3", language="python", name="python3")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(cells=made, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5), sort_keys=True, indent=1) + "\n")


def cells_of(path): return json.loads(path.read_text())["cells"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    "A notebook and one that fails, run twice by the recorder."
    root = tmp_path_factory.mktemp("book")
    (root / "nbs" / "deep").mkdir(parents=True)
    make_notebook(root / "nbs" / "deep" / "good.ipynb", "# T", "Running time: about 10 minutes (600 s) on a 2-core CPU, at best.",
        ("import os, ipywidgets as w, matplotlib.pyplot as plt\nfrom importlib.util import find_spec\nfrom tqdm.auto import tqdm",),
        ("assert find_spec('tsv_nb')\nprint(os.path.basename(os.getcwd()), 'MPLBACKEND' in os.environ)\nplt.plot([1, 2]);",), ("for _ in tqdm(range(3)): print('step')",),
        ("slider = w.IntSlider(description='rank'); hidden = w.IntSlider()\nw.VBox([slider])",), ("#| notest\n1 / 0", printed("kept\n")), ("#| eval: false\n1 / 0", printed("kept too\n")),
        ("import sys\nfrom tqdm import tqdm as bar\nfor _ in bar(range(2), file=sys.stderr): pass\nprint('after', file=sys.stderr)",))
    make_notebook(root / "nbs" / "bad.ipynb", "# T", ("print('new')", printed("old\n")), ("#| hide\n{}['the key']",))
    texts = []
    for _ in range(2):
        code = "import sys, pathlib; sys.path.insert(0, 'tools'); import run_notebooks; sys.exit(run_notebooks.main(sys.argv[2:], pathlib.Path(sys.argv[1])))"
        done = subprocess.run([sys.executable, "-c", code, str(root), "--record"], cwd=ROOT, capture_output=True, text=True, timeout=300)
        texts.append((root / "nbs" / "deep" / "good.ipynb").read_text())
    return root, done, texts


def test_the_recorder_stores_what_readers_see(ran):
    root, _, texts = ran
    cells = cells_of(root / "nbs" / "deep" / "good.ipynb")
    assert "".join(cells[3]["outputs"][0]["text"]).startswith("deep") and "image/png" in cells[3]["outputs"][-1]["data"] # inline pictures, the notebook's folder
    assert [o["output_type"] for o in cells[4]["outputs"]] == ["stream"] and "".join(cells[4]["outputs"][0]["text"]) == "step\n" * 3 # no bar
    assert ["".join(c["outputs"][0]["text"]) for c in cells[6:9]] == ["kept\n", "kept too\n", "after\n"]
    pages = site.read_pages(root / "nbs")
    assert not [w for w in site.check_outputs({"g": pages["deep/good.ipynb"]})]
    assert texts[0] == texts[1], "a second run leaves another file"


def test_the_recorder_keeps_the_state_of_shown_widgets_only(ran):
    root, _, _ = ran
    notebook = json.loads((root / "nbs" / "deep" / "good.ipynb").read_text())
    state = notebook["metadata"]["widgets"][run_notebooks.STATE]["state"]
    view = notebook["cells"][5]["outputs"][0]["data"][site.WIDGET]["model_id"]
    assert view in state and sum(m["model_name"] == "IntSliderModel" for m in state.values()) == 1 and not any("Progress" in m["model_name"] for m in state.values())


def test_widgets_of_cells_that_are_not_run_keep_their_state():
    "Their models were named by an earlier run, like those of this run."
    view = lambda name: dict(outputs=[dict(data={site.WIDGET: dict(model_id=name)})])
    first, names = run_notebooks.widget_state([view("a"), view("b")], dict(a={}, inner={}, b=dict(child="IPY_MODEL_inner"), unused={}), "p")
    assert list(first) == ["a", "b", "inner"] and len(set(names.values())) == 3
    again, renamed = run_notebooks.widget_state([view(names["b"]), view("new")], {names[m]: json.loads(json.dumps(first[m]).replace("inner", names["inner"])) for m in first} | dict(new={}), "p")
    assert list(again) == [names["b"], "new", names["inner"]] and len(set(renamed.values())) == 3


def test_the_recorder_leaves_a_failing_notebook_alone(ran):
    root, done, _ = ran
    assert done.returncode == 1 and "bad.ipynb: cell 2" in done.stderr and "KeyError: 'the key'" in done.stderr and "1 of 2 notebooks ran" in done.stdout
    assert cells_of(root / "nbs" / "bad.ipynb")[1]["outputs"] == [printed("old\n")] and not list(root.rglob("*.part"))
    assert list(json.loads((root / "nbs" / "running_times.json").read_text())) == ["deep/good.ipynb"]


def test_recorded_times_go_into_the_page(ran, tmp_path):
    root, _, _ = ran
    shutil.copytree(root, tmp_path / "book"); root = tmp_path / "book"
    good = root / "nbs" / "deep" / "good.ipynb"
    before, times = site.read_pages(root / "nbs"), root / "nbs" / "running_times.json"
    assert "--fix-times" in site.check_times({"deep/good.ipynb": before["deep/good.ipynb"]}, json.loads(times.read_text()))[0]
    run_notebooks.record("other.ipynb", 3, times) # merges
    seconds = {k: v["seconds"] for k, v in json.loads(times.read_text()).items()}
    assert run_notebooks.main(["--fix-times"], root) == 0 and {k: v["seconds"] for k, v in json.loads(times.read_text()).items()} == seconds
    assert "".join(cells_of(good)[1]["source"]) == f"Running time: about {run_notebooks.rounded(seconds['deep/good.ipynb'])} on a 2-core CPU, at best."
    assert not site.check_times({"deep/good.ipynb": site.read_pages(root / "nbs")["deep/good.ipynb"]}, {"deep/good.ipynb": dict(seconds=seconds["deep/good.ipynb"])})


def test_the_recorder_names_a_path_that_is_not_there(capsys):
    with pytest.raises(SystemExit): run_notebooks.main(["nbs/none.ipynb"])
    assert "no such notebook or folder: nbs/none.ipynb" in capsys.readouterr().err
