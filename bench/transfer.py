"""What decides how much of LoRA's gain comes over: the LoRA's rank, batch, weight decay, learning rate, calibration rows? Each alone, everything else as `bench/recovered.py` has it.

    python bench/transfer.py [--task inflect] [--seeds 0] [--only 'rank 32' ...] [--out runs/recovered]

LoRA on the model and the quantized emulator with anchors in rounds are trained with the same settings, beside what bench/recovered.py left under --out; what was trained or scored there, or is in a results file, is not done again.
Writes bench/results/transfer.json.
"""
import argparse
import json
from dataclasses import replace
from pathlib import Path

import machine
from emloc.compare import METHODS, Comparison, Setting
from emloc.data import load_task
from emloc.output import write_json
from recovered import SHORT, recall

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "transfer.json"
METHOD = next(m for m in METHODS if m.name == "quantized, anchors in rounds")


USUAL = "rank 8, batch 8, no weight decay, rate 0.001, 256 calibration rows"
VARIANTS = { # what is different in the Setting
    USUAL: {}, "rank 2": {"rank": 2}, "rank 32": {"rank": 32}, "batch 4": {"batch_size": 4}, "batch 16": {"batch_size": 16}, "weight decay 0.1": {"weight_decay": 0.1}, "weight decay 1": {"weight_decay": 1.0},
    "rate 0.0005": {"rates": (5e-4,)}, "rate 0.002": {"rates": (2e-3,)}, "rate 0.004": {"rates": (4e-3,)}, "16 calibration rows": {"calibration": 16}, "64 calibration rows": {"calibration": 64}}


def begun(task, folder: Path, setting: Setting, scores: dict) -> Comparison:
    "A comparison that begins with the scores that are known, if it was not begun yet."
    comparison = Comparison(task, folder, setting)
    if scores and not comparison.file.exists():
        folder.mkdir(parents=True)
        write_json(comparison.file, comparison.known | {"scores": scores})
    comparison.begin()
    return comparison


def of_reference(base: Comparison, seeds: list) -> dict: # scores
    "What those variants share that differ only in the emulator."
    return {k: v for seed in seeds for k in [base.key(base.folders(METHODS[0], seed, base.setting.rates[0])[-1])] if (v := base.known["scores"].get(k))}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="inflect")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="*", help="names of variants to run; the table has all that is there")
    parser.add_argument("--out", type=Path, default=Path("runs/recovered"))
    args = parser.parse_args()
    task, usual, rows = load_task(args.task), Setting(seeds=tuple(args.seeds)), []
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    kept = kept["scores"] if kept.get("task") == args.task else {}
    recall(args.task, task, args.out, usual)
    base, comparisons = begun(task, args.out / args.task, usual, {}), {}
    untouched = {base.key(None): base.score(None)}
    for name, changes in VARIANTS.items():
        setting = replace(usual, **changes)
        shared = of_reference(base, args.seeds) if [*changes] == ["calibration"] else {}
        comparison = comparisons[name] = begun(task, args.out / f"{args.task}-{name.replace(' ', '-')}", setting, kept.get(name) or untouched | shared) if changes else base
        if args.only is None or name in args.only:
            own = comparison.out / f"emulator-{METHOD.kind()}"
            if "calibration" not in changes and not own.exists(): own.symlink_to(base.emulator(METHOD).resolve()) # the same for whatever only changes the training
            for seed in args.seeds:
                for method in (METHODS[0], METHOD): comparison.tried(method, seed, setting.rates[0])
        found = comparison.recovered(METHOD, args.seeds, setting.rates[0])
        if found: rows.append({"name": name, "settings": changes, "seeds": found["seeds"], "accuracy_share": found["accuracy"], "nll_share": found["nll"],
                               "scores": [[comparison.found(method, seed, setting.rates[0]) for seed in args.seeds] for method in (METHODS[0], METHOD)]})
    about, show = machine.describe(), lambda score: "–" if score is None else " / ".join("–" if score[k] is None else f"{score[k]:.3f}" for k in ("accuracy", "nll"))
    lines = [f"SmolLM2-135M-Instruct, {SHORT.get(args.task, args.task)}, ratio {usual.ratio:g}, {usual.steps} steps, {usual.rows} test rows, seed{'s' * (len(args.seeds) > 1)} {', '.join(map(str, args.seeds))}: accuracy / NLL", "",
             "| | LoRA on the model | quantized, anchors in rounds | recovered of both |", "| --- | --- | --- | --- |"]
    for row in rows: lines.append(f"| {row['name']} | " + " | ".join("; ".join(map(show, scores)) for scores in row["scores"]) + f" | {show({'accuracy': row['accuracy_share'], 'nll': row['nll_share']})} |")
    markdown = "\n".join([*lines, "", f"({machine.line(about)}.)"])
    RESULTS.write_text(json.dumps({"machine": about, "task": args.task, "rows": rows, "scores": {name: c.known["scores"] for name, c in comparisons.items() if name != USUAL}, "markdown": markdown}, indent=1) + "\n")
    print(markdown)
