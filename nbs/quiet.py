"""Take progress bars and training logs out of the notebooks' stored outputs: `python nbs/quiet.py`, after running notebooks."""
from pathlib import Path

from execnb.nbio import read_nb, write_nb

from emloc.pages import quiet
from emloc.site import notebooks

here = Path(__file__).parent
for path in notebooks(here):
    notebook, changed = read_nb(here / path), False
    for cell in notebook.cells:
        if cell.get("outputs") and (kept := quiet(cell.outputs)) != cell.outputs: cell.outputs, changed = kept, True
    if changed:
        write_nb(notebook, here / path)
        print(path)
