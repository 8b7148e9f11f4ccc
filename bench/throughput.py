"""Is training on the emulator faster? Tokens per second against LoRA on the whole model, and where the time goes.

    python bench/throughput.py [--ratio 0.25] [--quick]

The model, its emulator of low-rank factors and its quantized emulator take turns, step by step, in one process, so that noise of the
machine hits all; the median is reported. Forward and backward as in training: bfloat16 autocast, attention of short rows in plain
products, LoRA of rank 8 on all linears, logits of the last 16 positions. Writes bench/results/throughput.json.
"""
import argparse
import statistics
import tempfile
import time
from pathlib import Path

import machine
import torch
from emloc.arithmetic import load_whole, short_attention
from emloc.data import load_task
from emloc.emulator import build_emulator
from emloc.lowrank import load_emulator
from emloc.model import default_model
from emloc.pairlora import wrap
from models import GEOMETRIES, write_model

HERE = Path(__file__).parent
WIDE = "TinyLlama's geometry, 3 blocks"
CASES = [("SmolLM2-135M", 8, 100), ("SmolLM2-135M", 16, 128), ("SmolLM2-135M", 4, 512), (WIDE, 8, 128), (WIDE, 2, 512)]
GROUPS = {"matrix products": ("aten::mm", "aten::addmm", "aten::_addmm_activation"), "attention": ("_scaled_dot_product", "aten::bmm", "aten::_softmax", "aten::_softmax_backward_data")}


def trainable(model):
    "With a LoRA, ready to train."
    model = wrap(model).train()
    model.config.use_cache = False
    return model


def step(model, ids: torch.Tensor):
    "Forward and backward."
    keep = torch.arange(ids.shape[1] - 17, ids.shape[1])
    with short_attention(ids.shape[1], ids.device, torch.bfloat16):
        with torch.autocast(ids.device.type, torch.bfloat16): logits = model(input_ids=ids, logits_to_keep=keep.to(ids.device), use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, -16:].flatten()).backward()
    for p in model.parameters(): p.grad = None


def shares(model, ids: torch.Tensor) -> dict: # {group: share of the time}
    "Where a step's time goes."
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile: step(model, ids)
    events = {e.key: e.self_cpu_time_total for e in profile.key_averages()}
    total, found = sum(events.values()), {}
    for group, names in GROUPS.items(): found[group] = sum(t for k, t in events.items() if any(n in k if n.startswith("_") else n == k for n in names)) / total
    return found | {"everything else": 1 - sum(found.values())}


def compare(rivals: dict, rows: int, tokens: int, repeats: int) -> dict:
    "All of them on the same tokens, in turns."
    ids, seconds = torch.randint(1000, 49000, (rows, tokens), generator=torch.Generator().manual_seed(0)), {name: [] for name in rivals}
    for model in rivals.values(): step(model, ids)
    for _ in range(repeats):
        for name, model in rivals.items():
            begin = time.perf_counter()
            step(model, ids)
            seconds[name].append(time.perf_counter() - begin)
    median = {name: statistics.median(s) for name, s in seconds.items()}
    return {"rows": rows, "tokens": tokens, "tokens_per_second": {n: rows * tokens / s for n, s in median.items()}, "ratio": median["model"] / median["emulator"], "ratio_quantized": median["model"] / median["quantized"],
            "shares": {name: shares(model, ids) for name, model in rivals.items()}}


def linear_parameters(model) -> int: # of blocks: dense or in pairs, without the LoRA
    return sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and "lora_" not in n)


def table(report: dict) -> str:
    "Markdown."
    lines = [f"On {machine.line(report['machine'])}: tokens a second of LoRA training on the model and on its emulators, and how many times as fast these are. The low-rank emulator has a quarter of the blocks' parameters; attention, which it shares with the model, has the share of its time in the last column.", "",
             "| model | rows × tokens | model | low-rank | times | quantized | times | attention |", "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for r in report["rows"]:
        speed = r["tokens_per_second"]
        lines.append(f"| {r['model']} | {r['rows']} × {r['tokens']} | {speed['model']:.0f} | {speed['emulator']:.0f} | {r['ratio']:.2f} | {speed['quantized']:.0f} | {r['ratio_quantized']:.2f} | {r['shares']['emulator']['attention']:.0%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--quick", action="store_true", help="one repeat; nothing is written")
    args = parser.parse_args()
    rows, found = load_task("bbc").calibration(64), []
    with tempfile.TemporaryDirectory() as tmp:
        for name in dict.fromkeys(case[0] for case in CASES):
            path = default_model() if name != WIDE else write_model(GEOMETRIES["1.1b"] | {"num_hidden_layers": 3}, Path(tmp) / "wide")
            emulator = lambda form: trainable(load_emulator(build_emulator(path, rows, Path(tmp) / f"{form}-{path.name}", ratio=args.ratio, form=form)))
            rivals = {"model": trainable(load_whole(path)), "emulator": emulator("lowrank"), "quantized": emulator("quantized")}
            smaller = linear_parameters(rivals["model"]) / linear_parameters(rivals["emulator"])
            for case in CASES:
                if case[0] != name: continue
                result = {"model": name, "parameters_ratio": smaller} | compare(rivals, *case[1:], 1 if args.quick else 5)
                found.append(result)
                print(f"{name}, {case[1]} x {case[2]}: emulator {result['ratio']:.2f} times as fast, quantized {result['ratio_quantized']:.2f}", flush=True)
    report = {"machine": machine.describe(), "ratio": args.ratio, "threads": torch.get_num_threads(), "rows": found}
    report["table"] = table(report)
    if not args.quick: machine.write(HERE / "results" / "throughput.json", report)
    print(report["table"])
