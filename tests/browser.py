"""A real browser for the tests: Debian's chromium, driven by playwright. `EMLOC_NEED_BROWSER=1` turns "there is none" from a skip into a failure."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent


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


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def jupyter_lab(folder: Path, theme: str = "JupyterLab Light"):
    "A JupyterLab on a folder, with settings of its own; yields its address."
    need(find_spec("jupyterlab"), "no jupyterlab: pip install jupyterlab")
    settings = {"@jupyterlab/apputils-extension/themes.jupyterlab-settings": {"theme": theme},
                "@jupyterlab/apputils-extension/notification.jupyterlab-settings": {"fetchNews": "false", "checkForUpdates": False},
                "@jupyterlab/notebook-extension/tracker.jupyterlab-settings": {"windowingMode": "none"}}
    own = folder / ".jupyter"
    for name, content in settings.items():
        file = own / "settings" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    env = os.environ | {"PYTHONPATH": str(ROOT), "JUPYTER_CONFIG_DIR": str(own / "config"), "JUPYTER_RUNTIME_DIR": str(own / "runtime"), "JUPYTERLAB_SETTINGS_DIR": str(own / "settings"),
                        "JUPYTERLAB_WORKSPACES_DIR": str(own / "workspaces"), "IPYTHONDIR": str(own / "ipython"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    port = free_port()
    words = ["-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=", "--ServerApp.password=",
             f"--ServerApp.root_dir={folder}", "--LabApp.expose_app_in_browser=True"]
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen([sys.executable, *words], cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(120):
            try: urllib.request.urlopen(f"{address}/api/status", timeout=2).read(); break
            except OSError: time.sleep(0.5)
            assert server.poll() is None, (folder / "lab.log").read_text()
        yield address
    finally:
        server.terminate()
        try: server.wait(15)
        except subprocess.TimeoutExpired: server.kill()


def write_notebook(file: Path, cells: list):
    "A notebook of code cells."
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}})
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in cells]
    nbformat.write(notebook, file)


def begin_notebook(page, address: str, name: str):
    "Open a notebook in JupyterLab, in a workspace of its own, and begin to run all its cells."
    page.goto(f"{address}/lab/workspaces/{Path(name).stem}/tree/{name}")
    page.get_by_text("| Idle").first.wait_for(timeout=90_000)
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")


def wait_for_cells(page):
    "Until all cells are done."
    page.wait_for_function("() => { const prompts = [...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt')].map(p => p.textContent); return prompts.length && prompts.every(p => /\\[\\d+\\]/.test(p)); }", timeout=120_000)
    page.get_by_text("| Idle").first.wait_for(timeout=60_000)


def run_notebook(page, address: str, name: str):
    "Open a notebook in JupyterLab and run all its cells."
    begin_notebook(page, address, name)
    wait_for_cells(page)
