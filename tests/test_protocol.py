"""Fine-tuning at the paper's scale: the recipe against NumPy, pieces, processes and interruptions against the plain run, and the console command."""
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from open_clip.model import CLIP
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from protocol_child import RECIPE, data, distance, tiny_clip
from tsv_nb.compress import save_atomic
from tsv_nb.vision import tasks as tasks_module, training
from tsv_nb.vision.checkpoints import load_tower
from tsv_nb.vision.clip import image_state, zeroshot_head
from tsv_nb.vision.datasets import PAPER_TASKS
from tsv_nb.vision.finetune import state_digest
from tsv_nb.vision.pretrain import _weights
from tsv_nb.vision.protocol import run_finetune, tsv_finetune
from tsv_nb.vision.resume import BatchPlan, SeededImages, load_progress, save_progress
from tsv_nb.vision.sources import glyph_suite, open_base, paper_suite, task_head
from tsv_nb.vision.tasks import finetune_suite, results_table
from tsv_nb.vision.training import PROTOCOL, dataset_accuracy, finetune_task, learning_rate, make_accelerator, protocol_options

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"


class Interrupted(Exception): pass


def stop_at(step):
    def on_step(done, loss, rate):
        if done == step: raise Interrupted
    return on_step


def child(*args, launch=(), **env):
    "A Python process that sees this source tree."
    path = os.pathsep.join(filter(None, [str(ROOT), str(TESTS), os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "80", **env}
    return subprocess.run([sys.executable, *launch, *map(str, args)], capture_output=True, text=True, timeout=300, env=env)


TWO = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --main_process_port 0 --num_machines 1 --mixed_precision no --dynamo_backend no".split()


# --- the recipe, by hand


class Linear(nn.Module):
    "The smallest 'CLIP': its tower is one matrix and a bias."
    def __init__(self, g):
        super().__init__()
        self.visual, self.logit_scale = nn.Linear(6, 4).double(), nn.Parameter(torch.tensor(math.log(7.)))
        for p in self.visual.parameters(): p.data = torch.randn(p.shape, generator=g, dtype=torch.double)


def by_hand(W, b, H, X, y, plan, lr, weight_decay, warmup, clip, smoothing, scale):
    "AdamW with everything written out, in NumPy: normalized features, scaled logits, smoothed labels, clipping, decay, schedule."
    theta, m, v = np.concatenate([W.ravel(), b]), 0., 0.
    for step in range(plan.steps):
        i = plan.images(step)[1]
        W, b = theta[:W.size].reshape(W.shape), theta[W.size:]
        f = X[i] @ W.T + b
        length = np.sqrt((f**2).sum(1, keepdims=True))
        u = f / length
        z = scale * u @ H.T
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        target = np.eye(len(H))[y[i]] * (1 - smoothing) + smoothing / len(H)
        du = scale * (p - target) @ H / len(i)
        df = (du - u * (du * u).sum(1, keepdims=True)) / length
        g = np.concatenate([(df.T @ X[i]).ravel(), df.sum(0)])
        g = g * min(1, clip / (np.sqrt((g**2).sum()) + 1e-6))
        if step < warmup: rate = lr * (step + 1) / warmup
        else: rate = lr * .5 * (1 + np.cos(np.pi * (step - warmup) / (plan.steps - warmup)))
        m, v = .9 * m + .1 * g, .999 * v + .001 * g**2
        theta = theta * (1 - rate * weight_decay) - rate * (m / (1 - .9**(step + 1))) / (np.sqrt(v / (1 - .999**(step + 1))) + 1e-8)
    return theta


@pytest.mark.parametrize("change", [{}, dict(weight_decay=.5), dict(label_smoothing=.1), dict(clip=.05), dict(warmup=0), dict(warmup=100), dict(logit_scale=2.), dict(batch=100)], ids=str)
def test_against_numpy(g, change):
    model, H = Linear(g), F.normalize(torch.randn(3, 4, generator=g, dtype=torch.double), dim=1)
    X, y = torch.randn(21, 6, generator=g, dtype=torch.double), torch.arange(21) % 3
    o = dict(lr=.05, weight_decay=.1, warmup=4, clip=1., label_smoothing=0., batch=8) | change
    tower = finetune_task(model, H, TensorDataset(X, y), epochs=4, accumulate=2, **o)
    ours = torch.cat([tower["weight"].flatten(), tower["bias"]]).numpy()
    plan = BatchPlan(21, o["batch"], 4, seed=0)
    expected = by_hand(*(t.detach().numpy() for t in (model.visual.weight, model.visual.bias, H, X, y)), plan, o["lr"], o["weight_decay"], o["warmup"], o["clip"],
                       o["label_smoothing"], o.get("logit_scale", 7.))
    start = torch.cat([model.visual.weight.flatten(), model.visual.bias]).detach().numpy()
    assert np.abs(ours - start).max() > .01
    np.testing.assert_allclose(ours, expected, atol=1e-6 * np.abs(expected - start).max()) # the head is scaled in double, the weights of images in double


def test_the_published_values():
    assert {k: PROTOCOL[k] for k in ("lr", "weight_decay", "warmup", "batch", "clip", "label_smoothing")} == dict(lr=1e-5, weight_decay=.1, warmup=500, batch=128, clip=1., label_smoothing=0.)
    assert BatchPlan(54_000, 128, PAPER_TASKS["MNIST"].epochs).steps == 2110
    rates = [learning_rate(s, 2110) for s in range(2110)]
    assert max(rates) == rates[499] == rates[500] == 1e-5 and rates[-1] < 1e-10 and all(r > 0 for r in rates)


def test_the_model_is_left_as_it_is_and_frozen_parts_too():
    model, head, images = data()
    model.visual.requires_grad_(False) # as some people hand it over
    before, h = state_digest(model.state_dict()), head.clone()
    tower = finetune_task(model, head, images, 1, **RECIPE)
    assert state_digest(model.state_dict()) == before and torch.equal(head, h) and not any(p.requires_grad for p in model.visual.parameters())
    assert not any(p.grad is not None for p in model.parameters()) and all(not torch.equal(tower[k], v) for k, v in image_state(model).items())


def test_nothing_of_a_task_stays_in_the_accelerator():
    accelerator, (model, head, images) = make_accelerator(), data()
    finetune_task(model, head, images, 1, accelerator=accelerator, **RECIPE)
    assert not accelerator._models and not accelerator._optimizers


# --- the plan of batches


@pytest.mark.parametrize("n, batch, parts", [(10, 4, 1), (10, 4, 3), (10, 4, 8), (1, 128, 4), (300, 128, 6), (128, 128, 128)])
def test_pieces_are_the_batch(n, batch, parts):
    plan = BatchPlan(n, batch, epochs=2, seed=3)
    for epoch in range(2):
        seen = Counter()
        for step in range(epoch * plan.per_epoch, (epoch + 1) * plan.per_epoch):
            pieces = plan.pieces(step, parts)
            assert len(pieces) == parts and all(pieces) and max(map(len, pieces)) <= math.ceil(batch / parts)
            assert sum(w for p in pieces for _, _, w in p) == pytest.approx(1) and {e for p in pieces for e, _, _ in p} == {epoch}
            seen.update(i for p in pieces for _, i, w in p if w)
        assert seen == Counter(range(n))


def test_orders_differ_by_seed_and_epoch():
    orders = {(s, e): tuple(BatchPlan(50, 50, 4, seed=s).images(e)[1]) for s in range(4) for e in range(4)}
    assert len(set(orders.values())) == 16


def test_augmentation_is_a_function_of_the_position():
    class Random(Dataset):
        def __len__(self): return 3
        def __getitem__(self, i): return torch.tensor([torch.rand(()).item(), np.random.rand(), random.random()]), i
    images = SeededImages(Random(), seed=5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    drawn = {(e, i): images[e, i, 1.][0] for e in range(2) for i in range(3)}
    for key in reversed(drawn): assert torch.equal(images[(*key, 1.)][0], drawn[key])
    assert len({x.item() for v in drawn.values() for x in v}) == 18
    assert torch.equal(SeededImages(Random(), seed=6)[0, 0, 1.][0], drawn[0, 0]) is False
    assert torch.equal(states[0], torch.get_rng_state()) and (states[1] == np.random.get_state()[1]).all() and states[2] == random.getstate()


# --- pieces, processes, interruptions


@pytest.mark.parametrize("accumulate", [3, 16])
def test_pieces_give_the_tower_of_the_batch(accumulate):
    model, head, images = data(torch.double)
    whole, cut = (finetune_task(model, head, images, 2, accumulate=a, **RECIPE) for a in (1, accumulate))
    assert distance(image_state(model), whole, cut) < 1e-8


class Noisy(TensorDataset):
    def __getitem__(self, i): return self.tensors[0][i] + .5 * torch.randn(3, 1, 1), self.tensors[1][i]


def forgetful(model):
    "The model with dropout in its tower."
    model.visual.ln_post = nn.Sequential(model.visual.ln_post, nn.Dropout(.3))
    return model


@pytest.mark.parametrize("steps", [[1], [4], [3, 5, 6]], ids=str)
def test_resumed_is_bit_identical(tmp_path, steps):
    model, head, images = data()
    model, images = forgetful(model), Noisy(*images.tensors)
    run = lambda **kw: finetune_task(model, head, images, 2, accumulate=2, **RECIPE, **kw)
    torch.manual_seed(0)
    whole = run()
    for step in steps:
        torch.rand(step) # the state of the global generator must not matter
        with pytest.raises(Interrupted): run(checkpoint=tmp_path / "c.pt", checkpoint_every=2, on_step=stop_at(step))
    resumed = run(checkpoint=tmp_path / "c.pt", checkpoint_every=2)
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
    assert distance(image_state(model), whole, run(seed=1)) > .1 # a test that could not fail would also pass here


def test_training_does_not_disturb_the_callers_random_numbers():
    model, head, images = data()
    state = torch.get_rng_state()
    finetune_task(model, head, images, 1, **RECIPE)
    assert torch.equal(state, torch.get_rng_state())


def test_when_checkpoints_are_written(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(training, "save_progress", lambda path, facts, **p: saved.append(p["step"]))
    model, head, images = data() # 43 images: 3 steps per epoch
    finetune_task(model, head, images, 3, checkpoint=tmp_path / "c.pt", checkpoint_every=5, **RECIPE)
    assert saved == [3, 6, 9]
    saved.clear()
    finetune_task(model, head, images, 3, checkpoint=tmp_path / "c.pt", checkpoint_every=2, **RECIPE)
    assert saved == [2, 3, 5, 6, 8, 9]


@pytest.mark.parametrize("change", [dict(lr=1e-3), dict(weight_decay=0.), dict(warmup=3), dict(batch=8), dict(clip=2.), dict(label_smoothing=.1), dict(logit_scale=3.), dict(seed=1)], ids=str)
def test_a_changed_option_is_named(tmp_path, change):
    model, head, images = data()
    run = lambda **kw: finetune_task(model, head, images, 1, checkpoint=tmp_path / "c.pt", **{**RECIPE, **kw})
    tower, content = run(), (tmp_path / "c.pt").read_bytes()
    (name, value), = change.items()
    with pytest.raises(ValueError, match=rf"{name} was .* and is now {value!r}\. Repeat the options"): run(**change)
    assert (tmp_path / "c.pt").read_bytes() == content
    again = run(accumulate=3, checkpoint_every=1, workers=1) # how the work is done may change
    assert all(torch.equal(tower[k], again[k]) for k in tower)


def test_other_data_head_epochs_or_facts_are_named(tmp_path):
    model, head, images = data()
    run = lambda model=model, head=head, images=images, epochs=1, **kw: finetune_task(model, head, images, epochs, checkpoint=tmp_path / "c.pt", **RECIPE, **kw)
    run(facts={"augment": "train"})
    for change, name in (dict(epochs=2), "epochs"), (dict(head=-head), "head"), (dict(model=tiny_clip(3)), "base"), (dict(images=Subset(images, range(20))), "images"), (dict(facts={"augment": "val"}), "augment"):
        with pytest.raises(ValueError, match=rf"{name} was .* and is now"): run(**{"facts": {"augment": "train"}, **change})


@pytest.fixture
def fresh_accelerator():
    "Precision is set once per process; these tests set another one and put it back."
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_fp16_with_its_loss_scale(fresh_accelerator, tmp_path):
    "accelerate allows fp16 on GPUs only; PyTorch has it on the CPU too, so its settings are made by hand. The first scale is too large: steps are left out until it fits."
    model, head, images = data()
    scales, losses = [], []

    def run(**kw):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = make_accelerator()
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.**20, growth_interval=2)
        note = lambda d, loss, r: (scales.append(accelerator.scaler.get_scale()), losses.append(loss))
        return finetune_task(model, head, images, 8, accelerator=accelerator, **RECIPE, **{"on_step": note, **kw})
    whole = run()
    assert scales[:4] == [2.**19, 2.**18, 2.**17, 2.**16] and scales[-1] > min(scales) and losses[-1] < losses[0] / 2
    with pytest.raises(Interrupted): run(checkpoint=tmp_path / "c.pt", checkpoint_every=5, on_step=stop_at(14))
    saved = torch.load(tmp_path / "c.pt", weights_only=True)
    assert saved["step"] == 12 and saved["scaler"]["scale"] == scales[11]
    resumed = run(checkpoint=tmp_path / "c.pt")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole) and {v.dtype for v in whole.values()} == {torch.float32}
    with pytest.raises(ValueError, match="mixed_precision was 'fp16' and is now 'no'"):
        AcceleratorState._reset_state(reset_partial_state=True)
        finetune_task(model, head, images, 8, checkpoint=tmp_path / "c.pt", **RECIPE)


def test_bf16_on_the_cpu(fresh_accelerator):
    model, head, images = data()
    losses, run = [], lambda accelerator: finetune_task(model, head, images, 8, accelerator=accelerator, on_step=lambda d, loss, r: losses.append(loss), **RECIPE)
    half, half_losses = run(make_accelerator("bf16")), losses.copy()
    AcceleratorState._reset_state(reset_partial_state=True)
    plain = run(make_accelerator())
    assert {v.dtype for v in half.values()} == {torch.float32} and half_losses[-1] < half_losses[0] / 2
    assert 1e-3 < distance(image_state(model), plain, half) < 1


def test_two_processes(tmp_path):
    "The same tower as in one process, also when stopped and started again, with a last batch of one image; and machines without a common folder are found out."
    done = child(TESTS / "protocol_child.py", tmp_path, launch=TWO, ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    model, head, images = data(torch.double, n=33)
    one = finetune_task(model, head, images, 2, **RECIPE)
    clipped = finetune_task(model, head, images, 2, clip=14., **RECIPE) # some steps are clipped and some are not: Adam hides a constant factor
    for rank in ranks:
        assert all(torch.equal(rank["clipped"][k], ranks[0]["clipped"][k]) for k in one)
        assert distance(image_state(model), clipped, rank["clipped"]) < 1e-8 < 1e-3 < distance(image_state(model), one, clipped)
        for run in ("whole", "pieces", "resumed"):
            assert all(torch.equal(rank[run][k], ranks[0][run][k]) for k in one), run
            assert distance(image_state(model), one, rank[run]) < 1e-8, run
        assert all(torch.equal(rank["whole"][k], rank["resumed"][k]) for k in one)
        assert rank["losses"] == pytest.approx(ranks[0]["losses"]) and rank["losses"][-1] < rank["losses"][0]
        assert rank["accuracy"] == pytest.approx(3 / 5)
        assert "step to start with: the processes disagree" in rank["error"] and "[0, 6]" in rank["error"]


def test_killed_at_any_moment(tmp_path):
    "SIGKILL while checkpoints are being written, one at every step: the next run continues from a complete one, to the same bits."
    code = "import sys, protocol_child as c; from tsv_nb.vision.training import finetune_task; m, h, x = c.data(); " \
           "finetune_task(m, h, x, 400, checkpoint=sys.argv[1], checkpoint_every=1, **c.RECIPE)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)]), "OMP_NUM_THREADS": "1"}
    path, steps = tmp_path / "c.pt", []
    for wait in (.13, .31):
        process = subprocess.Popen([sys.executable, "-c", code, str(path)], env=env)
        was, begin = path.stat().st_mtime_ns if path.exists() else None, time.time()
        while (not path.exists() or path.stat().st_mtime_ns == was) and time.time() < begin + 60: time.sleep(.01)
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        steps.append(torch.load(path, weights_only=True)["step"])
        assert {p.name for p in tmp_path.iterdir()} <= {"c.pt", ".c.pt.tmp"}
    assert 0 < steps[0] < steps[1] < 1200
    model, head, images = data()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seen = []
        with pytest.raises(Interrupted): finetune_task(model, head, images, 400, checkpoint=path, on_step=lambda d, loss, r: seen.append(d) or stop_at(steps[1] + 4)(d, loss, r), checkpoint_every=2, **RECIPE)
        with pytest.raises(Interrupted): finetune_task(model, head, images, 400, checkpoint=tmp_path / "d.pt", on_step=stop_at(steps[1] + 4), checkpoint_every=1, **RECIPE)
    finally: torch.set_num_threads(threads)
    assert seen[0] == steps[1] + 1
    a, b = (torch.load(p, weights_only=True) for p in (path, tmp_path / "d.pt"))
    if a["step"] == b["step"]: assert all(torch.equal(a["tower"][k], b["tower"][k]) for k in a["tower"])
    assert a["step"] >= steps[1] + 2


# --- bad input


def test_checkpoint_that_wants_to_run_code(tmp_path):
    class Evil:
        def __reduce__(self): return (os.mkdir, (str(tmp_path / "ran"),))
    torch.save(dict(kind="tsv_nb fine-tuning in progress/1", facts={}, step=0, tower=Evil()), tmp_path / "c.pt")
    with pytest.raises(ValueError, match="damaged, or not a checkpoint"): load_progress(tmp_path / "c.pt", {})
    assert not (tmp_path / "ran").exists()


def test_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = save_progress(tmp_path / "c.pt", {}, step=1)
    monkeypatch.setattr(torch, "save", lambda obj, file: file.write(b"half") and (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError): save_progress(path, {}, step=2)
    monkeypatch.undo()
    assert load_progress(path, {})["step"] == 1


@pytest.mark.parametrize("options, message", [(dict(lr=0), "lr must be at least"), (dict(batch=0), "batch must be at least 1"), (dict(warmup=-1), "warmup must be at least 0"), (dict(weight_decay=-.1), "weight_decay"),
                                              (dict(label_smoothing=1.), "below 1"), (dict(accumulate=0), "accumulate"), (dict(lr=float("inf")), "lr"), (dict(lrr=1), "unknown option of the protocol 'lrr'; known: 'lr'")])
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message): protocol_options(options)


@pytest.mark.parametrize("label", [4, 400, -1])
def test_labels_out_of_range(label):
    model, head, images = data()
    labels = images.tensors[1].clone()
    labels[17] = label
    for call in (lambda x: finetune_task(model, head, x, 1, "pets", **RECIPE), lambda x: dataset_accuracy(model.visual, head, x, "pets")):
        with pytest.raises(ValueError, match=rf"task 'pets': an image has label {label}, but the head has 4 classes \(0 to 3\)"): call(TensorDataset(images.tensors[0], labels))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite(value):
    model, head, images = data()
    x = images.tensors[0].clone()
    x[30] = value
    with pytest.raises(ValueError, match="task 'pets': the loss is nan.*lower lr"): finetune_task(model, head, TensorDataset(x, images.tensors[1]), 1, "pets", **RECIPE)


def test_a_gradient_that_is_not_finite():
    "A finite loss with a gradient of NaN must not end up in the weights."
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))
        def forward(self, x): return x[:, :8] + (self.w.abs().sqrt() * 0)
    model, head, _ = data()
    model.visual = Root()
    with pytest.raises(ValueError, match="gradient's norm nan"): finetune_task(model, head, TensorDataset(torch.randn(8, 8), torch.arange(8) % 4), 1, **RECIPE)


def test_missing_extra(monkeypatch):
    monkeypatch.setattr(training, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"accelerate and tensorboard is missing; pip install 'tsv-nb\[data\]'"): make_accelerator(log_dir="x")


def test_sharded_training_is_refused(monkeypatch):
    from accelerate import Accelerator, DistributedType
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: DistributedType.FSDP))
    with pytest.raises(ValueError, match="accelerate is configured for FSDP"): make_accelerator()


# --- the console command


@pytest.fixture
def few(monkeypatch):
    "The small world with 40 images in each split."
    from tsv_nb.vision import sources
    whole = sources.task_images
    monkeypatch.setattr(sources, "task_images", lambda *args: tuple(t[:40] for t in whole(*args)))


def said(capsys, *args):
    "What the command prints, or the message with which it ends."
    try: tsv_finetune(list(map(str, args)))
    except SystemExit as e: return str(e)
    return capsys.readouterr().out


GLYPH = "--model glyph --epochs 1 --batch 16".split()


def test_command_writes_what_it_says(few, capsys, tmp_path):
    text = said(capsys, *GLYPH, "--tasks", "digits,mnist", "--out", tmp_path, "--log-dir", tmp_path / "log")
    folder = tmp_path / "glyph" / "digitsVal"
    assert [p.name for p in sorted(folder.iterdir())] == ["nonlinear_finetuned.safetensors", "nonlinear_zeroshot.safetensors"]
    tower, base = (load_file(folder / f"nonlinear_{k}.safetensors") for k in ("finetuned", "zeroshot"))
    assert state_digest(base) == state_digest(image_state(open_base("glyph")[0])) and all(not torch.equal(tower[k], base[k]) for k in base)
    with safe_open(folder / "nonlinear_finetuned.safetensors", "pt") as file: meta = file.metadata()
    options = json.loads(meta["options"])
    assert {k: options[k] for k in ("model", "pretrained", "augment", "lr", "epochs", "batch", "images", "classes", "seed", "mixed_precision")} == dict(
        model="glyph", pretrained="shipped", augment="train", lr=5e-4, epochs=1, batch=16, images=40, classes=10, seed=0, mixed_precision="no")
    suite, clip = glyph_suite("digits"), open_base("glyph")[0]
    head = load_file(tmp_path / "glyph" / "head_digitsVal.safetensors")["head"]
    clip.visual.load_state_dict(tower)
    after = dataset_accuracy(clip.visual, head, suite.images("digits", "val"))
    assert float(meta["validation_after"]) == after and torch.__version__.startswith(json.loads(meta["versions"])["torch"])
    row = next(line.split() for line in text.splitlines() if line.startswith("digits"))
    assert row == ["digits", f"{100 * float(meta['validation_before']):.1f}", f"{100 * after:.1f}"]
    assert max(map(len, text.splitlines())) < 80 and text.splitlines()[-1].startswith("mean")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    log = EventAccumulator(str(tmp_path / "log" / "tsv_finetune"))
    log.Reload()
    assert [e.step for e in log.Scalars("digits/loss")] == [1, 2, 3] and log.Scalars("mnist/learning rate")[0].value == pytest.approx(5e-5)


def test_done_is_skipped_and_changed_is_refused(few, capsys, tmp_path):
    args = [*GLYPH, "--tasks", "digits", "--out", tmp_path]
    said(capsys, *args)
    path = tmp_path / "glyph" / "digitsVal" / "nonlinear_finetuned.safetensors"
    content = path.read_bytes()
    assert "Done already, and skipped: digits." in said(capsys, *args) and path.read_bytes() == content
    for more, message in (["--lr", "1e-3"], "lr was 0.0005 and is now 0.001"), (["--epochs", "2"], "epochs was 1 and is now 2"), (["--seed", "1"], "seed was 0 and is now 1"), (["--augment", "val"], "augment was 'train' and is now 'val'"):
        text = said(capsys, *args, *more)
        assert text.startswith(f"tsv_finetune: {str(path)!r} is of another run: ") and message in text and "\n" not in text
    path.write_bytes(content[:1000])
    assert "is damaged" in said(capsys, *args)
    save_atomic({"w": torch.zeros(1)}, path)
    assert "?" in said(capsys, *args) and load_file(path).keys() == {"w"} # somebody else's


def test_a_leftover_checkpoint_of_other_options(few, capsys, tmp_path):
    path = save_progress(tmp_path / "glyph" / "digitsVal" / "checkpoint.pt", {"lr": 1.}, step=1)
    text = said(capsys, *GLYPH, "--tasks", "digits", "--out", tmp_path)
    assert "lr was 1.0 and is now 0.0005" in text and path.exists()


def test_all_data_is_opened_before_the_first_step(monkeypatch, tmp_path):
    suite, begun = glyph_suite("digits,mnist"), []
    def images(task, split):
        if (task, split) == ("mnist", "val"): raise FileNotFoundError("mnist: no images in /nowhere")
        return suite.images(task, split)
    monkeypatch.setattr(tasks_module, "_do", lambda *args: begun.append(args))
    with pytest.raises(FileNotFoundError, match="/nowhere"): finetune_suite(open_base("glyph")[:2], type(suite)(suite.names, suite.words, suite.epochs, images, suite.protocol), tmp_path / "glyph")
    assert not begun


def test_class_count_that_disagrees_with_the_head(few, tmp_path):
    suite = glyph_suite("digits")
    wrong = type(suite)(["digits"], lambda t: (suite.words(t)[0][:7], suite.words(t)[1]), suite.epochs, suite.images, suite.protocol)
    with pytest.raises(ValueError, match=r"task 'digits': an image has label [789], but the head has 7 classes \(0 to 6\)"): finetune_suite(open_base("glyph")[:2], wrong, tmp_path / "glyph")


@pytest.mark.parametrize("args, message", [
    (["--model", "ViT-B_32"], "unknown model 'ViT-B_32'; did you mean 'ViT-B-32'"), (["--model", "zzz"], "unknown model 'zzz'; known: glyph, "),
    (["--tasks", "mnits"], "did you mean 'MNIST'"), (["--tasks", "21"], "got 21"), ([*GLYPH, "--tasks", "0"], "there are 20 glyph tasks, got 0"), ([*GLYPH, "--tasks", "digit"], "did you mean 'digits' or"),
    (["--pretrained", "opnai"], "did you mean 'openai'"), (["--augment", "no"], "unknown augment 'no'"), ([*GLYPH, "--mixed_precision", "fp8"], "unknown mixed precision 'fp8'; known: 'no', 'fp16', 'bf16'"),
    ([*GLYPH, "--epochs", "0"], "epochs must be at least 1, got 0"), ([*GLYPH, "--pretrained", "nowhere.safetensors"], "no GlyphCLIP weights at 'nowhere.safetensors'"), ([*GLYPH, "--lr", "-1"], "lr must be at least"),
    ([*GLYPH, "--tasks", "digits,,digit,"], "unknown glyph task 'digit'"), ([*GLYPH, "--tasks", ","], "no glyph task in ','; give a number"),
    ([*GLYPH, "--log_dir", "/dev/null/x"], "--log_dir: '/dev/null' is no folder; name a folder")])
def test_bad_options(few, capsys, tmp_path, args, message):
    text = said(capsys, *args, "--out", tmp_path / "x", "--data", tmp_path)
    assert text.startswith("tsv_finetune: ") and message in text and not list(tmp_path.glob("x/**/*.safetensors"))


def test_no_fp16_without_a_gpu(fresh_accelerator, capsys, tmp_path):
    if torch.cuda.is_available(): pytest.skip("there is a GPU")
    # accelerate 1.15 would go on in float32 without a word
    assert "fp16 does not work on cpu; choose bf16 or no." in said(capsys, *GLYPH, "--tasks", "digits", "--mixed-precision", "fp16", "--out", tmp_path)


def test_ctrl_c(monkeypatch, capsys, tmp_path):
    from tsv_nb.vision import protocol
    def interrupt(*args): raise KeyboardInterrupt
    monkeypatch.setattr(protocol, "open_base", interrupt)
    for expected in "since there is no checkpoint yet", "The same command goes on from the last checkpoint.":
        with pytest.raises(SystemExit) as e: tsv_finetune(["--model", "glyph", "--out", str(tmp_path)])
        out, err = capsys.readouterr()
        assert e.value.code == 130 and out == "" and expected in err
        save_progress(tmp_path / "glyph" / "digitsVal" / "checkpoint.pt", {}, step=1)


def test_outline_names_the_launchers_trap(monkeypatch):
    options = protocol_options({})
    assert "Note" not in tasks_module._outline({}, [], options, make_accelerator())
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True"), monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    text = tasks_module._outline(dict.fromkeys(PAPER_TASKS), [], options, make_accelerator())
    assert "accelerate launch --multi_gpu" in text and max(map(len, text.splitlines())) < 80


def test_table():
    rows = {t: dict(before=i / 40, after=i / 20, done=i % 2 == 0) for i, t in enumerate(PAPER_TASKS)}
    lines = results_table(rows).splitlines()
    assert max(map(len, lines)) < 80 and len(lines) == 22 and lines[-1].split() == ["mean", "23.7", "47.5"] and lines[2].split() == ["DTD", "2.5", "5.0"]


@pytest.fixture(scope="module")
def small_arch(tmp_path_factory):
    "An open_clip architecture that is small, with weights in a file."
    folder = tmp_path_factory.mktemp("arch")
    vision, text = dict(image_size=32, layers=1, width=32, head_width=16, patch_size=8), dict(context_length=77, vocab_size=49408, width=16, heads=1, layers=1)
    (folder / "tsv-small.json").write_text(json.dumps(dict(embed_dim=16, vision_cfg=vision, text_cfg=text)))
    open_clip.add_model_config(folder / "tsv-small.json")
    torch.manual_seed(0)
    torch.save(open_clip.create_model("tsv-small").state_dict(), folder / "small.pt")
    return folder / "small.pt"


@pytest.fixture(scope="module")
def mnist_folder(tmp_path_factory):
    "Thirty images of three sizes in the layout of an image folder."
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for c in PAPER_TASKS["MNIST"].classnames:
        (root / "MNIST" / "train" / c).mkdir(parents=True)
        for i in range(3): Image.fromarray(rng.integers(0, 255, (28 + 4 * i, 28), dtype=np.uint8)).save(root / "MNIST" / "train" / c / f"{i}.png")
    return root


def test_paper_suite_from_local_files(small_arch, mnist_folder, capsys, tmp_path):
    "The path of the twenty data sets: an open_clip model, its transforms, the words of MNIST, an image folder, loading workers."
    args = ["--model", "tsv-small", "--pretrained", small_arch, "--tasks", "MNIST", "--data", mnist_folder, "--out", tmp_path, "--epochs", "2", "--workers", "1"]
    text = said(capsys, *args)
    assert "MNIST has 2 steps, all of them in the warm-up; its learning rate ends at\n  4.0e-08" in text or "ends at 4.0e-08" in text, text
    with safe_open(tmp_path / "tsv-small" / "MNISTVal" / "nonlinear_finetuned.safetensors", "pt") as file: options = json.loads(file.metadata()["options"])
    assert (options["images"], options["classes"], options["lr"], options["weight_decay"], options["warmup"], options["batch"], options["augment"]) == (27, 10, 1e-5, .1, 500, 128, "train")
    assert options["logit_scale"] == pytest.approx(open_base("tsv-small", str(small_arch))[0].logit_scale.exp().item())
    broken = mnist_folder / "MNIST" / "train" / "3" / "1.png"
    content = broken.read_bytes()
    broken.write_bytes(b"not an image")
    try: text = said(capsys, *args, "--epochs", "3", "--out", tmp_path / "again")
    finally: broken.write_bytes(content)
    assert str(broken) in text and text.startswith("tsv_finetune: ") and "Traceback" not in text


def test_transforms_of_the_paper_suite(small_arch, mnist_folder, tmp_path):
    clip, _, transforms = open_base("tsv-small", str(small_arch))
    assert "RandomResizedCrop(size=(32, 32), scale=(0.9, 1.0)" in str(transforms["train"]) and "CenterCrop" in str(transforms["val"])
    suite = paper_suite("MNIST", mnist_folder, transforms)
    train, val = (suite.images("MNIST", s) for s in ("train", "val"))
    assert (len(train), len(val)) == (27, 3) and not torch.equal(train[0][0], train[0][0]) and torch.equal(val[0][0], val[0][0])
    words = suite.words("MNIST")
    assert words == (PAPER_TASKS["MNIST"].classnames, PAPER_TASKS["MNIST"].templates) and suite.epochs("MNIST") == 5


def test_missing_data_set(small_arch, capsys, tmp_path):
    text = said(capsys, "--model", "tsv-small", "--pretrained", small_arch, "--tasks", "Cars", "--data", tmp_path, "--out", tmp_path)
    assert text.startswith("tsv_finetune: Cars: no train images") and str(tmp_path / "Cars") in text


def test_augment_val_has_no_crop(small_arch, mnist_folder, monkeypatch, tmp_path):
    from tsv_nb.vision import protocol
    seen = {}
    def spy(base, suite, *args, **kw):
        seen.update({s: torch.equal(suite.images("MNIST", s)[0][0], suite.images("MNIST", s)[0][0]) for s in ("train", "val")})
        return {}
    monkeypatch.setattr(protocol, "finetune_suite", spy)
    for augment, same in ("train", False), ("val", True):
        run_finetune("tsv-small", str(small_arch), "MNIST", str(mnist_folder), str(tmp_path), augment)
        assert seen == dict(train=same, val=True)


def test_help(capsys):
    with pytest.raises(SystemExit) as e: tsv_finetune(["--help"])
    text = capsys.readouterr().out
    assert e.value.code == 0 and all(o in text for o in ("--model", "--tasks", "--lr", "--accumulate", "--download"))


def test_as_a_module(tmp_path):
    done = child("-m", "tsv_nb.vision.protocol", *GLYPH[:4], "--tasks", "digits", "--checkpoint-every=2", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for part in (done.stdout, done.stderr) for line in part.replace("\r", "\n").splitlines()]
    assert max(map(len, lines)) < 80 and any("digits 1/1" in line and "7/7" in line for line in lines)
    assert (tmp_path / "glyph" / "digitsVal" / "nonlinear_finetuned.safetensors").exists() and not list(tmp_path.rglob("checkpoint.pt"))


# --- folders that hold something else

SHIPPED = _weights(None)


@pytest.fixture
def other_base(tmp_path):
    "The shipped weights, a little changed, in a file."
    with safe_open(SHIPPED, "pt") as file: meta = file.metadata()
    state = load_file(SHIPPED)
    return save_atomic(state | {"visual.proj": state["visual.proj"] * 1.01}, tmp_path / "other.safetensors", meta)


def test_one_folder_has_one_base(few, other_base, capsys, tmp_path):
    "Another base would make the task vectors of all tasks wrong, also where nothing has been finished yet."
    args = [*GLYPH, "--out", tmp_path / "out"]
    path = save_progress(tmp_path / "out" / "glyph" / "digitsVal" / "checkpoint.pt", {}, step=1)
    assert "is of another run" in said(capsys, *args, "--tasks", "digits") # stopped early: the base has been written
    path.unlink()
    zeroshot = path.with_name("nonlinear_zeroshot.safetensors")
    content = zeroshot.read_bytes()
    for task in ("digits", "mnist"):
        text = said(capsys, *args, "--tasks", task, "--pretrained", other_base)
        assert str(zeroshot) in text and f"pretrained was 'shipped' and is now '{other_base}'" in text and text.endswith("choose another --out.")
    for meta in (None, {"format": "pt"}): # somebody else's copy: its numbers are compared
        save_atomic(load_file(zeroshot), zeroshot, meta)
        assert "the weights themselves differ); choose another --out." in said(capsys, *args, "--tasks", "mnist", "--pretrained", other_base)
    assert list(tmp_path.glob("out/**/*finetuned*")) == []
    zeroshot.write_bytes(content)
    assert "digits" in said(capsys, *args, "--tasks", "digits") and zeroshot.read_bytes() == content
    zeroshot.write_bytes(content[:999])
    assert f"{str(zeroshot)!r} is damaged" in said(capsys, *args, "--tasks", "mnist")


def test_weights_replaced_under_their_name(few, other_base, capsys, tmp_path):
    args = [*GLYPH, "--tasks", "digits", "--pretrained", other_base, "--out", tmp_path / "out"]
    said(capsys, *args)
    tower = tmp_path / "out" / "glyph" / "digitsVal" / "nonlinear_finetuned.safetensors"
    assert "was there" in said(capsys, *args)
    other_base.write_bytes(SHIPPED.read_bytes())
    assert "the weights themselves differ" in said(capsys, *args)
    tower.with_name("nonlinear_zeroshot.safetensors").unlink() # the tower itself knows, too
    text = said(capsys, *args)
    assert text.startswith(f"tsv_finetune: {str(tower)!r} is of another run: base was ")


def test_published_towers_count_as_done(few, capsys, tmp_path):
    folder = tmp_path / "glyph" / "digitsVal"
    folder.mkdir(parents=True)
    base = image_state(open_base("glyph")[0])
    for kind, shift in ("zeroshot", 0), ("finetuned", .1): torch.save({k: v + shift for k, v in base.items()}, folder / f"nonlinear_{kind}.pt")
    before = sorted(folder.iterdir())
    text = said(capsys, *GLYPH, "--tasks", "digits", "--out", tmp_path)
    assert "To do: nothing." in text and "was there" in text and sorted(folder.iterdir()) == before
    (folder / "nonlinear_finetuned.pt").unlink()
    assert "was there" not in said(capsys, *GLYPH, "--tasks", "digits", "--out", tmp_path) # from the published base, of which no second copy is made
    assert {p.name for p in folder.iterdir()} == {"nonlinear_zeroshot.pt", "nonlinear_finetuned.safetensors"}
    torch.save({k: v + .1 for k, v in base.items()}, folder / "nonlinear_zeroshot.pt")
    assert "choose another --out" in said(capsys, *GLYPH, "--tasks", "mnist", "--out", tmp_path)


def test_the_launchers_accumulation_does_not_count(fresh_accelerator, monkeypatch):
    "accelerate launch --gradient_accumulation_steps sets this variable; Adam hides the factor, clipping does not."
    model, head, images = data(torch.double)

    def run():
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator, norms = make_accelerator(), []
        clip = accelerator.clip_grad_norm_
        accelerator.clip_grad_norm_ = lambda *args: norms.append(clip(*args)) or norms[-1]
        return finetune_task(model, head, images, 2, accelerator=accelerator, clip=14., **RECIPE), torch.stack(norms)
    plain, norms = run()
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    told, norms_told = run()
    assert torch.equal(norms, norms_told) and norms.min() < 14 < norms.max() and all(torch.equal(plain[k], told[k]) for k in plain)


@pytest.mark.parametrize("content", [b"junk", b"q", b"G12", b"M1", b".", b"ckG\x85u1q", b"PK\x03\x04junk"], ids=repr)
def test_damaged_checkpoint_files(content, tmp_path):
    "What torch.load raises on them is of seven kinds."
    for load in (lambda path: load_progress(path, {})), load_tower:
        (path := tmp_path / "checkpoint.pt").write_bytes(content)
        with pytest.raises(ValueError, match=f"{path}' is damaged.*; (delete it to start|download or save it again)"): load(path)


def test_damaged_files_of_a_run(few, small_arch, capsys, tmp_path):
    (folder := tmp_path / "glyph" / "digitsVal").mkdir(parents=True)
    path = folder / "checkpoint.pt"
    for content in b"junk", b"q":
        path.write_bytes(content)
        assert said(capsys, *GLYPH, "--tasks", "digits", "--out", tmp_path) == f"tsv_finetune: {str(path)!r} is damaged, or not a checkpoint; delete it to start that run again."
        (weights := tmp_path / "weights.pt").write_bytes(content)
        text = said(capsys, "--model", "tsv-small", "--pretrained", weights, "--tasks", "MNIST", "--out", tmp_path)
        assert text.startswith(f"tsv_finetune: the weights {str(weights)!r} of tsv-small cannot be loaded: ")
    (folder / "nonlinear_finetuned.pt").write_bytes(b"junk")
    assert "nonlinear_finetuned.pt' is damaged" in said(capsys, *GLYPH, "--tasks", "digits", "--out", tmp_path)


def test_a_file_in_place_of_the_output_folder(capsys, tmp_path):
    (file := tmp_path / "glyph").write_text("")
    for out, there in (file, file), (file / "more", file), (tmp_path, file), ("/dev/null", "/dev/null"):
        assert said(capsys, *GLYPH, "--out", out) == f"tsv_finetune: --out: {str(there)!r} is no folder; name a folder, or a place where one can be made."


def test_empty_parts_of_a_list_of_tasks():
    assert glyph_suite("greek, ,mnist,").names == ["greek", "mnist"] and glyph_suite(" 2 ").names == glyph_suite("2").names


def test_the_head_of_another_activation(tmp_path):
    "The same weights, another network."
    words, path = (["one", "two"], ["{}"]), tmp_path / "head.safetensors"
    text = dict(context_length=4, vocab_size=8, width=8, heads=1, layers=1)
    clips = [CLIP(8, dict(image_size=8, patch_size=4, width=16, layers=1, head_width=8), text, quick_gelu=quick).eval() for quick in (False, True)]
    clips[1].load_state_dict(clips[0].state_dict())
    tokens = lambda texts: torch.tensor([[1, 2 + len(t) % 2, 3 + i, 7] for i, t in enumerate(texts)])
    heads = [task_head(clip, tokens, words, path) for clip in clips]
    assert not torch.equal(*heads) and torch.equal(heads[1], zeroshot_head(clips[1], tokens, *words))
    assert torch.equal(task_head(clips[1], None, words, path), heads[1])
