"""A real browser for the tests: Debian's chromium, driven by playwright. `EMLOC_NEED_BROWSER=1` turns "there is none" from a skip into a failure."""
import os
import shutil
from contextlib import contextmanager

import pytest


def need(condition, why: str):
    "Skip the test, or fail where a browser was promised."
    if condition: return
    (pytest.fail if os.environ.get("EMLOC_NEED_BROWSER") == "1" else pytest.skip)(why)


@contextmanager
def chromium():
    "A running chromium, as playwright's Browser."
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    need(path, "no chromium: apt-get install -y --no-install-recommends chromium fonts-dejavu-core")
    try: from playwright.sync_api import sync_playwright
    except ImportError: need(False, "no playwright: pip install playwright")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try: yield browser
        finally: browser.close()


@contextmanager
def page_of(browser, width: int = 1280, height: int = 900, **options):
    "A page that remembers what it asked for (`page.asked`, URLs) and its script errors (`page.errors`)."
    context = browser.new_context(viewport={"width": width, "height": height}, **options)
    page = context.new_page()
    page.asked, page.errors = [], []
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    try: yield page
    finally: context.close()


launch = chromium # the site's tests call it so
