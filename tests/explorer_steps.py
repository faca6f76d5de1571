"""What the tests of all explorers share: a step must feel live."""
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from measure import kept_waiting

GOAL = .15 # seconds from a control's new value to the finished picture and numbers, on 2 cores


def expect_live(explorer, moves):
    "The steps of each control, {control: at least four values}: the fastest below the goal by the clock, the typical one below twice the goal of processor time."
    for control, values in moves.items():
        wall, processor = [], []
        for _ in range(3): # other work can slow down all steps for a while: then again
            for value in values:
                before, waited, start, busy = explorer.png, kept_waiting(), time.perf_counter(), time.process_time()
                explorer.move(**{control: value})
                wall.append(time.perf_counter() - start - (kept_waiting() - waited))
                processor.append(time.process_time() - busy)
                assert explorer.png != before, (explorer.title, control, value)
            if min(wall) < GOAL: break
            time.sleep(.5)
        assert len(wall) >= 4 and min(wall) < GOAL, (explorer.title, control, wall)
        assert statistics.median(processor) < 2 * GOAL, (explorer.title, control, processor)
