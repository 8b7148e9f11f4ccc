"""Stage 3: on the whole model the corrected LoRA does what the raw one did on the emulator, and never worse than uncorrected."""
import pytest
import tiny
import torch
from peft import PeftModel

from emloc.adapter import Adapter, read_adapter, write_adapter
from emloc.correct import CANDIDATES, Pieces, beginnings, choose, correct_adapter, correct_lora, judge, orthonormal, project_inputs, right_beginnings
from emloc.data import EmlocError, collator, encode_rows
from emloc.emulator import build_emulator
from emloc.lowrank import emulator_weight, load_emulator
from emloc.evaluate import alignment_report
from emloc.finetune import load_adapter, lora_config, train_adapter, training_args, wrap
from emloc.model import Checkpoint, dense_weight
from emloc.output import Run
from emloc.spectrum import Gram
from emloc.walk import Walk, completion_losses

MODES = ["none", "clamp", "gram"]


class Problem:
    "One layer with everything in float64: W and an emulation of it, a LoRA, real inputs."
    def __init__(self, out=7, in_=9, rank=3, seed=0):
        torch.manual_seed(seed)
        self.W, self.A, self.B = torch.randn(out, in_).double(), torch.randn(rank, in_).double(), torch.randn(out, rank).double()
        self.E = self.W + 0.3 * torch.randn(out, in_).double()
        self.x = torch.randn(60, in_).double() * torch.linspace(0.2, 2, in_).double()
        self.gram = Gram(in_, dtype=torch.float64).add(self.x)

    def correct(self, mode, s=2.0, **options): return correct_lora(self.A, self.B, self.W, self.E, s, mode=mode, gram=self.gram, **options)
    def misalignment(self, A, B, s=2.0): # on the real inputs, squared
        return float(((self.x @ (self.W + s * B @ A - self.E - s * self.B @ self.A).T) ** 2).sum())


@pytest.fixture
def problem(): return Problem()


@pytest.mark.parametrize("rank", [1, 3, 9, 12])
def test_orthonormal_rows_give_the_same_product(rank):
    p = Problem(rank=rank)
    A, B = orthonormal(p.A, p.B)
    k = min(rank, 9)
    assert (A.shape, B.shape) == (p.A.shape, p.B.shape)
    assert torch.allclose(B @ A, p.B @ p.A)
    assert torch.allclose(A[:k] @ A[:k].T, torch.eye(k).double()) and A[k:].abs().sum() == 0


@pytest.mark.parametrize("s", [0.5, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_without_a_limit_inputs_in_the_span_see_the_emulator(s, seed):
    p = Problem(seed=seed)
    A, B = p.correct("clamp", s, limit=1e9)
    x = torch.randn(20, 3).double() @ p.A
    assert torch.allclose(x @ (p.W + s * B @ A).T, x @ (p.E + s * p.B @ p.A).T)


@pytest.mark.parametrize("s", [0.5, 2.0])
def test_gram_on_inputs_in_the_span_sees_the_emulator_too(s, problem):
    problem.gram = Gram(9, dtype=torch.float64).add(torch.randn(20, 3).double() @ problem.A)
    A, B = problem.correct("gram", s)
    x = torch.randn(20, 3).double() @ problem.A
    difference = x @ (problem.W - problem.E).T
    assert (x @ (problem.W + s * B @ A - problem.E - s * problem.B @ problem.A).T).norm() < 1e-2 * difference.norm()


@pytest.mark.parametrize("mode", MODES)
def test_a_perfect_emulator_needs_no_correction(mode, problem):
    problem.E = problem.W
    A, B = problem.correct(mode)
    assert torch.allclose(B @ A, problem.B @ problem.A)


def test_none_is_the_same_product(problem):
    A, B = problem.correct("none")
    assert torch.allclose(B @ A, problem.B @ problem.A)


@pytest.mark.parametrize("mode", MODES)
def test_strength_multiplies_what_is_added(mode, problem):
    (A, B), (A2, B2) = problem.correct(mode), problem.correct(mode, strength=1.4)
    assert torch.allclose(B2 @ A2, 1.4 * B @ A)


@pytest.mark.parametrize("limit", [0.0, 0.1, 0.3, 3.0])
@pytest.mark.parametrize("s", [0.5, 2.0])
def test_clamp_keeps_every_column_within_its_limit(limit, s, problem):
    (_, before), (_, after) = orthonormal(problem.A, problem.B), problem.correct("clamp", s, limit=limit)
    mean = lambda B: (s * B).abs().mean(0)
    needed = ((problem.W - problem.E) @ orthonormal(problem.A, problem.B)[0].T).abs().mean(0)
    assert torch.allclose(mean(before - after), needed.minimum(limit * mean(before)))


def test_clamp_only_scales_the_columns(problem):
    (A, before), (_, after) = orthonormal(problem.A, problem.B), problem.correct("clamp", limit=0.05)
    full = (problem.W - problem.E) @ A.T / 2.0
    ratio = (before - after) / full
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio))
    assert ratio.min() > 0 and ratio.min() < 0.9 and ratio.max() < 1 + 1e-9


def test_clamp_leaves_columns_below_the_limit_alone(problem):
    assert torch.equal(problem.correct("clamp", limit=1e6)[1], problem.correct("clamp", limit=1e9)[1])


def test_clamp_never_revives_a_lora_of_zeros(problem):
    problem.B.zero_()
    assert problem.correct("clamp")[1].abs().max() == 0


def test_gram_is_the_least_squares_solution(problem):
    A, B = problem.correct("gram")
    wanted = problem.x @ (problem.E + 2.0 * problem.B @ problem.A - problem.W).T
    solution = torch.linalg.lstsq(2.0 * problem.x @ A.T, wanted).solution.T
    assert torch.allclose(B, solution, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("seed", range(5))
def test_moving_away_from_gram_is_worse(seed, problem):
    A, B = problem.correct("gram")
    torch.manual_seed(seed)
    assert problem.misalignment(A, B) < problem.misalignment(A, B + 0.02 * torch.randn_like(B))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("mode", ["none", "clamp"])
def test_gram_is_never_worse_than_the_others_on_its_inputs(mode, seed):
    p = Problem(seed=seed)
    assert p.misalignment(*p.correct("gram")) <= p.misalignment(*p.correct(mode)) * (1 + 1e-9)


def test_gram_takes_few_inputs_and_surplus_rank():
    p = Problem(rank=12)
    p.gram = Gram(9, dtype=torch.float64).add(p.x[:2])
    A, B = p.correct("gram")
    assert torch.isfinite(B).all() and p.misalignment(A, B) < float("inf")
    p.x = p.x[:2]
    assert p.misalignment(A, B) <= p.misalignment(*p.correct("none"))


def test_gram_takes_the_matrix_itself(problem):
    expected = problem.correct("gram")[1]
    problem.gram = problem.gram.matrix
    assert torch.equal(problem.correct("gram")[1], expected)


@pytest.mark.parametrize("options, message", [(dict(mode="best"), "mode 'best'"), (dict(mode="auto"), "mode 'auto'"), (dict(mode="none", s=0.0), "scaling 0"),
                                              (dict(mode="none", s=-1.0), "scaling -1")])
def test_what_makes_no_sense_for_one_layer_is_refused(options, message, problem):
    with pytest.raises(EmlocError, match=message): problem.correct(**options)


def test_gram_needs_a_gram(problem):
    problem.gram = None
    with pytest.raises(EmlocError, match="Gram"): problem.correct("gram")


@pytest.fixture
def correct(task, tmp_path):
    "Function (stages, mode, options) -> a corrected adapter."
    def run(stages, mode="gram", out=None, **options):
        options = {"adapter": stages.raw, "emulator": stages.emulator, "model": stages.model, "calibration": task.train} | options
        return correct_adapter(out=out or tmp_path / f"corrected-{mode}", mode=mode, **options)
    return run


LORAS = {"alpha 2": dict(alpha=2), "alpha 16": dict(alpha=16), "rsLoRA": dict(alpha=4, use_rslora=True), "rank pattern": dict(rank_pattern={"up_proj": 6, r".*layers\.0\..*q_proj": 2}),
         "alpha pattern": dict(alpha_pattern={"down_proj": 1, r"^model\.layers\.2.*q_proj": 32}, use_rslora=True)}

@pytest.fixture(params=LORAS)
def trained(request, llama_stages, task, tmp_path):
    "An adapter with this scaling, on the Llama's emulator."
    return train_adapter(llama_stages.emulator, task.train, tmp_path / "raw", lora=lora_config(rank=4, **LORAS[request.param]),
                         args=training_args(tmp_path / "runs", steps=3, lr=1e-2, bf16=False))


def test_the_scaling_of_every_layer_counts(trained, llama_stages, correct):
    "With PEFT's own scaling, inputs in the span of A give the emulator's outputs."
    s = llama_stages
    out = correct(s, "clamp", adapter=trained, limit=1e9)
    emulator, whole = load_adapter(load_emulator(s.emulator), trained), PeftModel.from_pretrained(tiny.load(s.model), out)
    raw = read_adapter(trained)
    assert len({whole.get_submodule(f"base_model.model.{n}").scaling["default"] for n in raw.pairs} | {raw.scaling(n) for n in raw.pairs}) <= 3
    for name, (A, _) in raw.pairs.items():
        x = torch.randn(10, len(A)) @ A
        expected, found = (m.get_submodule(f"base_model.model.{name}")(x) for m in (emulator, whole))
        assert torch.allclose(expected, found, atol=1e-3 * float(expected.abs().max())), name


@pytest.mark.parametrize("mode", [*MODES, "auto"])
def test_every_mode_gives_an_adapter_for_the_whole_model(mode, stages, correct):
    raw, done = read_adapter(stages.raw), read_adapter(correct(stages, mode))
    assert set(done.pairs) == set(raw.pairs)
    assert all(done.pairs[n][0].shape == raw.pairs[n][0].shape and done.pairs[n][1].shape == raw.pairs[n][1].shape for n in raw.pairs)
    assert (done.config.r, done.config.lora_alpha, done.config.base_model_name_or_path) == (raw.config.r, raw.config.lora_alpha, str(stages.model))
    assert done.info["correction"]["asked"] == mode


def test_only_gpt2_weights_are_said_to_be_stored_the_other_way_round(stages, correct):
    assert read_adapter(correct(stages, "none")).config.fan_in_fan_out == (stages.family == "gpt2")


def grams_of(path, rows): # {linear: Gram of its inputs in the whole model}
    grams = {}
    for step in Walk(path, rows):
        for name, linear in step.linears.items(): grams[name] = Gram(dense_weight(linear).shape[1], dtype=torch.float64)
        step.on_inputs(lambda names, x: [grams[n].add(x) for n in names])
        step.run()
    return grams


@pytest.mark.parametrize("mode", MODES)
def test_the_adapter_holds_each_layers_own_correction(mode, stages, correct, task):
    done, raw, grams = read_adapter(correct(stages, mode)), read_adapter(stages.raw), grams_of(stages.model, task.train)
    whole, small = tiny.load(stages.model), Checkpoint(stages.emulator)
    for name, (A, B) in raw.pairs.items():
        A, B = correct_lora(A.double(), B.double(), dense_weight(whole.get_submodule(name)), emulator_weight(small, name), raw.scaling(name), mode=mode, gram=grams[name])
        expected, found = (B @ A).float(), done.pairs[name][1] @ done.pairs[name][0]
        assert tiny.differs(found, expected) < 1e-3 * float(expected.abs().max()), name


def test_a_full_rank_emulator_leaves_the_lora_as_it_was(stages, correct, task, tmp_path):
    ranks = {n: min(B.shape[0], A.shape[1]) for n, (A, B) in read_adapter(stages.raw).pairs.items()}
    emulator = build_emulator(stages.model, task.train, tmp_path / "emulator", ranks=ranks)
    raw = read_adapter(stages.raw)
    for mode in MODES:
        done = read_adapter(correct(stages, mode, emulator=emulator))
        for n, (A, B) in raw.pairs.items(): assert tiny.differs(done.pairs[n][1] @ done.pairs[n][0], B @ A) < 1e-3, (mode, n)


def test_gram_aligns_every_layer_better_than_none(stages, correct, task):
    report = alignment_report(stages.raw, {m: correct(stages, m) for m in MODES}, stages.emulator, stages.model, task.train)
    assert len(report) == len(read_adapter(stages.raw).pairs)
    for layer in report: assert layer["gram"] <= min(layer["none"], layer["clamp"]) * (1 + 1e-4), layer
    assert sum(layer["gram"] for layer in report) < 0.98 * sum(layer["none"] for layer in report)


def test_none_on_the_whole_model_is_the_raw_lora_there(stages, correct):
    raw, done = load_adapter(tiny.load(stages.model), stages.raw), load_adapter(tiny.load(stages.model), correct(stages, "none"))
    assert tiny.differs(tiny.logits(raw), tiny.logits(done)) < 1e-4
    assert tiny.differs(tiny.logits(tiny.load(stages.model)), tiny.logits(done)) > 1e-2


@torch.no_grad()
def nll(path, adapter, rows): # nats per token of the completions and their ends, on the whole model
    model, losses, tokens = PeftModel.from_pretrained(tiny.load(path), adapter).eval(), 0, 0
    for row in encode_rows(rows, tiny.tokenizer()):
        batch = collator(tiny.tokenizer())([dict(row)])
        loss, count = completion_losses(model(input_ids=batch["input_ids"]).logits, batch["labels"])
        losses, tokens = losses + float(loss), tokens + int(count)
    return losses / tokens


def test_candidates_are_judged_as_peft_would_run_them(stages, correct, task, tmp_path):
    candidates = [("none", 1.0), ("clamp", 1.0), ("gram", 1.4), ("gram", 2.0)]
    pieces = Pieces(read_adapter(stages.raw), stages.emulator, Checkpoint(stages.model))
    with Run(tmp_path / "run", {}) as run:
        project_inputs(pieces, task.train, run)
        scores = judge(pieces, candidates, task.validation, 3.0, run, batch_size=3)
    for (mode, strength), score in zip(candidates, scores):
        out = correct(stages, mode, out=tmp_path / f"{mode}-{strength}", strength=strength)
        assert (score["mode"], score["strength"]) == (mode, strength)
        assert score["nll"] == pytest.approx(nll(stages.model, out, task.validation), abs=1e-4), (mode, strength)
    assert max(s["nll"] for s in scores) - min(s["nll"] for s in scores) > 1e-3


def test_auto_takes_the_best_candidate_and_none_is_one(stages, correct, task):
    record = read_adapter(correct(stages, "auto", held_out=task.validation)).info["correction"]
    assert [(c["mode"], c["strength"]) for c in record["candidates"]] == CANDIDATES and ("none", 1.0) in CANDIDATES
    best = choose(record["candidates"])
    assert (record["mode"], record["strength"]) == (best["mode"], best["strength"])


def test_what_auto_wrote_scores_what_it_says_and_no_worse_than_none(stages, correct, task):
    out, none = correct(stages, "auto", held_out=task.validation), correct(stages, "none")
    stated = choose(read_adapter(out).info["correction"]["candidates"])["nll"]
    assert nll(stages.model, out, task.validation) == pytest.approx(stated, abs=1e-4)
    assert stated <= nll(stages.model, none, task.validation) + 1e-4


def test_auto_without_held_out_rows_judges_on_a_quarter_of_the_calibration(llama_stages, correct, task):
    out = correct(llama_stages, "auto")
    stated = choose(read_adapter(out).info["correction"]["candidates"])["nll"]
    assert nll(llama_stages.model, out, task.train.select(range(9))) == pytest.approx(stated, abs=1e-4)


def test_a_lower_loss_does_not_buy_wrong_answers():
    none, strong, good = ({"mode": m, "strength": k, "nll": n, "accuracy": a} for m, k, n, a in (("none", 1.0, 3.0, 0.8), ("gram", 2.0, 1.0, 0.7), ("gram", 1.4, 2.0, 0.8)))
    assert choose([none, strong, good]) == good
    assert choose([none, strong]) == none


def test_beginnings_are_ranked_among_those_that_occur():
    logits, labels = torch.zeros(10, 3, 6), torch.full((10, 4), -100)
    labels[:, 2] = torch.tensor([1, 2] * 5)
    labels[:, 3] = 5
    logits[:, 0, 4] = 9.0 # the favourite is no label
    logits[:, 0, 1] = 1.0 # and among the labels, always the first
    first, truth = beginnings(logits, labels)
    assert truth.tolist() == [1, 2] * 5 and right_beginnings(first, truth) == 0.5
    assert right_beginnings(first, torch.arange(10) % 6) == pytest.approx(0.1) # too many to be labels: the favourite counts, and row 4 has it


def test_the_raw_adapter_and_the_emulator_stay_as_they_are(llama_stages, correct):
    before = [tiny.contents(p) for p in (llama_stages.raw, llama_stages.emulator, llama_stages.model)]
    correct(llama_stages, "auto")
    assert [tiny.contents(p) for p in (llama_stages.raw, llama_stages.emulator, llama_stages.model)] == before


def test_the_record_says_what_was_done(llama_stages, correct):
    record = read_adapter(correct(llama_stages, "clamp", limit=0.3, strength=1.4)).info["correction"]
    assert (record["mode"], record["limit"], record["strength"]) == ("clamp", 0.3, 1.4)


def test_an_adapter_is_not_corrected_twice(llama_stages, correct, tmp_path):
    with pytest.raises(EmlocError, match="corrected already"): correct(llama_stages, adapter=correct(llama_stages, "none"), out=tmp_path / "again")


def test_an_adapter_that_peft_saved_is_corrected_and_then_belongs_to_its_model(llama_stages, correct, tmp_path):
    wrap(load_emulator(llama_stages.emulator)).save_pretrained(tmp_path / "plain")
    info = read_adapter(correct(llama_stages, adapter=tmp_path / "plain")).info
    assert info["model_fingerprint"] == Checkpoint(llama_stages.model).fingerprint()


@pytest.fixture
def other_emulator(other_model, task, tmp_path_factory):
    return build_emulator(other_model, task.train.select(range(12)), tmp_path_factory.mktemp("other") / "emulator", ratio=0.5)


def test_what_does_not_belong_together_is_refused_and_nothing_is_written(llama_stages, make_stages, other_model, other_emulator, correct, tmp_path):
    gpt2 = make_stages("gpt2")
    for wrong in (dict(model=other_model), dict(emulator=other_emulator), dict(emulator=other_emulator, model=other_model),
                  dict(adapter=gpt2.raw), dict(emulator=gpt2.emulator), dict(emulator=gpt2.emulator, model=gpt2.model)):
        with pytest.raises(EmlocError, match="another model"): correct(llama_stages, "none", **wrong)
    assert list(tmp_path.iterdir()) == []


REFUSED = {"an unknown mode": (dict(mode="best"), "mode 'best'"), "no calibration": (dict(calibration=None), "calibration rows"),
           "no calibration for auto": (dict(mode="auto", calibration=None), "calibration rows"), "a missing adapter": (dict(adapter="/no/adapter"), "/no/adapter"),
           "a missing emulator": (dict(emulator="/no/emulator"), "/no/emulator"), "a missing model": (dict(model="/no/model"), "/no/model")}

@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused_and_nothing_is_written(case, llama_stages, correct, tmp_path):
    options, message = REFUSED[case]
    with pytest.raises(EmlocError, match=message): correct(llama_stages, **options)
    assert list(tmp_path.iterdir()) == []


def test_three_calibration_rows_are_too_few(llama_stages, correct, task):
    with pytest.raises(EmlocError, match="has 3"): correct(llama_stages, calibration=task.train.select(range(3)))


def test_a_model_with_bad_weights_leaves_nothing(llama_stages, correct, task, tmp_path):
    "Found while the calibration rows walk through the model."
    bad = tiny.damaged(llama_stages.model, tmp_path / "bad", with_nan_at_the_end("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(EmlocError, match="model.layers.1.mlp.up_proj"): correct(llama_stages, "auto", model=bad)
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


def with_nan_at_the_end(name): # beyond what the fingerprint looks at
    def change(tensors):
        tensors[name].view(-1)[-1] = float("nan")
        return tensors
    return change


def test_a_place_in_use_is_refused(llama_stages, correct, tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(EmlocError, match="already"): correct(llama_stages, "none", out=tmp_path)


@pytest.mark.parametrize("mode", ["clamp", "none"])
def test_a_bad_weight_is_never_written_into_an_adapter(mode, llama_stages, correct, tmp_path):
    bad = tiny.damaged(llama_stages.model, tmp_path / "bad", with_nan_at_the_end("model.layers.1.mlp.up_proj.weight"))
    try: done = read_adapter(correct(llama_stages, mode, model=bad, calibration=None))
    except EmlocError as error: assert "model.layers.1.mlp.up_proj" in str(error)
    else: assert all(torch.isfinite(B).all() for _, B in done.pairs.values())


def test_an_adapter_survives_writing_and_reading(llama_stages, tmp_path):
    raw = read_adapter(llama_stages.raw)
    write_adapter(Adapter(raw.config, raw.pairs, raw.info | {"note": "é"}), tmp_path)
    again = read_adapter(tmp_path)
    assert again.info == raw.info | {"note": "é"} and again.config.to_dict() == raw.config.to_dict()
    assert all(torch.equal(a, b) for n in raw.pairs for a, b in zip(raw.pairs[n], again.pairs[n]))
