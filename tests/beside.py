"""Notebooks that run in a process of their own while other tests do: most of both leave one of two cores idle."""
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
QUIET = {"TQDM_DISABLE": "1", "MPLBACKEND": "agg", "TRANSFORMERS_VERBOSITY": "error", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
TEST = "test_notebooks_run_from_top_to_bottom"


def sharers() -> tuple: # of lists of paths: of the stages, and the lessons
    "The notebooks that leave results in emloc's cache for each other: one process must run those of a list, one after the other; lessons also want the first that the stages leave."
    code = lambda path: "".join("".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code")
    found = [p for p in NOTEBOOKS if "cache_dir() / \"lessons\"" in code(p)]
    return [p for p in found if p.parent.name != "tutorials"], [p for p in found if p.parent.name == "tutorials"]


class Running:
    "`nbdev_test` on some notebooks."

    def __init__(self, notebooks: list):
        names = "|".join(re.escape(p.name) for p in notebooks)
        self.said = tempfile.TemporaryFile("w+")
        words = [str(Path(sys.executable).parent / "nbdev_test"), "--n_workers", "1", "--do_print", "--file_re", f"^({names})$"]
        self.process = subprocess.Popen(words, cwd=ROOT, stdout=self.said, stderr=subprocess.STDOUT, env=os.environ | QUIET, start_new_session=True, preexec_fn=lambda: os.nice(5))
        self.expected = len(notebooks)

    def wait(self):
        "Until all have run; an error if one failed, or if some did not run."
        status = self.process.wait()
        self.said.seek(0)
        text = self.said.read()
        assert status == 0, text[-12000:]
        assert text.count("- Completed ") == self.expected, text[-3000:]

    def passed(self, name: str):
        "Until this notebook has run, or the process is over."
        words = re.compile(rf"Completed \S*/{re.escape(name)}".encode())
        while self.process.poll() is None and not words.search(os.pread(self.said.fileno(), 2**30, 0)): time.sleep(1) # pread leaves alone the position at which the process writes

    def stop(self):
        if self.process.poll() is None: os.killpg(self.process.pid, signal.SIGKILL)


started = []


def start(notebooks: list) -> Running:
    "They run until they are waited for, or stopped."
    started.append(Running(notebooks))
    return started[-1]


def stop_all():
    for running in started: running.stop()
