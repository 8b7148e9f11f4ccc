"""The functions under the widgets, on problems with a known answer; the widgets themselves are driven in test_browser_lab.py."""
import gc
import io
import json
import threading
from types import SimpleNamespace

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axis import Axis
from PIL import Image
from transformers import TrainerControl, TrainerState

from emloc import explore, panels
from emloc.anchor import compute_anchors
from emloc.corrections import correction_explorer, correction_table
from emloc.correct import correct_adapter
from emloc.data import EmlocError
from emloc.easel import Easel, png
from emloc.emulator import build_emulator, choose_bits, collect_spectra
from emloc.evaluate import alignment_report
from emloc.explorers import page
from emloc.finetune import lora_config, train_adapter, training_args
from emloc.jobs import Job
from emloc.monitor import Monitor, hear, is_deaf, monitor_figure
from emloc.packed import overhead
from emloc.playground import columns, complete, playground
from emloc.plan import Shapes
from emloc.rank import by_spectrum, uniform
from emloc.ranking import RankExplorer, bits_at, predicted, predicted_bits, rank_table, ranks_at, ratio_for
from emloc.spectrum import Spectrum
from emloc.spectra import SpectrumExplorer, actual_errors, rank_steps, reading, spectrum_table


def test_actual_errors_of_a_weight_with_known_directions():
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    found = actual_errors(weight, torch.eye(3), torch.eye(3))
    assert torch.allclose(found, torch.tensor([5 / 14, 1 / 14, 0.0]).double().sqrt())


def test_rank_steps_begin_at_one_end_at_the_last_and_have_the_even_ones():
    assert rank_steps(5) == [1, 2, 3, 4, 5]
    steps = rank_steps(576)
    assert steps[0] == 1 and steps[-1] == 576 and {72, 104} <= set(steps) and len(steps) < 170


def test_on_the_calibration_rows_prediction_is_truth(llama, task):
    rows = task.calibration(24)
    table = spectrum_table(llama, rows, rows, blocks=[1])
    assert {w["block"] for w in table["weights"]} == {1} and json.loads(json.dumps(table)) == table
    for w in table["weights"]:
        assert max(abs(p - a) for p, a in zip(w["aware"]["predicted"], w["aware"]["actual"])) < 5e-3
        assert all(a <= p + 5e-3 for a, p in zip(w["aware"]["actual"], w["plain"]["actual"]))


def test_spectrum_explorer_reads_its_table_and_says_what_is_missing(llama, task):
    table = spectrum_table(llama, task.calibration(24), task.test, blocks=[0])
    shown = SpectrumExplorer(table, weight="mlp.up_proj")
    assert shown.rank == uniform({"w": (48, 32)}, 0.25)["w"] and shown.reading == reading(table, 0, "mlp.up_proj", shown.rank)
    with pytest.raises(EmlocError, match="not in this table"): reading(table, 7, "mlp.up_proj", 3)
    with pytest.raises(EmlocError, match="blocks 0 to 2"): spectrum_table(llama, task.calibration(4), task.test, blocks=[3])


def test_an_explorer_stores_a_page_that_needs_no_kernel_and_no_host(llama, task):
    bundle = SpectrumExplorer(spectrum_table(llama, task.calibration(24), task.test, blocks=[0]))._repr_mimebundle_()
    html = bundle["text/html"]
    assert "image/png" in bundle and "\n\n" not in html and html.count("</script>") == 1
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "")
    assert page({"note": "</script>"}, b"", "x").count("</script>") == 1


@pytest.fixture(scope="module")
def ranks(llama, task):
    spectra, shapes = collect_spectra(llama, task.calibration(24))
    return rank_table(str(llama), spectra, batch_size=2, seq_len=16), spectra, shapes


def test_the_rank_table_is_what_the_library_chooses(ranks):
    table, spectra, shapes = ranks
    for ratio in (0.1, 0.5, 0.9):
        assert ranks_at(table, "uniform", ratio) == uniform(shapes, ratio)
        assert ranks_at(table, "spectrum", ratio) == by_spectrum(spectra, shapes, ratio)
        assert predicted(table, uniform(shapes, ratio))["emulator_bytes"] == Shapes(table["model"]).emulator_bytes(uniform(shapes, ratio))


def test_a_budget_becomes_the_largest_ratio_that_fits(ranks):
    table = ranks[0]
    peak = predicted(table, ranks_at(table, "uniform", 0.3))["peak_bytes"]
    assert ratio_for(table, peak + 1) == 0.3 and ratio_for(table, peak - 1) == 0.275
    with pytest.raises(EmlocError, match="fewer tokens"): ratio_for(table, "1KiB")
    shown = RankExplorer(table)
    shown.seq_len = 0
    assert "at least 1" in shown.problem
    shown.seq_len = 64
    assert shown.problem == "" and shown.predicted["peak_bytes"] > predicted(table, shown.ranks)["peak_bytes"]


def test_bits_are_what_the_library_chooses(ranks):
    table, _, shapes = ranks
    s = Shapes(table["model"])
    possible = [r for r in table["ratios"] if predicted_bits(table, r)]
    assert 0 < len(possible) < len(table["ratios"])
    for ratio in (possible[0], possible[3]):
        bits = choose_bits(shapes, ratio, s.dtype)
        assert predicted_bits(table, ratio)["emulator_bytes"] == s.emulator_bytes(bits)
        assert all(0 <= bits[n] - overhead(shapes[n]) - found < 8 for n, found in bits_at(table, ratio).items())
    with pytest.raises(EmlocError, match=f"the least is {possible[0]}"): bits_at(table, table["ratios"][0])
    peak = predicted_bits(table, possible[2])["peak_bytes"]
    assert ratio_for(table, peak - 1, form="quantized") == possible[1]
    shown = RankExplorer(table, form="quantized", ratio=possible[1])
    assert shown.wanted == {"form": "quantized", "ratio": possible[1]} and shown.predicted == predicted_bits(table, possible[1])
    shown.seq_len = 64
    assert shown.problem == "" and shown.predicted["peak_bytes"] > predicted_bits(table, possible[1])["peak_bytes"]
    with pytest.raises(EmlocError, match="lowrank, quantized"): RankExplorer(table, form="sparse")


def test_a_cancelled_build_goes_on_and_gives_the_same_emulator(llama, task, tmp_path, monkeypatch):
    from emloc import emulator
    begun, whole, calls = threading.Event(), emulator.build_block, []
    def build(*args):
        calls.append(1)
        if len(calls) == 2: begun.set(); job.cancelling or stop.wait(5)
        return whole(*args)
    stop = threading.Event()
    monkeypatch.setattr(emulator, "build_block", build)
    job = Job("Build", lambda tell: build_emulator(llama, task.calibration(24), tmp_path / "emulator", ratio=0.5))
    job.press(); begun.wait(30); job.stop(); stop.set(); job.thread.join()
    assert "Stopped" in job.message.value and not (tmp_path / "emulator").exists() and (tmp_path / "emulator.partial").is_dir()
    job.press(); job.thread.join()
    assert len(calls) == 3 and (tmp_path / "emulator" / "config.json").is_file() and "role='status'" in job.message.value
    job.press(); job.thread.join()
    assert "role='alert'" in job.message.value and not job.start.disabled and job.cancel.disabled


def test_monitor_stops_the_trainer_and_keeps_one_figure():
    monitor, control, state = Monitor(every=0), TrainerControl(), TrainerState(max_steps=9, global_step=1)
    figure, first = monitor.figure, monitor.picture.value
    monitor.on_train_begin(None, state, control)
    monitor.on_log(None, state, control, {"loss": 2.5})
    monitor.on_step_end(None, state, control)
    assert monitor.losses == [(1, 2.5)] and not control.should_training_stop and monitor.picture.value != first
    monitor.stop()
    monitor.on_step_end(None, state, control)
    assert control.should_training_stop and monitor.figure is figure
    assert list(monitor_figure([(1, 2.0), (2, 1.0)], [], 5, figure).axes[0].lines[0].get_ydata()) == [2.0, 1.0]


def test_the_monitor_stores_its_last_picture_where_it_is_shown(monkeypatch):
    monitor, state, kept = Monitor(), TrainerState(max_steps=1, global_step=1), []
    monitor.view.place = SimpleNamespace(update=lambda bundle, raw: kept.append(bundle["image/png"]))
    empty = monitor.view._repr_mimebundle_()["image/png"]
    for event in (monitor.on_train_begin, lambda *a: monitor.on_log(*a, {"loss": 2.5}), monitor.on_step_end, monitor.on_train_end): event(None, state, TrainerControl())
    assert len(kept) == 1 and kept[0] != empty


def test_a_click_is_not_led_back_to_the_busy_cell():
    comm = SimpleNamespace(_reply_subshell_for=lambda data, subshell: None)
    hear(SimpleNamespace(comm=comm))
    assert comm._reply_subshell_for({}, "its own") == "its own"
    hear(SimpleNamespace(comm=None))
    assert not is_deaf()


@pytest.mark.parametrize("mode, limit, strength", [("none", 3.0, 1.0), ("none", 3.0, 1.6), ("clamp", 0.1, 1.0), ("clamp", 3.0, 0.5), ("gram", 3.0, 1.0), ("gram", 3.0, 2.0)])
def test_the_correction_table_agrees_with_the_corrected_adapter(llama_stages, task, tmp_path, mode, limit, strength):
    s, rows = llama_stages, task.calibration(24)
    out = correct_adapter(s.raw, s.emulator, s.model, tmp_path / "out", mode=mode, limit=limit, strength=strength, calibration=rows)
    table = correction_table(s.raw, s.emulator, s.model, task.test, rows).misalignment(mode, limit, strength)
    for r in alignment_report(s.raw, {"it": out}, s.emulator, s.model, task.test): assert table[r["module"]] == pytest.approx(r["it"], rel=1e-3)


@pytest.fixture(scope="module")
def anchored(llama_stages, task, tmp_path_factory):
    "An adapter that was trained with anchors."
    s, folder = llama_stages, tmp_path_factory.mktemp("anchored")
    anchors = compute_anchors(s.emulator, s.model, task.train, folder / "anchors")
    return train_adapter(s.emulator, task.train, folder / "raw", lora=lora_config(rank=4, alpha=8), args=training_args(folder / "checkpoints", steps=6, lr=1e-2, bf16=False), anchors=anchors)


def test_an_anchored_adapter_has_no_misalignment_before_it_is_corrected(llama_stages, anchored, task, tmp_path):
    s, rows = llama_stages, task.calibration(24)
    table = correction_table(anchored, s.emulator, s.model, rows)
    moved = {m: correct_adapter(anchored, s.emulator, s.model, tmp_path / m, mode=m, calibration=rows) for m in ("none", "clamp", "gram")}
    for r in alignment_report(anchored, moved, s.emulator, s.model, rows):
        assert r["none"] < 1e-3 and table.misalignment("none")[r["module"]] == 0
        for m in ("clamp", "gram"): assert r[m] > 0.01 and table.misalignment(m)[r["module"]] == pytest.approx(r[m], rel=1e-3)


def test_correction_explorer_moves_and_shows_errors(llama_stages, anchored, task):
    s = llama_stages
    table, other = (correction_table(raw, s.emulator, s.model, task.calibration(8)) for raw in (s.raw, anchored))
    shown = correction_explorer({"a": table, "b": other}, {"a": [{"mode": "gram", "strength": 1.0, "nll": 0.5, "accuracy": 0.9}], "b": [{"mode": "none", "strength": 1.0, "nll": 0.3, "accuracy": 0.8}]})
    before = shown.picture.value
    shown.controls["strength"].value = 2.0
    assert shown.picture.value != before and "gram × 1, has a loss of 0.500" in shown.reading.value
    assert [label for label, _ in shown.controls["adapter"]._options_full] == ["a", "b, trained with anchors"]
    shown.controls["adapter"].value = "b"
    shown.controls["mode"].value = "none"
    shown.controls["strength"].value = 1.0
    assert "mean misalignment 0.000 → 0.000; all" in shown.reading.value and "none × 1, has a loss of 0.300" in shown.reading.value
    shown.controls["adapter"].value = "a"
    table.products = table.products[:, :1]
    shown.controls["strength"].value = 1.5
    assert "role='alert'" in shown.reading.value


def test_playground_writes_what_generate_writes(llama, tokenizer):
    from emloc.evaluate import open_model
    model, own = open_model(llama)
    shown = playground({"one": (model, own)}, "we saw one otter", tokens=4)
    shown.job.press(); shown.job.thread.join()
    ids = own("we saw one otter", return_tensors="pt").input_ids
    wanted = own.decode(model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False, pad_token_id=0)[0, ids.shape[1]:], skip_special_tokens=True)
    assert shown.texts == {"one": wanted}
    with pytest.raises(EmlocError, match="empty"): complete(model, own, " ")
    assert "<b>" in columns({"a": "<script>"}) and "<script>" not in columns({"a": "<script>"})


def test_a_panel_shows_errors_and_keeps_its_first_picture():
    def draw(n=1):
        if n > 2: raise ValueError("<too many>")
        figure, ax = explore.plt.subplots(figsize=(2, 1)); ax.plot(range(n + 1)); return figure
    shown = panels.panel(draw, n=(1, 3))
    first = shown.picture.value
    shown.controls["n"].value = 1
    assert shown.still() and shown.message.value == ""
    shown.controls["n"].value = 3
    assert "&lt;too many&gt;" in shown.message.value and "role='alert'" in shown.message.value and first


SHAPES = {f"model.layers.{b}.{n}": (64, 48) for b in range(6) for n in ("q_proj", "up_proj")}

def square(k):
    figure, ax = plt.subplots(figsize=(4, 2), layout="tight")
    ax.set_aspect("equal"); ax.set_xlim(-9, 9); ax.set_ylim(-9, 9); ax.grid(True); ax.plot([0, k], [0, 1], label=f"to {k}"); ax.legend()
    return figure

def two_scales(k):
    figure, ax = plt.subplots(figsize=(4, 2))
    ax.bar(["a", "b"], [k, 9]); other = ax.twinx(); other.plot([0, 1], [1, k], color="black"); other.set_ylim(0, 9); figure.suptitle(f"{k}")
    return figure

def bare(k):
    figure, ax = plt.subplots(figsize=(3, 1)); ax.axis("off"); ax.set_xlim(0, 9); ax.text(k, 0.5, "here")
    return figure

def candidates(k): return [{"mode": m, "strength": 1.0, "nll": v, "accuracy": 0.1 * k} for m, v in (("none", 2.0), ("gram", 1.0))]

FIGURES = {"spectrum": lambda k: explore.spectrum_figure(Spectrum(torch.zeros(48, 48), torch.exp(-torch.arange(48) / 9.0), torch.zeros(48, 64)), k),
           "ranks": lambda k: explore.rank_figure({"a": {n: (k + i) % 10 for i, n in enumerate(SHAPES)} | {"model.layers.0.q_proj": 10}}, SHAPES),
           "candidates": lambda k: explore.candidate_figure(candidates(k)), "square": square, "two scales": two_scales, "bare": bare}


def pixels(file: bytes): return np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int)


@pytest.mark.parametrize("name", FIGURES)
def test_an_easel_draws_what_matplotlib_draws(name, monkeypatch):
    easel, begun = Easel(), []
    begin = Easel.begin
    monkeypatch.setattr(Easel, "begin", lambda *given: (begun.append(1), begin(*given)))
    pictures = [pixels(easel.png(FIGURES[name](k))) for k in (2, 5, 8)]
    for k, found in zip((2, 5, 8), pictures):
        wanted = pixels(png(FIGURES[name](k)))
        assert found.shape == wanted.shape and np.abs(found - wanted).max() < 16
    assert len(begun) == 1 and (pictures[0] != pictures[2]).any()


@pytest.mark.parametrize("change", [lambda ax: ax.set_xlim(0, 3), lambda ax: ax.set_ylabel("other"), lambda ax: ax.set_yscale("log"), lambda ax: ax.set_xticks([1], ["one"]),
                                    lambda ax: ax.tick_params(length=9), lambda ax: ax.set_facecolor("pink"), lambda ax: ax.spines["top"].set_visible(False), lambda ax: ax.axis("off"),
                                    lambda ax: ax.invert_yaxis(), lambda ax: ax.grid(True), lambda ax: ax.figure.set_size_inches(3, 2), lambda ax: ax.figure.add_axes((0.5, 0.5, 0.2, 0.2))])
def test_an_easel_notices_another_frame(change):
    def draw(changed):
        figure, ax = plt.subplots(figsize=(3, 1.5), layout="tight"); ax.plot([1, 2, 4])
        if changed: change(ax)
        return figure
    easel = Easel()
    for changed in (False, True, False, True):
        found, wanted = pixels(easel.png(draw(changed))), pixels(png(draw(changed)))
        assert found.shape == wanted.shape and np.abs(found - wanted).max() < 16


def test_an_easel_draws_only_the_axis_that_moved(monkeypatch):
    def draw(x, y):
        figure, (ax, _) = plt.subplots(1, 2, figsize=(8, 2)); ax.plot([1, 2, 4]); ax.set_xlim(0, x); ax.set_ylim(0, y); ax.grid(True)
        return figure
    easel, drawn, own = Easel(), [], Axis.draw
    easel.png(draw(3, 3))
    for limits, most in (((3, 4), 2), ((3, 5), 1), ((3, 6), 1), ((4, 6), 2), ((5, 6), 1), ((6, 7), 2), ((6, 7), 0)):
        wanted = pixels(png(draw(*limits)))
        with monkeypatch.context() as watch:
            watch.setattr(Axis, "draw", lambda axis, *given: (drawn.append(axis), own(axis, *given))[1])
            found = pixels(easel.png(draw(*limits)))
        assert found.shape == wanted.shape and np.abs(found - wanted).max() < 16
        assert len(drawn) <= most
        drawn.clear()


def test_no_garbage_is_collected_while_a_picture_is_drawn():
    seen = []
    def draw(n=3): seen.append(gc.isenabled()); return plt.subplots()[0]
    def fails(n=3): raise ValueError("no")
    shown = panels.panel(draw, n=(1, 5))
    shown.controls["n"].value = 4
    panels.panel(fails, n=(1, 5))
    assert seen == [False, False] and gc.isenabled()
    gc.disable()
    try: shown.controls["n"].value = 5; assert not gc.isenabled()
    finally: gc.enable()


def test_a_panel_of_text_has_no_picture_and_names_its_controls():
    shown = panels.panel(lambda long_name, other: f"said {long_name}" if other else plt.figure(), long_name=(1, 5), other=ipywidgets.Checkbox(True, description="a_b"))
    assert shown.picture.layout.display == "none" and "said 3" in shown.message.value
    assert [c.description for c in shown.controls.values()] == ["long name", "a_b"]
    shown.controls["other"].value = False
    assert shown.picture.layout.display is None and shown.picture.value and shown.message.value == ""
