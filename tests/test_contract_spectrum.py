"""The spectrum of a weight on its inputs, against the exact singular values in float64."""
import pytest
import torch

from emloc.data import EmlocError
from emloc.spectrum import Gram, Spectrum, decompose, truncate

SHAPES = {"out < in": (6, 10), "square": (8, 8), "out > in": (12, 7)}


@pytest.fixture(params=SHAPES)
def shape(request): return SHAPES[request.param]


@pytest.fixture(params=["full rank", "rank deficient"])
def problem(request, shape):
    "A weight and inputs; the rank-deficient inputs span three directions only."
    torch.manual_seed(0)
    out, in_ = shape
    weight, x = torch.randn(out, in_).double(), torch.randn(50, in_).double()
    if request.param == "rank deficient": x = torch.randn(50, 3).double() @ torch.randn(3, in_).double()
    return weight, x, Gram(in_, dtype=torch.float64).add(x)


def energies(weight, x): # Σσ² of all directions, exactly
    sigma = torch.linalg.svdvals(x @ weight.T)
    return sigma ** 2


def test_sigma_is_that_of_the_exact_svd(problem):
    weight, x, gram = problem
    exact, k = energies(weight, x).sqrt(), min(weight.shape)
    # the damping of the Gram matrix (1e-6 of its energy) is 1e-3 of a singular value
    assert torch.allclose(decompose(weight, gram).sigma, exact[:k], atol=2e-3 * float(exact[0]), rtol=1e-6)


def test_full_rank_sigma_is_exact(shape):
    torch.manual_seed(1)
    weight, x = torch.randn(*shape).double(), torch.randn(50, shape[1]).double()
    found = decompose(weight, Gram(shape[1], dtype=torch.float64).add(x)).sigma
    assert torch.allclose(found, energies(weight, x).sqrt()[:min(shape)], rtol=1e-8)


def test_the_weight_is_the_sum_of_its_directions(problem):
    weight, _, gram = problem
    spectrum = decompose(weight, gram)
    assert torch.allclose(spectrum.left @ spectrum.right, weight, atol=1e-9)


def test_every_truncation_leaves_the_tail_and_nothing_more(problem):
    weight, x, gram = problem
    exact, spectrum = energies(weight, x), decompose(weight, gram)
    for rank in range(1, min(weight.shape) + 1):
        U, V = truncate(spectrum, rank)
        left = float(((x @ (weight - U @ V).T) ** 2).sum())
        assert left == pytest.approx(float(exact[rank:].sum()), rel=1e-6, abs=2e-5 * float(exact.sum()))


def test_no_other_factors_of_the_rank_do_better(problem):
    weight, x, gram = problem
    U, V = truncate(decompose(weight, gram), 2)
    error = lambda U, V: float(((x @ (weight - U @ V).T) ** 2).sum())
    torch.manual_seed(2)
    for _ in range(20):
        assert error(U, V) <= error(U + 0.01 * torch.randn_like(U), V + 0.01 * torch.randn_like(V))


def test_the_plain_svd_is_worse_when_inputs_are_uneven(shape):
    torch.manual_seed(3)
    weight, x = torch.randn(*shape).double(), torch.randn(80, shape[1]).double() * torch.logspace(0, -3, shape[1]).double()
    U, V = truncate(decompose(weight, Gram(shape[1], dtype=torch.float64).add(x)), 2)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    error = lambda approximation: float(((x @ (weight - approximation).T) ** 2).sum())
    assert error(U @ V) < 0.9 * error(u[:, :2] * s[:2] @ v[:2])


def test_the_stated_error_is_the_relative_output_error(shape):
    torch.manual_seed(4)
    weight, x = torch.randn(*shape).double(), torch.randn(50, shape[1]).double()
    spectrum = decompose(weight, Gram(shape[1], dtype=torch.float64).add(x))
    U, V = truncate(spectrum, 3)
    assert spectrum.error(3) == pytest.approx(float((x @ (weight - U @ V).T).norm() / (x @ weight.T).norm()), rel=1e-6)
    assert spectrum.error(0) == 1 and spectrum.error(min(shape)) == 0


def test_float32_is_near_the_exact_answer(shape):
    torch.manual_seed(5)
    weight, x = torch.randn(*shape), torch.randn(200, shape[1])
    exact = energies(weight.double(), x.double()).sqrt()[:min(shape)]
    assert torch.allclose(decompose(weight, Gram(shape[1]).add(x)).sigma.double(), exact, rtol=1e-3)


def test_a_low_rank_weight_has_no_tail(shape):
    torch.manual_seed(6)
    weight = torch.randn(shape[0], 2).double() @ torch.randn(2, shape[1]).double()
    gram = Gram(shape[1], dtype=torch.float64).add(torch.randn(50, shape[1]).double())
    U, V = truncate(decompose(weight, gram), 2)
    assert torch.allclose(U @ V, weight, atol=1e-9)


def test_a_zero_gram_gives_finite_factors(shape):
    spectrum = decompose(torch.randn(*shape), Gram(shape[1]))
    assert torch.isfinite(spectrum.left).all() and torch.isfinite(spectrum.right).all() and spectrum.sigma.abs().max() < 1e-6


def test_the_gram_is_the_sum_of_outer_products():
    x = torch.randn(9, 4)
    assert torch.allclose(Gram(4).add(x).matrix, sum(torch.outer(row, row) for row in x), atol=1e-5)


def test_a_gram_adds_across_batches():
    x = torch.randn(30, 4).double()
    parts, whole = Gram(4, dtype=torch.float64), Gram(4, dtype=torch.float64).add(x)
    for part in x.split(7): parts.add(part)
    assert torch.allclose(parts.matrix, whole.matrix) and parts.count == whole.count == 30


def test_a_gram_takes_batches_of_sequences():
    x = torch.randn(2, 5, 4)
    assert torch.allclose(Gram(4).add(x).matrix, Gram(4).add(x.reshape(10, 4)).matrix)


def test_rows_added_after_a_decomposition_count():
    torch.manual_seed(7)
    weight, x, gram = torch.randn(9, 4).double(), torch.randn(20, 4).double(), Gram(4, dtype=torch.float64)
    decompose(weight, gram.add(x[:10]))
    assert torch.allclose(decompose(weight, gram.add(x[10:])).sigma, energies(weight, x).sqrt()[:4], rtol=1e-6)


def test_the_root_of_a_gram_is_a_root_with_its_inverse():
    gram = Gram(5, dtype=torch.float64).add(torch.randn(40, 5))
    S, inverse = gram.root()
    assert torch.allclose(S @ S.T, gram.matrix) and torch.allclose(inverse @ S, torch.eye(5).double())


def test_the_rank_must_exist():
    spectrum = Spectrum(torch.zeros(4, 3), torch.zeros(3), torch.zeros(3, 6))
    for rank in (0, 4, -1):
        with pytest.raises(EmlocError, match=f"rank {rank}"): truncate(spectrum, rank)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value, shape):
    weight = torch.randn(*shape)
    weight[1, 2] = value
    with pytest.raises(EmlocError, match="layers.3.up_proj.*weight"): decompose(weight, Gram(shape[1]).add(torch.randn(9, shape[1])), "layers.3.up_proj")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_named(value, shape):
    gram = Gram(shape[1]).add(torch.full((3, shape[1]), value))
    with pytest.raises(EmlocError, match="layers.3.up_proj.*inputs"): decompose(torch.randn(*shape), gram, "layers.3.up_proj")
