"""The built-in tasks: real text of four kinds, the same rows every time, and a missing package is named."""
from pathlib import Path

import pytest
import tiny

from emloc import tasks
from emloc.data import BUILT_IN, EmlocError, load_task
from emloc.evaluate import evaluate_task


def test_words_and_their_forms():
    rows = tasks.inflect_rows()
    assert len(rows) == 3000 and rows[:] == tasks.inflect_rows()[:]
    known = {row["prompt"]: row["completion"] for row in tasks.inflect_rows(10 ** 4)}
    assert len(known) == 10 ** 4
    task = load_task("inflect")
    assert task.labels is None and not set(task.train["prompt"]) & set(task.test["prompt"])


def test_the_language_reference_is_text_without_prompts(llama):
    task = load_task("python")
    assert set(task.train["prompt"]) == {""} and task.labels is None and len(task.train) > 500
    score = evaluate_task(llama, task, rows=3)
    assert score["accuracy"] is None and score["nll"] > 0


def test_nouns_by_their_kind(tmp_path, monkeypatch):
    line = "{:08d} {:02d} n 01 {}_{} 0 001 @ 00000001 n 0000 | what one calls a {} of this kind; \"an example\"  \n"
    (tmp_path / "data.noun").write_text("  1 licence\n" + "".join(line.format(i, number, name, i, name) for number, name in tasks.KINDS.items() for i in range(4)))
    monkeypatch.setenv("WNSEARCHDIR", str(tmp_path))
    rows = tasks.wordnet_rows(each=3)
    assert len(rows) == 45 and set(rows["completion"]) == {f" {kind}" for kind in tasks.KINDS.values()}
    assert all(row["prompt"].startswith(row["completion"].strip()) and '"' not in row["prompt"] for row in rows)


def test_a_missing_source_is_named_with_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    with pytest.raises(EmlocError, match="pip install lemminflect"): load_task("inflect")
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    with pytest.raises(EmlocError, match="wordnet-base"): load_task("wordnet")


def test_another_task_can_be_added(monkeypatch):
    from datasets import Dataset
    monkeypatch.setitem(BUILT_IN, "mine", lambda: Dataset.from_list(tiny.rows()))
    assert load_task("mine", test_rows=8, validation_rows=4).name == "mine"
