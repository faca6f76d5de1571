"The cases and the reference that the CPU, interpreter and CUDA tests of the interference score share."
import torch

# T, m, n, k: tall, wide, square; one task; one column; k not a multiple of anything; full rank; more components than rows
SHAPES = [(1, 9, 7, 5), (2, 8, 8, 4), (3, 63, 100, 7), (8, 100, 63, 7), (4, 9, 30, 9), (2, 1, 1, 1), (5, 40, 63, 1), (3, 1, 100, 1), (8, 12, 9, 9), (2, 100, 781, 20)]
# for the tiles: a task's block smaller, larger and just as large as a tile; with the larger ones whole tiles are skipped
BLOCKS = [(2, 40, 30, 100), (3, 63, 100, 63), (5, 40, 33, 26), (3, 20, 10, 129), (2, 30, 10, 64)]
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def factors(T, m, n, k, lead=(), dtype=torch.float32, seed=0, device="cpu"):
    "Random orthonormal factors (where k allows) with positive singular values."
    g = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(*lead, T, m, max(k, 1), generator=g, dtype=torch.float64))[0][..., :k]
    V = torch.linalg.qr(torch.randn(*lead, T, n, max(k, 1), generator=g, dtype=torch.float64))[0][..., :k]
    S = torch.rand(*lead, T, k, generator=g, dtype=torch.float64).sort(-1, descending=True).values + .1
    return tuple(o.to(device, dtype) for o in (U, S, V.mT))


def loose(T, m, n, k, seed=0):
    "Factors that are not orthonormal, with as many components as one likes."
    g = torch.Generator().manual_seed(seed)
    return torch.randn(T, m, k, generator=g), torch.randn(T, k, generator=g), torch.randn(T, k, n, generator=g)


def literal(U, S, Vh):
    "The formula in float64, one layer at a time, with the blocks of a task with itself set to zero."
    U, S, Vh = (o.detach().cpu().double() for o in (U, S, Vh))
    T, m, k = U.shape[-3:]
    task = torch.arange(T * k) // max(k, 1)
    between = (task[:, None] != task).double()
    scores = [((torch.cat(list(u), 1).T @ torch.cat(list(u), 1) * between) @ torch.diag(s.flatten()) @ (torch.cat(list(v)) @ torch.cat(list(v)).T * between)).abs().sum()
              for u, s, v in zip(U.reshape(-1, T, m, k), S.reshape(-1, T, k), Vh.reshape(-1, T, k, Vh.shape[-1]))]
    return torch.stack(scores).view(U.shape[:-3]) if scores else torch.zeros(U.shape[:-3]).double()


def relative(got, want):
    "Largest relative error; exact zeros must be exact."
    got, want = got.cpu().double(), want.double()
    assert got.shape == want.shape and bool((got[want == 0] == 0).all()), (got, want)
    return ((got - want).abs() / want.where(want != 0, 1)).max().item() if want.numel() else 0.
