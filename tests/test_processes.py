"""Two processes share stages 1 and 2: the same result to rounding, written by one; killed, they go on together; and share the emulator itself."""
import json
import os
import subprocess
import sys

import pytest
import tiny

from emloc.emulator import build_emulator
from emloc.finetune import lora_config, train_adapter, training_args
from emloc.rounds import Rounds

SCRIPT = """
import os, signal, sys
sys.path[:0] = [{tests!r}]
import torch, emloc.emulator, emloc.output
from datasets import Dataset
from emloc.emulator import build_emulator
from emloc.finetune import lora_config, train_adapter, training_args
from emloc.rounds import Rounds
torch.set_num_threads(1)
model, out, deadly = sys.argv[1:]
rows = Dataset.from_json({rows!r})
real, built = emloc.emulator.build_block, []
def build_block(step, *more):
    if step.index == 1 and deadly == "1" and os.environ["RANK"] == "1": os.kill(os.getpid(), signal.SIGKILL)
    built.append(step.index)
    return real(step, *more)
emloc.emulator.build_block = build_block
emulator = build_emulator(model, rows, out + "/emulator", ratio=0.5)
open(out + "/built-" + os.environ["RANK"], "w").write(str(built))
for name, rounds in (("raw", None), ("rounds", Rounds(model, 2, stored="float32")), ("renewed", Rounds(model, 2, stored="float32", renew=1))):
    train_adapter(emulator, rows, f"{{out}}/{{name}}", lora=lora_config(rank=4, alpha=8), anchors=rounds,
                  args=training_args(f"{{out}}/{{name}}.checkpoints", steps=3, lr=1e-2, batch_size=4, bf16=False, disable_tqdm=True))
"""


def in_two_processes(script, *words, **env):
    "A script in two processes, with one thread each."
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {"PYTHONPATH": str(tiny.ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | env
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, (script, *words))], env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def launch(llama, task, tmp_path_factory):
    "Function (folder, deadly) -> exit code of a launch of two processes."
    folder = tmp_path_factory.mktemp("launch")
    task.train.to_json(folder / "rows.jsonl")
    (folder / "script.py").write_text(SCRIPT.format(tests=str(tiny.ROOT / "tests"), rows=str(folder / "rows.jsonl")))
    def start(out, deadly: bool) -> int:
        out.mkdir(exist_ok=True)
        done = in_two_processes(folder / "script.py", llama, out, int(deadly), HF_DATASETS_CACHE=str(folder / "cache"))
        assert deadly or done.returncode == 0, done.stderr[-4000:]
        return done.returncode
    return start


def test_two_processes_do_what_one_does_and_go_on_after_a_kill(launch, llama, task, tmp_path):
    emulator = build_emulator(llama, task.train, tmp_path / "emulator", ratio=0.5)
    one = {name: train_adapter(emulator, task.train, tmp_path / name, lora=lora_config(rank=4, alpha=8), anchors=rounds,
                               args=training_args(tmp_path / f"{name}.checkpoints", steps=3, lr=1e-2, batch_size=8, bf16=False, disable_tqdm=True))
           for name, rounds in (("raw", None), ("rounds", Rounds(llama, 2, stored="float32")), ("renewed", Rounds(llama, 2, stored="float32", renew=1)))}
    out = tmp_path / "two"
    assert launch(out, deadly=True) != 0
    assert not (out / "emulator").exists() and json.loads((out / "emulator.partial" / ".state" / "manifest.json").read_text())["done"] == {"emulator": 1}
    launch(out, deadly=False)
    assert [(out / f"built-{rank}").read_text() for rank in (0, 1)] == ["[1, 2]", "[1, 2]"] # block 0 was not done again
    assert sorted(p.name for p in out.iterdir()) == ["built-0", "built-1", "emulator", "raw", "renewed", "rounds"]
    from emloc.finetune import load_adapter
    from emloc.lowrank import load_emulator
    assert sorted(f.name for f in (out / "emulator").iterdir()) == sorted(f.name for f in emulator.iterdir())
    plain, theirs = tiny.logits(load_emulator(emulator)), tiny.logits(load_emulator(out / "emulator"))
    assert tiny.differs(plain, theirs) < 1e-3
    for name, raw in one.items():
        trained, shared = (tiny.logits(load_adapter(load_emulator(e), r)) for e, r in ((emulator, raw), (out / "emulator", out / name)))
        assert tiny.differs(trained, shared) < 1e-2 < tiny.differs(plain, trained)


SHARDED = """
import os, sys
sys.path[:0] = [{tests!r}]
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from emloc.finetune import lora_config, lora_state
from emloc.lowrank import load_emulator
from emloc.model import block_names
from emloc.pairlora import wrap
from emloc.rounds import live_pairs
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
ids = torch.randint(6, 320, (4, 12), generator=torch.Generator().manual_seed(0))

def ready(path):
    torch.manual_seed(0)
    model = wrap(load_emulator(path, dtype=torch.float32), lora_config(rank=4, alpha=8))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
    return model.train()

def losses(model, ids, found=()):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found = (*found, loss.detach())
    return torch.stack(found)

for path in sys.argv[1:]:
    whole, parts = ready(path), ready(path)
    for name in block_names(parts.get_base_model()): fully_shard(parts.get_base_model().get_submodule(name), mesh=mesh)
    fully_shard(parts, mesh=mesh)
    mean = losses(parts, ids[2 * rank:2 * rank + 2]) / 2
    dist.all_reduce(mean)
    alone, held = losses(whole, ids), sum(p.to_local().numel() for p in parts.parameters()) / sum(p.numel() for p in whole.parameters())
    assert torch.allclose(mean, alone, atol=1e-4) and alone[0] - alone[-1] > 0.1, (mean, alone)
    assert held < 0.6, held
    saved, kept = lora_state(parts), lora_state(whole)
    assert saved.keys() == kept.keys() and all(torch.allclose(saved[n], kept[n], atol=1e-5) for n in kept)
    pairs, mine = live_pairs(parts), live_pairs(whole)
    assert pairs.keys() == mine.keys() and all(torch.allclose(pairs[n][1], mine[n][1], atol=1e-5) for n in mine)
dist.barrier()
dist.destroy_process_group()
"""


def test_an_emulator_in_shards_is_trained_as_a_whole_one_is(make_stages, tmp_path):
    (tmp_path / "script.py").write_text(SHARDED.format(tests=str(tiny.ROOT / "tests")))
    done = in_two_processes(tmp_path / "script.py", *(make_stages(kind).emulator for kind in ("llama", "llama, quantized")))
    assert done.returncode == 0, done.stderr[-4000:]
