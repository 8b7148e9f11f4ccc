"Products in float32 where the processor has no instructions for a dtype: here it is made to believe that, wherever the tests run."
import copy

import pytest
import tiny
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from emloc import arithmetic, finetune
from emloc.model import linears
from emloc.pairlora import wrap

BF16 = torch.bfloat16


@pytest.fixture
def no_units(monkeypatch):
    monkeypatch.setattr(arithmetic, "has_units", lambda dtype, kind="cpu": dtype not in (BF16, torch.float16))


def off(found, exact): return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
@pytest.mark.parametrize("piece", [1, 100, 2 ** 20])
def test_product_and_its_gradient(no_units, monkeypatch, dtype, piece):
    monkeypatch.setattr(arithmetic, "PIECE", piece)
    torch.manual_seed(0)
    x, W, b, toward = (torch.randn(*shape).to(dtype) for shape in ((3, 5, 24), (40, 24), (40,), (3, 5, 40)))
    x.requires_grad_()
    y = arithmetic.product(x, W, b)
    exact = x.double() @ W.double().T + b.double()
    assert y.dtype == dtype and off(y, exact) < 0.005
    assert off(torch.autograd.grad(y, x, toward)[0], toward.double() @ W.double()) < 0.005


def test_a_weight_that_is_trained_gets_its_gradient(no_units):
    x, W = torch.randn(4, 8, dtype=BF16), torch.randn(6, 8, dtype=BF16, requires_grad=True)
    arithmetic.product(x, W).sum().backward()
    assert torch.allclose(W.grad.float(), x.sum(0).float().expand(6, 8), rtol=0.05, atol=0.05)


def test_a_weight_that_could_be_trained_is_quick_where_no_gradient_is_kept(no_units, monkeypatch):
    calls, W = [], torch.randn(6, 8, dtype=BF16, requires_grad=True)
    monkeypatch.setattr(arithmetic, "in_float32", lambda weight: calls.append(1) or weight.float())
    with torch.no_grad(): arithmetic.product(torch.randn(4, 8, dtype=BF16), W)
    assert calls


@pytest.mark.parametrize("family", tiny.BUILD)
def test_models_say_the_same(no_units, tmp_path, family):
    path = tiny.save_model(family, tmp_path / "model", dtype=BF16)
    ids = torch.arange(6, 26)[None]
    exact = tiny.load(path, dtype=torch.float64)(input_ids=ids).logits
    plain, ours = tiny.load(path, dtype=BF16).requires_grad_(False), arithmetic.load_whole(path).eval().requires_grad_(False)
    own = [m for m in ours.modules() if "forward" in vars(m)]
    assert len(own) == len(linears(ours)) and all(type(m) in (nn.Linear, Conv1D) for m in own)
    assert off(ours(input_ids=ids).logits, exact) < 1.2 * off(plain(input_ids=ids).logits, exact) + 1e-3
    assert tiny.differs(copy.deepcopy(ours)(input_ids=ids).logits, ours(input_ids=ids).logits) == 0
    ours.save_pretrained(tmp_path / "again")
    assert tiny.differs(tiny.load(tmp_path / "again", dtype=BF16)(input_ids=ids).logits, plain(input_ids=ids).logits) == 0


def test_lora_learns_on_it(no_units, tmp_path):
    path, ids = tiny.save_model("llama", tmp_path / "model", dtype=BF16), torch.arange(6, 26)[None]
    def gradients(model):
        torch.manual_seed(0)
        model = wrap(model)
        for n, p in model.named_parameters():
            if "lora_B" in n: p.data.normal_(std=0.1)
        model(input_ids=ids, labels=ids).loss.backward()
        return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.requires_grad])
    exact, plain, ours = (gradients(m) for m in (tiny.load(path, dtype=torch.float32), tiny.load(path, dtype=BF16), arithmetic.load_whole(path)))
    assert off(ours, exact) < 1.2 * off(plain, exact)


def test_plans_do_not_depend_on_the_processor(no_units):
    x = torch.ones(2, dtype=BF16)
    assert arithmetic.working_dtype(x) == torch.float32
    with arithmetic.any_machine(): assert arithmetic.working_dtype(x) == BF16


def test_autocast_is_asked_for_only_where_it_pays(monkeypatch, tmp_path):
    if torch.cuda.is_available(): pytest.skip("a GPU decides for itself")
    for able in (True, False):
        monkeypatch.setattr(finetune, "has_units", lambda dtype: able)
        assert finetune.training_args(tmp_path).bf16 == able


def test_autocast_that_is_asked_for_is_obeyed(no_units):
    layer = arithmetic.quicken(nn.Linear(8, 4, dtype=BF16))
    with torch.autocast("cpu", dtype=BF16): assert layer(torch.randn(3, 8)).dtype == BF16


def attention(dtype, tokens=20):
    "Loss gradients of padded, causal attention with fewer heads of keys than of queries, and which way of computing it was allowed."
    q, k, v = (t.to(dtype).requires_grad_() for t in torch.randn(3, 2, 4, tokens, 16, generator=torch.Generator().manual_seed(0)))
    mask = torch.ones(2, 1, tokens, tokens, dtype=torch.bool).tril()
    mask[0, :, :, :3] = False
    mask |= torch.eye(tokens, dtype=torch.bool)
    torch.nn.functional.scaled_dot_product_attention(q, k[:, :2], v[:, :2], attn_mask=mask, enable_gqa=True).square().sum().backward()
    return torch.cat([t.grad.flatten().double() for t in (q, k, v)]), torch.backends.cuda.flash_sdp_enabled()


def test_attention_of_short_rows_has_the_same_gradients(monkeypatch):
    monkeypatch.setattr(arithmetic, "has_units", lambda dtype, kind="cpu": True)
    exact, plain = attention(torch.float64)[0], attention(BF16)[0]
    with arithmetic.short_attention(20, torch.device("cpu"), BF16): ours, flash = attention(BF16)
    assert not flash and off(ours, exact) < 2 * off(plain, exact) + 1e-3


@pytest.mark.parametrize("tokens, device, dtype, able", [(arithmetic.SHORT + 1, "cpu", BF16, True), (20, "cuda", BF16, True), (20, "cpu", torch.float32, True), (20, "cpu", BF16, False)])
def test_all_other_attention_is_as_torch_does_it(monkeypatch, tokens, device, dtype, able):
    monkeypatch.setattr(arithmetic, "has_units", lambda dtype, kind="cpu": able)
    with arithmetic.short_attention(tokens, torch.device(device), dtype): assert torch.backends.cuda.flash_sdp_enabled()


def test_attention_is_as_it_was_afterwards(monkeypatch):
    monkeypatch.setattr(arithmetic, "has_units", lambda dtype, kind="cpu": True)
    state = lambda: (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled(), torch.backends.cuda.math_sdp_enabled(), torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed())
    before = state()
    with pytest.raises(KeyError), arithmetic.short_attention(20, torch.device("cpu"), BF16):
        assert state() != before
        raise KeyError
    assert state() == before
