"""The backend of the lm-evaluation-harness beside the harness's own `hf` backend, on the same models."""

from __future__ import annotations

import json
import logging
import random
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, processors

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

import simctg_fast.integrations.lm_eval as backend_module  # noqa: E402
from simctg_fast.assets import resolve_model  # noqa: E402
from simctg_fast.engine import Engine  # noqa: E402
from simctg_fast.integrations._likelihood import _SOFTMAX_VALUES, continuation_log_likelihoods  # noqa: E402
from simctg_fast.integrations.lm_eval import SimCTGLM  # noqa: E402
from simctg_fast.strategy_names import RANDOM, STRATEGIES  # noqa: E402

from .. import decoding_models, near_ties, toy_t5  # noqa: E402
from ..decoding_models import shared, tokenizer  # noqa: E402
from ..engine_jobs import read_records, save_model, write_lines  # noqa: E402
from ..processes import run_child  # noqa: E402
from ..repository import INSTALLED, repository  # noqa: E402

CONTEXTS = ["hello", "the world is", "a b c d e f g", "x", "What? ", "no"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def greedy(model):
    return SimCTGLM(str(model), strategy="greedy", slots=3)


@pytest.fixture(scope="module")
def hf(model):
    return HFLM(str(model), device="cpu", batch_size=1)


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=given, idx=i) for i, given in enumerate(arguments)]


def generate(lm, contexts: list[str], **settings) -> list[str]:
    requests = instances("generate_until", [(context, dict(settings)) for context in contexts])
    return lm.generate_until(requests, disable_tqdm=True)


def same_texts(lm: SimCTGLM, contexts: list[str], found: list[str], expected: list[str]) -> None:
    """Of the tokenizer of characters: texts are tokens."""
    rows = [
        [lm.tok_encode(context) + lm.tok_encode(text) for context, text in zip(contexts, texts, strict=True)]
        for texts in (found, expected)
    ]
    near_ties.same_tokens(*rows, lm.engine.model, top_k=1, penalty_alpha=0.0)


def same_likelihoods(found, expected) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours[0] == pytest.approx(theirs[0], abs=1e-4)
        assert ours[1] == theirs[1]


class Recorder:
    """In place of the harness's cache."""

    def __init__(self):
        self.seen = []

    def add_partial(self, attr, request, result):
        self.seen.append((attr, tuple(request), result))


# ---- the command line ------------------------------------------------------------------------------------------------


def write_tasks(folder: Path) -> Path:
    """A generation task and a multiple choice, with their data: no network."""
    folder.mkdir(exist_ok=True)
    questions = ["The function returns", "A list is", "Python's documentation", "If the file", "The module"]
    rows = [
        {"question": q, "answer": " a", "choices": [" a", " the same value", " string of", "zzz"], "gold": i % 4}
        for i, q in enumerate(questions)
    ]
    data = write_lines(folder / "data.jsonl", rows)
    common = f"""
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
    (folder / "my_task.yaml").write_text(
        f"""task: my_task
{common}
output_type: generate_until
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["\\n", "."]
  max_gen_toks: 8
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
"""
    )
    (folder / "my_choice.yaml").write_text(
        f"""task: my_choice
{common}
output_type: multiple_choice
doc_to_choice: choices
doc_to_target: gold
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""
    )
    return folder


def run_command(command: str, *more: object, **options):
    words = [sys.executable if word == "python" else word for word in shlex.split(command)]
    environment = {"PYTHONPATH": str(INSTALLED), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": ""}
    environment |= {name: str(value) for name, value in options.items()}
    return run_child([*words, *map(str, more)], env=environment)


def documented_command() -> str:
    text = re.sub(r"\\\n\s*", "", backend_module.__doc__ or "")
    (command,) = re.findall(r"python -m simctg_fast\.integrations\.lm_eval run .*DIR", text)
    return command


def test_the_documented_command(tmp_path):
    """Both kinds of task in a real process, as written but for the strategy, and the figures of the `hf` backend."""
    folder = write_tasks(tmp_path / "tasks")
    command = documented_command().replace("DIR", str(folder)).replace("my_task", "my_task,my_choice")
    command = command.replace("penalty_alpha=0.6,top_k=4", "strategy=greedy")
    done = run_command(command, "--log_samples", "--output_path", tmp_path / "out", HOME=tmp_path)
    assert done.returncode == 0, done.stderr
    if not torch.cuda.is_available():
        assert done.stderr.count("there is no GPU for the harness's default device 'cuda:0': running on the CPU") == 1
    (summary,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(summary.read_text())["results"]
    expected = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(resolve_model("bundled"))},
        device="cpu",
        tasks=["my_task", "my_choice"],
        task_manager=lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )
    assert expected is not None
    for task, metric in (("my_task", "exact_match,none"), ("my_choice", "acc,none"), ("my_choice", "acc_norm,none")):
        assert found[task][metric] == expected["results"][task][metric]
    assert 0 < found["my_choice"]["acc,none"] < 1
    for task in ("my_task", "my_choice"):
        (file,) = (tmp_path / "out").rglob(f"samples_{task}_*.jsonl")
        ours = {record["doc_id"]: record["resps"] for record in read_records(file)}
        theirs = {record["doc_id"]: record["resps"] for record in expected["samples"][task]}
        if task == "my_task":
            assert ours == theirs
            continue
        for number, responses in ours.items():
            pairs = [(float(each[0][0]), str(each[0][1]) == "True") for each in responses]
            same_likelihoods(pairs, [each[0] for each in theirs[number]])


@pytest.mark.full
def test_the_commands_of_the_page(tmp_path):
    """`docs/engine.md` names the command of the module, and it runs as written."""
    page = repository("docs/engine.md").read_text()
    commands = re.findall(r"python -m simctg_fast\.integrations\.lm_eval run \S.*?DIR(?= |\n|`)", page)
    assert commands
    assert "\nlm_eval run --model simctg_fast" not in page, "the harness does not look for entry points"
    folder = write_tasks(tmp_path / "tasks")
    done = run_command(commands[0].replace("DIR", str(folder)), HOME=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "|my_task|" in done.stdout


def test_registering_again_is_harmless(monkeypatch):
    registry = pytest.importorskip("lm_eval.api.registry")
    assert registry.get_model("simctg_fast") is SimCTGLM
    monkeypatch.setattr(backend_module, "SimCTGLM", type("Other", (SimCTGLM,), {}))
    backend_module._register()
    assert registry.get_model("simctg_fast") is SimCTGLM


def test_a_harness_that_finds_entry_points(tmp_path):
    """As a later release may do: the entry point is registered, and loading it registers the class."""
    script = """
import importlib.metadata as metadata
from lm_eval.api.registry import get_model, model_registry
(point,) = [each for each in metadata.entry_points(group="lm_eval.models") if each.name == "simctg_fast"]
model_registry.register(point.name, target=point)
print(get_model("simctg_fast").__name__)
import importlib, simctg_fast.integrations.lm_eval as module
importlib.reload(module)
print(get_model("simctg_fast").__name__)
"""
    import importlib.metadata as metadata

    if not metadata.entry_points(group="lm_eval.models"):
        pytest.skip("the package is not installed")
    done = run_command(f"python -c {shlex.quote(script)}", HOME=tmp_path)
    assert done.stdout.split() == ["SimCTGLM", "SimCTGLM"], done.stderr


def test_a_missing_harness_is_named():
    script = """
import sys
sys.modules["lm_eval"] = None
import simctg_fast
try:
    import simctg_fast.integrations.lm_eval
except ImportError as error:
    print(error)
"""
    done = run_command(f"python -c {shlex.quote(script)}")
    assert "pip install 'simctg_fast[lm-eval]'" in done.stdout, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_devices_that_are_not_there(model, monkeypatch, caplog):
    harness = {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"}  # what its command line passes
    with caplog.at_level(logging.WARNING, "simctg_fast"):
        made = SimCTGLM.create_from_arg_obj({"pretrained": str(model)}, harness)
    assert made.device.type == "cpu"
    assert caplog.text.count("running on the CPU") == 1
    caplog.clear()
    assert SimCTGLM.create_from_arg_string(f"pretrained={model},device=cpu", harness).device.type == "cpu"
    assert "running on the CPU" not in caplog.text
    for wrong in ({"device": "cuda:0"}, {"device": "cuda:7"}, {"device": "nonsense"}):
        with pytest.raises(ValueError, match=f"device must be one .*{wrong['device']}"):
            SimCTGLM.create_from_arg_obj({"pretrained": str(model)} | wrong, harness)
    with pytest.raises(ValueError, match="cuda:1"):
        SimCTGLM.create_from_arg_obj({"pretrained": str(model)}, harness | {"device": "cuda:1"})
    # Named on our command line it is the user's, though it is the harness's default as well.
    folder = write_tasks(model.parent / "device_tasks")
    command = ["lm_eval", "run", "--model", "simctg_fast", "--model_args", f"pretrained={model}", "--tasks", "my_task"]
    monkeypatch.setattr(sys, "argv", [*command, "--include_path", str(folder), "--device=cuda:0"])
    monkeypatch.setattr(SimCTGLM, "named_device", None)
    with pytest.raises(ValueError, match=r"device must be one .*cuda:0"):
        backend_module.main()
    with pytest.raises(ValueError, match="--device cuda:0 and --model_args device=cpu differ"):
        SimCTGLM.create_from_arg_obj({"pretrained": str(model), "device": "cpu"}, harness)


def test_model_args_come_before_what_the_harness_passes(model):
    harness = {"batch_size": 1, "max_batch_size": 64, "device": "cpu"}
    made = SimCTGLM.create_from_arg_string(f"pretrained={model},slots=3,penalty_alpha=0.3", harness)
    assert made.engine.stats["slots"] == 3
    assert made.engine.parameters.penalty_alpha == 0.3
    assert SimCTGLM.create_from_arg_obj({"pretrained": str(model)}, harness).engine.stats["slots"] == 16
    assert SimCTGLM.create_from_arg_obj({"pretrained": str(model), "batch_size": 5}, harness).batch_rows == 5
    assert SimCTGLM(str(model), batch_size="auto:4").engine.stats["slots"] == 16
    for name, value in {
        "batch_size": "many",
        "max_length": 5000,
        "softmax_dtype": "int8",
        "add_bos_token": "yes",
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be"):
            SimCTGLM(str(model), **{name: value})
    with pytest.raises(TypeError, match="nonsense"):
        SimCTGLM(str(model), nonsense=1)


# ---- tokens ----------------------------------------------------------------------------------------------------------


def made_tokenizer(kind: str) -> transformers.PreTrainedTokenizerFast:
    core = Tokenizer(
        models.BPE({"<pad>": 0, "<bos>": 1, "<eos>": 2} | {chr(32 + i): i + 3 for i in range(95)}, merges=[])
    )
    core.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    if kind in ("bos", "both"):
        end = " <eos>" if kind == "both" else ""
        core.post_processor = processors.TemplateProcessing(
            single=f"<bos> $A{end}", special_tokens=[("<bos>", 1), ("<eos>", 2)]
        )
    if kind == "no bos":
        del names["bos_token"]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, padding_side="left", **names)


TEXTS = ["hello", "", " lead", "<bos>hello", "<bos><bos>hello", "<eos>hello", "hello<bos>", "trail  ", "<|user|>hi"]


@pytest.mark.parametrize("add_bos_token", [None, True, False])
@pytest.mark.parametrize("kind", ["plain", "bos", "both", "no bos", "bundled"])
def test_tokens_are_those_of_the_hf_backend(kind, add_bos_token, model, tmp_path):
    if kind == "bundled":
        folder, texts = str(resolve_model("bundled")), [t.replace("<bos>", "<|endoftext|>") for t in TEXTS]
    else:
        shared("gpt2").save_pretrained(tmp_path)
        made_tokenizer(kind).save_pretrained(tmp_path)
        folder, texts = str(tmp_path), TEXTS
    settings = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    ours, theirs = SimCTGLM(folder, slots=1, **settings), HFLM(folder, device="cpu", **settings)
    assert (ours.prefix_token_id, ours.max_length) == (theirs.prefix_token_id, theirs.max_length)
    for text in texts:
        for special in (None, True, False):
            assert ours.tok_encode(text, special) == theirs.tok_encode(text, special), (text, special)
        if text:
            assert ours._context(text) == theirs.tok_batch_encode([text])[0][0].tolist(), text


def test_a_chat_template_has_its_own_bos(tmp_path):
    made = made_tokenizer("bos")
    made.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('no system here') }}{% endif %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    shared("gpt2").save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    ours, theirs = SimCTGLM(str(tmp_path), slots=1, strategy="greedy"), HFLM(str(tmp_path), device="cpu")
    chat = [{"role": "user", "content": "hi"}]
    text = ours.apply_chat_template(chat)
    assert text == theirs.apply_chat_template(chat) == "<bos><user>hi<assistant>"
    assert ours._context(text).count(1) == ours.tok_encode(text).count(1) == 1
    refused = [{"role": "system", "content": "be brief"}, *chat]
    assert ours.apply_chat_template(refused) == theirs.apply_chat_template(refused) == text
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert ours.tok_encode("hi")[0] == 1
    pair = [(text, "yes"), ("plain", " no")]
    requests = instances("loglikelihood", pair)
    same_likelihoods(ours.loglikelihood(requests, disable_tqdm=True), theirs.loglikelihood(requests, disable_tqdm=True))
    settings = {"until": ["~~"], "max_gen_toks": 6, "do_sample": False}
    same_texts(ours, [text], generate(ours, [text], **settings), generate(theirs, [text], **settings))


def test_a_sentencepiece_tokenizer(tmp_path):
    """Texts decoded alone, without the space before them, as the `hf` backend has them."""
    draw = random.Random(0)
    lines = [toy_t5.text(draw) for _ in range(400)]
    pieces = toy_t5.train_sentencepiece(tmp_path, lines, bos_id=1, eos_id=2, unk_id=0, pad_id=-1)
    pieces.rename(tmp_path / "tokenizer.model")
    decoding_models.build("llama", vocab_size=64).save_pretrained(tmp_path)
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    for more in ({}, {"add_bos_token": True}):
        ours = SimCTGLM(str(tmp_path), strategy="greedy", slots=2, **more)
        theirs = HFLM(str(tmp_path), device="cpu", **more)
        for text in ("red blue", "<s>red blue", "<s> red", "", "</s>red", " red"):
            assert ours.tok_encode(text) == theirs.tok_encode(text)
        pairs = [("red blue", " green"), ("red", "blue"), ("one two", " three four sun"), ("", "red"), ("x ", " red")]
        requests = instances("loglikelihood", pairs)
        found = ours.loglikelihood(requests, disable_tqdm=True)
        same_likelihoods(found, theirs.loglikelihood(requests, disable_tqdm=True))
        for asked in ({"until": ["\n"], "max_gen_toks": 8}, {"until": ["e"], "max_gen_toks": 30}):
            contexts = ["red blue", "one two three"]
            assert generate(ours, contexts, **asked) == generate(theirs, contexts, **asked)


@pytest.mark.parametrize("task", ["my_task", "my_choice"])
def test_a_task_through_a_chat_template(task, tmp_path):
    """With the harness's own rendering of few shots, system message and question."""
    made = made_tokenizer("bos")
    made.chat_template = (
        "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    shared("gpt2").save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    folder = write_tasks(tmp_path / "tasks")
    answers = []
    for lm in (SimCTGLM(str(tmp_path), strategy="greedy"), HFLM(str(tmp_path), device="cpu")):
        results = lm_eval.simple_evaluate(
            model=lm,
            tasks=[task],
            apply_chat_template=True,
            fewshot_as_multiturn=True,
            system_instruction="be brief",
            task_manager=lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
        )
        samples = results["samples"][task]
        assert samples[0]["arguments"][0][0].startswith("<bos><system>be brief<user>")
        answers.append([sample["resps"] for sample in samples])
    if task == "my_task":
        assert answers[0] == answers[1]
    else:
        flat = [[choice[0] for sample in each for choice in sample] for each in answers]
        same_likelihoods(*flat)


# ---- texts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"until": ["~~"], "max_gen_toks": 7},
        {"until": "e", "max_new_tokens": 30},
        {"until": ["Q", "e", "a", " "], "max_gen_toks": 40, "temperature": 0.0},
        {"until": [], "max_gen_toks": 9, "do_sample": False, "temperature": 0.0, "top_p": 0.9},
        {"until": None, "max_tokens": 5, "max_gen_toks": None},
        {"until": ["<eos>"], "max_gen_toks": 60},
        {"until": ["<pad>"], "max_gen_toks": 60},
        {"until": ["<bos>", "~"], "max_gen_toks": 60},
        {"until": ["~~"], "max_gen_toks": 4, "max_new_tokens": 9, "num_beams": 1, "repetition_penalty": 1.0},
    ],
    ids=str,
)
def test_texts_are_those_of_the_hf_backend(greedy, hf, settings):
    expected = generate(hf, CONTEXTS, **{k: v for k, v in settings.items() if v is not None})
    same_texts(greedy, CONTEXTS, generate(greedy, CONTEXTS, **settings), expected)


def test_a_total_length(greedy, hf):
    """`max_length` counts the context too."""
    found = generate(greedy, ["hello", "the world"], max_length=12, max_gen_toks=100)
    expected = [generate(hf, [context], max_length=12, max_gen_toks=100)[0] for context in ("hello", "the world")]
    same_texts(greedy, ["hello", "the world"], found, expected)
    with pytest.raises(ValueError, match="max_length must be more than the context's 9 tokens, got 9"):
        generate(greedy, ["the world"], max_length=9)


@pytest.mark.parametrize(("stop", "length"), [("<pad>", 6), ("<eos>", 9), ("~<pad>", 6), ("<bos>", 30)])
def test_special_tokens_that_stop(model, monkeypatch, stop, length):
    """Texts do not show them, and still they end one. Without a stop string only the tokenizer's end does."""

    class Writes:
        """``~``, and a special token as every third."""

        def __init__(self, begin):
            self.begin = begin

        def __call__(self, ids, scores):
            number = ids.shape[1] - self.begin + 1
            token = {6: 0, 9: 2, 12: 0}.get(number, 97)
            return torch.zeros_like(scores).index_fill(1, torch.tensor([token]), 9.0)

    def factory(request, tokenizer):
        return Writes(len(request["prompt"]))

    lm = SimCTGLM(str(model), strategy="greedy", slots=2, processor=factory)
    if stop != "<eos>":
        monkeypatch.setattr(SimCTGLM, "eot_token_id", None)
    tokens = []
    engine_generate = lm.engine.generate

    def watched(asked):
        for result in engine_generate(asked):
            tokens.append(len(result.token_ids))
            yield result

    monkeypatch.setattr(lm.engine, "generate", watched)
    texts = generate(lm, ["hello", "<pad><eos>~<pad>"], until=[stop], max_gen_toks=30)
    assert tokens == [length, length]
    shown = sum(1 for number in range(1, length + 1) if number not in (6, 9, 12))
    assert texts == ["~" * shown] * 2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_sampling_under_any_strategy(model, strategy):
    """Texts of a task that does not sample depend on no seed, and none is refused."""
    one, other = (SimCTGLM(str(model), strategy=strategy, slots=2, seed=seed) for seed in (0, 1))
    plain = {"until": ["~~"], "max_gen_toks": 12}
    for more in ({"do_sample": False}, {"temperature": 0}, {"do_sample": False, "temperature": 0.0, "top_p": 1.0}):
        found = generate(one, CONTEXTS, **plain, **more)
        assert found == generate(other, CONTEXTS, **plain, **more)
        assert all(found)
    same = {"sample": "greedy", "stochastic-contrastive": "contrastive"}
    cold = {"temperature": 0} if strategy == "guard" else {}
    expected = SimCTGLM(str(model), strategy=same.get(strategy, strategy), slots=2, **cold)
    if strategy == "sample":
        same_texts(one, CONTEXTS, found, generate(expected, CONTEXTS, **plain))
    else:
        assert found == generate(expected, CONTEXTS, **plain)


def test_sampling(model):
    lm, other = (SimCTGLM(str(model), strategy="sample", slots=2, seed=seed) for seed in (0, 1))
    settings = {"max_gen_toks": 12, "do_sample": True, "temperature": 2.0, "top_k": 0, "top_p": 0.9}
    assert generate(lm, CONTEXTS, **settings) != generate(other, CONTEXTS, **settings)
    engine = Engine(shared("gpt2"), tokenizer(), strategy="sample", slots=2)
    lines = [
        {"id": i, "prompt": c, "max_new_tokens": 12, "temperature": 2.0, "top_p": 0.9, "stop": ["<eos>"]}
        for i, c in enumerate(CONTEXTS)
    ]
    expected = {result.id: result.token_ids for result in engine.generate(lines)}
    texts = [lm.tokenizer.decode(expected[i], skip_special_tokens=True) for i in range(len(CONTEXTS))]
    found = generate(lm, CONTEXTS, **settings)
    # Drawn tokens may be the end, which ends ours.
    assert all(text.startswith(ours) for ours, text in zip(found, texts, strict=True))
    assert generate(lm, CONTEXTS, max_gen_toks=12, temperature=2.0, top_p=0.9) == found
    assert len(set(generate(lm, ["hello"] * 4, **settings))) > 1, "repeats of a request are drawn anew"


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name not in RANDOM])
@pytest.mark.parametrize(
    "settings", [{"do_sample": True}, {"temperature": 0.7}, {"do_sample": True, "temperature": 1.0}]
)
def test_sampling_by_a_strategy_that_does_not(model, strategy, settings):
    lm = SimCTGLM(str(model), strategy=strategy, slots=1)
    with pytest.raises(ValueError, match=f"request 0 .'hello'.*the task samples.*{strategy}.*strategy=sample"):
        generate(lm, ["hello"], **settings)


def test_candidates_are_not_those_of_sampling(model, caplog):
    """`top_k` without `penalty_alpha` is a setting of sampling, and leaves contrastive search its candidates."""
    lm = SimCTGLM(str(model), slots=2, penalty_alpha=0.6, top_k=4)
    plain = generate(lm, CONTEXTS, max_gen_toks=9)
    assert generate(lm, CONTEXTS, max_gen_toks=9, do_sample=False, top_k=50) == plain
    assert not caplog.text
    assert generate(lm, CONTEXTS, max_gen_toks=9, top_k=50) == plain
    assert "does not use the task's top_k" in caplog.text
    other = SimCTGLM(str(model), slots=2, penalty_alpha=0.0, top_k=2)
    assert generate(lm, CONTEXTS, max_gen_toks=9, penalty_alpha=0, top_k=2) == generate(other, CONTEXTS, max_gen_toks=9)
    greedy = SimCTGLM(str(model), slots=2, strategy="greedy")
    with pytest.raises(ValueError, match="penalty_alpha is not used by strategy 'greedy'"):
        generate(greedy, CONTEXTS, penalty_alpha=0.5)


SUCCESSORS = {
    "fsd": {"fsd_n": 2, "penalty_alpha": 0.8},
    "fsd-vec": {"top_k": 5},
    "guard": {"guard_window": 3, "temperature": 0},
    "adaptive": {"adaptive_q": 8.0, "adaptive_k_range": (2, 7)},
}


@pytest.mark.parametrize("strategy", SUCCESSORS)
def test_texts_of_the_successors_are_the_engines(model, strategy):
    """With settings of their own, and not greedy search's."""
    lm = SimCTGLM(str(model), strategy=strategy, slots=2, **SUCCESSORS[strategy])
    found = generate(lm, CONTEXTS, until=["~~"], max_gen_toks=12, do_sample=False)
    engine = Engine(shared("gpt2"), tokenizer(), strategy=strategy, slots=3, **SUCCESSORS[strategy])
    lines = [{"id": i, "prompt": c, "max_new_tokens": 12, "stop": ["~~", "<eos>"]} for i, c in enumerate(CONTEXTS)]
    expected = {result.id: result.token_ids for result in engine.generate(lines)}
    assert found == [lm.tokenizer.decode(expected[i], skip_special_tokens=True) for i in range(len(CONTEXTS))]
    plain = SimCTGLM(str(model), strategy="greedy", slots=2)
    assert found != generate(plain, CONTEXTS, until=["~~"], max_gen_toks=12)


def test_guard_draws_where_a_task_does_or_says_nothing(model):
    one, other = (SimCTGLM(str(model), strategy="guard", slots=2, seed=seed) for seed in (0, 1))
    for settings in ({"do_sample": True, "temperature": 2.0}, {}):
        assert generate(one, CONTEXTS, max_gen_toks=12, **settings) != generate(
            other, CONTEXTS, max_gen_toks=12, **settings
        )


@pytest.mark.parametrize("strategy", ["fsd", "fsd-vec"])
def test_penalties_of_a_task(model, strategy):
    """`penalty_alpha` and, beside it, `top_k` are those of FSD as well; a weight of 0 is greedy search."""
    lm = SimCTGLM(str(model), strategy=strategy, slots=2, top_k=6)
    settings = {"max_gen_toks": 12, "until": ["~~"]}
    found = generate(lm, CONTEXTS, **settings, penalty_alpha=0.9, top_k=4)
    own = SimCTGLM(str(model), strategy=strategy, slots=2, penalty_alpha=0.9, top_k=4)
    assert found == generate(own, CONTEXTS, **settings) != generate(lm, CONTEXTS, **settings)
    greedy = SimCTGLM(str(model), slots=2, strategy="greedy")
    same_texts(
        lm, CONTEXTS, generate(lm, CONTEXTS, **settings, penalty_alpha=0), generate(greedy, CONTEXTS, **settings)
    )
    for other in ("adaptive", "guard"):
        with pytest.raises(ValueError, match=f"penalty_alpha is not used by strategy '{other}'"):
            generate(SimCTGLM(str(model), slots=2, strategy=other), CONTEXTS, penalty_alpha=0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nonsense": 1}, "unknown generation setting 'nonsense'"),
        ({"num_beams": 4}, "num_beams must be 1"),
        ({"repetition_penalty": 1.2}, "repetition_penalty must be 1"),
        ({"max_gen_toks": -1}, "max_gen_toks must be an integer of at least 0, got -1"),
        ({"max_gen_toks": 2.5}, "max_gen_toks must be an integer"),
        ({"max_gen_toks": True}, "max_gen_toks must be an integer"),
        ({"max_gen_toks": float("inf")}, "max_gen_toks must be an integer"),
        ({"max_gen_toks": 1024}, "max_gen_toks must be less than the context length 1024"),
        ({"until": [3]}, "until must be a string or a list of strings"),
        ({"do_sample": "no"}, "do_sample must be true or false"),
        ({"temperature": -1}, "temperature must be a number of at least 0"),
        ({"temperature": "warm"}, "temperature must be a number of at least 0"),
    ],
)
def test_settings_that_cannot_be_kept(greedy, settings, message):
    """The request is named, and nothing has been computed."""
    before = greedy.engine.stats["steps"]
    requests = instances("generate_until", [("hello", {"max_gen_toks": 3}), ("the\x1b[31m world", settings)])
    with pytest.raises(ValueError, match=f"request 1 .'the.*world'.*{re.escape(message)}") as caught:
        greedy.generate_until(requests, disable_tqdm=True)
    assert "\x1b" not in str(caught.value)
    assert greedy.engine.stats["steps"] == before


def test_what_model_args_say_of_every_task(model, caplog):
    lm = SimCTGLM(str(model), strategy="greedy", slots=2, stop="a")
    found = generate(lm, CONTEXTS, until=["e"], max_gen_toks=30)
    plain = generate(SimCTGLM(str(model), strategy="greedy", slots=2), CONTEXTS, until=["a", "e"], max_gen_toks=30)
    assert found == plain
    with pytest.raises(ValueError, match="n must be 1, got 2"):
        SimCTGLM(str(model), strategy="sample", n=2)
    generate(lm, CONTEXTS, max_gen_toks=3, max_new_tokens=9)
    assert caplog.text.count("of max_gen_toks=3, max_new_tokens=9 the first counts") == 1


def test_nothing_is_nothing(greedy):
    """`max_gen_toks: 0`, also between others; and the order of the answers is that of the requests."""
    lengths = [5, 0, 9, 2, 0, 7]
    requests = instances("generate_until", [("hello", {"max_gen_toks": n}) for n in lengths])
    recorder = Recorder()
    greedy.set_cache_hook(recorder)
    try:
        texts = greedy.generate_until(requests, disable_tqdm=True)
    finally:
        greedy.set_cache_hook(lm_eval.api.model.CacheHook(None))
    (long,) = generate(greedy, ["hello"], max_gen_toks=9)
    assert texts == [long[:n] for n in lengths]
    assert sorted((args[1]["max_gen_toks"], text) for _, args, text in recorder.seen) == sorted(
        zip(lengths, texts, strict=True)
    )


def test_lengths_that_a_task_does_not_name(model, tmp_path):
    assert SimCTGLM(str(model), slots=1).default_new_tokens == 256
    small = SimCTGLM(str(save_model(tmp_path, n_positions=20)), slots=1, strategy="greedy")
    assert small.default_new_tokens == 10
    assert len(generate(small, ["hello"])[0]) <= 10
    named = SimCTGLM(str(model), slots=1, strategy="greedy", max_new_tokens=5)
    assert generate(named, ["hello"]) == generate(named, ["hello"], max_gen_toks=5)


def test_a_context_that_does_not_fit(tmp_path, caplog):
    """Its end is kept, as the `hf` backend does, and that is said."""
    folder = str(save_model(tmp_path, n_positions=32))
    lm, hf = SimCTGLM(folder, slots=2, strategy="greedy"), HFLM(folder, device="cpu")
    contexts = ["0123456789" * 5, "short"]
    found = generate(lm, contexts, max_gen_toks=12)
    assert "1 of 2 contexts do not fit into max_length=32" in caplog.text
    same_texts(lm, [contexts[0][-20:], contexts[1]], found, [generate(hf, [c], max_gen_toks=12)[0] for c in contexts])


def test_contexts_without_text(greedy):
    """An empty one begins behind the token that likelihoods begin with; spaces are tokens."""
    found = generate(greedy, ["", "   "], max_gen_toks=6)
    lines = [{"id": 0, "prompt": [1], "max_new_tokens": 6}, {"id": 1, "prompt": [3, 3, 3], "max_new_tokens": 6}]
    expected = {result.id: result.text for result in greedy.engine.generate(lines)}
    assert found == [expected[0], expected[1]]
    found = greedy.loglikelihood(instances("loglikelihood", [(" ", "blank"), ("", " blank")]), disable_tqdm=True)
    assert found[0] == found[1]


def test_a_request_that_fails(model):
    """It is named; the others are answered and in the cache."""
    failing = [3 + ord(c) - 32 for c in "the world"]

    def factory(request, tokenizer):
        if request["prompt"] == failing:
            raise KeyError("ours")
        return None

    lm = SimCTGLM(str(model), slots=2, strategy="greedy", processor=factory)
    recorder = Recorder()
    lm.set_cache_hook(recorder)
    with pytest.raises(RuntimeError, match=r"request 1 .'the world'. failed: .*KeyError.*ours"):
        generate(lm, ["hello", "the world", "a b"], max_gen_toks=4)
    assert {args[0] for _, args, _ in recorder.seen} == {"hello", "a b"}


def test_a_processor_of_ones_own(model):
    def factory(request, tokenizer):
        return lambda ids, scores: torch.zeros_like(scores).index_fill(1, torch.tensor([5 + len(request["stop"])]), 9.0)

    lm = SimCTGLM(str(model), slots=2, strategy="greedy", processor=factory)
    assert generate(lm, ["hello"], max_gen_toks=4, until=["~~", "<pad>"]) == [lm.tokenizer.decode([8]) * 4]


def test_the_cache_of_the_harness(model, tmp_path):
    """A second run asks the model nothing."""
    pytest.importorskip("sqlitedict")
    lm = SimCTGLM(str(model), slots=2, strategy="greedy")
    texts = instances("generate_until", [(c, {"max_gen_toks": 4, "until": ["~~"]}) for c in CONTEXTS])
    pairs = instances("loglikelihood", [(c, " yes") for c in CONTEXTS])
    rolling = instances("loglikelihood_rolling", [(c,) for c in CONTEXTS])
    answers = []
    for _ in range(2):
        cached = lm_eval.api.model.CachingLM(lm, str(tmp_path / "cache.db"))
        answers.append(
            (cached.generate_until(texts), cached.loglikelihood(pairs), cached.loglikelihood_rolling(rolling))
        )
        lm.engine.generate = lm.engine.model = None  # type: ignore[assignment]
    assert answers[0] == answers[1]


# ---- likelihoods -----------------------------------------------------------------------------------------------------

PAIRS = [
    ("hello", " world"),
    ("hello", " there, this is longer than its context"),
    ("hello", "!"),
    ("hello", "?"),
    ("trailing  ", "spaces"),
    ("", "no context at all"),
    ("", "<bos>begins with the prefix"),
    ("<bos>hello", " there"),
    ("a much longer context, of some eighty characters, so that rows of a batch differ a lot", " x"),
    ("hello", " world"),
]


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_likelihoods_are_those_of_the_hf_backend(model, hf, rows):
    lm = SimCTGLM(str(model), batch_size=rows)
    requests = instances("loglikelihood", PAIRS)
    recorder = Recorder()
    lm.set_cache_hook(recorder)
    found = lm.loglikelihood(requests, disable_tqdm=True)
    same_likelihoods(found, hf.loglikelihood(requests, disable_tqdm=True))
    expected = [("loglikelihood", args, answer) for args, answer in zip(PAIRS, found, strict=True)]
    assert sorted(recorder.seen) == sorted(expected)
    assert lm.loglikelihood([], disable_tqdm=True) == []


def test_greedy_continuations_are_known(greedy, hf):
    texts = generate(greedy, ["hello", "the world"], max_gen_toks=6)
    pairs = [(context, text) for context, text in zip(["hello", "the world"], texts, strict=True) if "\x7f" not in text]
    requests = instances("loglikelihood", [*pairs, ("hello", texts[0][:-1] + "~"), ("hello", texts[0][:2])])
    found = greedy.loglikelihood(requests, disable_tqdm=True)
    same_likelihoods(found, hf.loglikelihood(requests, disable_tqdm=True))
    assert any(is_greedy for _, is_greedy in found)


@pytest.mark.parametrize("strategy", ["contrastive", "sample", "stochastic-contrastive"])
def test_likelihoods_know_no_strategy(model, greedy, strategy):
    lm = SimCTGLM(str(model), strategy=strategy, slots=3)
    requests = instances("loglikelihood", PAIRS)
    assert lm.loglikelihood(requests, disable_tqdm=True) == greedy.loglikelihood(requests, disable_tqdm=True)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "bloom", "mamba", "gpt2"])
@pytest.mark.parametrize("kind", ["bos", "no bos"])
def test_likelihoods_of_other_models(name, kind, tmp_path):
    shared(name).save_pretrained(tmp_path)
    made_tokenizer(kind).save_pretrained(tmp_path)
    ours, theirs = SimCTGLM(str(tmp_path), batch_size=4), HFLM(str(tmp_path), device="cpu")
    assert ours.max_length == theirs.max_length
    requests = instances("loglikelihood", PAIRS)
    same_likelihoods(ours.loglikelihood(requests, disable_tqdm=True), theirs.loglikelihood(requests, disable_tqdm=True))
    rolling = instances("loglikelihood_rolling", [(c * 3,) for c in CONTEXTS])
    expected = theirs.loglikelihood_rolling(rolling, disable_tqdm=True)
    assert ours.loglikelihood_rolling(rolling, disable_tqdm=True) == pytest.approx(expected, abs=1e-4)


def test_likelihoods_of_the_bundled_model():
    """In the half precision of a checkpoint as well, where the softmax has the dtype that the `hf` backend's has."""
    folder = str(resolve_model("bundled"))
    pairs = [("The function returns", " a list of"), ("Python is", " a"), ("Python is", " the"), ("", "If the file")]
    requests = instances("loglikelihood", pairs)
    for settings in (
        {},
        {"dtype": "float32"},
        {"dtype": "bfloat16", "softmax_dtype": "float32"},
        {"dtype": "bfloat16"},
    ):
        ours, theirs = SimCTGLM(folder, **settings), HFLM(folder, device="cpu", **settings)
        # Halves round by the shape of a batch: one row each, as theirs.
        ours.batch_rows = 1
        found = ours.loglikelihood(requests, disable_tqdm=True)
        same_likelihoods(found, theirs.loglikelihood(requests, disable_tqdm=True))


@pytest.mark.parametrize("length", [1, 31, 32, 33, 63, 64, 65, 200])
def test_rolling_windows(length, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "rolling"
    if not folder.exists():
        save_model(folder, n_positions=32)
    ours, theirs = SimCTGLM(str(folder), batch_size=4), HFLM(str(folder), device="cpu")
    texts = [("abcdefghij " * 20)[:length], "x" * length, "short", ""]
    requests = instances("loglikelihood_rolling", [(text,) for text in texts])
    recorder = Recorder()
    ours.set_cache_hook(recorder)
    found = ours.loglikelihood_rolling(requests, disable_tqdm=True)
    assert found == pytest.approx(theirs.loglikelihood_rolling(requests, disable_tqdm=True), abs=1e-4)
    assert recorder.seen == [
        ("loglikelihood_rolling", (text,), total) for text, total in zip(texts, found, strict=True)
    ]


def test_continuations_at_the_limit(tmp_path, caplog):
    folder = str(save_model(tmp_path, n_positions=32))
    ours, theirs = SimCTGLM(folder), HFLM(folder, device="cpu")
    pairs = [("hello", "y" * n) for n in (26, 27, 28, 31, 32)] + [
        ("z" * 50, "y" * 3),
        ("z" * 50, "y" * 32),
        ("", "y" * 32),
    ]
    requests = instances("loglikelihood", pairs)
    same_likelihoods(ours.loglikelihood(requests, disable_tqdm=True), theirs.loglikelihood(requests, disable_tqdm=True))
    # Likelihoods of 33 tokens read 32: ("hello", 28 and more) but the first of these, and both long contexts.
    assert "4 of 8 contexts do not fit into max_length=32" in caplog.text
    for pair, message in ((("hello", "y" * 33), "adds 33 tokens"), (("hello", ""), "adds 0 tokens")):
        with pytest.raises(ValueError, match=f"request 1 .'hello'.*{message}.*at most 32"):
            ours.loglikelihood(instances("loglikelihood", [("a", "b"), pair]))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_likelihoods_of_encoder_decoders(name, tmp_path):
    shared(name).save_pretrained(tmp_path)
    made_tokenizer("both").save_pretrained(tmp_path)
    ours, theirs = SimCTGLM(str(tmp_path), batch_size=4), HFLM(str(tmp_path), device="cpu")
    assert ours.max_length == theirs.max_length
    requests = instances("loglikelihood", PAIRS)
    same_likelihoods(ours.loglikelihood(requests, disable_tqdm=True), theirs.loglikelihood(requests, disable_tqdm=True))
    rolling = instances("loglikelihood_rolling", [(c,) for c in CONTEXTS])
    expected = theirs.loglikelihood_rolling(rolling, disable_tqdm=True)
    assert ours.loglikelihood_rolling(rolling, disable_tqdm=True) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["t5", "bart"])
@pytest.mark.parametrize(
    "settings", [{"max_gen_toks": 12}, {"until": ["e", "a"], "max_gen_toks": 30}, {"max_length": 9}]
)
def test_texts_of_encoder_decoders(name, settings, tmp_path):
    """The `hf` backend counts the context to `max_gen_toks`, so its texts go on where ours have all their tokens."""
    shared(name).save_pretrained(tmp_path)
    made_tokenizer("both").save_pretrained(tmp_path)
    ours, theirs = SimCTGLM(str(tmp_path), strategy="greedy", slots=4), HFLM(str(tmp_path), device="cpu")
    found = generate(ours, CONTEXTS, **settings)
    expected = [generate(theirs, [context], **settings)[0] for context in CONTEXTS]
    tokens = settings.get("max_gen_toks", 8)
    assert found == [text[: len(mine)] for mine, text in zip(found, expected, strict=True)]
    assert all(len(mine) >= min(len(text), tokens - 2) for mine, text in zip(found, expected, strict=True))
    assert len(generate(ours, ["", " ", "x" * 3000], max_gen_toks=3)) == 3


def test_an_encoder_decoder_that_cannot_be_asked():
    model = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=True))
    with pytest.raises(ValueError, match="prepare_decoder_input_ids_from_labels"):
        list(continuation_log_likelihoods(model, [([1], [2])], max_length=8))


def test_what_a_forward_is_asked_for(model, monkeypatch):
    """One forward a batch, answers to one question in one row, logits of the continuations' positions alone, and no
    softmax of more values than the limit."""
    lm = SimCTGLM(str(model), batch_size=8)
    shapes, softmaxes = [], []
    forward = lm.engine.model.forward

    def watched(*args, **kwargs):
        out = forward(*args, **kwargs)
        shapes.append((kwargs["input_ids"].shape, out.logits.shape))
        return out

    watched.__signature__ = __import__("inspect").signature(forward)
    monkeypatch.setattr(lm.engine.model, "forward", watched)
    log_softmax = torch.Tensor.log_softmax
    monkeypatch.setattr(
        torch.Tensor, "log_softmax", lambda self, *a, **k: softmaxes.append(self.numel()) or log_softmax(self, *a, **k)
    )
    context = "a question of some length, asked four times"
    lm.loglikelihood(instances("loglikelihood", [(context, f" {answer}") for answer in "ABCD"]), disable_tqdm=True)
    assert shapes == [((1, len(context) + 1), (1, 2, 98))]
    assert softmaxes == [2 * 98]
    shapes.clear()
    pairs = [("hello" + "o" * n, " world"[:3]) for n in range(20)]
    lm.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    assert [shape[0][0] for shape in shapes] == [8, 8, 4]
    monkeypatch.setattr("simctg_fast.integrations._likelihood._SOFTMAX_VALUES", 98 * 7)
    softmaxes.clear()
    text = "y" * 40
    (chunked,) = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]), disable_tqdm=True)
    assert max(softmaxes) == 98 * 7 < _SOFTMAX_VALUES
    monkeypatch.undo()
    assert chunked == pytest.approx(
        lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))[0], abs=1e-5
    )


def test_rows_alone_and_together_are_bounded(greedy):
    """A batch holds no more tokens than it may, and every pair is answered once."""
    pairs = [([3] * n, [4, 5]) for n in (1, 50, 3, 200, 7, 8, 9)]
    for tokens in (1, 64, 10_000):
        scored = list(continuation_log_likelihoods(greedy.engine.model, pairs, max_length=1024, batch_tokens=tokens))
        assert sorted(each.index for each in scored) == list(range(len(pairs)))
        totals = [each.total for each in sorted(scored, key=lambda each: each.index)]
        if tokens == 1:
            alone = totals
        assert totals == pytest.approx(alone, abs=1e-5)


def test_the_package_does_not_import_the_harness():
    done = run_command(
        "python -c \"import sys, simctg_fast, simctg_fast.integrations; print('lm_eval' in sys.modules)\""
    )
    assert done.stdout.strip() == "False", done.stderr


def test_contrastive_texts_are_the_engines(model, tmp_path):
    """A generation task of our own through the harness, and the same prompts through the engine."""
    data = write_lines(tmp_path / "data.jsonl", [{"question": q, "answer": "x"} for q in ("hello", "the world", "a b")])
    task = {
        "task": "continuations",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["~~"], "max_gen_toks": 7, "do_sample": False, "temperature": 0.0},
        "metric_list": [{"metric": "exact_match"}],
    }
    backend = SimCTGLM(str(model), slots=2, penalty_alpha=0.5)
    results = lm_eval.simple_evaluate(
        model=backend, tasks=[task], bootstrap_iters=0, log_samples=True, cache_requests=False
    )
    (samples,) = results["samples"].values()
    written = {sample["doc"]["question"]: sample["resps"][0][0] for sample in samples}
    engine = Engine(shared("gpt2"), tokenizer(), penalty_alpha=0.5, max_new_tokens=7, slots=2)
    expected = engine.generate([{"id": q, "prompt": q, "stop": ["~~"]} for q in written])
    assert written == {result.id: result.text for result in expected}
