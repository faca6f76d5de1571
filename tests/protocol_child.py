"""A tiny model and data for the fine-tuning tests; as a script, what each of two processes runs. Usage: protocol_child.py FOLDER"""
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from torch.utils.data import TensorDataset

from tsv_nb.vision.training import dataset_accuracy, finetune_task, make_accelerator

POINTS = TensorDataset(torch.eye(2)[[0] * 5], torch.tensor([0, 1, 0, 1, 0])) # every second one is right
RECIPE = dict(lr=3e-3, warmup=4, batch=16)


def tiny_clip(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CLIP(8, dict(image_size=8, patch_size=4, width=16, layers=1, head_width=8), dict(context_length=4, vocab_size=8, width=8, heads=1, layers=1)).eval()


def data(dtype=torch.float32, n=43):
    "A model, a head of four classes, and n random images."
    g = torch.Generator().manual_seed(0)
    images, labels = torch.randn(n, 3, 8, 8, generator=g), torch.randint(4, (n,), generator=g)
    return tiny_clip().to(dtype), F.normalize(torch.randn(4, 8, generator=g), dim=1).to(dtype), TensorDataset(images.to(dtype), labels)


def distance(start, a, b):
    "How far two towers are apart, as a share of how far the first has moved."
    norm = lambda x, y: sum((x[k].double() - y[k].double()).square().sum() for k in x).sqrt().item()
    return norm(a, b) / norm(a, start)


class Interrupted(Exception): pass


def stop(done, loss, rate):
    if done == 5: raise Interrupted


def main(folder):
    accelerator, (model, head, images) = make_accelerator(), data(torch.double, n=33)
    run = lambda **kw: finetune_task(model, head, images, 2, accelerator=accelerator, **RECIPE, **kw)
    losses = []
    out = dict(whole=run(on_step=lambda d, loss, r: losses.append(loss)), pieces=run(accumulate=3), clipped=run(clip=14.))
    shared = folder / "shared" / "c.pt"
    try: run(checkpoint=shared, checkpoint_every=2, on_step=stop)
    except Interrupted: pass
    accelerator.wait_for_everyone()
    out["resumed"] = run(checkpoint=shared, checkpoint_every=2)
    out |= dict(losses=losses, accuracy=dataset_accuracy(torch.nn.Identity(), torch.eye(2), POINTS, accelerator=accelerator))
    accelerator.wait_for_everyone()
    try: run(checkpoint=shared if accelerator.process_index else folder / "another" / "c.pt")
    except ValueError as e: out["error"] = str(e)
    torch.save(out, folder / f"rank{accelerator.process_index}.pt")
    accelerator.end_training()


if __name__ == "__main__": main(Path(sys.argv[1]))
