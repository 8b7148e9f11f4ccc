"""A task: rows from files, the loss on the completion only, and messages that name the file."""
import json

import pytest
import tiny
from datasets import Dataset

from emloc.data import EmlocError, collator, encode_row, encode_rows, find_labels, load_task, load_tokenizer

CHAT = {"prompt": [{"role": "user", "content": "what is a fern"}], "completion": [{"role": "assistant", "content": "a plant"}]}
PLAIN = {"prompt": "a word: fern is a", "completion": " plant"}


def write(file, rows):
    data = Dataset.from_list(rows)
    {".jsonl": data.to_json, ".csv": data.to_csv, ".parquet": data.to_parquet}[file.suffix](str(file))
    return file


def everything(task):
    return [tuple(row.values()) for part in (task.train, task.validation, task.test) for row in part]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_every_row_of_a_file_is_in_exactly_one_split(suffix, tmp_path):
    task = load_task(write(tmp_path / f"rows{suffix}", tiny.rows()), test_rows=8, validation_rows=4)
    assert sorted(everything(task)) == sorted((r["prompt"], r["completion"]) for r in tiny.rows())
    assert (len(task.train), len(task.validation), len(task.test)) == (36, 4, 8)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_folder_keeps_its_splits(suffix, tmp_path):
    rows = tiny.rows()
    parts = {"train": rows[:30], "validation": rows[30:40], "test": rows[40:]}
    for name, part in parts.items(): write(tmp_path / f"{name}{suffix}", part)
    task = load_task(tmp_path)
    assert {name: getattr(task, name).to_list() for name in parts} == parts


def test_a_missing_validation_split_is_taken_from_the_training_rows(tmp_path):
    write(tmp_path / "train.jsonl", tiny.rows()[:40]), write(tmp_path / "test.jsonl", tiny.rows()[40:])
    task = load_task(tmp_path, validation_rows=5)
    assert task.test.to_list() == tiny.rows()[40:]
    assert len(task.validation) == 5 and len(task.train) == 35


def test_the_seed_decides_what_is_set_aside(tmp_path):
    file = write(tmp_path / "rows.jsonl", tiny.rows())
    first, again, other = (load_task(file, test_rows=8, seed=seed).test.to_list() for seed in (0, 0, 1))
    assert first == again != other


def test_messages_become_a_chat_prompt_and_completion(tmp_path):
    file = write(tmp_path / "rows.jsonl", [{"messages": CHAT["prompt"] + CHAT["completion"]}])
    assert load_task(file).train[0] == CHAT


def test_chat_rows_are_kept_as_they_are(tmp_path):
    assert load_task(write(tmp_path / "rows.jsonl", [CHAT])).train[0] == CHAT


def test_other_columns_are_dropped(tmp_path):
    assert load_task(write(tmp_path / "rows.jsonl", [PLAIN | {"source": "book"}])).train.column_names == ["prompt", "completion"]


def test_labels_are_recognised_by_their_repetition(tmp_path):
    assert load_task(write(tmp_path / "rows.jsonl", tiny.rows())).labels == sorted(tiny.KINDS)


def test_free_text_has_no_labels():
    assert find_labels(Dataset.from_list([{"prompt": "p", "completion": f" answer {i}"} for i in range(40)])) is None


def test_given_labels_win(tmp_path):
    assert load_task(write(tmp_path / "rows.jsonl", tiny.rows()), labels=[" tool", " plant"]).labels == [" tool", " plant"]


def test_calibration_is_a_repeatable_sample_of_the_training_rows(task):
    sample = task.calibration(10, seed=3).to_list()
    assert sample == task.calibration(10, seed=3).to_list() != task.calibration(10, seed=4).to_list()
    assert all(row in task.train.to_list() for row in sample) and len(sample) == 10


@pytest.mark.parametrize("row, prompt, answer", [(PLAIN, "a word: fern is a", " plant<eos>"),
                                                 (CHAT, "<|user|>what is a fern<|end|><|assistant|>", "a plant<|end|>")], ids=["plain", "chat"])
def test_the_loss_is_on_the_completion_and_its_end(row, prompt, answer, tokenizer):
    encoded = encode_row(row, tokenizer)
    learned = [i for i in encoded["labels"] if i != -100]
    assert tokenizer.decode(learned) == answer
    assert tokenizer.decode(encoded["input_ids"]) == prompt + answer
    assert encoded["input_ids"][-len(learned):] == learned


def test_the_end_can_be_left_out(tokenizer):
    assert tokenizer.decode([i for i in encode_row(PLAIN, tokenizer, end=False)["labels"] if i >= 0]) == " plant"


def test_truncation_takes_the_beginning_of_the_prompt(tokenizer):
    whole, cut = encode_row(PLAIN, tokenizer), encode_row(PLAIN, tokenizer, max_length=7)
    assert cut["input_ids"] == whole["input_ids"][-7:] and cut["labels"] == whole["labels"][-7:]
    assert [i for i in cut["labels"] if i >= 0] == [i for i in whole["labels"] if i >= 0]


def test_truncation_never_exceeds_the_length(tokenizer):
    long = {"prompt": "a word: fern", "completion": " plant" * 30}
    encoded = encode_row(long, tokenizer, max_length=8)
    assert len(encoded["input_ids"]) == len(encoded["labels"]) == 8 and min(encoded["labels"]) >= 0


def test_batches_are_padded_on_the_right_and_padding_is_not_learned(tokenizer):
    rows = [encode_row(PLAIN, tokenizer), encode_row(tiny.rows()[-1], tokenizer)]
    batch = collator(tokenizer)([dict(r) for r in rows])
    short = len(rows[0]["input_ids"])
    assert batch["input_ids"][0, :short].tolist() == rows[0]["input_ids"]
    assert batch["attention_mask"].sum(1).tolist() == [len(r["input_ids"]) for r in rows]
    assert set(batch["labels"][0, short:].tolist()) == {-100}


def test_encoded_rows_pass_through(task, tokenizer):
    encoded = encode_rows(task.train, tokenizer)
    assert encode_rows(encoded, tokenizer) is encoded


def test_a_tokenizer_without_padding_uses_its_end_token(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).pad_token == "<eos>"


def test_chat_rows_need_a_chat_template(tokenizer):
    plain = tiny.tokenizer()
    plain.chat_template = None
    with pytest.raises(EmlocError, match="chat template"): encode_row(CHAT, plain)


BAD = {
    "a missing completion": ([{"prompt": "p", "answer": "a"}], "completion"),
    "a missing prompt": ([{"text": "p", "completion": "a"}], "prompt"),
    "an empty completion": ([PLAIN, {"prompt": "p", "completion": " "}], "row 2.*empty"),
    "an empty chat completion": ([{"prompt": CHAT["prompt"], "completion": [{"role": "assistant", "content": ""}]}], "empty"),
    "messages that end with the user": ([{"messages": CHAT["prompt"] * 2}], "assistant"),
    "messages of one turn": ([{"messages": CHAT["completion"]}], "messages"),
    "messages that are text": ([{"messages": "user: what is a fern"}], "messages"),
    "an answer without content": ([{"messages": [*CHAT["prompt"], {"role": "assistant", "content": None}]}], "empty|content"),
    "text before a chat": ([{"prompt": "p", "completion": CHAT["completion"]}], "both"),
    "numbers": ([{"prompt": "p", "completion": 3}], "text"),
}

@pytest.mark.parametrize("case", BAD)
def test_bad_rows_are_named(case, tmp_path):
    rows, message = BAD[case]
    with pytest.raises(EmlocError, match=f"my-rows.jsonl.*{message}"): load_task(write(tmp_path / "my-rows.jsonl", rows))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(EmlocError, match="nothing.jsonl"): load_task(tmp_path / "nothing.jsonl")


def test_broken_json_is_named(tmp_path):
    (tmp_path / "broken.jsonl").write_text('{"prompt": "p", "completion": "c"}\n{"prompt": "p", "compl')
    with pytest.raises(EmlocError, match="broken.jsonl"): load_task(tmp_path / "broken.jsonl")


def test_a_file_without_rows_is_named(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(EmlocError, match="empty.jsonl"): load_task(tmp_path / "empty.jsonl")


def test_json_that_is_no_list_of_rows_is_named(tmp_path):
    (tmp_path / "odd.json").write_text(json.dumps([1, 2, 3]))
    with pytest.raises(EmlocError, match="odd.json"): load_task(tmp_path / "odd.json")


def test_a_folder_without_a_train_file_is_named(tmp_path):
    write(tmp_path / "test.jsonl", tiny.rows())
    with pytest.raises(EmlocError, match="no train file"): load_task(tmp_path)


def test_splits_of_different_kinds_are_refused(tmp_path):
    write(tmp_path / "train.jsonl", tiny.rows()), write(tmp_path / "test.csv", tiny.rows())
    with pytest.raises(EmlocError, match="csv.*jsonl"): load_task(tmp_path)


def test_what_is_no_dataset_is_named(offline):
    with pytest.raises(EmlocError, match="nobody/nothing"): load_task("nobody/nothing")


def test_an_empty_training_split_cannot_calibrate(task):
    from emloc.data import Task
    with pytest.raises(EmlocError, match="no training rows"): Task("none", task.train.select([]), task.test, task.test).calibration()


def test_labels_of_chat_rows_are_what_the_assistant_says(tmp_path):
    turns = lambda i: [{"role": "user", "content": f"number {i}"}, {"role": "assistant", "content": ["odd", "even"][i % 2]}]
    file = tmp_path / "chat.jsonl"
    file.write_text("\n".join(json.dumps({"messages": turns(i)}) for i in range(40)))
    assert load_task(file).labels == ["even", "odd"]


@pytest.mark.parametrize("line, words", [('{"prompt": "a", "completion": " b",}', "row 2: not JSON: .* at letter 36"), ("5", "row 2: it must be an object"), ("[1, 2]", "row 2: it must be an object")])
def test_a_line_that_is_no_row_is_named(line, words, tmp_path, caplog):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(PLAIN) + f"\n\n{line}\n")
    with pytest.raises(EmlocError, match=words): load_task(file)
    assert not caplog.records
