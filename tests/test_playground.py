"""The table of merged networks: what it computes, its file, the one that comes with the package; and the playground on it, without a browser."""
import json
import random
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("ipywidgets")
from explorer_steps import expect_live

from tsv_nb.explore import merge_table as module
from tsv_nb.explore.merge_table import MergeTable, live_table, load_table, save_table
from tsv_nb.explore.playground import best_alpha, cost_to_others, mean_accuracy, merge_playground, play
from tsv_nb.methods import MERGE_METHODS
from tsv_nb.task_vectors import apply_task_vector
from tsv_nb.vision.evaluate import World, accuracy

ROOT = Path(__file__).resolve().parent.parent
TASKS = ["a", "b", "c"]


class Line(torch.nn.Module):
    "The smallest tower: one matrix."
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(6, 6))
    def load_state(self, state): self.load_state_dict(state)
    def forward(self, images): return images.flatten(1) @ self.w.T


@pytest.fixture
def world(g):
    "Three tasks for a linear tower; each fine-tuned one knows its own task well."
    base, heads, data, finetuned = torch.eye(6), {}, {}, {}
    for t in TASKS:
        heads[t], turn = torch.randn(5, 6, generator=g), torch.randn(6, 6, generator=g)
        images = torch.randn(40, 6, generator=g)
        for split in ("val", "test"): data[t, split] = (images, (images @ (base + turn).T @ heads[t].T).argmax(1))
        finetuned[t] = {"w": base + turn}
    return World(TASKS, {"w": base}, finetuned, heads, data, Line())


@pytest.fixture
def table(world):
    t = live_table(world, methods=("weight_average", "task_arithmetic", "tsv"), alphas=(.3, 1., 2.))
    for s in t.subsets():
        for asked in [(m, a) for m in t.methods for a in t.scales(m)] + [("finetuned",)]: t.accuracy(s, *asked)
    return t


# --- the table -------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", ["weight_average", "task_arithmetic", "tsv"])
def test_entries_are_what_merging_and_evaluating_gives(world, table, method):
    for s in table.subsets():
        for alpha in table.scales(method):
            merged = MERGE_METHODS[method]({t: world.vectors[t] for t in s})
            world.encoder.load_state(apply_task_vector(world.pretrained, merged, alpha))
            assert table.accuracy(s, method, alpha) == {t: accuracy(world.encoder, world.heads[t], *world.data[t, "val"]) for t in s}
    assert table.accuracy(TASKS, "finetuned") == dict.fromkeys(TASKS, 1.) and max(table.accuracy(TASKS, "zero_shot").values()) < 1


def test_zero_is_the_pretrained_network_and_the_average_has_no_scale(table):
    assert table.alphas == [0., .3, 1., 2.]
    assert table.accuracy(TASKS, "tsv", 0.) == table.accuracy(TASKS, "task_arithmetic", 0.) == table.accuracy(TASKS, "zero_shot")
    assert table.accuracy(TASKS, "weight_average", .3) == table.accuracy(TASKS, "weight_average", 0.) == table.accuracy(TASKS, "weight_average")
    assert len(table.subsets()) == 7 and table.subsets()[0] == ("a",) and table.subsets()[-1] == ("a", "b", "c")


def test_nothing_is_computed_twice_and_order_does_not_matter(table, monkeypatch):
    monkeypatch.setattr(MergeTable, "_compute", None)
    assert table.accuracy(("c", "a"), "tsv", 1.) == table.accuracy(("a", "c"), "tsv", 1.) and list(table.accuracy(("c", "a"), "tsv")) == ["a", "c"]


def test_a_merge_serves_all_scales(world, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "MERGE_METHODS", {"tsv": lambda vectors: calls.append(list(vectors)) or MERGE_METHODS["tsv"](vectors), "task_arithmetic": None})
    t = live_table(world, ("tsv",), (.5, 1.))
    for a in t.alphas[1:]:
        for tasks in [("a", "b"), ("a",), ("b",), ("a", "b", "c")]: t.accuracy(tasks, "tsv", a)
    assert calls == [["a", "b"], ["a"], ["b"], ["a", "b", "c"]]
    for tasks in [("b", "c"), ("c",), ("a", "c")]: t.accuracy(tasks, "tsv", 1.)
    assert len(t.kept) == 5 # not all for ever


def test_first_images_only(world):
    t = live_table(world, ("tsv",), images=7)
    assert t.images == dict.fromkeys(TASKS, 7) and t.methods == ["task_arithmetic", "tsv"] # always there: the others are compared with it
    world.encoder.load_state(world.pretrained)
    assert t.accuracy(["b"], "zero_shot")["b"] == accuracy(world.encoder, world.heads["b"], *(x[:7] for x in world.data["b", "val"]))
    assert live_table(world).images == dict.fromkeys(TASKS, 40)


def test_bad_questions_are_named(world, table):
    for call, message in [(lambda: table.accuracy([], "tsv"), "no task is chosen"), (lambda: table.accuracy(["z"], "tsv"), "unknown task 'z'"), (lambda: table.accuracy(["a"], "magic"), "unknown method 'magic'"),
                          (lambda: table.accuracy(["a"], "tsv", .31), "unknown alpha 0.31; known: 0.0, 0.3"), (lambda: live_table(world, ["magic"]), "unknown method"), (lambda: live_table(world, alphas=[-1]), "not negative"), (lambda: live_table(world, images=0), "images=0")]:
        with pytest.raises(ValueError, match=message): call()
    table.world = None
    del table.hits["tsv", ("a", "b"), 1.]
    with pytest.raises(ValueError, match=r"tsv, a\+b, alpha 1 is not in this table"): table.accuracy(["a", "b"], "tsv")


# --- its file --------------------------------------------------------------------------------------------------------------------------------

def test_saved_and_read_it_is_the_same(table, tmp_path):
    table.about = {"command": "by hand"}
    read = load_table(save_table(table, tmp_path / "new" / "t.json"))
    assert (read.tasks, read.methods, read.alphas, read.images, read.about, read.split, read.hits) == (table.tasks, table.methods, table.alphas, table.images, table.about, "val", table.hits)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["t.json"]


def test_an_incomplete_table_is_not_written(table, tmp_path):
    del table.hits["tsv", ("a", "b"), 2.]
    with pytest.raises(ValueError, match=r"incomplete.*tsv, a\+b, alpha 2"): save_table(table, tmp_path / "t.json")
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_named(table, tmp_path):
    path = save_table(table, tmp_path / "t.json")
    good = path.read_text()
    content = json.loads(good)
    def changed(change):
        c = json.loads(good)
        change(c)
        return json.dumps(c)
    for bad in (good[:-40], "[]", "{}", changed(lambda c: c["rows"].pop()), changed(lambda c: c["rows"][0][2][0].append(3)), changed(lambda c: c["rows"][-1][2].pop()),
                changed(lambda c: c["rows"][-1][2][0].__setitem__(0, 41)), changed(lambda c: c["rows"][-1][2][0].__setitem__(0, -1)), changed(lambda c: c["zero_shot"].pop()), changed(lambda c: c["rows"][0].__setitem__(1, ["z"]))):
        path.write_text(bad)
        with pytest.raises(ValueError, match="t.json is not a table of merged networks, or a damaged one"): load_table(path)
    assert len(content["rows"]) == 7 * 3


# --- the table of the package ----------------------------------------------------------------------------------------------------------------

def test_shipped_table_is_complete_small_and_says_where_it_comes_from():
    t = load_table()
    assert module._FILE.stat().st_size < 300_000 and len(t.tasks) >= 4 and {"weight_average", "task_arithmetic", "ties", "tsv"} <= set(t.methods) and len(t.alphas) >= 9
    assert set(t.hits) == {(m, s, a) for m in t.methods for s in t.subsets() for a in t.scales(m) if a} | {(m, (x,), 1.) for m in ("zero_shot", "finetuned") for x in t.tasks}
    assert t.about["command"] == "python benchmarks/playground.py" and {"torch", "tsv_nb", "python"} <= t.about["versions"].keys() and set(t.about["inputs"]["finetuned"]) == set(t.tasks)
    assert {"recipe", "pretrained", "images", "code"} <= t.about["inputs"].keys() and set(t.images.values()) == {120}


def test_shipped_table_is_reproduced():
    "Some entries, chosen at random, merged and evaluated again: to the image where the towers are the same files, within 15 points where they were trained on another machine."
    from tsv_nb.vision.evaluate import load_world
    from tsv_nb.vision.finetune import state_digest
    shipped = load_table()
    world = load_world(shipped.tasks, progress=False)
    live, g = live_table(world, images=120), random.Random(0)
    same = all(state_digest(world.finetuned[t])[:16] == d for t, d in shipped.about["inputs"]["finetuned"].items())
    for _ in range(6):
        method, s = g.choice(shipped.methods), g.choice(shipped.subsets())
        alpha = g.choice(shipped.scales(method))
        a, b = shipped.accuracy(s, method, alpha), live.accuracy(s, method, alpha)
        assert a == pytest.approx(b, abs=1.01 / 120 if same else .15), (method, s, alpha)


@pytest.mark.skipif(not (ROOT / "benchmarks").exists(), reason="needs the source tree")
def test_script_stops_in_time_and_goes_on(world, tmp_path, monkeypatch):
    "Three runs without time make a row each at most; the last run completes the table from the records of all."
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import playground as script
    monkeypatch.setattr(script, "load_world", lambda n: world)
    monkeypatch.setattr(script, "live_table", lambda w, images: live_table(w, ("weight_average", "tsv"), (1.,), images=images))
    monkeypatch.setattr(script, "IMAGES", 30)
    paths = ["--out", str(tmp_path / "t.json"), "--records", str(tmp_path / "records")]
    assert script.main([*paths, "--seconds", "0"]) == 3 and not (tmp_path / "t.json").exists()
    original, calls = MergeTable._compute, []
    def few(self, *asked):
        calls.append(asked)
        if len(calls) > 9: raise KeyboardInterrupt
        return original(self, *asked)
    monkeypatch.setattr(MergeTable, "_compute", few)
    with pytest.raises(KeyboardInterrupt): script.main(paths)
    monkeypatch.setattr(MergeTable, "_compute", lambda self, *asked: calls.append(asked) or original(self, *asked))
    assert script.main(paths) == 0
    assert len(calls) == 1 + len(set(calls)) and len(set(calls)) == 6 + 7 * 3 # the interrupted one twice
    table = load_table(tmp_path / "t.json")
    assert table.accuracy(TASKS, "tsv") == live_table(world, images=30).accuracy(TASKS, "tsv") and table.about["inputs"]["finetuned"].keys() == set(TASKS)


# --- the playground --------------------------------------------------------------------------------------------------------------------------

def test_best_scale_and_costs_are_those_of_the_table(table):
    for s in table.subsets():
        means = {a: sum(table.accuracy(s, "tsv", a).values()) / len(s) for a in table.alphas}
        assert means[best_alpha(table, s, "tsv")] == max(means.values()) and mean_accuracy(table, s, "tsv", 2.) == means[2.]
    full, without = table.accuracy(TASKS, "tsv", 2.), table.accuracy(["a", "c"], "tsv", 2.)
    assert cost_to_others(table, tuple(TASKS), "tsv", 2.)["b"] == pytest.approx(50 * (without["a"] + without["c"] - full["a"] - full["c"]))


def test_every_control_changes_picture_and_numbers(table):
    table.hits["tsv", ("a", "b", "c"), 1.] = [31, 12, 22] # no ties by chance
    e = merge_playground(table)
    assert e.result.tasks == ("a", "b", "c") and e.result.method == "tsv"
    for move in (dict(alpha=2.), dict(task1=False), dict(method="task_arithmetic"), dict(method="weight_average"), dict(task1=True), dict(task0=False)):
        before = e.png, e.text
        e.move(**move)
        assert e.png != before[0] and e.text != before[1], move
    assert e.result.tasks == ("b", "c") and float(e.text["mean accuracy"].split()[0]) == pytest.approx(100 * mean_accuracy(table, ("b", "c"), "weight_average"), abs=.05)


def test_steps_stay_within_their_budget():
    e = merge_playground()
    table = e.result.table
    boxes = {f"task{i}": [i > 2, i <= 2] * 2 for i in range(len(table.tasks))}
    expect_live(e, {"alpha": [a for a in table.alphas if a != 1], **boxes, "method": table.methods})


def test_slider_sleeps_while_the_method_has_no_scale(table):
    e = merge_playground(table)
    e.move(alpha=2., method="weight_average")
    assert e.controls["alpha"].disabled and e.result.alpha == 1
    e.move(method="tsv")
    assert not e.controls["alpha"].disabled and e.result.alpha == 2


def test_one_task_and_none(table):
    e = merge_playground(table)
    e.move(task1=False, task2=False)
    assert e.result.costs == {} and e.result.tasks == ("a",)
    assert e.move(task0=False) == {"mean accuracy": "none (no task is chosen)"}
    assert "difference" in e.move(task2=True)


def test_standard_error_is_that_of_a_mean_of_shares(table):
    s = play(table, ("a", "b"), "tsv", 2.)
    p = table.accuracy(("a", "b"), "tsv", 2.)
    assert s.error == pytest.approx(100 * (sum(x * (1 - x) / 40 for x in p.values()) / 4) ** .5)


def test_a_world_is_computed_as_one_goes(world, monkeypatch):
    steps = []
    original = MergeTable._compute
    monkeypatch.setattr(MergeTable, "_compute", lambda self, *asked: steps.append(asked) or original(self, *asked))
    e = merge_playground(world)
    table, bar = e.result.table, e.children[-1]
    known = len(steps)
    assert table.world is not None and known == len(set(steps)) and not any(m in ("ties", "isotropic") for m, *_ in steps) # only what is shown
    seen = []
    bar.observe(lambda change: seen.append(change.new), "value")
    e.move(method="ties")
    assert steps[known:] == [("ties", s, 1.) for s in (("a", "b", "c"), ("b", "c"), ("a", "c"), ("a", "b"))]
    assert max(seen) == bar.max and bar.layout.display == "none"
    e.move(method="tsv")
    assert len(steps) == known + 4 # and kept
