"""Stage 2: ordinary LoRA training, on names of the original model, with the ordinary Trainer."""
import shutil

import pytest
import tiny
import torch
from peft import IA3Config, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from emloc import arithmetic
from emloc.adapter import read_adapter
from emloc.data import EmlocError, collator, encode_rows
from emloc.emulator import build_emulator
from emloc.lowrank import load_emulator
from emloc.finetune import train_adapter, train_lora, training_args
from emloc.pairlora import load_adapter, lora_config, register_pairs, wrap
from emloc.model import Checkpoint, block_linears, skeleton


@pytest.fixture
def train(llama_stages, task, tmp_path):
    "Function (options) -> an adapter at tmp_path/adapter; `steps` and what else training_args takes go in `args`."
    def run(emulator=llama_stages.emulator, rows=task.train, out=tmp_path / "adapter", args=(), **options):
        settings = {"steps": 3, "lr": 1e-2, "bf16": False} | dict(args)
        return train_adapter(emulator, rows, out, args=training_args(tmp_path / "checkpoints", **settings), **{"lora": lora_config(rank=4)} | options)
    return run


@pytest.fixture
def batch(task, tokenizer): return collator(tokenizer)([dict(row) for row in encode_rows(task.train.select(range(6)), tokenizer)])


def adapted(model): return {n.removeprefix("base_model.model.").removesuffix(".lora_A.default") for n, _ in model.named_modules() if n.endswith("lora_A.default")}


LAYERS = [f"model.layers.{i}" for i in range(3)]
TARGETS = {
    "endings": (["q_proj", "down_proj"], {f"{l}.{n}" for l in LAYERS for n in ("self_attn.q_proj", "mlp.down_proj")}),
    "a full name": (["model.layers.1.mlp.up_proj"], {"model.layers.1.mlp.up_proj"}),
    "an expression": (r".*layers\.[02]\..*(k|v)_proj", {f"{l}.self_attn.{n}" for l in (LAYERS[0], LAYERS[2]) for n in ("k_proj", "v_proj")}),
}

@pytest.mark.parametrize("case", TARGETS)
def test_targets_are_named_as_in_the_original(case, llama_stages):
    targets, expected = TARGETS[case]
    assert adapted(wrap(load_emulator(llama_stages.emulator), lora_config(targets=targets))) == expected


def test_all_linear_is_every_linear_of_the_blocks(model, task, tmp_path):
    emulator = build_emulator(model, task.train.select(range(12)), tmp_path / "emulator", ratio=0.5)
    assert adapted(wrap(load_emulator(emulator))) == set(block_linears(skeleton(Checkpoint(model))))


def test_linears_that_stayed_dense_get_their_lora_too(llama, task, tmp_path):
    emulator = build_emulator(llama, task.train.select(range(12)), tmp_path / "emulator", ranks={"model.layers.0.mlp.up_proj": 5})
    assert adapted(wrap(load_emulator(emulator))) == set(block_linears(skeleton(Checkpoint(llama))))


@pytest.mark.parametrize("targets", [["q_proj", "nothing"], ["proj"], "nothing.*", ["lm_head"], [], r".*(q_proj|lm_head)"])
def test_targets_outside_the_blocks_are_refused(targets, llama_stages):
    with pytest.raises(EmlocError, match="target"): wrap(load_emulator(llama_stages.emulator), lora_config(targets=targets))


REFUSED = {"use_dora": dict(use_dora=True), "lora_bias": dict(lora_bias=True), "modules_to_save": dict(modules_to_save=["lm_head"]),
           "bias": dict(bias="all"), "trainable_token_indices": dict(trainable_token_indices=[1]),
           "init_lora_weights": dict(init_lora_weights="pissa"), "layer_replication": dict(layer_replication=[[0, 2], [1, 3]]),
           "alora_invocation_tokens": dict(alora_invocation_tokens=[3])}

@pytest.mark.parametrize("option", REFUSED)
def test_what_cannot_move_to_the_model_is_refused(option, llama_stages):
    with pytest.raises(EmlocError, match=option): wrap(load_emulator(llama_stages.emulator), lora_config(**REFUSED[option]))


def test_a_fresh_lora_changes_nothing(llama_stages):
    expected = tiny.logits(load_emulator(llama_stages.emulator))
    assert tiny.differs(tiny.logits(wrap(load_emulator(llama_stages.emulator))), expected) < 1e-5 # one product instead of two rounds differently


def test_only_the_lora_is_trained(llama_stages):
    assert all(("lora_" in n) == p.requires_grad for n, p in wrap(load_emulator(llama_stages.emulator)).named_parameters())


SCALES = {"plain": (dict(alpha=8), 4, 2.0), "rsLoRA": (dict(alpha=8, use_rslora=True), 4, 4.0), "rank pattern": (dict(alpha=8, rank_pattern={"up_proj": 2}), 2, 4.0),
          "alpha pattern": (dict(alpha=8, alpha_pattern={"up_proj": 2}), 4, 0.5),
          "an expression": (dict(alpha=8, rank_pattern={r".*layers\.1.*proj": 16}, alpha_pattern={r"^model\.layers\.1.*": 4}, use_rslora=True), 16, 1.0)}

@pytest.mark.parametrize("case", SCALES)
def test_rank_and_scaling_are_those_of_peft(case, train, llama_stages):
    options, rank, scaling = SCALES[case]
    path, name = train(lora=lora_config(rank=4, **options)), "model.layers.1.mlp.up_proj"
    adapter, layers = read_adapter(path), load_adapter(load_emulator(llama_stages.emulator), path)
    assert adapter.pairs[name][0].shape == (rank, 32) and adapter.pairs[name][1].shape == (48, rank)
    assert adapter.scaling(name) == scaling
    for module in adapter.pairs: assert adapter.scaling(module) == pytest.approx(layers.base_model.model.get_submodule(module).scaling["default"])


def test_overlapping_patterns_mean_after_saving_what_they_meant_in_training(train, llama_stages):
    "The first pattern that fits counts, and PEFT's config file has its keys sorted."
    options = dict(alpha=8, alpha_pattern={"up_proj": 2, r".*layers\.1.*": 32}, rank_pattern={"up_proj": 2, r".*layers\.1.*": 6})
    trained = wrap(load_emulator(llama_stages.emulator), lora_config(rank=4, **options))
    path = train(lora=lora_config(rank=4, **options))
    adapter, layers = read_adapter(path), load_adapter(load_emulator(llama_stages.emulator), path)
    for module in adapter.pairs:
        expected = trained.base_model.model.get_submodule(module).scaling["default"]
        assert adapter.scaling(module) == layers.base_model.model.get_submodule(module).scaling["default"] == expected, module


def test_training_lowers_the_loss(llama_stages, task, tokenizer, tmp_path):
    model = wrap(load_emulator(llama_stages.emulator))
    before = {n: p.clone() for n, p in model.named_parameters()}
    run = train_lora(model, task.train, training_args(tmp_path, steps=40, lr=1e-2, bf16=False, logging_steps=5), tokenizer=tokenizer)
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if "lora_" not in n)


def test_the_loss_is_on_the_completions(llama_stages, task, tokenizer, batch, tmp_path):
    "The Trainer's own loss on one batch is the mean over completion tokens of the whole logits."
    model = wrap(load_emulator(llama_stages.emulator))
    run = train_lora(model, task.train.select(range(6)), training_args(tmp_path, steps=1, lr=0.0, batch_size=6, bf16=False, logging_steps=1), tokenizer=tokenizer)
    with torch.no_grad(): logits = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert run.state.log_history[0]["loss"] == pytest.approx(float(expected), abs=2e-4)


def test_gradient_checkpointing_gives_the_same_gradients(stages, batch):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = wrap(load_emulator(stages.emulator, attn_implementation="eager")).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout): module.p = 0.0
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(**batch).loss
        loss.backward()
        gradients.append(torch.cat([loss.detach()[None], *(p.grad.flatten() for n, p in model.named_parameters() if "lora_B" in n)]))
    assert gradients[0][1:].abs().max() > 0
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_with_gradient_checkpointing_gives_the_same_adapter(reentrant, train, tmp_path):
    plain = train(out=tmp_path / "plain")
    saving = train(out=tmp_path / "saving", args={"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}})
    for name, tensor in load_file(plain / "adapter_model.safetensors").items():
        assert torch.allclose(tensor, load_file(saving / "adapter_model.safetensors")[name], atol=1e-4), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_short_rows_of_bfloat16_are_trained_with_attention_in_plain_products(bf16, checkpointing, train, monkeypatch):
    monkeypatch.setattr(arithmetic, "has_units", lambda dtype, kind="cpu": True)
    sdpa, plain = torch.nn.functional.scaled_dot_product_attention, []
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *args, **kwargs: plain.append(not torch.backends.cuda.flash_sdp_enabled()) or sdpa(*args, **kwargs))
    args = {"bf16": bf16, "gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    adapter = read_adapter(train(args=args))
    assert plain and set(plain) == {bf16} and torch.backends.cuda.flash_sdp_enabled()
    assert all(B.isfinite().all() and B.any() for _, B in adapter.pairs.values())


class StopAt(TrainerCallback):
    "Stops the training after a step; `seen` are the steps that were made."
    def __init__(self, step): self.step, self.seen = step, []
    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(state.global_step)
        if state.global_step == self.step: control.should_training_stop = True


def test_a_resumed_training_is_the_undisturbed_one(train, tmp_path):
    args, watch = {"steps": 6, "save_strategy": "steps", "save_steps": 3}, StopAt(6)
    straight = train(out=tmp_path / "straight", args={"steps": 6, "save_strategy": "no"})
    half = train(out=tmp_path / "half", args=args, callbacks=[StopAt(3)])
    resumed = train(out=tmp_path / "resumed", args=args, resume=True, callbacks=[watch])
    assert watch.seen == [4, 5, 6]
    straight, half, resumed = (load_file(p / "adapter_model.safetensors") for p in (straight, half, resumed))
    assert max(tiny.differs(straight[n], resumed[n]) for n in straight) < 1e-4 < max(tiny.differs(straight[n], half[n]) for n in straight)


def test_resuming_without_a_checkpoint_is_refused(train):
    with pytest.raises(EmlocError, match="no checkpoint"): train(resume=True)


def test_the_same_seed_gives_the_same_adapter(train, tmp_path):
    first, again, other = (load_file(train(out=tmp_path / str(i), args={"seed": s}) / "adapter_model.safetensors") for i, s in enumerate((1, 1, 2)))
    assert all(torch.equal(first[n], again[n]) for n in first) and not all(torch.equal(first[n], other[n]) for n in first)


def test_callbacks_are_called(train):
    watch = StopAt(2)
    train(callbacks=[watch])
    assert watch.seen == [1, 2]


def test_rows_are_evaluated_during_training(train, task):
    seen = []
    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs): seen.append(metrics["eval_loss"])
    train(callbacks=[Watch()], eval_dataset=task.validation, args={"eval_strategy": "steps", "eval_steps": 1})
    assert len(seen) == 3 and len(set(seen)) == 3


def test_the_adapter_says_where_it_belongs(llama_stages):
    adapter = read_adapter(llama_stages.raw)
    assert adapter.config.base_model_name_or_path == str(llama_stages.emulator)
    assert adapter.info["model"] == str(llama_stages.model) and adapter.info["model_fingerprint"] == Checkpoint(llama_stages.model).fingerprint()
    assert "correction" not in adapter.info


def test_a_loaded_adapter_is_the_trained_one(stages, tmp_path):
    trained = wrap(load_emulator(stages.emulator), lora_config(rank=4, alpha=8))
    torch.manual_seed(0)
    with torch.no_grad():
        for n, p in trained.named_parameters():
            if "lora_B" in n: p.normal_(std=0.1)
    trained.save_pretrained(tmp_path)
    expected = tiny.logits(trained)
    assert tiny.differs(tiny.logits(load_adapter(load_emulator(stages.emulator), tmp_path)), expected) < 1e-5
    assert tiny.differs(tiny.logits(load_emulator(stages.emulator)), expected) > 1e-2


def test_a_loaded_adapter_can_be_trained_on(llama_stages):
    frozen, open_ = (load_adapter(load_emulator(llama_stages.emulator), llama_stages.raw, trainable=t) for t in (False, True))
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(("lora_" in n) == p.requires_grad for n, p in open_.named_parameters())


def test_an_adapter_of_another_architecture_is_refused(make_stages):
    with pytest.raises(EmlocError, match="another model"): load_adapter(load_emulator(make_stages("llama").emulator), make_stages("gpt2").raw)


def test_an_adapter_of_another_size_is_refused(llama_stages):
    torch.manual_seed(0)
    wider = tiny.LlamaForCausalLM(tiny.LlamaConfig(**tiny.COMMON | {"intermediate_size": 64}))
    with pytest.raises(EmlocError, match="another model"): load_adapter(wider, llama_stages.raw)


def test_an_adapter_for_the_emulator_of_another_model_is_refused(llama_stages, other_model, task, tmp_path):
    emulator = build_emulator(other_model, task.train.select(range(12)), tmp_path / "emulator", ratio=0.5)
    with pytest.raises(EmlocError, match="another model"): load_adapter(load_emulator(emulator), llama_stages.raw)


def edited(source, folder, change):
    shutil.copytree(source, folder)
    change(folder)
    return folder


def without(part):
    def change(folder):
        file = folder / "adapter_model.safetensors"
        save_file({n: t for n, t in load_file(file).items() if part not in n}, file)
    return change


BROKEN = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), "adapter_config.json"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
    "cut weights": (lambda f: (f / "adapter_model.safetensors").write_bytes((f / "adapter_model.safetensors").read_bytes()[:-50]), "cannot be read"),
    "half a pair": (without("layers.1.mlp.up_proj.lora_B"), "layers.1.mlp.up_proj"),
    "no pairs": (without("lora"), "no LoRA pair"),
    "a broken config": (lambda f: (f / "adapter_config.json").write_text("{"), "adapter_config.json"),
}

@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_adapter_is_refused(case, llama_stages, tmp_path):
    change, message = BROKEN[case]
    with pytest.raises(EmlocError, match=message): read_adapter(edited(llama_stages.raw, tmp_path / "adapter", change))


def test_an_adapter_that_is_no_lora_is_refused(llama, tmp_path):
    get_peft_model(tiny.load(llama), IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(EmlocError, match="LoRA"): read_adapter(tmp_path)


def test_merging_into_the_emulator_is_refused(stages):
    model = load_adapter(load_emulator(stages.emulator), stages.raw)
    with pytest.raises(EmlocError, match="emloc merge"): model.merge_and_unload()
    with pytest.raises(EmlocError, match="emloc merge"): model.merge_adapter()


@pytest.mark.parametrize("what", ["no rows", "a model that is no emulator", "a target that matches nothing", "a place in use"])
def test_what_cannot_be_trained_writes_nothing(what, train, llama, task, tmp_path):
    options = {"no rows": {"rows": task.train.select([])}, "a model that is no emulator": {"emulator": llama},
               "a target that matches nothing": {"lora": lora_config(targets=["nothing"])}, "a place in use": {"out": tmp_path / "used"}}[what]
    if what == "a place in use": (tmp_path / "used").mkdir(), (tmp_path / "used" / "mine").touch()
    before = list(tmp_path.rglob("*"))
    with pytest.raises(EmlocError): train(**options)
    assert list(tmp_path.rglob("*")) == before


def test_trl_trains_the_emulator_unchanged(llama_stages, task, tmp_path):
    trl = pytest.importorskip("trl")
    lora = register_pairs(lora_config(rank=4, targets=["q_proj", "v_proj", "down_proj"]))
    args = trl.SFTConfig(output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none", use_cpu=True, bf16=False)
    run = trl.SFTTrainer(load_emulator(llama_stages.emulator), args=args, train_dataset=task.train, processing_class=tiny.tokenizer(), peft_config=lora)
    run.train()
    assert isinstance(run.model, PeftModel) and adapted(run.model) == {f"{l}.{n}" for l in LAYERS for n in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")}
    assert run.state.global_step == 2
    assert all(p.abs().max() > 0 for n, p in run.model.named_parameters() if "lora_B" in n)


def test_what_trl_trained_loads_again(llama_stages, task, tmp_path):
    trl = pytest.importorskip("trl")
    args = trl.SFTConfig(output_dir=str(tmp_path / "runs"), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-2, report_to="none", use_cpu=True, bf16=False)
    run = trl.SFTTrainer(wrap(load_emulator(llama_stages.emulator)), args=args, train_dataset=task.train, processing_class=tiny.tokenizer())
    run.train()
    run.save_model(str(tmp_path / "adapter"))
    assert tiny.differs(tiny.logits(load_adapter(load_emulator(llama_stages.emulator), tmp_path / "adapter")), tiny.logits(run.model)) < 1e-4


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_dropout": 0.5}])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["llama", "llama, quantized"])
def test_a_layer_and_its_lora_together_are_what_peft_computes(options, autocast, kind, make_stages):
    from emloc.pairlora import LoraLinear, LowRankLora
    torch.manual_seed(0)
    model = wrap(load_emulator(make_stages(kind).emulator), lora_config(rank=3, alpha=6, **options))
    layers = [m for m in model.modules() if isinstance(m, LowRankLora)]
    for layer in layers: torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    for layer in layers[:7]:
        A, B, x = layer.lora_A["default"].weight, layer.lora_B["default"].weight, torch.randn(2, 5, layer.in_features, requires_grad=True)
        found = []
        for forward in (layer, lambda x: LoraLinear.forward(layer, x)):
            torch.manual_seed(1)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast): y = forward(x)
            found.append((y.float(), *torch.autograd.grad(y.float().sin().sum(), (x, A, B))))
        for ours, theirs in zip(*found): assert tiny.differs(ours, theirs) < (0.03 if autocast else 1e-5) * max(1, float(theirs.abs().max()))


def test_training_on_a_cpu_hands_memory_back_now_and_then(llama_stages, task, tmp_path, monkeypatch):
    from emloc import finetune
    if torch.cuda.is_available(): pytest.skip("on a GPU there is nothing to hand back")
    calls, model = [], wrap(load_emulator(llama_stages.emulator))
    monkeypatch.setattr(finetune, "give_back", lambda: calls.append(1))
    train_lora(model, task.train, training_args(tmp_path, steps=2, bf16=False, save_strategy="no", disable_tqdm=True), tokenizer=tiny.tokenizer())
    assert len(calls) == 2 * 2 # steps, forward and backward; three blocks are one group
    model(input_ids=torch.arange(6, 12)[None])
    assert len(calls) == 4
    monkeypatch.setattr(finetune, "APART", (2, 1))
    train_lora(model, task.train, training_args(tmp_path, steps=1, bf16=False, save_strategy="no", disable_tqdm=True), tokenizer=tiny.tokenizer())
    assert len(calls) == 4 + 2 * 2 # after the first and the last block
