"""How soon is a picture drawn again? From a key on a slider to the redrawn picture, in JupyterLab in Chromium.

    python bench/widgets.py

Writes bench/results/widgets.json.
"""
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)]

import machine
from browser import chromium, jupyter_lab, page_of, run_notebook, write_notebook

CELLS = ["""
import torch
import matplotlib.pyplot as plt
from emloc.corrections import CorrectionTable, correction_explorer
from emloc.explore import spectrum_figure
from emloc.panels import panel
from emloc.ranking import rank_table, rank_explorer, shapes_of
from emloc.spectra import SpectrumExplorer, rank_steps
from emloc.spectrum import Spectrum
torch.manual_seed(0)
steps = rank_steps(576)
falling = lambda speed: {k: [round(2.718 ** (-r / speed), 5) for r in steps] for k in ("sigma", "predicted", "actual")}
SpectrumExplorer({"weights": [{"block": b, "weight": w, "out": 576, "in": 576, "ranks": steps, "aware": falling(60), "plain": falling(200)}
                              for b in range(4) for w in ("q_proj", "k_proj")]})
""", """
shapes = shapes_of("default").shapes
rank_explorer(rank_table("default", {n: torch.exp(-torch.arange(min(s)) / 50.0) for n, s in shapes.items()}, seq_len=128))
""", """
factor = torch.randn(210, 32, 32, dtype=torch.float64)
table = CorrectionTable(list(shapes), factor @ factor.mT, torch.eye(8, dtype=torch.float64).expand(210, 8, 8), 1e3 * torch.ones(210), 2 * torch.ones(210), torch.rand(210, 2, 8))
correction_explorer(table)
""", """
spectrum = Spectrum(torch.zeros(576, 576), torch.exp(-torch.arange(576) / 50.0), torch.zeros(576, 576))
def draw(rank=72): return spectrum_figure(spectrum, rank, plain=torch.linspace(1, 0.1, 576))
panel(draw, rank=(1, 576))
""", """
def moving(rank=72): figure = draw(rank); figure.axes[1].set_ylim(0, 1 + rank / 576); return figure
panel(moving, rank=(1, 576))
"""]

WATCH = """(cell) => {
  window.moves = [];
  let began = null;
  const ready = () => requestAnimationFrame(() => { if (began !== null) { window.moves.push(performance.now() - began); began = null; } });
  const area = document.querySelectorAll('.jp-Notebook .jp-CodeCell')[cell].querySelector('.jp-OutputArea');
  document.addEventListener('keydown', () => { began = performance.now(); }, true);
  if (area.querySelector('img')) area.addEventListener('load', ready, true);
  else new MutationObserver(ready).observe(area.querySelector('svg'), {subtree: true, childList: true, attributes: true});
}"""
NAMES = ["spectrum explorer (anywidget)", "rank explorer (anywidget)", "correction explorer (one figure, moving parts)", "panel (the data drawn again)", "panel whose scale moves too (all drawn again)"]


def measure(moves: int = 15) -> dict:
    "Milliseconds of each widget."
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_notebook(Path(folder) / "bench.ipynb", CELLS)
        with chromium() as browser, jupyter_lab(Path(folder)) as address, page_of(browser) as page:
            for i, name in enumerate(NAMES):
                if i == 0: run_notebook(page, address, "bench.ipynb")
                area = page.locator(".jp-Notebook .jp-CodeCell").nth(i).locator(".jp-OutputArea").first
                area.locator("input[type=range], .noUi-handle").last.focus()
                page.evaluate(WATCH, i)
                for _ in range(moves):
                    seen = page.evaluate("window.moves.length")
                    page.keyboard.press("ArrowRight" if i != 2 else "ArrowLeft")
                    page.wait_for_function("before => window.moves.length > before", arg=seen, timeout=10_000)
                    page.wait_for_timeout(300)
                times = page.evaluate("window.moves")[2:]
                found[name] = {"median_ms": round(statistics.median(times), 1), "worst_ms": round(max(times), 1), "moves": len(times)}
                print(f"{name:50} median {found[name]['median_ms']:6.1f} ms, worst {found[name]['worst_ms']:6.1f} ms, {len(times)} moves")
    return found


def table(result: dict) -> str:
    "Markdown."
    lines = ["From a key press to the redrawn picture in JupyterLab, in Chromium", "", "| widget | median, ms | worst, ms | moves |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {w['median_ms']:.0f} | {w['worst_ms']:.0f} | {w['moves']} |" for name, w in result["widgets"].items()]
    return "\n".join([*lines, "", f"({machine.line(result['machine'])}; load average before: {result['load_average_before']})"])


if __name__ == "__main__":
    load = os.getloadavg()[0]
    result = {"machine": machine.describe(), "load_average_before": round(load, 1), "widgets": measure()}
    result["markdown"] = table(result)
    (ROOT / "bench" / "results" / "widgets.json").write_text(json.dumps(result, indent=1) + "\n")
