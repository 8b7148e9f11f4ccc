"""Random models of a wanted size, written to disk part by part: no more than one shard is in memory.

    python bench/models.py 1.1b DIRECTORY        # or any other name in GEOMETRIES
"""
import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from emloc.model import block_names, find_model
from emloc.output import new_directory

# the vocabulary of 1.1b and blocks is the embedded model's, whose tokenizer they borrow
GEOMETRIES = {
    "1.1b": dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4, vocab_size=49152), # TinyLlama's
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256), # Llama 3's
    "blocks": dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=32, num_attention_heads=12, num_key_value_heads=4, vocab_size=49152),
    "tiny": dict(hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, vocab_size=512),
}
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt", "*.jinja")


def make_config(geometry: dict, tokenizer: Path) -> LlamaConfig:
    "The model's config, with the special tokens of its tokenizer."
    known = json.loads((tokenizer / "config.json").read_text())
    special = {k: known[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if known.get(k) is not None}
    config = LlamaConfig(**geometry | {"vocab_size": max(geometry["vocab_size"], known["vocab_size"])}, **special, tie_word_embeddings=False, max_position_embeddings=4096)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    return config


def write_model(
    geometry: dict, # options of LlamaConfig
    out: Path, # the directory to write
    *,
    tokenizer="default", # the model whose tokenizer it gets
    shard_bytes: int = 400 * 2**20, # a shard ends with the part that fills it
    seed: int = 0,
    device: str = "cpu", # where the random numbers are drawn
) -> Path: # a bfloat16 model directory
    "A Llama with normal weights of scale 0.02, as training begins, and norms of 1."
    tokenizer = find_model(tokenizer)
    config, draw = make_config(geometry, tokenizer), torch.Generator(device).manual_seed(seed)
    with torch.device("meta"): skeleton = LlamaForCausalLM(config)
    shapes, parts = {n: p.shape for n, p in skeleton.named_parameters()}, {}
    blocks = block_names(skeleton)
    for name in shapes: parts.setdefault(next((b for b in blocks if name.startswith(b + ".")), name), []).append(name)
    files, shard = {}, {}
    with new_directory(out) as folder:
        def flush():
            file = f"model-{len(set(files.values())) + 1:05d}.safetensors"
            save_file(shard, folder / file, metadata={"format": "pt"})
            files.update(dict.fromkeys(shard, file))
            shard.clear()
        for names in parts.values():
            for name in names:
                value = torch.empty(shapes[name], dtype=torch.bfloat16, device=device)
                shard[name] = (value.fill_(1) if value.dim() == 1 else value.normal_(0, 0.02, generator=draw)).cpu()
            if sum(t.nbytes for t in shard.values()) >= shard_bytes: flush()
        if shard: flush()
        size = sum(s.numel() * 2 for s in shapes.values())
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": files}, indent=1))
        config.save_pretrained(folder)
        for pattern in TOKENIZER:
            for file in tokenizer.glob(pattern): shutil.copyfile(file, folder / file.name)
    return Path(out)


def keep_model(geometry: dict, out: Path, **options) -> Path:
    "The model, made only if it is not there yet."
    return out if (out / "config.json").is_file() else write_model(geometry, out, **options)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("geometry", choices=GEOMETRIES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, help="blocks, if another number is wanted")
    args = parser.parse_args()
    print(write_model(GEOMETRIES[args.geometry] | ({"num_hidden_layers": args.layers} if args.layers else {}), args.out))
