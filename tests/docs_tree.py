"""A copy of what the site is built from, with one more lesson whose output moves without a kernel."""
import shutil
from pathlib import Path

import nbformat

ROOT = Path(__file__).parent.parent
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
EXPLORER = """<div id="probe"><input type="range" min="0" max="9" value="3" aria-label="rank"><output>9</output></div>
<script type="module">
const box = document.getElementById("probe"), [slider, number] = box.children;

const square = (k) => `${k * k}`;
slider.addEventListener("input", () => { number.value = square(slider.value); });
box.dataset.ready = "yes";
</script>"""


def moving_lesson() -> nbformat.NotebookNode:
    "A widget as it is stored: for Jupyter, as HTML with its own script, as a picture, as words."
    data = {"application/vnd.jupyter.widget-view+json": {"model_id": "a", "version_major": 2, "version_minor": 0},
            "text/html": EXPLORER, "image/png": PIXEL, "text/plain": "Explorer(rank=3)"}
    still = {form: value for form, value in data.items() if form != "text/html"}
    output = lambda data: nbformat.v4.new_output("display_data", data)
    cells = [nbformat.v4.new_markdown_cell("# A probe\n\n> It moves without a kernel.\n\nAnd $a_{probe}$ is a formula, `build_emulator` a link."),
             nbformat.v4.new_code_cell("explorer", outputs=[output(data)]), nbformat.v4.new_code_cell("still", outputs=[output(still)])]
    state = {"application/vnd.jupyter.widget-state+json": {"version_major": 2, "version_minor": 0, "state": {"a": {"model_name": "LinkModel", "state": {"source": ["IPY_MODEL_b", "value"]}}}}}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "python3"}, "widgets": state})


def copy_tree(folder: Path) -> Path:
    "Notebooks, benchmarks and settings of the site in a folder of their own, and the probe among the lessons."
    for name in ("nbs", "bench"): shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "runs", "_quarto.yml"))
    shutil.copy(ROOT / "_quarto.yml", folder)
    nbformat.write(moving_lesson(), folder / "nbs" / "tutorials" / "99_probe.ipynb")
    return folder
