"""The sweep over transformers' generating classes: its judge finds what is wrong, and some forty classes agree."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch

from simctg_fast.cpu import modules
from simctg_fast.decoding import trial
from simctg_fast.ops import _backends

from ..decoding_models import build, decode, inputs_for
from ..processes import run_child
from ..repository import repository

BENCHMARKS = repository("benchmarks")
sys.path.insert(0, str(BENCHMARKS))

import zoo  # noqa: E402
from zoo_sweep import build as small  # noqa: E402
from zoo_sweep import engine, inputs, judge, run  # noqa: E402
from zoo_sweep.classes import enters_generate, find, generating_classes  # noqa: E402

NEW = 8


def judged(model, given, tokens):
    double, double_inputs = judge.double_of(model, given)
    return judge.regret(judge.trace(double, double_inputs, tokens), tokens)


@pytest.fixture(scope="module", params=["llama", "t5"])
def decoded(request):
    model = build(request.param)
    given = inputs_for(model, 2, 11)
    return model, given, decode(model, given, new_tokens=NEW)[:, -NEW:]


def test_our_tokens_are_the_best_ones(decoded):
    assert float(judged(*decoded).max()) < 1e-4


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("column", [0, 3, NEW - 1])
def test_a_wrong_token_is_found_where_it_is(decoded, row, column):
    model, given, tokens = decoded
    double, double_inputs = judge.double_of(model, given)
    step = judge.trace(double, double_inputs, tokens)[column]
    for wrong in (step.ids[row, :4].tolist(), [int(step.logits[row].argmin())]):
        for token in wrong:
            if token == int(tokens[row, column]):
                continue
            changed = tokens.clone()
            changed[row, column] = token
            lost = judged(model, given, changed)
            assert float(lost[row, column]) > 1e-3
            assert float(lost[1 - row].max()) < 1e-4
            assert float(lost[row, :column].sum()) < 1e-3


def test_rows_in_each_others_place_are_found(decoded):
    model, given, tokens = decoded
    assert float(judged(model, given, tokens.flip(0)).max()) > 1e-2


def test_a_window_that_is_not_honoured_is_found():
    """Tokens of the same weights without the window."""
    model = build("mistral")
    given = inputs_for(model, 2, 11)
    wide = copy.deepcopy(model)
    wide.config.sliding_window = None
    for layer in wide.model.layers:
        layer.self_attn.sliding_window = None
    tokens = decode(wide, given, new_tokens=NEW)[:, -NEW:]
    assert float(judged(model, given, tokens).max()) > 1e-2
    assert float(judged(model, given, decode(model, given, new_tokens=NEW)[:, -NEW:]).max()) < 1e-4


def test_padding_that_is_not_honoured_is_found(decoded):
    model, given, _ = decoded
    blind = given | {"attention_mask": torch.ones_like(given["attention_mask"])}
    tokens = decode(model, blind, new_tokens=NEW)[:, -NEW:]
    assert float(judged(model, given, tokens).max()) > 1e-3


def test_what_generate_bans_is_no_candidate(decoded):
    model, given, tokens = decoded
    banned = copy.deepcopy(model)
    banned.generation_config.suppress_tokens = tokens[:, 0].tolist()
    assert float(judged(banned, given, tokens)[:, 0].min()) == float("inf")
    assert float(judged(banned, given, decode(banned, given, new_tokens=NEW)[:, -NEW:]).max()) < 1e-4


def test_what_modules_hold_does_not_reach_the_next_candidate(monkeypatch):
    """RecurrentGemma's state lives in its modules, where no copy of a cache reaches it."""
    model = small.build(find("RecurrentGemmaForCausalLM"))
    run.settle(model)
    given = inputs.text(1)
    tokens = decode(model, given, path="uncached", new_tokens=4)[:, -4:]
    assert float(judged(model, given, tokens).max()) < 1e-4
    monkeypatch.setattr(judge._Walk, "_held", lambda self: [])
    assert float(judged(model, given, tokens).max()) > 1e-3


def test_the_judge_is_no_part_of_what_it_judges():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from zoo_sweep import judge;"
        "print([m for m in sys.modules if m.startswith('simctg_fast.decoding')])"
    )
    out = run_child([sys.executable, "-c", code, str(BENCHMARKS)], check=True)
    assert out.stdout.strip() == "[]"


def test_classes_are_found_by_looking():
    names = generating_classes()
    assert {"LlamaForCausalLM", "T5ForConditionalGeneration", "WhisperForConditionalGeneration"} <= set(names)
    assert "BertForMaskedLM" not in names
    assert find("LlamaForCausalLM").__name__ == "LlamaForCausalLM"


def test_a_loop_of_its_own_is_seen():
    assert not enters_generate(find("ParakeetForCTC"))
    for name in ("LlamaForCausalLM", "BlipForConditionalGeneration", "WhisperForConditionalGeneration"):
        assert enters_generate(find(name))


def test_placeholders_of_images_and_sounds_are_found():
    config = find("Qwen2VLForConditionalGeneration").config_class
    found = config(image_token_id=90, video_token_id=91, vision_start_token_id=80, vision_end_token_id=82)
    assert inputs.placeholders(found) == [80, 82, 90, 91]
    assert inputs.placeholders(build("llama").config) == []


def test_a_row_of_the_engine_that_is_not_its_prompts_is_found(monkeypatch):
    model = build("llama")
    assert run.in_the_engine(model)["faults"] == []
    written = engine.written

    def mixed(model, slots):
        batching, rows, reason = written(model, slots)
        return batching, rows if slots == 1 else rows[::-1], reason

    monkeypatch.setattr(engine, "written", mixed)
    faults = run.in_the_engine(model)["faults"]
    assert len(faults) == 1
    assert "slots=2" in faults[0]
    assert "prompt 0" in faults[0]


NARROW = [torch.bfloat16, torch.float16]


def narrow(name, dtype):
    model = small.build(find(name), dtype=dtype)
    run.settle(model)
    return model


@pytest.mark.parametrize(
    ("name", "dtype"), [("OPTForCausalLM", torch.bfloat16), ("T5ForConditionalGeneration", torch.float16)]
)
def test_16_bits_agree(name, dtype):
    record = run.one_class(name, dtype)
    assert record["status"] == "agrees", record["faults"]
    for case in record["cases"].values():
        assert 0 < case["own_error"] < 0.1
        assert case["of_own"] < 1.5


def test_16_bits_are_loaded_as_checkpoints_are():
    model = narrow("T5ForConditionalGeneration", torch.float16)
    assert {p.dtype for n, p in model.named_parameters() if ".wo." in n} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if ".wo." not in n} == {torch.float16}
    model = narrow("LlamaForCausalLM", torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def without_bias(x, weight, bias, *rest):
    return x, weight, None, *rest


def garbage(x, weight, bias, *rest):
    return x.flip(-1), weight, bias, *rest


FAST = ((torch.bfloat16, without_bias, False), (torch.float16, garbage, True))


@pytest.mark.skipif(_backends.extension() is None, reason="the C++ extension is not built")
@pytest.mark.parametrize(
    ("dtype", "mutation", "tried"),
    [
        pytest.param(dtype, mutation, tried, marks=() if (dtype, mutation, tried) in FAST else pytest.mark.full)
        for dtype in NARROW
        for mutation in (without_bias, garbage)
        for tried in (True, False)
    ],
)
def test_one_wrong_layer_of_16_bits_is_found(dtype, mutation, tried, monkeypatch):
    """Whether the trial refuses the path that it opens in float32, or lets it pass."""
    model, original = narrow("OPTForCausalLM", dtype), modules.run_kernel
    wrong = model.model.decoder.layers[1].fc1.weight

    def run_kernel(x, weight, *rest):
        is_it = weight.dtype == dtype and weight.shape == wrong.shape and torch.equal(weight, wrong)
        return original(*mutation(x, weight, *rest) if is_it else (x, weight, *rest))

    monkeypatch.setattr(modules, "run_kernel", run_kernel)
    if not tried:
        monkeypatch.setattr(trial, "check_close", lambda *args: None)
    case = run.one_case(model, "text", 1)
    assert case["status"] == "fault"
    assert any("logits off by" in fault for fault in case["faults"])
    assert ("shared_prefix in float32, not here" in case["faults"][0]) == tried


def test_16_bits_that_overflow_themselves_are_rough():
    """LongT5's own mask of a padded block is one of -inf alone."""
    model = narrow("LongT5ForConditionalGeneration", torch.float16)
    case = run.one_case(model, "text", 2)
    assert case["status"] == "rough"
    assert "its own modules overflow (NaN in row 1 by greedy search)" in case["note"]
    assert case["faults"] == []


@pytest.mark.skipif(_backends.extension() is None, reason="the C++ extension is not built")
@pytest.mark.parametrize("name", ["LongT5ForConditionalGeneration", "OPTForCausalLM"])
def test_a_nan_that_is_ours_alone_is_a_fault(name, monkeypatch):
    """In a model of finite numbers, and in a row of which they are while the other's are not."""
    model, original = narrow(name, torch.float16), modules.run_kernel

    def run_kernel(x, weight, *rest):
        y = original(x, weight, *rest)
        return torch.full_like(y, torch.nan) if weight.dtype == torch.float16 else y

    monkeypatch.setattr(modules, "run_kernel", run_kernel)
    monkeypatch.setattr(trial, "check_close", lambda *args: None)
    case = run.one_case(model, "text", 2)
    assert case["status"] == "fault"
    assert any("no numbers where its own modules have some" in fault for fault in case["faults"])


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_some_forty_classes_agree_in_16_bits(dtype, tmp_path):
    """But for what their own modules make of rounding: experts, and keys that a sparse attention chooses."""
    records = sweep(tmp_path, "--dtype", dtype)
    assert {record["status"] for record in records} <= {"agrees", "refused", "rough"}
    assert sum(record["status"] == "rough" for record in records) <= 4


def test_the_page_says_why():
    agrees = {"architecture": "a", "status": "agrees", "path": "shared_prefix", "reason": "one copy", "faults": []}
    text = {"status": "agrees", "path": "shared_prefix"}
    records = [
        agrees | {"class": "A1", "cases": {"text 1": text}, "engine": {"batching": "slots", "reason": "tried"}},
        agrees | {"class": "A2", "cases": {"text 1": text}, "engine": {"batching": "slots", "reason": "tried"}},
        agrees
        | {"class": "B", "architecture": "b", "path": "reorder", "reason": "a copy a row; not shared_prefix: a | b"}
        | {"cases": {"text 1": text}, "own_differs": ["0.5", "0.25"]},
        agrees | {"class": "C", "architecture": "c", "status": "own loop", "path": "", "reason": "its own"},
        agrees | {"class": "D", "architecture": "d", "status": "not built", "path": "", "reason": "word " * 100},
    ]
    page = zoo.table(records, "5")
    assert "| a | A1, A2 | text | shared_prefix | slots | agrees |  |" in page
    assert "| b | B | text | reorder |  | agrees | not shared_prefix: a \\| b; own differs by 0.5 |" in page
    assert "\nC.\n" in page
    assert "3 classes: 3 agrees. Paths: shared_prefix 2, reorder 1. Engine: slots 2." in page
    assert page.splitlines()[-1].endswith("word … |")
    assert "16 bits" not in page
    rough = agrees | {
        "class": "A1",
        "status": "rough",
        "cases": {"text 1": text | {"note": "its own modules overflow"}},
    }
    page = zoo.table(records, "5", {"float16": [rough, records[1]]})
    assert "\n* float16: 1 agrees, 1 rough.\n" in page
    assert "| A1 | float16 | shared_prefix | rough | its own modules overflow |" in page


def test_an_error_from_deeper_down_is_no_refusal():
    model = build("llama")
    with pytest.raises(ValueError) as ours:
        run.ours(model, inputs_for(model), "nowhere")
    assert run.is_ours(ours.value)
    with pytest.raises(ValueError) as theirs:
        model.generate(**inputs.text(1), max_new_tokens=-1)
    assert not run.is_ours(theirs.value)


def sweep(tmp_path, *arguments):
    output = tmp_path / "zoo.jsonl"
    command = [sys.executable, str(BENCHMARKS / "zoo.py"), "--ci", "--jobs", "2", "--output", str(output), *arguments]
    out = run_child(command)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert out.returncode == 0, out.stdout + out.stderr
    assert len(records) >= 38
    return records


def test_some_forty_classes_agree(tmp_path):
    """Each in a process of its own, forked from one that has imported everything."""
    records = sweep(tmp_path)
    assert {record["status"] for record in records} <= {"agrees", "refused"}
    assert {"shared_prefix", "reorder"} <= {record["path"] for record in records}
