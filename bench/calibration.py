"""How many calibration rows, and how much of each? The cosine of the emulator's gradient with the model's, on rows that no calibration has seen.

    python bench/calibration.py [--tasks bbc inflect] [--rows 16 64 256] [--tokens 24] [--out runs/calibration]

Anchors are made around a new LoRA, so what differs is only how the loss goes back through the emulator's weights (`emloc.direction`). Results are kept under --out and not made twice. Writes bench/results/calibration.json.
"""
import argparse
import json
import shutil
from pathlib import Path

import machine
from emloc.data import encode_rows, load_task, load_tokenizer
from emloc.direction import compare_gradients
from emloc.emulator import build_emulator
from emloc.model import find_model
from emloc.output import write_json
from recovered import SHORT

HERE = Path(__file__).parent
EMULATORS = {"low-rank, 0.25": dict(ratio=0.25, metric="activation", form="lowrank"), "quantized, 0.25": dict(ratio=0.25, form="quantized"), "quantized, 0.1, Fisher metric": dict(ratio=0.1, form="quantized", metric="fisher")}


def first_tokens(rows, count: int | None):
    "Encoded rows, each cut after so many tokens; those that lose their completion so are text to learn all of."
    if count is None: return rows
    def cut(row):
        ids, labels = row["input_ids"][:count], row["labels"][:count]
        return {"input_ids": ids, "labels": labels if any(n >= 0 for n in labels) else ids}
    return rows.map(cut)


def cosine(kind: str, calibration, unseen, folder: Path) -> float:
    "Build the emulator, look, and throw it away."
    build_emulator("default", calibration, folder, **EMULATORS[kind])
    found = compare_gradients(folder, "default", unseen).cosine
    shutil.rmtree(folder)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=["bbc", "inflect"])
    parser.add_argument("--rows", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--tokens", type=int, default=24, help="where rows are cut too, if they are longer")
    parser.add_argument("--unseen", type=int, default=32, help="validation rows on which gradients are compared")
    parser.add_argument("--out", type=Path, default=Path("runs/calibration"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    file, tokenizer = args.out / "found.json", load_tokenizer(find_model("default"))
    known, rows = json.loads(file.read_text()) if file.exists() else {}, []
    for name in args.tasks:
        task = load_task(name)
        unseen = task.validation.select(range(min(args.unseen, len(task.validation))))
        for count in args.rows:
            for tokens in (None, args.tokens):
                encoded = encode_rows(task.calibration(count), tokenizer)
                if tokens and max(map(len, encoded["input_ids"])) <= tokens: continue # nothing would be cut
                calibration = first_tokens(encoded, tokens)
                row = {"task": name, "rows": count, "first_tokens": tokens, "tokens": sum(map(len, calibration["input_ids"])), "cosines": {}}
                for kind in EMULATORS:
                    key = f"{name}, {count} rows, first {tokens}, {kind}, {len(unseen)} unseen"
                    if key not in known:
                        known[key] = cosine(kind, calibration, unseen, args.out / "emulator")
                        write_json(file, known)
                        print(f"{key}: {known[key]:.3f}", flush=True)
                    row["cosines"][kind] = known[key]
                rows.append(row)
    about = machine.describe()
    lines = [f"SmolLM2-135M-Instruct, {args.unseen} validation rows, a new LoRA: cosine of the gradients, all layers together", "", f"| task | rows | of each | tokens in all | {' | '.join(EMULATORS)} |", "| --- " * (4 + len(EMULATORS)) + "|"]
    for row in rows: lines.append(f"| {SHORT.get(row['task'], row['task'])} | {row['rows']} | {'all' if row['first_tokens'] is None else f'the first {args.tokens} tokens'} | {row['tokens']} | {' | '.join(f'{c:.3f}' for c in row['cosines'].values())} |")
    markdown = "\n".join([*lines, "", f"({machine.line(about)}.)"])
    (HERE / "results" / "calibration.json").write_text(json.dumps({"machine": about, "rows": rows, "markdown": markdown}, indent=1) + "\n")
    print(markdown)
