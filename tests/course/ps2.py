"""Problem set 2: a typical wrong submission and a hostile one, as changes of the reference solution (grade_id of a cell -> its source)."""

WRONG = {
    "ps2_sti": '''
def sti(factors):
    U, V = (torch.cat(parts) for parts in zip(*((u, vh.mT) for u, s, vh in factors))) # along rows
    S, I = factors[0][1], torch.eye(len(factors[0][1]))
    return ((U.mT @ U - I) @ torch.diag(S) @ (V.mT @ V - I)).abs().sum().item()
''',
    "ps2_share": '''
def share(m, n, n_tasks):
    if min(m, n) < n_tasks: raise ValueError("too many tasks")
    return int(min(m, n) * (1 / n_tasks)) # falls into rounding holes
''',
    "ps2_significant": '''
def significant(U, S, Vh):
    k = int((S > 0).sum()) # keeps the noise
    return U[:, :k], S[:k], Vh[:k]
''',
    "ps2_layer": '''
def merge_layer(deltas, rank=None):
    k = share(*deltas[0].shape, len(deltas)) if rank is None else rank
    U, S, V, _ = side_by_side([significant(*svd(d, k)) for d in deltas])
    order = S.argsort(descending=True) # changes nothing, and costs nothing
    return polar(U[:, order]) * S[order] @ polar(V[:, order]).mT
''',
    "ps2_alpha": '''
def choose_alpha(world, vector, alphas):
    def score(alpha): return sum(world.accuracy(apply_task_vector(world.pretrained, vector, alpha), t) for t in world.names) # on test images
    return max(sorted(alphas), key=score)
''',
}
WRONG_LOSES = ["ps2_sti_test", "ps2_share_test", "ps2_significant_test", "ps2_trap_test", "ps2_alpha_test"]

HOSTILE = {
    "ps2_side": "def side_by_side(factors)\n    return factors", # does not parse; the score and the merges need it
    "ps2_gram": '''
while True: # for ever, and deaf to interrupts
    try:
        while True: pass
    except BaseException: pass
''',
    "ps2_share": '''
from pathlib import Path
for path in ("ps2.ipynb", "COURSE/source/ps2/ps2.ipynb", "COURSE/rubrics/ps2.md"): # reads the tests, and hides that it was refused
    try: print(Path(path).read_text())
    except OSError: pass
def share(m, n, n_tasks): return min(m, n) // n_tasks
''',
    "ps2_significant": '''
def relative(x, want): return 0. # replaces a helper of the tests
def significant(U, S, Vh): return U[:, :1], S[:1], Vh[:1]
''',
}
HOSTILE_LOSES = ["ps2_side_test", "ps2_sti_test", "ps2_gram_test", "ps2_share_test", "ps2_significant_test", "ps2_layer_test", "ps2_trap_test", "ps2_model_test", "ps2_beat_test", "ps2_held_test"]
