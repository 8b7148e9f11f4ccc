"""The stages that walk, simulated: what is simulated is what a real run holds, to a few per cent."""
import pytest
import torch
from datasets import Dataset
from torch.utils._pytree import tree_leaves

from emloc.allocation import gradient_errors
from emloc.anchor import anchor_bytes
from emloc.arithmetic import any_machine
from emloc.backward import loss_gradient
from emloc.data import EmlocError
from emloc.emulator import build_emulator, choose_bits
from emloc.geometry import bare_model, find_config
from emloc.model import linear_shapes
from emloc.needs import Shapes, anchoring, building
from emloc.plan import plan_memory
from emloc.rank import uniform
from emloc.simulate import Ledger, shorten
from emloc.spectrum import Gram
from emloc import block, walk
from emloc.streamed import allocating_peaks, building_peaks, kind, taken_forks
from emloc.walk import Walk

ROWS, LENGTH, BATCH = 16, 40, 8


class Witness(Ledger):
    "A ledger of a real run: tensors have numbers, and answer for themselves."
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        for tensor in tensors: self.add(tensor)
        rule = self.workspace.get(function)
        if tensors: self.look(rule(args, out) if rule else 0)
        return out


def rows(): # in each of the two batches one that is a little shorter than the others
    torch.manual_seed(0)
    encoded = []
    for i in range(ROWS):
        ids = torch.randint(6, 320, (LENGTH - (i >= BATCH - 1) - (i == ROWS - 1),)).tolist()
        encoded.append({"input_ids": ids, "labels": [-100] * (len(ids) - 6) + ids[-6:]})
    return Dataset.from_list(encoded)


@pytest.mark.parametrize("form, metric", [("lowrank", "activation"), ("lowrank", "fisher"), ("quantized", "activation"), ("quantized", "fisher")])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_a_simulated_build_holds_what_a_real_one_holds(models, family, form, metric, tmp_path, caplog):
    caplog.set_level("WARNING", logger="emloc") # pytest keeps what is logged, and with it the block that was built
    shapes = linear_shapes(bare_model(*find_config(models[family])))
    choice, options = (choose_bits(shapes, 0.15, torch.float32), {"ratio": 0.15}) if form == "quantized" else (uniform(shapes, 0.5), {"ranks": uniform(shapes, 0.5)})
    with any_machine(), taken_forks() as taken, Witness() as witness: build_emulator(models[family], rows(), tmp_path / "emulator", batch_size=BATCH, form=form, metric=metric, **options)
    model = shorten(bare_model(*find_config(models[family])), 2 if metric == "fisher" else 1)
    peaks = building_peaks(model, choice, BATCH, LENGTH, metric=metric, completion=6, taken=taken)
    real, simulated = (max(sum(p.values()) for p in found.values()) for found in (witness.peaks, peaks))
    assert 0.95 * real <= simulated <= 1.15 * real


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_the_simulated_search_for_bits_holds_what_a_real_one_holds(models, family, tmp_path):
    small = build_emulator(models[family], rows(), tmp_path / "emulator", batch_size=BATCH, form="quantized", ratio=0.15)
    with any_machine(), Witness() as witness: gradient_errors(small, models[family], rows(), batch_size=BATCH)
    peaks = allocating_peaks(shorten(bare_model(*find_config(models[family])), 2), BATCH, LENGTH, completion=6)
    real, simulated = (max(sum(p.values()) for p in found.values()) for found in (witness.peaks, peaks))
    assert 0.95 * real <= simulated <= 1.15 * real


def test_a_plan_knows_the_search_for_bits(llama):
    plan = lambda **more: plan_memory(llama, ratio=0.15, batch_size=2, seq_len=24, form="quantized", **more)
    even, searched = plan(), plan(bits="gradients")
    assert [s.name for s in searched.stages if s not in even.stages] == ["1 bits by gradients"] and searched.stage(2) == even.stage(2)
    assert searched.stage(1).name == "1 emulator" and "1 bits by gradients" in repr(searched) and searched.settings["bits"] == "gradients"
    for wrong in ({"bits": "gradients", "form": "lowrank"}, {"bits": "best", "form": "quantized"}):
        with pytest.raises(EmlocError, match="bits"): plan_memory(llama, ratio=0.5, **wrong)


def test_where_every_fork_costs_more_a_build_needs_more_and_a_run_writes_its_forks_down(models):
    shapes = Shapes("SmolLM2-135M")
    build = lambda taken: building(shapes, uniform(shapes.shapes, 0.25), 16, 8, 64, taken=taken)
    assert build(None).peak > build(set()).peak
    one = {("float64", "model.layers.7.mlp.down_proj")}
    assert build(set()).peak < build(one).peak <= build(None).peak
    assert kind("model.layers.7.mlp.down_proj") == kind("model.layers.12.mlp.down_proj") != kind("model.layers.7.mlp.up_proj")
    torch.manual_seed(0)
    scale = torch.ones(32)
    scale[0] = 1e5
    with taken_forks() as taken:
        block.decompose(torch.randn(16, 32), Gram(32).add(torch.randn(200, 32)), "easy", 8)
        block.decompose(torch.randn(16, 32), Gram(32).add(torch.randn(200, 32) * scale), "hard", 8)
    assert taken == {("float64", "hard")}


def test_a_mapped_embedding_is_away_while_weights_are_made():
    whole, mapped = (Shapes("SmolLM2-135M", mapped=m) for m in (False, True))
    embedding = 49152 * 576 * 2
    for metric in ("activation", "fisher"):
        peaks = [building_peaks(s.whole(2), uniform(s.shapes, 0.25), 2, 16, metric=metric, completion=4, mapped=s.mapped) for s in (whole, mapped)]
        less = {moment: sum(parts.values()) - sum(peaks[1][moment].values()) for moment, parts in peaks[0].items()}
        assert less["a weight is factorised"] == embedding and less["a block runs"] == 0
        assert all(n >= 0 for parts in peaks[1].values() for n in parts.values())
    assert building(mapped, uniform(mapped.shapes, 0.25), 16, 8, 64).peak <= building(whole, uniform(whole.shapes, 0.25), 16, 8, 64).peak


def test_between_rounds_a_training_waits_beside_the_walks(llama):
    plan = lambda **more: {s.name: s for s in plan_memory(llama, ratio=0.15, batch_size=2, seq_len=24, form="quantized", **more).stages}
    usual, renewed, once = plan(), plan(renew=True), plan(again=0)
    names = ["2 anchors of a round", "2 a new emulator", "2 LoRA on the new emulator"]
    assert [n for n in renewed if n not in once] == names and [n for n in usual if n not in once] == names[:1]
    step = once["2 LoRA on the emulator"]
    for need in (renewed[n] for n in names[:2]):
        assert all(need.parts[k] >= step.parts[k] for k in ("lora", "optimizer")) and need.host > step.parts["lora"]
    assert renewed[names[0]].parts["weights"] > step.parts["weights"] and renewed[names[1]].parts["weights"] == once["1 emulator"].parts["weights"] # the old emulator is gone when the new one is made
    assert renewed[names[2]].parts["workspace"] > step.parts["workspace"] and {**renewed[names[2]].parts, "workspace": 0} == {**step.parts, "workspace": 0}
    assert plan(again=50)[names[0]].disk == 2 * usual[names[0]].disk
    with pytest.raises(EmlocError, match="rounds of -1"): plan(again=-1)


def test_what_is_lent_is_not_counted_twice():
    s = Shapes("SmolLM2-135M")
    alone, lent = (anchoring(s, uniform(s.shapes, 0.25), 16, 8, 64, lent=lent) for lent in (False, True))
    assert alone.peak - lent.peak == s.dense and alone.host == lent.host # the two walks share it


def test_the_fisher_metric_is_planned_and_unknown_ones_are_not(llama):
    plans = {m: plan_memory(llama, ratio=0.5, batch_size=2, seq_len=24, metric=m) for m in ("activation", "fisher")}
    assert plans["fisher"].stage(1).peak > plans["activation"].stage(1).peak and plans["fisher"].stage(1).disk > plans["activation"].stage(1).disk
    assert plans["fisher"].stage(2).peak == plans["activation"].stage(2).peak and "fisher" in repr(plans["fisher"])
    with pytest.raises(EmlocError, match="metric"): plan_memory(llama, ratio=0.5, metric="best")


def test_options_have_a_line_each(llama):
    plan = plan_memory(llama, ratio=0.5, batch_size=2, seq_len=24, rows=16, train_rows=50)
    anchors, polish = plan.options
    assert anchors.disk >= anchor_bytes(50 * 24, 32, 3) and polish.host == 4 * 32 * 24 * 32 * 4
    sparse = plan_memory(llama, ratio=0.5, batch_size=2, seq_len=24, rows=16, train_rows=50, anchor_every=3).options[0]
    assert anchors.disk - sparse.disk == 2 * 50 * 24 * 32 * 2
    assert "anchors, 50 rows" in repr(plan) and [o["name"] for o in plan.report()["options"]] == [anchors.name, polish.name]


def test_a_head_a_few_rows_at_a_time_changes_nothing(models, monkeypatch):
    def found():
        w = Walk(models["llama"], rows(), batch_size=BATCH)
        for step in w: step.run()
        loss, gradients = loss_gradient(w)
        assert all(p.grad is None for p in w.model.parameters()) and w.late == w.heads != []
        return loss, gradients, [logits for _, logits in w.outputs()]
    loss, gradients, logits = found()
    monkeypatch.setattr(walk, "LOGITS", 3 * 8 * 320)
    other_loss, other, pieces = found()
    assert len(pieces) > len(logits) and torch.allclose(torch.cat([p.flatten() for p in pieces]), torch.cat([l.flatten() for l in logits]), atol=1e-5)
    assert loss == pytest.approx(other_loss, rel=1e-5) and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients, other))
