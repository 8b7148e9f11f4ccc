"""The notebooks run from top to bottom, and notebooks, modules and README say the same."""
import ast
import filecmp
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import beside
import nbformat
import pytest

from emloc.explorers import page, renewed

ROOT = Path(__file__).parent.parent
tidy = runpy.run_path(str(ROOT / "nbs" / "quiet.py"))["tidy"]
NOTEBOOKS = beside.NOTEBOOKS


def tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def run(words: list, folder: Path) -> str:
    quiet = {"TQDM_DISABLE": "1", "MPLBACKEND": "agg", "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": str(folder)}
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=os.environ | quiet)
    assert done.returncode == 0, f"{' '.join(words)} failed:\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tree") / "emloc"
    shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(".git", "__pycache__", "*.egg-info", "emloc-demo", "runs", ".venv*"))
    return folder


def files(folder: Path) -> dict:
    wanted = [*folder.glob("emloc/**/*.py"), *folder.glob("nbs/**/*.ipynb"), folder / "README.md", folder / "bench" / "TABLES.md"]
    return {str(p.relative_to(folder)): p for p in wanted}


def test_export_clean_and_readme_leave_the_tree_unchanged(copy):
    for step in ([tool("nbdev_export")], [tool("nbdev_clean")], [sys.executable, "nbs/readme.py"]): run(step, copy)
    before, after = files(ROOT), files(copy)
    assert before.keys() == after.keys()
    changed = [name for name in before if not filecmp.cmp(before[name], after[name], shallow=False)]
    assert not changed, f"run nbdev_export, nbdev_clean and python nbs/readme.py; out of step: {changed}"


@pytest.mark.parametrize("file", ["README.md", "bench/TABLES.md", "bench/README.md"])
def test_links_on_github_lead_somewhere(file):
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", (ROOT / file).read_text()) if "://" not in link]
    assert [link for link in links if not (ROOT / file).parent.joinpath(link).exists()] == []
    if file == "README.md": assert len(links) > 20


def test_the_step_check_notices_a_module_edited_by_hand(copy):
    module = copy / "emloc" / "rank.py"
    module.write_text(module.read_text().replace("def uniform", "def uniformly"))
    run([tool("nbdev_export")], copy)
    assert filecmp.cmp(module, ROOT / "emloc" / "rank.py", shallow=False)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_outputs_are_stored_and_small(notebook):
    cells = nbformat.read(notebook, as_version=4).cells
    assert notebook.stat().st_size < 600_000
    assert any(cell.get("outputs") for cell in cells), "run the notebook and store its outputs"
    errors = [o for cell in cells for o in cell.get("outputs", []) if o.output_type == "error"]
    assert not errors


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_progress_bar_training_log_or_old_script_is_stored(notebook):
    outputs = [cell["outputs"] for cell in json.loads(notebook.read_text())["cells"] if "outputs" in cell]
    assert outputs == [tidy(o) for o in outputs], "run python nbs/quiet.py"


def test_an_old_script_is_noticed():
    new = page({"kind": "ranks"}, b"", "ranks")
    old = new.replace("function", "fonction")
    stored = lambda html: [{"output_type": "display_data", "data": {"text/html": html}}]
    assert renewed(old) == new != old and renewed("<b>no page</b>") == "<b>no page</b>"
    assert tidy(stored(old)) == stored(new) and tidy(stored(old.splitlines(keepends=True))) == stored(new.splitlines(keepends=True))


@pytest.mark.parametrize("notebook", [p for p in NOTEBOOKS if p.stem != "index"], ids=lambda p: p.stem)
def test_lessons_show_a_picture(notebook):
    if notebook.stem in ("00_data", "00a_output", "40_memory", "69a_picture", "69b_pages", "69c_site", "70_commands", "71_cli"): pytest.skip("a table, text or SVG is the picture here")
    cells = nbformat.read(notebook, as_version=4).cells
    assert any("image/png" in o.get("data", {}) for cell in cells for o in cell.get("outputs", []))


def bound(node: ast.AST) -> set:
    "Names that a cell binds in the notebook's own scope, imports included."
    names = set()
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.ClassDef)): names.add(child.name)
        elif isinstance(child, (ast.Import, ast.ImportFrom)): names |= {a.asname or a.name for a in child.names}
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store): names.add(child.id)
        elif not isinstance(child, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)): names |= bound(child)
    return names


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_no_cell_takes_the_name_of_an_exported_one(notebook):
    "An exported function looks its names up when it is called: a picture's variable of the same name would break it, in the notebook only."
    exported = set()
    for cell in nbformat.read(notebook, as_version=4).cells:
        if cell.cell_type != "code": continue
        tree = ast.parse("".join(line for line in cell.source.splitlines(keepends=True) if not line.startswith(("%", "!"))))
        if cell.source.startswith("#| export"): exported |= bound(tree)
        else:
            again = {name for node in tree.body if not isinstance(node, (ast.Import, ast.ImportFrom)) for name in bound(ast.Module([node], []))} & exported
            assert not again, f"rename in this cell, for exported code uses them: {', '.join(sorted(again))}\n{cell.source}"


def test_notebooks_run_from_top_to_bottom(sharing):
    stages, lessons = beside.sharers()
    running = [beside.start([p for p in NOTEBOOKS if p not in stages + lessons])]
    if sharing:
        sharing.passed("13_anchor.ipynb") # both want its emulator
        running += [beside.start(lessons), sharing]
    else: running.append(beside.start(stages + lessons))
    for notebooks in running: notebooks.wait()
