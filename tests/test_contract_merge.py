"""The result is ordinary: an adapter for plain PEFT, or a model directory in which only the adapted weights changed."""
import json
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from emloc.adapter import Adapter, read_adapter, write_adapter
from emloc.correct import correct_adapter
from emloc.data import EmlocError
from emloc.merge import merge_adapter, merged_weight
from emloc.model import Checkpoint, find_model


@pytest.fixture(scope="session")
def make_corrected(make_stages, task, tmp_path_factory):
    "Function (family) -> model and corrected adapter directories, made at first use."
    made = {}
    def make(family):
        if family not in made:
            s, folder = make_stages(family), tmp_path_factory.mktemp(f"corrected-{family}")
            made[family] = SimpleNamespace(model=s.model, raw=s.raw, adapter=correct_adapter(s.raw, s.emulator, s.model, folder / "adapter", mode="gram", calibration=task.train))
        return made[family]
    return make


@pytest.fixture(params=["llama", "gpt2", "phi3"])
def corrected(request, make_corrected): return make_corrected(request.param)


@pytest.fixture
def llama_corrected(make_corrected): return make_corrected("llama")


@pytest.fixture
def out(tmp_path): return tmp_path / "merged"


def unloaded(model, adapter, **options): return PeftModel.from_pretrained(tiny.load(model, **options), adapter).merge_and_unload()


PLAIN = """
import sys, json, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
ids, out = torch.randint(6, 320, (4, 12), generator=torch.Generator().manual_seed(1)), {}
for family, model, adapter, merged in zip(*(sys.argv[i::4] for i in (1, 2, 3, 4))):
    with torch.no_grad():
        out[family] = [m.eval()(input_ids=ids).logits.flatten().tolist() for m in (
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter), AutoModelForCausalLM.from_pretrained(merged))]
assert "emloc" not in sys.modules
print(json.dumps(out))
"""

def test_a_fresh_process_needs_no_emloc_for_the_results(make_corrected, tmp_path):
    words = []
    for family in ("llama", "gpt2", "phi3"):
        c = make_corrected(family)
        words += [family, c.model, c.adapter, merge_adapter(c.model, c.adapter, tmp_path / family)]
    for family, (adapted, merged) in tiny.fresh_process(PLAIN, *words).items():
        adapted, merged, before = torch.tensor(adapted), torch.tensor(merged), tiny.logits(tiny.load(make_corrected(family).model)).flatten()
        assert tiny.differs(adapted, merged) < 1e-4, family
        assert tiny.differs(adapted, before) > 1e-2, family


def test_the_merged_weights_are_those_of_merge_and_unload(corrected, out):
    merged = tiny.load(merge_adapter(corrected.model, corrected.adapter, out)).state_dict()
    expected = unloaded(corrected.model, corrected.adapter).state_dict()
    assert set(merged) == set(expected)
    assert max(tiny.differs(merged[n], expected[n]) for n in merged) < 1e-5


def test_every_pair_is_merged_and_nothing_else_changes(corrected, out):
    before, after = Checkpoint(corrected.model), Checkpoint(merge_adapter(corrected.model, corrected.adapter, out))
    changed = {n for n in before.info if not torch.equal(before.read(n), after.read(n))}
    assert changed == {f"{m}.weight" for m in read_adapter(corrected.adapter).pairs}


def test_a_sharded_model_stays_as_it_is_sharded(llama_corrected, out, tmp_path):
    sharded = tiny.save_model("llama", tmp_path / "sharded", max_shard_size="40KB")
    merge_adapter(sharded, llama_corrected.adapter, out)
    layout = lambda c: {n: (c.files[n].name, c.info[n]) for n in c.info}
    assert layout(Checkpoint(out)) == layout(Checkpoint(sharded)) and len(set(Checkpoint(out).files.values())) > 3
    assert tiny.differs(tiny.logits(tiny.load(out)), tiny.logits(unloaded(sharded, llama_corrected.adapter))) < 1e-4


def test_every_other_file_is_copied(corrected, out):
    merge_adapter(corrected.model, corrected.adapter, out)
    same = lambda folder: {n: b for n, b in tiny.contents(folder).items() if not n.endswith(".safetensors")}
    assert same(out) == same(corrected.model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_rounded_once(dtype, llama_corrected, out, tmp_path):
    model = tiny.save_model("llama", tmp_path / "model", dtype=dtype)
    adapter = read_adapter(llama_corrected.adapter)
    adapter.info.pop("model_fingerprint")
    (tmp_path / "adapter").mkdir()
    write_adapter(adapter, tmp_path / "adapter")
    before, after = Checkpoint(model), Checkpoint(merge_adapter(model, tmp_path / "adapter", out))
    for module, (A, B) in adapter.pairs.items():
        weight = after.read(f"{module}.weight")
        assert weight.dtype == dtype
        assert torch.equal(weight, (before.read(f"{module}.weight").float() + adapter.scaling(module) * B @ A).to(dtype))


def test_a_flipped_weight_gets_the_flipped_product():
    W, A, B = torch.randn(5, 7), torch.randn(2, 7), torch.randn(5, 2)
    assert torch.allclose(merged_weight(W, A, B, 0.5), W + 0.5 * B @ A)
    assert torch.allclose(merged_weight(W.T, A, B, 0.5, flipped=True), (W + 0.5 * B @ A).T)


def test_names_without_the_base_models_prefix_stay_without_it(make_corrected, out, tmp_path):
    c = make_corrected("gpt2")
    bare = tiny.damaged(c.model, tmp_path / "bare", lambda tensors: {n.removeprefix("transformer."): t for n, t in tensors.items()})
    adapter = read_adapter(c.adapter)
    adapter.info["model_fingerprint"] = Checkpoint(bare).fingerprint()
    (tmp_path / "adapter").mkdir()
    write_adapter(adapter, tmp_path / "adapter")
    merge_adapter(bare, tmp_path / "adapter", out)
    assert set(load_file(out / "model.safetensors")) == set(load_file(bare / "model.safetensors"))
    assert tiny.differs(tiny.logits(tiny.load(out)), tiny.logits(unloaded(c.model, c.adapter))) < 1e-4


def trained_by_peft(model, folder, **options):
    "An adapter that emloc has never seen, with a LoRA that is not zero."
    torch.manual_seed(0)
    wrapped = get_peft_model(tiny.load(model), LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, task_type="CAUSAL_LM", **options))
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.parametrize("options", [dict(target_modules=["q_proj", "down_proj"]), dict(target_modules=["q_proj"], use_rslora=True),
                                     dict(target_modules="all-linear", alpha_pattern={"down_proj": 1}, rank_pattern={"up_proj": 2})], ids=["plain", "rsLoRA", "patterns"])
def test_any_peft_lora_of_the_model_is_merged(options, llama, out, tmp_path):
    adapter = trained_by_peft(llama, tmp_path / "adapter", **options)
    merged = tiny.logits(tiny.load(merge_adapter(llama, adapter, out)))
    assert tiny.differs(merged, tiny.logits(unloaded(llama, adapter))) < 1e-4 < tiny.differs(merged, tiny.logits(tiny.load(llama)))


def test_a_lora_on_the_head_is_merged_when_the_head_is_a_weight_of_its_own(llama, out, tmp_path):
    adapter = trained_by_peft(llama, tmp_path / "adapter", target_modules=["v_proj", "lm_head"])
    assert tiny.differs(tiny.logits(tiny.load(merge_adapter(llama, adapter, out))), tiny.logits(unloaded(llama, adapter))) < 1e-4


def left(tmp_path): return sorted(p.name for p in tmp_path.iterdir() if "merged" in p.name)


def test_a_lora_on_a_tied_head_is_refused(models, out, tmp_path):
    adapter = trained_by_peft(models["qwen3"], tmp_path / "adapter", target_modules=["v_proj", "lm_head"])
    with pytest.raises(EmlocError, match="lm_head"): merge_adapter(models["qwen3"], adapter, out)
    assert left(tmp_path) == []


def test_a_raw_adapter_is_refused(corrected, out, tmp_path):
    with pytest.raises(EmlocError, match="not corrected"): merge_adapter(corrected.model, corrected.raw, out)
    assert left(tmp_path) == []


def test_another_model_is_refused(llama_corrected, other_model, models, out, tmp_path):
    for model in (other_model, models["gpt2"]):
        with pytest.raises(EmlocError, match="another model"): merge_adapter(model, llama_corrected.adapter, out)
    assert left(tmp_path) == []


def changed(source, folder, change):
    adapter = read_adapter(source)
    folder.mkdir()
    write_adapter(Adapter(adapter.config, change(dict(adapter.pairs)), adapter.info), folder)
    return folder


PAIR = (torch.zeros(4, 32), torch.zeros(32, 4))
ODD = {"a pair for no layer": (lambda pairs: pairs | {"model.layers.7.self_attn.q_proj": PAIR}, "layers.7.self_attn.q_proj"),
       "a pair for a norm": (lambda pairs: pairs | {"model.norm": PAIR}, "model.norm"),
       "a pair of another size": (lambda pairs: pairs | {"model.layers.0.mlp.up_proj": PAIR}, "layers.0.mlp.up_proj"),
       "a pair that overflows": (lambda pairs: pairs | {"model.layers.0.self_attn.q_proj": (torch.full((4, 32), 3e38), torch.ones(32, 4))}, "q_proj.*not finite")}

@pytest.mark.parametrize("case", ODD)
def test_a_pair_that_cannot_be_merged_is_named_and_nothing_is_left(case, llama_corrected, out, tmp_path):
    change, message = ODD[case]
    with pytest.raises(EmlocError, match=message): merge_adapter(llama_corrected.model, changed(llama_corrected.adapter, tmp_path / "adapter", change), out)
    assert left(tmp_path) == []


def test_a_place_in_use_is_refused(llama_corrected, out):
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(EmlocError, match="already"): merge_adapter(llama_corrected.model, llama_corrected.adapter, out)
    assert [p.name for p in out.iterdir()] == ["mine"]


def test_the_model_and_the_adapter_stay_as_they_are(llama_corrected, out):
    before = tiny.contents(llama_corrected.model), tiny.contents(llama_corrected.adapter)
    merge_adapter(llama_corrected.model, llama_corrected.adapter, out)
    assert (tiny.contents(llama_corrected.model), tiny.contents(llama_corrected.adapter)) == before


def test_read_only_files_are_merged_all_the_same(llama_corrected, out, tmp_path):
    model = shutil.copytree(llama_corrected.model, tmp_path / "read-only")
    for file in model.iterdir(): file.chmod(0o444)
    merge_adapter(model, llama_corrected.adapter, out)
    assert tiny.differs(tiny.logits(tiny.load(out)), tiny.logits(unloaded(model, llama_corrected.adapter))) < 1e-4


def test_a_directory_that_also_holds_weights_outside_the_index_does_not_keep_old_weights(llama_corrected, out, tmp_path):
    "What is not merged must not be loaded by somebody instead."
    model = tiny.save_model("llama", tmp_path / "model", max_shard_size="40KB")
    shutil.copyfile(llama_corrected.model / "model.safetensors", model / "consolidated.safetensors")
    merge_adapter(model, llama_corrected.adapter, out)
    kept = {json.loads((out / "model.safetensors.index.json").read_text())["weight_map"][n] for n in Checkpoint(out).info}
    assert {p.name for p in find_model(out).glob("*.safetensors")} == kept
