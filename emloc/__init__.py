"""EMLoC: fine-tune the model you can only just run. Import this before `from_pretrained` of an emulator."""
__version__ = "0.1.0"

import os
import sys
from importlib import import_module

# A thread of libgomp, which torch's CPU build computes with, spins up to 300,000 rounds before it sleeps. Where another program wants the
# core that is milliseconds for a product of microseconds (bench/waiting.py). 1000 is libgomp's own choice for cores that are wanted twice.
if "torch" not in sys.modules and not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys(): os.environ["GOMP_SPINCOUNT"] = "1000"

from emloc import adapter, allocation, anchor, backward, block, correct, data, emulator, evaluate, finetune, fisher, geometry, lowrank, memory, merge, model, output, pairlora, plan, polish, rank, rounds, simulate, spectrum, tasks, walk
from emloc.allocation import build_allocated
from emloc.anchor import compute_anchors
from emloc.correct import correct_adapter
from emloc.data import EmlocError, Task, load_task
from emloc.emulator import build_emulator
from emloc.evaluate import alignment_report, evaluate_task
from emloc.finetune import train_adapter
from emloc.lowrank import load_emulator
from emloc.merge import merge_adapter
from emloc.model import default_model
from emloc.pairlora import load_adapter
from emloc.plan import plan_memory
from emloc.polish import polish_adapter
from emloc.rounds import Rounds


def __getattr__(name):
    # modules that bring matplotlib and widgets are imported when they are asked for
    if name in ("cli", "commands", "compare", "corrections", "demo", "easel", "explore", "explorers", "jobs", "monitor", "playground", "ranking", "spectra"): return import_module(f"emloc.{name}")
    raise AttributeError(f"module 'emloc' has no attribute {name!r}")
