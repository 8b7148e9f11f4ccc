"""An emulator of the last blocks only: what comes out of the others is an anchor, and the rest is as with any emulator."""
import warnings

import pytest
import tiny
import torch
from peft import PeftModel

from emloc.adapter import read_adapter
from emloc.anchor import Anchors, anchored_blocks, compute_anchors
from emloc.correct import correct_adapter
from emloc.data import EmlocError, collator, encode_rows
from emloc.emulator import build_emulator
from emloc.evaluate import evaluate_task
from emloc.finetune import lora_config, train_adapter, training_args
from emloc.lowrank import Bypass, emulator_config, load_emulator
from emloc.merge import merge_adapter
from emloc.model import Checkpoint, block_names, linear_shapes, skeleton
from emloc.pairlora import wrap
from emloc.polish import polish_adapter
from emloc.rounds import Rounds, live_pairs


def build(model, task, out, **options):
    return build_emulator(model, task.calibration(), out, **{"ratio": 0.1, "form": "quantized", "last": 1} | options)


@pytest.fixture
def small(model, task, tmp_path): return build(model, task, tmp_path / "emulator")


def linear_bytes(path, shapes): # of the files of an emulator; what the levels mean weighs something only in models this small
    found = Checkpoint(path)
    return sum(found.size(k) for k in found.info if any(k.startswith(f"{n}.") for n in shapes) and not k.endswith(("bias", "book")))


def test_the_last_block_has_the_bytes_of_all_and_the_others_have_none(model, small):
    whole, loaded, names = skeleton(Checkpoint(model)), load_emulator(small), block_names(skeleton(Checkpoint(model)))
    assert block_names(loaded) == names and list(emulator_config(small).bypassed) == names[:-1]
    kinds = [type(loaded.get_submodule(n)) for n in names]
    assert kinds[:-1] == [Bypass] * (len(names) - 1) and kinds[-1] is type(whole.get_submodule(names[-1]))
    assert not any(k.startswith(tuple(f"{n}." for n in names[:-1])) for k in Checkpoint(small).info)
    shapes = linear_shapes(whole)
    asked = 0.1 * sum(4 * out * in_ for out, in_ in shapes.values())
    assert 0.75 * asked < linear_bytes(small, shapes) < 1.1 * asked


@pytest.mark.parametrize("form, metric", [("quantized", "activation"), ("quantized", "fisher"), ("lowrank", "activation"), ("lowrank", "fisher")])
def test_with_anchors_it_is_the_model_around_any_lora(models, family, task, tmp_path, form, metric):
    model = models[family]
    emulator, rows = build(model, task, tmp_path / "emulator", form=form, metric=metric), task.train.select(range(6))
    torch.manual_seed(1)
    small, last = load_adapter_like(emulator), block_names(skeleton(Checkpoint(model)))[-1]
    pairs = live_pairs(small)
    assert pairs and all(n.startswith(last + ".") for n in pairs)
    anchors = Anchors(compute_anchors(emulator, model, rows, tmp_path / "anchors", stored="float32", lora=pairs))
    batch = collator(tiny.tokenizer())([row for row in encode_rows(rows, tiny.tokenizer())])
    inputs, seen = {k: batch[k] for k in ("input_ids", "attention_mask")}, batch["attention_mask"].bool()
    whole = tiny.load(model)
    for n, (A, B, s) in pairs.items(): add_to(whole.get_submodule(n), s * B @ A)
    with torch.no_grad(), anchors.attached(small), anchors.batch(list(range(6)), inputs["input_ids"].shape[1]):
        assert tiny.differs(small(**inputs).logits[seen], whole(**inputs).logits[seen]) < 1e-3


def load_adapter_like(emulator): # with a LoRA that does something
    small = wrap(load_emulator(emulator), lora_config(rank=2, alpha=4)).eval()
    for n, p in small.named_parameters():
        if "lora_B" in n: torch.nn.init.normal_(p, std=0.1)
    return small


def add_to(linear, change): # (out, in)
    with torch.no_grad(): linear.weight += change if type(linear) is torch.nn.Linear else change.T


@pytest.mark.parametrize("rounds", [True, False], ids=["rounds", "once"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_it_trains_goes_the_whole_way(models, family, task, tmp_path, rounds):
    model = models[family]
    emulator, blocks = build(model, task, tmp_path / "emulator"), block_names(skeleton(Checkpoint(model)))
    anchors = Rounds(model, 4) if rounds else compute_anchors(emulator, model, task.train, tmp_path / "anchors")
    args = training_args(tmp_path / "checkpoints", steps=10, lr=2e-2, batch_size=4, bf16=False, gradient_checkpointing=True, logging_steps=1)
    raw = train_adapter(emulator, task.train, tmp_path / "raw", lora=lora_config(rank=4), args=args, anchors=anchors)
    moved = correct_adapter(raw, emulator, model, tmp_path / "moved", mode="none")
    polished = polish_adapter(moved, model, task.train, tmp_path / "polished", steps=2)
    pairs = read_adapter(polished).pairs
    assert pairs and all(n.startswith(blocks[-1] + ".") for n in pairs)
    before, after = evaluate_task(model, task), evaluate_task(model, task, polished)
    assert after["nll"] < before["nll"] - 0.5
    merged = merge_adapter(model, polished, tmp_path / "merged")
    assert evaluate_task(merged, task)["nll"] == pytest.approx(after["nll"], abs=1e-3)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing")
        alone = PeftModel.from_pretrained(tiny.load(model), polished)
    assert {n for n, _ in alone.named_modules() if n.endswith("lora_A")} == {f"base_model.model.{n}.lora_A" for n in pairs}


def test_a_build_that_was_cut_off_goes_on_to_the_same_bits(llama, task, tmp_path, monkeypatch):
    from emloc import emulator
    undisturbed, real = build(llama, task, tmp_path / "once"), emulator.build_block
    def cut(*_): raise KeyboardInterrupt
    monkeypatch.setattr(emulator, "build_block", cut)
    with pytest.raises(KeyboardInterrupt): build(llama, task, tmp_path / "twice")
    monkeypatch.setattr(emulator, "build_block", real)
    monkeypatch.setattr(emulator, "pass_by", cut) # the blocks that are not in the emulator have run
    again = build(llama, task, tmp_path / "twice")
    first, second = Checkpoint(undisturbed), Checkpoint(again)
    assert first.info.keys() == second.info.keys() and all(torch.equal(first.read(k).view(torch.uint8), second.read(k).view(torch.uint8)) for k in first.info)
    monkeypatch.undo()
    monkeypatch.setattr(emulator, "build_block", cut)
    with pytest.raises(KeyboardInterrupt): build(llama, task, tmp_path / "other")
    with pytest.raises(EmlocError, match="first"): build(llama, task, tmp_path / "other", last=2)


def test_where_the_anchors_are():
    assert anchored_blocks(30, 1, 18) == list(range(17, 30))
    assert anchored_blocks(30, 6, 18) == [17, 23, 29] and anchored_blocks(30, 12, 18) == [17, 29]
    with pytest.raises(EmlocError, match="1 to 12 blocks of this emulator"): anchored_blocks(30, 13, 18)


def test_what_cannot_be_is_refused(llama, task, tmp_path):
    with pytest.raises(EmlocError, match="1 to 3"): build(llama, task, tmp_path / "never", last=4)
    with pytest.raises(EmlocError, match="more than the last 1 of 3 blocks have"): build(llama, task, tmp_path / "never", ratio=0.5)
    assert not any(tmp_path.iterdir())
    emulator = build(llama, task, tmp_path / "emulator")
    with pytest.raises(EmlocError, match="must be anchors"): train_adapter(emulator, task.train, tmp_path / "never")
    with pytest.raises(EmlocError, match="evaluate the adapter on the model"): evaluate_task(emulator, task)


def test_it_is_planned(llama, task, tmp_path):
    from emloc.plan import plan_memory
    options = dict(batch_size=2, seq_len=24, form="quantized")
    plan, all = plan_memory(llama, ratio=0.1, last=1, **options), plan_memory(llama, ratio=0.3, **options)
    assert plan.emulator_bytes == Checkpoint(build(llama, task, tmp_path / "emulator")).nbytes < all.emulator_bytes
    assert plan.stage(2).peak < all.stage(2).peak and plan.options[0].disk < all.options[0].disk
    fitted = plan_memory(llama, budget=plan.fullest(2).peak + 2000, last=1, **options)
    assert 0.1 <= fitted.ratio < 1 / 3 and fitted.fullest(2).peak <= fitted.budget
    with pytest.raises(EmlocError, match="more than the last 1"): plan_memory(llama, ratio=0.5, last=1)


def test_on_the_command_line(llama, task, tmp_path, monkeypatch, capsys):
    from emloc import cli, commands
    monkeypatch.setattr(commands, "load_task", lambda _: task)
    words = lambda line: [w.format(tmp=tmp_path, model=llama) for w in line.split()]
    assert cli.main(words("emulate {model} kinds --ratio 0.1 --last-blocks 1 --out {tmp}/emulator")) == 0
    assert len(emulator_config(tmp_path / "emulator").bypassed) == 2 and "the last 1 blocks" in capsys.readouterr().out
    assert cli.main(words("finetune {tmp}/emulator kinds --steps 4 --batch-size 4 --out {tmp}/raw")) == 0
    assert read_adapter(tmp_path / "raw").info["anchors"]["again"] > 0
    assert cli.main(words("finetune {tmp}/emulator kinds --steps 4 --anchor-every 0 --out {tmp}/never")) == 2
    assert cli.main(words("emulate {model} kinds --ratio 0.1 --last-blocks 1 --ranks spectrum --out {tmp}/never")) == 2
    assert "leave out --last-blocks" in capsys.readouterr().err and not (tmp_path / "never").exists()
    assert cli.main(words("plan {model} --ratio 0.1 --last-blocks 1")) == 0
