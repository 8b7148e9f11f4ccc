"""Does each stage need the memory that we promise? Every stage in a process of its own, on the CPU.

    python bench/memory.py [--quick] [--out runs/memory]

Stage 1 and stage 3 see one block, or one weight, at a time: on a random model of 1.1B parameters (TinyLlama's geometry,
bfloat16, several shards) their peak stays under 1 GiB over the imported libraries, and it does not grow with the number of
blocks (the median of three runs: where the allocator leaves holes is not the same every time).
Training the emulator needs no more than inference of the whole model, on the embedded model and on the large one.

Writes bench/results/memory.json. A result is kept under --out and not measured twice, so a run that was interrupted goes on;
--quick does everything with tiny sizes, to see that it works, and --again forgets what was kept. The allocator is as the
system and the package have it.
"""
import argparse
import json
from pathlib import Path

import machine
import stage
from emloc.model import Checkpoint, find_model
from models import GEOMETRIES, keep_model

HERE = Path(__file__).parent
GIB, MIB = 2**30, 2**20
# growth below this is the bookkeeping of more names, not weights: a block of the growth bench has 14 MB
GROWTH = 1.05
SIZES = { # geometry of the large model and of the one that grows, blocks of the latter, of the short one, and what the stages see
    "full": {"large": "1.1b", "growing": "blocks", "counts": (8, 16, 32), "short": 3, "rows": 64, "many_rows": 256, "length": 100, "train_length": 128, "judged": 8},
    "quick": {"large": "tiny", "growing": "tiny", "counts": (1, 2, 4), "short": 2, "rows": 16, "many_rows": 32, "length": 24, "train_length": 24, "judged": 4},
}
MODES = ("none", "clamp", "gram", "auto")


class Bench:
    "Jobs, their kept results, and the rows of the table."
    def __init__(self, out: Path, sizes: dict, again: bool = False):
        self.out, self.sizes, self.again, self.rows = out, sizes, again, []
        out.mkdir(parents=True, exist_ok=True)

    def model(self, geometry: dict, name: str, base) -> Path: return keep_model(geometry, self.out / name, tokenizer=base)

    def row(self, title: str, peak: int | None, bound: int | None, found: dict, note: str = ""):
        met = None if bound is None else peak is not None and peak <= bound
        self.rows.append({"stage": title, "peak_bytes": peak, "bound_bytes": bound, "met": met, "note": note or found.get("error", ""), "where": found.get("where", ""), "measured": found})
        print(line(self.rows[-1]), flush=True)

    def measure(self, title: str, name: str, bound: int | None, times: int = 1, **job) -> dict:
        "A job, in the table: the median of so many runs. Its directory stays for those that follow."
        if "out" in job: job["out"] = str(self.out / job["out"])
        runs = [stage.kept(self.out / "measured", f"{name}-{i}" if i else name, job, again=self.again) for i in range(times)]
        runs.sort(key=lambda found: found.get("peak_bytes", -1)) # one that failed comes first
        peaks = [found["peak_bytes"] / MIB for found in runs if "peak_bytes" in found]
        found = runs[times // 2 if len(peaks) == times else 0]
        self.row(title, found.get("peak_bytes"), bound, found, f"median of {times}: {peaks[0]:.0f} to {peaks[-1]:.0f}" if 1 < times == len(peaks) else "")
        return found

    def drop(self, *names: str):
        for name in names: stage.remove(self.out / name)


def line(row: dict) -> str:
    "A row of the table, in Markdown."
    show = lambda n: "–" if n is None else f"{n / MIB:.0f}"
    met = {None: "", True: "yes", False: "**no**"}[row["met"]]
    return f"| {row['stage']} | {show(row['peak_bytes'])} | {show(row['bound_bytes'])} | {met} | {row['note']} |"


def growth(bench: Bench, base):
    "Stage 1 on ever more blocks."
    sizes, first = bench.sizes, None
    for count in sizes["counts"]:
        name = f"{sizes['growing']}-{count}"
        model = bench.model(GEOMETRIES[sizes["growing"]] | {"num_hidden_layers": count}, name, base)
        found = bench.measure(f"stage 1, {count} blocks of hidden size {GEOMETRIES[sizes['growing']]['hidden_size']}", f"growth-{count}", first and int(first * GROWTH), times=3,
                              job="emulate", model=str(model), out=f"emulator-{name}", rows=sizes["rows"], length=sizes["length"])
        first = first or found.get("peak_bytes")
        bench.drop(f"emulator-{name}", name)


def compare_training(bench: Bench, title: str, name: str, model, emulator, adapter: str, what: str = "training the emulator", **job):
    "Training of the emulator against inference of the whole model, at the same batch and length."
    length = bench.sizes["train_length"]
    whole = next((row["measured"] for row in bench.rows if row["stage"] == f"{title}: inference of the whole model"), None)
    if not whole: whole = bench.measure(f"{title}: inference of the whole model", f"infer-{name}", None, job="infer", model=str(model), length=length)
    found = bench.measure(f"{title}: {what}", f"train-{name}", whole.get("peak_bytes"), **{"job": "train"} | job, emulator=str(emulator), out=adapter, length=length)
    if "peak_bytes" in found and "peak_bytes" in whole: bench.rows[-1]["ratio"] = found["peak_bytes"] / whole["peak_bytes"]
    if "ratio" in bench.rows[-1]:
        bench.rows[-1]["note"] = f"ratio {bench.rows[-1]['ratio']:.2f}; with the libraries {(found['peak_bytes'] + found['base_bytes']) / (whole['peak_bytes'] + whole['base_bytes']):.2f}"
        print(line(bench.rows[-1]), flush=True)


def quantized(bench: Bench, title: str, name: str, model, stage1: str):
    "What the commands do by default: whole weights in few bits, trained on, and trained on in rounds."
    packed = bench.measure(stage1, name, GIB, job="emulate", model=str(model), out="emulator-quantized", rows=bench.sizes["rows"], length=bench.sizes["length"], form="quantized")
    if "error" not in packed:
        emulator = bench.out / "emulator-quantized"
        compare_training(bench, title, name, model, emulator, "adapter-quantized", "training the quantized emulator")
        compare_training(bench, title, f"{name}-rounds", model, emulator, "adapter-rounds", "the same, in rounds of 25 steps", job="train_in_rounds")
    bench.drop("emulator-quantized", "adapter-quantized", "adapter-rounds")


def embedded(bench: Bench, base):
    "Stage 2 on the embedded model."
    out = bench.measure("embedded model: stage 1", "embedded", GIB, job="emulate", model=str(base), out="emulator-embedded", rows=bench.sizes["rows"], length=bench.sizes["length"])
    if "error" not in out: compare_training(bench, "embedded model", "embedded", base, bench.out / "emulator-embedded", "adapter-embedded")
    bench.drop("emulator-embedded", "adapter-embedded")
    quantized(bench, "embedded model", "embedded-quantized", base, "embedded model: stage 1, quantized")
    few = bench.measure("embedded model: stage 1, quantized to a tenth in the Fisher metric", "embedded-few", GIB, job="emulate", model=str(base), out="emulator-few", rows=bench.sizes["rows"], length=bench.sizes["length"], form="quantized", metric="fisher", ratio=0.1)
    if "error" not in few: compare_training(bench, "embedded model", "embedded-renewed", base, bench.out / "emulator-few", "adapter-few", "training on it in rounds, each with a new emulator", job="train_in_rounds", renew=1)
    bench.drop("emulator-few", "adapter-few")


def large(bench: Bench, base):
    "Every stage on the large model."
    sizes, out = bench.sizes, bench.out
    geometry, length, rows = GEOMETRIES[sizes["large"]], sizes["length"], sizes["rows"]
    short = bench.model(geometry | {"num_hidden_layers": sizes["short"]}, "short", base)
    bench.measure(f"stage 1, {sizes['many_rows']} rows, the first {sizes['short']} blocks", "stage1-short", GIB, job="emulate", model=str(short), out="emulator-short", rows=sizes["many_rows"], length=length)
    bench.drop("emulator-short")
    for form, title in (("lowrank", "stage 1"), ("quantized", "stage 1, quantized")):
        bench.measure(f"{title} in the Fisher metric, {rows} rows, the first {sizes['short']} blocks", f"stage1-fisher{'' if form == 'lowrank' else '-quantized'}", GIB, job="emulate", model=str(short), out="emulator-short", rows=rows, length=length, metric="fisher", form=form)
        bench.drop("emulator-short")
    bench.drop("short")
    model = str(bench.model(geometry, "large", base))
    emulator, adapter = str(out / "emulator-large"), str(out / "adapter-large")
    bench.measure(f"stage 1, {rows} rows, all {geometry['num_hidden_layers']} blocks", "stage1", GIB, job="emulate", model=model, out="emulator-large", rows=rows, length=length)
    bench.measure("anchors", "anchor", GIB, job="anchor", emulator=emulator, model=model, out="anchors", length=length)
    bench.drop("anchors")
    compare_training(bench, "large model", "large", model, emulator, "adapter-large")
    compare_training(bench, "large model", "large-rounds", model, emulator, "adapter-rounds", "the same, in rounds of 25 steps", job="train_in_rounds")
    bench.drop("adapter-rounds")
    quantized(bench, "large model", "large-quantized", model, f"stage 1, quantized, {rows} rows, all {geometry['num_hidden_layers']} blocks")
    for mode in MODES:
        bench.measure(f"correct, mode {mode}", f"correct-{mode}", GIB, job="correct", adapter=adapter, emulator=emulator, model=model, out=f"corrected-{mode}", mode=mode, length=length, held_out=sizes["judged"])
    bench.measure("merge", "merge", GIB, job="merge", model=model, adapter=str(out / "corrected-clamp"), out="merged")
    bench.drop("merged")
    bench.measure("polish, one step", "polish", GIB, job="polish", adapter=str(out / "corrected-clamp"), model=model, out="polished", length=length)
    bench.rows.append({"stage": "the large model itself", "peak_bytes": Checkpoint(model).nbytes, "bound_bytes": None, "met": None, "note": f"{len(set(Checkpoint(model).files.values()))} shards on disk", "where": "", "measured": {}})
    print(line(bench.rows[-1]), flush=True)


HEAD = ["| stage | peak over the libraries, MiB | bound, MiB | met | |", "| --- | --- | --- | --- | --- |"]
PARTS = {"growth": growth, "embedded": embedded, "large": large}
GROUPS = { # what the rows of a table begin with: all that is left is the large model's
    "**Does stage 1 grow with the number of blocks?** Random models of hidden size 768; the bound is 5% more than the peak with the fewest blocks.": tuple(f"stage 1, {n} blocks" for n in (*SIZES["full"]["counts"], *SIZES["quick"]["counts"])),
    "**SmolLM2-135M-Instruct.** Training is bound by inference of the whole model at the same batch and length.": ("embedded model",),
    "**TinyLlama's geometry, 1.2 billion parameters, 2.2 GiB.** Stages 1 and 3 are bound by 1 GiB, training by inference of the whole model.": ("",)}


def tables(rows: list, about: dict) -> str:
    "Markdown."
    left, parts = list(rows), []
    for title, begins in GROUPS.items():
        own = [row for row in left if row["stage"].startswith(begins)]
        left = [row for row in left if row not in own]
        if own: parts += [title, "", *HEAD, *map(line, own), ""]
    return "\n".join([*parts, f"({machine.line(about)}. Each row is a process of its own; its peak is the larger of the resident set every 10 ms and the kernel's VmHWM, minus the resident set once everything is imported.)"])


def run(out: Path, *, quick: bool = False, base="default", parts: list = list(PARTS), again: bool = False, results: Path | None = None) -> dict:
    "All parts; the report that is written."
    base, bench = find_model(base), Bench(out, SIZES["quick" if quick else "full"], again)
    print("\n".join(HEAD), flush=True)
    for part in parts: PARTS[part](bench, base)
    about = machine.describe()
    markdown = tables(bench.rows, about)
    for row in bench.rows: row["measured"].pop("job", None)
    report = {"machine": about, "quick": quick, "rows": bench.rows, "markdown": markdown}
    if results:
        results.parent.mkdir(parents=True, exist_ok=True)
        results.write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works; writes no result unless --results says where")
    parser.add_argument("--out", type=Path, default=Path("runs/memory"), help="models and results of single stages")
    parser.add_argument("--base", default="default", help="the embedded model: the tokenizer's source, and the small model of stage 2")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--again", action="store_true", help="measure anew what is there already")
    parser.add_argument("--results", type=Path, help="the report; by default bench/results/memory.json")
    args = parser.parse_args()
    results = args.results or (None if args.quick else HERE / "results" / "memory.json")
    print("\n" + run(args.out, quick=args.quick, base=args.base, parts=args.parts, again=args.again, results=results)["markdown"])
