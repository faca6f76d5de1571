"""Where `tsv_merge` spends its time: one block of ViT-B-32, 8 tasks, in memory, under cProfile, by the built-in function that does the work.

    python benchmarks/profile_merge.py --label after                                   # adds to results/profile_merge.json
    git worktree add ../old f76eb7c && PYTHONPATH=../old python benchmarks/profile_merge.py --label before # the version before the fast routes
"""
import argparse
import cProfile
import json
import pstats
import sys
import time
from pathlib import Path

import torch
from measure import machine, write_json
from merging import deltas_of, vit_shapes

import tsv_nb

HERE = Path(__file__).resolve().parent
KINDS = {"linalg_svd": "full SVDs", "linalg_eigh": "eigendecompositions", "svd.py": "Gram matrices and Rayleigh-Ritz",
         "bmm": "matrix products", "addmm": "matrix products", "matmul": "matrix products", "polar.py": "matrix products", "isfinite": "checks", "'sum'": "checks", "'any'": "checks", "cat": "copies", "stack": "copies", "'to'": "copies",
         "'double'": "copies"}


def main():
    "Profile, group, print, write."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--label", default="after"); p.add_argument("--threads", type=int, default=2); p.add_argument("--out", type=Path, default=HERE / "results" / "profile_merge.json")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    cache, shapes = {}, {n: s for n, s in vit_shapes(blocks=1).items() if "resblocks" in n}
    deltas = {n: deltas_of(n, s, 8, "realistic", cache).float() for n, s in shapes.items()}
    vectors = [{n: d[t] for n, d in deltas.items()} for t in range(8)]
    tsv_nb.tsv_merge([{"w": torch.randn(128, 96)}] * 2)
    plain = []
    for _ in range(3):
        start = time.perf_counter(); tsv_nb.tsv_merge(vectors); plain.append(time.perf_counter() - start)
    profile = cProfile.Profile()
    profile.runcall(tsv_nb.tsv_merge, vectors)
    groups = {}
    for (file, _, name), (_, calls, own, _, _) in pstats.Stats(profile).stats.items():
        kind = next((v for k, v in KINDS.items() if k in name or k in file), "everything else")
        groups[kind] = groups.get(kind, 0) + own
    data = json.loads(a.out.read_text()) if a.out.exists() else {}
    data[a.label] = dict(seconds=sorted(plain)[1], seconds_of={k: round(v, 4) for k, v in sorted(groups.items(), key=lambda o: -o[1])}, command=" ".join(sys.argv), machine=machine())
    write_json(a.out, data)
    print(a.label, f"{data[a.label]['seconds']:.2f} s", data[a.label]["seconds_of"], tsv_nb.__file__)


if __name__ == "__main__": main()
