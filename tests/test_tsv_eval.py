"""tsv_eval end to end: the paper's layout of checkpoints and data sets on a tiny model, the command line, and interruptions."""
import json
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from tsv_nb.task_vectors import apply_task_vector, task_arithmetic
from tsv_nb.vision.clip import ImageEncoder, image_state, zeroshot_head
from tsv_nb.vision.command import run_eval, tsv_eval
from tsv_nb.vision.datasets import PAPER_TASKS, load_task
from tsv_nb.vision.evaluate import accuracy, image_batches
from tsv_nb.vision.finetune import finetune
from tsv_nb.vision.paper_world import KeptImages, LazyTowers, paper_world, split_preprocess
from tsv_nb.vision.sources import open_base
from tsv_nb.vision.suite import results_path

NAMES = ["MNIST", "EuroSAT"]
CONFIG = dict(embed_dim=32, vision_cfg=dict(image_size=32, layers=1, width=32, patch_size=16, head_width=16), text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1))


def paint(root, name, light):
    "Image folders: hue is the class; sizes, shapes and modes vary."
    rng, task = np.random.default_rng(light), PAPER_TASKS[name]
    for split, n in (("train", 12), ("test", 5)):
        for c, label in enumerate(task.classnames):
            for i in range(n):
                pixels = np.array([25 * c, light, 255 - 25 * c]) + rng.integers(-20, 20, (20 + 7 * (i % 3), 31, 3))
                path = root / name / split / label / f"{i:02d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert("RGBA" if i == 1 else "P" if i == 2 else "RGB").save(path)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "Weights of a tiny CLIP, checkpoints in the published layout and format, two data sets."
    logging.disable(logging.WARNING)
    home = tmp_path_factory.mktemp("paper")
    (home / "tiny-eval.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(home / "tiny-eval.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tiny-eval").state_dict(), home / "weights.pt")
    clip, tokenizer, transforms = open_base("tiny-eval", str(home / "weights.pt"))
    base = image_state(clip)
    def publish(state, task, kind):
        path = home / "checkpoints" / "tiny-eval" / f"{task}Val" / f"nonlinear_{kind}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = {f"model.{k}": v for k, v in clip.state_dict().items() if not k.startswith("visual.")}
        torch.save(text | {f"model.visual.{k}": v for k, v in state.items()}, path)
    publish(base, "MNIST", "zeroshot")
    for name, light in zip(NAMES, (50, 200)):
        paint(home / "data", name, light)
        images, labels = next(iter(DataLoader(load_task(name, "train", home / "data", transforms["val"]), 1000)))
        head = zeroshot_head(clip, tokenizer, PAPER_TASKS[name].classnames, PAPER_TASKS[name].templates)
        publish(finetune(base, head, images, labels, model=clip, logit_scale=100., steps=60), name, "finetuned")
    yield home
    logging.disable(logging.NOTSET)


def options(home, **more):
    return dict(model="tiny-eval", tasks=",".join(NAMES), pretrained=str(home / "weights.pt"), checkpoints=str(home / "checkpoints"), data=str(home / "data")) | more


def words(**options):
    "The options as a user types them."
    return [part for k, v in options.items() for part in ([f"--{k.replace('_', '-')}"] if v is True else [f"--{k.replace('_', '-')}", str(v)])]


FEW = dict(methods="zero_shot,task_arithmetic,tsv_compress,finetuned", points=2)


def strip(results):
    copy = json.loads(json.dumps(results))
    for group in ("methods", "ranks"):
        for outcome in copy[group].values(): outcome.pop("seconds")
    return copy


def test_the_papers_layout_end_to_end(home, tmp_path, capsys):
    tsv_eval(words(**options(home, **FEW), ranks="2", out=tmp_path, per_task=True))
    shown = capsys.readouterr()
    path, = tmp_path.glob("tiny-eval-2-*.json")
    results = json.loads(path.read_text())
    for text in ("Task Arithmetic", "TSV-C, rank 2", "MNIST", "EuroSAT", str(path)): assert text in shown.out
    assert max(map(len, shown.out.replace(str(path), "").splitlines())) <= 80
    clip, tokenizer, transforms = open_base("tiny-eval", str(home / "weights.pt"))
    encoder, base = ImageEncoder(clip), image_state(clip)
    tuned = {t: {k.removeprefix("model.visual."): v for k, v in torch.load(home / f"checkpoints/tiny-eval/{t}Val/nonlinear_finetuned.pt").items() if "visual" in k} for t in NAMES}
    vectors = {t: {k: s[k] - base[k] for k in base} for t, s in tuned.items()}
    alpha = results["methods"]["task_arithmetic"]["value"]["MNIST"]
    merged = apply_task_vector(base, task_arithmetic(vectors), alpha)
    heads = {t: zeroshot_head(clip, tokenizer, PAPER_TASKS[t].classnames, PAPER_TASKS[t].templates) for t in NAMES}
    for t in NAMES:
        whole = next(iter(DataLoader(load_task(t, "test", home / "data", transforms["val"]), 1000))) # open_clip's own preprocessing
        for name, state in (("zero_shot", base), ("finetuned", tuned[t]), ("task_arithmetic", merged)):
            assert results["methods"][name]["absolute"][t] == accuracy(encoder.load_state(state), heads[t], *whole)
    assert results["methods"]["finetuned"]["mean_absolute"] > .5 > .3 > results["methods"]["zero_shot"]["mean_absolute"] # each tower got its own data


def test_where_images_are_kept_makes_no_difference(home, tmp_path):
    "In memory, in files, decoded every time, decoded by workers; and a second run decodes and encodes nothing."
    runs = {}
    for name, more in dict(memory=dict(memory=1.), files=dict(cache=str(tmp_path / "images")), none=dict(memory=0.), again=dict(cache=str(tmp_path / "images")), workers=dict(memory=0., workers=1)).items():
        few = FEW if name != "workers" else dict(methods="zero_shot,finetuned", alpha="default")
        runs[name], _ = run_eval(**options(home, **few, **more), out=str(tmp_path / name), progress=False)
    for name in ("files", "none", "again"): assert strip(runs[name])["methods"] == strip(runs["memory"])["methods"], name
    assert runs["workers"]["methods"]["finetuned"]["absolute"] == runs["memory"]["methods"]["finetuned"]["absolute"]
    kept = sorted((tmp_path / "images").iterdir())
    assert [p.name.rsplit("-", 1)[0] for p in kept] == ["EuroSAT-test", "EuroSAT-val", "MNIST-test", "MNIST-val"]
    assert all(p.stat().st_size == n * (8 + 3 * 32 * 32) for p, n in zip(kept, (50, 12, 50, 12)))


def test_towers_are_read_when_they_are_needed(home, monkeypatch):
    from tsv_nb.vision import paper_world as module
    read, real = [], module.load_tower
    monkeypatch.setattr(module, "load_tower", lambda path: read.append(Path(path).parent.name) or real(path))
    world = paper_world("tiny-eval", NAMES, home / "checkpoints", home / "data", str(home / "weights.pt"))
    assert len(read) == 1 and isinstance(world.finetuned, LazyTowers) and set(world.finetuned) == set(NAMES) # the base alone
    world.vectors["MNIST"]["conv1.weight"]
    assert len(read) == 1
    world.finetuned["MNIST"]
    assert read[1:] == ["MNISTVal"]


def test_bytes_and_normalization_give_the_bits_of_open_clip():
    for size in (32, 224):
        whole = open_clip.image_transform(size, is_train=False)
        to_bytes, finish = split_preprocess(whole)
        images = [Image.fromarray(np.random.default_rng(i).integers(0, 256, (40 + 30 * i, 61, 3), np.uint8)).convert(mode) for i, mode in enumerate(("RGB", "L", "P", "RGBA", "CMYK"))]
        stack = torch.stack([to_bytes(image) for image in images])
        assert stack.dtype == torch.uint8 and torch.equal(finish(stack), torch.stack([whole(image) for image in images]))
    plain = lambda image: image
    assert split_preprocess(plain)[0] is plain and torch.equal(split_preprocess(plain)[1](torch.ones(2)), torch.ones(2))
    train = open_clip.image_transform(32, is_train=True)
    assert split_preprocess(train)[0] is not train # also ends in ToTensor and Normalize


class Numbers(Dataset):
    "Images that count how often they are decoded."
    def __init__(self, n=11, dtype=torch.uint8): self.n, self.dtype, self.seen = n, dtype, 0
    def __len__(self): return self.n
    def __getitem__(self, i): self.seen += 1; return torch.full((3, 2, 2), i, dtype=self.dtype), i % 4


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("path", [None, "images"])
def test_kept_images(tmp_path, path, dtype):
    source = Numbers(dtype=dtype)
    kept = KeptImages(source, lambda x: x.float() + 1, path and tmp_path / path)
    def check(kept, batch):
        x, y = (torch.cat(parts) for parts in zip(*image_batches(kept, batch)))
        assert x[:, 0, 0, 0].tolist() == list(range(1, 12)) and y.tolist() == [i % 4 for i in range(11)] and x.dtype == torch.float32 and y.dtype == torch.int64
    part = image_batches(kept, 4)
    next(part)
    part.close() # an interrupted pass
    assert not list(tmp_path.iterdir())
    seen = source.seen
    check(kept, 4)
    assert source.seen == seen + 11 # it did not count as a pass
    seen = source.seen
    for batch in (3, 11, 50): check(kept, batch)
    assert source.seen == seen
    assert kept[2][0].flatten()[0] == 3 and len(kept) == 11
    assert sorted(p.name for p in tmp_path.iterdir()) == ([path] if path else [])


def test_kept_files_are_used_checked_and_made_again(tmp_path):
    first, second = Numbers(), Numbers()
    list(image_batches(KeptImages(first, torch.Tensor.float, tmp_path / "a"), 4))
    good = (tmp_path / "a").read_bytes()
    pairs = list(image_batches(KeptImages(second, torch.Tensor.float, tmp_path / "a"), 4))
    assert second.seen == 1 and torch.cat([y for _, y in pairs]).tolist() == [i % 4 for i in range(11)] # one, for its shape
    for bad in (good[:-1], b"", good + b"x"):
        (tmp_path / "a").write_bytes(bad)
        again = Numbers()
        list(image_batches(KeptImages(again, torch.Tensor.float, tmp_path / "a"), 4))
        assert again.seen >= 11 and (tmp_path / "a").read_bytes() == good
    left, fresh = tmp_path / ".b.1.part", tmp_path / ".b.2.part"
    for part in (left, fresh): part.write_bytes(b"left by a run that was killed")
    os.utime(left, (time.time() - 2 * 24 * 3600,) * 2)
    list(image_batches(KeptImages(Numbers(), torch.Tensor.float, tmp_path / "b"), 4))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".b.2.part", "a", "b"] # the fresh one may be another process's
    fresh.unlink()
    assert (tmp_path / "b").read_bytes() == good
    every = Numbers()
    for _ in range(2): list(image_batches(KeptImages(every, torch.Tensor.float, tmp_path / "c", keep=False), 4))
    assert every.seen == 22 and not (tmp_path / "c").exists()


def test_two_passes_at_once_share_a_folder(tmp_path):
    "Each fills a file of its own: whichever ends first, what is published is complete."
    def kept(): return KeptImages(Numbers(), torch.Tensor.float, tmp_path / "a")
    list(image_batches(kept(), 4))
    good = (tmp_path / "a").read_bytes()
    (tmp_path / "a").unlink()
    first, second = (image_batches(kept(), 4) for _ in range(2))
    next(first), next(first), next(second)
    list(first)
    assert (tmp_path / "a").read_bytes() == good
    list(second)
    assert [p.name for p in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_bytes() == good


def test_a_pass_that_fails_leaves_nothing(tmp_path):
    class Broken(Numbers):
        def __getitem__(self, i):
            if i == 7: raise ValueError("this image cannot be read")
            return super().__getitem__(i)
    with pytest.raises(ValueError, match="cannot be read"): list(image_batches(KeptImages(Broken(), torch.Tensor.float, tmp_path / "a"), 4))
    assert not list(tmp_path.iterdir())


# bad input


def failure(capsys, *args):
    with pytest.raises(SystemExit) as e: tsv_eval([str(a) for a in args])
    return str(e.value)


@pytest.mark.parametrize("args, message", [
    (["--methods", "tsvm"], "tsv_eval: unknown method 'tsvm'; known: 'zero_shot'"), (["--model", "ViT-B-23"], "unknown model 'ViT-B-23'; did you mean 'ViT-B-32'"),
    (["--model", "ViT-B-32", "--tasks", "SVNH"], "unknown data set 'SVNH'; did you mean 'SVHN'"), (["--tasks", "runes"], "unknown task 'runes'; known: 'greek'"),
    (["--tasks", "21"], "tsv_eval: tasks must be between 1 and 20, or names with commas between them, got 21"), (["--tasks", "0"], "tsv_eval: tasks must be between 1 and 20"), (["--tasks", ","], "at least one task"), (["--grid", ","], "grid of alpha is empty"), (["--points", "0"], "grid of alpha is empty"),
    (["--methods", ","], "no method is asked for"), (["--alpha", "best"], "unknown alpha"), (["--ranks", "1.5"], "ranks must be whole numbers"), (["--grid", "a"], "grid must be numbers"), (["--device", "meta"], "device 'meta' cannot be used"), (["--device", "abacus"], "device 'abacus' cannot be used"), (["--batch", "0"], "batch must be at least 1"),
    (["--model", "ViT-B-32", "--checkpoints", "nowhere"], "9 checkpoints missing in 'nowhere")])
def test_bad_options(tmp_path, capsys, args, message):
    assert message in failure(capsys, *args, "--out", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.json")) if (tmp_path / "out").exists() else True


def test_results_folder_that_is_a_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tsv_nb.vision.command.open_world", lambda *_, **__: pytest.fail("the world was opened first"))
    (tmp_path / "file").write_text("mine")
    assert "results cannot be written" in failure(capsys, "--out", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_what_can_be_wrong_with_the_papers_files(home, tmp_path, capsys):
    copy = tmp_path / "home"
    shutil.copytree(home, copy)
    run = words(**options(copy, **FEW), out=tmp_path / "out")
    image = copy / "data/MNIST/test" / PAPER_TASKS["MNIST"].classnames[3] / "01.png"
    good = image.read_bytes()
    image.write_bytes(good[:40])
    assert str(image) in (text := failure(capsys, *run)) and "cannot be read" in text
    assert str(image) in failure(capsys, *run, "--workers", 1)
    image.write_bytes(good)
    folder = image.parent
    folder.rename(tmp_path / "away")
    assert "9 classes, but the head has 10" in failure(capsys, *run)
    (tmp_path / "away").rename(folder)
    tower = copy / "checkpoints/tiny-eval/EuroSATVal/nonlinear_finetuned.pt"
    shutil.copy(tower, tmp_path / "tower.pt")
    tower.write_bytes(tower.read_bytes()[:1000])
    assert str(tower) in failure(capsys, *run)
    state = torch.load(tmp_path / "tower.pt")
    torch.save({k: v[..., :16] if k == "model.visual.proj" else v for k, v in state.items()}, tower)
    assert "proj" in failure(capsys, *run)
    shutil.copy(tmp_path / "tower.pt", tower)
    (copy / "data/MNIST").rename(tmp_path / "MNIST")
    assert "MNIST: no train images" in failure(capsys, *run)
    (tmp_path / "MNIST").rename(copy / "data/MNIST")
    tsv_eval(run) # everything is in order again


# the command as a process


FORK = multiprocessing.get_context("forkserver" if sys.platform != "win32" else "spawn")
if hasattr(FORK, "set_forkserver_preload"): FORK.set_forkserver_preload(["tsv_nb.vision.suite", "tsv_nb.vision.command", "open_clip", "matplotlib"])
GLYPHS = dict(tasks="1", methods="task_arithmetic,finetuned", points=8)


def run_command(out, log, more=()):
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(log, "w", encoding="utf-8", buffering=1)
    tsv_eval([*words(**GLYPHS), "--out", str(out), *more])


def start(folder, stop_at=None, kill=None):
    "Run the command in a process; send it a signal when the file of records has so many lines. Its exit code and what it printed."
    process = FORK.Process(target=run_command, args=(folder / "out", folder / "log"))
    process.start()
    while process.is_alive() and kill:
        path = folder / "out" / "records.jsonl"
        if path.exists() and path.read_bytes().count(b"\n") >= stop_at:
            subprocess.run(["kill", f"-{kill}", str(process.pid)], check=True)
            break
        time.sleep(.005)
    process.join()
    return process.exitcode, (folder / "log").read_text()


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
def test_interrupted_and_killed_the_command_ends_with_the_same_file(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    code, text = start(whole)
    assert code == 0 and "Task Arithmetic" in text and "Written to" in text
    code, text = start(cut, 3, signal.SIGINT)
    assert code == 130 and "tsv_eval: stopped" in text and "records.jsonl" in text and "Traceback" not in text
    known = (cut / "out/records.jsonl").read_bytes()
    assert not list((cut / "out").glob("*.json"))
    code, _ = start(cut, known.count(b"\n") + 2, signal.SIGKILL)
    assert code == -signal.SIGKILL and (cut / "out/records.jsonl").read_bytes().startswith(known)
    code, text = start(cut)
    assert code == 0 and "Task Arithmetic" in text
    (a,), (b,) = ((folder / "out").glob("*.json") for folder in (whole, cut))
    assert a.name == b.name and strip(json.loads(a.read_text())) == strip(json.loads(b.read_text()))
    keys = [json.loads(line)["key"] for line in (cut / "out/records.jsonl").read_text().splitlines()]
    assert len(keys) == len(set(keys)) # nothing was computed twice


def test_quiet_and_repeated(tmp_path, capsys):
    common = words(tasks="1", methods="zero_shot,finetuned", out=tmp_path)
    tsv_eval([*common, "--quiet"])
    assert capsys.readouterr() == ("", "")
    first = {p: p.read_bytes() for p in tmp_path.glob("*.json*")}
    tsv_eval([*common, "--per_task"]) # either spelling
    shown = capsys.readouterr().out
    assert "zero-shot" in shown and "greek" in shown and {p: p.read_bytes() for p in tmp_path.glob("*.json*")} == first


@pytest.mark.parametrize("force", [False, True])
def test_stopped_and_out_of_memory(tmp_path, capsys, monkeypatch, force):
    def fail(error):
        def run(**_): raise error
        monkeypatch.setattr("tsv_nb.vision.command.run_eval", run)
        with pytest.raises(SystemExit) as e: tsv_eval(["--out", str(tmp_path), "--batch", "512", *["--force"] * force])
        return e.value.code
    assert fail(KeyboardInterrupt()) == 130
    text = capsys.readouterr().err
    assert ("the same command, without --force, goes on" if force else "the same command goes on") in text
    assert "lower --batch, which is 512. (CUDA out of memory.)" in fail(torch.cuda.OutOfMemoryError("CUDA out of memory.\nmuch more"))


def test_help(capsys):
    with pytest.raises(SystemExit) as e: tsv_eval(["--help"])
    assert e.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in ("--tasks", "--checkpoints", "--cache", "Example:", "goes on where it was stopped", "up to each method's own limit", "for all but weight_average (always its own) and tall_masks (then lambda is .4)"): assert part in text


def test_the_same_file_from_python(tmp_path):
    results, path = run_eval(tasks="1", methods="zero_shot", alpha="1", out=str(tmp_path), progress=False)
    assert path == results_path(results, tmp_path) and json.loads(path.read_text()) == results and results["options"]["alpha"] == 1.
