"""Bits where the gradients need them: who is to blame for the error, what bits bring, and emulators of as many bytes."""
import json

import pytest
import tiny
import torch

import emloc.allocation
from emloc.allocation import OneOff, allocate_bits, build_allocated, gradient_errors, rounding_error, rung_error
from emloc.data import EmlocError
from emloc.emulator import build_emulator
from emloc.lowrank import emulator_config, emulator_weight, load_emulator
from emloc.model import Checkpoint, dense_weight
from emloc.packed import PER_BYTE, bits_of, overhead
from emloc.walk import Walk

RATIO = 0.1 # of float32


@pytest.fixture
def emulator(model, task, tmp_path): return build_emulator(model, task.calibration(), tmp_path / "even", form="quantized", ratio=RATIO)


@pytest.fixture
def llamas(llama, task, tmp_path): return build_emulator(llama, task.calibration(), tmp_path / "even", form="quantized", ratio=RATIO)


def true_gradients(path, emulator, rows, off):
    "Autograd on the whole model, in which the linears of `off` hand back gradients as the emulator's would: {linear: gradient of its output}, and {block: gradient of what goes into it}."
    walk = Walk(path, rows, batch_size=len(rows))
    model, checkpoint, heard = tiny.load(path), Checkpoint(emulator), {}
    for name, module in model.named_modules():
        if name in emulator_config(emulator).bits:
            def before(module, args, name=name):
                x = args[0].view_as(args[0])
                if x.requires_grad and name in off: x.register_hook(lambda g: g + heard[name] @ (emulator_weight(checkpoint, name) - dense_weight(module)))
                return (x, *args[1:])
            module.register_forward_pre_hook(before)
            module.register_forward_hook(lambda module, args, y, name=name: (y if y.requires_grad else y.requires_grad_()).register_hook(lambda g: heard.update({name: g})) and None)
        elif name in walk.names[1:]:
            module.register_forward_pre_hook(lambda module, args, kwargs, name=name: (args[0] if args else kwargs["hidden_states"]).register_hook(lambda g: heard.update({name: g})) and None, with_kwargs=True)
    model.requires_grad_(False)
    batch = walk.batches[0]
    model(**batch).loss.backward()
    return heard, walk


def test_the_errors_are_those_of_autograd_on_the_whole_model(model, task, emulator):
    rows = task.train.select(range(6))
    found = gradient_errors(emulator, model, rows, batch_size=6)
    assert found.keys() == emulator_config(emulator).bits.keys()
    names = [n for n in found if ".1." in n][:3] + [n for n in found if ".0." in n][-1:]
    exact, walk = true_gradients(model, emulator, rows, ())
    for name in names:
        wrong, _ = true_gradients(model, emulator, rows, (name,))
        index = next(i for i, b in enumerate(walk.names) if name.startswith(f"{b}."))
        off = lambda n: float((wrong[n] - exact[n]).square().sum() / exact[n].square().sum())
        own = [n for n in found if n.startswith(f"{walk.names[index]}.")]
        expected = (sum(map(off, own)) / len(own) + index * (off(walk.names[index]) if index else 0)) / len(walk)
        assert found[name] == pytest.approx(expected, rel=2e-2, abs=1e-6)


def test_an_emulator_that_is_the_model_is_to_blame_for_nothing(llama, task, llamas, monkeypatch):
    monkeypatch.setattr(emloc.allocation, "emulator_weight", lambda checkpoint, name: Checkpoint(llama).read(f"{name}.weight").float())
    assert max(gradient_errors(llamas, llama, task.train.select(range(4))).values()) == 0


def test_the_hooks_are_gone_afterwards(llama, task):
    with Walk(llama, task.train.select(range(2))).block(0) as step:
        OneOff(step).remove()
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in step.linears.values())


@pytest.mark.parametrize("levels", [2, 3, 4, 6, 16])
def test_what_a_rung_leaves_is_what_rounding_leaves(levels):
    from emloc.packed import gaussian_levels
    x, book = torch.randn(400_000, generator=torch.Generator().manual_seed(0)), gaussian_levels(levels)
    left = (book[torch.bucketize(x, (book[1:] + book[:-1]) / 2)] - x).square().mean()
    assert rung_error(levels) == pytest.approx(float(left), rel=0.02) and rounding_error(bits_of(levels)) == pytest.approx(rung_error(levels))


def test_every_bit_brings_less_than_the_one_before():
    errors = [rounding_error(1 + i / 20) for i in range(141)]
    falls = [a - b for a, b in zip(errors, errors[1:])]
    assert all(f > 0 for f in falls) and all(a >= b - 1e-9 for a, b in zip(falls, falls[1:]))


def test_bits_go_to_the_blamed_and_stay_as_many():
    shapes = {"a": (512, 512), "b": (512, 512), "c": (256, 1024), "d": (512, 2048)}
    found = allocate_bits(shapes, {"a": 1.0, "b": 0.01, "c": 0.1, "d": 0.4}, 2.0)
    entries = {n: out * in_ for n, (out, in_) in shapes.items()}
    assert found["a"] > found["c"] > found["b"]
    assert sum(found[n] * entries[n] for n in shapes) == pytest.approx(2.0 * sum(entries.values()), rel=1e-6)
    assert all(1 <= found[n] - overhead(shapes[n]) <= 8 + 1e-9 for n in shapes)
    even = allocate_bits(dict.fromkeys("abc", (512, 512)), dict.fromkeys("abc", 1.0), 2.0 + overhead((512, 512)))
    assert all(b == pytest.approx(2.0 + overhead((512, 512))) for b in even.values())


def test_no_other_allocation_of_the_rungs_is_better():
    "Greedy against all combinations of rungs of three weights that cost as much or less."
    shape, errors = (512, 512), {"a": 1.0, "b": 0.2, "c": 0.03}
    rungs = [bits_of(k) for k in sorted(PER_BYTE)]
    found = allocate_bits(dict.fromkeys(errors, shape), errors, 2.0 + overhead(shape))
    cost = lambda bits: sum(errors[n] * rounding_error(b) for n, b in zip(errors, bits))
    ours = cost([b - overhead(shape) for b in found.values()])
    assert ours <= min(cost((a, b, c)) for a in rungs for b in rungs for c in rungs if a + b + c <= 6) + 1e-9


def test_the_emulator_has_the_same_bytes_and_better_gradients(llama, task, llamas, tmp_path):
    out = build_allocated(llama, task.calibration(), tmp_path / "out", ratio=RATIO)
    assert Checkpoint(out).nbytes == pytest.approx(Checkpoint(llamas).nbytes, rel=0.02)
    assert len(set(emulator_config(out).bits.values())) > 1 and not (tmp_path / "out.even").exists()
    rows = task.train.select(range(8))
    assert sum(gradient_errors(out, llama, rows).values()) < sum(gradient_errors(llamas, llama, rows).values())
    load_emulator(out)


def cut_off(llama, task, out, monkeypatch):
    "A run that ends after the bits were chosen."
    own = emloc.allocation.build_emulator
    def stop(model, rows, out, **options):
        if "bits" in options: raise KeyboardInterrupt
        return own(model, rows, out, **options)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(emloc.allocation, "build_emulator", stop)
        build_allocated(llama, task.calibration(), out, ratio=RATIO)


def test_a_run_that_was_cut_off_goes_on_with_the_bits_it_had_chosen(llama, task, tmp_path, monkeypatch):
    whole = build_allocated(llama, task.calibration(), tmp_path / "whole", ratio=RATIO)
    cut_off(llama, task, tmp_path / "out", monkeypatch)
    assert json.loads((tmp_path / "out.even" / "allocation.json").read_text()) == emulator_config(whole).bits
    monkeypatch.setattr(emloc.allocation, "gradient_errors", None) # known already
    out = build_allocated(llama, task.calibration(), tmp_path / "out", ratio=RATIO)
    blocks = lambda folder: {n: b for n, b in tiny.contents(folder).items() if n.endswith("safetensors")}
    assert blocks(out) == blocks(whole)
    assert not list(tmp_path.glob("out.*"))


def test_what_a_run_of_other_settings_has_left_is_refused(llama, task, tmp_path, monkeypatch):
    cut_off(llama, task, tmp_path / "out", monkeypatch)
    with pytest.raises(EmlocError, match="another metric"): build_allocated(llama, task.calibration(), tmp_path / "out", ratio=RATIO, metric="fisher")
    with pytest.raises(EmlocError, match="another calibration"): build_allocated(llama, task.calibration(8), tmp_path / "out", ratio=RATIO)
    (tmp_path / "out.even.json").unlink() # some other directory of that name
    with pytest.raises(EmlocError, match="remove the directory"): build_allocated(llama, task.calibration(), tmp_path / "out", ratio=RATIO)
    assert (tmp_path / "out.even").is_dir() and not (tmp_path / "out").exists()
    assert build_allocated(llama, task.calibration(), tmp_path / "out", ratio=RATIO, resume=False).is_dir() and not list(tmp_path.glob("out.*"))


def test_the_last_blocks_alone(llama, task, tmp_path):
    out = build_allocated(llama, task.calibration(), tmp_path / "out", ratio=0.6 * RATIO, last=2)
    assert emulator_config(out).bypassed and len(emulator_config(out).bits) == 14


@pytest.mark.parametrize("options, words", [
    ({"bits": {"model.layers.0.mlp.up_proj": 3.0}}, "only one of them knows"),
    ({"bits": {}, "ratio": 0.1}, "not both"),
    ({"bits": {"x": 1.0}, "form": "lowrank", "ratio": 0.5}, "no bits"),
], ids=["other linears", "both", "factors"])
def test_bits_that_cannot_be_are_refused(options, words, llama, task, tmp_path):
    with pytest.raises(EmlocError, match=words): build_emulator(llama, task.calibration(), tmp_path / "out", **{"form": "quantized"} | options)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("options", [{"ratio": 1.0}, {"ratio": 2 / 3, "last": 2}], ids=["of the model", "of the last blocks"])
def test_all_of_the_bytes_leave_nothing_to_allocate(options, llama, task, tmp_path):
    out = build_allocated(llama, task.calibration(), tmp_path / "out", **options)
    assert emulator_config(out).bits == {} and {p.name for p in tmp_path.iterdir()} == {"out"}
