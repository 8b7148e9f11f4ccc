"""Polish: the streamed gradient is autograd's, and a few steps lower the loss of the whole model."""
import pytest
import tiny
import torch
from peft import PeftModel

from emloc.adapter import Adapter, read_adapter, write_adapter
from emloc.correct import correct_adapter
from emloc.data import EmlocError, collator, encode_rows
from emloc.polish import lora_gradient, polish_adapter
from emloc.walk import Walk, completion_losses


@pytest.fixture
def corrected(stages, tmp_path):
    return correct_adapter(stages.raw, stages.emulator, stages.model, tmp_path / "corrected", mode="none")


def test_the_streamed_gradient_is_autograds_on_the_whole_model(stages, corrected, task):
    lora, rows = read_adapter(corrected), encode_rows(task.train.select(range(6)), tiny.tokenizer())
    pairs = {m: (A.clone().requires_grad_(), B.clone().requires_grad_(), s) for m, (A, B, s) in lora.scaled().items()}
    loss = lora_gradient(Walk(stages.model, rows, batch_size=4), pairs)
    whole = PeftModel.from_pretrained(tiny.load(stages.model), corrected, is_trainable=True).eval()
    batch = collator(tiny.tokenizer())([rows[i] for i in range(6)])
    losses, tokens = completion_losses(whole(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, batch["labels"])
    expected = losses.sum() / tokens.sum()
    expected.backward()
    assert loss == pytest.approx(float(expected), abs=1e-5)
    gradients = {n: p.grad for n, p in whole.named_parameters() if p.requires_grad}
    for m, (A, B, _) in pairs.items():
        for t, which in ((A, "A"), (B, "B")):
            theirs = gradients[f"base_model.model.{m}.lora_{which}.default.weight"]
            assert torch.allclose(t.grad, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max())), (m, which)


def test_a_few_steps_lower_the_loss_and_the_result_is_a_plain_adapter(llama_stages, task, tmp_path):
    s = llama_stages
    start = correct_adapter(s.raw, s.emulator, s.model, tmp_path / "corrected", mode="none")
    before = tiny.contents(start)
    done = polish_adapter(start, s.model, task.train, tmp_path / "polished", steps=6, rows=36, lr=1e-2)
    losses = read_adapter(done).info["polish"]["losses"]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.05
    assert tiny.contents(start) == before
    change = tiny.differs(*(tiny.logits(PeftModel.from_pretrained(tiny.load(s.model), p)) for p in (start, done)))
    assert change > 1e-3


def test_a_raw_adapter_and_another_model_are_refused(llama_stages, other_model, task, tmp_path):
    s = llama_stages
    with pytest.raises(EmlocError, match="not corrected"): polish_adapter(s.raw, s.model, task.train, tmp_path / "never")
    start = correct_adapter(s.raw, s.emulator, s.model, tmp_path / "corrected", mode="none")
    with pytest.raises(EmlocError, match="another model"): polish_adapter(start, other_model, task.train, tmp_path / "never")
    with pytest.raises(EmlocError, match="steps"): polish_adapter(start, s.model, task.train, tmp_path / "never", steps=0)
    assert not (tmp_path / "never").exists()


def test_after_rounds_the_steps_are_gentle(llama_stages, task, tmp_path):
    s, rates = llama_stages, {}
    start = read_adapter(correct_adapter(s.raw, s.emulator, s.model, tmp_path / "none", mode="none"))
    for name, anchors in (("plain", None), ("once", {"every": 1, "again": 0}), ("rounds", {"every": 1, "again": 25})):
        (tmp_path / name).mkdir()
        write_adapter(Adapter(start.config, start.pairs, start.info | {"anchors": anchors}), tmp_path / name)
        rates[name] = read_adapter(polish_adapter(tmp_path / name, s.model, task.train, tmp_path / f"{name}-polished", steps=1, rows=4)).info["polish"]["lr"]
    assert rates == {"plain": 1e-3, "once": 1e-3, "rounds": 2e-4}
