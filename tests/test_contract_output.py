"""Output is whole or not there, and a stage that was killed goes on where it was: at whichever moment, to the same bits."""
import os
import signal
import sys

import pytest
import tiny
from safetensors.torch import load_file

from emloc.anchor import compute_anchors
from emloc.correct import correct_adapter
from emloc.data import EmlocError
from emloc.emulator import build_emulator
from emloc.finetune import lora_config, train_adapter, training_args
from emloc.merge import merge_adapter
from emloc.output import Run, last_checkpoint, new_directory
from emloc.polish import polish_adapter
from emloc.rounds import Rounds


def test_a_new_directory_has_its_name_when_it_is_complete(tmp_path):
    with new_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("x")
        assert not (tmp_path / "out").exists()
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["out", "out/file"]


@pytest.mark.parametrize("error", [EmlocError, KeyboardInterrupt, OSError])
def test_a_new_directory_leaves_nothing_on_failure(error, tmp_path):
    with pytest.raises(error), new_directory(tmp_path / "out") as partial:
        (partial / "file").write_text("x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_new_directory_takes_no_name_that_is_in_use(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(EmlocError, match="already"), new_directory(tmp_path): pass
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_goes_on_after_its_last_finished_step(tmp_path):
    with pytest.raises(KeyboardInterrupt), Run(tmp_path / "out", {"a": (1, 2)}) as run:
        run.notes["seen"] = "one"
        run.mark("steps", 1)
        run.notes["seen"] = "two"
        raise KeyboardInterrupt
    with Run(tmp_path / "out", {"a": [1, 2]}) as run:
        assert run.done == {"steps": 1} and run.notes == {"seen": "one"}
        (run.folder / "file").write_text("x")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["file"] and [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("settings", [{"a": 2}, {"a": 1, "b": None, "c": 3}, {}])
def test_other_settings_are_refused_and_what_is_there_stays(settings, tmp_path):
    with pytest.raises(KeyboardInterrupt), Run(tmp_path / "out", {"a": 1}) as run:
        run.mark("steps", 1)
        raise KeyboardInterrupt
    before = tiny.contents(tmp_path)
    with pytest.raises(EmlocError, match="unfinished run with another"), Run(tmp_path / "out", settings): pass
    assert tiny.contents(tmp_path) == before
    with Run(tmp_path / "out", settings, resume=False) as run: assert run.done == {}


def test_bad_input_in_the_middle_leaves_nothing(tmp_path):
    with pytest.raises(EmlocError), Run(tmp_path / "out", {}) as run:
        run.mark("steps", 1)
        raise EmlocError("bad")
    assert list(tmp_path.iterdir()) == []


def test_half_a_checkpoint_is_none(tmp_path):
    for step, text in ((10, '{"global_step": 10}'), (9, '{"global_step": 9}'), (20, '{"global'), (30, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if text: (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    assert last_checkpoint(tmp_path).name == "checkpoint-10" and last_checkpoint(tmp_path / "nowhere") is None


STAGES = {
    "emulator": lambda s, task, out: build_emulator(s.model, task.calibration(), out, ratio=0.5),
    "fisher emulator": lambda s, task, out: build_emulator(s.model, task.calibration(), out, ratio=0.5, metric="fisher"),
    "anchors": lambda s, task, out: compute_anchors(s.emulator, s.model, task.train.select(range(6)), out, every=2),
    "adapter": lambda s, task, out: train_adapter(s.emulator, task.train, out, lora=lora_config(rank=2, targets=["q_proj"], lora_dropout=0.1),
                                                  args=training_args(f"{out}.checkpoints", steps=6, save_steps=2, bf16=False, disable_tqdm=True)),
    "adapter with rounds": lambda s, task, out: train_adapter(s.emulator, task.train, out, lora=lora_config(rank=2, targets=["q_proj"], lora_dropout=0.1), anchors=Rounds(s.model, 3),
                                                              args=training_args(f"{out}.checkpoints", steps=6, save_steps=2, bf16=False, disable_tqdm=True)),
    "adapter with new emulators": lambda s, task, out: train_adapter(s.emulator, task.train, out, lora=lora_config(rank=2, targets=["q_proj"], lora_dropout=0.1), anchors=Rounds(s.model, 1, renew=1),
                                                                     args=training_args(f"{out}.checkpoints", steps=4, save_steps=1, bf16=False, disable_tqdm=True)),
    "corrected": lambda s, task, out: correct_adapter(s.raw, s.emulator, s.model, out, calibration=task.train.select(range(8)), held_out=task.validation),
    "polished": lambda s, task, out: polish_adapter(s.corrected, s.model, task.train, out, steps=3, rows=4),
    "merged": lambda s, task, out: merge_adapter(s.sharded, s.corrected, out),
}


@pytest.fixture(scope="module")
def before_stages(llama_stages, task, tmp_path_factory):
    "What the later stages begin from: a corrected adapter, and the model in three files."
    folder = tmp_path_factory.mktemp("before")
    llama_stages.corrected = correct_adapter(llama_stages.raw, llama_stages.emulator, llama_stages.model, folder / "corrected", mode="clamp")
    tiny.load(llama_stages.model).save_pretrained(folder / "sharded", max_shard_size="40KB")
    tiny.tokenizer().save_pretrained(folder / "sharded")
    llama_stages.sharded = folder / "sharded"
    return llama_stages


def killed(work, folder, moment) -> bool:
    "Run in a child that kills itself with signal 9 when it touches the folder for the so-many-th time; whether it came to that."
    child = os.fork()
    if child == 0:
        seen = 0
        def hook(event, args):
            nonlocal seen
            if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.copyfile") and str(folder) in str(args[0]):
                seen += 1
                if seen == moment: os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try: work()
        finally: os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def bits(folder) -> dict: # the files, those of tensors by their content: the order of a header's notes is up to the library
    return {name: {k: (t.dtype, t.tolist()) for k, t in load_file(folder / name).items()} if name.endswith(".safetensors") else data
            for name, data in tiny.contents(folder).items()}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_killed_at_any_moment_goes_on_to_the_same_bits(stage, before_stages, task, tmp_path):
    work = lambda folder: STAGES[stage](before_stages, task, folder / "out")
    undisturbed = bits(work(tmp_path / "undisturbed"))
    moments, deaths = [1, 3, 6, 10, 15, 22, 31, 44, 60], 0
    for moment in moments:
        folder = tmp_path / str(moment)
        if not killed(lambda: work(folder), folder, moment): break
        deaths += 1
        if not (folder / "out").exists(): work(folder)
        assert bits(folder / "out") == undisturbed, moment
        assert [p.name for p in folder.iterdir()] == ["out"], moment
    assert deaths >= 4


def test_a_training_goes_on_only_as_itself(before_stages, task, tmp_path):
    train = lambda steps=6, **options: train_adapter(before_stages.emulator, task.train, tmp_path / "out", lora=lora_config(rank=2, targets=["q_proj"]),
                                                     args=training_args(tmp_path / "out.checkpoints", steps=steps, save_steps=2, bf16=False, disable_tqdm=True), **options)
    from test_contract_finetune import StopAt
    class Cut(StopAt):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            if state.global_step == 5: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): train(callbacks=[Cut(9)])
    with pytest.raises(EmlocError, match="max_steps"): train(steps=8)
    watch = StopAt(9)
    train(callbacks=[watch])
    assert watch.seen == [5, 6]
    assert not (tmp_path / "out.checkpoints").exists()
