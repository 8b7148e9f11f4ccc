"""Does a run need the memory that was predicted? Each run in a process of its own, and the ratio of the two.

    python bench/plan.py [--only NAME ...]

Writes bench/results/plan.json when all runs are done; finished ones are kept in runs/plan.json, and a second start goes on after them. What is measured is the largest resident set above that before the run, after imports and after
a tiny run of the same kind, so that thread pools and kernels are there. The processes return freed memory to the system at once
(MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ of 64 KiB), or the resident set would show what the allocator keeps for later.

A plan assumes that every weight of stage 1 needs float64; which do, only the numbers say. So a build writes down where it did more
than float32, and its prediction follows it; what the plan itself says, which must not be less, is in a column of its own.
"""
import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import machine

HERE = Path(__file__).parent
SMOL = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=9, num_key_value_heads=3)
WORDS = 50304 # of the random models: enough for the embedded model's tokenizer
CONFIGS = { # random models, in bfloat16
    "GPT-2 like": dict(model_type="gpt2", vocab_size=WORDS, n_embd=1024, n_layer=16, n_head=16, n_positions=2048),
    "Qwen3 like": dict(model_type="qwen3", vocab_size=WORDS, hidden_size=1024, intermediate_size=3072, num_hidden_layers=20, num_attention_heads=16,
                       num_key_value_heads=8, head_dim=128, tie_word_embeddings=True),
    "Llama like": dict(model_type="llama", vocab_size=WORDS, hidden_size=1280, intermediate_size=3584, num_hidden_layers=16, num_attention_heads=20,
                       num_key_value_heads=4, tie_word_embeddings=False),
}
EXPLAINED = ("Each run is named by what it does, the model (`default` is SmolLM2-135M-Instruct, the others are small random ones with the geometry of their kind) and rows × tokens. *Predicted* knows which of the "
             "decompositions took their costlier way in that run; *planned* takes it for all of them, as `emloc plan` must, which is told nothing of the run.")

RUNS = [ # name, model, what is run, rows in a batch, tokens, positions with logits (None: all), checkpointing
    dict(model="default", stage="train", batch_size=4, seq_len=512, completion=32),
    dict(model="default", stage="train", batch_size=1, seq_len=1024, completion=None),
    dict(model="default", stage="train", batch_size=8, seq_len=256, completion=16, checkpointing=True),
    dict(model="GPT-2 like", stage="train", batch_size=2, seq_len=384, completion=64),
    dict(model="Qwen3 like", stage="train", batch_size=2, seq_len=512, completion=128, checkpointing=True),
    dict(model="Llama like", stage="train", batch_size=4, seq_len=256, completion=32),
    dict(model="Llama like", stage="lora", batch_size=1, seq_len=512, completion=None),
    dict(model="Qwen3 like", stage="infer", batch_size=1, seq_len=2048),
    dict(model="Llama like", stage="infer", batch_size=4, seq_len=512),
    dict(model="default", stage="build", batch_size=8, seq_len=256, rows=32),
    dict(model="Qwen3 like", stage="build", batch_size=4, seq_len=512, rows=8),
    dict(model="Llama like", stage="build", batch_size=8, seq_len=128, rows=32),
    dict(model="default", stage="build", batch_size=8, seq_len=256, rows=32, form="quantized"),
    dict(model="Qwen3 like", stage="build", batch_size=4, seq_len=512, rows=8, form="quantized"),
    dict(model="default", stage="train", batch_size=4, seq_len=512, completion=32, form="quantized"),
    dict(model="Llama like", stage="train", batch_size=4, seq_len=256, completion=32, checkpointing=True, form="quantized"),
    dict(model="default", stage="rounds", batch_size=4, seq_len=128, completion=16, checkpointing=True, form="quantized"),
    dict(model="Llama like", stage="rounds", batch_size=4, seq_len=128, completion=16, checkpointing=True),
    dict(model="default", stage="rounds", batch_size=4, seq_len=128, completion=16, checkpointing=True, form="quantized", metric="fisher"),
    dict(model="default", stage="build", batch_size=8, seq_len=256, rows=32, completion=16, metric="fisher"),
    dict(model="Qwen3 like", stage="build", batch_size=4, seq_len=512, rows=8, completion=64, metric="fisher"),
    dict(model="default", stage="build", batch_size=8, seq_len=256, rows=32, completion=16, metric="fisher", form="quantized"),
    dict(model="default", stage="blame", batch_size=4, seq_len=256, rows=16, completion=16),
    dict(model="Llama like", stage="blame", batch_size=4, seq_len=256, rows=16, completion=32),
    dict(model="default", stage="correct", batch_size=8, seq_len=256, rows=16, completion=16),
    dict(model="default", stage="anchor", batch_size=8, seq_len=256, rows=32),
    dict(model="default", stage="polish", batch_size=8, seq_len=256, rows=32, completion=16),
    dict(model="Llama like", stage="polish", batch_size=8, seq_len=256, rows=32, completion=32),
]
RATIO = 0.25
AGAIN = 3 # steps of a round


def name(run: dict) -> str:
    "A run in a few words."
    return f"{run['stage']} {run['model']} {run['batch_size']} x {run['seq_len']}" + (" checkpointing" if run.get("checkpointing") else "") + (" fisher" if run.get("metric") == "fisher" and run["stage"] != "rounds" else " renewed" if run.get("metric") else "") + (" quantized" if run.get("form") else "")


def emulated(run: dict) -> bool: return run["stage"] == "train" and not run.get("form") # a model and its emulator of packed weights lie side by side


def write_random(config: dict, folder: Path, ratio: float | None = None) -> Path:
    "A model, or its emulator, with random weights."
    import torch
    from emloc.data import load_tokenizer
    from emloc.geometry import bare_model
    from emloc.lowrank import EmulatorConfig, put_pairs
    from emloc.model import default_model, linear_shapes
    from emloc.rank import uniform
    from safetensors.torch import save_file
    from transformers import AutoConfig
    config = AutoConfig.for_model(**config, dtype="bfloat16")
    model = bare_model(config)
    ranks = uniform(linear_shapes(model), ratio or 1)
    put_pairs(model, ranks)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    save_file({n: torch.randn(p.shape).mul_(0.02).to(p.dtype) for n, p in model.named_parameters() if n not in tied}, folder / "model.safetensors", metadata={"format": "pt"})
    load_tokenizer(default_model()).save_pretrained(folder)
    if ratio:
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": EmulatorConfig(ranks).to_dict()}))
    return folder


def rows_of(count: int, run: dict):
    "Encoded rows: in each batch one of the full length, the others a little shorter, so that there is padding."
    import datasets
    import torch
    torch.manual_seed(0)
    rows, size, last = [], run["batch_size"], run.get("completion") or run["seq_len"] # the last positions, which may have logits
    for i in range(count):
        shorter = min((i % size) * 3, last - 1)
        n, kept = run["seq_len"] - shorter, last - shorter
        ids = torch.randint(1000, 49000, (n,)).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (n - kept) + ids[n - kept:]})
    return datasets.Dataset.from_list(rows)


def resident(model):
    "Read every weight once: weights are mapped from their file, and rows of an embedding that no token asks for would never arrive."
    import torch
    for p in model.parameters(): p.detach().view(-1).view(torch.uint8)[::4096].sum()
    return model


def work(run: dict, folder: Path, out: Path):
    "The run itself: exactly what the package does."
    import torch
    from emloc.allocation import gradient_errors
    from emloc.anchor import compute_anchors
    from emloc.correct import correct_adapter
    from emloc.data import load_tokenizer
    from emloc.emulator import build_emulator
    from emloc.polish import polish_adapter
    from emloc.finetune import load_emulator, train_lora, training_args
    from emloc.rounds import Rounds
    from emloc.pairlora import wrap
    from transformers import AutoModelForCausalLM
    walk = {"batch_size": run["batch_size"], "max_length": run["seq_len"]}
    if run["stage"] == "build": return build_emulator(folder, rows_of(run["rows"], run), out, ratio=RATIO, metric=run.get("metric", "activation"), form=run.get("form", "lowrank"), **walk)
    if run["stage"] == "blame": return gradient_errors(folder.with_name(folder.name + "-emulator"), folder, rows_of(run["rows"], run), **walk)
    if run["stage"] == "anchor": return compute_anchors(folder.with_name(folder.name + "-emulator"), folder, rows_of(run["rows"], run), out, **walk)
    if run["stage"] == "correct":
        rows = rows_of(2 * run["rows"], run)
        calibration, held_out = rows.select(range(run["rows"])), rows.select(range(run["rows"], len(rows)))
        return correct_adapter(folder.with_name(folder.name + "-adapter"), folder.with_name(folder.name + "-emulator"), folder, out, calibration=calibration, held_out=held_out, **walk)
    if run["stage"] == "polish": return polish_adapter(folder.with_name(folder.name + "-adapter"), folder, rows_of(run["rows"], run), out, steps=1, rows=run["rows"], **walk)
    if run["stage"] == "infer":
        model = resident(AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval())
        batch = {"input_ids": torch.randint(1000, 49000, (run["batch_size"], run["seq_len"]))}
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        if run["batch_size"] > 1: batch["attention_mask"][1:, -3:] = 0
        with torch.no_grad(): return model(**batch, use_cache=True, logits_to_keep=1).logits.shape
    base, steps, anchors = folder, 2, None
    if run.get("form") or run["stage"] == "rounds": folder = folder.with_name(folder.name + "-emulator")
    model = wrap(resident(load_emulator(folder) if run["stage"] in ("train", "rounds") else AutoModelForCausalLM.from_pretrained(folder, dtype="auto")))
    if run["stage"] == "rounds": # two of them; in the second the optimizer's states are there
        steps, anchors = 2 * AGAIN, Rounds(base, AGAIN, renew=int("metric" in run))
        anchors.check(folder, None)
    args = training_args(out, steps=steps, batch_size=run["batch_size"], gradient_checkpointing=run.get("checkpointing", False), disable_tqdm=True, dataloader_drop_last=True,
                         train_sampling_strategy="sequential")
    train_lora(model, rows_of(steps * run["batch_size"], run), args, tokenizer=load_tokenizer(folder), max_length=run["seq_len"], anchors=anchors)


def child(run: dict):
    "In a process of its own: a tiny run of the same kind, then the run, measured."
    import gc
    import torch
    from emloc.memory import measure
    from emloc.streamed import taken_forks
    torch.set_num_threads(run.get("threads", 1))
    tiny = {"model_type": "llama", "vocab_size": WORDS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    with tempfile.TemporaryDirectory() as tmp:
        small = run | {"batch_size": 2, "seq_len": 48, "completion": 8, "rows": 8}
        warm = write_random(tiny, Path(tmp) / "tiny", RATIO if emulated(run) else None)
        companions(run, warm)
        work(small, warm, Path(tmp) / "warm")
        gc.collect()
        with taken_forks() as taken, measure(name(run), interval=0.005) as usage: work(run, Path(run["folder"]), Path(tmp) / "out")
    print(json.dumps({"measured": usage.peak_bytes - usage.start_bytes, "taken": sorted(taken), "base": usage.start_bytes, "seconds": usage.seconds}))


def measured(run: dict) -> dict:
    "Start the process and read what it found."
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run([sys.executable, __file__, "--child", json.dumps(run)], capture_output=True, text=True, env=env)
    if done.returncode: raise RuntimeError(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def predicted(run: dict, taken: list) -> tuple: # (Need, as planned without knowing the forks)
    "What the needs are of this run, and what a plan says."
    from emloc import needs
    from emloc.emulator import choose_bits
    from emloc.rank import uniform
    s = needs.Shapes(run["folder"], mapped=run["stage"] in ("build", "correct", "anchor", "blame", "polish"))
    ranks, size = choose_bits(s.shapes, RATIO, s.dtype) if run.get("form") else uniform(s.shapes, RATIO), (run["batch_size"], run["seq_len"])
    settings = {"batch_size": run["batch_size"], "seq_len": run["seq_len"], "completion": run.get("completion"), "checkpointing": run.get("checkpointing", False), "lora": None}
    if run["stage"] == "build":
        build = lambda taken: needs.building(s, ranks, run["rows"], *size, metric=run.get("metric", "activation"), completion=run.get("completion"), taken=taken)
        return build({tuple(t) for t in taken}), build(None)
    train = lambda: needs.training(s, "", lambda blocks: s.emulator(ranks, blocks), settings)
    def rounds():
        step = train()
        return max(step, *needs.between_rounds(s, ranks, step, settings, AGAIN, renewed=run.get("metric"), trained=2 * AGAIN * run["batch_size"]), key=lambda need: need.peak + need.host)
    need = {"train": train, "rounds": rounds, "lora": lambda: needs.training(s, "", s.whole, settings), "infer": lambda: needs.whole_model(s, settings)[0],
            "correct": lambda: needs.correcting(s, ranks, 8, run["rows"], *size, run.get("completion")), "anchor": lambda: needs.anchoring(s, ranks, run["rows"], *size),
            "blame": lambda: needs.allocating(s, ranks, run["seq_len"], run.get("completion"), run["rows"], run["batch_size"]),
            "polish": lambda: needs.polishing(s, 8, run["seq_len"], run.get("completion"), run["rows"], run["batch_size"])}[run["stage"]]()
    return need, need


class Kept(dict):
    "Rows of finished runs in a file, so that a stop loses nothing; those of other code do not count."
    def __init__(self, file: Path):
        code = [*sorted((HERE.parent / "emloc").glob("*.py")), Path(__file__)]
        self.file, self.code = file, hashlib.sha256(b"".join(f.read_bytes() for f in code)).hexdigest()[:16]
        try: kept = json.loads(file.read_text())
        except FileNotFoundError: kept = {}
        super().__init__(kept["rows"] if kept.get("code") == self.code else {})

    def __setitem__(self, key, row):
        super().__setitem__(key, row)
        self.file.parent.mkdir(exist_ok=True)
        self.file.write_text(json.dumps({"code": self.code, "rows": dict(self)}))


def companions(run: dict, folder: Path):
    "What a stage asks for besides the model, in directories beside it: an emulator with random pairs or random bytes, a random LoRA."
    import torch
    from emloc.adapter import Adapter, write_adapter
    from emloc.emulator import choose_bits
    from emloc.lowrank import chosen, put_emulated
    from emloc.model import Checkpoint, linear_shapes, skeleton
    from emloc.pairlora import lora_config
    from emloc.rank import uniform
    from safetensors.torch import save_file
    checkpoint, emulator, adapter = Checkpoint(folder), folder.with_name(folder.name + "-emulator"), folder.with_name(folder.name + "-adapter")
    shapes, stage = linear_shapes(skeleton(checkpoint)), run["stage"]
    if (stage in ("correct", "anchor", "blame", "rounds") or stage == "train" and run.get("form")) and not emulator.exists():
        choice = choose_bits(shapes, RATIO, checkpoint.dtype) if run.get("form") else uniform(shapes, RATIO)
        model, config = skeleton(checkpoint), chosen(choice)
        config.base_model, config.base_fingerprint, config.ratio, config.metric = str(folder), checkpoint.fingerprint(), RATIO, run.get("metric", "activation")
        put_emulated(model, config)
        own = {k: random_like(k, t) for k, t in model.state_dict().items() if k.rpartition(".")[0].removesuffix(".fine").removesuffix(".coarse") in choice and not checkpoint.key(k)}
        dense = {k: checkpoint.read(k) for k in checkpoint.info if k.removesuffix(".weight") not in choice}
        emulator.mkdir()
        save_file(dense | own, emulator / "model.safetensors", metadata={"format": "pt"})
        load_tokenizer_files(folder, emulator)
        (emulator / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | {"quantization_config": config.to_dict()}))
    if stage in ("correct", "polish") and not adapter.exists():
        adapter.mkdir()
        config = lora_config(8)
        config.base_model_name_or_path = str(folder)
        write_adapter(Adapter(config, {n: (torch.randn(8, in_) * 0.02, torch.randn(out, 8) * 0.02) for n, (out, in_) in shapes.items()}), adapter)


def random_like(name: str, t):
    "Random numbers for a tensor of an emulated linear: bytes where it is packed, small ones in factors."
    import torch
    fixed = {"scales": lambda: torch.full(t.shape, 0.02, dtype=t.dtype), "place": lambda: torch.arange(len(t), dtype=t.dtype), "book": lambda: torch.linspace(-2, 2, len(t)).to(t.dtype),
             "codes": lambda: torch.randint(256, t.shape, dtype=t.dtype)}
    return fixed.get(name.split(".")[-1], lambda: torch.randn(t.shape).mul_(0.02).to(t.dtype))()


def load_tokenizer_files(folder: Path, out: Path):
    "The tokenizer of one directory in another."
    from emloc.data import load_tokenizer
    load_tokenizer(folder).save_pretrained(out)


def prepare(run: dict, folder: Path) -> dict:
    "The run with the directory of its model, or of the model's emulator."
    from emloc.data import load_task
    from emloc.emulator import build_emulator
    from emloc.model import default_model
    if run["model"] != "default": folder = write_random(CONFIGS[run["model"]], folder, RATIO if emulated(run) else None)
    elif emulated(run):
        folder = folder.parent / "emulator-default"
        if not folder.exists(): build_emulator("default", load_task("bbc").calibration(64), folder, ratio=RATIO)
    else: folder.symlink_to(default_model())
    companions(run, folder)
    return run | {"folder": str(folder)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="runs whose name holds one of these; the table is not written")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child: child(json.loads(args.child))
    else:
        from emloc.streamed import kind
        kept = Kept(HERE.parent / "runs" / "plan.json")
        with tempfile.TemporaryDirectory() as tmp:
            for i, run in enumerate(RUNS):
                if args.only and not any(o in name(run) for o in args.only) or name(run) in kept: continue
                run = prepare(run, Path(tmp) / str(i))
                got = measured(run)
                need, planned = predicted(run, got["taken"])
                # on a CPU the hidden states that wait are in the same memory
                wanted, most = need.peak + need.host, planned.peak + planned.host
                row = kept[name(run)] = {"run": name(run), "predicted_bytes": wanted, "planned_bytes": most, "measured_bytes": got["measured"], "ratio": wanted / got["measured"], "planned_ratio": most / got["measured"],
                             "moment": need.moment, "forks": sorted({f"{what} {kind(n)}" for what, n in got["taken"]})}
                print(f"{row['run']:44} predicted {wanted / 2**20:7.0f} MiB, planned {most / 2**20:7.0f}, measured {got['measured'] / 2**20:7.0f}, ratio {row['ratio']:.3f} and {row['planned_ratio']:.3f} ({need.moment})", flush=True)
        about = machine.describe()
        if not args.only:
            rows = [kept[name(run)] for run in RUNS]
            lines = ["| run | predicted, MiB | measured, MiB | predicted / measured | planned / measured |", "| --- | --- | --- | --- | --- |"]
            lines += [f"| {r['run']} | {r['predicted_bytes'] / 2**20:.0f} | {r['measured_bytes'] / 2**20:.0f} | {r['ratio']:.2f} | {r['planned_ratio']:.2f} |" for r in rows]
            report = {"machine": about, "rows": rows, "within_10_percent": sum(0.9 <= r["ratio"] <= 1.1 for r in rows), "markdown": "\n".join([EXPLAINED, "", *lines, "", f"({machine.line(about)}. Peaks above the imported libraries, each run in a process of its own.)"])}
            (HERE / "results" / "plan.json").write_text(json.dumps(report, indent=1) + "\n")
            print(report["markdown"])
