"""The documentation in a real browser: it can be walked, searched and read, at desktop and phone widths, and asks no other host."""
import threading

import pytest
from browser import chromium

from emloc.site import notebooks, serve_site

SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def chrome():
    with chromium() as browser: yield browser


@pytest.fixture(scope="module")
def address(chrome, site):
    server = serve_site(site.folder, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


@pytest.fixture(params=SIZES)
def size(request) -> str: return request.param


@pytest.fixture
def page(request, chrome, address, size):
    "A page whose requests to other hosts, failed requests and script errors fail the test; for a reader who likes it light, or as the test says."
    width, height = SIZES[size]
    page, wrong = chrome.new_page(viewport={"width": width, "height": height}, color_scheme=getattr(request, "param", "light")), []
    page.on("request", lambda r: None if r.url.startswith((address, "data:", "blob:")) else wrong.append(f"asks {r.url}"))
    page.on("response", lambda r: wrong.append(f"{r.status} {r.url}") if r.status >= 400 else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    yield page
    page.close()
    assert not wrong


def test_navigation(page, address, size):
    page.goto(address)
    assert page.locator("h1").inner_text() == "emloc"
    if size == "phone": page.locator(".quarto-btn-toggle").first.click()
    page.locator("#quarto-sidebar").get_by_role("link", name="spectrum", exact=True).click()
    page.wait_for_url("**/10_spectrum.html")
    assert page.locator("h1").inner_text() == "spectrum"
    page.locator(".nav-page-next a").click()
    page.wait_for_url("**/10a_fisher.html")


def test_search_finds_a_term_and_goes_there(page, address, size):
    page.goto(address + "benchmarks.html")
    if size == "phone": page.locator(".navbar-toggler").click()
    box = page.locator(".smalldocs-search:visible input")
    box.fill("Gram matrix")
    hit = page.locator(".smalldocs-search-results.show a", has_text="spectrum").first
    hit.wait_for()
    hit.click()
    page.wait_for_url("**spectrum.html**")
    assert "Gram matrix" in page.locator("main").inner_text()


def test_reference(page, address):
    page.goto(address + "api/index.html")
    page.locator("#emulator").get_by_role("link", name="build_emulator", exact=True).click()
    page.wait_for_url("**/api/emulator.html#build_emulator")
    section = page.locator("section#build_emulator, section:has(> #build_emulator)").first
    assert "calibration" in section.inner_text() and "ratio" in section.inner_text()


def test_a_name_in_the_text_leads_to_the_reference(page, address):
    page.goto(address + "tutorials/99_probe.html")
    page.locator("main").get_by_role("link", name="build_emulator", exact=True).click()
    page.wait_for_url("**/api/emulator.html#build_emulator")


def test_pictures_load(page, address):
    for path in ("index.html", "10_spectrum.html", "tutorials/01_memory.html"):
        page.goto(address + path)
        pictures = page.locator("main img")
        assert pictures.count() and all(pictures.evaluate_all("found => found.map(p => p.complete && p.naturalWidth > 0)"))


def test_the_method_in_one_picture(page, address, size):
    page.goto(address + "how.html")
    wide, narrow = page.locator(".wide-picture svg"), page.locator(".narrow-picture svg")
    assert (wide.is_visible(), narrow.is_visible()) == ((True, False) if size == "desktop" else (False, True))
    shown = wide if size == "desktop" else narrow
    outside = shown.evaluate("""picture => { const edge = picture.getBoundingClientRect();
        return [...picture.querySelectorAll("text")].filter(t => { const r = t.getBoundingClientRect(); return r.left < edge.left - 1 || r.right > edge.right + 1 }).map(t => t.textContent) }""")
    assert outside == []


@pytest.mark.parametrize("path", ["tutorials/02_spectra.html", "tutorials/05_the_gap.html", "32_polish.html"])
def test_a_formula_is_not_wider_than_the_text(page, address, path):
    page.goto(address + path)
    page.locator(".katex-html").first.wait_for()
    assert page.locator(".math.display").evaluate_all("found => found.filter(f => f.scrollWidth > f.clientWidth + 1).map(f => f.querySelector('annotation').textContent)") == []


def test_formulas_are_set(page, address):
    page.goto(address + "10_spectrum.html")
    page.locator(".katex-html").first.wait_for()
    assert page.locator(".katex-error").count() == 0
    assert page.locator(".katex-display").count() >= 1
    assert page.evaluate("document.fonts.ready.then(() => [...document.fonts].filter(f => f.status == 'loaded').map(f => f.family).join())").count("KaTeX") >= 2


def test_the_explorer_moves_without_a_kernel(page, address):
    page.goto(address + "tutorials/99_probe.html")
    page.locator("#probe[data-ready=yes]").wait_for()
    slider, number = page.locator("#probe input"), page.locator("#probe output")
    assert number.inner_text() == "9"
    slider.focus()
    slider.press("ArrowRight")
    assert number.inner_text() == "16"


CONTRAST = """() => {
  const parse = colour => { const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const over = ([r, g, b, a], under) => [r, g, b].map((c, i) => a * c + (1 - a) * under[i]);
  const paper = node => { const own = node === document.documentElement ? [255, 255, 255, 1] : parse(getComputedStyle(node).backgroundColor);
    return own[3] === 1 ? own.slice(0, 3) : over(own, paper(node.parentElement)); };
  const light = colour => { const [r, g, b] = colour.map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const own = node => [...node.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  const seen = [...document.querySelectorAll('main *, #quarto-sidebar *, .smalldocs-search-results.show *')].filter(n => own(n) && n.getClientRects().length && !n.closest('svg, .katex-mathml, style, script, option, [hidden]'));
  return seen.map(n => { const under = paper(n), style = getComputedStyle(n), lights = [light(over(parse(style.color), under)), light(under)];
    return [(Math.max(...lights) + 0.05) / (Math.min(...lights) + 0.05), n.tagName + '.' + n.className + ': ' + n.textContent.trim().slice(0, 40)]; });
}"""


def is_dark(page): return page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number).reduce((a, b) => a + b) < 300")


@pytest.mark.parametrize("path", ["index.html", "how.html", "benchmarks.html", "tutorials/02_spectra.html", "tutorials/05_the_gap.html", "api/emulator.html"])
@pytest.mark.parametrize("page", ["light", "dark"], indirect=True)
def test_pages_can_be_read_in_light_and_in_dark(page, address, path):
    page.goto(address + path)
    page.wait_for_load_state("networkidle")
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert is_dark(page) == page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    found = page.evaluate(CONTRAST)
    assert len(found) > 30 and [f for f in found if f[0] < 4.5] == []


@pytest.mark.parametrize("page", ["light", "dark"], indirect=True)
def test_what_was_found_can_be_read(page, address, size):
    page.goto(address + "how.html")
    if size == "phone": page.locator(".navbar-toggler").click()
    page.locator(".smalldocs-search:visible input").fill("rank")
    page.locator(".smalldocs-search-results.show a").nth(1).wait_for()
    page.keyboard.press("ArrowDown") # one of them is chosen
    page.evaluate("document.querySelectorAll('main, #quarto-sidebar').forEach(n => n.remove())")
    found = page.evaluate(CONTRAST)
    assert len(found) > 5 and [f for f in found if f[0] < 4.5] == []


def test_the_sidebar_shows_where_one_is(page, address, size):
    page.goto(address + "71_cli.html")
    if size == "phone": page.locator(".quarto-secondary-nav button, [data-bs-target*='sidebar']").first.click()
    active = page.locator("#quarto-sidebar a.active").last
    active.wait_for()
    page.wait_for_timeout(500)
    box = active.bounding_box()
    assert 0 <= box["y"] <= page.viewport_size["height"]


@pytest.mark.parametrize("page", ["dark"], indirect=True)
def test_pictures_explorers_and_formulas_in_the_dark(page, address):
    page.goto(address + "tutorials/02_spectra.html")
    page.locator(".emloc svg").first.wait_for()
    colour = lambda selector, name: sum(map(int, page.locator(selector).first.evaluate(f"node => getComputedStyle(node).{name}").strip("rgb()").split(",")[:3]))
    assert colour("main img", "backgroundColor") == 3 * 255 # drawn for white paper
    assert colour(".emloc", "backgroundColor") < 300 and colour(".emloc svg text", "fill") > 500
    assert colour(".katex-html", "color") > 500


@pytest.mark.parametrize("page", ["dark"], indirect=True)
def test_the_reader_chooses_between_light_and_dark(page, address, size):
    page.goto(address)
    assert is_dark(page)
    if size == "phone": page.locator(".navbar-toggler").click()
    page.locator(".quarto-color-scheme-toggle:visible").first.click()
    page.wait_for_function("getComputedStyle(document.body).backgroundColor == 'rgb(255, 255, 255)'")
    page.goto(address + "benchmarks.html")
    assert not is_dark(page)


def test_no_page_is_wider_than_the_screen(page, address, site):
    paths = [p.with_suffix(".html").as_posix() for p in notebooks(site.root / "nbs")] + ["how.html", "benchmarks.html", "api/index.html", "api/emulator.html", "api/correct.html"]
    wide = []
    for path in paths:
        page.goto(address + path)
        if page.evaluate("document.documentElement.scrollWidth > window.innerWidth"): wide.append(path)
    assert wide == []
