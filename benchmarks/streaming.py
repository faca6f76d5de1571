"""A checkpoint of several GB merged from disk to disk by `tsv_merge`, against loading everything: time, peak memory, and a run that is killed and resumed.

    python benchmarks/streaming.py --folder /tmp/models # makes four checkpoints (about 10 GB) there, then merges them; writes results/streaming.json
    python benchmarks/streaming.py --folder /tmp/models --layers 1 --vocab 1000 --hidden 256 --out /tmp/streaming.json # a small try

The checkpoints have the layers and names of a Llama and random weights; each task moves every matrix by a low-rank change and noise. Peaks are the largest resident memory of
a process of its own, with what importing the library takes subtracted (it is printed). Merges whose results are in the folder are not run again (--again does): their reports hold
the figures. The side that loads everything keeps the base and the task vectors, as a user of the
functions of Part I would, and merges one layer only: its time is not compared, only its memory.
"""
import argparse
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from measure import machine, write_json
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
COMMAND = [sys.executable, "-c", "import sys; from tsv_nb.scale.commands import tsv_merge; tsv_merge()"]


def shapes(layers, hidden, mlp, vocab):
    "Names and shapes of a Llama without grouped heads."
    sizes = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(layers):
        at = f"model.layers.{i}"
        sizes |= {f"{at}.self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        sizes |= {f"{at}.mlp.{p}_proj.weight": (hidden, mlp) if p == "down" else (mlp, hidden) for p in ("gate", "up", "down")}
        sizes |= {f"{at}.{n}_layernorm.weight": (hidden,) for n in ("input", "post_attention")}
    return sizes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def weights(name, shape, task):
    "A base weight, and what a task makes of it; each from a seed of its own."
    def draw(what, *size): return torch.randn(*size, generator=torch.Generator().manual_seed(int(hashlib.sha256(f"{name} {what}".encode()).hexdigest()[:12], 16)))
    w = .02 * draw("base", *shape)
    if task is None: return w
    if len(shape) == 1: return w + 1e-3 * draw(task, *shape)
    if shape[0] > 4 * shape[1]: return w + 1e-5 * draw(task, *shape) # embeddings
    k = min(32, *shape)
    return w + draw(f"{task} left", shape[0], k) * torch.linspace(2e-4, 2e-5, k) @ draw(f"{task} right", k, shape[1]) + 1e-5 * draw(f"{task} noise", *shape)


def make(folder, sizes, task, shard_bytes):
    "Write one checkpoint in shards with an index, as Hugging Face does; a folder that is there is kept."
    if (folder / "model.safetensors.index.json").exists(): return
    folder.mkdir(parents=True, exist_ok=True)
    parts, used = [[]], 0
    for name, shape in sizes.items():
        n = 4 * torch.Size(shape).numel()
        if used and used + n > shard_bytes: parts.append([]); used = 0
        parts[-1].append(name); used += n
    where = {}
    for i, names in enumerate(parts):
        file = f"model-{i + 1:05d}-of-{len(parts):05d}.safetensors"
        save_file({n: weights(n, sizes[n], task) for n in names}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    (folder / "config.json").write_text(json.dumps(dict(model_type="llama")))
    write_json(folder / "model.safetensors.index.json", dict(metadata=dict(total_size=4 * sum(torch.Size(s).numel() for s in sizes.values())), weight_map=where))


def run(argv, kill_after=None):
    "Seconds, exit code and output of a child process; `kill_after` seconds it is killed."
    start, child = time.perf_counter(), subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
    try: text, _ = child.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGKILL)
        text, _ = child.communicate()
    return dict(seconds=time.perf_counter() - start, code=child.returncode, text=text)


IMPORTS = "import tsv_nb.scale.commands; from tsv_nb.scale.stream import peak_rss; print(peak_rss())"
EVERYTHING = """
import sys
from tsv_nb import task_vector, tsv_merge
from tsv_nb.lazy import open_tensors
from tsv_nb.scale.stream import peak_rss
base = open_tensors(sys.argv[1]).load()
vectors = {path: task_vector(base, open_tensors(path).load()) for path in sys.argv[2:]}
name = next(n for n in base if "q_proj" in n)
tsv_merge({t: {name: v[name]} for t, v in vectors.items()})
print(peak_rss())
"""


def digests(folder): return {p.name: hashlib.file_digest(p.open("rb"), "sha256").hexdigest() for p in sorted(folder.glob("*.safetensors"))}


def session(folder):
    "What the report of a finished run says of its last session: seconds, units, units that were there already, peak of memory."
    return json.loads((folder / "tsv_report.json").read_text())["session"]


def main():
    "Make the checkpoints, plan, merge, merge again with kills, load everything; print and write the figures."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--folder", type=Path, required=True); p.add_argument("--out", type=Path, default=HERE / "results" / "streaming.json")
    p.add_argument("--tasks", type=int, default=3); p.add_argument("--layers", type=int, default=2); p.add_argument("--hidden", type=int, default=2048)
    p.add_argument("--vocab", type=int, default=128000); p.add_argument("--shard-mb", type=int, default=1000); p.add_argument("--kills", type=int, default=2)
    p.add_argument("--again", action="store_true", help="merge again, although there are results in the folder")
    a = p.parse_args()
    sizes = shapes(a.layers, a.hidden, a.hidden * 11 // 4, a.vocab)
    names, merged, resumed = ["base", *(f"task{i}" for i in range(a.tasks))], a.folder / "merged", a.folder / "resumed"
    for name in names: make(a.folder / name, sizes, None if name == "base" else name, a.shard_mb * 10**6)
    paths = [str(a.folder / n) for n in names]
    def merge(out, *options, **how): return run([*COMMAND, *paths, "--out", str(out), "--shard-size", f"{a.shard_mb}MB", *options], **how)
    if a.again:
        for out in (merged, resumed): shutil.rmtree(out, ignore_errors=True); shutil.rmtree(out.with_name(f"{out.name}.partial"), ignore_errors=True)
    imports = int(run([sys.executable, "-c", IMPORTS])["text"])
    plan = merge(a.folder / "planned", "--plan", "--json")
    if not merged.exists(): assert merge(merged)["code"] == 0
    whole = session(merged)
    if not resumed.exists():
        for i in range(a.kills):
            stopped = merge(resumed, "--quiet", kill_after=whole["seconds"] * (i + 1) / (a.kills + 2))
            assert stopped["code"] == -signal.SIGKILL and not resumed.exists(), stopped
        assert merge(resumed, "--quiet")["code"] == 0
    last, same = session(resumed), digests(merged) == digests(resumed)
    everything, planned = run([sys.executable, "-c", EVERYTHING, *paths]), json.loads(plan["text"])
    largest = 4 * max(torch.Size(s).numel() for s in sizes.values())
    result = dict(machine=machine(), tasks=a.tasks, tensors=len(sizes), checkpoint_bytes=sum(f.stat().st_size for f in (a.folder / "base").glob("*.safetensors")), largest_tensor_bytes=largest,
                  imports_bytes=imports, plan_seconds=round(plan["seconds"], 1), planned_peak_bytes=planned["peak_bytes"], planned_seconds=round(planned["seconds"]), merge_seconds=whole["seconds"],
                  merge_peak_bytes=whole["peak_rss"] - imports, tasks_times_largest_bytes=a.tasks * largest, everything_peak_bytes=int(everything["text"]) - imports,
                  after_kills=dict(units=last["units"], kept=last["resumed"], seconds=last["seconds"]), identical_after_kills=same)
    write_json(a.out, result)
    print(json.dumps(result, indent=1))
    assert same


if __name__ == "__main__": main()
