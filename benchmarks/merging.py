"""What the merge benchmarks share: the real shapes, task matrices with chosen spectra, the published algorithm written out, and the same in float64.

The published algorithm (Gargiulo et al., CVPR 2025, and the code that goes with it) takes, for every 2-D entry but `text_projection`, a full SVD of every
task's matrix, puts the first r / T components side by side, and takes two more full SVDs to orthogonalize them; everything else is averaged. All task
vectors are in memory. `published_merge` does just that, one entry after the other, with no work saved and none added.
"""
import numpy as np
import torch
from scipy.fft import dct

# Mean relative singular values of the offline world's task matrices (448 wide, 8 tasks, seed 0), by position in the spectrum; stretched to any width.
POSITION = [0, .0022, .0067, .0156, .034, .07, .125, .25, .5, .75, 1]
RELATIVE = [1, .87, .70, .50, .30, .15, .085, .045, .023, .013, .005]


def vit_shapes(model="ViT-B-32", blocks=None):
    "Name -> shape of what the published code merges: CLIP's visual tower, and the entries of the text side that stay in its state dict and do not move."
    width, depth, patch, grid, out, text = {"ViT-B-32": (768, 12, 32, 7, 512, 512), "ViT-L-14": (1024, 24, 14, 16, 768, 768)}[model]
    shapes = {"positional_embedding": (77, text), "text_projection": (text, out), "logit_scale": (), "token_embedding.weight": (49408, text),
              "ln_final.weight": (text,), "ln_final.bias": (text,), "visual.class_embedding": (width,), "visual.positional_embedding": (grid**2 + 1, width),
              "visual.proj": (width, out), "visual.conv1.weight": (width, 3, patch, patch)}
    for ln in ("ln_pre", "ln_post"): shapes |= {f"visual.{ln}.{p}": (width,) for p in ("weight", "bias")}
    for i in range(blocks or depth):
        block = f"visual.transformer.resblocks.{i}."
        shapes |= {block + f"{ln}.{p}": (width,) for ln in ("ln_1", "ln_2") for p in ("weight", "bias")}
        shapes |= {block + "attn.in_proj_weight": (3 * width, width), block + "attn.in_proj_bias": (3 * width,),
                   block + "attn.out_proj.weight": (width, width), block + "attn.out_proj.bias": (width,),
                   block + "mlp.c_fc.weight": (4 * width, width), block + "mlp.c_fc.bias": (4 * width,),
                   block + "mlp.c_proj.weight": (width, 4 * width), block + "mlp.c_proj.bias": (width,)}
    return shapes


def moves(name):
    "Whether fine-tuning the image tower changes an entry."
    return name.startswith("visual.")


def spectrum(r):
    "r relative singular values like those of the offline world's task matrices."
    return np.exp(np.interp((np.arange(r) + .5) / r, POSITION, np.log(RELATIVE)))


def _mix(x, rng, axis):
    "An orthogonal transformation without structure, in n log n operations: signs, cosine transform and permutation, twice."
    x = np.moveaxis(x, axis, -1)
    for _ in range(2):
        x = dct(x * rng.choice([-1., 1.], x.shape[-1]), norm="ortho", workers=2)[..., rng.permutation(x.shape[-1])]
    return np.moveaxis(x, -1, axis)


def task_matrices(shape, n_tasks, kind, seed, shared=.6):
    "(T, m, n) float64 task matrices: `realistic` spectra, a part of each shared by all tasks; or `random` independent entries."
    rng = np.random.default_rng(seed)
    if kind == "random": return torch.from_numpy(1e-3 * rng.standard_normal((n_tasks, *shape)))
    def one():
        x = np.zeros(shape)
        i = np.arange(min(shape))
        x[i, i] = spectrum(len(i))
        return _mix(_mix(x, rng, 0), rng, 1)
    common = one()
    tasks = np.stack([shared * common + (1 - shared**2)**.5 * one() for _ in range(n_tasks)])
    return torch.from_numpy(1e-3 * tasks * (tasks.size / np.square(tasks).sum())**.5)


def deltas_of(name, shape, n_tasks, kind, cache):
    "The float64 changes of one entry for all tasks; entries of equal shape are row and column permutations of each other (the same for all tasks)."
    if not moves(name): return torch.zeros(n_tasks, *shape, dtype=torch.float64)
    rng = np.random.default_rng(abs(hash_of(name)))
    if len(shape) != 2: return torch.from_numpy(1e-3 * rng.standard_normal((n_tasks, *shape)))
    if shape not in cache: cache[shape] = task_matrices(shape, n_tasks, kind, len(cache))
    return cache[shape][:, torch.from_numpy(rng.permutation(shape[0]))][:, :, torch.from_numpy(rng.permutation(shape[1]))]


def hash_of(name):
    "A number that depends on the name only (Python's own hash differs from run to run)."
    return int.from_bytes(name.encode()[-8:], "little")


def published_entry(name, entries):
    "One entry of the published merge, in the precision of its input; rank-blind, as published."
    if entries[0].ndim != 2 or "text_projection" in name: return sum(entries) / len(entries)
    U, S, V = [], [], []
    for delta in entries:
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        k = len(s) // len(entries)
        U.append(u[:, :k]), S.append(s[:k]), V.append(vh[:k])
    pu, _, qu = torch.linalg.svd(torch.cat(U, 1), full_matrices=False)
    pv, _, qv = torch.linalg.svd(torch.cat(V, 0), full_matrices=False)
    return torch.linalg.multi_dot((pu, qu, torch.diag(torch.cat(S)), pv, qv))


def published_merge(vectors, progress=iter):
    "The published merge of task vectors that are all in memory."
    return {name: published_entry(name, [v[name] for v in vectors]) for name in progress(list(vectors[0]))}


def relative_error(a, b):
    "|a - b| / |b| in float64."
    b = b.double()
    return ((a.double() - b).norm() / b.norm()).item()
