"""What a step of each explorer costs: the time from a control's new value to the finished picture and numbers, without a browser. The goal is 150 ms on 2 cores.

    python benchmarks/widgets.py          # about a minute on 2 cores; writes results/widgets.json
    python benchmarks/widgets.py --curves # about three minutes; writes results/rank_curves.json, the accuracies that the rank explorer's page shows

A new explorer is one line in EXPLORERS: how to make it, and which values each control takes in turn. Time is wall time, without what the step waited for other work on the machine (where the system counts that); processor time is beside it.
"""
import argparse
import os
import time
from pathlib import Path

from measure import kept_waiting, machine, write_json

HERE = Path(__file__).resolve().parent
GOAL_MS = 150.
TASKS = ["greek", "arrows", "georgian", "hebrew"]
MLP = "transformer.resblocks.0.mlp.c_fc.weight"


def make_rank(tasks):
    "The rank explorer on the offline world, with a curve, so that all of its picture is drawn."
    from tsv_nb.explore.rank_explorer import rank_explorer, rank_steps
    from tsv_nb.vision.evaluate import load_world
    world = load_world(tasks, progress=False)
    return rank_explorer(world.vectors, {t: {k: 1 - .5 / k for k in rank_steps(448)} for t in tasks})


def make_plane(tasks):
    from tsv_nb.explore.whitening_explorer import whitening_plane
    return whitening_plane()


def make_space(tasks):
    from tsv_nb.explore.whitening_explorer import whitening_space
    return whitening_space()


def make_interference(tasks):
    "All eight tasks: the map is of pairs."
    from tsv_nb.explore.interference_explorer import interference_explorer
    from tsv_nb.vision.evaluate import load_world
    return interference_explorer(load_world(8, progress=False).vectors)


def make_playground(tasks):
    "The table of the package."
    from tsv_nb.explore.playground import merge_playground
    return merge_playground()


EXPLORERS = { # name -> (function of the tasks that makes it, control -> values)
    "rank": (make_rank, {"rank": [1, 2, 3, 4, 6, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 448], "layer": ["proj", "positional_embedding", "transformer.resblocks.1.attn.in_proj_weight", MLP], "task": [*TASKS[1:], TASKS[0]]}),
    "interference": (make_interference, {"rank": [1, 2, 4, 16, 32, 56, 8], "layer": ["proj", "positional_embedding", "transformer.resblocks.1.attn.in_proj_weight", MLP], "task": ["mnist", "arrows", "math"], "other": ["georgian", "hebrew", "greek"]}),
    "playground": (make_playground, {"alpha": [0, .1, .2, .3, .4, .5, .6, .8, 1.2, 1.5, 2, 2.5], "task3": [True, False, True], "task1": [False, True], "method": ["isotropic", "ties", "task_arithmetic", "weight_average", "tsv"]}),
    "whitening, plane": (make_plane, {"angle_b": range(49, 19, -2), "length_b": [.9, .8, .7, 1.2], "angle_a": range(11, 41, 3), "length_a": [.9, .8, .7], "order": [(1, 0), (0, 1)]}),
    "whitening, space": (make_space, {"elevation_c": range(39, 0, -3), "azimuth_b": range(71, 100, 3), "azimuth_c": range(31, 60, 3), "elevation_a": range(3, 30, 3), "view": range(-39, 0, 4), "order": [(1, 2, 0), (2, 1, 0)]}),
}


def steps(explorer, moves):
    "Wall and processor milliseconds of each move, by control; a move that changes nothing is an error."
    result = {}
    for control, values in moves.items():
        rows = []
        for value in values:
            before, waited, wall, processor = explorer.png, kept_waiting(), time.perf_counter(), time.process_time()
            explorer.move(**{control: value})
            rows.append((1e3 * (time.perf_counter() - wall - (kept_waiting() - waited)), 1e3 * (time.process_time() - processor)))
            if explorer.png == before: raise RuntimeError(f"{explorer.title}: {control} = {value!r} did not change the picture")
        result[control] = rows
    return result


def summary(rows):
    "Median and maximum of a list of (wall, processor) milliseconds."
    wall, processor = (sorted(o) for o in zip(*rows))
    return dict(steps=len(rows), median_ms=wall[len(wall) // 2], max_ms=wall[-1], processor_median_ms=processor[len(processor) // 2], processor_max_ms=processor[-1])


def measure_explorer(name, tasks):
    "All moves of one explorer."
    make, moves = EXPLORERS[name]
    explorer = make(tasks)
    by_control = steps(explorer, moves)
    return summary([row for rows in by_control.values() for row in rows]) | {"controls": {c: summary(rows) for c, rows in by_control.items()}}


def curves(tasks):
    "Accuracy of each task with its compressed task vector, rank by rank."
    from tsv_nb.explore.rank_explorer import accuracy_curve, task_spectra
    from tsv_nb.vision.evaluate import load_world
    world = load_world(tasks, progress=False)
    on = lambda t: lambda archive: world.accuracy(archive.apply_to(world.pretrained), tasks=[t])[t]
    return {t: accuracy_curve(v, task_spectra(v), on(t), progress=t) for t, v in world.vectors.items()}


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--curves", action="store_true"); p.add_argument("--only", nargs="*", choices=EXPLORERS); p.add_argument("--out", type=Path)
    a = p.parse_args(argv)
    facts = dict(benchmark="widgets", machine=machine("cpu"), load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None)
    if a.curves: return write_json(a.out or HERE / "results" / "rank_curves.json", facts | {"command": "benchmarks/widgets.py --curves", "curves": curves(TASKS)})
    results = {name: measure_explorer(name, TASKS) for name in a.only or EXPLORERS}
    for name, r in results.items(): print(f"{name:18s} {r['steps']:3d} steps, median {r['median_ms']:4.0f} ms, at most {r['max_ms']:4.0f} ms (processor: {r['processor_median_ms']:.0f}, {r['processor_max_ms']:.0f}); goal {GOAL_MS:.0f} ms")
    write_json(a.out or HERE / "results" / "widgets.json", facts | {"command": "benchmarks/widgets.py", "goal_ms": GOAL_MS, "explorers": results})


if __name__ == "__main__": main()
