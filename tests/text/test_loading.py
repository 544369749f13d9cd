"""Models by name: what is loaded, what is refused and with which words, and whose code is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from simctg_fast.assets import ModelError, bundled_model_path
from simctg_fast.loading import find_model, load_backbone, load_model, load_tokenizer
from simctg_fast.text.features import extract_features

from ..processes import run_child
from ..repository import INSTALLED

LOADERS = [load_model, load_backbone]


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(bundled_model_path(), tmp_path / "model"))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_pickle(folder: Path, content: bytes) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(content)


class Touch:
    """A pickle that runs a command when it is opened."""

    def __reduce__(self):
        return os.system, ("touch pickled",)


FAULTS = {
    "not JSON": (lambda f: (f / "config.json").write_text("{oops"), "its config.json is not JSON"),
    "empty": (lambda f: (f / "config.json").write_text(""), "its config.json is not JSON"),
    "not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe{"), "its config.json is not JSON"),
    "a list": (lambda f: (f / "config.json").write_text("[]"), r"config.json must hold an object, got \[\]"),
    "null": (lambda f: (f / "config.json").write_text("null"), "config.json must hold an object, got null"),
    "no type": (lambda f: (f / "config.json").write_text("{}"), "model_type None, which transformers"),
    "unknown type": (lambda f: edit(f / "config.json", model_type="zzz"), "model_type 'zzz', which transformers"),
    "odd type": (lambda f: edit(f / "config.json", model_type=["gpt2"]), r"model_type \['gpt2'\], which transformers"),
    "wrong value": (lambda f: edit(f / "config.json", n_layer="many"), "n_layer"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no file named model.safetensors"),
    "cut weights": (lambda f: cut(f / "model.safetensors"), "incomplete metadata"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "header too small"),
    "other shape": (
        lambda f: edit(f / "config.json", n_positions=256),
        r"weights of another shape .*wpe.weight is \(",
    ),
    "junk pickle": (lambda f: with_pickle(f, b"\x80\x04junk"), "model"),
    "evil pickle": (lambda f: with_pickle(f, pickle.dumps(Touch(), protocol=2)), "model"),
}


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_folder_is_one_line_that_names_it_and_the_fault(fault, load, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    change, words = FAULTS[fault]
    change(folder)
    with pytest.raises(ModelError, match=words) as caught:
        load(folder, "cpu")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not Path("pickled").exists()


def test_weights_that_are_missing_are_named(folder, caplog):
    edit(folder / "config.json", n_layer=json.loads((folder / "config.json").read_text())["n_layer"] + 1)
    load_model(folder, "cpu")
    assert "has no weights for transformer.h." in caplog.text
    caplog.clear()
    load_model("bundled", "cpu")
    assert not caplog.text


def test_a_broken_tokenizer(folder):
    (folder / "tokenizer.json").write_text("{")
    for load in (*LOADERS, load_tokenizer):
        with pytest.raises(ModelError, match=f"the tokenizer in '{folder}' cannot be read: "):
            load(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_folder_that_may_not_be_read(folder):
    (folder / "config.json").chmod(0)
    with pytest.raises(ModelError, match="Permission denied"):
        load_model(folder)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "~nobody-of-this-name/x"])
def test_impossible_names(name):
    for load in (*LOADERS, load_tokenizer, find_model):
        with pytest.raises(ModelError):
            load(name)


def test_the_error_is_what_callers_catch():
    assert issubclass(ModelError, FileNotFoundError)
    assert issubclass(ModelError, ValueError)
    assert str(pickle.loads(pickle.dumps(ModelError("one line")))) == "one line"


# ------------------------------------------------------------------------------------------------------------- the hub


class Hub(BaseHTTPRequestHandler):
    """Answers by the owner in the address: 404 of a repository, a gate, a file that is missing, a fault of its own."""

    def do_HEAD(self) -> None:
        owner = self.path.split("/")[1]
        code, error = {
            "private": (401, "RepoNotFound"),
            "missing": (404, "RepoNotFound"),
            "gated": (403, "GatedRepo"),
            "dataless": (404, "EntryNotFound"),
        }.get(owner, (500, None))
        self.server.asked.append(self.path)
        self.send_response(code)
        if error:
            self.send_header("X-Error-Code", error)
            self.send_header("X-Error-Message", f"{error} \x1b[31m")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing/one", "there is no folder 'missing/one', and on the hub no such model, or a private one, .*hf auth"),
        ("private/one", "there is no folder 'private/one', and on the hub no such model, or a private one"),
        ("gated/one", "'gated/one' is gated; ask for access at http.*/gated/one, and log in"),
        ("dataless/one", "'dataless/one' on the hub holds no model, it has no config.json"),
        ("broken/one", "the hub, http://127.0.0.1.*, answers with error 500"),
    ],
)
def test_what_the_hub_says(hub, name, words):
    for load in (*LOADERS, load_tokenizer, find_model):
        with pytest.raises(ModelError, match=f"the model cannot be loaded: .*{words}") as caught:
            load(name)
        assert "\n" not in str(caught.value)


def test_no_network_is_said_at_once(hub):
    hub.shutdown()
    hub.server_close()
    began = time.monotonic()
    with pytest.raises(ModelError, match=r"there is no folder 'some/name', and the hub, .*, cannot be reached \(.*\)$"):
        load_model("some/name")
    assert time.monotonic() - began < 15  # a download tries five times more, for 25 seconds


def test_offline_is_told_apart(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"'missing/one', and the hub, .*which HF_HUB_OFFLINE forbids to ask"):
        load_model("missing/one")
    assert not hub.asked


def test_without_the_hub_the_cache_is_taken(hub, tmp_path):
    """What was loaded once is loaded again with no network, and without trying for half a minute for every file."""
    repository = tmp_path / "cache" / "models--broken--one"
    shutil.copytree(bundled_model_path(), repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    code = (
        "from huggingface_hub import constants; from simctg_fast.loading import load_model\n"
        "print(type(load_model('broken/one', 'cpu')[0]).__name__)"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(INSTALLED),
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
    }
    done = run_child([sys.executable, "-c", code], env=environment)
    assert done.stdout.strip() == "GPT2LMHeadModel", done.stderr
    assert len(hub.asked) <= 2


@pytest.mark.parametrize("name", ["bundle", "Bundled", "bundeld", "BUNDLED"])
def test_a_near_miss_of_bundled(hub, name):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(ModelError, match=r"; did you mean 'bundled'\?$"):
        load_model(name)


def test_no_guess_for_other_names(hub):
    with pytest.raises(ModelError) as caught:
        load_model("missing/gpt2")
    assert "did you mean" not in str(caught.value)


def test_a_folder_beside_the_hub_name(hub, tmp_path, monkeypatch):
    (tmp_path / "missing").mkdir()
    (tmp_path / "missing" / "one").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"the folder of that name has no config\.json"):
        load_model("missing/one")


# ------------------------------------------------------------------------------------------------- code of the folder's


def test_code_of_a_model_runs_only_where_it_is_asked_for(folder, tmp_path, monkeypatch):
    """In a process of its own: what was imported once stays imported. Somebody says yes on its standard input."""
    marker = tmp_path / "it ran"
    mark = f"open({str(marker)!r}, 'a').write(__name__ + ' ')\n"
    sources = {
        "own_config": "from transformers import GPT2Config\nclass OwnConfig(GPT2Config): model_type = 'own'\n",
        "own_model": "from transformers import GPT2LMHeadModel\nfrom .own_config import OwnConfig\n"
        "class OwnModel(GPT2LMHeadModel): config_class = OwnConfig\n",
        "own_tokenizer": "from transformers import PreTrainedTokenizerFast\n"
        "class OwnTokenizer(PreTrainedTokenizerFast): pass\n",
    }
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(mark + source)
    classes = {"AutoConfig": "own_config.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel"}
    edit(folder / "config.json", model_type="own", auto_map={**classes, "AutoModel": "own_model.OwnModel"})
    own = {"AutoTokenizer": [None, "own_tokenizer.OwnTokenizer"]}
    edit(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=own)
    environment = {**os.environ, "PYTHONPATH": str(INSTALLED), "HF_MODULES_CACHE": str(tmp_path / "modules")}

    def load(call: str):
        command = [sys.executable, "-c", f"from simctg_fast.loading import *; print({call})"]
        return run_child(command, input="yes\n" * 20, env=environment)

    for name in ("load_model", "load_backbone", "load_tokenizer"):
        done = load(f"{name}({str(folder)!r})")
        assert done.returncode == 1
        assert "it brings Python code of its own, which is run with --trust-remote-code" in done.stderr
        assert not marker.exists()
    done = load(f"type(load_model({str(folder)!r}, 'cpu', trust_remote_code=True)[0]).__name__")
    assert done.stdout.strip() == "OwnModel", done.stderr
    assert all(name in marker.read_text() for name in sources)


# ------------------------------------------------------------------------------------------------------------- adapters


@pytest.fixture
def adapter(tmp_path, folder) -> Path:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, task_type="CAUSAL_LM", init_lora_weights=False, target_modules=["c_attn"])
    peft.get_peft_model(load_model(folder, "cpu")[0], settings).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_loaded_as_peft_does(adapter, folder):
    from peft import AutoPeftModelForCausalLM

    model, tokenizer = load_model(adapter, "cpu")
    theirs = AutoPeftModelForCausalLM.from_pretrained(str(adapter)).eval()
    inputs = tokenizer("Return the name", return_tensors="pt")
    with torch.inference_mode():
        logits = model(**inputs).logits
        assert torch.equal(logits, theirs(**inputs).logits)
        assert not torch.allclose(logits, load_model(folder, "cpu")[0](**inputs).logits)
    assert not model.training
    assert tokenizer.padding_side == "left"


def test_an_adapter_brings_its_tokenizer_or_takes_the_base_models(adapter):
    tokenizer = load_model(adapter, "cpu")[1]
    tokenizer.save_pretrained(adapter)
    edit(adapter / "tokenizer_config.json", eos_token="Return")
    assert load_model(adapter, "cpu")[1].eos_token == "Return" != tokenizer.eos_token


def test_hidden_states_of_an_adapter(adapter, folder):
    from peft import PeftModel

    model, tokenizer = load_backbone(adapter, "cpu")
    theirs = PeftModel.from_pretrained(load_model(folder, "cpu")[0], str(adapter)).eval()
    text = "Return the name"
    with torch.inference_mode():
        states = theirs(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[-1][0]
    assert torch.allclose(extract_features(model, tokenizer, [text]).values, states, atol=1e-5)


def test_an_adapter_writes(adapter):
    from simctg_fast import ContrastiveGenerator
    from simctg_fast.engine import Engine
    from simctg_fast.engine.text_generation import TextGenerator

    prompts = ["Return the name", "If the file"]
    model, tokenizer = load_model(adapter, "cpu")
    merged = ContrastiveGenerator(model.merge_and_unload(), tokenizer)(prompts, 8)
    assert ContrastiveGenerator.from_pretrained(str(adapter), device="cpu")(prompts, 8) == merged
    options = {"top_k": 3, "penalty_alpha": 0.5, "max_new_tokens": 8}
    assert [each.text for each in TextGenerator(str(adapter), device="cpu", **options)(prompts)] == merged
    with_engine = Engine.from_pretrained(str(adapter), device="cpu", **options).generate(prompts)
    assert sorted(each.text for each in with_engine) == sorted(merged)


def test_what_an_adapter_lacks(adapter, folder, hub, monkeypatch):
    for load in LOADERS:
        monkeypatch.setitem(sys.modules, "peft", None)
        with pytest.raises(ImportError, match="pip install peft"):
            load(adapter, "cpu")
        monkeypatch.undo() if load is LOADERS[-1] else monkeypatch.delitem(sys.modules, "peft")
    shutil.rmtree(folder)
    for load in LOADERS:
        with pytest.raises(ModelError, match=f"base model of the adapter in .*{adapter}.* cannot be had: .*{folder}"):
            load(adapter, "cpu")
    for content in ("null", "{", '{"base_model_name_or_path": null}'):
        (adapter / "adapter_config.json").write_text(content)
        for load in LOADERS:
            with pytest.raises(ModelError, match=r"the model cannot be loaded: the folder '.*adapter'"):
                load(adapter, "cpu")


def test_weights_of_an_adapter_that_are_not_there(adapter):
    edit(adapter / "adapter_config.json", target_modules=["c_attn", "c_fc"])
    with pytest.raises(ModelError, match=r"the adapter in .* cannot be loaded: Found missing adapter keys"):
        load_model(adapter, "cpu")
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match=f"the adapter in '{adapter}' cannot be loaded"):
        load_model(adapter, "cpu")


# ---------------------------------------------------------------------------------------------------------- one message


@pytest.mark.parametrize("name", ["./nowhere", "missing/one", "two words"])
def test_one_message_wherever_a_model_is_named(name, hub, tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from simctg_fast import ContrastiveGenerator
    from simctg_fast.cli import app
    from simctg_fast.engine import Engine
    from simctg_fast.engine.text_generation import TextGenerator

    monkeypatch.chdir(tmp_path)
    Path("texts.txt").write_text("Some text of a few words.\n")
    said = set()
    for load in (*LOADERS, load_tokenizer, find_model, TextGenerator):
        with pytest.raises(ModelError) as caught:
            load(name)
        said.add(str(caught.value))
    for kind in (ContrastiveGenerator, Engine):
        with pytest.raises(ModelError) as caught:
            kind.from_pretrained(name)
        said.add(str(caught.value))
    assert len(said) == 1
    commands = [["demo", name], ["features", name, "texts.txt", "-o", "f.safetensors"], ["generate", name, "x"]]
    commands += [["train", name, "--data", "texts.txt", "--out", "run"]]
    for command in commands:
        result = CliRunner(env={"COLUMNS": "1000"}).invoke(app, command)
        assert result.exit_code == 2, result.output
        assert f"Invalid value: {said.copy().pop()} " in result.output
    assert not Path("run").exists()
