"""Make the animation of TSV-Merge that the site shows, from a layer of the offline world.

Usage: python benchmarks/animation.py [OUT.gif]     (default nbs/images/method.gif; about a minute on 2 cores)
"""
import sys
from pathlib import Path

import matplotlib

from tsv_nb.explore.animation import method_animation
from tsv_nb.vision.evaluate import load_world

matplotlib.use("Agg")
out = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent.parent / "nbs" / "images" / "method.gif")
vectors = load_world(8).vectors
film = method_animation({t: vectors[t] for t in ("greek", "arrows", "hebrew")}, "transformer.resblocks.1.attn.out_proj.weight")
film.save(out, writer="pillow", dpi=80)
print(f"{out}: {out.stat().st_size / 1e3:.0f} kB")
