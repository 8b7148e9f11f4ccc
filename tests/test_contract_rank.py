"""From a budget to ranks."""
from itertools import product

import pytest
import torch

from emloc.data import EmlocError
from emloc.rank import break_even, by_spectrum, uniform
from emloc.spectrum import Spectrum

SHAPES = {"up": (48, 32), "down": (32, 48), "square": (32, 32)}


def parameters(ranks, shapes): return sum(ranks[n] * sum(s) if n in ranks else s[0] * s[1] for n, s in shapes.items())


def falling(shapes, seed=0):
    "Singular values that fall at a different speed for each weight."
    torch.manual_seed(seed)
    return {n: torch.rand(min(s)).sort(descending=True).values ** (1 + i) for i, (n, s) in enumerate(shapes.items())}


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.9])
def test_uniform_ranks_follow_the_formula(ratio):
    assert uniform(SHAPES, ratio) == {n: int(ratio * o * i // (o + i)) for n, (o, i) in SHAPES.items()}


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.9])
def test_uniform_ranks_stay_within_the_ratio_for_every_weight(ratio):
    for name, rank in uniform(SHAPES, ratio).items(): assert rank * sum(SHAPES[name]) <= ratio * SHAPES[name][0] * SHAPES[name][1]


def test_a_weight_keeps_one_direction_at_least():
    assert uniform(SHAPES, 1e-6) == dict.fromkeys(SHAPES, 1)


def test_a_weight_whose_pair_costs_more_than_itself_stays_dense():
    assert uniform({"thin": (1, 40), "wide": (40, 40)}, 0.5) == {"wide": 10}


@pytest.mark.parametrize("choose", [lambda r: uniform(SHAPES, r), lambda r: by_spectrum(falling(SHAPES), SHAPES, r)], ids=["uniform", "by_spectrum"])
class TestRatio:
    @pytest.mark.parametrize("ratio", [0, -0.5, 1.5, float("nan")])
    def test_out_of_range_is_refused(self, choose, ratio):
        with pytest.raises(EmlocError, match=f"ratio {ratio}"): choose(ratio)

    def test_one_keeps_everything_dense(self, choose):
        assert choose(1) == {}


@pytest.mark.parametrize("shape", [(32, 32), (48, 32), (7, 90), (2, 2)])
def test_break_even_is_the_largest_rank_that_saves_something(shape):
    k, dense, each = break_even(shape), shape[0] * shape[1], sum(shape)
    assert k * each < dense or k == 1
    assert (k + 1) * each >= dense


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.8])
def test_ranks_by_spectrum_stay_within_the_budget(ratio):
    ranks = by_spectrum(falling(SHAPES), SHAPES, ratio)
    assert parameters(ranks, SHAPES) <= ratio * parameters({}, SHAPES)


@pytest.mark.parametrize("ratio", [0.1, 0.25, 0.5, 0.8])
def test_ranks_by_spectrum_leave_no_room_for_one_more(ratio):
    ranks = by_spectrum(falling(SHAPES), SHAPES, ratio)
    left = ratio * parameters({}, SHAPES) - parameters(ranks, SHAPES)
    assert all(left < sum(SHAPES[n]) for n, k in ranks.items() if k < break_even(SHAPES[n]))


@pytest.mark.parametrize("ratio, seed", [(r, s) for r in (0.4, 0.6, 0.8) for s in range(3)])
def test_ranks_by_spectrum_are_the_best_there_are(ratio, seed):
    "Against all possible ranks of three small weights of one shape, where greed is exact."
    shapes = dict.fromkeys("abc", (9, 9))
    sigmas = falling(shapes, seed)
    kept = lambda ranks: sum(float((s[:k].double() ** 2).sum() / (s.double() ** 2).sum()) for s, k in zip(sigmas.values(), ranks))
    budget = ratio * parameters({}, shapes)
    best = max(kept(ranks) for ranks in product(range(1, break_even((9, 9)) + 1), repeat=3) if 18 * sum(ranks) <= budget)
    assert kept(by_spectrum(sigmas, shapes, ratio).values()) == pytest.approx(best, rel=1e-12)


def test_the_weight_that_needs_more_directions_gets_more():
    flat, steep = torch.ones(32), torch.logspace(0, -4, 32)
    ranks = by_spectrum({"flat": flat, "steep": steep}, dict.fromkeys(["flat", "steep"], (32, 32)), 0.5)
    assert ranks["flat"] > ranks["steep"]


def test_the_size_of_the_outputs_does_not_count():
    sigmas, shapes = falling(SHAPES), SHAPES
    louder = {n: s * (100 if n == "up" else 1) for n, s in sigmas.items()}
    assert by_spectrum(louder, shapes, 0.4) == by_spectrum(sigmas, shapes, 0.4)


def test_spectra_and_their_sigma_give_the_same():
    sigmas = falling(SHAPES)
    spectra = {n: Spectrum(torch.zeros(o, min(o, i)), sigmas[n], torch.zeros(min(o, i), i)) for n, (o, i) in SHAPES.items()}
    assert by_spectrum(spectra, SHAPES, 0.3) == by_spectrum(sigmas, SHAPES, 0.3)


def test_a_weight_without_energy_keeps_one_direction():
    ranks = by_spectrum({"dead": torch.zeros(32), "alive": torch.ones(32)}, dict.fromkeys(["dead", "alive"], (32, 32)), 0.2)
    assert ranks["dead"] == 1 and ranks["alive"] > 1
