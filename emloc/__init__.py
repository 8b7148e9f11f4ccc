"""EMLoC: fine-tune the model you can only just run. Import this before `from_pretrained` of an emulator."""
__version__ = "0.1.0"

from importlib import import_module

from emloc import adapter, anchor, backward, correct, data, emulator, evaluate, finetune, fisher, geometry, lowrank, memory, merge, model, output, pairlora, plan, polish, rank, rounds, simulate, spectrum, tasks, walk
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
    if name in ("cli", "compare", "corrections", "demo", "easel", "explore", "explorers", "jobs", "monitor", "playground", "ranking", "spectra"): return import_module(f"emloc.{name}")
    raise AttributeError(f"module 'emloc' has no attribute {name!r}")
