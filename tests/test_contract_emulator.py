"""Stage 1: a small model with the original's names that loads anywhere emloc is imported, resumes, and leaves nothing half-done."""
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import emloc.emulator
from emloc.data import EmlocError
from emloc.emulator import build_emulator, collect_spectra, load_spectra
from emloc.lowrank import LowRankLinear, emulator_config, emulator_weight, load_emulator
from emloc.model import Checkpoint, block_linears, block_names, dense_weight, skeleton
from emloc.rank import by_spectrum, uniform
from emloc.spectrum import Gram, decompose, truncate
from emloc.walk import Walk


def shapes_of(path): return {n: tuple(dense_weight(m).shape) for n, m in block_linears(skeleton(Checkpoint(path))).items()}


def full_rank(path): return {n: min(shape) for n, shape in shapes_of(path).items()}


@pytest.fixture
def rows(task): return task.train.select(range(16))


@pytest.fixture
def build(llama, rows, tmp_path):
    "Function (options) -> an emulator of the Llama at tmp_path/emulator."
    return lambda model=llama, calibration=rows, out=tmp_path / "emulator", **options: build_emulator(model, calibration, out, **options)


def test_at_full_rank_the_emulator_is_the_model(model, build):
    emulator = load_emulator(build(model, ranks=full_rank(model)))
    pairs = [n for n, m in emulator.named_modules() if isinstance(m, LowRankLinear)]
    assert sorted(pairs) == sorted(shapes_of(model))
    assert tiny.differs(tiny.logits(emulator), tiny.logits(tiny.load(model))) < 2e-3


def test_less_rank_is_less_like_the_model(model, rows, tmp_path):
    whole = tiny.logits(tiny.load(model))
    distance = lambda ratio: float((tiny.logits(load_emulator(build_emulator(model, rows, tmp_path / str(ratio), ratio=ratio))) - whole).norm())
    assert distance(0.2) > distance(0.9) > 0


def test_ratio_one_changes_nothing(model, build):
    assert torch.equal(tiny.logits(load_emulator(build(model, ratio=1))), tiny.logits(tiny.load(model)))


def test_names_without_the_base_models_prefix_are_emulated_alike(models, rows, build, tmp_path):
    bare = tiny.damaged(models["gpt2"], tmp_path / "bare", lambda tensors: {n.removeprefix("transformer."): t for n, t in tensors.items()})
    expected = load_emulator(build(models["gpt2"], ratio=0.5))
    assert torch.equal(tiny.logits(load_emulator(build(bare, out=tmp_path / "other", ratio=0.5))), tiny.logits(expected))


def test_a_sharded_model_is_emulated_alike(llama, build, tmp_path):
    sharded = tiny.save_model("llama", tmp_path / "sharded", max_shard_size="40KB")
    expected = tiny.logits(load_emulator(build(ratio=0.5)))
    assert torch.equal(tiny.logits(load_emulator(build(sharded, out=tmp_path / "other", ratio=0.5))), expected)


def test_the_pairs_are_the_truncated_spectra_on_the_models_own_inputs(llama, rows, build):
    emulator, ranks, grams = Checkpoint(build(ratio=0.5)), uniform(shapes_of(llama), 0.5), {}
    for step in Walk(llama, rows):
        step.on_inputs(lambda names, x: grams.update({n: Gram(x.shape[-1], dtype=torch.float64).add(x) for n in names}))
        step.run()
    for name, rank in ranks.items():
        weight, G = Checkpoint(llama).read(f"{name}.weight").double(), grams[name]
        U, V = truncate(decompose(weight, G), rank)
        error = lambda W: float(((weight - W) @ G.matrix * (weight - W)).sum())
        assert error(emulator_weight(emulator, name).double()) == pytest.approx(error(U @ V), rel=1e-3)


def test_everything_that_is_no_linear_of_a_block_stays(model, build):
    whole, emulator = tiny.load(model).state_dict(), load_emulator(build(model, ratio=0.5)).state_dict()
    replaced = {f"{n}.weight" for n in shapes_of(model)}
    assert set(whole) - set(emulator) == replaced
    assert all(torch.equal(whole[n], emulator[n]) for n in set(whole) - replaced)


def test_the_biases_of_conv1d_are_kept(models, build):
    whole, emulator = tiny.load(models["gpt2"]), load_emulator(build(models["gpt2"], ratio=0.3))
    for name in shapes_of(models["gpt2"]):
        bias = whole.get_submodule(name).bias
        assert bias.abs().max() > 0 and torch.equal(bias, emulator.get_submodule(name).bias)


def test_ranks_are_those_asked_for_and_the_rest_stays_dense(llama, build):
    asked = {"model.layers.0.mlp.up_proj": 5, "model.layers.2.self_attn.q_proj": 3}
    emulator = load_emulator(build(ranks=asked))
    assert {n: m.rank for n, m in emulator.named_modules() if isinstance(m, LowRankLinear)} == asked


def test_a_plan_brings_its_ranks(build):
    asked = {"model.layers.0.mlp.up_proj": 5}
    assert emulator_config(build(plan=SimpleNamespace(ranks=asked))).ranks == asked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_emulator_is_smaller_by_what_the_ranks_say(dtype, build, tmp_path):
    model = tiny.save_model("llama", tmp_path / "model", dtype=dtype)
    shapes, ranks = shapes_of(model), uniform(shapes_of(model), 0.25)
    saved = sum(o * i - k * (o + i) for (o, i), k in ((shapes[n], k) for n, k in ranks.items()))
    assert Checkpoint(build(model, ratio=0.25)).nbytes == Checkpoint(model).nbytes - saved * dtype.itemsize


def test_the_emulator_has_the_dtype_of_the_model(build, tmp_path):
    model = tiny.save_model("llama", tmp_path / "model", dtype=torch.bfloat16)
    assert {p.dtype for p in load_emulator(build(model, ratio=0.5)).parameters()} == {torch.bfloat16}


def test_the_emulator_says_what_it_emulates(llama, build):
    config = emulator_config(build(ratio=0.5))
    assert (config.base_model, config.base_fingerprint, config.ratio) == (str(llama), Checkpoint(llama).fingerprint(), 0.5)


def test_the_emulators_readme_warns_of_loading_without_the_import(build):
    assert "import emloc" in (build(ratio=0.5) / "README.md").read_text()


def test_the_emulator_can_be_saved_and_loaded_again(llama_stages, tmp_path):
    emulator = load_emulator(llama_stages.emulator)
    emulator.save_pretrained(tmp_path)
    assert torch.equal(tiny.logits(load_emulator(tmp_path)), tiny.logits(emulator))


def test_spectra_are_kept_with_the_emulator(llama, rows, build):
    stored, (collected, shapes) = load_spectra(build(ratio=0.5)), collect_spectra(llama, rows)
    assert shapes == shapes_of(llama)
    assert set(stored) == set(collected) == set(shapes)
    for n, spectrum in stored.items(): # some list the leading directions and the energy of the rest
        k = len(spectrum.sigma)
        assert torch.allclose(spectrum.sigma, collected[n][:k], rtol=1e-3, atol=1e-3 * float(collected[n][0]))
        assert spectrum.rest == pytest.approx(float((collected[n][k:].double() ** 2).sum()), abs=1e-5 * float((collected[n] ** 2).sum()))


def test_ranks_by_spectrum_fit_the_emulator(llama, rows, build):
    ranks = by_spectrum(*collect_spectra(llama, rows), 0.5)
    assert emulator_config(build(ranks=ranks)).ranks == ranks


ROUND_TRIP = """
import sys, json, torch
from transformers import AutoModelForCausalLM
import emloc
ids = torch.randint(6, 320, (4, 12), generator=torch.Generator().manual_seed(1))
out = {}
for family, path in zip(sys.argv[1::2], sys.argv[2::2]):
    for name, load in (("front door", emloc.load_emulator), ("from_pretrained", AutoModelForCausalLM.from_pretrained)):
        with torch.no_grad(): out[f"{family}, {name}"] = load(path).eval()(input_ids=ids).logits.flatten().tolist()
print(json.dumps(out))
"""

def test_an_emulator_loads_in_a_fresh_process(make_stages):
    emulators = {family: make_stages(family).emulator for family in ("llama", "gpt2", "phi3", "llama, quantized")}
    found = tiny.fresh_process(ROUND_TRIP, *(word for pair in emulators.items() for word in pair))
    assert len(found) == 8
    for name, values in found.items():
        assert tiny.differs(torch.tensor(values), tiny.logits(load_emulator(emulators[name.rsplit(",", 1)[0]])).flatten()) < 1e-5, name


def interrupt(monkeypatch, at):
    "From now on the block of this number is never finished; gives the numbers of those that are."
    real, built = emloc.emulator.build_block, []
    def build_block(step, *more):
        if step.index == at: raise KeyboardInterrupt
        built.append(step.index)
        return real(step, *more)
    monkeypatch.setattr(emloc.emulator, "build_block", build_block)
    return built


@pytest.mark.parametrize("at", [0, 1])
def test_an_interrupted_run_goes_on_where_it_was(at, model, build, tmp_path, monkeypatch):
    undisturbed = tiny.contents(build(model, out=tmp_path / "undisturbed", ratio=0.5, batch_size=5))
    interrupt(monkeypatch, at)
    with pytest.raises(KeyboardInterrupt): build(model, ratio=0.5, batch_size=5)
    assert not (tmp_path / "emulator").exists()
    monkeypatch.undo()
    built = interrupt(monkeypatch, None)
    assert tiny.contents(build(model, ratio=0.5, batch_size=5)) == undisturbed
    assert built == list(range(at, len(block_names(skeleton(Checkpoint(model))))))


@pytest.mark.parametrize("moment", ["before the rest is written", "before it gets its name"])
def test_a_run_interrupted_at_its_end_can_be_repeated(moment, build, tmp_path, monkeypatch):
    undisturbed = tiny.contents(build(out=tmp_path / "undisturbed", ratio=0.5))
    def stop(*args, **kwargs): raise KeyboardInterrupt
    where = {"before the rest is written": (emloc.emulator, "finish_emulator", stop), "before it gets its name": (emloc.output, "finish_directory", stop)}
    monkeypatch.setattr(*where[moment])
    with pytest.raises(KeyboardInterrupt): build(ratio=0.5)
    monkeypatch.undo()
    built = interrupt(monkeypatch, None)
    assert tiny.contents(build(ratio=0.5)) == undisturbed and built == []


@pytest.fixture
def interrupted(build, monkeypatch):
    "A run of ratio 0.5 that stopped at its second block."
    interrupt(monkeypatch, 1)
    with pytest.raises(KeyboardInterrupt): build(ratio=0.5, batch_size=5)
    monkeypatch.undo()


@pytest.mark.parametrize("what", ["ratio", "model", "rows", "max_length", "batch_size"])
def test_a_run_with_other_settings_does_not_go_on(what, interrupted, build, other_model, task, tmp_path):
    options = {"ratio": 0.5, "batch_size": 5}
    options |= {"ratio": {"ratio": 0.4}, "model": {"model": other_model}, "rows": {"calibration": task.test}, "max_length": {"max_length": 9},
                "batch_size": {"batch_size": 3}}[what]
    before = tiny.contents(tmp_path / "emulator.partial")
    with pytest.raises(EmlocError, match="emulator.partial"): build(**options)
    assert tiny.contents(tmp_path / "emulator.partial") == before


def test_a_run_can_begin_again(interrupted, build, tmp_path, monkeypatch):
    built = interrupt(monkeypatch, None)
    build(ratio=0.4, batch_size=5, resume=False)
    assert built == [0, 1, 2] and not (tmp_path / "emulator.partial").exists()


BAD = {
    "ratio 0": (dict(ratio=0), "ratio 0"), "ratio 1.5": (dict(ratio=1.5), "ratio 1.5"), "neither": ({}, "either"),
    "both": (dict(ratio=0.5, ranks={"model.layers.0.mlp.up_proj": 2}), "either"),
    "an unknown name": (dict(ranks={"model.layers.0.mlp.nothing": 2}), "nothing"),
    "the head": (dict(ranks={"lm_head": 2}), "lm_head"),
    "rank 0": (dict(ranks={"model.layers.0.mlp.up_proj": 0}), "up_proj: rank 0"),
    "rank 33": (dict(ranks={"model.layers.0.mlp.up_proj": 33}), "up_proj: rank 33"),
    "an unknown model": (dict(model="/no/such/model", ratio=0.5), "no such directory"),
    "an emulator of an emulator": (dict(ratio=0.5), "emulator"),
}

@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_done_leaves_nothing(case, build, llama_stages, tmp_path):
    options, message = BAD[case]
    if case == "an emulator of an emulator": options = options | {"model": llama_stages.emulator}
    with pytest.raises(EmlocError, match=message): build(**options)
    assert list(tmp_path.iterdir()) == []


def test_no_calibration_rows_are_refused(rows, build, tmp_path):
    with pytest.raises(EmlocError, match="at least one"): build(calibration=rows.select([]), ratio=0.5)
    assert list(tmp_path.iterdir()) == []


def test_too_few_calibration_tokens_are_refused_with_a_number_that_is_enough(rows, build, tmp_path):
    with pytest.raises(EmlocError, match="give at least [0-9]+ rows") as refused: build(calibration=rows.select([0]), ratio=0.99, max_length=3)
    assert list(tmp_path.iterdir()) == []
    enough = int(re.search("at least ([0-9]+) rows", str(refused.value)).group(1))
    build(calibration=rows.select(range(enough)), ratio=0.99, max_length=3)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.weight"])
def test_a_bad_weight_is_named_and_nothing_is_left(name, llama, build, tmp_path):
    bad = tiny.damaged(llama, tmp_path / "bad", tiny.with_value(name, float("nan")))
    with pytest.raises(EmlocError, match=name): build(bad, ratio=0.5)
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


def test_a_place_in_use_is_refused(build, tmp_path):
    (tmp_path / "emulator").mkdir()
    (tmp_path / "emulator" / "mine").write_text("x")
    with pytest.raises(EmlocError, match="already"): build(ratio=0.5)
    assert [p.name for p in tmp_path.rglob("*")] == ["emulator", "mine"]


def test_a_model_is_no_emulator(llama, tmp_path):
    with pytest.raises(EmlocError, match="no emulator"): load_emulator(llama)
    with pytest.raises(EmlocError, match="nowhere"): load_emulator(tmp_path / "nowhere")


def test_an_emulator_that_lost_a_tensor_is_refused(llama_stages, tmp_path):
    folder = shutil.copytree(llama_stages.emulator, tmp_path / "lacking")
    file, name = folder / "model-00002-of-00004.safetensors", "model.layers.1.mlp.up_proj.U"
    save_file({n: t for n, t in load_file(file).items() if n != name}, file, metadata={"format": "pt"})
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"][name]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(EmlocError, match=name): load_emulator(folder)
