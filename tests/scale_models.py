"""Small checkpoints in many shapes for the tests of Part IV, and what is compared of an output."""
import dataclasses
import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

SHAPES = {"embed_tokens.weight": (50, 24), "h.0.attn.in_proj_weight": (72, 24), "h.0.attn.in_proj_bias": (72,), "h.0.mlp.weight": (96, 24), "h.1.mlp.weight": (24, 96), "h.1.norm": (24,),
          "h.1.conv": (6, 3, 2, 2), "logit_scale": (), "empty": (0, 7), "text_projection": (24, 24), "one_column": (24, 1)}


def states(n_tasks=3, dtype=torch.float32, seed=0, shapes=SHAPES, step=.1):
    "A base and fine-tuned copies; the second task has not moved one of the matrices."
    g = torch.Generator().manual_seed(seed)
    def draw(shape): return torch.randn(shape, generator=g, dtype=torch.float64)
    base = {name: draw(shape) for name, shape in shapes.items()}
    tasks = {f"task{t}": {name: x + step * draw(x.shape) for name, x in base.items()} for t in range(n_tasks)}
    if n_tasks > 1: tasks["task1"]["h.1.mlp.weight"] = base["h.1.mlp.weight"].clone()
    return tuple({name: x.to(dtype) for name, x in s.items()} | {"ids": torch.arange(5), "flag": torch.tensor(True)} for s in (base, *tasks.values()))


def save_folder(folder, state, shards=2, **config):
    "A Hugging Face folder with an index."
    folder.mkdir(parents=True)
    names, where = list(state), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({n: state[n] for n in names[i::shards]}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(names[i::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=where)))
    (folder / "config.json").write_text(json.dumps(config or dict(architectures=["None"], torch_dtype="float32")))
    (folder / "tokenizer.json").write_text('{"version": "1.0", "é": 1}')
    (folder / "modeling.py").write_text("raise SystemExit")
    return folder


def save_all(folder, n_tasks=3, **options):
    "Folders `base`, `task0`, … below a folder; their paths as text."
    base, *tasks = states(n_tasks, **options)
    return [str(save_folder(folder / name, s)) for name, s in zip(["base", *(f"task{t}" for t in range(n_tasks))], (base, *tasks))]


def fine(plan):
    "The same plan with each tensor a unit of its own."
    return dataclasses.replace(plan, units=tuple((name,) for unit in plan.units for name in unit))


def load_output(out):
    "All tensors of a folder or a file."
    out = Path(out)
    if out.is_file(): return load_file(out)
    return {name: t for f in sorted(out.glob("*.safetensors")) for name, t in load_file(f).items()}


def digests(out):
    "Digests of the files of an output, without times."
    out = Path(out)
    files = [out] if out.is_file() else sorted(out.iterdir())
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files if not f.name.endswith("report.json")} | {"report": timeless(report_of(out))}


def report_of(out):
    out = Path(out)
    return json.loads((out / "tsv_report.json" if out.is_dir() else out if out.suffix == ".json" else out.with_suffix(".report.json")).read_text())


def timeless(report):
    "A report without times and without what concerns a session."
    return {k: v for k, v in report.items() if k not in ("session", "tensors")} | {"tensors": {n: {k: v for k, v in e.items() if k != "seconds"} for n, e in report["tensors"].items()}}


def relative(a, b): return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()
