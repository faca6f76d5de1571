"""Every figure of the book: one style, colors that keep their meaning, labels, and letters that can be read at column width."""
import base64
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
