"""Anchors: the emulator is exact where the training starts, for every family, under padding and gradient checkpointing."""
import pytest
import tiny
import torch

from emloc.anchor import Anchors, anchor_bytes, anchored_blocks, compute_anchors
from emloc.data import EmlocError, encode_rows, load_tokenizer
from emloc.emulator import build_emulator
from emloc.lowrank import load_emulator
from emloc.finetune import lora_config, train_adapter, training_args, wrap


@pytest.fixture
def emulator(model, task, tmp_path):
    return build_emulator(model, task.calibration(), tmp_path / "emulator", ratio=0.4)


def batch_of(anchors, rows, path):
    tokenizer = load_tokenizer(path)
    encoded = encode_rows(rows, tokenizer).add_column("row", list(range(len(rows))))
    batch = anchors.collator(tokenizer)([encoded[i] for i in range(len(rows))])
    return batch, {"rows": batch.pop("row"), "tokens": batch["input_ids"].shape[1]}


@pytest.mark.parametrize("every", [1, 2])
def test_with_the_lora_at_zero_the_logits_are_the_models(every, model, emulator, task, tmp_path):
    rows = task.train.select(range(6))
    anchors = Anchors(compute_anchors(emulator, model, rows, tmp_path / "anchors", every=every, stored="float32", batch_size=2))
    batch, which = batch_of(anchors, rows, model)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    small, seen = wrap(load_emulator(emulator)).eval(), batch["attention_mask"].bool()
    with torch.no_grad(), anchors.attached(small):
        expected, bare = tiny.load(model)(**inputs).logits[seen], small(**inputs).logits[seen]
        with anchors.batch(**which): anchored = small(**inputs).logits[seen]
    assert tiny.differs(anchored, expected) < 1e-3 < tiny.differs(bare, expected)


def test_gradient_checkpointing_sees_the_same_anchors(llama_stages, task, tmp_path):
    rows, s = task.train.select(range(6)), llama_stages
    anchors = Anchors(compute_anchors(s.emulator, s.model, rows, tmp_path / "anchors"))
    (batch, which), gradients = batch_of(anchors, rows, s.model), []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = wrap(load_emulator(s.emulator)).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with anchors.attached(model), anchors.batch(**which): model(**batch).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "lora_B" in n]))
    assert gradients[0].abs().max() > 0
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("stored, tolerance", [("bfloat16", 2**-8), ("int8", 1 / 120)])
def test_stored_residuals_are_near_the_exact_ones(stored, tolerance, llama_stages, task, tmp_path):
    rows, s = task.train.select(range(4)), llama_stages
    exact, rounded = (Anchors(compute_anchors(s.emulator, s.model, rows, tmp_path / kind, stored=kind)) for kind in ("float32", stored))
    for row in range(4):
        a, b = exact.read(row), rounded.read(row).float()
        assert (a - b).abs().max() <= tolerance * a.abs().max()


def test_training_reads_them_for_several_epochs(llama_stages, task, tmp_path):
    rows, s = task.train.select(range(8)), llama_stages
    anchors = compute_anchors(s.emulator, s.model, rows, tmp_path / "anchors", every=2)
    losses = []
    for name, use in (("with", anchors), ("without", None)):
        args = training_args(tmp_path / f"checkpoints-{name}", steps=6, lr=1e-2, bf16=False, logging_steps=1, batch_size=4)
        from transformers import TrainerCallback
        class Keep(TrainerCallback):
            def on_log(self, args, state, control, logs, **kwargs): losses.append((name, logs.get("loss")))
        train_adapter(s.emulator, rows, tmp_path / name, lora=lora_config(rank=4), args=args, anchors=use, callbacks=[Keep()])
    first = {name: next(loss for n, loss in losses if n == name) for name in ("with", "without")}
    assert float(first["with"]) != float(first["without"])


def test_an_interrupted_pass_goes_on_and_gives_the_same_bits(llama_stages, task, tmp_path, monkeypatch):
    import emloc.anchor as module
    rows, s = task.train.select(range(4)), llama_stages
    whole = compute_anchors(s.emulator, s.model, rows, tmp_path / "whole")
    pack, calls = module.pack, []
    def stops(*args):
        calls.append(1)
        if len(calls) == 2: raise KeyboardInterrupt
        return pack(*args)
    monkeypatch.setattr(module, "pack", stops)
    with pytest.raises(KeyboardInterrupt): compute_anchors(s.emulator, s.model, rows, tmp_path / "again")
    with pytest.raises(EmlocError, match="every"): compute_anchors(s.emulator, s.model, rows, tmp_path / "again", every=2)
    compute_anchors(s.emulator, s.model, rows, tmp_path / "again")
    assert len(calls) == 4 # three blocks, and the one that was interrupted
    assert tiny.contents(tmp_path / "again") == tiny.contents(whole)


def test_anchors_of_other_rows_another_emulator_or_another_model_are_refused(llama_stages, other_model, task, tmp_path):
    rows, s = task.train.select(range(4)), llama_stages
    anchors = compute_anchors(s.emulator, s.model, rows, tmp_path / "anchors")
    with pytest.raises(EmlocError, match="other rows"): train_adapter(s.emulator, task.train.select(range(1, 5)), tmp_path / "raw", anchors=anchors)
    with pytest.raises(EmlocError, match="another model"): compute_anchors(s.emulator, other_model, rows, tmp_path / "never")
    smaller = build_emulator(s.model, task.calibration(), tmp_path / "smaller", ratio=0.2)
    with pytest.raises(EmlocError, match="another emulator"): train_adapter(smaller, rows, tmp_path / "raw", anchors=anchors)
    assert not (tmp_path / "raw").exists() and not (tmp_path / "never").exists()


def test_a_disk_that_is_too_small_is_noticed_first(llama_stages, task, tmp_path, monkeypatch):
    import shutil
    from collections import namedtuple
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("usage", "total used free")(100, 0, 100))
    with pytest.raises(EmlocError, match="GB on disk"): compute_anchors(llama_stages.emulator, llama_stages.model, task.train.select(range(4)), tmp_path / "anchors")
    assert not list(tmp_path.iterdir())


def test_the_estimate_is_what_is_written(llama_stages, task, tmp_path):
    for stored in ("bfloat16", "int8"):
        path = compute_anchors(llama_stages.emulator, llama_stages.model, task.train.select(range(6)), tmp_path / stored, stored=stored)
        written = sum(f.stat().st_size for f in path.glob("anchors-*"))
        assert written == pytest.approx(Anchors(path).info["bytes"], rel=0.1)


def test_blocks_and_bytes():
    assert anchored_blocks(30, 6) == [5, 11, 17, 23, 29]
    assert anchored_blocks(7, 3) == [2, 5, 6]
    assert anchor_bytes(10, 64, 3) == 10 * 3 * 128
    for every in (0, 31):
        with pytest.raises(EmlocError, match="every"): anchored_blocks(30, every)


def test_anchors_are_an_ordinary_safetensors_file(llama_stages, task, tmp_path):
    from safetensors import safe_open
    rows, s = task.train.select(range(4)), llama_stages
    for stored, names in (("bfloat16", {"residual"}), ("int8", {"residual", "scale"})):
        anchors = Anchors(compute_anchors(s.emulator, s.model, rows, tmp_path / stored, stored=stored))
        for number, block in enumerate(anchors.info["blocks"]):
            begin = 0
            with safe_open(tmp_path / stored / f"anchors-{block:05d}.safetensors", "pt") as f:
                assert set(f.keys()) == names
                for row, length in enumerate(anchors.info["lengths"]):
                    part = {n: f.get_slice(n)[begin:begin + length].float() for n in names}
                    assert torch.equal(anchors.one(row, number).float(), part["residual"] * part.get("scale", 1))
                    begin += length
                assert f.get_slice("residual").get_shape()[0] == begin


def test_a_file_of_anchors_that_was_cut_short_is_named(llama_stages, task, tmp_path):
    anchors = Anchors(compute_anchors(llama_stages.emulator, llama_stages.model, task.train.select(range(2)), tmp_path / "anchors"))
    file = tmp_path / "anchors" / "anchors-00000.safetensors"
    with open(file, "r+b") as f: f.truncate(file.stat().st_size - 1)
    with pytest.raises(EmlocError, match="anchors-00000.safetensors.*bytes long"): anchors.read(0)
