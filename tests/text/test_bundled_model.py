"""The model in the box: small, complete, offline, better than noise, and reproducible by its script."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from simctg_fast.assets import bundled_model_path, resolve_model

from ..processes import run_child
from ..repository import INSTALLED, repository

LIMIT = 8_000_000
PERPLEXITY_BOUND = 40.0  # on EXCERPT; the model has 24, the words in disorder and an untrained model over 3000

# Sentences as Python's documentation writes them, not taken from it: nothing that could have been learned by heart.
EXCERPT = (
    "Return a new list that holds the items of the given sequence in reverse order. If the argument is not a sequence, "
    "a TypeError is raised. The optional argument key must be a function of one argument, which is called for each "
    "element. When the file cannot be opened, the method raises an OSError and the original exception is available as "
    "an attribute of the instance."
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(bundled_model_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(bundled_model_path()).eval()


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, repository(f"benchmarks/{name}.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_folder_is_small_and_readable_by_all() -> None:
    files = [path for path in bundled_model_path().iterdir() if path.is_file()]
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {path.name for path in files}
    assert sum(path.stat().st_size for path in files) <= LIMIT
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in files)


def test_loads_without_network_in_fp32() -> None:
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer; import torch\n"
        "from simctg_fast import bundled_model_path as path\n"
        "model, tokenizer = AutoModelForCausalLM.from_pretrained(path()), AutoTokenizer.from_pretrained(path())\n"
        "assert {p.dtype for p in model.parameters()} == {torch.float32}\n"
        "print(tokenizer.decode(tokenizer('Grüße: a_b(1)\\n')['input_ids']))"
    )
    nowhere = {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": os.devnull}
    environment = {**os.environ, **nowhere, "PYTHONPATH": str(INSTALLED), "PYTHONIOENCODING": "utf-8"}
    done = run_child([sys.executable, "-c", code], env=environment, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "Grüße: a_b(1)\n\n"


def test_shape_of_the_model(model, tokenizer) -> None:
    config = AutoConfig.from_pretrained(bundled_model_path())
    assert config.model_type == "gpt2"
    assert config.max_position_embeddings >= 512
    assert config.vocab_size == len(tokenizer) == model.get_output_embeddings().weight.shape[0]
    assert config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id == config.pad_token_id
    assert tokenizer.padding_side == "left"
    assert set(tokenizer("text")) == {"input_ids", "attention_mask"}


def test_tokenizer_gives_any_text_back(tokenizer) -> None:
    for text in (EXCERPT, " two  spaces\n\n\ttab", "naïve – „ß“ 漢字 🙂", "x" * 300, ""):
        assert tokenizer.decode(tokenizer(text, verbose=False)["input_ids"]) == text


def test_tokens_are_longer_than_letters(tokenizer) -> None:
    assert len(EXCERPT) / len(tokenizer(EXCERPT)["input_ids"]) > 3


def perplexity(model, ids: torch.Tensor) -> float:
    with torch.inference_mode():
        return math.exp(model(ids, labels=ids).loss.item())


def test_predicts_documentation_far_better_than_chance(model, tokenizer) -> None:
    ids = tokenizer(EXCERPT, return_tensors="pt")["input_ids"]
    assert perplexity(model, ids) < PERPLEXITY_BOUND
    # What the bound keeps out: the same words in disorder, and the same model untrained.
    shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
    assert perplexity(model, shuffled) > 4 * PERPLEXITY_BOUND
    untrained = AutoModelForCausalLM.from_config(model.config).eval()
    assert perplexity(untrained, ids) > 4 * PERPLEXITY_BOUND


def test_uses_its_whole_context(model, tokenizer) -> None:
    """Every position is trained: the last hundred of 512 are predicted about as well as the same text early on."""
    text = tokenizer((EXCERPT + "\n\n") * 8, return_tensors="pt", verbose=False)["input_ids"][:, :512]
    assert text.shape[1] == 512
    with torch.inference_mode():
        losses = torch.nn.functional.cross_entropy(model(text).logits[0, :-1], text[0, 1:], reduction="none")
    assert losses[-100:].mean() < losses[:100].mean()


def test_card_names_what_it_was_made_of() -> None:
    card = (bundled_model_path() / "README.md").read_text(encoding="utf-8")
    fields = dict(re.findall(r"^\| ([\w ]+) \| (.+) \|$", card, re.MULTILINE))
    assert re.fullmatch(r"`[0-9a-f]{64}`", fields["corpus sha256"])
    assert re.fullmatch(r"3\.\d+\.\d+\S*", fields["Python version"])
    assert int(fields["steps"].replace(",", "")) >= 500
    for name in ("training loss", "validation loss"):
        assert 1.0 < float(re.match(r"\d+\.\d+", fields[name])[0]) < 4.5
    assert "python benchmarks/train_bundled.py" in card
    assert re.search(r"Licence.*Apache-2\.0", card)
    assert re.search(r"\| contrastive \| 0\.\d+ \| 0\.\d+ \|", card)


class TestNames:
    def test_bundled_means_the_model_in_the_box(self, tmp_path, monkeypatch) -> None:
        (tmp_path / "bundled").mkdir()
        (tmp_path / "bundled" / "config.json").write_text("{}")
        monkeypatch.chdir(tmp_path)
        assert resolve_model("bundled") == str(bundled_model_path())
        assert Path(resolve_model("./bundled")) == Path("bundled")

    def test_folders_and_hub_names(self, tmp_path) -> None:
        (tmp_path / "config.json").write_text("{}")
        assert resolve_model(str(tmp_path)) == resolve_model(tmp_path) == str(tmp_path)
        for name in ("gpt2", "openai-community/gpt2", "Qwen/Qwen3-0.6B"):
            assert resolve_model(name) == name

    @pytest.mark.parametrize("name", ["./nowhere", "/no/where", "~/nowhere-at-all", "a/b/c"])
    def test_a_path_that_is_not_there(self, name) -> None:
        with pytest.raises(FileNotFoundError, match=f"no model folder '{re.escape(name)}'"):
            resolve_model(name)

    def test_a_folder_without_a_model_and_a_file(self, tmp_path) -> None:
        with pytest.raises(FileNotFoundError, match=r"no config\.json"):
            resolve_model(tmp_path)
        (tmp_path / "model.bin").write_text("")
        with pytest.raises(FileNotFoundError, match="is a file"):
            resolve_model(tmp_path / "model.bin")

    @pytest.mark.parametrize("name", ["", "two words", "owner/"])
    def test_no_possible_name(self, name) -> None:
        with pytest.raises(ValueError, match=f"got '{name}'"):
            resolve_model(name)


@pytest.fixture(scope="module")
def corpus_script():
    return load_script("bundled_corpus")


class TestCorpus:
    def test_prose_is_unwrapped_and_the_rest_left_out(self, corpus_script) -> None:
        docstring = """Return the sum of
            two numbers.

            >>> add(1, 2)
            3

            Arguments:
              left -- the first number, which may
                      be negative
              right -- the second number

            * one thing to know
            * another thing
              on two lines

            ==== =====
            x    y

            stmt ::= "a" | "b"

            for i, x in enumerate(f(z)): y[i] = g(x, w=3)

            Copyright (C) 2001 by the people who wrote this.
            """
        assert corpus_script.clean(docstring) == [
            "Return the sum of two numbers.",
            "Arguments: left -- the first number, which may be negative",
            "right -- the second number",
            "* one thing to know",
            "* another thing on two lines",
        ]

    def test_split_depends_on_names_alone(self, corpus_script) -> None:
        documents = {f"module{i}.py": f"text {i}" for i in range(400)}
        train, held_out = corpus_script.Corpus(documents).split()
        assert len(train) + len(held_out) == 400
        assert 5 <= len(held_out) <= 40
        assert not set(train) & set(held_out)
        backwards = corpus_script.Corpus(dict(reversed(documents.items()))).split()
        assert [set(part) for part in backwards] == [set(train), set(held_out)]

    def test_hash_is_that_of_the_text(self, corpus_script) -> None:
        corpus = corpus_script.Corpus({"a": "one", "b": "two"})
        assert corpus.describe()["sha256"] == hashlib.sha256(b"one\n\n\ntwo\n").hexdigest()


def test_three_steps_of_training_write_a_folder_that_loads(tmp_path) -> None:
    """The command as a person types it, on the beginning of the real corpus."""
    command = [sys.executable, str(repository("benchmarks/train_bundled.py"))]
    given = {"steps": 3, "batch-tokens": 256, "sources": 60, "validation-tokens": 2100, "prompts": 0}
    given |= {name: tmp_path / name for name in ("out", "work")}
    command += [f"--{name}={value}" for name, value in given.items()]
    done = run_child(command)
    assert done.returncode == 0, done.stderr
    line = re.search(r"step +3/3 +loss (\S+) \+ \S+ +val (\S+) +[\d,]+ tokens/s +0 min left", done.stdout)
    assert 7.5 < float(line[1]) < 8.5  # the logarithm of the vocabulary is 8.03
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == len(tokenizer)
    assert model.dtype == torch.float32
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert re.search(r"corpus sha256 \| `[0-9a-f]{64}`", card)
    assert f"| validation loss | {float(line[2]):.2f}" in card


def test_a_run_broken_off_and_resumed_ends_in_the_same_weights(tmp_path, monkeypatch, corpus_script) -> None:
    text = " ".join(f"The {word} of function {i} is returned." for i in range(10) for word in ("name", "value"))
    corpus = corpus_script.Corpus({f"module{i}.py": text for i in range(200)})
    monkeypatch.setattr(sys, "path", [str(repository("benchmarks")), *sys.path])
    script = load_script("train_bundled")
    monkeypatch.setattr(script, "build_corpus", lambda sources: corpus)

    def train(name: str, *more: str) -> dict[str, torch.Tensor] | None:
        folders = ["--out", str(tmp_path / name), "--work", str(tmp_path / f"{name}-work")]
        script.main(["--steps", "3", "--batch-tokens", "256", "--prompts", "0", *folders, *more])
        weights = tmp_path / name / "model.safetensors"
        return load_file(weights) if weights.exists() else None

    whole = train("whole")
    assert train("broken", "--stop-after", "2") is None
    resumed = train("broken", "--resume")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())
    from_two_steps = train("other", "--steps", "2")
    assert not all(torch.equal(from_two_steps[name], weight) for name, weight in whole.items())
    with pytest.raises(SystemExit, match="other settings"):
        train("broken", "--resume", "--seed", "1")
