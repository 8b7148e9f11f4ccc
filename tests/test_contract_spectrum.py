"""The spectrum of a weight on its inputs, against the exact singular values in float64."""
import pytest
import torch

from emloc.data import EmlocError
from emloc.spectrum import Gram, Spectrum, decompose, krylov, truncate, unit_columns

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


@pytest.mark.parametrize("rows", [40, 3], ids=["full rank", "rank deficient"])
def test_the_root_of_a_gram_is_a_root(rows):
    torch.manual_seed(8)
    gram = Gram(5, dtype=torch.float64).add(torch.randn(rows, 5))
    S = gram.root()
    assert torch.allclose(S @ S.T, gram.matrix, atol=2e-6 * float(gram.matrix.diagonal().sum()))


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


def test_leading_directions_are_the_first_of_all(problem):
    weight, x, gram = problem
    some, whole = decompose(weight, gram, rank=2), decompose(weight, gram)
    assert some.left.shape == (len(weight), 2) and some.right.shape == (2, weight.shape[1])
    assert torch.allclose(some.left @ some.right, whole.left[:, :2] @ whole.right[:2], atol=1e-9)
    assert some.error(2) == pytest.approx(whole.error(2), rel=1e-9, abs=1e-9)
    with pytest.raises(EmlocError, match="rank 3"): truncate(some, 3)


def test_left_is_orthonormal_and_right_its_projection(problem):
    weight, _, gram = problem
    s = decompose(weight, gram, rank=3)
    assert torch.allclose(s.left.T @ s.left, torch.eye(3).double(), atol=1e-9) and torch.allclose(s.right, s.left.T @ weight)


def test_rank_zero_gives_sigma_alone(shape):
    torch.manual_seed(9)
    weight, gram = torch.randn(*shape).double(), Gram(shape[1], dtype=torch.float64).add(torch.randn(50, shape[1]).double())
    values, whole = decompose(weight, gram, rank=0), decompose(weight, gram)
    assert torch.allclose(values.sigma, whole.sigma) and values.left.shape == (shape[0], 0) and values.error(2) == pytest.approx(whole.error(2))


@pytest.mark.parametrize("rank", [-1, 50])
def test_a_rank_that_cannot_be_is_named(rank, shape):
    with pytest.raises(EmlocError, match=f"up_proj: rank {rank}"): decompose(torch.randn(*shape), Gram(shape[1]), "up_proj", rank)


WIDE = {"out < in": (1024, 1100), "out > in": (1100, 1024)}


@pytest.fixture(params=WIDE, scope="module")
def wide(request):
    "A layer wide enough for the Krylov solver, with a falling spectrum, and the float64 optimum."
    torch.manual_seed(0)
    out, in_ = WIDE[request.param]
    weight, x = torch.randn(out, in_), torch.randn(1500, in_) * torch.logspace(0, -2, in_)
    return weight, Gram(in_).add(x), x


def excess(weight, x, U, V, rank): # relative to the float64 optimum
    y, d = x.double() @ weight.double().T, x.double() @ (weight - U @ V).double().T
    best = float(torch.linalg.eigvalsh(y.T @ y)[:-rank].sum())
    return float((d ** 2).sum()) / best - 1


def test_a_wide_layer_is_within_the_bar(wide):
    weight, gram, x = wide
    spectrum = decompose(weight, gram, rank=64)
    assert len(spectrum.sigma) == 64 and spectrum.rest > 0, "not the Krylov solver"
    assert -1e-6 < excess(weight, x, *truncate(spectrum, 64), 64) < 1e-4
    d = x @ (weight - spectrum.left @ spectrum.right).T
    assert spectrum.error(64) == pytest.approx(float(d.norm() / (x @ weight.T).norm()), rel=1e-4)


def test_a_wide_layer_repeats_to_the_bit(wide):
    weight, gram, _ = wide
    a, b = decompose(weight, gram, rank=64), decompose(weight, gram, rank=64)
    assert torch.equal(a.left, b.left) and torch.equal(a.right, b.right) and torch.equal(a.sigma, b.sigma)


def test_a_wide_layer_without_enough_rows_falls_back():
    torch.manual_seed(1)
    weight, x = torch.randn(1024, 1024), torch.randn(40, 1024)
    U, V = truncate(decompose(weight, Gram(1024).add(x), rank=64), 64)
    assert float((x @ (weight - U @ V).T).norm() / (x @ weight.T).norm()) < 1e-3


@pytest.mark.parametrize("scale", [1., 1e-3, 0.], ids=["orthogonal", "nearly parallel", "zeros"])
def test_unit_columns_are_an_orthonormal_basis_of_the_same_space(scale):
    torch.manual_seed(0)
    q = torch.linalg.qr(torch.randn(300, 40))[0]
    columns = q * torch.logspace(0, -6, 40) if scale == 1 else q[:, :1] + scale * torch.randn(300, 40)
    if scale == 0: columns[:, 1:] = 0
    units = unit_columns(columns.clone())
    assert (units.T @ units - torch.eye(40)).abs().max() < 1e-5
    assert (columns - units @ (units.T @ columns)).norm() < 1e-5 * columns.norm()


def test_loud_rows_wait_for_each_other_and_are_counted_once():
    torch.manual_seed(0)
    x, weight = torch.randn(5, 400, 64).bfloat16(), torch.randn(16, 64).bfloat16()
    gram = Gram(16)
    for rows in x: gram.add_outputs(rows, rows @ weight.T, weight)
    y = (x.double() @ weight.double().T).reshape(-1, 16)
    assert (gram.matrix.double() - y.T @ y).norm() < 2e-3 * (y.T @ y).norm()
    assert gram.count == 2000


def test_krylov_says_so_when_it_has_not_found_the_directions():
    torch.manual_seed(2)
    q = torch.linalg.qr(torch.randn(400, 400).double())[0]
    steep = (q * torch.logspace(0, -6, 400).double()) @ q.T
    values, vectors = krylov(steep, 20)
    assert torch.allclose(values, torch.logspace(0, -6, 400).double()[:20], rtol=1e-4)
    assert krylov(torch.zeros(400, 400), 20) is None or krylov(torch.zeros(400, 400), 20)[0].abs().max() == 0
    assert krylov((q * torch.linspace(1, 0.9, 400).double()) @ q.T, 20, steps=3) is None


def test_a_few_huge_inputs_do_not_drown_the_rest():
    torch.manual_seed(3)
    weight, x = torch.randn(96, 128), torch.randn(500, 128)
    x[:, 5] *= 3000
    U, V = truncate(decompose(weight, Gram(128).add(x), rank=24), 24)
    assert excess(weight, x, U, V, 24) < 1e-4


@pytest.mark.parametrize("scale", [1e-20, 1e-12, 1e12, 1e30])
def test_the_scale_of_the_weight_does_not_matter(scale, shape):
    torch.manual_seed(4)
    weight, gram = torch.randn(*shape), Gram(shape[1]).add(torch.randn(50, shape[1]))
    one, other = decompose(weight, gram, rank=3), decompose(weight * scale, gram, rank=3)
    assert torch.allclose(one.sigma[:3] * scale, other.sigma[:3], rtol=1e-4) and torch.allclose(one.left @ one.right * scale, other.left @ other.right, rtol=1e-2, atol=1e-4 * scale)


def test_a_zero_weight_gives_zero_factors(shape):
    U, V = truncate(decompose(torch.zeros(*shape), Gram(shape[1]).add(torch.randn(9, shape[1])), rank=2), 2)
    assert torch.isfinite(U).all() and not V.any()


def test_a_bfloat16_gram_loses_nothing_and_leaves_the_setting():
    torch.manual_seed(5)
    x, before = torch.randn(300, 500).bfloat16(), torch.get_float32_matmul_precision()
    assert torch.allclose(Gram(500).add(x).matrix.double(), x.double().T @ x.double(), atol=1e-3)
    assert torch.get_float32_matmul_precision() == before


def test_the_matrix_of_a_gram_can_be_set_and_added_to():
    x = torch.randn(30, 400).double()
    gram, other = Gram(400, torch.float64).add(x[:10]), Gram(400, torch.float64).add(x[10:20])
    gram.matrix += other.matrix
    assert torch.allclose(gram.add(x[20:]).matrix, x.T @ x) and torch.equal(gram.matrix, gram.matrix.T)
