"""README.md from nbs/index.ipynb, with nbconvert: what `nbdev_readme` does, without needing Quarto; and bench/TABLES.md from bench/results."""
import re
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

from emloc.pages import benchmark_page

here = Path(__file__).parent
notebook = nbformat.read(here / "index.ipynb", as_version=4)
cells = []
for cell in notebook.cells:
    directives = [line for line in cell.source.splitlines() if line.startswith("#|")]
    if "#| hide" in directives: continue
    cell.source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("#|"))
    if "#| echo: false" in directives: cell.metadata["hide_source"] = True
    cells.append(cell)
text = []
for cell in cells:
    if cell.metadata.pop("hide_source", False):
        text += [output["data"]["text/markdown"] for output in cell.outputs if "text/markdown" in output.get("data", {})]
    else:
        part, _ = MarkdownExporter().from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
        text.append(part.strip())
# from the top of the repository, pages of the site are notebooks, and the benchmarks a file of their own
body = re.sub(r"\]\((?=images/|[\w/]+\.ipynb)", "](nbs/", "\n\n".join(t.strip() for t in text)).replace("](benchmarks.md)", "](bench/TABLES.md)")
banner = "<!-- Made from nbs/index.ipynb by nbs/readme.py: edit the notebook. -->\n\n"
(here.parent / "README.md").write_text(banner + body + "\n", encoding="utf-8")
tables = re.sub(r"^---\ntitle: (.*)\n---\n", r"# \1\n", benchmark_page(here.parent))
(here.parent / "bench" / "TABLES.md").write_text(f"<!-- Made from bench/results by nbs/readme.py. -->\n\n{tables}", encoding="utf-8")
