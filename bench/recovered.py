"""Of the gain that LoRA on the whole model brings, how much does each method bring?

    python bench/recovered.py [--tasks bbc wordnet inflect python] [--seeds 0 1 2] [--steps 150] [--out runs/recovered]

Writes bench/results/recovered.json and nbs/images/recovered.png from all tasks under --out that have at least one seed. What was trained or scored already is not done again.
"""
import argparse
import json
import statistics
from pathlib import Path

import machine
from emloc.compare import METHODS, Comparison, Setting, comparison_table, in_order, share_figure
from emloc.data import load_task

HERE = Path(__file__).parent
TITLES = {"bbc": "BBC News: one of 5 sections", "wordnet": "WordNet glosses: one of 15 kinds", "inflect": "lemminflect: inflected forms, exact match",
          "python": "documentation of Python: language modelling, all tokens"}


def shares(found: dict, name: str, key: str) -> list:
    "The shares of a method, a list for each task that has them."
    tasks = [[row[key] for row in task["rows"] if row["name"] == name and row[key] is not None] for task in found.values()]
    return [task for task in tasks if task]


def cell(tasks: list) -> str:
    "The mean over tasks of the mean over seeds, and the worst run."
    if not tasks: return "–"
    return f"{statistics.mean(map(statistics.mean, tasks)):.3f} ({min(map(min, tasks)):.3f}; {len(tasks)} task{'s' if len(tasks) > 1 else ''})"


def table(found: dict, about: dict) -> str:
    "Markdown: one table for each task, then the mean over tasks and seeds."
    lines = []
    for task, result in found.items():
        s = result["setting"]
        rates = sorted({row["rate"] for row in result["rows"]})
        lines += [f"**{TITLES.get(task, task)}** ({s['steps']} steps of {s['batch_size']} rows, {s['rows']} test rows, seeds {', '.join(str(seed) for seed in sorted({row['seed'] for row in result['rows']}))}, "
                  f"learning rate {', '.join(f'{r:g}' for r in rates)}{' chosen on validation rows' if len(s['rates']) > 1 else ''}):", "", result["markdown"], ""]
    names = in_order(row["name"] for result in found.values() for row in result["rows"])
    lines += ["**All of them**, mean over the tasks of the mean share over the seeds (worst run; how many tasks a method was run on):", "", "| | of the accuracy | of the NLL |", "| --- | --- | --- |"]
    for name in names:
        lines.append(f"| {name} | " + " | ".join(cell(shares(found, name, key)) for key in ("accuracy_share", "nll_share")) + " |")
    first = next(iter(found.values()))["setting"]
    return "\n".join([f"SmolLM2-135M-Instruct, emulators of ratio {first['ratio']:g}: mean (range) over the seeds", "", *lines, "", f"({machine.line(about)}.)"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="*", default=list(TITLES), help="none: only the table of what is there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rows", type=int, default=300, help="test rows")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3], help="learning rates to choose among on validation rows")
    parser.add_argument("--methods", nargs="+", default=[m.name for m in METHODS], help="names of METHODS; the reference is always there")
    parser.add_argument("--out", type=Path, default=Path("runs/recovered"))
    args = parser.parse_args()
    for name in args.tasks:
        Comparison(load_task(name), args.out / name, Setting(steps=args.steps, rows=args.rows, seeds=tuple(args.seeds), rates=tuple(args.lr))).run([m for m in METHODS if m.name in args.methods])
    about = machine.describe()
    found = {}
    for name in TITLES:
        known = args.out / name / "compare.json"
        if not known.is_file(): continue
        comparison = Comparison(load_task(name), args.out / name, Setting(**json.loads(known.read_text())["setting"]))
        comparison.begin()
        rows = comparison.rows(METHODS)
        if rows: found[name] = {"setting": comparison.known["setting"], "rows": rows, "markdown": comparison_table(rows, comparison.score(None))}
    markdown = table(found, about)
    (HERE / "results" / "recovered.json").write_text(json.dumps({"machine": about, "tasks": found, "markdown": markdown}, indent=1) + "\n")
    share_figure(found).savefig(HERE.parent / "nbs" / "images" / "recovered.png", dpi=110)
    print(markdown)
