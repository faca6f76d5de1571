"""Every figure of the book: one style, colors that keep their meaning, labels, and letters that can be read at column width."""
import base64
import contextlib
import functools
import json
import re
import struct
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

from tsv_nb.explore.plots import METHOD_COLORS, PALETTE, STYLE, accuracy_bars, accuracy_radar, interference_by_depth

ROOT = Path(__file__).resolve().parent.parent
COLUMN = 760 # pixels of a page's column; wider pictures are scaled down
SMALLEST = 9.4 # pixels; 7 points at 100 dots per inch are 9.7
TINTS = {"#EAAE7F", "#7FB8D8"} # half of Task Arithmetic's and of TSV-M's color: merges that are half of one
COLORS = {c.upper() for c in (*PALETTE, *METHOD_COLORS.values())} | TINTS
LABELLED = re.compile(r"\b(accuracy_bars|accuracy_radar|interference_by_depth|method_frame|write_report|show|blocks)\(") # these label their axes themselves


def png_size(data):
    "Width and height in the header of a PNG."
    return struct.unpack(">II", base64.b64decode(data)[16:24])


@functools.cache
def cells_of(page): return json.loads(page.read_text(encoding="utf-8"))["cells"]


def source(cell): return "".join(cell["source"])


def pictures(cell): return ["".join(o["data"]["image/png"]) for o in cell.get("outputs", []) if "image/png" in o.get("data", {})]


def pages(): return [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if not any(part.startswith(("_", ".")) for part in p.relative_to(ROOT).parts)]


def figures(): return [(page, c) for page in pages() for c in cells_of(page) if c["cell_type"] == "code" and pictures(c)]


def smallest_letters(code, width):
    "Height in pixels, on the page, of the smallest letters of a figure drawn by this code."
    sizes = [float(s) for s in re.findall(r"(?:fontsize|labelsize)=([\d.]+)", code)] + [STYLE["legend.fontsize"]]
    dpi = float((re.findall(r"\bdpi=(\d+)", code) or [STYLE["figure.dpi"]])[0])
    return min(sizes) * dpi / 72 * min(1, COLUMN / width)


def unlabelled(code):
    "What a figure's code does not name, of title and the two axes."
    if LABELLED.search(code): return []
    drawn = "axis(\"off\")" in code or "xticks=[]" in code
    wanted = {"title": r"title", "x axis": r"xlabel", "y axis": r"ylabel"} if not drawn else {"title": r"title"}
    if "xticks=[0, 31]" in code: wanted.pop("y axis") # a row of small square pictures, measured along one side
    return [what for what, word in wanted.items() if not re.search(word, code)]


def strange_colors(code): return {c.upper() for c in re.findall(r"#[0-9A-Fa-f]{6}\b", code)} - COLORS | set(re.findall(r"tab:\w+", code))


def names_a_method_without_its_color(code):
    "Whether a drawing names a method in a string and takes colors from elsewhere."
    code = re.sub(r"(title|label)\(?=?[rf]*\"[^\"]*\"|#\|.*", "", code)
    drawn = re.search(r"\.(plot|bar|barh|semilogx|semilogy|loglog)\(", code)
    named = any(f'"{m}"' in code for m in METHOD_COLORS)
    return bool(drawn and named and not re.search(r"method_color\(|accuracy_bars\(|accuracy_radar\(", code))


def without_unit(code):
    "Axis labels that name a quantity and not its unit; for STI, its norm."
    labels = re.findall(r'[xy]label(?:=|\()[rf]*"([^"]*)"', code)
    return [label for label in labels if re.search(r"\b(accuracy|STI|interference|time|memory|bytes|size)\b", label) and "(" not in label]


def test_there_are_figures(): assert len(figures()) > 60


def test_pages_with_figures_use_the_style():
    for page in pages():
        code = [source(c) for c in cells_of(page) if c["cell_type"] == "code"]
        first = next((i for i, c in enumerate(cells_of(page)) if pictures(c)), None)
        if first is None or page.stem == "cli": continue # the command draws in the style by itself
        before = "".join(source(c) for c in cells_of(page)[:first] if c["cell_type"] == "code")
        assert "use_style()" in before, page.name
        assert not any("plt.style.use" in s or "rcParams[" in s and "test_eq" not in s for s in code), page.name


def test_letters_are_legible_at_column_width():
    small = [(p.name, source(c).strip().splitlines()[-1][:60], round(smallest_letters(source(c), png_size(d)[0]), 1))
             for p, c in figures() for d in pictures(c) if smallest_letters(source(c), png_size(d)[0]) < SMALLEST and "Image(" not in source(c)]
    assert not small, small


def test_figures_have_title_and_axis_labels():
    bad = [(p.name, unlabelled(source(c)), source(c).strip().splitlines()[-1][:60]) for p, c in figures() if unlabelled(source(c)) and "Image(" not in source(c)]
    assert not bad, bad


def test_quantities_on_axes_have_a_unit():
    bad = [(p.name, without_unit(source(c))) for p, c in figures() if without_unit(source(c))]
    assert not bad, bad


def test_colors_are_those_of_the_book():
    bad = [(p.name, strange_colors(source(c))) for p, c in figures() if strange_colors(source(c)) and p.stem != "40_plots"]
    assert not bad, bad


def test_methods_keep_their_colors():
    bad = [(p.name, source(c).strip().splitlines()[-1][:60]) for p, c in figures() if names_a_method_without_its_color(source(c))]
    assert not bad, bad


def test_library_figures_use_the_color_of_the_method():
    scores = {m: dict(a=.5, b=.6) for m in ("Task Arithmetic", "TSV-M")}
    with plt.rc_context(STYLE):
        rgb = [plt.matplotlib.colors.to_hex(b.get_facecolor()).upper() for b in accuracy_bars(scores).patches]
        lines = [plt.matplotlib.colors.to_hex(l.get_color()).upper() for l in accuracy_radar(scores).lines]
        layers = interference_by_depth({f"b.{i}.k{j}.weight": 1. for i in range(2) for j in range(3)})
    assert rgb == lines == [METHOD_COLORS[m] for m in scores]
    assert [plt.matplotlib.colors.to_hex(l.get_color()).upper() for l in layers.lines] == list(PALETTE[:3])
    plt.close("all")


@pytest.mark.parametrize("code, check, found", [
    ('plt.plot(x); plt.title("t"); plt.xlabel("x")', unlabelled, ["y axis"]),
    ('ax.plot(x, color="#123456")', strange_colors, {"#123456"}),
    ('ax.bar(x, y, color="tab:red")', strange_colors, {"tab:red"}),
    ('for n in ("TSV-M", "TIES"): ax.plot(x, label=n)', names_a_method_without_its_color, True),
    ('for n in ("TSV-M", "x"): ax.plot(x, label=n, color="#0072B2")', names_a_method_without_its_color, True),
    ('ax.plot(x, color=method_color("TSV-M"))', names_a_method_without_its_color, False),
    ('ax.set(xlabel="task", ylabel="STI")', without_unit, ["STI"]),
    ('plt.xlabel("time (s)"); plt.ylabel(r"mean accuracy")', without_unit, ["mean accuracy"]),
    ('plt.legend(fontsize=5)', lambda c: smallest_letters(c, 500) < SMALLEST, True),
    ('plt.plot(x)', lambda c: smallest_letters(c, 1100) < SMALLEST, True),
    ('plt.plot(x)', lambda c: smallest_letters(c, 750) < SMALLEST, False),
])
def test_the_checks_see_a_fault(code, check, found): assert check(code) == found


# --- explorers, whose pictures are not figures of a notebook ---------------------------------------------------------------------------------

def own_colors(code):
    "Colors written into an explorer's source: grays are free, unless they are a method's; all other colors have names, PALETTE or method_color. CSS is left out."
    found = re.findall(r"#[0-9A-Fa-f]{6}\b", re.sub(r"<style>.*?</style>", "", code, flags=re.S))
    methods = {c.upper() for c in METHOD_COLORS.values()}
    return {c for c in found if c.upper() in methods or len({c[1:3].upper(), c[3:5].upper(), c[5:].upper()}) > 1} | set(re.findall(r"\btab:\w+", code))


def axis_is_named(axis):
    "A label, no ticks at all, or ticks that are words."
    return bool(axis.get_label().get_text()) or not len(axis.get_majorticklocs()) or all(re.search("[a-z]", t.get_text()) for t in axis.get_ticklabels())


@contextlib.contextmanager
def all_axes(explorer):
    "The axes of an explorer's picture, with the marks of its present step on them."
    from tsv_nb.explore.widgets import _flat
    moving = list(_flat(explorer.picture.marks(explorer.picture.axes, explorer.result)))
    yield explorer.picture.canvas.figure.axes
    for artist in moving: artist.remove()


def unnamed(axes):
    "What is not named of the axes of a picture. Text above the axes is a title, too."
    wrong = []
    for i, ax in enumerate(axes):
        above = [t for t in ax.texts if t.get_transform() == ax.transAxes and t.get_position()[1] >= 1]
        if not (ax.get_title() or ax.get_title(loc="left") or above): wrong.append((i, "title"))
        if ax.axison: wrong += [(i, name) for name, axis in (("x axis", ax.xaxis), ("y axis", ax.yaxis)) if not axis_is_named(axis)]
    return wrong


def cut_off(axes):
    "Words that do not fit into the picture."
    page = axes[0].figure.bbox
    boxes = {t.get_text(): t.get_window_extent() for ax in axes for t in ax.findobj(plt.Text) if t.get_text() and t.get_visible() and ax.axison}
    return [text for text, b in boxes.items() if b.x0 < -1 or b.y0 < -1 or b.x1 > page.x1 + 1 or b.y1 > page.y1 + 1]


def smallest_points(axes): return min(t.get_fontsize() for ax in axes for t in ax.findobj(plt.Text) if t.get_text())


@pytest.fixture(scope="module")
def explorers():
    "One of each, on small task vectors."
    pytest.importorskip("ipywidgets")
    import torch
    from conftest import make_vectors
    from tsv_nb.explore.interference_explorer import interference_explorer
    from tsv_nb.explore.playground import merge_playground
    from tsv_nb.explore.rank_explorer import rank_explorer
    from tsv_nb.explore.whitening_explorer import whitening_plane, whitening_space
    vectors = make_vectors(torch.Generator().manual_seed(0), shapes={"blocks.0.w": (20, 12), "blocks.1.w": (12, 30)})
    curves = {t: {1: .5, 8: .8, 12: .9} for t in vectors}
    return dict(rank=rank_explorer(vectors, curves), error=rank_explorer(vectors), interference=interference_explorer(vectors), playground=merge_playground(), plane=whitening_plane(), space=whitening_space())


def test_explorers_have_no_colors_of_their_own():
    bad = {p.name: own_colors(p.read_text(encoding="utf-8")) for p in (ROOT / "tsv_nb" / "explore").glob("*.py") if p.name != "plots.py"}
    assert len(bad) > 8 and not any(bad.values()), bad


def test_explorers_have_titles_labels_and_legible_letters(explorers):
    from tsv_nb.explore.widgets import _STYLE
    for name, e in explorers.items():
        with all_axes(e) as axes:
            assert not unnamed(axes) and not cut_off(axes), (name, unnamed(axes), cut_off(axes))
            assert smallest_points(axes) * _STYLE["figure.dpi"] / 72 * min(1, COLUMN / e.picture.pixels[0]) >= SMALLEST, name


def test_explorers_draw_in_the_style_of_the_book(explorers):
    from matplotlib.figure import Figure
    from tsv_nb.explore.widgets import _STYLE, Picture
    assert {k for k in {*STYLE, *_STYLE} if STYLE.get(k) != _STYLE.get(k)} == {"figure.dpi", "figure.constrained_layout.use"}
    for name, e in explorers.items():
        sizes = {ax.title.get_fontsize() for ax in e.picture.canvas.figure.axes}
        assert sizes == {STYLE["axes.titlesize"]}, name
    colors = []
    p = Picture(lambda figure, r: figure.subplots(), lambda ax, r: [colors.append(line.get_color()) or line for line in ax.plot([0, 1], [0, 1]) + ax.plot([0, 1], [1, 0])], (2., 2.))
    with plt.rc_context({"axes.prop_cycle": plt.cycler(color=["#123456"])}): p.png(0), p.png(1) # whatever the notebook has set
    assert colors == list(PALETTE[:2]) * 2


def test_methods_keep_their_colors_in_explorers(explorers):
    from tsv_nb.methods import MERGE_METHODS
    look, e = lambda color: plt.matplotlib.colors.to_hex(color).upper(), explorers["playground"]
    methods = e.result.table.methods
    for m in methods:
        e.move(method=m, alpha=1.)
        title, (bars, curve, costs) = MERGE_METHODS[m].title, (e.picture.axes[o] for o in ("bars", "curve", "costs"))
        with all_axes(e):
            ours, theirs = ({look(b.get_facecolor()) for b in o} for o in bars.containers[-2:])
            assert ours == {look(b.get_facecolor()) for b in costs.patches} == {METHOD_COLORS[title]} and theirs == {METHOD_COLORS["Task Arithmetic"]}
            assert [look(o.get_color()) for o in bars.collections] == [METHOD_COLORS["fine-tuned"], METHOD_COLORS["zero-shot"]]
            assert [look(line.get_color()) for line in curve.lines[:-1]] == [METHOD_COLORS[MERGE_METHODS[o].title] for o in methods]
            words = {t.get_text().removeprefix("— "): look(t.get_color()) for ax in (bars, curve) for t in ax.texts}
            for name in ("fine-tuned", "zero-shot", *(MERGE_METHODS[o].title for o in methods)): assert words[name] == METHOD_COLORS[name], name
            assert words[title if m == "weight_average" else f"{title} at 1"] == METHOD_COLORS[title]
    r = explorers["rank"]
    with all_axes(r) as axes: assert {look(o.get_color()) for o in axes[1].lines if len(o.get_xdata()) == len(r.result.curve)} == {METHOD_COLORS["TSV-C"]}


@pytest.mark.parametrize("code, found", [
    ('color="#888888"', set()), ('("zero-shot", "#999999")', {"#999999"}), ('color="#0072b2"', {"#0072b2"}), ('"#000000"', {"#000000"}), ("<style>a {color: #b35900}</style>", set()), ('c="tab:red"', {"tab:red"}),
])
def test_colors_in_sources_of_explorers_are_seen(code, found): assert own_colors(code) == found
