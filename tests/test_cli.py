"""The commands, as a person types them: on the demo's shape of data and on tiny models."""
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml

from emloc import commands, demo
from emloc.cli import main
from emloc.commands import settle_renewal
from emloc.emulator import build_emulator
from emloc.lowrank import emulator_config


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    file = tmp_path_factory.mktemp("rows") / "colours.jsonl"
    words = ["red", "green"]
    file.write_text("\n".join(json.dumps({"prompt": f"number {i} colour", "completion": f" {words[i % 2]}"}) for i in range(60)))
    return file


@pytest.fixture(scope="module")
def stages(tmp_path_factory, rows, llama):
    "Every stage once, through the command line."
    out = tmp_path_factory.mktemp("stages")
    lines = [["emulate", llama, rows, "--ratio", "0.5", "--rows", "20"], ["finetune", out / "emulate", rows, "--steps", "4", "--rank", "2", "--targets", "q_proj", "down_proj"],
             ["correct", out / "finetune", "--emulator", out / "emulate", "--model", llama, "--task", rows], ["merge", llama, out / "correct"]]
    for words in lines:
        assert main([*map(str, words), "--out", str(out / words[0]), "--json", str(out / f"{words[0]}.json")]) == 0
    return out


def test_each_command_writes_what_it_says(stages):
    for name in ("emulate", "finetune", "correct", "merge"):
        assert (stages / name / "config.json").is_file() or (stages / name / "adapter_config.json").is_file()
        assert json.loads((stages / f"{name}.json").read_text())
    assert 0 < json.loads((stages / "emulate.json").read_text())["share"] < 1
    assert json.loads((stages / "correct.json").read_text())["asked"] == "auto"


def test_evaluate_tells_the_merged_model_from_the_plain_one(stages, llama, rows, capsys, tmp_path):
    scores = {}
    for name, words in {"plain": [llama], "adapter": [llama, "--adapter", stages / "correct"], "merged": [stages / "merge"]}.items():
        file = tmp_path / f"{name}.json"
        assert main(["evaluate", str(words[0]), str(rows), *map(str, words[1:]), "--json", str(file)]) == 0
        scores[name] = json.loads(file.read_text())["nll"]
    assert scores["adapter"] == pytest.approx(scores["merged"], abs=1e-4)
    assert abs(scores["adapter"] - scores["plain"]) > 1e-4


def test_run_goes_through_all_stages_and_keeps_what_is_there(tmp_path, rows, llama, capsys):
    config = {"model": str(llama), "task": str(rows), "out": str(tmp_path / "run"), "emulate": {"ratio": 0.5, "rows": 20},
              "finetune": {"steps": 2, "targets": ["q_proj"], "rslora": True, "alpha_pattern": {"q_proj": 4}}, "correct": {"mode": "gram"}, "polish": {"steps": 1, "rows": 4}, "merge": True, "evaluate": {"rows": 8}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert main(["run", str(tmp_path / "config.yaml"), "--json", str(tmp_path / "first.json")]) == 0
    result = json.loads((tmp_path / "first.json").read_text())
    assert result["correct"]["mode"] == "gram" and result["evaluate"]["rows"] == 8
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert result["polish"]["first_loss"] > 0
    assert main(["run", str(tmp_path / "config.yaml"), "--json", str(tmp_path / "second.json")]) == 0
    assert set(json.loads((tmp_path / "second.json").read_text())["finetune"]) == {"kept"}


BAD = {
    "unknown model": ["emulate", "no/such/place/model", "ROWS"],
    "ratio above one": ["emulate", "MODEL", "ROWS", "--ratio", "1.5"],
    "ratio zero": ["emulate", "MODEL", "ROWS", "--ratio", "0"],
    "bits by gradients of factors": ["emulate", "MODEL", "ROWS", "--form", "lowrank", "--bits", "gradients"],
    "no such rows": ["emulate", "MODEL", "nowhere.jsonl"],
    "missing columns": ["emulate", "MODEL", "WRONG"],
    "no rows": ["emulate", "MODEL", "EMPTY"],
    "a model instead of an emulator": ["finetune", "MODEL", "ROWS"],
    "target that matches nothing": ["finetune", "EMULATOR", "ROWS", "--targets", "query"],
    "bad pattern": ["finetune", "EMULATOR", "ROWS", "--rank-pattern", "q_proj"],
    "nothing to resume": ["finetune", "EMULATOR", "ROWS", "--resume"],
    "corrected twice": ["correct", "CORRECTED", "--emulator", "EMULATOR", "--model", "MODEL", "--mode", "none"],
    "gram without rows": ["correct", "RAW", "--emulator", "EMULATOR", "--model", "MODEL", "--mode", "gram"],
    "another model": ["correct", "RAW", "--emulator", "EMULATOR", "--model", "OTHER", "--mode", "none"],
    "merge of a raw adapter": ["merge", "MODEL", "RAW"],
    "adapter that is not there": ["merge", "MODEL", "nowhere"],
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_exit_code_2_and_leaves_nothing(case, stages, rows, llama, models, tmp_path, capsys):
    (tmp_path / "wrong.csv").write_text("question,answer\nwhy,because\n")
    (tmp_path / "empty.jsonl").write_text("")
    names = {"MODEL": llama, "OTHER": models["qwen3"], "ROWS": rows, "WRONG": tmp_path / "wrong.csv", "EMPTY": tmp_path / "empty.jsonl",
             "EMULATOR": stages / "emulate", "RAW": stages / "finetune", "CORRECTED": stages / "correct"}
    before = sorted(p.name for p in tmp_path.iterdir())
    assert main([str(names.get(w, w)) for w in BAD[case]] + ["--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"emloc {BAD[case][0]}: ") and len(error) > 30
    assert sorted(p.name for p in tmp_path.iterdir()) == before


@pytest.mark.parametrize("text", ["task: x", "model: [", "task: x\nout: y\nemulat: {}", "task: bbc\nout: y\nfinetune: {rnak: 3}"])
def test_a_bad_config_is_refused_before_anything_runs(text, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(text)
    try: code = main(["run", str(tmp_path / "c.yaml")])
    except SystemExit as stop: code = stop.code
    assert code == 2
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


def test_an_output_that_exists_is_not_overwritten(stages, rows, llama, capsys):
    assert main(["emulate", str(llama), str(rows), "--out", str(stages / "emulate")]) == 2
    assert "already" in capsys.readouterr().err


def test_the_module_is_a_program():
    done = subprocess.run([sys.executable, "-m", "emloc.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "finetune" in done.stdout


def test_bits_go_where_the_gradients_need_them_by_default_where_there_are_few(rows, llama, tmp_path):
    def built(name, *more):
        assert main(["emulate", str(llama), str(rows), "--rows", "20", *more, "--out", str(tmp_path / name)]) == 0
        found = emulator_config(tmp_path / name)
        return found.metric, len(set(found.bits.values())) > 1
    assert built("small", "--ratio", "0.12") == ("fisher", True) and {p.name for p in tmp_path.iterdir()} == {"small"}
    assert built("asked", "--ratio", "0.2", "--bits", "gradients") == ("activation", True)
    assert built("plain", "--ratio", "0.2") == ("activation", False) == built("small and plain", "--ratio", "0.12", "--metric", "activation", "--bits", "even")


def test_a_budget_and_bits_by_gradients_go_together(rows, llama, tmp_path, capsys):
    assert main(["emulate", str(llama), str(rows), "--budget", "512MiB", "--max-length", "64", "--rows", "20", "--bits", "gradients", "--out", str(tmp_path / "emulator")]) == 0
    assert "the largest ratio that fits 512MiB" in capsys.readouterr().out and {p.name for p in tmp_path.iterdir()} == {"emulator"}
    assert main(["plan", str(llama), "--ratio", "0.15", "--bits", "gradients", "--seq-len", "64"]) == 0
    assert "bits by gradients" in capsys.readouterr().out


@pytest.mark.parametrize("left, said, largest, settled", [ # the ratio that a budget leaves; what was asked for; of new emulators and of one, what fits
    (0.2, {}, {1: 0.2, 0: 0.2}, ("activation", "even", 0)), (0.12, {}, {1: 0.1, 0: 0.11}, ("fisher", "gradients", 1)), (0.12, {}, {1: None, 0: 0.11}, ("fisher", "gradients", 0)),
    (0.12, {"metric": "activation", "renew": 2}, {2: 0.1, 0: 0.11}, ("activation", "gradients", 2)), (0.12, {"form": "lowrank"}, {1: 0.1, 0: 0.12}, ("fisher", "even", 0))])
def test_a_budget_that_leaves_few_bits_plans_for_what_they_get(left, said, largest, settled, monkeypatch):
    def planned(model, *, renew, metric, ratio, **_):
        assert ratio is None
        found = left if (metric, renew) == ("activation", 0) else largest[renew]
        return SimpleNamespace(fits=found is not None, ratio=found or 0.25)
    monkeypatch.setattr(commands, "plan_memory", planned)
    args = SimpleNamespace(**{"model": "m", "budget": "1GiB", "ratio": None, "rows": 4, "last_blocks": None, "form": None, "metric": None, "bits": None} | said)
    found = commands.settled_plan(args)
    assert found.fits and found.ratio == largest[args.renew] and (args.metric, args.bits, args.renew) == settled


@pytest.mark.parametrize("ratio, paper, wanted", [(0.25, False, ("quantized", "even", "activation", 0)), (0.1, False, ("quantized", "gradients", "fisher", 1)), (0.1, True, ("lowrank", "even", "activation", None))])
def test_a_demo_of_few_bits_does_what_the_commands_do(ratio, paper, wanted, tmp_path, monkeypatch):
    class Enough(Exception): pass
    seen = []
    def built(form, bits): return lambda model, calibration, path, *, ratio, metric: seen.extend([form, bits, metric])
    def trained(emulator, rows, path, *, args, anchors):
        seen.append(anchors and anchors.renew)
        raise Enough
    monkeypatch.setattr(demo, "builder", built)
    monkeypatch.setattr(demo, "train_adapter", trained)
    monkeypatch.setattr(demo, "weight_bytes", lambda path: (1, 1))
    monkeypatch.setattr(demo, "evaluate_task", lambda *_, **__: {"accuracy": 0.5, "nll": 1.0})
    with pytest.raises(Enough): demo.run_demo(tmp_path / "demo", ratio=ratio, paper=paper, say=lambda *_: None)
    assert tuple(seen) == wanted


def test_new_emulators_are_for_rounds(stages, rows, tmp_path, capsys):
    assert main([*map(str, ["finetune", stages / "emulate", rows, "--anchor-again", 0, "--renew", "--out", tmp_path / "raw"])]) == 2
    assert "--renew" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("ratio, last, said, renewed", [(0.14, None, None, 1), (0.16, None, None, 0), (0.14, None, 0, 0), (0.16, None, 2, 2), (0.14, 1, None, 1)])
def test_an_emulator_of_few_bits_is_made_anew_unless_told_otherwise(ratio, last, said, renewed, llama, task, tmp_path):
    emulator = build_emulator(llama, task.calibration(8), tmp_path / "emulator", ratio=ratio, form="quantized", last=last)
    args = SimpleNamespace(emulator=emulator, renew=said)
    settle_renewal(args)
    assert args.renew == renewed


@pytest.mark.parametrize("again, renew", [(0, False), (1, False), (1, True)])
def test_finetune_makes_anchors_once_or_in_rounds(again, renew, stages, rows, llama, tmp_path):
    words = ["finetune", stages / "emulate", rows, "--steps", "2", "--rank", "2", "--anchor-every", "2", "--anchor-again", again, "--out", tmp_path / "raw", *["--renew"] * renew]
    assert main([*map(str, words)]) == 0
    from emloc.adapter import read_adapter
    assert read_adapter(tmp_path / "raw").info["anchors"] == {"every": 2, "stored": "bfloat16"} | ({"again": 1} if again else {}) | ({"renew": 1} if renew else {})
    assert sorted(p.name for p in tmp_path.iterdir()) == (["raw"] if again else ["raw", "raw.anchors"])
