"Small weights of a block are worked on side by side; nobody can tell from the result."
import threading
import time

import pytest
import torch

import tiny
from emloc.arithmetic import any_machine
from emloc.block import side_by_side
from emloc.data import EmlocError
from emloc.emulator import build_emulator

CPU = torch.device("cpu")


@pytest.fixture
def cores():
    "Three, on whatever machine."
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)


def test_results_come_in_order_and_each_item_has_its_part_of_the_cores(cores):
    found = side_by_side(lambda i: (time.sleep(0.02 * (5 - i)), i * i, torch.get_num_threads(), threading.current_thread().name)[1:], list(range(5)), CPU)
    assert [square for square, *_ in found] == [0, 1, 4, 9, 16]
    assert {own for _, own, _ in found} == {1} and len({name for *_, name in found}) == cores
    assert torch.get_num_threads() == cores
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start(); thread.join()
    assert later == [cores]


def test_two_items_share_all_cores(cores):
    torch.set_num_threads(4)
    assert side_by_side(lambda i: torch.get_num_threads(), [0, 1], CPU) == [2, 2]


@pytest.mark.parametrize("case", ["one item", "one core", "a GPU", "a plan"])
def test_otherwise_they_take_turns_in_the_thread_that_asks(cores, case):
    names = lambda items, device: side_by_side(lambda _: threading.current_thread().name, items, device)
    if case == "one core": torch.set_num_threads(1)
    if case == "a plan":
        with any_machine(): found = names([0, 1], CPU)
    else: found = names([0] if case == "one item" else [0, 1], torch.device("meta") if case == "a GPU" else CPU)
    assert set(found) == {threading.current_thread().name}


def test_an_error_comes_through_when_the_others_are_done(cores):
    ended = []
    def work(i):
        if i == 0: raise EmlocError("layer 0")
        time.sleep(0.05)
        ended.append(i)
    with pytest.raises(EmlocError, match="layer 0"): side_by_side(work, [0, 1, 2, 3], CPU)
    assert sorted(ended) == [1, 2, 3] and torch.get_num_threads() == cores


@pytest.mark.parametrize("metric", ["activation", "fisher"])
def test_an_emulator_is_the_same_bits_however_the_threads_are_scheduled(llama, task, tmp_path, cores, metric):
    one, other = (tiny.contents(build_emulator(llama, task.train.select(range(16)), tmp_path / name, ratio=0.5, metric=metric)) for name in ("one", "other"))
    assert one == other
