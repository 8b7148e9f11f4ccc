"""Every widget in a real JupyterLab: opened, moved by mouse and keyboard, and compared with what the library computes."""
import dataclasses
import json
import re

import pytest
from browser import begin_notebook, chromium, jupyter_lab, page_of, run_notebook, wait_for_cells, write_notebook
from datasets import Dataset

from emloc.corrections import correction_table, summary
from emloc.emulator import choose_bits, load_spectra
from emloc.lowrank import emulator_config
from emloc.plan import Shapes
from emloc.ranking import bits_at, predicted, predicted_bits, rank_table, ranks_at, ratio_for
from emloc.spectra import reading, spectrum_table

CANDIDATES = [{"mode": "none", "strength": 1.0, "nll": 0.779, "accuracy": 0.75}, {"mode": "gram", "strength": 1.0, "nll": 0.762, "accuracy": 0.77}]

CELLS = ["""
import json, time, torch
from pathlib import Path
from datasets import Dataset
from IPython.display import display
import emloc.emulator
from emloc.finetune import lora_config, train_adapter, training_args
torch.set_num_threads(1)
here = json.loads(Path("here.json").read_text())
rows = Dataset.from_list(here["rows"])
""", """
from emloc.spectra import SpectrumExplorer
spectra = SpectrumExplorer(here["spectra"], block=0, weight="self_attn.q_proj", rank=4)
spectra
""", """
from emloc.ranking import rank_explorer
whole = emloc.emulator.build_block
def slow(*args): time.sleep(1); return whole(*args)
emloc.emulator.build_block = slow
ranks = rank_explorer(here["ranks"], rows, "built", ratio=0.5)
ranks
""", """
from emloc.monitor import Monitor, train_live
live = train_live(here["emulator"], rows, "live", lora=lora_config(rank=4), args=training_args("live.checkpoints", steps=20_000, logging_steps=1, save_strategy="no", batch_size=2, bf16=False))
live
""", """
from emloc.corrections import correction_explorer, correction_table
import dataclasses
plain = correction_table(here["raw"], here["emulator"], here["model"], rows)
corrections = correction_explorer({"plain": plain, "other": dataclasses.replace(plain, anchors={"every": 1})}, {"plain": here["candidates"]})
corrections
""", """
from emloc.playground import playground
play = playground({"model": (here["model"], None), "emulator with adapter": (here["emulator"], here["raw"])}, "we saw one otter is a", tokens=3)
play
""", """
from emloc.explore import BLUE
from emloc.panels import play as show
import matplotlib.pyplot as plt
def wave(times=2.0):
    if times > 4: raise ValueError("too fast for the eye")
    figure, ax = plt.subplots(figsize=(4, 1)); ax.plot(torch.sin(times * torch.linspace(0, 6.28, 200)), color=BLUE); return figure
show(wave, times=(0.5, 5.0))
""", """
bits = rank_explorer(here["ranks"], rows, "built-bits", ratio=0.5)
bits
"""]


TRAINING = """
from IPython.display import display
from emloc.monitor import Monitor
monitor = Monitor(every=0.2)
display(monitor.view)
train_adapter(here["emulator"], rows, "cell", lora=lora_config(rank=4), callbacks=[monitor], args=training_args("cell.checkpoints", steps=20_000, logging_steps=1, save_strategy="no", batch_size=2, bf16=False))
"""


@pytest.fixture(scope="module")
def here(llama_stages, task, tmp_path_factory):
    "What the notebook works from, and the folder that it is in."
    stages, folder = llama_stages, tmp_path_factory.mktemp("lab")
    rows = task.calibration(24)
    content = {"rows": rows.to_list(), "model": str(stages.model), "emulator": str(stages.emulator), "raw": str(stages.raw), "candidates": CANDIDATES,
               "spectra": spectrum_table(stages.model, rows, task.test, blocks=[0, 2]),
               "ranks": rank_table(str(stages.model), load_spectra(stages.emulator), batch_size=2, seq_len=32)}
    (folder / "here.json").write_text(json.dumps(content))
    write_notebook(folder / "widgets.ipynb", CELLS)
    write_notebook(folder / "training.ipynb", [CELLS[0], TRAINING])
    return content | {"folder": folder}


@pytest.fixture(scope="module")
def lab(here):
    with chromium() as browser, jupyter_lab(here["folder"]) as address: yield browser, address


@pytest.fixture(scope="module")
def page(lab):
    browser, address = lab
    with page_of(browser, 1400, 1000) as page:
        page.set_default_timeout(20_000)
        run_notebook(page, address, "widgets.ipynb")
        yield page


def cell(page, number: int): return page.locator(".jp-Notebook .jp-CodeCell").nth(number).locator(".jp-OutputArea").first


def until(page, look, wanted, seconds: float = 15):
    "Wait until what is seen in the page is what is wanted."
    for _ in range(int(seconds * 20)):
        if (seen := look()) == wanted: return
        page.wait_for_timeout(50)
    assert seen == wanted


def numbers(text: str) -> list: return [float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\.?\d*", text)]


def drag(page, handle, share: float):
    "Move a slider by mouse to a share of its width."
    handle.scroll_into_view_if_needed()
    box = handle.bounding_box()
    page.mouse.click(box["x"] + share * box["width"], box["y"] + box["height"] / 2)


def spectrum_numbers(table, *choice) -> list:
    r = reading(table, *choice)
    entry = next(w for w in table["weights"] if (w["block"], w["weight"]) == choice[:2])
    return [r["rank"], min(entry["out"], entry["in"]), *(round(100 * r[k], 1) for k in ("kept", "predicted", "actual")), r["parameters"], round(100 * r["share"], 1), entry["out"] * entry["in"]]


def near(found: list, wanted: list) -> bool: return len(found) == len(wanted) and all(abs(a - b) <= 0.101 for a, b in zip(found, wanted))


def test_spectrum_explorer(page, here):
    out, table = cell(page, 1), here["spectra"]
    said = lambda: numbers(out.locator("output").inner_text())
    curve = lambda: out.locator("svg path").first.get_attribute("d")
    assert near(said(), spectrum_numbers(table, 0, "self_attn.q_proj", 4))
    slider = out.get_by_role("slider", name="rank")
    slider.focus()
    for _ in range(3): page.keyboard.press("ArrowRight")
    assert near(said(), spectrum_numbers(table, 0, "self_attn.q_proj", 7))
    before = curve()
    out.get_by_label("block", exact=True).first.select_option("2")
    out.get_by_label("weight", exact=True).first.select_option("mlp.up_proj")
    assert curve() != before and near(said(), spectrum_numbers(table, 2, "mlp.up_proj", 7))
    drag(page, slider, 0.5)
    rank = int(said()[0])
    assert 10 <= rank <= 22 and near(said(), spectrum_numbers(table, 2, "mlp.up_proj", rank))
    before = curve()
    out.get_by_label("logarithmic").click()
    assert curve() != before
    out.get_by_label("the weight alone").check()
    assert near(said(), spectrum_numbers(table, 2, "mlp.up_proj", rank, False))
    out.locator("svg").first.hover()
    assert "predicted error" in out.locator(".hover").inner_text()


def test_rank_explorer(page, here):
    out, table = cell(page, 2), here["ranks"]
    lines = lambda: [numbers(l) for l in out.locator("output").inner_text().splitlines()]
    def wanted(ratio):
        found = [predicted(table, ranks_at(table, c, ratio)) for c in table["choices"]]
        return [[f["emulator_bytes"] / 2**20, table["model_bytes"] / 2**20, 2, f["peak_bytes"] / 2**20] for f in found]
    agree = lambda ratio: all(near(a, b) for a, b in zip(lines(), wanted(ratio)))
    fills = lambda: out.locator("svg rect").evaluate_all("cells => cells.map(c => c.getAttribute('fill')).join()")
    assert agree(0.5)
    slider, before = out.get_by_role("slider", name="ratio"), fills()
    slider.focus()
    page.keyboard.press("Home")
    assert agree(0.025) and fills() != before
    drag(page, slider, 0.7)
    ratio = float(slider.get_attribute("aria-valuetext").split()[1])
    assert 0.5 < ratio < 0.8 and agree(ratio)
    budget = out.get_by_label("memory budget", exact=True).and_(page.locator("input[type=text]"))
    enough = f"{predicted(table, ranks_at(table, 'uniform', 0.4))['peak_bytes'] / 2**20 + 0.001:.3f} MiB"
    def enter(field, text):
        field.fill("")
        field.press_sequentially(text)
        field.press("Enter")
    enter(budget, enough)
    fitting = ratio_for(table, enough)
    assert fitting != ratio
    until(page, lambda: float(slider.get_attribute("aria-valuetext").split()[1]), fitting)
    enter(budget, "24 apples")
    until(page, lambda: "24 apples: not a size" in out.locator(".emloc > [role=alert]").inner_text(), True)
    for wrong in ("0", "2.5"):
        enter(out.get_by_label("rows of a batch"), wrong)
        until(page, lambda: "rows of a batch: must be a whole number" in out.locator(".emloc > [role=alert]").inner_text(), True)
    enter(out.get_by_label("rows of a batch"), "2")
    until(page, lambda: out.locator(".emloc > [role=alert]").inner_text(), "")


def test_the_emulator_on_the_screen_is_built_and_cancelled(page, here):
    out, built = cell(page, 2), here["folder"] / "built"
    chosen = lambda: [title.split(":")[0] for title in out.get_by_text("(chosen)").all_text_contents()]
    for choice in ("one ratio for all", "as the spectra ask"):
        out.get_by_role("radio", name=choice).check()
        until(page, chosen, [choice])
    ratio = float(out.get_by_role("slider", name="ratio").get_attribute("aria-valuetext").split()[1])
    out.get_by_role("button", name="Build this emulator").click()
    out.get_by_text("1 of 3").wait_for()
    out.get_by_role("button", name="Cancel").click()
    out.get_by_text("Stopped.").wait_for()
    assert not built.exists() and built.with_name("built.partial").is_dir()
    out.get_by_role("button", name="Build this emulator").click()
    out.get_by_text("The emulator is in built").wait_for()
    assert emulator_config(built).ranks == ranks_at(here["ranks"], "spectrum", ratio)
    out.get_by_role("button", name="Build this emulator").focus()
    page.keyboard.press("Enter")
    out.locator(".widget-html [role=alert]").wait_for()
    assert "there is something here already" in out.locator(".widget-html [role=alert]").inner_text()


def test_bits_of_every_weight_are_shown_and_built(page, here):
    out, table = cell(page, 7), here["ranks"]
    possible = [r for r in table["ratios"] if predicted_bits(table, r)]
    ratio = lambda: float(slider.get_attribute("aria-valuetext").split()[1])
    problem = lambda: out.locator(".emloc > [role=alert]").inner_text()
    fills = lambda: picture.locator("rect").evaluate_all("cells => cells.map(c => c.getAttribute('fill')).join()")
    def agree():
        found, bits = predicted_bits(table, ratio()), bits_at(table, ratio())
        return (near(numbers(out.locator("output").inner_text()), [found["emulator_bytes"] / 2**20, table["model_bytes"] / 2**20, 2, found["peak_bytes"] / 2**20])
                and near(numbers(picture.get_by_text("whole weights").text_content()), [min(bits.values()), max(bits.values())]))
    slider, picture = out.get_by_role("slider", name="ratio"), out.get_by_role("img", name="bits of a number")
    assert picture.is_hidden()
    out.get_by_role("radio", name="whole weights in few bits").check()
    assert picture.is_visible() and out.get_by_role("img", name="one ratio for all").is_hidden() and agree()
    slider.focus()
    page.keyboard.press("Home")
    assert f"the least is {possible[0]}" in problem()
    while ratio() < possible[0]: page.keyboard.press("ArrowRight")
    assert agree() and problem() == ""
    before = fills()
    drag(page, slider, 0.15)
    assert ratio() > possible[0] and agree() and fills() != before
    picture.locator("rect").first.hover()
    assert "levels" in out.locator(".hover").inner_text()
    budget = out.get_by_label("memory budget", exact=True).and_(page.locator("input[type=text]"))
    budget.fill(f"{predicted_bits(table, possible[2])['peak_bytes'] / 2**20 - 0.001:.3f} MiB")
    budget.press("Enter")
    until(page, ratio, possible[1])
    assert agree()
    out.get_by_role("button", name="Build this emulator").click()
    out.get_by_text("The emulator is in built-bits").wait_for()
    shapes = Shapes(table["model"])
    assert emulator_config(here["folder"] / "built-bits").bits == choose_bits(shapes.shapes, possible[1], shapes.dtype)


def test_training_monitor(page, here):
    out = cell(page, 3)
    picture = lambda: out.locator("img").get_attribute("src")
    first = picture()
    out.get_by_role("button", name="Train", exact=True).click()
    out.get_by_text(re.compile(r"step \d+ of 20000, loss")).wait_for()
    until(page, lambda: picture() != first, True)
    out.get_by_role("button", name="Stop training").focus()
    page.keyboard.press("Space")
    out.get_by_text("stopped: what was learnt so far is kept").wait_for()
    out.get_by_text("Stopped early; what was learnt is in live").wait_for()
    assert (here["folder"] / "live" / "adapter_model.safetensors").is_file()


def test_correction_explorer(page, here):
    out = cell(page, 4)
    table = correction_table(here["raw"], here["emulator"], here["model"], Dataset.from_list(here["rows"]))
    picture = lambda: out.locator("img").get_attribute("src")
    said = lambda: numbers(out.locator("[role=status]").inner_text())[:4]
    shown = lambda i: float(out.locator(".widget-readout").nth(i).inner_text())
    def agrees(*choice): # mean before, mean after, how many are better, of how many
        wanted = numbers(summary(table.misalignment("none"), table.misalignment(*choice)))[:4]
        return all(abs(a - b) <= 0.004 * b + 0.001 for a, b in zip(said(), wanted, strict=True))
    until(page, lambda: agrees("gram"), True)
    before = picture()
    out.get_by_role("button", name="clamp").click()
    until(page, lambda: agrees("clamp", 3.0), True)
    assert picture() != before
    out.locator(".noUi-handle").first.focus()
    for i in range(1, 11):
        page.keyboard.press("ArrowLeft")
        until(page, lambda: abs(shown(0) / (3 * 10 ** (-0.05 * i)) - 1) < 0.02, True)
    until(page, lambda: agrees("clamp", shown(0)), True)
    before = picture()
    drag(page, out.locator(".noUi-target").nth(1), 0.8)
    until(page, lambda: shown(1) > 2.2 and picture() != before, True)
    out.get_by_role("button", name="none").click()
    until(page, lambda: agrees("none", 3.0, shown(1)), True)
    before = picture()
    out.get_by_role("button", name="other, trained with anchors").click()
    table = dataclasses.replace(table, anchors={"every": 1})
    until(page, lambda: agrees("none", 3.0, shown(1)), True)
    assert picture() != before
    out.get_by_role("button", name="gram").click()
    until(page, lambda: agrees("gram", 3.0, shown(1)), True)


def test_playground(page, here):
    from emloc.evaluate import open_model
    from emloc.playground import complete
    out = cell(page, 5)
    out.get_by_role("button", name="Generate").click()
    out.get_by_text("done", exact=True).wait_for()
    for name, models in (("model", (here["model"], None)), ("emulator with adapter", (here["emulator"], here["raw"]))):
        wanted = complete(*open_model(*models), "we saw one otter is a", tokens=3)
        assert out.locator(f"section[aria-label='{name}'] div").text_content() == (wanted or "(nothing: it ended at once)")
    out.locator("textarea").fill("")
    out.get_by_role("button", name="Generate").click()
    out.locator("[role=alert]").wait_for()
    assert "the prompt is empty" in out.locator("[role=alert]").inner_text()


def test_panel_and_its_error(page):
    out = cell(page, 6)
    before = out.locator("img").get_attribute("src")
    until(page, lambda: "controls" in (out.locator("img").get_attribute("alt") or ""), True)
    out.locator(".noUi-handle").focus()
    slider = out.get_by_role("slider", name="times")
    says_what_it_shows = lambda: slider.get_attribute("aria-valuetext") == out.locator(".widget-readout").inner_text()
    until(page, says_what_it_shows, True)
    page.keyboard.press("ArrowRight")
    until(page, says_what_it_shows, True)
    until(page, lambda: out.locator("img").get_attribute("src") != before, True)
    page.keyboard.press("End")
    out.locator("[role=alert]").wait_for()
    assert "too fast for the eye" in out.locator("[role=alert]").inner_text()


def test_no_script_failed(page):
    # anywidget gives up waiting after two seconds, which a busy machine may take; a widget that never came has failed its own test
    assert [e for e in page.errors if "Failed to initialize model" not in e] == []


def test_a_cell_that_trains_hears_stop(lab, here):
    browser, address = lab
    with page_of(browser, 1400, 1000) as page:
        page.set_default_timeout(20_000)
        begin_notebook(page, address, "training.ipynb")
        out = cell(page, 1)
        out.get_by_text(re.compile(r"step \d+ of 20000, loss")).wait_for(timeout=60_000)
        out.get_by_role("button", name="Stop training").click()
        out.get_by_text("stopped: what was learnt so far is kept").wait_for()
        wait_for_cells(page)
    assert (here["folder"] / "cell" / "adapter_model.safetensors").is_file()
