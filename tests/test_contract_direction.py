"""The gradient of an emulator against the model's: alike where the weights are, and the same rows and LoRA for both."""
import pytest
import tiny
import torch

from emloc.data import EmlocError
from emloc.direction import Direction, compare_gradients, direction_figure
from emloc.emulator import build_emulator


@pytest.fixture
def rows(task): return task.train.select(range(12))


def test_the_model_as_its_own_emulator_has_its_gradient(llama, task, rows, tmp_path):
    path = build_emulator(llama, task.calibration(), tmp_path / "same", ratio=1)
    for anchored in (True, False):
        found = compare_gradients(path, llama, rows, anchored=anchored)
        assert found.cosine > 0.9999 and found.length == pytest.approx(1, abs=1e-3) and min(found.layers.values()) > 0.999


def test_more_bits_point_better_and_a_trained_lora_can_be_looked_at(make_stages, task, rows, tmp_path):
    s = make_stages("llama, quantized")
    coarse = build_emulator(s.model, task.calibration(), tmp_path / "coarse", ratio=0.08, form="quantized")
    fine, rough = (compare_gradients(path, s.model, rows, adapter=s.raw) for path in (s.emulator, coarse))
    assert 1 > fine.cosine > rough.cosine > 0
    assert set(fine.layers) and all(-1 <= c <= 1 + 1e-6 for c in fine.layers.values())
    assert "cosine 0." in repr(fine)


def test_anchors_raise_the_cosine(stages, rows):
    assert compare_gradients(stages.emulator, stages.model, rows, adapter=stages.raw).cosine > compare_gradients(stages.emulator, stages.model, rows, adapter=stages.raw, anchored=False).cosine


def test_another_model_and_no_rows_are_refused(llama_stages, other_model, rows):
    with pytest.raises(EmlocError, match="another model"): compare_gradients(llama_stages.emulator, other_model, rows)
    with pytest.raises(EmlocError, match="no rows"): compare_gradients(llama_stages.emulator, llama_stages.model, rows.select([]))


def test_the_figure_has_a_line_for_each_emulator():
    found = {name: Direction({f"model.layers.{b}.mlp.up_proj": c for b in range(3)}, c, 1.0) for name, c in (("a", 0.5), ("b", 0.9))}
    ax = direction_figure(found).axes[0]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a: 0.500 in all", "b: 0.900 in all"]
