#!/usr/bin/env bash
# Everything that nbs/vision/25_paper.ipynb shows, measured again. Usage: bash benchmarks/paper.sh [OUT_DIR]
# Goes on where it was stopped. Give it two idle cores: about two hours.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
for tasks in 8 14 20; do tsv_eval --tasks "$tasks" --out "$out/suite"; done
# Recorded with 15 points for 14 and 20 tasks, and 30 for the methods whose best value is small (task_arithmetic, dare, dare_ties, boosted); here all have 30.
for tasks in 8 14 20; do cp "$out"/suite/glyph-"$tasks"*.json "$out/paper_$tasks.json"; done
python benchmarks/paper.py --out "$out/paper.json"
python benchmarks/animation.py
