"""How good is the corrected adapter? `emloc demo --paper` with several seeds, each in a process of its own.

    python bench/quality.py [--seeds 0 1 2] [--out runs/quality]

Writes bench/results/quality.json (with the table of the README) and nbs/images/quality.png. A seed whose run is there already is not run again.
"""
import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import machine
from emloc.explore import score_figure

HERE = Path(__file__).parent


def run(seed: int, out: Path) -> dict:
    "One demo with the reference; the report that it wrote."
    report = out / f"seed-{seed}" / "demo.json"
    if not report.is_file():
        subprocess.run([sys.executable, "-m", "emloc.cli", "demo", "--paper", "--reference", "--seed", str(seed), "--out", str(report.parent)], check=True)
    return json.loads(report.read_text())


def spread(values: list) -> str:
    "Mean and range."
    return f"{statistics.mean(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def table(reports: list, about: dict) -> str:
    "Markdown: scores over seeds, then bytes, seconds and memory of the first seed."
    first = reports[0]
    lines = [f"SmolLM2-135M-Instruct, BBC News topics, ratio {first['settings']['ratio']:g}, {first['settings']['steps']} steps, {first['settings']['rows']} test articles, {len(reports)} seeds: mean (range)", "",
             "| | accuracy | NLL |", "| --- | --- | --- |"]
    for i, row in enumerate(first["rows"]):
        columns = [spread([r["rows"][i][key] for r in reports]) for key in ("accuracy", "nll")]
        lines.append(f"| {row['name']} | {columns[0]} | {columns[1]} |")
    lines += ["", f"The emulator has {first['emulator_bytes'] / 1e6:.0f} MB, {first['emulator_bytes'] / first['model_bytes']:.3f} of the model's {first['model_bytes'] / 1e6:.0f} MB.", "",
              "| stage | seconds | peak resident set, MiB |", "| --- | --- | --- |"]
    for i, stage in enumerate(first["stages"]):
        lines.append(f"| {stage['name']} | {statistics.mean(r['stages'][i]['seconds'] for r in reports):.0f} | {max(r['stages'][i]['peak_bytes'] for r in reports) / 2**20:.0f} |")
    return "\n".join([*lines, "", f"({machine.line(about)}. One process does all stages of a seed, so later peaks include what the allocator kept from earlier ones.)"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/quality"))
    args = parser.parse_args()
    reports = [run(seed, args.out) for seed in args.seeds]
    about = machine.describe()
    for report, seed in zip(reports, args.seeds): report["settings"] = {k: v for k, v in report["settings"].items() if k != "model"} | {"seed": seed}
    markdown = table(reports, about)
    (HERE / "results" / "quality.json").write_text(json.dumps({"machine": about, "reports": reports, "markdown": markdown}, indent=1) + "\n")
    (HERE.parent / "nbs" / "images").mkdir(parents=True, exist_ok=True)
    means = [{"name": row["name"], **{k: statistics.mean(r["rows"][i][k] for r in reports) for k in ("accuracy", "nll")}} for i, row in enumerate(reports[0]["rows"])]
    score_figure(means).savefig(HERE.parent / "nbs" / "images" / "quality.png", dpi=110)
    print(markdown)
