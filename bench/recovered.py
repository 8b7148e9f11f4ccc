"""Of the gain that LoRA on the whole model brings, how much does each method bring?

    python bench/recovered.py [--tasks bbc wordnet inflect python] [--seeds 0 1 2] [--steps 150] [--out runs/recovered]

Writes bench/results/recovered.json and nbs/images/recovered.png from all tasks that have at least one seed: the tables with the first learning rate for all, and another of those methods for which rates were chosen
(give several with --lr). What was trained under --out is not trained again; what was scored is not scored again, also where only recovered.json knows of it.
"""
import argparse
import json
import statistics
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import machine
from emloc.compare import METHODS, Comparison, Method, Setting, comparison_table, in_order, share_figure
from emloc.data import Task, load_task, several
from emloc.output import write_json

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "recovered.json"
TITLES = {"bbc": "BBC News: one of 5 sections", "wordnet": "WordNet glosses: one of 15 kinds", "inflect": "lemminflect: inflected forms, exact match",
          "python": "documentation of Python: language modelling, all tokens"}
SHORT = {"bbc": "BBC News", "wordnet": "glosses", "inflect": "inflection", "python": "Python"}


EARLIER = {", scales of 64 inputs": "rotated", ", inputs not mixed": "quantized"} # how weights in bits were stored before, the latest first: what names say of it, and those of folders


@dataclass
class Earlier(Method):
    "What was measured before weights in bits were stored as they are now: scores stay, it cannot be run again."
    word: str = ""
    def kind(self) -> str: return super().kind().replace("packed", self.word, 1)


NOW = [m.name for m in METHODS[1:]]
BEFORE = [Earlier(**vars(m) | {"name": m.name + more}, word=word) for more, word in EARLIER.items() for m in METHODS if m.form == "quantized"]


def recall(name: str, task: Task, out: Path, setting: Setting):
    "Begin a comparison with the scores that recovered.json has of it, where --out has none and the setting is the same."
    known = json.loads(RESULTS.read_text())["tasks"].get(name) if RESULTS.is_file() else None
    if not known or (out / name).exists() or replace(Setting(**known["setting"]), seeds=setting.seeds, rates=setting.rates) != setting: return
    (out / name).mkdir(parents=True)
    write_json(out / name / "compare.json", {"task": task.name, "setting": known["setting"], "scores": known["scores"], "rows": []})


def shares(found: dict, name: str, key: str) -> dict:
    "The shares of a method, a list for each task that has them."
    tasks = {task: [row[key] for row in result["rows"] if row["name"] == name and row[key] is not None] for task, result in found.items()}
    return {task: runs for task, runs in tasks.items() if runs}


def cell(tasks: dict, all: int) -> str:
    "The mean over tasks of the mean over seeds, and the worst run; only where all tasks are there, so that rows can be compared."
    runs = list(tasks.values())
    return f"{statistics.mean(map(statistics.mean, runs)):.3f} ({min(map(min, runs)):.3f})" if len(runs) == all else "–"


USED = {"quantized, rounds, 10 exact steps": "what `emloc demo` does", "quantized, anchors in rounds": "what `emloc emulate` and `finetune` do",
        "quantized to 0.1 in the Fisher metric, bits by gradients, rounds with new emulators": "what they do at ratio 0.1"}


def table(found: dict, methods: list) -> str:
    "Markdown: these methods on every task, each in a line; first those that are used, and what they were before."
    judged = {task: "accuracy_share" if any(row["accuracy_share"] is not None for row in result["rows"]) else "nll_share" for task, result in found.items()}
    there = [name for name in in_order(row["name"] for result in found.values() for row in result["rows"]) if name in methods]
    lines = ["| | " + " | ".join(SHORT.get(task, task) + ("" if key == "accuracy_share" else ", NLL") for task, key in judged.items()) + " | mean accuracy (worst run) | mean NLL (worst run) |", "| --- |" + " --- |" * (len(judged) + 2)]
    for name in sorted(there, key=lambda name: next((i for i, used in enumerate(USED) if name.startswith(used)), len(USED))):
        own = {key: shares(found, name, key) for key in ("accuracy_share", "nll_share")}
        def of_task(task):
            runs = own[judged[task]].get(task)
            return f"{statistics.mean(runs):.3f}" + (f" ({several(len(runs), 'seed')})" if len(runs) < 3 else "") if runs else "–"
        means = cell(own["accuracy_share"], sum(key == "accuracy_share" for key in judged.values())), cell(own["nll_share"], len(judged))
        lines.append(f"| {f'**{name}** ({USED[name]})' if name in USED else name} | " + " | ".join([*map(of_task, judged), *means]) + " |")
    return "\n".join(lines)


def summary(found: dict, about: dict) -> str:
    "Markdown: every method on every task in a line."
    s = next(iter(found.values()))["setting"]
    return "\n".join([f"Recovered share of the accuracy, where nothing else is said: SmolLM2-135M-Instruct, emulators of ratio {s['ratio']:g} or as the name says, {s['steps']} steps of {s['batch_size']} rows, {s['rows']} test rows, the mean over three seeds, learning rate {s['rates'][0]:g}. Means over the tasks where all of them were measured.", "", table(found, NOW + [name + next(iter(EARLIER)) for name in USED]), "",
                      f"(Made on several machines of this size, the last of them: {machine.line(about)}.)"])


def older(comparison: Comparison) -> list:
    "Of what was measured before, the methods that have had fewer runs since."
    runs, found = Counter(row["name"] for row in comparison.rows(METHODS + BEFORE)), []
    for method in METHODS:
        most = runs[method.name]
        for own in (m for m in BEFORE if m.name.removeprefix(method.name) in EARLIER):
            if runs[own.name] > most: found.append(own)
            most = max(most, runs[own.name])
    return found


def history(found: dict) -> str:
    "Markdown: what was measured before."
    return f"What was measured when weights in bits were stored in other ways, and not as often since (a scale for every 64 inputs instead of one for each output; before that, inputs that were not mixed):\n\n{table(found, [m.name for m in BEFORE])}\n\n"


def chosen(comparison: Comparison) -> list:
    "Rows of the methods that were validated, if the learning rate of LoRA on the model was chosen among several."
    if len(comparison.validated(METHODS[0])) < 2: return []
    return comparison.rows([method for method in METHODS + BEFORE if comparison.validated(method)])


def of_chosen(found: dict) -> str:
    "Markdown: what is different where learning rates were chosen."
    lines, plain = [], lambda v: "–" if v is None else f"{v:.3f}"
    for task, result in found.items():
        for row in result["chosen"]:
            lines.append(f"| {SHORT.get(task, task)}, seed {row['seed']} | {row['name']} | {row['rate']:g} ({'of ' + str(row['tried']) if row['tried'] > 1 else 'no other was tried'}) | " + " | ".join(plain(row[k]) for k in ("accuracy", "nll", "accuracy_share", "nll_share")) + " |")
    if not lines: return ""
    return "\n".join(["All of the above with one learning rate, which is not the best for all of them. With rates chosen on validation rows, each method for itself:", "",
                      "| | | learning rate | accuracy | NLL | recovered of the accuracy | recovered of the NLL |", "| --- | --- | --- | --- | --- | --- | --- |", *lines, "", ""])


def details(found: dict) -> str:
    "Markdown: a table for each task."
    lines = []
    for task, result in found.items():
        s = result["setting"]
        rates = sorted({row["rate"] for row in result["rows"]})
        lines += [f"**{TITLES.get(task, task)}** ({s['steps']} steps of {s['batch_size']} rows, {s['rows']} test rows, seeds {', '.join(str(seed) for seed in sorted({row['seed'] for row in result['rows']}))}, "
                  f"learning rate {', '.join(f'{r:g}' for r in rates)}), mean (range) over the seeds:", "", result["markdown"], ""]
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="*", default=list(TITLES), help="none: only the table of what is there")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rows", type=int, default=300, help="test rows")
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-3], help="learning rates; of several each method gets the one that is best on the validation rows")
    parser.add_argument("--methods", nargs="+", default=[m.name for m in METHODS], help="names of METHODS; the reference is always there")
    parser.add_argument("--out", type=Path, default=Path("runs/recovered"))
    args = parser.parse_args()
    setting = Setting(steps=args.steps, rows=args.rows, seeds=tuple(args.seeds), rates=tuple(args.lr))
    found, about = {}, machine.describe()
    for name in TITLES:
        task, file = load_task(name), args.out / name / "compare.json"
        recall(name, task, args.out, setting)
        if name in args.tasks: Comparison(task, file.parent, setting).run([m for m in METHODS if m.name in args.methods])
        if not file.is_file(): continue
        every = Setting(**json.loads(file.read_text())["setting"])
        first, all_rates = (Comparison(task, file.parent, s) for s in (replace(every, rates=every.rates[:1]), every))
        for comparison in (first, all_rates): comparison.begin()
        rows = first.rows(METHODS + older(first))
        if rows: found[name] = {"setting": first.known["setting"], "scores": first.known["scores"], "rows": rows, "chosen": chosen(all_rates), "markdown": comparison_table(rows, first.score(None))}
    brief = summary(found, about)
    markdown = f"{brief}\n\n{of_chosen(found)}{history(found)}{details(found)}"
    RESULTS.write_text(json.dumps({"machine": about, "tasks": found, "summary": brief, "markdown": markdown}, indent=1) + "\n")
    share_figure({SHORT[task]: {"rows": [row for row in result["rows"] if row["name"] in NOW]} for task, result in found.items()}).savefig(HERE.parent / "nbs" / "images" / "recovered.png", dpi=110)
    print(markdown)
