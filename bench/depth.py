"""At a small ratio: all blocks coarse, or the last ones fine and no others? The score of both, and of a LoRA on the model's own last blocks, which is the most that the latter can learn.

    python bench/depth.py [--tasks wordnet inflect] [--seeds 0] [--out runs/recovered]

Trains with anchors in rounds of 25 steps on quantized emulators of ratio 0.1, beside what bench/recovered.py left under --out; what was trained or scored there is not done again. Writes bench/results/depth.json.
"""
import argparse
import json
from pathlib import Path

import machine
from emloc.compare import METHODS, Comparison, Method, Setting
from emloc.data import load_task, several
from emloc.model import Checkpoint, block_names, find_model, skeleton
from recovered import SHORT

HERE, RATE = Path(__file__).parent, 1e-3
SHARES = (1, 0.667, 0.4) # of the blocks
emulated = lambda last: Method(f"emulator, {last:.2g}", "activation", 1, 25, form="quantized", ratio=0.1, last=last)
VARIANTS = [*map(emulated, SHARES), *(Method(f"LoRA on the model, {last:.2g}", last=last) for last in SHARES[1:])]


def cell(found: dict | None) -> str: # of a table
    if not found: return "–"
    return " / ".join("–" if found[k] is None else f"{found[k]:.3f}" for k in ("accuracy", "nll")) + f" ({several(found['seeds'], 'seed')})"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["wordnet", "inflect"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--known", action="store_true", help="train nothing: the table has what is there")
    parser.add_argument("--out", type=Path, default=Path("runs/recovered"))
    args = parser.parse_args()
    comparisons = {task: Comparison(load_task(task), args.out / task, Setting()) for task in args.tasks}
    for comparison in comparisons.values():
        comparison.begin()
        comparison.score(None)
        for seed in args.seeds if not args.known else ():
            for method in [METHODS[0], *VARIANTS]: comparison.tried(method, seed, RATE)
    blocks, about, rows = len(block_names(skeleton(Checkpoint(find_model("default"))))), machine.describe(), []
    lines = ["SmolLM2-135M-Instruct, rounds of 25 steps, ratio 0.1: recovered of the accuracy / of the NLL", "", f"| | {' | '.join(SHORT.get(task, task) for task in args.tasks)} |", "| --- " * (len(args.tasks) + 1) + "|"]
    for method in VARIANTS:
        count = round(method.last * blocks)
        row = {"method": "emulator" if method.metric else "LoRA on the model", "blocks": count, "tasks": {task: c.recovered(method, args.seeds, RATE) for task, c in comparisons.items()}}
        rows.append(row)
        if not any(row["tasks"].values()): continue # nothing of it was run
        which = f"all {blocks} blocks" if count == blocks else f"the last {count} of {blocks} blocks"
        lines.append(f"| {f'emulator of {which}' if method.metric else f'LoRA on the model itself, on {which}'} | {' | '.join(map(cell, row['tasks'].values()))} |")
    markdown = "\n".join([*lines, "", f"({machine.line(about)}.)"])
    (HERE / "results" / "depth.json").write_text(json.dumps({"machine": about, "rows": rows, "markdown": markdown}, indent=1) + "\n")
    print(markdown)
