"""A browser for the tests: Chromium, driven by Playwright."""
import importlib.util
import os
import shutil
from contextlib import contextmanager

import pytest


@contextmanager
def launch():
    "A Playwright browser. Without Chromium the test is skipped, or fails where EMLOC_NEED_BROWSER is set."
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    missing = "" if program else "no chromium: apt-get install -y --no-install-recommends chromium fonts-dejavu-core"
    if importlib.util.find_spec("playwright") is None: missing = "no playwright: pip install playwright"
    if missing: (pytest.fail if os.environ.get("EMLOC_NEED_BROWSER") else pytest.skip)(missing)
    from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try: yield browser
        finally: browser.close()
