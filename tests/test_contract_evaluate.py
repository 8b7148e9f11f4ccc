"""Accuracy and likelihood are those of one sequence at a time."""
import pytest
import tiny
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from emloc.data import EmlocError, Task, collator, encode_row
from emloc.lowrank import load_emulator
from emloc.evaluate import answer, evaluate_task, needed, sequence_losses
from emloc.finetune import load_adapter

PHRASES = [r["prompt"] for r in tiny.rows()[::5]]
LABELS = {"of one token": [" animal", " plant", " tool"], "of several tokens": [" old shed", " wet otter skin", " big plane"],
          "of different lengths": [" a", " animal farm in the old house", " to"], "that begin alike": [" old", " old shed", " old shed door"]}


def a_task(rows, labels=None):
    rows = Dataset.from_list(rows)
    return Task("tiny", rows, rows, rows, labels)


@pytest.fixture(params=LABELS)
def labels(request): return LABELS[request.param]


@pytest.fixture
def labelled(labels): return a_task([{"prompt": p, "completion": labels[i % 3]} for i, p in enumerate(PHRASES)], labels)


@torch.no_grad()
def naive(model, row, tokenizer): # nats and tokens of a completion, without its end
    encoded = encode_row(row, tokenizer, end=False)
    scores = model(input_ids=torch.tensor([encoded["input_ids"]])).logits[0].log_softmax(-1)
    learned = [i for i, l in enumerate(encoded["labels"]) if l >= 0 and i > 0]
    return -sum(float(scores[i - 1, encoded["input_ids"][i]]) for i in learned), len(learned)


def naive_task(model, task, tokenizer):
    right, losses = 0, []
    for row in task.test:
        costs = [naive(model, answer(row, label), tokenizer) for label in task.labels]
        truth = row["completion"] if isinstance(row["completion"], str) else row["completion"][-1]["content"]
        right += min(range(len(costs)), key=lambda i: costs[i][0]) == task.labels.index(truth)
        losses.append(costs[task.labels.index(truth)])
    return right / len(task.test), sum(l for l, _ in losses) / sum(n for _, n in losses)


def check(result, expected):
    assert result["accuracy"] == expected[0]
    assert result["nll"] == pytest.approx(expected[1], abs=1e-4)


def test_a_classification_is_scored_as_one_sequence_at_a_time(model, labelled, tokenizer):
    check(evaluate_task(model, labelled, batch_size=4), naive_task(tiny.load(model), labelled, tokenizer))


def test_chat_rows_are_scored_as_one_sequence_at_a_time(llama, tokenizer):
    labels = ["plant", "wet otter", "tool"]
    turn = lambda role, text: [{"role": role, "content": text}]
    task = a_task([{"prompt": turn("user", p), "completion": turn("assistant", labels[i % 3])} for i, p in enumerate(PHRASES)], labels)
    check(evaluate_task(llama, task, batch_size=4), naive_task(tiny.load(llama), task, tokenizer))


def test_accuracy_is_neither_all_nor_nothing_here(llama, tokenizer):
    "So that the comparisons above can fail."
    task = a_task([{"prompt": p, "completion": LABELS["of one token"][i % 3]} for i, p in enumerate(PHRASES)], LABELS["of one token"])
    assert 0 < evaluate_task(llama, task)["accuracy"] < 1


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_batch_size_does_not_matter(batch_size, llama, labelled, tokenizer):
    check(evaluate_task(llama, labelled, batch_size=batch_size), naive_task(tiny.load(llama), labelled, tokenizer))


def test_a_loaded_model_scores_as_its_directory(llama, labelled):
    assert evaluate_task(tiny.load(llama), labelled) == evaluate_task(llama, labelled)


def test_an_emulator_is_evaluated_as_one(llama_stages, task, tokenizer):
    check(evaluate_task(llama_stages.emulator, task), naive_task(load_emulator(llama_stages.emulator).eval(), task, tokenizer))


def test_an_adapter_counts(stages, task, tokenizer):
    result = evaluate_task(stages.emulator, task, stages.raw)
    check(result, naive_task(load_adapter(load_emulator(stages.emulator), stages.raw).eval(), task, tokenizer))
    assert abs(result["nll"] - evaluate_task(stages.emulator, task)["nll"]) > 1e-2


def test_evaluating_with_an_adapter_leaves_a_loaded_model_as_it_was(llama_stages, task):
    model = tiny.load(llama_stages.model)
    before, names = evaluate_task(model, task), list(model.state_dict())
    evaluate_task(model, task, llama_stages.raw)
    assert evaluate_task(model, task) == before and list(model.state_dict()) == names


def test_only_the_first_rows_count_when_asked(llama, task):
    few = Task("few", task.train, task.validation, task.test.select(range(3)), task.labels)
    assert evaluate_task(llama, task, rows=3) == evaluate_task(llama, few) and evaluate_task(llama, few)["rows"] == 3


@pytest.fixture(scope="module")
def parrot(tmp_path_factory):
    "A model that has learned six answers by heart, and the rows."
    rows = [{"prompt": p, "completion": c} for p, c in zip(PHRASES, [" otter", " a wet fern", " tool", " big old oak", " a", " heron in the house"])]
    torch.manual_seed(0)
    model, tokenizer = LlamaForCausalLM(LlamaConfig(**tiny.COMMON)), tiny.tokenizer()
    batch = collator(tokenizer)([encode_row(row, tokenizer) for row in rows])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("parrot")
    model.save_pretrained(folder), tokenizer.save_pretrained(folder)
    return folder, rows


@pytest.mark.parametrize("wrong", [0, 2, 6])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_free_answers_count_when_they_match_exactly(wrong, batch_size, parrot):
    model, rows = parrot
    rows = [row | {"completion": row["completion"] + (" plane" if i < wrong else "")} for i, row in enumerate(rows)]
    assert evaluate_task(model, a_task(rows), batch_size=batch_size)["accuracy"] == pytest.approx(1 - wrong / 6)


def test_the_likelihood_of_free_answers_is_that_of_one_sequence_at_a_time(parrot, tokenizer):
    costs = [naive(tiny.load(parrot[0]), row, tokenizer) for row in parrot[1]]
    assert evaluate_task(parrot[0], a_task(parrot[1]))["nll"] == pytest.approx(sum(l for l, _ in costs) / sum(n for _, n in costs), abs=1e-4)


def test_an_empty_prompt_is_scored_from_its_second_token(llama, tokenizer):
    rows = [{"prompt": "", "completion": "the old shed behind the house"}, {"prompt": "we saw one", "completion": " otter"}]
    costs = [naive(tiny.load(llama), row, tokenizer) for row in rows]
    assert evaluate_task(llama, a_task(rows))["nll"] == pytest.approx(sum(l for l, _ in costs) / sum(n for _, n in costs), abs=1e-4)


def test_the_same_tokens_cut_in_two_ways_are_two_completions(llama, tokenizer):
    ids = tokenizer("we saw one otter is a").input_ids
    cut = lambda n: {"input_ids": ids, "labels": [-100] * n + ids[n:]}
    together = sequence_losses(tiny.load(llama), tokenizer, [cut(2), cut(4)])
    alone = [sequence_losses(tiny.load(llama), tokenizer, [cut(n)])[0] for n in (2, 4)]
    assert [n for _, n in together] == [len(ids) - 2, len(ids) - 4]
    assert [l for l, _ in together] == pytest.approx([l for l, _ in alone], abs=1e-4)


def test_needed_leaves_out_beginnings_of_others_and_repetitions():
    assert sorted(needed([[1, 2], [1, 2, 3], [1, 2], [2], [1, 3], []])) == [(1, 2, 3), (1, 3), (2,)]


def test_needed_keeps_what_only_shares_a_beginning():
    assert sorted(needed([[1, 2, 3], [1, 2, 4]])) == [(1, 2, 3), (1, 2, 4)]


def test_labels_share_the_forward_passes_of_their_prompt(llama, task, tokenizer):
    "A completion's last token is never read, so labels of one token cost one pass a row."
    model, seen = tiny.load(llama), []
    model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True)
    evaluate_task(model, Task("one", task.train, task.validation, task.test, LABELS["of one token"]))
    assert sum(seen) == len(task.test)


def test_no_test_rows_are_refused(llama, task):
    with pytest.raises(EmlocError, match="no test rows"): evaluate_task(llama, Task("none", task.train, task.test, task.test.select([]), task.labels))


def test_a_completion_that_is_no_label_is_named(llama):
    with pytest.raises(EmlocError, match="stone"): evaluate_task(llama, a_task([{"prompt": "p", "completion": " stone"}], [" plant", " tool"]))


def test_an_adapter_of_another_model_is_refused(make_stages, models, task):
    with pytest.raises(EmlocError, match="another model"): evaluate_task(models["gpt2"], task, make_stages("llama").raw)


def test_a_missing_model_is_named(task):
    with pytest.raises(EmlocError, match="/no/model"): evaluate_task("/no/model", task)
