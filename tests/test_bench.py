"""The benches run from one command, and their numbers are what they measured: at tiny sizes."""
import json
import os
import subprocess
import sys

import tiny


def run(*words, folder) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(tiny.ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run([sys.executable, *map(str, words)], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_the_gpu_bench_goes_all_the_way_on_a_cpu(tmp_path):
    run(tiny.ROOT / "bench" / "gpu.py", "--device", "cpu", "--geometry", "tiny", "--out", tmp_path / "runs", "--results", tmp_path / "gpu.json", folder=tmp_path)
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert len(rows) == 8 and all(r["error"] is None and r["seconds"] > 0 and r["peak_bytes"] > 0 for r in rows), rows
    assert (tmp_path / "runs" / "merged" / "config.json").is_file()
