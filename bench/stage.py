"""One stage of the method in a process of its own, and the memory that it needed: what memory.py and gpu.py start.

    python bench/stage.py '{"job": "merge", "model": "DIRECTORY", "adapter": "DIRECTORY", "out": "DIRECTORY"}'

The baseline is the resident set after everything that the stage imports is imported. The peak is the larger of two
readings: the resident set every 10 ms, and what the kernel kept (VmHWM, reset at the baseline). On a GPU the peak of
torch's own count is added. The last line of the output is the result as JSON.
"""
import gc
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import emloc
import psutil
import torch
import transformers.models.llama.modeling_llama
import transformers.trainer
from emloc.data import bbc_rows, encode_rows, load_tokenizer
from emloc.evaluate import open_model, sequence_losses
from emloc.finetune import lora_config, train_lora, training_args
from emloc.lowrank import emulator_config
from peft import get_peft_model
from transformers import TrainerCallback


def texts(
    rows: int, # how many
    length: int, # words that each prompt has at least, and so tokens
    skip: int = 0, # rows to leave to another use
):
    "News articles as rows that are all cut at the same length."
    full = bbc_rows(words=length).shuffle(seed=0)
    long = [i for i, prompt in enumerate(full["prompt"]) if len(prompt.split()) > length]
    return full.select(long[skip:skip + rows])


def emulate(model, out, *, rows=64, length=100, ratio=0.25, batch_size=16, metric="activation", form="lowrank"):
    "Stage 1."
    emloc.build_emulator(model, texts(rows, length), out, ratio=ratio, metric=metric, form=form, max_length=length, batch_size=batch_size)


def anchor(emulator, model, out, *, rows=32, length=100, every=1, batch_size=16):
    "Anchors for a few training rows."
    emloc.compute_anchors(emulator, model, texts(rows, length), out, every=every, max_length=length, batch_size=batch_size)


def arguments(out, steps, batch_size):
    return training_args(f"{out}.checkpoints", steps=steps, batch_size=batch_size, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}, disable_tqdm=True)


def train(emulator, out, *, steps=2, length=128, batch_size=8):
    "Stage 2: LoRA, AdamW, gradient checkpointing."
    emloc.train_adapter(emulator, texts(steps * batch_size, length), out, args=arguments(out, steps, batch_size), max_length=length)


def train_in_rounds(emulator, out, *, length=128, batch_size=8, again=25, renew=0):
    "Stage 2 as `emloc finetune` does it: a round, the anchors of the next one when the optimizer's states are there (after a new emulator, with renew=1), and three steps with them."
    class Enough(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs): control.should_training_stop = state.global_step == again + 3
    emloc.train_adapter(emulator, texts(batch_size * again, length), out, args=arguments(out, 2 * again, batch_size), max_length=length,
                        anchors=emloc.Rounds(emulator_config(emulator).base_model, again, renew=renew), callbacks=[Enough()])


def train_whole(model, out, *, steps=2, length=128, batch_size=8):
    "What stage 2 is there to avoid: the same training on the whole model."
    whole, _ = open_model(model)
    tokenizer = load_tokenizer(model)
    train_lora(get_peft_model(whole, lora_config()), texts(steps * batch_size, length), arguments(out, steps, batch_size), tokenizer=tokenizer, max_length=length)


def infer(model, *, batches=2, length=128, batch_size=8):
    "Inference of the whole model, as evaluate_task does it."
    whole, tokenizer = open_model(model)
    sequence_losses(whole, tokenizer, list(encode_rows(texts(batches * batch_size, length), tokenizer, length)), batch_size)


def correct(adapter, emulator, model, out, *, mode, rows=24, held_out=8, length=100, batch_size=8):
    "Stage 3."
    more = {"calibration": texts(rows, length), "held_out": texts(held_out, length, skip=rows), "max_length": length, "batch_size": batch_size} if mode in ("gram", "auto") else {}
    emloc.correct_adapter(adapter, emulator, model, out, mode=mode, **more)


def merge(model, adapter, out):
    "The corrected LoRA into the model's files."
    emloc.merge_adapter(model, adapter, out)


def polish(adapter, model, out, *, steps=1, rows=16, length=100, batch_size=8):
    "Exact steps on the whole model."
    emloc.polish_adapter(adapter, model, texts(rows * steps, length), out, steps=steps, rows=rows, max_length=length, batch_size=batch_size)


JOBS = {f.__name__: f for f in (emulate, anchor, train, train_in_rounds, train_whole, infer, correct, merge, polish)}


class Watch:
    "The peak of this process's resident set while the code under `with` runs, and what ran when it was reached."

    def __enter__(self):
        gc.collect()
        self.process, self.main, self.done = psutil.Process(), threading.get_ident(), threading.Event()
        self.kernel = self.reset_kernel()
        self.gpu = torch.cuda.is_available()
        if self.gpu: torch.cuda.reset_peak_memory_stats()
        self.base = self.peak = self.process.memory_info().rss
        self.mapped, self.where, self.began = 0, "", time.perf_counter()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    @staticmethod
    def reset_kernel() -> bool: # whether the kernel lets a process reset its own peak
        try: Path("/proc/self/clear_refs").write_text("5")
        except OSError: return False
        return True

    def watch(self):
        while not self.done.wait(0.01): self.look()

    def look(self):
        now = self.process.memory_info()
        if now.rss <= self.peak: return
        self.peak, self.mapped, frame, names = now.rss, getattr(now, "shared", 0), sys._current_frames().get(self.main), []
        while frame is not None:
            file = Path(frame.f_code.co_filename)
            names.append(f"{file.parent.name}/{file.stem}.{frame.f_code.co_name}:{frame.f_lineno}")
            frame = frame.f_back
        ours = next((i for i, n in enumerate(names) if n.startswith("emloc/")), 0)
        # the innermost call, and the innermost of the package with its caller
        self.where = " < ".join(dict.fromkeys([names[0], *names[ours:ours + 2]])) if names else ""

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()
        self.look()

    def result(self) -> dict: # bytes and seconds
        found = {"seconds": time.perf_counter() - self.began, "base_bytes": self.base, "sampled_bytes": self.peak - self.base, "mapped_bytes": self.mapped, "where": self.where}
        if self.kernel:
            line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM"))
            found["kernel_bytes"] = int(line.split()[1]) * 1024 - self.base
        found["peak_bytes"] = max(found["sampled_bytes"], found.get("kernel_bytes", 0))
        if self.gpu: found |= {"gpu_bytes": torch.cuda.max_memory_allocated(), "gpu_reserved_bytes": torch.cuda.max_memory_reserved()}
        return found


def perform(job: dict) -> dict:
    "Run a job here; out of memory is a result like any other."
    options = dict(job)
    function, cap = JOBS[options.pop("job")], options.pop("gpu_cap", None)
    if cap and torch.cuda.is_available(): torch.cuda.set_per_process_memory_fraction(min(1.0, cap / torch.cuda.get_device_properties(0).total_memory))
    error = None
    with Watch() as watch:
        try: function(**options)
        except torch.OutOfMemoryError: error = "out of memory under the cap" if cap else "out of memory"
    return watch.result() | ({"error": error} if error else {})


def in_own_process(job: dict, *, device: str = "cpu") -> dict:
    "A job's result from a fresh process; with an entry `error` when it failed."
    places = {"PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH")]))}
    if device == "cpu": places["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, __file__, json.dumps(job)], capture_output=True, text=True, env=os.environ | places)
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines: return json.loads(lines[-1])
    return {"error": (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]}


def forked(function, *args):
    "What a function gives in a fork of this process: for tiny models, where starting Python takes nearly all of the time."
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool: return pool.submit(function, *args).result()


def kept(folder: Path, name: str, job: dict, *, again: bool = False, **options) -> dict:
    "A job's result, run only if this very job is not in the folder already."
    file, made = folder / f"{name}.json", [job.get("out")]
    if file.is_file() and not again:
        found = json.loads(file.read_text())
        if found["job"] == {k: str(v) for k, v in job.items()} and all(m is None or Path(m).is_dir() for m in made): return found
    if job.get("out"): remove(Path(job["out"]))
    found = {"job": {k: str(v) for k, v in job.items()}} | in_own_process(job, **options)
    folder.mkdir(parents=True, exist_ok=True)
    if "error" not in found: file.write_text(json.dumps(found))
    return found


def remove(path: Path):
    "Remove a directory and what a stage may have left beside it."
    import shutil
    for folder in (path, Path(f"{path}.partial"), Path(f"{path}.checkpoints")): shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__": print(json.dumps(perform(json.loads(sys.argv[1]))))
