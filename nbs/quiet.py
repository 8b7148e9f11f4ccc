"""Take progress bars and training logs out of the notebooks' stored outputs, and give stored explorers the script of today: `python nbs/quiet.py`, after running notebooks or changing that script."""
from pathlib import Path

from execnb.nbio import read_nb, write_nb

from emloc.explorers import renewed
from emloc.pages import quiet
from emloc.site import notebooks


def tidy(outputs: list) -> list:
    "As they should be stored; a page is a list of lines there, or one text."
    def today(data: dict) -> dict:
        html = data["text/html"]
        text = renewed("".join(html))
        return data | {"text/html": text if isinstance(html, str) else text.splitlines(keepends=True)}
    return [o | {"data": today(o["data"])} if "text/html" in o.get("data", {}) else o for o in quiet(outputs)]


if __name__ == "__main__":
    here = Path(__file__).parent
    for path in notebooks(here):
        notebook, changed = read_nb(here / path), False
        for cell in notebook.cells:
            if cell.get("outputs") and (kept := tidy(cell.outputs)) != cell.outputs: cell.outputs, changed = kept, True
        if changed:
            write_nb(notebook, here / path)
            print(path)
