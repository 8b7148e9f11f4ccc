"""One streamed pass gives what the whole model gives, with one block in memory."""
import os
import subprocess
import sys

import pytest
import tiny
import torch

from emloc import freed
from emloc.data import EmlocError, encode_rows, load_tokenizer
from emloc.model import Checkpoint
from emloc.walk import Walk, completion_losses, keep_last

SHARING = {"gpt2": [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
           "phi3": [("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)]}
SEPARATE = [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)]


@pytest.fixture
def rows(task): return task.train.select(range(11))


def walked(walk):
    for step in walk: step.run()
    return walk


@torch.no_grad()
def whole_logits(path, batch): return tiny.load(path)(**{k: v for k, v in batch.items() if k != "labels"}).logits


def test_the_logits_are_those_of_the_whole_model(model, rows):
    walk, padded = walked(Walk(model, rows, batch_size=4)), 0
    for batch, logits in walk.outputs(whole=True):
        seen = batch["attention_mask"].bool()
        padded += int((~seen).sum())
        assert tiny.differs(logits[seen], whole_logits(model, batch)[seen]) < 1e-4
    assert padded > 0


def test_the_logits_that_are_kept_predict_the_completions(model, rows):
    walk = walked(Walk(model, rows, batch_size=4))
    for batch, logits in walk.outputs():
        losses, tokens = completion_losses(logits, batch["labels"])
        expected, expected_tokens = completion_losses(whole_logits(model, batch), batch["labels"])
        assert torch.allclose(losses, expected, atol=1e-4) and torch.equal(tokens, expected_tokens)


def test_fewer_logits_are_kept_where_the_model_can_do_that(llama, rows):
    walk = walked(Walk(llama, rows, batch_size=4))
    assert all(logits.shape[1] < batch["input_ids"].shape[1] for batch, logits in walk.outputs())


def test_losses_are_those_of_cross_entropy():
    logits, labels = torch.randn(2, 5, 7), torch.tensor([[-100, -100, 3, 4, -100], [-100, 1, 2, 6, 5]])
    losses, tokens = completion_losses(logits, labels)
    scores = logits.log_softmax(-1)
    assert torch.allclose(losses, -torch.stack([scores[0, 1, 3] + scores[0, 2, 4], scores[1, 0, 1] + scores[1, 1, 2] + scores[1, 2, 6] + scores[1, 3, 5]]))
    assert tokens.tolist() == [2, 4]


def test_every_row_is_in_one_batch(llama, rows):
    walk = Walk(llama, rows, batch_size=4)
    assert sorted(i for chunk in walk.order for i in chunk) == list(range(11))
    assert walk.tokens() == sum(map(len, encode_rows(rows, load_tokenizer(llama))["input_ids"]))


def test_one_block_is_in_memory(model, rows):
    walk = Walk(model, rows)
    for step in walk:
        resident = {n for n in walk.names if any(p.device.type != "meta" for p in walk.model.get_submodule(n).parameters())}
        assert resident == {step.name}
        step.run()


def test_linears_with_the_same_input_are_shown_together(family, model, rows):
    step, groups = next(iter(Walk(model, rows, batch_size=20))), []
    step.on_inputs(lambda names, x: groups.append(names))
    step.run()
    assert groups == [tuple(f"{step.name}.{n}" for n in names) for names in SHARING.get(family, SEPARATE)]


def test_inputs_are_shown_without_the_padding(model, rows):
    walk, seen = Walk(model, rows, batch_size=4), {}
    step = next(iter(walk))
    step.on_inputs(lambda names, x: seen.update({names: seen.get(names, 0) + len(x)}))
    step.run()
    assert set(seen.values()) == {walk.tokens()}


def test_the_inputs_are_those_of_the_whole_model(model, rows):
    walk, shown, hooked = Walk(model, rows, batch_size=20), {}, {}
    for step in walk:
        hooks = step.on_inputs(lambda names, x: shown.update(dict.fromkeys(names, x)))
        step.run()
        hooks.remove()
    whole, mask = tiny.load(model), walk.batches[0]["attention_mask"].bool()
    for name in shown: whole.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: hooked.update({name: args[0][mask]}))
    with torch.no_grad(): whole(**walk.batches[0])
    assert max(tiny.differs(shown[n], hooked[n]) for n in shown) < 1e-4


def test_a_removed_watcher_sees_nothing(llama, rows):
    step, seen = next(iter(Walk(llama, rows))), []
    step.on_inputs(lambda names, x: seen.append(names)).remove()
    step.run()
    assert seen == []


def test_a_look_leaves_the_hidden_states(llama, rows):
    walk = Walk(llama, rows)
    steps = iter(walk)
    next(steps).run()
    before = [h.clone() for h in walk.hidden[0]]
    next(steps).run(keep=False)
    assert all(torch.equal(a, b) for a, b in zip(before, walk.hidden[0]))


@pytest.mark.parametrize("stop", [1, 2])
def test_a_resumed_walk_gives_the_same(stop, model, rows, tmp_path):
    first = Walk(model, rows, batch_size=4)
    for step in first:
        step.run()
        if step.index == stop - 1: first.save(tmp_path / "hidden", stop)
    second = Walk(model, rows, batch_size=4)
    second.resume(tmp_path / "hidden", stop)
    ran = []
    for step in second: ran.append(step.index), step.run()
    assert ran == list(range(stop, len(second)))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first.outputs(), second.outputs()))


def test_variants_are_independent(model, rows):
    plain, walk = walked(Walk(model, rows)), Walk(model, rows, variants=2)
    for step in walk:
        step.run(0)
        louder = [m.register_forward_hook(lambda m, args, y: 1.5 * y) for m in step.linears.values()]
        step.run(1)
        for handle in louder: handle.remove()
    (_, expected), (_, same), (_, louder) = (next(w.outputs(v, whole=True)) for w, v in ((plain, 0), (walk, 0), (walk, 1)))
    assert torch.equal(expected, same) and tiny.differs(expected, louder) > 0.1


def test_the_forward_of_the_model_is_given_back(llama, rows):
    walk = walked(Walk(llama, rows))
    assert not any("forward" in vars(block) for block in walk.blocks)


def test_weights_that_are_not_finite_are_named(model, rows, tmp_path):
    name = next(n for n in Checkpoint(model).info if any(k in n for k in ("layers.1.mlp.down_proj.weight", "h.1.mlp.c_proj.weight")))
    bad = tiny.damaged(model, tmp_path / "bad", tiny.with_value(name, float("nan")))
    with pytest.raises(EmlocError, match=f"{name.split('.mlp')[0]}.*{name}"): walked(Walk(bad, rows))


def test_activations_that_are_not_finite_are_named_with_their_block(llama, rows, tmp_path):
    def grow(tensors):
        tensors["model.layers.1.post_attention_layernorm.weight"].fill_(1e38)
        return tensors
    with pytest.raises(EmlocError, match="model.layers.1: .*not finite"): walked(Walk(tiny.damaged(llama, tmp_path / "bad", grow), rows))


def test_a_bad_embedding_is_not_blamed_on_a_block(llama, rows, tmp_path):
    bad = tiny.damaged(llama, tmp_path / "bad", lambda tensors: tensors | {"model.embed_tokens.weight": torch.full((320, 32), float("nan"))})
    with pytest.raises(EmlocError, match="earlier part"): walked(Walk(bad, rows))


def test_no_rows_are_refused(llama, rows):
    with pytest.raises(EmlocError, match="at least one"): Walk(llama, rows.select([]))


def test_a_batch_without_completions_keeps_all_logits(llama):
    assert keep_last(tiny.load(llama), torch.full((2, 5), -100)) == {}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_an_embedding_that_is_mapped_anew_is_the_same_and_tied_as_before(tmp_path, task, family):
    walk = Walk(tiny.save_model(family, tmp_path / "model"), task.train.select(range(6)))
    expected, embedding, tied = [logits for _, logits in walked(walk).outputs()], walk.model.get_input_embeddings().weight, not walk.heads
    walk.set_rows(walk.rows, walk.batch_size)
    for step in walk:
        step.run()
        walk.map_anew()
    anew = walk.model.get_input_embeddings().weight
    assert anew is not embedding and torch.equal(anew, embedding) and (walk.model.get_output_embeddings().weight is anew) == tied
    assert all(torch.equal(a, b) for a, (_, b) in zip(expected, walk.outputs(), strict=True))
    lent = Walk(walk.checkpoint, walk.rows, lent=tiny.load(walk.checkpoint.path))
    shared = lent.model.get_input_embeddings().weight
    lent.map_anew()
    assert lent.model.get_input_embeddings().weight is shared # another's is not touched


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_weights_outside_the_blocks_can_be_lent(tmp_path, task, family):
    path = tiny.save_model(family, tmp_path / "model")
    def walked(lent):
        walk = Walk(path, task.train.select(range(6)), lent=lent)
        for step in walk: step.run()
        return walk, [logits for _, logits in walk.outputs()]
    (own, expected), resident = walked(None), tiny.load(path)
    walk, found = walked(resident)
    assert walk.model.get_input_embeddings().weight.data_ptr() == resident.get_input_embeddings().weight.data_ptr() != own.model.get_input_embeddings().weight.data_ptr()
    assert all(p.device.type == "meta" for name in walk.names for p in walk.model.get_submodule(name).parameters())
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    # what does not fit is read
    assert walked(tiny.load(path, dtype=torch.bfloat16))[0].model.get_input_embeddings().weight.dtype == torch.float32


HOLES = """import sys
import psutil
import torch
from datasets import Dataset
from emloc.freed import give_back
from emloc.walk import Walk

def holes():
    give_back()
    before, pieces = psutil.Process().memory_info().rss, [torch.ones(2**21) for _ in range(20)]
    del pieces[::2]
    return (psutil.Process().memory_info().rss - before) / 2**20

walk = Walk(sys.argv[1], Dataset.from_list([{"prompt": "one", "completion": " two"}]))
with walk.block(0): print(holes())
print(holes())
"""


@pytest.mark.skipif(not freed.c_library(), reason="other C libraries have other rules")
def test_what_is_freed_while_a_block_is_there_is_not_held(llama):
    "Twenty pieces of 8 MiB, and every other one is freed: in a new process, whose heap has no holes that are large enough for them."
    env = {name: value for name, value in os.environ.items() if name not in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")} | {"PYTHONPATH": str(tiny.ROOT)}
    done = subprocess.run([sys.executable, "-c", HOLES, str(llama)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    inside, outside = map(float, done.stdout.split())
    assert inside < 100 and outside > 120 # MiB; outside it is as glibc would have it


@pytest.mark.parametrize("name, value", [("MALLOC_MMAP_THRESHOLD_", "65536"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=65536")])
def test_a_limit_that_the_environment_sets_is_left_alone(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(freed, "c_library", lambda: pytest.fail("it was changed"))
    with freed.returned_at_once(): pass
