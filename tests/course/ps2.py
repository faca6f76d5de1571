"""Problem set 2: a typical wrong submission and a hostile one, as changes of the reference solution (grade_id of a cell -> its source)."""

WRONG = {
    "ps2-sti": '''
def sti(factors):
    U, V = (torch.cat(parts) for parts in zip(*((u, vh.mT) for u, s, vh in factors))) # along rows
    S, I = factors[0][1], torch.eye(len(factors[0][1]))
    return ((U.mT @ U - I) @ torch.diag(S) @ (V.mT @ V - I)).abs().sum().item()
''',
    "ps2-share": '''
def share(m, n, n_tasks):
    if min(m, n) < n_tasks: raise ValueError("too many tasks")
    return int(min(m, n) * (1 / n_tasks)) # falls into rounding holes
''',
    "ps2-significant": '''
def significant(U, S, Vh):
    k = int((S > 0).sum()) # keeps the noise
    return U[:, :k], S[:k], Vh[:k]
''',
    "ps2-layer": '''
def merge_layer(deltas, rank=None):
    k = share(*deltas[0].shape, len(deltas)) if rank is None else rank
    U, S, V, _ = side_by_side([significant(*svd(d, k)) for d in deltas])
    order = S.argsort(descending=True) # changes nothing, and costs nothing
    return polar(U[:, order]) * S[order] @ polar(V[:, order]).mT
''',
    "ps2-alpha": '''
def choose_alpha(world, vector, alphas):
    def score(alpha): return sum(world.accuracy(apply_task_vector(world.pretrained, vector, alpha), t) for t in world.names) # on test images
    return max(sorted(alphas), key=score)
''',
}
WRONG_LOSES = ["ps2-sti-tests", "ps2-share-tests", "ps2-significant-tests", "ps2-trap-tests", "ps2-alpha-tests"]

HOSTILE = {
    "ps2-side": "def side_by_side(factors)\n    return factors", # does not parse; the score and the merges need it
    "ps2-gram": '''
while True: # for ever, and deaf to interrupts
    try:
        while True: pass
    except BaseException: pass
''',
    "ps2-share": '''
from pathlib import Path
for path in ("ps2.ipynb", "COURSE/source/ps2/ps2.ipynb", "COURSE/rubrics/ps2.md"): # reads the tests, and hides that it was refused
    try: print(Path(path).read_text())
    except OSError: pass
def share(m, n, n_tasks): return min(m, n) // n_tasks
''',
    "ps2-significant": '''
def relative(x, want): return 0. # replaces a helper of the tests
def significant(U, S, Vh): return U[:, :1], S[:1], Vh[:1]
''',
}
HOSTILE_LOSES = ["ps2-side-tests", "ps2-sti-tests", "ps2-gram-tests", "ps2-share-tests", "ps2-significant-tests", "ps2-layer-tests", "ps2-trap-tests", "ps2-model-tests", "ps2-beat-tests", "ps2-held-tests"]
