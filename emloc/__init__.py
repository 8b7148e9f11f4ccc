"""EMLoC: fine-tune the model you can only just run. Import this before `from_pretrained` of an emulator."""
__version__ = "0.1.0"

from emloc import adapter, data, emulator, finetune, model, rank, spectrum, walk
from emloc.data import EmlocError, Task, load_task
from emloc.emulator import build_emulator, load_emulator
from emloc.finetune import load_adapter, train_adapter
from emloc.model import default_model
