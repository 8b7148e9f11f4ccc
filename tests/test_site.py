"""The documentation: every notebook has a page, every link leads somewhere, nothing is loaded from elsewhere."""
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
from docs_tree import ROOT

from emloc.cli import main
from emloc.data import EmlocError
from emloc.site import build_site, checkout, lab_words, notebooks, sidebar

LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src", "embed": "src", "object": "data"}


class Links(HTMLParser):
    "What a page loads, where it leads, and the names that links can lead to."
    def __init__(self, text):
        super().__init__()
        self.loads, self.leads, self.names = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if found.get("id"): self.names.add(found["id"])
        if found.get(LOADS.get(tag, "")): self.loads.append(found[LOADS[tag]])
        if tag == "link" and found.get("rel") in ("stylesheet", "icon", "preload", "modulepreload"): self.loads.append(found["href"])
        if tag == "a" and found.get("href"): self.leads.append(found["href"])


@pytest.fixture(scope="module")
def pages(site):
    return {p.relative_to(site.folder).as_posix(): Links(p.read_text(encoding="utf-8")) for p in site.folder.rglob("*.html")}


def test_every_notebook_has_a_page_and_a_place_in_the_sidebar(site, pages):
    wanted = {p.with_suffix(".html").as_posix() for p in notebooks(site.root / "nbs")}
    assert {"index.html", "tutorials/99_probe.html", "10_spectrum.html"} <= wanted <= pages.keys()
    assert {"how.html", "benchmarks.html", "api/index.html", "api/rank.html"} <= pages.keys()
    home = {link.split("#")[0].removeprefix("./") for link in pages["index.html"].leads}
    assert wanted <= home


def test_a_notebook_in_no_section_is_still_listed(tmp_path):
    (tmp_path / "rivals").mkdir()
    for name in ("index", "10_spectrum", "rivals/qlora"): (tmp_path / f"{name}.ipynb").write_text("{}")
    assert {"section": "More", "contents": ["rivals/qlora.ipynb"]} in sidebar(tmp_path)


def test_links_lead_somewhere(site, pages):
    lost = []
    for page, links in pages.items():
        for link in links.leads + links.loads:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc: continue
            target = (site.folder / page).parent / unquote(parts.path) if parts.path else site.folder / page
            target = (target / "index.html" if target.is_dir() else target).resolve()
            if not target.is_file(): lost.append((page, link))
            elif parts.fragment and target.suffix == ".html" and unquote(parts.fragment) not in pages[target.relative_to(site.folder).as_posix()].names: lost.append((page, link))
    assert not lost
    assert not [w for w in site.report["warnings"] if "broken" in w]


def test_nothing_is_loaded_from_another_host(site, pages):
    assert not [(page, load) for page, links in pages.items() for load in links.loads if urlsplit(load).scheme not in ("", "data")]
    for style in site.folder.rglob("*.css"):
        foreign = re.findall(r"(?:url\(\s*['\"]?|@import\s+['\"])(?:https?:)?//[^)'\"]+", style.read_text(encoding="utf-8"))
        assert not foreign, f"{style.name}: {foreign}"


def test_the_site_is_small(site):
    assert site.report["bytes"] < 15e6
    assert site.report["bytes"] == sum(p.stat().st_size for p in site.folder.rglob("*") if p.is_file())


def test_lessons_have_numbers_and_pictures_words(site):
    home, gap = ((site.folder / name).read_text(encoding="utf-8") for name in ("index.html", "tutorials/05_the_gap.html"))
    assert "5 The gap" in home
    assert all(re.search(r'alt="[^"]{8,}"', img) for img in re.findall(r"<img [^>]*data:image[^>]*>", gap))


def test_the_reference_says_what_is_optional_and_where_it_is_explained(site):
    page = (site.folder / "api" / "emulator.html").read_text(encoding="utf-8")
    row = re.search(r"<tr[^>]*>(?:(?!</tr>).)*\*\*walk_options.*?</tr>", page, re.DOTALL)[0]
    assert "required" not in row and "any" in row
    assert re.search(r'Built and explained in <a [^>]*href="\.\./12_emulator\.html"', page)
    plan = re.search(r"<tr[^>]*>(?:(?!</tr>).)*<code>plan</code>.*?</tr>", page, re.DOTALL)[0]
    assert plan.count("None") == 1 # its default, and no type


def test_the_reference_names_every_public_function(site):
    import inspect
    from importlib import import_module
    index = (site.folder / "api" / "index.html").read_text(encoding="utf-8")
    for file in sorted((ROOT / "emloc").glob("[a-z]*.py")):
        module = import_module(f"emloc.{file.stem}")
        public = [n for n in module.__all__ if inspect.isfunction(getattr(module, n)) and getattr(module, n).__module__ == module.__name__]
        page = (site.folder / "api" / f"{file.stem}.html").read_text(encoding="utf-8")
        for name in public:
            assert f'href="{file.stem}.html#{name}"' in index.replace("./", "") and f'id="{name}"' in page, f"{module.__name__}.{name}"
    page = (site.folder / "api" / "rank.html").read_text(encoding="utf-8")
    from emloc.rank import by_spectrum
    assert by_spectrum.__doc__.split(".")[0][:30] in page


def test_benchmarks_are_those_of_the_results(site):
    page = (site.folder / "benchmarks.html").read_text(encoding="utf-8")
    for file in (ROOT / "bench" / "results").glob("*.json"): assert f"python bench/{file.stem}.py" in page


def test_a_widget_stays_alive_or_is_a_picture_and_its_state_does_no_harm(site):
    page = (site.folder / "tutorials" / "99_probe.html").read_text(encoding="utf-8")
    assert page.count('<script type="module">') == 1 and "const square = (k) => `${k * k}`;" in page
    assert page.count("data:image/png") == 1 and page.count("Explorer(rank=3)") == 1 and '<img alt="Explorer(rank=3)"' in page and page.count('class="still"') == 1
    assert "IPY_MODEL" not in page and "const square" not in (site.folder / "search.json").read_text(encoding="utf-8")


def test_nothing_runs_and_the_tree_stays_as_it_is(site):
    names = {p.relative_to(site.root).as_posix() for p in site.root.rglob("*") if "__pycache__" not in p.parts}
    assert {n for n in names if "_docs" in n or "_proc" in n or n.endswith(".qmd")} == set()


def test_where_there_is_no_repository(tmp_path):
    shutil.copytree(ROOT / "emloc", tmp_path / "emloc", ignore=shutil.ignore_patterns("__pycache__"))
    words = [sys.executable, "-c", "import sys; sys.path.insert(0, '.'); from emloc.cli import main; sys.exit(main(sys.argv[1:]))"]
    for command in ("docs", "lab"):
        done = subprocess.run([*words, command], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith(f"emloc {command}: the notebooks come with emloc's repository")


def test_a_directory_with_something_else_is_left_alone(site, tmp_path):
    (tmp_path / "notes.txt").write_text("keep")
    with pytest.raises(EmlocError, match="not a built site"): build_site(tmp_path, site.root)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_docs_as_a_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["docs", "--out", str(tmp_path / "site"), "--json", str(tmp_path / "report.json")]) == 0
    assert (tmp_path / "site" / "index.html").is_file() and "pages" in (tmp_path / "report.json").read_text()
    assert str(tmp_path / "site") in capsys.readouterr().out


def test_lab_opens_the_first_lesson():
    words = lab_words(ROOT, port=9999, browser=False)
    assert f"--ServerApp.root_dir={checkout(ROOT) / 'nbs'}" in words and "--port=9999" in words and "--no-browser" in words
    assert any(word.startswith("--LabApp.default_url=/lab/tree/tutorials/01_") for word in words)
