"""The Fisher metric: the factors are the best ones for tr(L Δ G Δᵀ), the moments are autograd's, and an emulator made so restarts anywhere."""
import pytest
import tiny
import torch

import emloc.emulator
from emloc.backward import loss_gradient
from emloc.data import EmlocError, encode_rows, load_tokenizer
from emloc.emulator import build_emulator
from emloc.fisher import Gradients, decompose_fisher, fisher_root, output_gradients
from emloc.lowrank import emulator_config, load_emulator
from emloc.model import Checkpoint, block_linears, block_names, dense_weight, skeleton
from emloc.spectrum import Gram, decompose, truncate
from emloc.walk import Walk


def grams(in_, out, seed=0):
    "Second moments of inputs and of output gradients, from rows of very different directions."
    make = torch.Generator().manual_seed(seed)
    rows = lambda n: torch.randn(200, n, generator=make) @ torch.diag(torch.logspace(0, -3, n)) @ torch.randn(n, n, generator=make)
    return Gram(in_).add(rows(in_)), Gram(out).add(1e-6 * rows(out))


def lost(error, L, G): return float(((L.double() @ error.double() @ G.double()) * error.double()).sum())


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
def test_no_factors_of_this_rank_lose_less(shape):
    weight, (gram, gradients) = torch.randn(shape, generator=torch.Generator().manual_seed(1)), grams(shape[1], shape[0])
    H = fisher_root(gradients).double()
    values, vectors = torch.linalg.eigh(gram.matrix.double())
    whitened = torch.linalg.svdvals(H.T @ weight.double() @ (vectors * values.clamp_min(0).sqrt()))
    for rank in (1, 5, 12):
        U, V = truncate(decompose_fisher(weight, gram, gradients, rank=rank), rank)
        assert lost(weight - U @ V, H @ H.T, gram.matrix) == pytest.approx(float((whitened[rank:] ** 2).sum()), rel=1e-3)
        plain = torch.matmul(*truncate(decompose(weight, gram, rank=rank), rank))
        assert lost(weight - U @ V, H @ H.T, gram.matrix) < lost(weight - plain, H @ H.T, gram.matrix)


@pytest.mark.parametrize("metric", ["activation", "fisher"])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_second_moments_of_the_smaller_side_give_the_same_factors(shape, metric):
    weight, (gram, gradients) = torch.randn(shape), grams(shape[1], shape[0])
    near, heard = Gram(24), Gradients(24)
    if shape[0] < shape[1]: near.matrix, heard.matrix = weight @ gram.matrix @ weight.T, gradients.matrix
    else: near, heard.matrix = gram, weight.T @ gradients.matrix @ weight
    heard.trace = gradients.matrix.trace().reshape(1)
    way = (lambda *seen: decompose_fisher(weight, *seen)) if metric == "fisher" else (lambda seen, _: decompose(weight, seen))
    one, other = way(gram, gradients), way(near, heard)
    assert torch.allclose(one.sigma, other.sigma, rtol=1e-3, atol=1e-3 * float(one.sigma[0]))
    a, b = (torch.matmul(*truncate(s, 6)) for s in (one, other))
    assert torch.allclose(a, b, atol=1e-2)


def test_loud_outputs_to_which_the_loss_is_deaf_cost_nothing():
    make = torch.Generator().manual_seed(0)
    weight, x, g = torch.randn(24, 40, generator=make), torch.randn(400, 40, generator=make), torch.randn(400, 24, generator=make) * torch.logspace(0, -2, 24)
    x[7] *= 1e3
    loud = x[7] @ weight.T / (x[7] @ weight.T).norm()
    g = g - torch.outer(g @ loud, loud)
    gram, outputs, gradients = Gram(40, torch.float64).add(x), Gram(24).add(x @ weight.T), Gram(24).add(g)
    best, found = (torch.matmul(*truncate(decompose_fisher(weight, seen, gradients, rank=8), 8)).float() for seen in (gram, outputs))
    H = fisher_root(gradients)
    assert lost(weight - found, H @ H.T, gram.matrix) < 1.001 * lost(weight - best, H @ H.T, gram.matrix)


def test_what_is_not_finite_is_named():
    gram, gradients = grams(24, 40)
    for which in ("weight", "output gradients"):
        weight, bad = torch.randn(40, 24), Gradients(24)
        if which == "weight": weight[3, 5] = torch.nan
        else: bad.matrix = torch.full((24, 24), torch.inf)
        with pytest.raises(EmlocError, match=f"gate_proj.*{which}"): decompose_fisher(weight, gram, bad, "gate_proj")


def test_all_directions_are_the_weight_and_scale_does_not_matter():
    weight, (gram, gradients) = torch.randn(24, 40), grams(40, 24)
    s = decompose_fisher(weight, gram, gradients)
    assert torch.allclose(s.left @ s.right, weight, atol=1e-4)
    louder = Gram(24)
    louder.matrix = 1e8 * gradients.matrix
    a, b = (torch.matmul(*truncate(decompose_fisher(weight, gram, g, rank=8), 8)) for g in (gradients, louder))
    assert torch.allclose(a, b, atol=1e-4)


def test_gradients_that_say_nothing_leave_the_activation_aware_factors():
    weight, (gram, _) = torch.randn(24, 40), grams(40, 24)
    a, b = (torch.matmul(*truncate(s, 8)) for s in (decompose_fisher(weight, gram, Gram(24), rank=8), decompose(weight, gram, rank=8)))
    assert torch.allclose(a, b, atol=1e-4)


def test_the_moments_are_those_of_autograd(model, task):
    rows = encode_rows(task.train.select(range(6)), load_tokenizer(model))
    walk, inputs = Walk(model, rows, batch_size=6), []
    for step in walk:
        inputs.append(list(walk.hidden[0]))
        step.run()
    loss, gradients = loss_gradient(walk)
    found = {}
    for index in reversed(range(len(walk))):
        with walk.block(index) as step: found |= output_gradients(step, inputs[index], gradients)
    whole, seen = tiny.load(model), {}
    def hook(name):
        def collect(gradient):
            rows = gradient.reshape(-1, gradient.shape[-1])
            seen[name] = rows.T @ rows
        def watch(module, args, output): output.register_hook(collect)
        return watch
    for name, linear in block_linears(whole).items(): linear.register_forward_hook(hook(name))
    own = whole(**walk.batches[0]).loss
    own.backward()
    assert loss == pytest.approx(float(own), rel=1e-4)
    assert found.keys() == seen.keys()
    for name, linear in block_linears(whole).items():
        weight, exact = dense_weight(linear), seen[name]
        if len(weight) > weight.shape[1]: exact = weight.T @ exact @ weight # all that a tall weight needs
        assert torch.allclose(found[name].matrix, exact, rtol=1e-3, atol=1e-5 * float(exact.max())), name
        assert float(found[name].trace) == pytest.approx(float(seen[name].trace()), rel=1e-3)


def test_at_full_rank_the_emulator_is_the_model(model, task, tmp_path):
    shapes = {n: tuple(dense_weight(m).shape) for n, m in block_linears(skeleton(Checkpoint(model))).items()}
    emulator = build_emulator(model, task.calibration(16), tmp_path / "emulator", ranks={n: min(s) for n, s in shapes.items()}, metric="fisher")
    assert emulator_config(emulator).metric == "fisher"
    assert tiny.differs(tiny.logits(load_emulator(emulator)), tiny.logits(tiny.load(model))) < 5e-3


@pytest.mark.parametrize("at", [2, 1, 0])
def test_an_interrupted_run_goes_on_where_it_was(at, llama, task, tmp_path, monkeypatch):
    build = lambda out: build_emulator(llama, task.calibration(16), out, ratio=0.5, batch_size=5, metric="fisher")
    undisturbed, real, built = tiny.contents(build(tmp_path / "undisturbed")), emloc.emulator.build_block, []
    def build_block(step, *more):
        if step.index == at and not built: raise KeyboardInterrupt
        return real(step, *more)
    monkeypatch.setattr(emloc.emulator, "build_block", build_block)
    with pytest.raises(KeyboardInterrupt): build(tmp_path / "emulator")
    assert not (tmp_path / "emulator").exists()
    def count(step, *more):
        built.append(step.index)
        return real(step, *more)
    monkeypatch.setattr(emloc.emulator, "build_block", count)
    assert tiny.contents(build(tmp_path / "emulator")) == undisturbed
    assert built == list(reversed(range(at + 1)))


def test_another_metric_is_refused(llama, task, tmp_path):
    with pytest.raises(EmlocError, match="activation, fisher"): build_emulator(llama, task.calibration(16), tmp_path / "out", ratio=0.5, metric="hessian")
    assert list(tmp_path.iterdir()) == []
