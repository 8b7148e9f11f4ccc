"""Weights in few bits: levels, bytes, mixed inputs, rounding in the metric of the inputs, and emulators made of them."""
import json
import math
from unittest import mock

import pytest
import tiny
import torch

import emloc.emulator
from emloc.data import EmlocError
from emloc.emulator import build_emulator
from emloc.lowrank import emulator_config, emulator_weight, load_emulator
from emloc.model import Checkpoint, Conv1D, block_linears, skeleton
from emloc.packed import PER_BYTE, QuantizedLinear, gaussian_levels, layout, look_up, meanings, overhead, pack_numbers, restored, rotate, rotation
from emloc.plan import plan_memory
from emloc.rounding import quantize
from emloc.spectrum import Gram


@pytest.mark.parametrize("levels, largest, error", [(2, 0.7979, 0.3634), (3, 1.224, 0.1902), (4, 1.510, 0.1175), (6, 1.894, 0.05798), (16, 2.733, 0.009497)])
def test_levels_are_those_of_max_1960(levels, largest, error):
    book = gaussian_levels(levels).double()
    assert float(book[-1]) == pytest.approx(largest, rel=4e-3) and torch.allclose(book, -book.flip(0))
    x = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    off = (book[torch.bucketize(x, (book[1:] + book[:-1]) / 2)] - x).square() * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    assert float(off.sum() * (x[1] - x[0])) == pytest.approx(error, rel=2e-3)


@pytest.mark.parametrize("levels", sorted(PER_BYTE))
@pytest.mark.parametrize("n", [1, 7, 64, 101])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_numbers_come_back_from_their_bytes(levels, n, dtype):
    numbers = torch.randint(levels, (n,), generator=torch.Generator().manual_seed(n))
    codes = pack_numbers(numbers, levels)
    assert codes.dtype == torch.uint8 and codes.shape == (-(-n // PER_BYTE[levels]),)
    into = torch.empty(len(codes) * PER_BYTE[levels], dtype=dtype)
    look_up(codes, meanings(torch.arange(levels, dtype=dtype)), into)
    assert torch.equal(into[:n].long(), numbers)


def test_numbers_that_are_packed_in_pieces_give_the_same_bytes(monkeypatch):
    numbers = torch.randint(3, (1001,), generator=torch.Generator().manual_seed(0))
    at_once = pack_numbers(numbers, 3)
    monkeypatch.setattr("emloc.packed.PIECE", 16)
    assert torch.equal(pack_numbers(numbers, 3), at_once)


@pytest.mark.parametrize("shape", [(5, 30), (7, 101), (192, 50), (33, 200), (64, 24)])
@pytest.mark.parametrize("bits", [2.5, 3.3, 4.7, 7.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_made_of_the_levels_scales_and_order_that_were_put_into_it(shape, bits, dtype):
    (out, in_), seed = shape, torch.Generator().manual_seed(3)
    parts = layout(shape, bits + overhead(shape) - 0.6)
    numbers = torch.cat([torch.randint(levels, (out, columns), generator=seed) for columns, levels in parts], 1)
    order, scales = torch.randperm(in_, generator=seed), (torch.rand(out, generator=seed) + 0.01).bfloat16().float()
    levels = torch.cat([gaussian_levels(k)[part] for (_, k), part in zip(parts, numbers.split([c for c, _ in parts], 1))], 1)
    truth = torch.empty(shape)
    truth[:, order] = levels * scales[:, None]
    mixed = QuantizedLinear(in_, out, parts).put(order, numbers, scales)
    assert torch.allclose(mixed.dense(dtype).float(), rotate(truth.T).T, atol=1e-5 if dtype == torch.float32 else 3e-2)
    x = torch.randn(9, in_, generator=seed).to(dtype)
    assert torch.allclose(mixed.onward(x).float(), x.float() @ mixed.dense(dtype).float().T, atol=1e-3 if dtype == torch.float32 else 0.1, rtol=0 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("columns, size", [(576, 64), (1536, 64), (64, 64), (48, 16), (100, 4), (33, 1), (150, 1)])
def test_mixing_inputs_is_its_own_inverse_and_exact_in_bfloat16(columns, size):
    assert rotation(columns) == size
    Q = rotate(torch.eye(columns))
    assert torch.equal(Q, Q.T) and torch.allclose(Q @ Q, torch.eye(columns), atol=1e-6)
    assert torch.equal(rotate(torch.eye(columns).bfloat16()).float(), Q)
    assert all(int(row.count_nonzero()) == size for row in Q)


def test_mixed_inputs_keep_both_ways_where_one_is_massive():
    seed = torch.Generator().manual_seed(4)
    W, x, g = torch.randn(64, 192, generator=seed), torch.randn(500, 192, generator=seed), torch.randn(300, 64, generator=seed)
    x[:, 7] *= 1000
    x += 3e-3 * x[:, 7:8] * torch.rand(192, generator=seed) # which the others know of
    for kinds in ({}, {"gradients": Gram(64).add(g)}):
        found = {}
        for size in (64, 1):
            with mock.patch("emloc.packed.rotation", lambda columns: size): found[size] = quantize(W, Gram(192).add(x), 1.6, **kinds)[0].dense()
        assert on_the_way_back(W, found[64], g) < 0.8 * on_the_way_back(W, found[1], g) and output_error(W, found[64], x) < 0.5 * output_error(W, found[1], x)


@pytest.mark.parametrize("shape", [(576, 576), (192, 576), (1536, 576), (576, 1536), (100, 90), (32, 50)])
@pytest.mark.parametrize("bits", [1.9, 2.5, 4.0, 6.0, 8.0])
def test_a_layer_takes_the_bits_asked_for_and_not_more(shape, bits):
    out, in_ = shape
    layer = QuantizedLinear(in_, out, layout(shape, bits))
    taken = 8 * sum(p.numel() * p.element_size() for n, p in layer.named_parameters() if not n.endswith("book")) / (out * in_)
    slack = 24 / in_ * 4 + 2 * 8 / in_ # whole steps of 24 columns, at most 4 bits apart, and bytes that are not full
    assert bits - slack < taken <= bits + 2 * 8 / in_
    assert [p.shape for p in restored(layer.state_dict()).parameters()] == [p.shape for p in layer.parameters()]


@pytest.mark.parametrize("bits", [0.5, 1.0, 12.0])
def test_bits_that_cannot_be_are_refused_with_those_that_can(bits):
    with pytest.raises(EmlocError, match="between 1.* and 8.* are possible"): layout((576, 576), bits)


@pytest.fixture
def seen():
    "A weight, and inputs of few directions with some loud columns."
    seed = torch.Generator().manual_seed(0)
    x = torch.randn(400, 20, generator=seed) @ torch.randn(20, 150, generator=seed) + 0.3 * torch.randn(400, 150, generator=seed)
    x[:, 5] *= 10
    return torch.randn(70, 150, generator=seed), x


def output_error(W, other, x): return float(((x @ (W - other).T).square().sum() / (x @ W.T).square().sum()).sqrt())


@pytest.mark.parametrize("bits", [1.6, 2.0, 3.1, 4.0])
def test_rounding_in_the_metric_of_the_inputs_beats_the_nearest_levels(bits, seen):
    W, x = seen
    layer, error = quantize(W, Gram(150).add(x), bits)
    nearest, _ = quantize(W, Gram(150), bits)
    assert error == pytest.approx(output_error(W, layer.dense(), x), rel=1e-2)
    assert error < 0.6 * output_error(W, nearest.dense(), x)


@pytest.fixture
def heard():
    "Output gradients of few directions, and rows of W whose output nothing hears."
    seed = torch.Generator().manual_seed(1)
    g = torch.randn(300, 12, generator=seed) @ torch.randn(12, 70, generator=seed) + 0.1 * torch.randn(300, 70, generator=seed)
    g[:, 20:40] = 0
    return g


def in_the_loss(W, other, x, g):
    "tr(L Δ G Δᵀ) from rows of inputs and of gradients, relative to that of W."
    return float((g @ (W - other) @ x.T).square().sum() / (g @ W @ x.T).square().sum()) ** 0.5


def on_the_way_back(W, other, g): return float(((g @ (W - other)).square().sum() / (g @ W).square().sum()).sqrt())


@pytest.mark.parametrize("bits", [1.6, 3.1])
def test_rounding_in_the_metric_of_both_sides_keeps_the_loss_and_the_way_back(bits, seen, heard):
    W, x = seen
    gram, gradients = Gram(150).add(x), Gram(70).add(heard)
    layer, error = quantize(W, gram, bits, gradients=gradients)
    deaf = quantize(W, gram, bits)[0].dense()
    assert error == pytest.approx(in_the_loss(W, layer.dense(), x, heard), rel=2e-2)
    assert error < 0.75 * in_the_loss(W, deaf, x, heard)
    assert on_the_way_back(W, layer.dense(), heard) < 0.8 * on_the_way_back(W, deaf, heard)
    assert output_error(W, layer.dense(), x) < 1.5 * output_error(W, deaf, x) # what nothing hears is not given up


def test_where_nothing_is_heard_only_the_inputs_count(seen):
    W, x = seen
    both, one = quantize(W, Gram(150).add(x), 2.0, gradients=Gram(70))[0], quantize(W, Gram(150).add(x), 2.0)[0]
    assert torch.equal(both.dense(), one.dense())


def test_many_bits_are_nearly_the_weight(seen):
    W, x = seen
    layer, error = quantize(W, Gram(150).add(x), 8.33)
    assert error < 0.01
    assert torch.allclose(layer(x), x @ layer.dense().T, atol=1e-3)


def test_the_gradient_is_that_of_the_dense_layer_also_under_autocast(seen):
    W, x = seen
    layer, same = quantize(W, Gram(150).add(x), 3.0)[0], torch.nn.Linear(150, 70, bias=False)
    same.weight.data = layer.dense()
    for kind in (torch.float32, torch.bfloat16):
        grads = []
        for module in (layer, same):
            own = x.clone().requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == torch.bfloat16): y = module(own)
            assert y.dtype == kind
            y.float().square().sum().backward()
            grads.append(own.grad)
        assert float((grads[0] - grads[1]).norm() / grads[1].norm()) < (1e-4 if kind == torch.float32 else 3e-2)


def test_columns_that_no_input_reaches_and_weights_of_zero_do_no_harm(seen):
    W, x = seen
    x[:, 10:40] = 0
    layer, error = quantize(W, Gram(150).add(x), 2.0)
    assert math.isfinite(error) and torch.isfinite(layer.dense()).all()
    layer, error = quantize(torch.zeros(70, 150), Gram(150).add(x), 2.0)
    assert float(layer.dense().abs().max()) < 1e-20


@pytest.mark.parametrize("where", ["weight", "inputs", "gradients"])
def test_what_is_not_finite_is_named(where, seen, heard):
    W, x = seen
    {"weight": W, "inputs": x, "gradients": heard}[where][3, 3] = float("nan")
    with pytest.raises(EmlocError, match=f"up_proj.*{where}.*NaN"): quantize(W, Gram(150).add(x), 2.0, "up_proj", gradients=Gram(70).add(heard))


@pytest.fixture
def rows(task): return task.train.select(range(16))


def test_an_emulator_is_made_of_the_rounded_weights_and_as_small_as_asked_for(model, rows, tmp_path):
    path = build_emulator(model, rows, tmp_path / "emulator", ratio=0.2, form="quantized")
    emulator, whole, own = load_emulator(path), Checkpoint(model), Checkpoint(path)
    linears = block_linears(skeleton(whole))
    assert emulator_config(path).bits == dict.fromkeys(linears, 6.4) and not emulator_config(path).ranks
    for name, linear in linears.items():
        W, rounded = whole.read(f"{name}.weight"), emulator.get_submodule(name).dense()
        assert torch.equal(rounded, emulator_weight(own, name))
        W = W.T if isinstance(linear, Conv1D) else W
        assert 0 < float((rounded - W).norm() / W.norm()) < 0.3, name
        bias = getattr(emulator.get_submodule(name), "bias", None)
        if bias is not None: assert torch.equal(bias, whole.read(f"{name}.bias"))
    assert tiny.differs(tiny.logits(emulator), tiny.logits(tiny.load(model))) > 0


def test_in_the_fisher_metric_every_weight_is_rounded_for_its_gradients_too(model, rows, tmp_path):
    plain, fisher = (build_emulator(model, rows, tmp_path / metric, ratio=0.1, form="quantized", metric=metric) for metric in ("activation", "fisher"))
    assert emulator_config(fisher).metric == "fisher" and emulator_config(fisher).bits == emulator_config(plain).bits
    differ = [not torch.equal(emulator_weight(Checkpoint(plain), name), emulator_weight(Checkpoint(fisher), name)) for name in emulator_config(plain).bits]
    assert all(differ)
    assert tiny.differs(tiny.logits(load_emulator(fisher)), tiny.logits(tiny.load(model))) > 0


def test_more_bits_are_more_like_the_model(llama, rows, tmp_path):
    whole = tiny.logits(tiny.load(llama))
    distance = lambda ratio: float((tiny.logits(load_emulator(build_emulator(llama, rows, tmp_path / str(ratio), ratio=ratio, form="quantized"))) - whole).norm())
    assert distance(0.08) > 2 * distance(0.25) > 0


@pytest.mark.parametrize("ratio, most", [(0.9, 10), (1, None)])
def test_more_than_eight_bits_are_never_needed_and_ratio_one_changes_nothing(ratio, most, llama, rows, tmp_path):
    path = build_emulator(llama, rows, tmp_path / "emulator", ratio=ratio, form="quantized")
    assert all(8 < bits < most for bits in emulator_config(path).bits.values())
    assert tiny.differs(tiny.logits(load_emulator(path)), tiny.logits(tiny.load(llama))) < (0.5 if most else 1e-9)


def test_a_cast_and_another_save_keep_the_bytes(make_stages, tmp_path):
    path = make_stages("llama, quantized").emulator
    half = load_emulator(path, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "again")
    for name in emulator_config(path).bits: assert torch.equal(half.get_submodule(name).dense(), emulator_weight(Checkpoint(tmp_path / "again"), name))


def test_an_emulator_that_is_packed_in_another_way_is_refused(llama, rows, tmp_path):
    path = build_emulator(llama, rows, tmp_path / "emulator", ratio=0.2, form="quantized")
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]["packing"]
    (path / "config.json").write_text(json.dumps(config))
    for use in (load_emulator, emulator_config):
        with pytest.raises(EmlocError, match="another version of emloc"): use(path)


@pytest.mark.parametrize("metric", ["activation", "fisher"])
def test_an_interrupted_run_goes_on_to_the_same_bytes(metric, llama, rows, tmp_path, monkeypatch):
    options = {"ratio": 0.15, "form": "quantized", "metric": metric}
    undisturbed = tiny.contents(build_emulator(llama, rows, tmp_path / "undisturbed", **options))
    real = emloc.emulator.build_block
    def stop(step, *more):
        if step.index == 1: raise KeyboardInterrupt
        return real(step, *more)
    monkeypatch.setattr(emloc.emulator, "build_block", stop)
    with pytest.raises(KeyboardInterrupt): build_emulator(llama, rows, tmp_path / "emulator", **options)
    monkeypatch.undo()
    assert tiny.contents(build_emulator(llama, rows, tmp_path / "emulator", **options)) == undisturbed


@pytest.mark.parametrize("options, message", [
    (dict(ranks={"model.layers.0.mlp.up_proj": 3}), "ranks"), ({}, "ratio"), (dict(ratio=0.03), "between"),
    (dict(ratio=0), "ratio 0")])
def test_what_a_quantized_emulator_cannot_be_leaves_nothing(options, message, llama, rows, tmp_path):
    with pytest.raises(EmlocError, match=message): build_emulator(llama, rows, tmp_path / "emulator", form="quantized", **options)
    assert not list(tmp_path.iterdir())


def test_an_unknown_form_is_refused(llama, rows, tmp_path):
    with pytest.raises(EmlocError, match="lowrank, quantized"): build_emulator(llama, rows, tmp_path / "emulator", form="packed", ratio=0.2)


def test_levels_that_a_plan_asks_for_first_are_real(llama):
    gaussian_levels.cache_clear()
    plan_memory(llama, ratio=0.15, batch_size=2, seq_len=8, form="quantized")
    assert all(type(gaussian_levels(k)) is torch.Tensor for k in PER_BYTE)


@pytest.mark.parametrize("shape", [(70, 150), (130, 64), (33, 200)])
def test_tiles_of_a_wave_do_not_wait_for_each_other(shape, monkeypatch):
    seed = torch.Generator().manual_seed(2)
    out, in_ = shape
    W, x, g = torch.randn(out, in_, generator=seed), torch.randn(500, in_, generator=seed), torch.randn(300, out, generator=seed)
    x, g = x + 2 * x[:, :1], g + 2 * g[:, :1]
    options = {"gradients": Gram(out).add(g)}
    at_once = quantize(W, Gram(in_).add(x), 2.0, **options)
    monkeypatch.setattr("emloc.rounding.waves", lambda groups, turns: ([(group, turn)] for turn in range(turns) for group in range(groups)))
    one_by_one = quantize(W, Gram(in_).add(x), 2.0, **options)
    assert at_once[1] == one_by_one[1] and torch.equal(at_once[0].dense(), one_by_one[0].dense())
