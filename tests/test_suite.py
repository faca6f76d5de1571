"""The evaluation of everything: its numbers against plain loops, what is computed again and what is not, interruptions, and the paper's layout end to end."""
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from tsv_nb.methods import MERGE_METHODS
from tsv_nb.vision import records as records_module
from tsv_nb.vision.clip import ImageEncoder
from tsv_nb.vision.contenders import SUITE, alpha_grid, choose, contender
from tsv_nb.vision.evaluate import World, accuracy, image_batches
from tsv_nb.vision.formats import FileImages
from tsv_nb.vision.paper_world import KeptImages
from tsv_nb.vision.records import Records, code_digest, data_digest, fact_digest
from tsv_nb.vision.suite import evaluate_suite, results_path, suite_table

TASKS, CLASSES = ["ant", "bee", "cow"], 5


class Toy(nn.Module):
    "A CLIP whose image tower is two linear layers."
    def __init__(self):
        super().__init__()
        self.visual = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.Linear(9, 6, bias=False))


def toy_world(seed=0, n=40, slow=0.):
    "Three tasks whose labels mostly follow their own towers."
    g = torch.Generator().manual_seed(seed)
    def randn(*shape): return torch.randn(*shape, generator=g)
    model = Toy()
    if slow: model.visual[0].register_forward_pre_hook(lambda *_: time.sleep(slow))
    base = {k: .5 * randn(*v.shape) for k, v in model.visual.state_dict().items()}
    tuned = {t: {k: v + .4 * randn(*v.shape) for k, v in base.items()} for t in TASKS}
    heads = {t: nn.functional.normalize(randn(CLASSES, 6), dim=1) for t in TASKS}
    data = {}
    for t in TASKS:
        for split in ("val", "test"):
            images = randn(n, 3, 2, 2)
            model.visual.load_state_dict(tuned[t])
            labels = (model.visual(images) @ heads[t].T).argmax(1).detach()
            data[t, split] = images, torch.where(torch.rand(n, generator=g) < .15, torch.randint(CLASSES, (n,), generator=g), labels)
    return World(TASKS, base, tuned, heads, data, ImageEncoder(model), "toy", 16)


@pytest.fixture
def world(): return toy_world()


def predict(world, state, task, split):
    "Accuracy by numpy in float64."
    images, labels = (x.double().numpy() if x.is_floating_point() else x.numpy() for x in world.data[task, split])
    s = {k: v.double().numpy() for k, v in state.items()}
    features = (images.reshape(len(images), -1) @ s["1.weight"].T + s["1.bias"]) @ s["2.weight"].T
    return float(np.mean((features @ world.heads[task].double().numpy().T).argmax(1) == labels))


def moved(world, vector, alpha): return {k: v.double() + alpha * vector[k].double() for k, v in world.pretrained.items()}


def count_calls(world):
    calls = []
    world.encoder.register_forward_hook(lambda *_: calls.append(1))
    return calls


def lines(folder): return [json.loads(o) for o in (Path(folder) / "records.jsonl").read_text().splitlines()]


def measured(folder): return [r for r in lines(folder) if "accuracy" in r]


def timeless(results):
    "Results without the seconds, which no two runs share."
    copy = json.loads(json.dumps(results))
    for group in ("methods", "ranks"):
        for outcome in copy[group].values(): outcome.pop("seconds")
    return copy


# what is tried and chosen


def test_the_published_grid():
    for name in MERGE_METHODS:
        if name in ("zero_shot", "weight_average"): continue
        grid = np.linspace(0, 3 if name == "tsv" else MERGE_METHODS[name].alpha_max, 31)[1:]
        assert contender(name, 8).tries == pytest.approx(grid.tolist())
    assert MERGE_METHODS["tsv"].alpha_max == 3 and MERGE_METHODS["task_arithmetic"].alpha_max == 1
    assert .3 in alpha_grid(3.) and len(contender("weight_average", 8).tries) == len(contender("zero_shot", 8).tries) == 1


def test_choice_is_by_normalized_accuracy_and_ties_take_the_smallest():
    rng = np.random.default_rng(0)
    for _ in range(50):
        tried = {round(a, 2): {t: float(rng.integers(0, 5)) / 4 for t in "abc"} for a in rng.permutation(np.arange(.1, 1, .1))}
        best = {t: float(rng.integers(1, 5)) / 4 for t in "abc"}
        score = {a: np.mean([accs[t] / best[t] for t in "abc"]) for a, accs in tried.items()}
        top = max(score.values())
        assert choose(tried, best)["a"] == min(a for a in tried if abs(score[a] - top) < 1e-12)
        assert choose(tried, best, shared=False) == {t: min(a for a in tried if tried[a][t] == max(x[t] for x in tried.values())) for t in "abc"}
    assert choose({.1: dict(a=.8, b=.2), .2: dict(a=.7, b=.25)}, dict(a=1., b=.3))["a"] == .2 # the plain mean would say .1


# numbers


def test_numbers_of_merges_against_plain_loops(world):
    results = evaluate_suite(world, points=5, progress=False)
    best = {s: {t: predict(world, world.finetuned[t], t, s) for t in TASKS} for s in ("val", "test")}
    assert results["methods"]["finetuned"]["absolute"] == pytest.approx(best["test"])
    for name, method in MERGE_METHODS.items():
        r, vector = results["methods"][name], method(world.vectors)
        grid = [method.alpha] if name in ("zero_shot", "weight_average") else [method.alpha_max * (i + 1) / 5 for i in range(5)]
        curve = [np.mean([predict(world, moved(world, vector, a), t, "val") / best["val"][t] for t in TASKS]) for a in grid]
        alpha = grid[int(np.argmax(curve))]
        if len(grid) > 1:
            assert [p["normalized"] for p in r["tried"]] == pytest.approx(curve)
            assert r["value"] == pytest.approx(dict.fromkeys(TASKS, alpha))
        absolute = {t: predict(world, moved(world, vector, alpha), t, "test") for t in TASKS}
        assert r["absolute"] == pytest.approx(absolute)
        assert r["mean_normalized"] == pytest.approx(np.mean([absolute[t] / best["test"][t] for t in TASKS]))
        assert r["mean_absolute"] == pytest.approx(np.mean(list(absolute.values())))


def test_every_name_of_the_suite_runs(world):
    assert set(evaluate_suite(world, points=2, progress=False)["methods"]) == set(SUITE) >= {"tall_masks", "magnitude_masks", "tsv_compress", "finetuned", *MERGE_METHODS}


def test_masks_choose_lambda_for_each_task(world):
    r = evaluate_suite(world, ["tall_masks"], progress=False)["methods"]["tall_masks"]
    total = {k: sum(world.vectors[t][k] for t in TASKS) for k in world.pretrained}
    def masked(t, lam): return moved(world, {k: total[k] * (world.vectors[t][k].abs() >= lam * (total[k] - world.vectors[t][k]).abs()) for k in total}, 1.)
    for t in TASKS:
        accs = {lam: predict(world, masked(t, lam), t, "val") for lam in (.2, .3, .4, .5, .6)}
        lam = min(o for o in accs if accs[o] == max(accs.values()))
        assert r["value"][t] == lam and r["absolute"][t] == pytest.approx(predict(world, masked(t, lam), t, "test"))


def test_magnitude_masks_and_options(world):
    r = evaluate_suite(world, ["magnitude_masks"], options={"magnitude_masks": {"density": 30.}}, progress=False)["methods"]["magnitude_masks"]
    total = {k: sum(world.vectors[t][k] for t in TASKS) for k in world.pretrained}
    for t in TASKS:
        sizes = np.sort(np.concatenate([v.abs().flatten().numpy() for v in world.vectors[t].values()]))[::-1]
        cut = sizes[int(.3 * len(sizes)) - 1]
        kept = {k: v * (world.vectors[t][k].abs() >= float(cut)) for k, v in total.items()}
        assert r["absolute"][t] == pytest.approx(predict(world, moved(world, kept, 1.), t, "test"))


def test_compression_and_the_sweep_of_ranks(world):
    results = evaluate_suite(world, ["tsv_compress"], alpha="default", ranks=[1, 2], progress=False)
    def low(t, ranks):
        vector = {"1.bias": world.vectors[t]["1.bias"]}
        for name, k in zip(("1.weight", "2.weight"), ranks):
            U, S, V = np.linalg.svd(world.vectors[t][name].double().numpy(), full_matrices=False)
            vector[name] = torch.from_numpy((U[:, :k] * S[:k]) @ V[:k])
        return predict(world, moved(world, vector, 1.), t, "test")
    for k in (1, 2): assert results["ranks"][str(k)]["absolute"] == pytest.approx({t: low(t, (k, k)) for t in TASKS})
    assert results["methods"]["tsv_compress"]["absolute"] == pytest.approx({t: low(t, (3, 2)) for t in TASKS}) # a third of 9 and of 6 components
    assert set(results["inputs"]["data"]) == {"test"} # nothing was chosen: no validation images were looked at


def test_fixed_and_default_scales(world):
    for alpha, expected in ((.7, .7), ("default", MERGE_METHODS["task_arithmetic"].alpha)):
        r = evaluate_suite(world, ["task_arithmetic", "tall_masks"], alpha=alpha, progress=False)["methods"]
        assert set(r["task_arithmetic"]["value"].values()) == {expected} and not r["task_arithmetic"]["tried"]
        total = {k: sum(world.vectors[t][k] for t in TASKS) for k in world.pretrained}
        assert r["task_arithmetic"]["absolute"] == pytest.approx({t: predict(world, moved(world, total, expected), t, "test") for t in TASKS})
        assert set(r["tall_masks"]["value"].values()) == {.4}


def test_test_images_are_seen_once(world, tmp_path):
    evaluate_suite(world, points=4, out=tmp_path, progress=False)
    seen = [(r["method"], r["task"]) for r in measured(tmp_path) if r["split"] == "test"]
    assert len(seen) == len(set(seen)) == len(SUITE) * len(TASKS)


@pytest.mark.parametrize("name, given", [("ties", dict(density=30.)), ("dare_ties", dict(density=30.)), ("tsv", dict(rank=1)), ("tsv_compress", dict(rank=1)), ("magnitude_masks", dict(density=30.))])
def test_good_options_are_let_through(world, name, given):
    assert evaluate_suite(world, [name], alpha=1., options={name: given}, progress=False)["options"]["options"] == {name: given}


# what is computed again


def test_the_bar_is_shown_where_there_is_something_to_do(tmp_path, capsys):
    options = dict(methods=["task_arithmetic"], points=2, out=tmp_path)
    evaluate_suite(toy_world(), **options)
    shown = capsys.readouterr().err
    assert "Task Arithmetic: 100%" in shown and "15/15" in shown and shown.endswith("\n") # 3 tasks: fine-tuned on 2 splits, 2 scales, the test images
    evaluate_suite(toy_world(), **options)
    assert capsys.readouterr().err == ""
    evaluate_suite(toy_world(), **options | dict(grid=[.25, .5]))
    assert capsys.readouterr().err


def test_a_second_run_computes_nothing_and_writes_the_same(world, tmp_path, monkeypatch):
    calls, options = count_calls(world), dict(points=3, ranks=[1], out=tmp_path, progress=False)
    results = evaluate_suite(world, **options)
    path, n = results_path(results, tmp_path), len(calls)
    before, size = path.read_bytes(), len(lines(tmp_path))
    assert n > 0 and json.loads(before) == results
    monkeypatch.setattr("tsv_nb.vision.contenders.apply_task_vector", lambda *_: pytest.fail("a network was made"))
    monkeypatch.setattr("tsv_nb.vision.contenders.compress", lambda *_: pytest.fail("a task was compressed"))
    assert evaluate_suite(toy_world(), **options) == results # another world with the same contents
    assert evaluate_suite(world, **options) == results
    assert len(calls) == n and path.read_bytes() == before and len(lines(tmp_path)) == size


def test_force_computes_everything_again(world, tmp_path):
    options = dict(methods=["tsv"], points=3, out=tmp_path, progress=False)
    results = evaluate_suite(world, **options)
    n, calls = len(measured(tmp_path)), count_calls(world)
    assert timeless(evaluate_suite(world, force=True, **options)) == timeless(results)
    assert len(measured(tmp_path)) == 2 * n and len(calls) > 0
    made = len(calls)
    evaluate_suite(world, **options)
    assert len(calls) == made


def new_records(tmp_path, world, **options):
    "What a run adds to the records: a set of (method, task)."
    before = len(lines(tmp_path)) if (tmp_path / "records.jsonl").exists() else 0
    evaluate_suite(world, **(dict(methods=["zero_shot", "task_arithmetic", "tsv", "tall_masks", "tsv_compress"], points=2, out=tmp_path, progress=False) | options))
    return {(r["method"], r["task"]) for r in lines(tmp_path)[before:] if "accuracy" in r}


def test_a_changed_tower_changes_what_depends_on_it(world, tmp_path):
    everything = new_records(tmp_path, world)
    state = {k: v + (k == "2.weight") * .01 for k, v in world.finetuned["bee"].items()}
    changed = new_records(tmp_path, replace(world, finetuned=world.finetuned | {"bee": state}))
    assert changed == {(m, t) for m, t in everything if m in ("task_arithmetic", "tsv", "tall_masks") or m in ("tsv_compress", "finetuned") and t == "bee"}
    assert not new_records(tmp_path, world) # the first world is still known


@pytest.mark.parametrize("change", ["head", "test images", "validation images", "labels"])
def test_changed_heads_and_images_concern_their_task(world, tmp_path, change):
    everything = new_records(tmp_path, world)
    heads, data = dict(world.heads), dict(world.data)
    if change == "head": heads["bee"] = heads["bee"].flip(0)
    if change == "test images": data["bee", "test"] = data["bee", "test"][0] + 1e-6, data["bee", "test"][1]
    if change == "validation images": data["bee", "val"] = tuple(x[1:] for x in data["bee", "val"])
    if change == "labels": data["bee", "val"] = data["bee", "val"][0], data["bee", "val"][1].flip(0)
    changed = new_records(tmp_path, replace(world, heads=heads, data=data))
    if change == "test images": assert changed == {(m, t) for m, t in everything if t == "bee"}
    else: assert {(m, "bee") for m in ("task_arithmetic", "tsv", "tall_masks", "finetuned")} <= changed # another choice may need other test scores


def test_a_changed_base_changes_all_but_the_tasks_own_towers(world, tmp_path):
    everything = new_records(tmp_path, world)
    changed = new_records(tmp_path, replace(world, pretrained={k: v + .01 for k, v in world.pretrained.items()}))
    assert changed >= {(m, t) for m, t in everything if m != "finetuned"}


@pytest.mark.parametrize("change", ["name", "activation"])
def test_another_architecture_changes_everything(tmp_path, change):
    def build(activation):
        model = Toy()
        model.visual.append(activation) # has no weights
        return replace(toy_world(), encoder=ImageEncoder(model))
    one = build(nn.GELU())
    everything = new_records(tmp_path, one)
    assert new_records(tmp_path, replace(one, model="other") if change == "name" else build(nn.GELU("tanh"))) == everything
    assert not new_records(tmp_path, build(nn.GELU()))


def test_changed_options_and_code_are_noticed(world, tmp_path, monkeypatch):
    new_records(tmp_path, world)
    assert {m for m, _ in new_records(tmp_path, world, options={"tsv": {"rank": 1}})} == {"tsv"}
    assert {m for m, _ in new_records(tmp_path, world, options={"tsv_compress": {"rank": 1}})} == {"tsv_compress"}
    assert not new_records(tmp_path, world, options={"tsv": {"rank": 1}})
    assert {m for m, _ in new_records(tmp_path, world, points=4)} == {"task_arithmetic", "tsv"}
    real = code_digest
    monkeypatch.setattr("tsv_nb.vision.scores.code_digest", lambda methods=True: real(methods) + "x" * methods) # a merging method was edited
    assert {m for m, _ in new_records(tmp_path, world)} == {"task_arithmetic", "tsv", "tall_masks", "tsv_compress"}
    monkeypatch.setattr("tsv_nb.vision.scores.code_digest", lambda methods=True: real(methods) + "y") # the evaluation was
    assert {m for m, _ in new_records(tmp_path, world)} == {"zero_shot", "task_arithmetic", "tsv", "tall_masks", "tsv_compress", "finetuned"}


def test_order_and_number_of_tasks(world, tmp_path):
    new_records(tmp_path, world)
    fewer = replace(world, names=["cow", "ant"], finetuned={t: world.finetuned[t] for t in ("cow", "ant")})
    changed = new_records(tmp_path, fewer)
    assert {m for m, _ in changed} == {"task_arithmetic", "tsv", "tall_masks", "tsv_compress"} # TSV-C: another share of the components


def test_code_digest_sees_code_not_comments(tmp_path, monkeypatch):
    import shutil
    monkeypatch.setattr(records_module, "_PACKAGE", tmp_path)
    for name in ("vision", "kernels"): (tmp_path / name).mkdir()
    for name in ("merge.py", "kernels/reconstruct.py", "vision/clip.py", "vision/evaluate.py", "vision/contenders.py", "vision/scores.py"):
        shutil.copy(Path(records_module.__file__).parent.parent / name, tmp_path / name)
    def digests(): code_digest.cache_clear(); return code_digest(True), code_digest(False)
    first = digests()
    source = (tmp_path / "merge.py").read_text()
    (tmp_path / "merge.py").write_text("# a comment\n\n" + source)
    assert digests() == first
    (tmp_path / "merge.py").write_text(source + "\nx = 1\n")
    changed = digests()
    assert changed[0] != first[0] and changed[1] == first[1]
    (tmp_path / "vision" / "evaluate.py").write_text("x = 1")
    assert digests()[1] != first[1]
    monkeypatch.setattr(torch, "__version__", "0")
    newer = digests()
    assert newer[1] != changed[1]
    monkeypatch.setattr(records_module, "version", lambda name: "0")
    assert digests()[1] != newer[1]
    code_digest.cache_clear()


# interruptions


def test_records_survive_a_cut_at_every_byte(tmp_path, caplog):
    with Records(tmp_path) as r:
        r.add("a" * 32, task="ant", accuracy=.5, seconds=1.)
        r.add("b" * 32, task="bee", accuracy=.25, seconds=1.)
    path = tmp_path / "records.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for cut in range(first + 1, len(whole)):
        path.write_bytes(whole[:cut])
        caplog.clear()
        with Records(tmp_path) as r:
            assert len(r) == 1 and r["a" * 32] == dict(task="ant", accuracy=.5, seconds=1.) and "incomplete" in caplog.text
            r.add("b" * 32, task="bee", accuracy=.25, seconds=1.)
        assert path.read_bytes() == whole


def test_damaged_lines_are_dropped_alone(tmp_path, caplog):
    with Records(tmp_path) as r:
        for i in range(3): r.add(str(i), value=i, seconds=1.)
    path = tmp_path / "records.jsonl"
    good = path.read_text().splitlines(keepends=True)
    for bad in ("{\n", "[1]\n", '"text"\n', '{"value": 1}\n', "\n", "\x00\x00\n", '{"key": "1"}\n', '{"key": "1", "seconds": "1"}\n', '{"key": "1", "seconds": NaN}\n',
                *('{"key": "1", "seconds": 1.0, "task": "ant"%s}\n' % more for more in ("", ', "accuracy": 1.5', ', "accuracy": null', ', "accuracy": NaN', ', "accuracy": -0.1'))):
        path.write_text(good[0] + bad + good[2])
        with Records(tmp_path) as r: assert set(r.known) == {"0", "2"} and "line 2 is damaged" in caplog.text
        caplog.clear()


def test_a_record_without_its_accuracy_is_computed_again(world, tmp_path):
    options = dict(methods=["zero_shot"], alpha=1., out=tmp_path, progress=False)
    results = evaluate_suite(world, **options)
    damaged = lines(tmp_path)
    for record in damaged: record.pop("accuracy", None)
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in damaged))
    assert timeless(evaluate_suite(world, **options)) == timeless(results)


def test_the_last_line_of_a_key_counts(tmp_path):
    for value in (1, 2):
        with Records(tmp_path, force=True) as r:
            assert not len(r)
            r.add("a", value=value, seconds=1.)
    with Records(tmp_path) as r: assert r["a"] == dict(value=2, seconds=1.) and len(lines(tmp_path)) == 2


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    with Records(tmp_path) as r:
        r.add("a", value=1, seconds=1.)
        before = r.path.read_bytes()
        class Full:
            def __init__(self, file): self.file = file
            def write(self, data): return self.file.write(data[:7])
            def __getattr__(self, name): return getattr(self.file, name)
        real, r.file = r.file, Full(r.file)
        with pytest.raises(OSError, match="disk is full"): r.add("b", value=2, seconds=1.)
        assert r.path.read_bytes() == before and "b" not in r
        r.file = real
        def interrupted(fd): raise KeyboardInterrupt
        with monkeypatch.context() as m:
            m.setattr(os, "fsync", interrupted)
            with pytest.raises(KeyboardInterrupt): r.add("b", value=2, seconds=1.)
        assert r.path.read_bytes() == before and "b" not in r
        r.add("b", value=3, seconds=1.)
    assert [o["value"] for o in lines(tmp_path)] == [1, 3]


def test_the_folder_is_checked_and_locked(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="cannot be written to .*file"): Records(tmp_path / "file")
    with pytest.raises(OSError, match="cannot be written to"): Records(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"
    for held, code in ((True, 3), (False, 0)):
        with Records(tmp_path / ("a" if held else "b")):
            process = start(run_locked, tmp_path / "a")
            process.join()
            assert process.exitcode == code
    with Records(tmp_path / "a"): pass # the lock of a process that has ended is gone


FORK = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
if hasattr(FORK, "set_forkserver_preload"): FORK.set_forkserver_preload(["tsv_nb.vision.suite", "tsv_nb.vision.command", "open_clip", "matplotlib"])
SMALL = dict(methods=["zero_shot", "task_arithmetic", "tall_masks", "finetuned"], points=4, progress=False)


def run_toy(out):
    torch.set_num_threads(1)
    evaluate_suite(toy_world(slow=.004), out=out, **SMALL)


def run_locked(out):
    try: Records(out) # and end without closing it
    except OSError as e: sys.exit(3 if "another process is writing results" in str(e) else 4)


def start(target, *args):
    process = FORK.Process(target=target, args=args)
    process.start()
    return process


def wait_for(folder, n, process):
    "Until the file of records has n lines."
    while process.is_alive():
        path = Path(folder) / "records.jsonl"
        if path.exists() and path.read_bytes().count(b"\n") >= n: return
        time.sleep(.002)


def test_ten_kills_and_one_result(tmp_path):
    "SIGKILL at random moments of the work; the last run finishes with what an undisturbed run gives, and nothing was computed twice."
    expected = evaluate_suite(toy_world(), out=tmp_path / "whole", **SMALL)
    rng, killed = random.Random(0), 0
    for i in range(10):
        known = len((tmp_path / "killed" / "records.jsonl").read_bytes().splitlines()) if i else 0
        process = start(run_toy, tmp_path / "killed")
        wait_for(tmp_path / "killed", known + rng.randint(1, 5), process)
        time.sleep(rng.random() * .01)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
    assert killed >= 8
    calls = count_calls(again := toy_world())
    results = evaluate_suite(again, out=tmp_path / "killed", **SMALL)
    assert timeless(results) == timeless(expected)
    assert json.loads(results_path(results, tmp_path / "killed").read_text()) == results
    keys = [r["key"] for r in lines(tmp_path / "killed")]
    assert len(keys) == len(set(keys)) and set(keys) == {r["key"] for r in lines(tmp_path / "whole")}
    assert len(calls) < 3 * (2 * 3 + 4 * 3 + 5 * 3 + 9) # not everything again
    assert not list((tmp_path / "killed").glob(".*.tmp"))


# images


def test_datasets_and_tensors_give_the_same(world, tmp_path):
    results = evaluate_suite(world, points=3, progress=False)
    for workers in (0, 1):
        lazy = replace(world, data={k: TensorDataset(*v) for k, v in world.data.items()}, workers=workers)
        methods = None if not workers else ["zero_shot", "finetuned"]
        other = evaluate_suite(lazy, methods, points=3, progress=False)
        for name, r in other["methods"].items(): assert r["absolute"] == results["methods"][name]["absolute"] and r["tried"] == results["methods"][name]["tried"]


def test_batches_are_the_same_for_datasets_and_tensors():
    images, labels = torch.rand(11, 3, 2, 2), torch.arange(11)
    for batch in (1, 4, 11, 50):
        pairs = list(zip(image_batches((images, labels), batch), image_batches(TensorDataset(images, labels), batch), strict=True))
        assert all(torch.equal(a, b) for one, two in pairs for a, b in zip(one, two)) and sum(len(x) for (x, _), _ in pairs) == 11


def test_labels_that_the_head_does_not_know(world, tmp_path):
    for wrong in (CLASSES, -1):
        images, labels = world.data["bee", "test"]
        labels = labels.clone()
        labels[7] = wrong
        bad = replace(world, data=world.data | {("bee", "test"): (images, labels)})
        calls = count_calls(bad)
        with pytest.raises(ValueError, match=rf"task 'bee', test images: label {wrong} has no class in the head, which has 5.*1 of these 40"): evaluate_suite(bad, progress=False)
        assert not calls
        lazy = replace(bad, data=bad.data | {("bee", "test"): TensorDataset(images, labels)})
        with pytest.raises(ValueError, match=f"task 'bee', test images: label {wrong}"): evaluate_suite(lazy, ["zero_shot"], progress=False)
    with pytest.raises(ValueError, match="2 images, but 1 labels"): accuracy(nn.Identity(), torch.eye(2), torch.eye(2), torch.tensor([0]))


def test_data_digest_of_datasets():
    images, labels = torch.rand(100, 3, 2, 2), torch.arange(100) % 5
    one = data_digest(TensorDataset(images, labels))
    assert one == data_digest(TensorDataset(images.clone(), labels))
    others = [(images[:-1], labels[:-1]), (images.flip(0), labels), (images * .5, labels), (images, (labels + 1) % 5), (images[:, :, :1], labels)]
    assert all(data_digest(TensorDataset(*o)) != one and data_digest(o) != data_digest((images, labels)) for o in others)
    assert data_digest(TensorDataset(images[:0], labels[:0])) == fact_digest(0, [], [])
    class Plain(Dataset): # nothing is known without reading
        def __len__(self): return 100
        def __getitem__(self, i): return images[i], labels[i]
    assert data_digest(Plain()) == data_digest(Subset(Plain(), range(100))) != one
    both = ConcatDataset([Plain(), TensorDataset(images, labels)])
    other = ConcatDataset([Plain(), TensorDataset(images, labels.clone().index_fill(0, torch.tensor(33), 4))])
    assert data_digest(Subset(both, range(1, 200))) != data_digest(Subset(other, range(1, 200)))


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: Subset(data, range(99, -1, -1)), lambda data: ConcatDataset([data, data]), lambda data: KeptImages(data, torch.Tensor.float)])
def test_data_digest_sees_every_label_and_file(tmp_path, wrap):
    from PIL import Image
    folder = tmp_path / "one"
    folder.mkdir()
    for i in range(100): Image.new("RGB", (2, 2), (i, i, i)).save(folder / f"{i:02d}.png")
    def digest(labels=[i % 5 for i in range(100)], at=folder):
        opened = []
        def to_tensor(image): opened.append(1); return torch.tensor(image.getpixel((0, 0)), dtype=torch.uint8)
        data = wrap(FileImages([at / f"{i:02d}.png" for i in range(100)], labels, 5, "toy", to_tensor))
        seen = data_digest(data)
        assert len(opened) <= 17
        return seen
    one = digest()
    assert digest() == one
    sampled = {k * 100 // 16 for k in range(16)} | {99}
    for i in {7, 33, 98} - sampled: assert digest([(j % 5 + (j == i)) % 5 for j in range(100)]) != one
    folder.rename(tmp_path / "moved")
    assert digest(at=tmp_path / "moved") == one
    path = tmp_path / "moved" / "33.png"
    time_ns = path.stat().st_mtime_ns
    os.utime(path, ns=(time_ns, time_ns + 1_000_000_000))
    assert digest(at=tmp_path / "moved") != one
    os.utime(path, ns=(time_ns, time_ns))
    assert digest(at=tmp_path / "moved") == one
    path.write_bytes(path.read_bytes() + b"x")
    os.utime(path, ns=(time_ns, time_ns))
    assert digest(at=tmp_path / "moved") != one


# bad input


@pytest.mark.parametrize("options, message", [
    (dict(methods=["tsvm"]), "unknown method 'tsvm'; known: 'zero_shot'"), (dict(grid=[]), "grid of alpha is empty"), (dict(points=0), "grid of alpha is empty"),
    (dict(points=2.5), "grid of alpha is empty"), (dict(grid=[.5, float("nan")]), "not finite"), (dict(alpha="best"), "unknown alpha 'best'; known: 'validation', 'default'"),
    (dict(alpha=float("inf")), "finite number, got inf"), (dict(alpha=1., grid=[.5]), "a grid of scales is for alpha='validation'"), (dict(ranks=[0]), "rank must be at least 1"),
    (dict(options={"tsvm": {}}), "unknown method in options 'tsvm'"), (dict(options={"ties": {"densty": 3}}), "unknown option of ties 'densty'; known: 'density'"),
    (dict(options={"zero_shot": {"rank": 3}}), "unknown option of zero_shot 'rank'"), (dict(options={"finetuned": {"rank": 3}}), "unknown option of finetuned 'rank'"), (dict(options={"tall_masks": {"lam": .3}}), "unknown option of tall_masks 'lam'"),
    (dict(options={"tsv_compress": {"ranks": 3}}), "unknown option of tsv_compress 'ranks'; known: 'rank', 'ratio'"), (dict(options={"magnitude_masks": {"dense": 3}}), "unknown option of magnitude_masks"),
    (dict(options={"knots_ties": {"base": len}}), "option 'base' of knots_ties is <built-in function len>, which cannot be part of a record")])
def test_bad_options_are_noticed_before_anything_is_written(world, tmp_path, options, message):
    calls = count_calls(world)
    with pytest.raises(ValueError, match=message): evaluate_suite(world, out=tmp_path / "out", progress=False, **options)
    assert not calls and not (tmp_path / "out").exists()


def test_tasks_without_images(world):
    test_only = {k: v for k, v in world.data.items() if k[1] == "test"}
    with pytest.raises(ValueError, match="task 'ant' has no val images; add some, or pass alpha='default'"): evaluate_suite(replace(world, data=test_only), progress=False)
    assert evaluate_suite(replace(world, data=test_only), alpha="default", progress=False)["methods"]["tsv"]
    for empty in (TensorDataset(torch.zeros(0, 3, 2, 2), torch.zeros(0, dtype=torch.int64)), (torch.zeros(0, 3, 2, 2), torch.zeros(0, dtype=torch.int64))):
        with pytest.raises(ValueError, match="task 'cow' has no test images"): evaluate_suite(replace(world, data=world.data | {("cow", "test"): empty}), progress=False)


def test_a_tower_that_is_always_wrong_is_named(world):
    images, _ = world.data["bee", "test"]
    world.encoder.load_state(world.finetuned["bee"])
    wrong = ((world.encoder(images) @ world.heads["bee"].T).argmax(1) + 1) % CLASSES
    with pytest.raises(ValueError, match="no fine-tuned accuracy above zero for .'bee'"): evaluate_suite(replace(world, data=world.data | {("bee", "test"): (images, wrong)}), ["tsv"], progress=False)


# the table


def test_table_by_hand():
    def row(title, value, scale, a, b): return dict(title=title, scale=scale, value=value, absolute=dict(a), normalized={}, mean_absolute=b, mean_normalized=b / .8, seconds=dict(prepare=1., val=2.5, test=.25))
    tasks = {f"a_long_task_name_{i}": i / 20 for i in range(20)}
    results = dict(options=dict(tasks=list(tasks)), methods=dict(x=row("A method with a title that is far too long for it", dict.fromkeys(tasks, .1), "alpha", tasks, .4), y=row("masks", {t: .2 + i / 100 for i, t in enumerate(tasks)}, "lambda", tasks, .8)),
                   ranks={"16": row("TSV-C", dict.fromkeys(tasks, 1.), None, tasks, .2)})
    for text in (suite_table(results), suite_table(results, per_task=True)):
        cells = [line.split() for line in text.splitlines()]
        assert max(map(len, text.splitlines())) <= 80
        assert ["masks", "80.0", "100.0", "0.2-0.39", "3.8"] in cells and ["TSV-C,", "rank", "16", "20.0", "25.0", "3.8"] in cells
        assert cells[2][-4:] == ["40.0", "50.0", "0.1", "3.8"]
    assert [line.split()[-1] for line in text.splitlines() if line.startswith("masks")][1:] == ["25.0", "55.0", "85.0", "95.0"]
