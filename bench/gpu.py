"""All three stages on a GPU whose memory is capped: one command for whoever has one.

    python bench/gpu.py [--geometry 8b] [--cap 24] [--out runs/gpu]      # on a machine with a CUDA GPU
    python bench/gpu.py --device cpu --geometry tiny                     # the same path, small

A random model of Llama 3 8B's geometry is made on the spot (16 GB on disk). Every stage runs in a process of its own under
torch.cuda.set_per_process_memory_fraction; the table has the peak that torch counted and the seconds. LoRA on the whole model
runs under the same cap, to see whether it fits. Writes bench/results/gpu.json.

So far this has been run on a CPU only, with tiny sizes (tests/test_bench.py).
"""
import argparse
import json
from pathlib import Path

import machine
import stage
from models import GEOMETRIES, keep_model

HERE = Path(__file__).parent
SIZES = {"full": {"rows": 128, "length": 512, "train_length": 1024, "batch_size": 2}, "tiny": {"rows": 16, "length": 24, "train_length": 24, "batch_size": 2}}


def jobs(model: Path, out: Path, sizes: dict) -> list: # [(title, job)], in the order in which they need each other
    "Everything that is measured."
    place, m = lambda name: str(out / name), str(model)
    batch, length = {"batch_size": sizes["batch_size"]}, {"length": sizes["length"]}
    train = {"length": sizes["train_length"], "steps": 2} | batch
    return [("1 emulator (ratio 0.25)", dict(job="emulate", model=m, out=place("emulator"), rows=sizes["rows"], **length)),
            ("2 LoRA on the emulator", dict(job="train", emulator=place("emulator"), out=place("raw"), **train)),
            ("3 correction: gram", dict(job="correct", adapter=place("raw"), emulator=place("emulator"), model=m, out=place("gram"), mode="gram", rows=16, **length)),
            ("3 correction: auto", dict(job="correct", adapter=place("raw"), emulator=place("emulator"), model=m, out=place("auto"), mode="auto", rows=16, **length)),
            ("polish, one step", dict(job="polish", adapter=place("auto"), model=m, out=place("polished"), rows=8, **length, **batch)),
            ("merge", dict(job="merge", model=m, adapter=place("auto"), out=place("merged"))),
            ("inference of the whole model", dict(job="infer", model=m, length=sizes["train_length"], **batch)),
            ("LoRA on the whole model", dict(job="train_whole", model=m, out=place("whole"), **train))]


def measure(geometry: str, out: Path, device: str, cap: float | None) -> dict:
    "The report: one row for each job."
    tiny, rows = geometry == "tiny" and device == "cpu", []
    model = (stage.forked if tiny else lambda make, *given: make(*given))(keep_model, GEOMETRIES[geometry], out / geometry)
    for title, job in jobs(model, out, SIZES["tiny" if geometry == "tiny" else "full"]):
        if "out" in job: stage.remove(Path(job["out"]))
        job |= {"gpu_cap": int(cap * 2**30)} if device == "cuda" and cap else {}
        found = stage.forked(stage.perform, job) if tiny else stage.in_own_process(job, device=device)
        rows.append({"stage": title, "seconds": found.get("seconds"), "peak_bytes": found.get("gpu_bytes", found.get("peak_bytes")), "error": found.get("error")})
        print(line(rows[-1]), flush=True)
    about = machine.describe()
    return {"machine": about, "geometry": geometry, "device": device, "cap_bytes": cap and cap * 2**30, "rows": rows,
            "markdown": "\n".join([*HEAD, *map(line, rows), "", f"({machine.line(about)}; cap {cap:g} GiB)" if device == "cuda" else f"({machine.line(about)})"])}


HEAD = ["| stage | seconds | peak, MiB | |", "| --- | --- | --- | --- |"]


def line(row: dict) -> str:
    "A row of the table, in Markdown."
    number = lambda value, form: "–" if value is None else format(value, form)
    return f"| {row['stage']} | {number(row['seconds'], '.1f')} | {number(row['peak_bytes'] and row['peak_bytes'] / 2**20, '.0f')} | {row['error'] or ''} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", choices=GEOMETRIES, default="8b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--cap", type=float, default=24, help="GiB of GPU memory")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--results", type=Path, help="where the report goes; by default bench/results/gpu.json, on a GPU only")
    args = parser.parse_args()
    print("\n".join(HEAD))
    report = measure(args.geometry, args.out, args.device, args.cap)
    results = args.results or (HERE / "results" / "gpu.json" if args.device == "cuda" else None)
    if results: results.write_text(json.dumps(report, indent=1) + "\n")
