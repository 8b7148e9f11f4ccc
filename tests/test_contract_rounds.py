"""Rounds: the emulator is exact around the LoRA as it is when a round begins, whatever has been learnt until then."""
from types import SimpleNamespace

import pytest
import tiny
import torch
from peft import PeftModel

from emloc.adapter import read_adapter
from emloc.anchor import Anchors, compute_anchors
from emloc.correct import correct_adapter
from emloc.data import EmlocError, collator, encode_rows
from emloc.emulator import build_emulator
from emloc.finetune import load_adapter, lora_config, train_adapter, training_args
from emloc.lowrank import emulator_config, load_emulator
from emloc.rounds import Rounds, live_pairs
from emloc.walk import bare


def test_around_a_trained_lora_the_logits_are_those_of_the_model_with_it(stages, task, tmp_path):
    s, rows = stages, task.train.select(range(6))
    pairs = read_adapter(s.raw).scaled()
    there = Anchors(compute_anchors(s.emulator, s.model, rows, tmp_path / "there", stored="float32", lora=pairs))
    start = Anchors(compute_anchors(s.emulator, s.model, rows, tmp_path / "start", stored="float32"))
    batch = collator(tiny.tokenizer())([row for row in encode_rows(rows, tiny.tokenizer())])
    inputs, seen = {k: batch[k] for k in ("input_ids", "attention_mask")}, batch["attention_mask"].bool()
    corrected = correct_adapter(s.raw, s.emulator, s.model, tmp_path / "none", mode="none")
    small = load_adapter(load_emulator(s.emulator), s.raw).eval()
    assert {m: (a.shape, b.shape, scale) for m, (a, b, scale) in live_pairs(small).items()} == {m: (a.shape, b.shape, scale) for m, (a, b, scale) in pairs.items()}
    with torch.no_grad():
        expected = PeftModel.from_pretrained(tiny.load(s.model), corrected).eval()(**inputs).logits[seen]
        found = {}
        for name, anchors in (("there", there), ("start", start)):
            with anchors.attached(small), anchors.batch(list(range(6)), inputs["input_ids"].shape[1]): found[name] = small(**inputs).logits[seen]
    assert tiny.differs(found["there"], expected) < 1e-3 < tiny.differs(found["start"], expected)


class Watched(Rounds):
    "Remembers the pairs and the rows of every batch."
    def batch(self, rows, tokens):
        self.seen = [*getattr(self, "seen", []), (live_pairs(self.peft), list(rows))]
        return super().batch(rows, tokens)


def trained(s, task, out, rounds, **options):
    "A training in float32, and the losses of its steps."
    losses = []
    from transformers import TrainerCallback
    class Keep(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs: losses.append(float(logs["loss"]))
    args = training_args(f"{out}.checkpoints", lr=2e-2, bf16=False, logging_steps=1, save_strategy="no", disable_tqdm=True, **{"steps": 7, "batch_size": 4} | options)
    train_adapter(s.emulator, task.train, out, lora=lora_config(rank=4), args=args, anchors=rounds, callbacks=[Keep()])
    return losses


@pytest.mark.parametrize("renew", [0, 1])
@pytest.mark.parametrize("family", ["llama_stages", "llama, quantized"])
def test_at_the_beginning_of_every_round_the_loss_is_the_models(renew, family, llama_stages, make_stages, task, tmp_path):
    s = llama_stages if family == "llama_stages" else make_stages(family)
    rounds = Watched(s.model, 3, stored="float32", renew=renew)
    losses = trained(s, task, tmp_path / "raw", rounds)
    whole, off = load_adapter(tiny.load(s.model), correct_adapter(tmp_path / "raw", s.emulator, s.model, tmp_path / "none", mode="none")).eval(), []
    for (pairs, rows), loss in zip(rounds.seen, losses, strict=True):
        for n, module in live_modules(whole).items():
            for layer, t in zip((module.lora_A, module.lora_B), pairs[n]): layer["default"].weight.data.copy_(t)
        batch = collator(tiny.tokenizer())([rounds.rows[r] for r in rows])
        with torch.no_grad(): off.append(abs(float(whole(**batch).loss) - loss))
    assert all(off[i] < 1e-3 for i in (0, 3, 6)), off # losses are logged with four digits
    assert max(off[2], off[5]) > 2e-3, off # and within a round it drifts


def live_modules(model):
    from peft.tuners.lora.layer import LoraLayer
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if isinstance(m, LoraLayer)}


def test_every_row_is_trained_on_once_an_epoch_and_nothing_is_left_behind(llama_stages, task, tmp_path):
    rounds = Watched(llama_stages.model, 4)
    trained(llama_stages, task, tmp_path / "raw", rounds, steps=18) # two epochs of 36 rows
    places = [r for _, rows in rounds.seen for r in rows]
    assert places == list(range(72))
    rows = [tuple(ids) for ids in rounds.rows["input_ids"]]
    everything = sorted(tuple(ids) for ids in encode_rows(task.train, tiny.tokenizer())["input_ids"])
    assert sorted(rows[:36]) == sorted(rows[36:]) == everything and rows[:36] != rows[36:]
    assert [p.name for p in tmp_path.iterdir()] == ["raw"]
    assert read_adapter(tmp_path / "raw").info["anchors"] == {"every": 1, "stored": "bfloat16", "again": 4}


@pytest.mark.parametrize("form, metric", [("lowrank", "activation"), ("lowrank", "fisher"), ("quantized", "activation"), ("quantized", "fisher")])
def test_new_emulators_are_those_of_the_lora_and_the_rows_that_come_next(form, metric, llama, task, tmp_path, monkeypatch):
    s = SimpleNamespace(model=llama, emulator=build_emulator(llama, task.calibration(16), tmp_path / "emulator", ratio=0.2, form=form, metric=metric))
    monkeypatch.setattr("emloc.rounds.CALIBRATION", 10)
    class Kept(Watched):
        def renewed(self, number, pairs):
            super().renewed(number, pairs)
            own = bare(self.peft)
            self.made = [*getattr(self, "made", []), (number, self.emulator.name, self.coming(number), pairs, {n.replace(".base_layer", ""): p.clone() for n, p in own.state_dict().items() if "lora_" not in n})]
    rounds = Kept(llama, 1, renew=2)
    trained(s, task, tmp_path / "raw", rounds, steps=6)
    assert [(number, name[:14]) for number, name, *_ in rounds.made] == [(2, "emulator-00002"), (3, "emulator-00002"), (4, "emulator-00004"), (5, "emulator-00004")]
    assert [p.name for p in tmp_path.iterdir() if p.name != "emulator"] == ["raw"] and read_adapter(tmp_path / "raw").info["anchors"]["renew"] == 2
    assert [tuple(ids) for ids in rounds.made[0][2]["input_ids"]] == [tuple(rounds.rows[i]["input_ids"]) for i in range(8, 18)]
    _, _, rows, pairs, state = rounds.made[2]
    assert [tuple(ids) for ids in rows["input_ids"]] == [tuple(rounds.rows[i]["input_ids"]) for i in range(14, 24)] # the round begins with row 16, and 24 are all
    expected = load_emulator(build_emulator(llama, rows, tmp_path / "expected", form=form, metric=metric, lora=pairs, batch_size=4, **({"ratio": 0.2} if form == "quantized" else {"ranks": emulator_config(s.emulator).ranks})))
    for name, p in expected.state_dict().items(): assert torch.equal(p, state[name]), name
    assert any(not torch.equal(a, b) for a, b in zip(load_emulator(s.emulator).state_dict().values(), expected.state_dict().values()))


def test_accumulation_and_checkpointing_see_the_right_rows(llama_stages, task, tmp_path):
    plain, other = (Watched(llama_stages.model, 2, stored="float32") for _ in range(2))
    one = trained(llama_stages, task, tmp_path / "one", plain, steps=4)
    two = trained(llama_stages, task, tmp_path / "two", other, steps=4, batch_size=2, gradient_accumulation_steps=2, gradient_checkpointing=True)
    assert two == pytest.approx(one, abs=2e-3)
    assert [r for _, rows in plain.seen for r in rows] == [r for _, rows in other.seen for r in rows] == list(range(16))


def test_rounds_of_another_model_or_of_no_steps_are_refused(llama_stages, other_model, task, tmp_path):
    with pytest.raises(EmlocError, match="at least 1"): Rounds(llama_stages.model, 0)
    with pytest.raises(EmlocError, match="new emulators every -1"): Rounds(llama_stages.model, renew=-1)
    with pytest.raises(EmlocError, match="another model"): trained(llama_stages, task, tmp_path / "raw", Rounds(other_model))
    with pytest.raises(EmlocError, match="every 9"): trained(llama_stages, task, tmp_path / "raw", Rounds(llama_stages.model, every=9))
    assert not (tmp_path / "raw").exists()


def test_rounds_hold_no_second_copy_of_the_embedding(llama_stages, task, tmp_path, monkeypatch):
    from emloc import anchor, walk
    seen = []
    class Watching(walk.Walk):
        def begin(self, model, lent=None):
            super().begin(model, lent)
            seen.append(self.model.get_input_embeddings().weight.data_ptr())
    monkeypatch.setattr(anchor, "Walk", Watching)
    rounds = Watched(llama_stages.model, 3)
    trained(llama_stages, task, tmp_path / "raw", rounds)
    assert len(seen) == 6 and set(seen) == {rounds.peft.get_input_embeddings().weight.data_ptr()} # three rounds, two walks
