"""What anchors cost on disk, and what fewer or coarser ones cost in score: An anchor after every block, after some of them, after the last alone.

    python bench/storage.py [--task inflect] [--seeds 0] [--out runs/recovered]

Trains on the quantized emulator with anchors in rounds of 25 steps, beside what bench/recovered.py left under --out; what was trained or scored there is not done again. Writes bench/results/storage.json.
"""
import argparse
import json
from pathlib import Path

import machine
from emloc.anchor import anchor_bytes, anchored_blocks
from emloc.compare import METHODS, Comparison, Method, Setting
from emloc.data import encode_rows, load_task, load_tokenizer
from emloc.model import Checkpoint, block_names, find_model, skeleton

HERE = Path(__file__).parent


def variants(blocks: int) -> list: # of the method "quantized, anchors in rounds"
    make = lambda every, stored="bfloat16": Method(f"every {every}, {stored}", "activation", every, 25, form="quantized", stored=stored)
    return [*(make(k) for k in (1, 2, 6, blocks)), make(1, "int8"), Method("none", "activation", form="quantized")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", default="inflect")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="*", help="names of variants to run, such as 'every 6, bfloat16'; the table has all that is there")
    parser.add_argument("--out", type=Path, default=Path("runs/recovered"))
    args = parser.parse_args()
    path = find_model("default")
    whole = skeleton(Checkpoint(path))
    blocks, hidden = len(block_names(whole)), whole.config.hidden_size
    comparison = Comparison(load_task(args.task), args.out / args.task, Setting())
    comparison.begin()
    comparison.score(None)
    for seed in args.seeds:
        for method in [METHODS[0], *variants(blocks)]:
            if args.only is None or method.name in args.only or method is METHODS[0]: comparison.tried(method, seed, 1e-3)
    rows = []
    tokens = sum(map(len, encode_rows(comparison.train, load_tokenizer(path))["input_ids"])) / len(comparison.train) * 200
    for method in variants(blocks):
        found = comparison.recovered(method, args.seeds, 1e-3)
        if not found: continue
        stored = [anchor_bytes(n, hidden, len(anchored_blocks(blocks, method.every)), method.stored) if method.every else 0 for n in (1, round(tokens))]
        rows.append({"name": method.name, "every": method.every, "stored": method.stored, "bytes_per_token": stored[0], "bytes_per_round": stored[1], "seeds": found["seeds"]} | {f"{k}_share": found[k] for k in ("accuracy", "nll")})
    about = machine.describe()
    lines = [f"SmolLM2-135M-Instruct, task {args.task}, quantized emulator of ratio 0.25, rounds of 25 steps of 8 rows, seed{'s' * (len(args.seeds) > 1)} {', '.join(map(str, args.seeds))}", "",
             "| an anchor after | stored as | bytes a token | on disk in a round, MB | recovered of the accuracy | recovered of the NLL |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        after = {0: "no block", 1: "every block", blocks: "the last block"}.get(row["every"], f"every {row['every']} blocks")
        lines.append(f"| {after} | {row['stored'] if row['every'] else '–'} | {row['bytes_per_token']} | {row['bytes_per_round'] / 1e6:.1f} | {row['accuracy_share']:.3f} | {row['nll_share']:.3f} |")
    markdown = "\n".join([*lines, "", f"({machine.line(about)}.)"])
    (HERE / "results" / "storage.json").write_text(json.dumps({"machine": about, "rows": rows, "markdown": markdown}, indent=1) + "\n")
    print(markdown)
