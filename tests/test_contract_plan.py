"""A plan needs a config and no weights; it adds up, it fits, and it says what would."""
import json
import shutil

import pytest
import tiny

from emloc.cli import main
from emloc.data import EmlocError
from emloc.emulator import build_emulator
from emloc.geometry import GEOMETRIES, bare_model, find_config
from emloc.lowrank import emulator_config, put_pairs
from emloc.model import Checkpoint
from emloc.plan import parse_bytes, plan_memory
from emloc.rank import uniform
from emloc.simulate import extrapolate, highest, training_peaks

SMALL = {"batch_size": 2, "seq_len": 24}


@pytest.mark.parametrize("text, size", [("24GiB", 24 * 2**30), ("24GB", 24e9), ("800 MiB", 800 * 2**20), (12345, 12345), ("1.5kb", 1500)])
def test_sizes(text, size): assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "many", "24 GiBs", "-3GB", "0GiB", "1.2.3GB"])
def test_bad_sizes(text):
    with pytest.raises(EmlocError, match="budget"): parse_bytes(text)


def test_every_family_is_planned_from_its_config_alone(model, family, tmp_path):
    shutil.copyfile(model / "config.json", tmp_path / "config.json")
    plan = plan_memory(tmp_path, ratio=0.5, **SMALL)
    assert [s.name[0] for s in plan.stages] == ["1", "2", "2", "3"] and all(n.peak > 0 for n in [*plan.stages, *plan.rivals])
    assert plan.model_bytes in (Checkpoint(model).nbytes, Checkpoint(model).nbytes // 2) # float32 on disk, and as the config says
    inference, lora, quantised = plan.rivals
    assert quantised.peak < lora.peak > plan.stage(2).peak and inference.peak >= plan.model_bytes
    assert json.loads(json.dumps(plan.report()))["ratio"] == 0.5 and "does not fit" not in repr(plan) and "does not fit" not in plan._repr_html_()


def test_the_emulator_has_the_planned_bytes(llama, task, tmp_path):
    plan = plan_memory(llama, ratio=0.5, **SMALL)
    emulator = build_emulator(llama, task.calibration(), tmp_path / "emulator", plan=plan)
    assert emulator_config(emulator).ranks == plan.ranks and Checkpoint(emulator).nbytes == plan.emulator_bytes


def test_a_deep_model_is_what_its_first_blocks_say():
    from transformers import AutoConfig
    from emloc.model import linear_shapes
    config = AutoConfig.for_model("llama", hidden_size=64, intermediate_size=96, num_hidden_layers=7, num_attention_heads=4, num_key_value_heads=2, vocab_size=128)
    def peaks(blocks):
        config.num_hidden_layers = blocks
        model = bare_model(config)
        put_pairs(model, uniform(linear_shapes(model), 0.3))
        return training_peaks(model, 2, 24)
    full, guess = highest(peaks(7)), highest(extrapolate(peaks, 7))
    assert full[0] == guess[0] and abs(sum(full[1].values()) / sum(guess[1].values()) - 1) < 0.01


def test_checkpointing_batch_and_length_change_the_training():
    peak = lambda **more: plan_memory("SmolLM2-135M", ratio=0.25, **{"batch_size": 2, "seq_len": 256, "completion": 16} | more).stage(2).peak
    assert peak(checkpointing=True) < peak(checkpointing=False) < peak(checkpointing=False, batch_size=4) < peak(checkpointing=False, batch_size=4, completion=None)


def test_the_budget_is_kept_and_used():
    plan = plan_memory("TinyLlama-1.1B", budget="1.5GiB", seq_len=512)
    assert plan.fits and 0.9 * plan.budget < plan.fullest(2).peak <= plan.budget and 0 < plan.ratio < 1


def test_where_the_budget_asks_for_it_fewer_rows_go_through_a_block_together(llama):
    plan = lambda **more: plan_memory(str(llama), ratio=0.5, seq_len=512, again=0, **more)
    few, many = plan(walk_batch=4), plan(walk_batch=16)
    budget = max(few.stage(1).peak, few.stage(3).peak)
    fitted = plan(walk_batch=16, budget=budget)
    assert budget < many.stage(1).peak and many.settings["walk_batch"] == 16
    assert fitted.settings["walk_batch"] == 4 and [s.peak for s in fitted.stages] == [s.peak for s in few.stages]


def test_what_does_not_fit_is_said_with_what_would():
    plan = plan_memory("TinyLlama-1.1B", budget="900MiB", batch_size=8, seq_len=2048, walk_batch=1)
    assert not plan.fits and "2 LoRA on the emulator does not fit" in "\n".join(plan.advice) and "does not fit" in repr(plan) and "does not fit" in plan._repr_html_()


def test_the_promise_38b_on_24_gib():
    plan = plan_memory("InternVL2.5-38B", budget="24GiB", seq_len=2048)
    assert plan.fits and plan.ratio > 0.1 and not plan.rivals[0].fits(plan.budget)
    assert 37e9 < plan.model_bytes / 2 < 39e9


@pytest.mark.parametrize("name, billions", [("SmolLM2-135M", 0.1345), ("SmolLM2-1.7B", 1.711), ("TinyLlama-1.1B", 1.100), ("Qwen2.5-7B", 7.616), ("Qwen2.5-32B", 32.764),
                                            ("Llama-3-8B", 8.030), ("Llama-3-70B", 70.554)])
def test_geometries_have_the_published_number_of_parameters(name, billions):
    assert sum(p.numel() for p in bare_model(*find_config(name)).parameters()) / 1e9 == pytest.approx(billions, rel=1e-3)
    assert name in GEOMETRIES


def test_the_command(llama, tmp_path, capsys):
    assert main(["plan", str(llama), "--ratio", "0.5", "--seq-len", "24", "--json", str(tmp_path / "plan.json")]) == 0
    assert "LoRA on the emulator" in capsys.readouterr().out and json.loads((tmp_path / "plan.json").read_text())["fits"]
    for wrong in (["--budget", "much"], ["--ratio", "3"], ["--seq-len", "0"]):
        assert main(["plan", str(llama), *wrong]) == 2
    assert main(["plan", str(tmp_path / "nowhere")]) == 2


def test_an_emulator_within_a_budget(llama, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in tiny.rows()))
    words = ["emulate", str(llama), str(tmp_path / "rows.jsonl"), "--rows", "20", "--max-length", "32", "--out", str(tmp_path / "emulator")]
    assert main([*words, "--budget", "128MiB", "--json", str(tmp_path / "found.json")]) == 0
    assert (tmp_path / "emulator" / "config.json").is_file()
    assert main([*words[:-1], str(tmp_path / "never"), "--budget", "2MiB"]) == 2 and not (tmp_path / "never").exists()
    assert main([*words[:-1], str(tmp_path / "never"), "--budget", "128MiB", "--ratio", "0.5"]) == 2
