"""Where matrices are decomposed: what is brought there and comes back, that a plan knows it, and a machine without a GPU."""
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from scale_models import SHAPES, load_output, relative, report_of, states

from tsv_nb.compress import CompressedTaskVector
from tsv_nb.scale import commands, distributed, running
from tsv_nb.scale.checkpoints import open_checkpoint
from tsv_nb.scale.plan import make_plan
from tsv_nb.scale.stream import device_of, run_plan

MATRICES = {n: s for n, s in SHAPES.items() if n in ("h.0.attn.in_proj_weight", "h.0.mlp.weight", "h.1.mlp.weight")} # the last one was not moved by task1
NAMES = {"merge": "m", "compress": "c.safetensors", "interference": "i.json"}


def opened(n_tasks=3):
    base, *tasks = states(n_tasks)
    return open_checkpoint(base), {f"task{t}": open_checkpoint(s) for t, s in enumerate(tasks)}


@pytest.mark.parametrize("command", NAMES)
def test_matrices_go_to_the_device_and_come_back(command, tmp_path, monkeypatch):
    "There is no second device here; so that which is asked for is written down."
    base, tasks = opened(1 if command == "compress" else 3)
    plan, moved, back, to, cpu = make_plan(command, base, tasks, threads=1), [], [], torch.Tensor.to, torch.Tensor.cpu
    run_plan(plan, base, tasks, tmp_path / NAMES[command], progress=False)
    def noted(self, *args, **kwargs):
        if args and args[0] == torch.device("cpu", 0): moved.append(tuple(self.shape))
        return to(self, *args, **kwargs)
    monkeypatch.setattr(torch.Tensor, "to", noted)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: (back.append(tuple(self.shape)), cpu(self))[1])
    (tmp_path / "other").mkdir()
    run_plan(replace(plan, options=plan.options | {"device": "cpu:0"}), base, tasks, tmp_path / "other" / NAMES[command], progress=False)
    merged = [t.shape for t in plan.tensors if t.how == "merge"]
    assert set(MATRICES.values()) <= set(merged) and sorted(moved) == sorted(merged) # the base's; the tasks' go to where it is
    if command == "merge": assert set(merged) <= set(back)
    if command == "interference": assert report_of(tmp_path / "other" / "i.json")["tensors"].keys() == report_of(tmp_path / "i.json")["tensors"].keys()
    else:
        one, two = load_output(tmp_path / NAMES[command]), load_output(tmp_path / "other" / NAMES[command])
        assert all(one[n].equal(two[n]) for n in one) and one.keys() == two.keys()


def test_a_run_does_not_go_on_on_another_device(tmp_path):
    base, tasks = opened()
    def stopped(job, units): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): run_plan(make_plan("merge", base, tasks), base, tasks, tmp_path / "out", stopped, progress=False)
    with pytest.raises(ValueError, match="an unfinished run of another kind: device was 'cpu' and is now 'cuda'"): run_plan(make_plan("merge", base, tasks, device="cuda"), base, tasks, tmp_path / "out", progress=False)


def test_wrong_devices():
    base, tasks = opened(1)
    with pytest.raises(ValueError, match="unknown device 'gpu'; known: 'cpu', 'cuda'"): make_plan("merge", base, tasks, device="gpu")
    with pytest.raises(ValueError, match="expand does not use device"): make_plan("expand", base, {"a": {}}, device="cuda")
    with pytest.raises(SystemExit, match="tsv_expand computes on the CPU; leave --num-gpus out"): commands.tsv_expand(["a", "b", "--engine", "ray", "--num-gpus", "1"])


@pytest.mark.parametrize("argv", [["--device", "cuda"], ["--device", "cuda", "--quiet"]])
def test_without_a_gpu_nothing_is_begun(argv, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    paths = [str(tmp_path / f"{n}.safetensors") for n in "ab"]
    for path in paths: save_file({"w": torch.ones(9, 8)}, path)
    with pytest.raises(SystemExit, match="the plan decomposes matrices on a GPU .*PyTorch finds none here; plan with --device cpu"): commands.tsv_merge([*paths, "--out", str(tmp_path / "out"), *argv])
    assert not list(tmp_path.glob("out*"))


def test_options_reach_the_ray_engine(monkeypatch):
    seen = []
    monkeypatch.setattr(distributed, "ray_engine", lambda *args, **options: seen.append((args, options)))
    running.choose_engine("ray", "10.0.0.1:6379", .5, "4GB"); running.choose_engine("ray", memory_per_unit="5000")
    assert seen == [(("10.0.0.1:6379", .5), dict(memory=4 * 10**9)), ((None, None), dict(memory=5000))]
    assert running.key_options(num_gpus=1.)[0]["device"] == "cuda" and running.key_options(num_gpus=1., device="cpu")[0]["device"] == running.key_options()[0]["device"] == "cpu"
    for name, value in (("num_gpus", 1.), ("memory_per_unit", "4GB"), ("address", "auto")):
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} .* is for --engine ray"): running.choose_engine("local", **{name: value})


@pytest.mark.cuda
@pytest.mark.parametrize("command", NAMES)
def test_on_a_gpu(command, tmp_path):
    "With rows that only some have, and a tensor that a task lacks."
    base, tasks = opened(1 if command == "compress" else 3)
    longer = dict(base) | {"embed_tokens.weight": torch.randn(60, 24)}
    tasks["task0"] = open_checkpoint(longer)
    if command != "compress": tasks["task1"] = open_checkpoint({n: t for n, t in tasks["task1"].items() if n != "h.0.mlp.weight"})
    for device in ("cpu", "cuda"):
        (tmp_path / device).mkdir()
        plan = make_plan(command, base, tasks, threads=1, device=device, include=["embed_tokens"], vocab="common", missing="base")
        report = run_plan(plan, base, tasks, tmp_path / device / NAMES[command], progress=False)
    assert device_of(plan).type == "cuda" and report["session"]["machines"][0]["gpu"] == torch.cuda.get_device_name()
    if command == "interference":
        a, b = (report_of(tmp_path / d / NAMES[command])["tensors"] for d in ("cpu", "cuda"))
        assert all(b[n]["interference"] == pytest.approx(e["interference"], rel=1e-3) for n, e in a.items() if "interference" in e); return
    results = [load_output(tmp_path / d / NAMES[command]) for d in ("cpu", "cuda")]
    if command == "compress": results = [CompressedTaskVector.load(tmp_path / d / NAMES[command]).apply_to(dict(base)) for d in ("cpu", "cuda")]
    assert all(relative(results[1][n], t) < 1e-4 for n, t in results[0].items() if t.is_floating_point() and t.numel())
