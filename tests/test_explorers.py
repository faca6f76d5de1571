"""The explorers without a browser: their numbers, what a saved page holds, and what happens where ipywidgets is missing."""
import importlib
import inspect
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("ipywidgets")
import ipywidgets as W

from tsv_nb import compress, orthogonalize
from tsv_nb.explore.mouse import at_pixel, nearest_stop, nearest_tip
from tsv_nb.explore.rank_explorer import accuracy_curve, archive_at, rank_explorer, rank_report, rank_steps, task_spectra
from tsv_nb.explore.whitening_explorer import _directions, _flatten, gram_schmidt, plane_vectors, space_vectors, whitened, whitening_plane, whitening_space
from tsv_nb.explore.widgets import Explorer, Picture

from explorer_steps import GOAL, expect_live
from test_browser import PAGES, STATE, VIEW

ROOT = Path(__file__).resolve().parent.parent


# --- the frame -------------------------------------------------------------------------------------------------------------------------------

def tiny(compute=lambda x, y: dict(x=x, y=y), redraw=()):
    scenes = []
    def scene(figure, r):
        scenes.append(r)
        ax = figure.subplots()
        ax.set(xlim=(0, 10), ylim=(0, 10), title=f"y = {r['y']}")
        return ax
    controls = dict(x=W.IntSlider(1, 0, 10), y=W.IntSlider(1, 0, 10))
    return Explorer("Where?", controls, compute, Picture(scene, lambda ax, r: ax.plot(r["x"], 5, "o"), (3., 2.)), lambda r: {k: str(v) for k, v in r.items()}, "A dot <here>.", redraw), scenes


def test_scene_is_drawn_only_when_it_changes():
    e, scenes = tiny(redraw=("y",))
    first = e.png
    assert len(scenes) == 1 and e.move(x=4) == {"x": "4", "y": "1"} and e.png != first
    e.move(x=1)
    assert e.png == first and len(scenes) == 1 # no trace of the step between
    e.move(y=7)
    assert len(scenes) == 2 and e.png != first
    e.move(y=1)
    assert e.png == first


def test_what_is_said_follows_what_is_shown():
    e, _ = tiny()
    e.move(x=9)
    bundle = e._repr_mimebundle_()
    assert 'alt="Where?. A dot &lt;here&gt;. x 9; y 1."' in e._picture.value and 'data-name="x">x <b>9</b>' in e._line.value
    assert bundle["text/plain"] == repr(e) == "Where? (interactive in JupyterLab): x 9; y 1"
    assert e._picture.value in bundle["text/html"] and "Run All Cells" in bundle["text/html"] and bundle[VIEW]["model_id"] == e.model_id


def test_an_error_is_shown_and_raised():
    def compute(x, y):
        if x == 5: raise ValueError("five is <too much>")
        return dict(x=x, y=y)
    e, _ = tiny(compute)
    with pytest.raises(ValueError, match="too much"): e.move(x=5)
    assert "five is &lt;too much&gt;" in e._line.value and "tsv-error" in e._line.value
    assert e.move(x=6)["x"] == "6" and "tsv-error" not in e._line.value


def test_notice_goes_when_a_browser_reports_or_moves_a_control():
    for report in (lambda e: e.notice._answer.set_state({"value": 1}), lambda e: e.controls["x"].set_state({"value": 3})):
        e, _ = tiny()
        e.move(x=2)
        assert e.notice.layout.display is None
        report(e)
        assert e.notice.layout.display == "none"


def test_missing_ipywidgets_is_named_with_its_extra():
    code = "import sys; sys.modules['ipywidgets'] = None; import tsv_nb, tsv_nb.explore.plots\ntry: import tsv_nb.explore.widgets\nexcept ImportError as e: print(e)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0 and "needs ipywidgets: pip install 'tsv-nb[widgets]'" in out.stdout, out.stderr


# --- what a saved page holds -----------------------------------------------------------------------------------------------------------------

def parts(state, model):
    "The saved state of a widget and of all widgets in it."
    yield state[model]["state"]
    for child in state[model]["state"].get("children", []): yield from parts(state, child.removeprefix("IPY_MODEL_"))


@pytest.mark.parametrize("page", PAGES)
def test_saved_page_has_each_explorer_as_widget_html_and_text(page):
    nb = json.loads((ROOT / "nbs" / page).read_text(encoding="utf-8"))
    state = nb["metadata"]["widgets"][STATE]["state"]
    views = [o["data"] for c in nb["cells"] for o in c.get("outputs", []) if VIEW in o.get("data", {})]
    assert len(views) == len(PAGES[page])
    for data, controls in zip(views, PAGES[page]):
        root = state[data[VIEW]["model_id"]]["state"]
        assert "tsv-explorer" in root["_dom_classes"]
        assert "tsv-notice" in "".join(data["text/html"]) and "<img" in "".join(data["text/html"]) and "interactive in JupyterLab" in "".join(data["text/plain"])
        notice = next(m["state"] for m in (state[c.removeprefix("IPY_MODEL_")] for c in root["children"]) if "tsv-notice" in m["state"].get("value", ""))
        assert state[notice["layout"].removeprefix("IPY_MODEL_")]["state"].get("display") is None # shown
        saved = {c.removeprefix("tsv-control-"): m for m in parts(state, data[VIEW]["model_id"]) for c in m.get("_dom_classes", []) if c.startswith("tsv-control-")}
        assert saved.keys() == controls.keys() # all of them are moved in the browser, except menus of one entry
        assert {c for c, m in saved.items() if len(m.get("_options_labels", "ab")) == 1} == {c for c, keys in controls.items() if not keys}


@pytest.mark.parametrize("page", PAGES)
def test_nbdev_can_write_a_page_with_saved_widgets(page, tmp_path):
    "nbdev takes everything called `source` for the text of a cell; a list of that name in the widgets' state stops the whole site."
    nbio = pytest.importorskip("execnb.nbio")
    nbio.write_nb(nbio.read_nb(ROOT / "nbs" / page), tmp_path / "page.ipynb")
    state = json.loads((tmp_path / "page.ipynb").read_text())["metadata"]["widgets"][STATE]["state"]
    assert state.keys() == json.loads((ROOT / "nbs" / page).read_text())["metadata"]["widgets"][STATE]["state"].keys()


# --- ranks -----------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (7, 7), (40, 1), (1, 5)])
def test_archive_is_what_compress_stores(g, shape, dtype):
    vector = {"w": torch.randn(shape, generator=g).to(dtype), "low": (torch.randn(50, 2, generator=g) @ torch.randn(2, 40, generator=g)).to(dtype), "zero": torch.zeros(8, 9, dtype=dtype), "b": torch.randn(5, generator=g).to(dtype)}
    spectra = task_spectra(vector)
    for rank in (1, 2, 5, 100):
        ours, theirs = archive_at(vector, spectra, rank), compress(vector, rank=rank)
        if dtype != torch.float16: assert (ours.nbytes, ours.factors.keys()) == (theirs.nbytes, theirs.factors.keys())
        for name, want in theirs.decompress().items():
            torch.testing.assert_close(ours.decompress()[name], want, atol=2e-2 if dtype == torch.float16 else 1e-4, rtol=0)


@pytest.mark.parametrize("rank", [1, 3, 12])
def test_report_agrees_with_the_rebuilt_matrix(g, rank):
    vector = {"w": torch.randn(40, 12, generator=g, dtype=torch.float64) * torch.logspace(0, -2, 12, dtype=torch.float64)}
    r = rank_report(vector, task_spectra(vector), "w", rank, part=12)
    U, S, Vh = torch.linalg.svd(vector["w"], full_matrices=False)
    rebuilt = U[:, :rank] * S[:rank] @ Vh[:rank]
    assert r.error == pytest.approx(((vector["w"] - rebuilt).norm() / vector["w"].norm()).item(), abs=1e-7)
    rows = vector["w"].norm(dim=1).topk(12).indices.sort().values
    torch.testing.assert_close(r.before, vector["w"][rows])
    torch.testing.assert_close(r.after, rebuilt[rows])


def test_zero_matrix_and_single_matrix_can_be_explored(g):
    e = rank_explorer({"w": torch.randn(9, 6, generator=g), "still": torch.zeros(5, 4)})
    assert e.move(layer="still")["components"] == "0 of 0" and e.text["relative error"] == "0.000"
    one = rank_explorer(torch.randn(6, 5, generator=g))
    assert one.text["components"] == "5 of 5" and one.controls["rank"].options == tuple(rank_steps(5))
    assert rank_explorer(torch.ones(3, 3)).text["components"] == "1 of 1"


def test_curve_is_measured_at_every_stop(vectors):
    vector = vectors["task0"]
    asked = []
    curve = accuracy_curve(vector, task_spectra(vector), lambda archive: asked.append(archive.factors["w"].rank if "w" in archive.factors else 12) or len(asked) / 100)
    assert list(curve) == rank_steps(12) == [1, 2, 3, 4, 6, 8, 12] and asked[:4] == [1, 2, 3, 4]
    e = rank_explorer({"t": vector}, {"t": curve})
    assert e.text["accuracy"] == f"{100 * curve[8]:.1f} %" and e.text["at full rank"] == "7.0 %"
    with pytest.raises(ValueError, match="rank must be at least 1"): archive_at(vector, task_spectra(vector), 0)


# --- whitening -------------------------------------------------------------------------------------------------------------------------------

def test_whitening_is_nearest_and_has_no_order(g):
    for d, K in ((2, 2), (3, 3), (50, 4)):
        X = torch.randn(d, K, generator=g, dtype=torch.float64)
        a, b = whitened(X, range(K)), whitened(X, range(K)[::-1])
        torch.testing.assert_close(a.polar, b.polar)
        assert not torch.allclose(a.rival, b.rival) and a.moved(a.polar) < min(a.moved(a.rival), b.moved(b.rival))
        for o in (a.polar, a.rival): torch.testing.assert_close(o.T @ o, torch.eye(K, dtype=torch.float64))
        torch.testing.assert_close(a.polar, orthogonalize(X, "svd"))


@pytest.mark.parametrize("X, kept", [(plane_vectors([30, 30], [1, .2]), 1), (plane_vectors([30, 210], [1, 1]), 1), (space_vectors([0, 50, 20], [0, 0, 0]), 2), (space_vectors([0, 0, 180], [0, 0, 0]), 1), (space_vectors([0, 50, 20], [40, 40, 40]), 3), (space_vectors([0, 90, 0], [0, 0, 90]), 3), (space_vectors([0, 90, 0], [0, 0, -90]), 3)])
def test_dependent_vectors_lose_directions(X, kept):
    w = whitened(X, range(X.shape[1]))
    assert w.kept == kept == torch.linalg.matrix_rank(X).item() and w.polar.square().sum().item() == pytest.approx(kept)
    assert sum(gram_schmidt(X, range(X.shape[1])).norm(dim=0) > .5).item() == kept


# --- the mouse -------------------------------------------------------------------------------------------------------------------------------

def in_picture(explorer, *values):
    "Where matplotlib draws the tip of a vector with these values of its two sliders, as fractions of the picture from its upper left corner."
    make = plane_vectors if explorer.mouse.sliders == ("angle", "length") else space_vectors
    x, y = explorer.picture.axes[0].transData.transform(_flatten(make(*([v] for v in values)), explorer.values.get("view"))[:, 0])
    return x / explorer.picture.pixels[0], 1 - y / explorer.picture.pixels[1]


@pytest.fixture(scope="module")
def plane(): return whitening_plane()


@pytest.mark.parametrize("angle", [-90, -45, 0, 17, 90, 133, 180])
@pytest.mark.parametrize("length", [.1, .85, 1.6])
def test_mouse_finds_the_place_and_moves_the_sliders_there(plane, angle, length):
    x, y = in_picture(plane, angle, length)
    for scale in (1, .37): # what a browser computes from a scaled picture: (position - edge) / size
        width, height = (scale * o for o in plane.picture.pixels)
        pixel = (width * x / scale, height * y / scale)
        got = at_pixel(plane.picture.axes[0], pixel)
        assert got[1] == pytest.approx(length, abs=1e-9) and (got[0] - angle + 180) % 360 - 180 == pytest.approx(0, abs=1e-9)
    for name in "ab":
        plane.move(angle_a=10, length_a=1., angle_b=50, length_b=1.)
        before = plane.png
        plane.mouse.hear("press", *in_picture(plane, *dict(a=(10, 1), b=(50, 1))[name]))
        assert plane.mouse.held == "ab".index(name) and plane.png == before
        plane.mouse.hear("move", *in_picture(plane, 70, .5))
        assert plane.mouse.held is not None and (plane.values[f"angle_{name}"], plane.values[f"length_{name}"]) == (70, .5)
        plane.mouse.hear("release", x, y)
        assert plane.mouse.held is None and plane.values | {f"angle_{name}": angle, f"length_{name}": length} == plane.values
        assert plane.controls[f"angle_{name}"].value == angle and plane.png != before
        other = {"a": ("angle_b", 50), "b": ("angle_a", 10)}[name]
        assert plane.values[other[0]] == other[1]


def near(view, azimuth, elevation): return (_directions(view)[2] @ space_vectors([azimuth], [elevation]).numpy()).item() >= 0


@pytest.mark.parametrize("view", [-180, -40, 10, 135])
@pytest.mark.parametrize("end", [(0, 0), (30, 40), (-100, 15), (170, -30), (60, -5), (-20, 80)])
def test_mouse_moves_vectors_in_space_on_their_side(view, end):
    space = whitening_space()
    places = {name: next((around, above) for around, above in options if near(view, around, above) == near(view, *end))
              for name, options in dict(a=[(-150, 50), (40, -50)], b=[(100, 20), (-80, -20)], c=[(-30, 10), (150, -10)]).items()}
    for name, start in places.items():
        space.move(view=view, **{f"{what}_{n}": v for n, o in places.items() for what, v in zip(("azimuth", "elevation"), o)})
        before = space.png, space.text
        space.mouse.hear("press", *in_picture(space, *start))
        assert space.mouse.held == "abc".index(name) and space.png == before[0]
        space.mouse.hear("move", *in_picture(space, *end))
        space.mouse.hear("release", *in_picture(space, *end))
        assert (space.values[f"azimuth_{name}"], space.values[f"elevation_{name}"]) == end
        assert space.png != before[0] and space.text != before[1] and space.mouse.held is None
        others = {n: (space.values[f"azimuth_{n}"], space.values[f"elevation_{n}"]) for n in places if n != name}
        assert others == {n: o for n, o in places.items() if n != name}


def test_a_vector_pulled_over_the_rim_comes_back_on_its_side():
    space = whitening_space()
    for name, start in (("c", (30, 40)), ("b", (70, 0))):
        side = near(-40, *start)
        space.mouse.hear("press", *in_picture(space, *start))
        for angle in range(0, 360, 30):
            place = space.picture.axes[0].transData.transform(plane_vectors([angle], [1.3])[:, 0].numpy()) / space.picture.pixels
            space.mouse.hear("move", place[0], 1 - place[1])
            at = space.values[f"azimuth_{name}"], space.values[f"elevation_{name}"]
            assert near(-40, *at) == side and abs((_directions(-40)[2] @ space_vectors([at[0]], [at[1]]).numpy()).item()) < .07
        space.mouse.hear("release", *in_picture(space, *start))
        assert (space.values[f"azimuth_{name}"], space.values[f"elevation_{name}"]) == start


def test_nothing_is_taken_beside_the_axes_or_far_from_a_tip(plane):
    plane.move(angle_a=10, length_a=1., angle_b=50, length_b=1.)
    before, box = dict(plane.values), plane.picture.axes[0].bbox
    width, height = plane.picture.pixels
    for pixel in ((box.x1 + 1, height / 2), (box.x0 - 1, height / 2), (box.x0 + 50, height - box.y1 - 1), (box.x0 + 50, height - box.y0 + 1)):
        assert at_pixel(plane.picture.axes[0], pixel) is None and at_pixel(plane.picture.axes[0], pixel, held=True)
    assert at_pixel(plane.picture.axes[0], (box.x1 - 1, height / 2)) and at_pixel(plane.picture.axes[0], (box.x0 + 50, height - box.y1 + 1))
    for x, y in ((.9, .5), (-3, 0), in_picture(plane, 10, 0), in_picture(plane, 180, 1)):
        for what in ("press", "move", "release"): plane.mouse.hear(what, x, y)
        assert plane.mouse.held is None and plane.values == before
    plane.mouse.hear("press", *in_picture(plane, 50, 1))
    plane.mouse.hear("move", 3., in_picture(plane, 0, 1)[1]) # far outside: the direction counts, and the length ends with its slider
    assert (plane.values["angle_b"], plane.values["length_b"]) == (0, 1.6)
    plane.mouse.hear("release", *in_picture(plane, -100, .01))
    assert (plane.values["angle_b"], plane.values["length_b"]) == (-90, .1)


def test_stops_and_tips():
    tips = plane_vectors([0, 60, 60], [1, 1, .5]).numpy()
    assert [nearest_tip(tips, o) for o in ((5, 1.1), (60, .8), (60, .7), (-60, 1), (360, 1))] == [0, 1, 2, None, 0]
    assert [nearest_stop(o, -90, 180, 1, 360) for o in (179.6, 180.4, 224, 226, -134, -136, -90.4, 721)] == [180, 180, 180, -90, -90, 180, -90, 1]
    assert [nearest_stop(o, .1, 1.6, .05) for o in (-1, .124, .126, 1.59, 7)] == [.1, .1, .15, 1.6, 1.6]


def test_a_drag_is_one_step_and_is_answered_even_if_it_fails(plane, monkeypatch):
    plane.move(angle_a=10, length_a=1., angle_b=50, length_b=1.)
    steps, answers = [], []
    monkeypatch.setattr(plane, "compute", lambda **values: steps.append(values) or whitening_plane().result)
    monkeypatch.setattr(plane.mouse, "ears", type("Ears", (), {"send": lambda self, o: answers.append(o["held"])})())
    plane.mouse.hear("press", *in_picture(plane, 50, 1))
    plane.mouse.hear("move", *in_picture(plane, 70, .5)) # angle and length
    assert len(steps) == 1 and answers == [True, True]
    monkeypatch.setattr(plane, "compute", lambda **values: 1 / 0)
    with pytest.raises(ZeroDivisionError): plane.mouse.hear("release", *in_picture(plane, 80, 1))
    assert answers == [True, True, False]
    monkeypatch.undo()
    plane.move(angle_b=50, length_b=1.)
    assert "tsv-error" not in plane._line.value


def test_the_mouse_listens_only_when_somebody_is_there():
    pytest.importorskip("anywidget")
    p = whitening_plane()
    assert p.mouse.ears is None and "with the sliders." in p.mouse.hint.value # nothing of it in a saved page
    p.controls["angle_a"].set_state({"value": 11})
    ears = p.mouse.ears
    assert ears.place in p._picture._dom_classes
    p.notice.layout.display = None
    p.notice.hide()
    assert p.mouse.ears is ears
    ears._handle_custom_msg({"what": "ready"}, [])
    assert "with the mouse" in p.mouse.hint.value


def test_without_anywidget_there_are_sliders_and_a_line_that_says_so():
    code = """import sys; sys.modules['anywidget'] = None
from tsv_nb.explore.whitening_explorer import whitening_plane
p = whitening_plane(); p.controls['angle_b'].set_state({'value': 51}); print(p.values['angle_b'], p.notice.layout.display, p.mouse.ears, p.mouse.hint.value)"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0 and "51 none None" in out.stdout and "pip install 'tsv-nb[widgets]'" in out.stdout, out.stderr


def test_steps_stay_within_their_budget(g):
    vector = {f"w{i}": torch.randn(256, 128, generator=g) for i in range(4)}
    by_rank = rank_explorer({t: vector if t == "t" else {n: 2 * x for n, x in vector.items()} for t in "tu"}, {t: dict.fromkeys(rank_steps(128), .5) for t in "tu"})
    expect_live(by_rank, {"rank": rank_steps(128)[:4] + rank_steps(128)[-4:], "layer": ["w1", "w2", "w3", "w0"]})
    orders = [(1, 0), (0, 1)] * 2
    expect_live(whitening_plane(), {"angle_b": range(51, 59), "length_b": [.9, .8, .7, .6], "angle_a": range(11, 15), "length_a": [.9, .8, .7, .6], "order": orders})
    expect_live(whitening_space(), {f"{what}_{n}": range(41, 45) for what in ("azimuth", "elevation") for n in "abc"} | {"view": range(-39, -35), "order": [(1, 2, 0), (2, 1, 0)] * 2})


def test_the_budget_sees_a_slow_step():
    slow, _ = tiny(lambda x, y: time.sleep(.16) or dict(x=x, y=y))
    with pytest.raises(AssertionError, match="Where"): expect_live(slow, {"x": range(2, 6)})
    fast, _ = tiny()
    expect_live(fast, {"x": range(2, 6)})


def test_recorded_steps_are_those_of_every_explorer_and_within_the_goal(monkeypatch):
    "What benchmarks/widgets.py has stored, and the list it works through."
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = importlib.import_module("widgets")
    stored = json.loads((ROOT / "benchmarks" / "results" / "widgets.json").read_text(encoding="utf-8"))
    makers = {name for path in (ROOT / "tsv_nb" / "explore").glob("*.py") for name in re.findall(r"^def (\w+)\((?:[^()]|\([^()]*\))*\) -> Explorer:", path.read_text(encoding="utf-8"), re.M)}
    assert len(makers) == 5
    assert makers == {name for make, _ in benchmark.EXPLORERS.values() for name in makers if f"return {name}(" in inspect.getsource(make)}
    assert stored["goal_ms"] == benchmark.GOAL_MS == 1000 * GOAL
    assert {name: list(r["controls"]) for name, r in stored["explorers"].items()} == {name: list(moves) for name, (_, moves) in benchmark.EXPLORERS.items()}
    slow = {name: r["max_ms"] for name, r in stored["explorers"].items() if r["max_ms"] > stored["goal_ms"]}
    assert not slow, slow
