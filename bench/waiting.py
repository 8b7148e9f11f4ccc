"""What do other programs on the machine cost? Small and large steps of emloc, alone and beside them, as threads wait in different ways.

    python bench/waiting.py

A thread of libgomp that has done its part of a product spins until the others have done theirs. Where one of them has no core, because
another program has it, that is time for nobody. Every cell is the mean of one process; the neighbours multiply matrices, one thread on
each core.
Writes bench/results/waiting.json.
"""
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import machine

HERE = Path(__file__).parent
SPINNING = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
# what is imported first, and what the environment says; emloc sets nothing where torch is there already
WAYS = {"as libgomp comes": ("torch", {}), "as emloc sets it: GOMP_SPINCOUNT=1000": ("emloc", {}), "OMP_WAIT_POLICY=PASSIVE": ("emloc", {"OMP_WAIT_POLICY": "PASSIVE"}), "one thread": ("emloc", {"OMP_NUM_THREADS": "1"})}
STEPS = ("one column's error carried on (576 x 127)", "a product (768 x 576 by 576 x 576)", "eigenvectors of 576 x 576", "a weight of 576 x 576 rounded to 3 bits")
NEIGHBOUR = "import torch; torch.set_num_threads(1); a = torch.rand(600, 600)\nwhile True: a @ a"
LIMIT = 5 # seconds for the repeats of one step


def times() -> list: # milliseconds of each of STEPS
    "In a process that has been told how to wait."
    import torch

    from emloc.rounding import quantize
    from emloc.spectrum import Gram
    torch.manual_seed(0)
    tall, square = torch.randn(768, 576), torch.randn(576, 576)
    gram = Gram(576)
    gram.add(torch.randn(2000, 576))
    work = (lambda: square[1:128].addr_(square[:127, 0], square[0], alpha=-1e-6), lambda: tall @ square, lambda: torch.linalg.eigh(gram.matrix), lambda: quantize(square, gram, 3.0))
    found = []
    for step in work:
        step()
        began, own = time.perf_counter(), []
        while len(own) < 3 or (time.perf_counter() - began < LIMIT and len(own) < 100):
            start = time.perf_counter()
            step()
            own.append(time.perf_counter() - start)
        found.append(1e3 * statistics.mean(own))
    return found


def measure(first: str, more: dict) -> list:
    "`times` in a new process."
    env = {k: v for k, v in os.environ.items() if k not in SPINNING} | more | {"PYTHONPATH": os.pathsep.join((str(HERE), str(HERE.parent)))}
    done = subprocess.run([sys.executable, "-c", f"import {first}, emloc, json, waiting\nprint(json.dumps(waiting.times()))"], env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def show(ms: float) -> str: return f"{ms:.3f}" if ms < 1 else f"{ms:.1f}"


if __name__ == "__main__":
    load, about, found = os.getloadavg()[0], machine.describe(), {}
    for beside in (False, True):
        neighbours = [subprocess.Popen([sys.executable, "-c", NEIGHBOUR]) for _ in range(os.cpu_count() if beside else 0)]
        try:
            for name, way in WAYS.items():
                found.setdefault(name, []).append(measure(*way))
                print(name, "beside other programs" if beside else "alone", *map(show, found[name][-1]), flush=True)
        finally:
            for neighbour in neighbours: neighbour.kill()
    lines = ["Milliseconds, alone / beside other programs that keep every core busy", "", f"| | {' | '.join(STEPS)} |", "| --- " * (len(STEPS) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{show(a)} / {show(b)}" for a, b in zip(*both)) + " |" for name, both in found.items()]
    markdown = "\n".join([*lines, "", f"({machine.line(about)}; load average before: {load:.1f}.)"])
    report = {"machine": about, "load_average_before": round(load, 1), "milliseconds": {name: {"alone": alone, "beside": beside} for name, (alone, beside) in found.items()}, "markdown": markdown}
    (HERE / "results" / "waiting.json").write_text(json.dumps(report, indent=1) + "\n")
    print(markdown)
