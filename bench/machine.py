"""What machine a result was measured on: written beside every table."""
import importlib.metadata
import json
import os
import platform
from pathlib import Path

import psutil
import torch


def describe() -> dict:
    "Processor, cores, memory (bytes), GPU and library versions."
    names = [line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")] if os.path.exists("/proc/cpuinfo") else []
    flags = next((line.split(":")[1].split() for line in open("/proc/cpuinfo") if line.startswith("flags")), []) if names else []
    return {
        "processor": names[0] if names else platform.processor(),
        "bf16_instructions": [f for f in ("avx512_bf16", "amx_bf16") if f in flags],
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")},
    }


def line(machine: dict) -> str:
    "The same in one line."
    gpu = machine["gpu"] or "no GPU"
    tiles = " with AMX" if "amx_bf16" in machine["bf16_instructions"] else ""
    return f"{machine['processor']}{tiles}, {machine['cores']} cores, {machine['memory_bytes'] / 2**30:.0f} GiB, {gpu}; torch {machine['torch']}, transformers {machine['transformers']}, peft {machine['peft']}"


def write(path: Path, report: dict):
    "Write a report whose `table` is markdown; what other kinds of machines measured stays beside it."
    kind = lambda r: (r["machine"]["processor"], r["machine"]["bf16_instructions"], r["machine"]["gpu"])
    before = json.loads(path.read_text()) if path.exists() else {"others": []}
    others = [r for r in [{k: v for k, v in before.items() if k not in ("others", "markdown")}, *before["others"]] if r and kind(r) != kind(report)]
    path.write_text(json.dumps({**report, "others": others, "markdown": "\n\n".join(r["table"] for r in [report, *others])}, indent=1) + "\n")
