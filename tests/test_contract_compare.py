"""A comparison gives every method the same rows, steps and seeds, goes on where it was cut off, and says what share was recovered."""
import json
from dataclasses import replace

import pytest

import emloc.compare
from emloc.adapter import read_adapter
from emloc.cli import main
from emloc.compare import METHODS, Comparison, Setting, comparison_table, share
from emloc.data import EmlocError


@pytest.fixture
def setting(llama): return Setting(str(llama), 0.5, steps=2, batch_size=4, rows=8, calibration=16, seeds=(0, 1), rates=(1e-2, 1e-4))


def test_shares():
    assert share(0.9, 0.5, 0.9) == 1 and share(0.5, 0.5, 0.9) == 0 and share(1.0, 8.0, 1.0) == 1 and share(9.0, 8.0, 1.0) < 0
    assert share(None, 0.5, 0.9) is share(0.7, 0.5, 0.5) is None
    rows = [{"name": "a", "accuracy": None, "nll": n, "accuracy_share": None, "nll_share": n / 2} for n in (1.0, 2.0)]
    assert comparison_table(rows, {"accuracy": None, "nll": 3.0}).splitlines()[-1] == "| a | – | 1.500 (1.000–2.000) | – | 0.750 (0.500–1.000) |"


def test_every_method_with_every_seed_and_nothing_twice(setting, task, tmp_path, monkeypatch):
    found = Comparison(task, tmp_path / "out", setting, say=lambda line: None).run(METHODS)
    assert [(r["name"], r["seed"]) for r in found["rows"]] == [(m.name, s) for s in (0, 1) for m in METHODS]
    assert all(r["nll_share"] == 1 for r in found["rows"] if r["name"] == METHODS[0].name)
    best = {name: min(setting.rates, key=lambda rate: found["scores"][f"0/{folder}-{rate:g} on validation rows"]["nll"]) for name, folder in (("LoRA on the model", "raw-model-0-0"),)}
    assert all(r["rate"] == best[r["name"]] for r in found["rows"] if r["name"] in best)
    polished = next(p for p in (tmp_path / "out" / "1").iterdir() if p.name.endswith("-none-10"))
    assert "polish" in read_adapter(polished).info and read_adapter(polished).info["anchors"] == {"every": 1, "stored": "bfloat16", "again": 25}
    for name in ("train_adapter", "train_on_model", "evaluate_task", "polish_adapter"):
        monkeypatch.setattr(emloc.compare, name, lambda *args, **options: pytest.fail("done twice"))
    monkeypatch.setattr(emloc.compare, "builder", lambda *_: lambda *args, **options: pytest.fail("built twice"))
    assert Comparison(task, tmp_path / "out", setting, say=lambda line: None).run(METHODS) == found
    with pytest.raises(EmlocError, match="another ratio"): Comparison(task, tmp_path / "out", replace(setting, ratio=0.3)).run(METHODS)


def test_mean_shares_of_the_seeds_that_are_known(setting, task, tmp_path):
    comparison, method, rate = Comparison(task, tmp_path / "out", setting), METHODS[5], 1e-2
    def keep(method, seed, accuracy, nll): comparison.known["scores"][comparison.key(comparison.folders(method, seed, rate)[-1])] = {"accuracy": accuracy, "nll": nll}
    comparison.known["scores"][comparison.key(None)] = {"accuracy": 0.5, "nll": 8.0}
    assert comparison.recovered(method, (0, 1, 2), rate) is None
    for seed in (0, 1, 2): keep(METHODS[0], seed, 0.9, 4.0)
    keep(method, 0, 0.9, 5.0)
    keep(method, 1, 0.7, 6.0)
    assert comparison.recovered(method, (0, 1, 2), rate) == {"seeds": 2, "accuracy": pytest.approx(0.75), "nll": pytest.approx(0.625)}
    keep(method, 1, None, 6.0)
    assert comparison.recovered(method, (0, 1), rate) == {"seeds": 2, "accuracy": None, "nll": pytest.approx(0.625)}


def test_seeds_and_rates_can_be_added_and_the_reference_is_never_another_method(setting, task, tmp_path):
    method, first = METHODS[5], replace(setting, seeds=(0,), rates=(1e-2,))
    comparison = Comparison(task, tmp_path / "out", first)
    comparison.begin()
    def keep(method, seed, rate, nll, validation=False): comparison.known["scores"][comparison.key(comparison.folders(method, seed, rate)[-1], validation)] = {"accuracy": None, "nll": nll}
    comparison.known["scores"][comparison.key(None)] = {"accuracy": None, "nll": 8.0}
    keep(method, 0, 1e-2, 6.0)
    assert comparison.rows(METHODS) == [] # nothing to compare with
    keep(METHODS[0], 0, 1e-2, 4.0)
    assert [(r["name"], r["tried"], r["nll_share"]) for r in comparison.rows(METHODS)] == [(METHODS[0].name, 1, 1), (method.name, 1, 0.5)]
    for rate, nll in ((1e-2, 4.0), (1e-4, 3.0)): keep(METHODS[0], 0, rate, nll, validation=True)
    keep(METHODS[0], 0, 1e-4, 3.0)
    comparison.file.write_text(json.dumps(comparison.known))
    later = Comparison(task, tmp_path / "out", replace(setting, seeds=(1, 0), rates=(1e-4, 1e-2)))
    later.begin()
    assert later.known["setting"]["seeds"] == [0, 1] and later.known["setting"]["rates"] == [1e-2, 1e-4]
    both = Comparison(task, tmp_path / "out", replace(setting, seeds=(0,), rates=(1e-2, 1e-4)))
    both.begin()
    rows = both.rows(METHODS)
    assert [(r["name"], r["rate"], r["tried"], r["nll_share"]) for r in rows] == [(METHODS[0].name, 1e-4, 2, 1), (method.name, 1e-2, 1, pytest.approx(0.4))]
    assert f"| {method.name} (learning rate 0.01, not chosen) |" in comparison_table(rows, {"accuracy": None, "nll": 8.0})


def test_a_folder_of_something_else_is_left_alone(setting, task, tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(EmlocError, match="no comparison"): Comparison(task, tmp_path, setting).run(METHODS)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_the_command(llama, task, tmp_path, capsys):
    task.train.to_json(tmp_path / "rows.jsonl")
    words = ["compare", tmp_path / "rows.jsonl", "--model", llama, "--out", tmp_path / "out", "--ratio", 0.5, "--steps", 2, "--rows", 4, "--seeds", 0, "--json", tmp_path / "found.json", "--methods", "EMLoC", "quantized, anchors in rounds"]
    assert main([*map(str, words), "EMLOC"]) == 2 and "'EMLoC'" in capsys.readouterr().err
    assert main(list(map(str, words))) == 0
    assert "recovered of the NLL" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "found.json").read_text())[str(tmp_path / "rows.jsonl")]["rows"]) == 3
