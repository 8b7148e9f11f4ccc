"""How fast is the decomposition? Ours against the naive one, for all weights of the embedded model, and its share of stage 1.

    python bench/decompose.py [--rows 256] [--ratio 0.25]

Writes bench/results/decompose.json. The two take turns, block by block, so that noise of the machine hits both; our Gram matrices
are those that stage 1 sums while the block runs, one for each distinct input, or of the outputs where that is less work, and the
weights of a block are factorised side by side. What the same takes one weight after the other is said too.

Leave the thread libraries as they come: with OMP_WAIT_POLICY=PASSIVE eigenvectors took two to three times as long in both ways on the
machine of the stored result, and a second BLAS with threads of its own (NumPy's, SciPy's) beside torch's made ours three times slower.
"""
import argparse
import json
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from unittest import mock

import machine
import torch

import emloc
from emloc import block, emulator, output, walk
from emloc.block import divide, side_by_side, watched_inputs
from emloc.model import dense_weight
from emloc.rank import uniform
from emloc.spectrum import Gram, decompose, truncate

HERE = Path(__file__).parent
IN_TURN = "ours, one weight after the other"


def naive_gram(batches: list) -> torch.Tensor:
    "Σ xᵀx in float32."
    return sum(x.float().T @ x.float() for x in batches)


def naive_factors(weight: torch.Tensor, gram: torch.Tensor, rank: int) -> tuple:
    "Eigenvectors of the Gram matrix, full SVD of the scaled weight, explicit inverse; all in float32."
    weight = weight.float()
    values, vectors = torch.linalg.eigh(gram)
    root = vectors * values.clamp_min(values[-1] * 1e-6).sqrt() @ vectors.T
    left, sigma, right = torch.linalg.svd(weight @ root, full_matrices=False)
    right = right @ torch.linalg.inv(root)
    return left[:, :rank] * sigma[:rank], right[:rank]


class Clock(defaultdict):
    "Seconds by key."
    def __init__(self): super().__init__(float)

    def __call__(self, key, function, *args):
        start = time.perf_counter()
        result = function(*args)
        self[key] += time.perf_counter() - start
        return result


def optimum(weight: torch.Tensor, gram: torch.Tensor, rank: int) -> float:
    "Σ_{j>rank} σ² in float64: from the eigenvalues of W G Wᵀ or of Sᵀ WᵀW S, S the eigen-root."
    if weight.shape[0] <= weight.shape[1]: small = weight @ gram @ weight.T
    else:
        values, vectors = torch.linalg.eigh(gram)
        scaled = weight @ (vectors * values.clamp_min(0).sqrt())
        small = scaled.T @ scaled
    return float(torch.linalg.eigvalsh(small)[:-rank].sum())


def excess(weight: torch.Tensor, gram: torch.Tensor, factors: tuple, best: float) -> float:
    "‖X(W − UV)ᵀ‖² / optimum − 1, in float64."
    d = weight - factors[0].double() @ factors[1].double()
    return float(((d @ gram) * d).sum()) / best - 1


def against_naive(rows, ratio: float) -> dict:
    "Both ways on every weight: seconds and excess error."
    clock, errors, count = Clock(), defaultdict(list), defaultdict(int)
    add = Gram.add
    for step in walk.Walk(emloc.default_model(), rows):
        inputs = defaultdict(list)
        hooks = step.on_inputs(lambda names, x: inputs[names].append(x))
        with watched_inputs(step) as grams, mock.patch.object(Gram, "add", lambda *args: clock(("gram", "ours"), add, *args)): step.run()
        hooks.remove()
        grams = {n: gram for names, gram in grams.items() for n in names}
        weights = {n: dense_weight(m) for n, m in step.linears.items()}
        ranks = uniform({n: w.shape for n, w in weights.items()}, ratio)
        of = {n: batches for names, batches in inputs.items() for n in names}
        [largest_first] = divide({n: w.shape for n, w in weights.items()}, 1)
        def naive(n): return clock((tuple(weights[n].shape), "naive"), naive_factors, weights[n], clock(("gram", "naive"), naive_gram, of[n]), ranks[n])
        def ours(n): return truncate(decompose(weights[n], grams[n], n, ranks[n]), ranks[n])
        ways = {"naive": lambda: map(naive, largest_first), "ours": lambda: clock(("all", "ours"), side_by_side, ours, largest_first, step.walk.device),
                IN_TURN: lambda: (clock((tuple(weights[n].shape), IN_TURN), ours, n) for n in largest_first)}
        factors = {}
        for way in (ways if step.index % 2 else reversed(ways)):
            for gram in grams.values(): gram._root = None # each way finds its own
            factors[way] = dict(zip(largest_first, ways[way]()))
        for names, batches in inputs.items():
            truth = Gram(batches[0].shape[-1], torch.float64)
            for x in batches: truth.add(x)
            for n in names:
                count[tuple(weights[n].shape)] += 1
                exact = weights[n].double()
                best = optimum(exact, truth.matrix, ranks[n])
                for way in ways: errors[way].append((excess(exact, truth.matrix, factors[way][n], best), n))
        print(f"block {step.index}: " + ", ".join(f"{way} {sum(s for (_, w), s in clock.items() if w == way):.1f} s" for way in ways), flush=True)
    report = {"weights": sum(count.values()), "shapes": []}
    for way in errors:
        gram = clock["gram", "naive" if way == "naive" else "ours"]
        decomposition = sum(s for (key, w), s in clock.items() if w == way and key != "gram")
        report[way] = {"gram_seconds": gram, "decompose_seconds": decomposition, "seconds": gram + decomposition,
                       "worst_excess": max(errors[way])[0], "worst_weight": max(errors[way])[1], "mean_excess": sum(e for e, _ in errors[way]) / len(errors[way])}
    report["ratio"] = report["naive"]["seconds"] / report["ours"]["seconds"]
    report["ratio_without_grams"] = report["naive"]["decompose_seconds"] / report["ours"]["decompose_seconds"]
    for shape, n in count.items():
        report["shapes"].append({"shape": shape, "weights": n, **{f"{way}_ms": clock[shape, way] / n * 1e3 for way in ("naive", IN_TURN)}, "ratio": clock[shape, "naive"] / clock[shape, IN_TURN]})
    return report


def shares(rows, ratio: float) -> dict:
    "Stage 1 as it is, with a clock around its parts."
    clock, inside = Clock(), []
    def timed(owner, name, key):
        own = getattr(owner, name)
        def wrapper(*args, **kwargs):
            if key in ("input/output",) and inside: return own(*args, **kwargs)
            inside.append(key)
            start = time.perf_counter()
            try: return own(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - start
                inside.pop()
                clock[key] += seconds
                if inside: clock[inside[-1]] -= seconds
        setattr(owner, name, wrapper)
        return owner, name, own
    patched = [timed(walk.Step, "run", "forward"), timed(Gram, "add", "Gram matrices"), timed(block, "side_by_side", "decomposition"),
               timed(emulator, "finish_emulator", "input/output"), timed(emulator, "save_file", "input/output"), timed(output, "write_json", "input/output"),
               timed(output, "finish_directory", "input/output"), timed(walk.Walk, "save", "input/output"), timed(walk, "fill", "input/output")]
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as out: emulator.build_emulator("default", rows, Path(out) / "emulator", ratio=ratio)
    finally:
        for owner, name, own in patched: setattr(owner, name, own)
    total = time.perf_counter() - start
    clock["the rest"] = total - sum(clock.values())
    return {"seconds": total, "parts": {key: {"seconds": s, "share": s / total} for key, s in sorted(clock.items(), key=lambda item: -item[1])}}


def table(report: dict) -> str:
    "Markdown."
    both, settings = report["against_naive"], report["settings"]
    lines = [f"SmolLM2-135M-Instruct, {both['weights']} weights, ratio {settings['ratio']:g}, {settings['rows']} rows of BBC News, {settings['threads']} threads", "",
             "| | Gram matrices, s | decomposition, s | both, s | worst excess error | mean excess error |", "| --- | --- | --- | --- | --- | --- |"]
    for way in ("naive", "ours", IN_TURN):
        r = both[way]
        lines.append(f"| {way} | {r['gram_seconds']:.1f} | {r['decompose_seconds']:.1f} | {r['seconds']:.1f} | {r['worst_excess']:.1e} | {r['mean_excess']:.1e} |")
    lines += [f"| ratio | {both['naive']['gram_seconds'] / both['ours']['gram_seconds']:.1f} | {both['ratio_without_grams']:.1f} | {both['ratio']:.1f} | | |", "",
              "| weights of shape, one after the other | naive, ms | ours, ms | ratio |", "| --- | --- | --- | --- |"]
    lines += [f"| {s['weights']} × {tuple(s['shape'])} | {s['naive_ms']:.0f} | {s[f'{IN_TURN}_ms']:.0f} | {s['ratio']:.1f} |" for s in both["shapes"]]
    lines += ["", f"| stage 1: {report['stage1']['seconds']:.0f} s | seconds | share |", "| --- | --- | --- |"]
    lines += [f"| {key} | {part['seconds']:.1f} | {part['share']:.0%} |" for key, part in report["stage1"]["parts"].items()]
    return "\n".join([*lines, "", f"({machine.line(report['machine'])})"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--ratio", type=float, default=0.25)
    args = parser.parse_args()
    rows = emloc.load_task("bbc").calibration(args.rows, 0)
    with torch.no_grad():
        report = {"machine": machine.describe(), "settings": {**vars(args), "threads": torch.get_num_threads()},
                  "against_naive": against_naive(rows, args.ratio), "stage1": shares(rows, args.ratio)}
    report["markdown"] = table(report)
    (HERE / "results" / "decompose.json").write_text(json.dumps(report, indent=1) + "\n")
    print(report["markdown"])
