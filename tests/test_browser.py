"""The explorers as a reader meets them: JupyterLab in a browser, every control moved with the keyboard; and a page of the site, with the widgets that were saved.

Needs a Chromium and the Python package `playwright` (which drives it; no browser of its own is downloaded). Without them the tests are skipped, but fail under CI,
unless TSV_NB_NO_BROWSER is set. TSV_NB_SHOTS=FOLDER keeps screenshots of each explorer before and after every move; TSV_NB_CHROMIUM names another browser.
"""
import contextlib
import importlib.util
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from html import unescape
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VIEW, STATE = "application/vnd.jupyter.widget-view+json", "application/vnd.jupyter.widget-state+json"
pytestmark = [pytest.mark.browser, pytest.mark.skipif(not (ROOT / "nbs").exists(), reason="needs the source tree")]

# page -> explorers on it, in order -> all its controls -> keys to press; each key must change the picture and the numbers. No keys: a menu of one entry
PAGES = {
    "explore/41_widgets.ipynb": [{"terms": ["ArrowRight", "ArrowRight", "PageUp"]}],
    "explore/41a_rank.ipynb": [{"rank": ["ArrowRight", "ArrowLeft", "End", "Home"], "layer": ["Home"], "task": ["End"]}, {"rank": ["ArrowRight", "ArrowLeft"], "task": [], "layer": []}],
    "explore/41b_interference.ipynb": [{"rank": ["ArrowRight", "Home", "End"], "task": ["End"], "other": ["Home"], "layer": ["ArrowLeft", "Home"]}],
    "explore/41c_playground.ipynb": [{"alpha": ["ArrowRight", "PageUp"], "task0": ["Space", "Space"], "task1": ["Space"], "task2": ["Space"], "task3": ["Space"],
                                      "method": ["Home", "End"]}],
    "explore/41d_whitening.ipynb": [{"angle_b": ["ArrowLeft", "PageDown"], "length_b": ["ArrowRight"], "angle_a": ["ArrowRight"], "length_a": ["ArrowLeft"], "order": ["End"]},
                                    {"order": ["End"], "view": ["ArrowRight"], "elevation_c": ["ArrowLeft", "PageDown"], "azimuth_c": ["ArrowRight"], "azimuth_b": ["ArrowRight", "PageUp"],
                                     "elevation_b": ["ArrowRight"], "azimuth_a": ["ArrowLeft"], "elevation_a": ["ArrowRight", "PageUp"]}],
}
PART_ONE = [p.relative_to(ROOT / "nbs").as_posix() for p in sorted((ROOT / "nbs" / "method").glob("[0-9]*.ipynb"))] if os.environ.get("TSV_NB_PART_ONE") else []
QUIET = {"apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
         "docmanager-extension/plugin": {"autosave": False}, "notebook-extension/tracker": {"windowingMode": "none"}} # none: all cells are in the page


def chromium():
    return os.environ.get("TSV_NB_CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def why_not():
    "The reason why no browser can be driven here, or None."
    if os.environ.get("TSV_NB_NO_BROWSER"): return "TSV_NB_NO_BROWSER is set"
    if not importlib.util.find_spec("playwright"): return "needs the package playwright: pip install 'tsv-nb[dev]'"
    if not chromium(): return "needs a Chromium: none of chromium, chromium-browser, google-chrome is on the path; TSV_NB_CHROMIUM names another"


def need_browser():
    "Skip, or fail under CI, where there is none."
    if reason := why_not(): (pytest.fail if os.environ.get("CI") and not os.environ.get("TSV_NB_NO_BROWSER") else pytest.skip)(reason)


def test_missing_browser_is_an_error_under_ci(tmp_path):
    "Without a browser: a skip with its reason; under CI a failure; unless it was asked for."
    def outcome(**env):
        keep = {k: v for k, v in os.environ.items() if k not in ("CI", "TSV_NB_NO_BROWSER", "TSV_NB_CHROMIUM", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT")}
        out = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "moves and 41_widgets"], cwd=ROOT, capture_output=True, text=True, timeout=300, env=keep | {"PATH": str(tmp_path)} | env)
        return out.returncode, out.stdout
    code, text = outcome()
    assert code == 0 and "1 skipped" in text and "needs a Chromium" in text, text
    code, text = outcome(CI="true")
    assert code == 1 and "needs a Chromium" in text, text
    code, text = outcome(CI="true", TSV_NB_NO_BROWSER="1")
    assert code == 0 and "1 skipped" in text, text


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    "The address of a JupyterLab with copies of the notebooks, no token, and folders of its own for all that it writes."
    need_browser()
    home = tmp_path_factory.mktemp("lab")
    (home / "benchmarks").symlink_to(ROOT / "benchmarks") # some pages show stored results
    copies = [home / "nbs" / trust / page for page in [*PAGES, *PART_ONE] for trust in ("", "trusted")]
    for copy, page in zip(copies, [p for p in [*PAGES, *PART_ONE] for _ in range(2)]):
        copy.parent.mkdir(parents=True, exist_ok=True)
        notebook = json.loads((ROOT / "nbs" / page).read_text(encoding="utf-8"))
        notebook["metadata"]["copy"] = str(copy) # trust goes by what a notebook holds, not by where it is
        copy.write_text(json.dumps(notebook), encoding="utf-8")
    for name, values in QUIET.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    folders = {k: str(home / v) for k, v in dict(JUPYTER_CONFIG_DIR="config", JUPYTER_RUNTIME_DIR="runtime", JUPYTER_DATA_DIR="data", IPYTHONDIR="ipython", JUPYTERLAB_SETTINGS_DIR="settings", JUPYTERLAB_WORKSPACES_DIR="workspaces").items()}
    env = os.environ | folders | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    subprocess.run([sys.executable, "-m", "nbformat.sign", *map(str, copies[1::2])], env=env, check=True, capture_output=True)
    log = (home / "log").open("w")
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--ServerApp.disable_check_xsrf=True", f"--ServerApp.root_dir={home / 'nbs'}"],
                              env=env, stdout=log, stderr=subprocess.STDOUT)
    url, end = f"http://127.0.0.1:{port}", time.time() + 120
    while True:
        try: urllib.request.urlopen(f"{url}/api/status", timeout=5).close()
        except OSError:
            assert server.poll() is None and time.time() < end, (home / "log").read_text()[-3000:]
            time.sleep(.3)
        else: break
    yield url
    server.terminate() # it ends its kernels first
    try: server.wait(30)
    except subprocess.TimeoutExpired: server.kill()
    log.close()


@pytest.fixture(scope="session")
def chrome():
    need_browser()
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium(), args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"])
        yield browser
        browser.close()


class Reader:
    "Somebody at a notebook."
    def __init__(self, chrome, lab, path):
        self.lab, self.path, self.source, self.errors = lab, path, path.removeprefix("trusted/"), []
        from playwright.sync_api import TimeoutError
        self.timeout = TimeoutError
        self.page = chrome.new_page(viewport=dict(width=1280, height=1000))
        self.page.on("console", lambda m: self.errors.append(f"{m.text} {m.location}") if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.goto(f"{lab}/lab/tree/{path}?reset")
        self.idle()

    def idle(self):
        "Wait until the kernel has nothing to do and every cell that was started has ended."
        self.page.locator("#jp-main-statusbar", has_text="(ipykernel) | Idle").wait_for(timeout=120_000)

    def run_all(self, seconds=300):
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        done = """() => { const last = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(o => o.textContent.trim()).filter(o => o); // a collapsed cell shows none
                          return last.length && last.every(o => /^\\[\\d+\\]:$/.test(o)) }"""
        self.page.wait_for_function(done, timeout=1000 * seconds)
        failed = self.page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr'], .jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error']")
        assert not failed.count(), failed.first.inner_text()[-2000:]
        self.idle()

    def explorers(self, kind=""):
        "The explorers on the page, as plain HTML or as widgets; `.jupyter-widgets` asks for widgets only."
        found = self.page.locator(f"{kind}.tsv-explorer")
        found.nth(len(PAGES[self.source]) - 1).wait_for(timeout=60_000)
        return found.all()

    def shot(self, explorer, what):
        if folder := os.environ.get("TSV_NB_SHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            explorer.screenshot(path=Path(folder) / f"{Path(self.path).stem}-{what}.png")

    def close(self):
        "Leave, and end the kernel: the next page may need its memory."
        self.page.close()
        for session in json.load(urllib.request.urlopen(f"{self.lab}/api/sessions")):
            urllib.request.urlopen(urllib.request.Request(f"{self.lab}/api/sessions/{session['id']}", method="DELETE")).close()


@pytest.fixture
def reader(chrome, lab, request):
    who = Reader(chrome, lab, request.param)
    yield who
    who.close()


def seen(explorer):
    "What a reader sees: the picture, its text alternative, and the numbers."
    picture = explorer.locator("img.tsv-picture")
    return picture.get_attribute("src"), picture.get_attribute("alt"), tuple(explorer.locator(".tsv-number b").all_inner_texts())


def focus(explorer, control):
    "The part of a control that takes keys."
    handle = explorer.locator(f".tsv-control-{control}").locator(".noUi-handle, select, input, button").first
    handle.focus()
    return handle


def press(reader, explorer, control, key):
    "Press a key on a control; the seconds until the picture and the numbers have both followed, or 10."
    handle, (src, _, numbers), start = focus(explorer, control), seen(explorer), time.perf_counter()
    handle.press(key)
    moved = """([o, src, numbers]) => o.querySelector('img.tsv-picture').getAttribute('src') !== src
               && [...o.querySelectorAll('.tsv-number b')].some((b, i) => b.innerText !== numbers[i])"""
    with contextlib.suppress(reader.timeout): reader.page.wait_for_function(moved, arg=[explorer.element_handle(), src, list(numbers)], timeout=10_000, polling=5)
    took = time.perf_counter() - start
    reader.idle()
    return took


def expect_notice(explorer):
    notice = explorer.locator(".tsv-notice")
    assert notice.is_visible() and "Run All Cells" in notice.inner_text()
    assert explorer.locator("img.tsv-picture").evaluate("async o => { await o.decode(); return o.naturalWidth }") > 300


@pytest.mark.parametrize("reader", list(PAGES), indirect=True, ids=lambda p: Path(p).stem)
def test_every_control_moves_the_picture_and_the_numbers(reader):
    for i, explorer in enumerate(reader.explorers()): # opened, not run, not trusted: the saved picture as plain HTML, and a notice that says so
        assert "jupyter-widgets" not in explorer.get_attribute("class")
        expect_notice(explorer)
        reader.shot(explorer, f"{i}-no-kernel")
    reader.run_all()
    same, seconds = [], []
    for i, (explorer, controls) in enumerate(zip(reader.explorers(".jupyter-widgets"), PAGES[reader.source])):
        explorer.locator(".tsv-notice").wait_for(state="hidden", timeout=10_000) # the browser has reported to the kernel
        for control, keys in controls.items():
            reader.shot(explorer, f"{i}-{control}-before")
            for key in keys:
                before, took, after = seen(explorer), press(reader, explorer, control, key), seen(explorer)
                print(f"{reader.path} {control} {key}: {1000 * took:.0f} ms, {'; '.join(explorer.locator('.tsv-number').all_inner_texts())}")
                same += [(control, key, what) for what, a, b in zip(("picture", "text alternative", "numbers"), before, after) if a == b]
                seconds.append(took)
            reader.shot(explorer, f"{i}-{control}-after")
        assert not explorer.locator(".tsv-error").count()
    assert not same and not reader.errors, (same, reader.errors)
    assert statistics.median(seconds) < 1.5, seconds # with the browser's share, on a machine that may be busy


@pytest.mark.parametrize("reader", [f"trusted/{p}" for p in PAGES], indirect=True, ids=lambda p: Path(p).stem)
def test_saved_widgets_say_that_nobody_answers(reader):
    "A trusted notebook shows its saved widgets: controls that can be moved, but nothing follows, and the notice says why."
    for i, (explorer, controls) in enumerate(zip(reader.explorers(".jupyter-widgets"), PAGES[reader.source])):
        before = seen(explorer)
        reader.shot(explorer, f"{i}-saved-widget")
        for control, keys in controls.items(): focus(explorer, control).press(keys[0] if keys else "End")
        reader.page.wait_for_timeout(500)
        expect_notice(explorer)
        assert seen(explorer) == before


def no_scripts(why): (pytest.fail if os.environ.get("CI") else pytest.skip)(f"a page with saved widgets is not shown: {why}")


@pytest.fixture(scope="session")
def scripts():
    from platformdirs import user_cache_dir
    from site_checks import install_html_manager
    try: return install_html_manager(os.environ.get("TSV_NB_CACHE") or user_cache_dir("tsv-nb"))
    except OSError as e: no_scripts(e)


ESCAPED = "<\\/" # in JSON the same as "</", which would end the script


def page_of_the_site(notebook, scripts):
    "A notebook's saved widgets in HTML, as Quarto writes them: each view where its cell is, and the state at the end."
    views = [o["data"][VIEW] for c in notebook["cells"] for o in c.get("outputs", []) if VIEW in o.get("data", {})]
    def embedded(kind, data): return f'<script type="{kind}">{json.dumps(data).replace("</", ESCAPED)}</script>'
    return "\n".join(['<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>Saved widgets</title>', *(f'<script src="{s.as_uri()}"></script>' for s in scripts), "</head><body>",
                      *(f"<div>{embedded(VIEW, v)}</div>" for v in views), embedded(STATE, notebook["metadata"]["widgets"][STATE]), "</body></html>"])


@pytest.mark.parametrize("path", PAGES, ids=lambda p: Path(p).stem)
def test_a_page_of_the_site_shows_the_saved_explorers(chrome, scripts, path, tmp_path):
    "Picture, numbers, all controls, and the notice: without Python, without a network, and without an error."
    notebook = json.loads((ROOT / "nbs" / path).read_text(encoding="utf-8"))
    (tmp_path / "page.html").write_text(page_of_the_site(notebook, scripts), encoding="utf-8")
    stored = ["".join(o["data"]["text/html"]) for c in notebook["cells"] for o in c.get("outputs", []) if VIEW in o.get("data", {})]
    page, errors = chrome.new_page(viewport=dict(width=1000, height=1000)), []
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda e: errors.append(str(e)))
    page.on("request", lambda r: errors.append(f"asked for {r.url}") if not r.url.startswith(("file:", "data:")) else None)
    page.goto((tmp_path / "page.html").as_uri())
    page.locator(".jupyter-widgets.tsv-explorer").nth(len(PAGES[path]) - 1).wait_for(timeout=20_000)
    explorers = page.locator(".jupyter-widgets.tsv-explorer").all()
    assert len(explorers) == len(stored) == len(PAGES[path])
    for i, (explorer, html, controls) in enumerate(zip(explorers, stored, PAGES[path])):
        expect_notice(explorer)
        if folder := os.environ.get("TSV_NB_SHOTS"):
            Path(folder).mkdir(parents=True, exist_ok=True)
            explorer.screenshot(path=Path(folder) / f"{Path(path).stem}-{i}-site.png")
        before = seen(explorer)
        assert before[0] in html and before[2] and all(f"<b>{number}</b>" in unescape(html) for number in before[2])
        for control, keys in controls.items():
            assert explorer.locator(f".tsv-control-{control}").is_visible(), control
            focus(explorer, control).press(keys[0] if keys else "End")
        page.wait_for_timeout(300)
        assert seen(explorer) == before and explorer.locator(".tsv-notice").is_visible() # nobody answers, and the page says so
    page.close()
    assert not errors, errors


def test_without_npm_the_reason_is_told(tmp_path, monkeypatch):
    from site_checks import install_html_manager
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="npm is needed"): install_html_manager(tmp_path)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="not shown: x"): no_scripts("x")
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception, match="not shown: x"): no_scripts("x")


DRAGS = [(0, "a", (10, 1.), (120, 1.3)), (0, "b", (50, 1.), (-35, .7)), (0, "b", (-35, .7), (-60, 1.6)), (0, "a", (120, 1.3), (90, .1)), # in the plane: vector, from, to: angle and length
         (1, "c", (30, 40), (-60, 20)), (1, "b", (70, 0), (110, 30))] # in space: azimuth and elevation, of a near and of a far vector
BURST = """([o, x, y, u, v]) => { // forty moves at once, and the pictures they cause
    const picture = o.querySelector('img.tsv-picture').parentElement;
    window.pictures = 0; window.watch?.disconnect(); window.watch = new MutationObserver(() => window.pictures++); window.watch.observe(picture, {childList: true});
    for (let k = 1; k <= 40; k++) document.dispatchEvent(new PointerEvent('pointermove', {buttons: 1, clientX: x + (u - x) * k / 40, clientY: y + (v - y) * k / 40})) }"""


@pytest.mark.parametrize("reader", ["explore/41d_whitening.ipynb"], indirect=True, ids=["41d_whitening"])
def test_vectors_are_dragged_with_the_mouse(reader):
    pytest.importorskip("anywidget")
    from test_explorers import in_picture
    from tsv_nb.explore.whitening_explorer import whitening_plane, whitening_space
    ours, seconds = (whitening_plane(), whitening_space()), []
    reader.run_all()
    theirs = reader.explorers(".jupyter-widgets")
    for explorer in theirs: reader.page.wait_for_function("o => o.querySelector('.tsv-hint').innerText.includes('with the mouse')", arg=explorer.element_handle(), timeout=10_000)
    for i, (which, name, start, end) in enumerate(DRAGS):
        here, explorer = ours[which], theirs[which]
        image, sliders = explorer.locator("img.tsv-picture"), [f"{what}_{name}" for what in here.mouse.sliders]
        reader.page.set_viewport_size(dict(width=1280 if i < 2 else 900, height=1000)) # in the second the picture is scaled
        image.scroll_into_view_if_needed()
        reader.idle()
        box, old = image.bounding_box(), seen(explorer)
        assert (box["width"] < 800) == (i >= 2), box
        def at(values): return [box[o] + box[size] * f for o, size, f in zip("xy", ("width", "height"), in_picture(here, *values))]
        (x, y), (u, v) = at(start), at(end)
        reader.shot(explorer, f"drag{i}-before")
        reader.page.mouse.move(x + 6, y - 4) # near the tip
        reader.page.mouse.down()
        explorer.locator(".widget-html[style*=grabbing]").wait_for(timeout=10_000)
        assert seen(explorer) == old
        for k in range(1, 6):
            before, t = image.get_attribute("src"), time.perf_counter()
            reader.page.mouse.move(x + (u - x) * k / 6, y + (v - y) * k / 6)
            reader.page.wait_for_function("([o, src]) => o.querySelector('img.tsv-picture').getAttribute('src') !== src", arg=[explorer.element_handle(), before], timeout=10_000, polling=5)
            seconds.append(time.perf_counter() - t)
        reader.page.evaluate(BURST, [explorer.element_handle(), x, y, u, v])
        reader.page.mouse.move(u, v)
        reader.page.mouse.up()
        shown = "([o, want]) => want.every(([name, value]) => Number(o.querySelector(`.tsv-control-${name} .widget-readout`).innerText.replace('−', '-')) === value)"
        with contextlib.suppress(reader.timeout): reader.page.wait_for_function(shown, arg=[explorer.element_handle(), [*map(list, zip(sliders, end))]], timeout=10_000)
        assert [float(explorer.locator(f".tsv-control-{o} .widget-readout").inner_text().replace("−", "-")) for o in sliders] == list(end)
        reader.idle()
        new = seen(explorer)
        reader.shot(explorer, f"drag{i}-after")
        reader.page.mouse.move(x, y) # let go: nothing follows any more
        reader.page.wait_for_timeout(300)
        assert seen(explorer) == new and all(a != b for a, b in zip(old, new))
        here.move(**dict(zip(sliders, end)))
        assert 1 <= reader.page.evaluate("window.pictures") <= 3 # one that was being answered, and the last
        assert new[2] == tuple(here.text.values()) # what the same sliders give here
        assert not explorer.locator(".widget-html[style*=grabbing]").count()
    print(f"a drag step: median {1000 * statistics.median(seconds):.0f} ms, longest {1000 * max(seconds):.0f} ms")
    assert not reader.page.locator(".tsv-error").count() and not reader.errors, reader.errors
    assert statistics.median(seconds) < 1.5, seconds


@pytest.mark.skipif(not PART_ONE, reason="about ten minutes; TSV_NB_PART_ONE=1 asks for it")
@pytest.mark.parametrize("reader", PART_ONE or ["none"], indirect=True, ids=lambda p: Path(p).stem)
def test_part_one_runs_in_a_clean_session(reader):
    "Run All on each page of Part I, in a JupyterLab with nothing of the user's; -s prints the seconds."
    start = time.perf_counter()
    reader.run_all(1200)
    print(f"{reader.path}: {time.perf_counter() - start:.0f} s")
    assert not reader.errors, reader.errors
