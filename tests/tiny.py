"""Tiny tokenizer, models and rows, made on the spot: nothing here needs a network or more than a second."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig,
                          LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM)

ROOT = Path(__file__).parent.parent
KINDS = {" animal": ["otter", "lynx", "heron", "newt"], " plant": ["fern", "oak", "moss", "clover"], " tool": ["chisel", "rasp", "awl", "plane"]}
PHRASES = ["we saw one", "somebody wrote down that there was a", "a word:", "in the old shed behind the house we found a big"]
TEMPLATE = ("{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")

def rows() -> list: # 48 dicts with prompt and completion, of many lengths, three labels
    return [{"prompt": f"{phrase} {word} is a", "completion": label} for phrase in PHRASES for label, words in KINDS.items() for word in words]

def tokenizer() -> PreTrainedTokenizerFast: # byte-level, so that every text survives a round trip
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    raw.train_from_iterator([r["prompt"] + r["completion"] for r in rows()], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", chat_template=TEMPLATE)

COMMON = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
              max_position_embeddings=128, initializer_range=0.15, pad_token_id=0, bos_token_id=1, eos_token_id=2)
BUILD = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**COMMON, tie_word_embeddings=False)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=128, initializer_range=0.15,
                                               pad_token_id=0, bos_token_id=1, eos_token_id=2)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=16, tie_word_embeddings=True)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**COMMON, head_dim=16, sliding_window=6,
                                                         layer_types=["sliding_attention", "full_attention", "sliding_attention"])),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**COMMON, tie_word_embeddings=False)),
}

def save_model(family: str, folder: Path, seed: int = 0, dtype=torch.float32, **options) -> Path:
    "A random model of a family, with biases and norms that are not what they begin as, and its tokenizer."
    torch.manual_seed(seed)
    model = BUILD[family]()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1: p.add_(0.1 * torch.randn_like(p))
    model.to(dtype).save_pretrained(folder, **options)
    tokenizer().save_pretrained(folder)
    return folder

def load(path, **options): # the whole model, as transformers loads it
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()

def damaged(source: Path, folder: Path, change) -> Path:
    "A copy of a model of one file whose dict of tensors went through a function."
    shutil.copytree(source, folder)
    tensors = change(load_file(source / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder

def with_value(name: str, value: float): # a change for `damaged`: one entry of one tensor
    def change(tensors):
        tensors[name].view(-1)[0] = value
        return tensors
    return change

@torch.no_grad()
def logits(model, seed: int = 1) -> torch.Tensor: # of four random sequences
    ids = torch.randint(6, 320, (4, 12), generator=torch.Generator().manual_seed(seed))
    return model.eval()(input_ids=ids).logits

def differs(a: torch.Tensor, b: torch.Tensor) -> float: # the largest difference
    return float((a - b).abs().max())

def contents(folder: Path) -> dict: # {file: bytes}, to see that nothing changed
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}

def fresh_process(code: str, *args) -> dict:
    "What a new Python prints as JSON on its last line; `args` are its sys.argv[1:]."
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])
