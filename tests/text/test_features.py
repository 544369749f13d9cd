"""Hidden states of texts: those of the model alone on each text, whatever it was batched with."""

from __future__ import annotations

import copy
import errno
import json
import logging
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

from simctg_fast import bundled_model_path, extract_features
from simctg_fast.cpu import modules
from simctg_fast.ops import _backends
from simctg_fast.reference.contrastive_search import true_float64
from simctg_fast.text.features import Features, load_features, read_texts

from ..decoding_models import PAD, VOCABULARY, build, tokenizer

TEXTS = ["Contrast", "x", "a longer text than the others", "ive search", "x y"]
POOLED = ("mean", "cls", "last")


def make(name):
    if name not in ("bert", "roberta"):
        return build(name)
    options = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    options |= {"vocab_size": VOCABULARY, "pad_token_id": PAD, "max_position_embeddings": 40}
    config, model = {"bert": ("BertConfig", "BertForMaskedLM"), "roberta": ("RobertaConfig", "RobertaModel")}[name]
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**options)).eval()


def by_hand(model, text, layer=-1):
    """``(T, D)``: one text, no padding."""
    inputs = tokenizer()(text, return_tensors="pt").input_ids
    body = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    with torch.no_grad():
        out = body(input_ids=inputs, output_hidden_states=True)
    return out.last_hidden_state[0] if layer == -1 else out.hidden_states[layer][0]


@pytest.fixture(scope="module", params=["gpt2", "llama", "mamba", "bert", "roberta", "t5", "bart"])
def model(request):
    return make(request.param)


@pytest.mark.parametrize("layer", [-1, 0, 1, -2])
def test_every_token(model, layer):
    features = extract_features(model, tokenizer(), TEXTS, layer, max_tokens=40)
    assert features.lengths.tolist() == [len(text) for text in TEXTS]
    assert features.values.shape == (sum(map(len, TEXTS)), 32)
    for index, text in enumerate(TEXTS):
        torch.testing.assert_close(features[index], by_hand(model, text, layer), rtol=1e-4, atol=2e-5)
    assert torch.equal(features[-1], features[len(TEXTS) - 1])


@pytest.mark.skipif(_backends.extension() is None, reason="the C++ extension is not built")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
def test_16_bits_go_through_the_kernels(name, dtype, monkeypatch):
    """As close to float64, from the same weights, as the model's own modules; float32 is left to PyTorch."""
    model, products, original = make(name).to(dtype), [], modules.run_kernel
    monkeypatch.setattr(modules, "run_kernel", lambda x, *args: products.append(x.dtype) or original(x, *args))
    found = extract_features(model, tokenizer(), TEXTS, max_tokens=60)
    body = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
    linears = [m for m in body.modules() if isinstance(m, (torch.nn.Linear, Conv1D))]
    assert len(products) >= 2 * len(linears), "two batches"
    assert set(products) == {dtype}
    plain = torch.cat([by_hand(model, text) for text in TEXTS]).double()
    exact = copy.deepcopy(model).double()
    with true_float64():
        exact = torch.cat([by_hand(exact, text) for text in TEXTS])
    ours, theirs = ((each.double() - exact).square().mean().sqrt().item() for each in (found.values, plain))
    assert ours <= 1.1 * theirs
    products.clear()
    extract_features(model.float(), tokenizer(), TEXTS)
    assert not products


def test_pooled(model):
    states = [by_hand(model, text) for text in TEXTS]
    truth = {
        "mean": torch.stack([each.mean(0) for each in states]),
        "cls": torch.stack([each[0] for each in states]),
        "last": torch.stack([each[-1] for each in states]),
    }
    for pooling in POOLED:
        features = extract_features(model, tokenizer(), TEXTS, pooling=pooling)
        assert features.values.shape == (len(TEXTS), 32)
        torch.testing.assert_close(features.values, truth[pooling], rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(features[1], truth[pooling][1], rtol=1e-4, atol=2e-5)


def test_padded():
    features = extract_features(build("gpt2"), tokenizer(), TEXTS)
    values, mask = features.padded()
    assert values.shape == (5, 29, 32)
    assert mask.sum(1).tolist() == features.lengths.tolist()
    assert torch.equal(values[mask], features.values)
    assert not values[~mask].any()
    with pytest.raises(ValueError, match="pooled by 'mean'"):
        extract_features(build("gpt2"), tokenizer(), TEXTS, pooling="mean").padded()


def test_batches_are_bounded_and_sorted():
    """No batch above the bound, similar lengths together, and a text above the bound alone."""
    model, shapes = build("gpt2"), []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    texts = ["a" * length for length in (3, 50, 8, 7, 3, 2, 8, 1)]
    extract_features(model, tokenizer(), texts, pooling="mean", max_tokens=24)
    assert shapes == [(1, 50), (3, 8), (4, 3)]


def test_memory_does_not_grow_with_the_texts():
    """What is alive while the model runs: the results of pooled features are small, all the rest is one batch."""
    model, alive = build("gpt2"), []
    model.base_model.register_forward_hook(lambda *args: alive.append(tensors_alive()))
    extract_features(model, tokenizer(), ["abcdefgh"] * 200, pooling="mean", max_tokens=80)
    assert len(alive) == 20
    assert max(alive[10:]) <= max(alive[1:10])


def tensors_alive():
    import gc

    return sum(each.numel() for each in gc.get_objects() if type(each) is torch.Tensor and each.ndim == 3)


def test_the_model_is_left_as_it_was():
    model = build("bart", dropout=0.5, attention_dropout=0.5, activation_dropout=0.5)
    expected = extract_features(model, tokenizer(), TEXTS, pooling="mean").values
    model.train()
    model.model.shared.eval()
    assert torch.equal(extract_features(model, tokenizer(), TEXTS, pooling="mean").values, expected)
    assert model.training
    assert not model.model.shared.training
    assert tokenizer().padding_side == "left"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pooling", ["none", "mean"])
def test_files(tmp_path, dtype, pooling):
    model, path = build("gpt2"), tmp_path / "features.safetensors"
    expected = extract_features(model, tokenizer(), TEXTS, pooling=pooling, dtype=dtype)
    written = extract_features(model, tokenizer(), TEXTS, pooling=pooling, dtype=dtype, out=path, max_tokens=40)
    assert written.values.dtype == dtype
    torch.testing.assert_close(
        written.values, expected.values, rtol=2e-2 if dtype != torch.float32 else 1e-4, atol=2e-2
    )
    assert [each.name for each in tmp_path.iterdir()] == ["features.safetensors"]
    tensors = load_file(path)
    assert torch.equal(tensors["features"], written.values)
    assert torch.equal(tensors["lengths"], expected.lengths)
    expected.save(path)
    again = load_features(path)
    assert torch.equal(again.values, expected.values)
    assert (again.pooling, len(again)) == (pooling, len(TEXTS))


def test_numpy(tmp_path):
    features = extract_features(build("gpt2"), tokenizer(), TEXTS)
    features.save(tmp_path / "features.npz")
    with np.load(tmp_path / "features.npz") as arrays:
        np.testing.assert_array_equal(arrays["features"], features.values.numpy())
        assert arrays["lengths"].tolist() == features.lengths.tolist()
    again = load_features(tmp_path / "features.npz")
    assert again.pooling == "none"
    assert torch.equal(again[2], features[2])
    with pytest.raises(ValueError, match="numpy has no bfloat16"):
        Features(features.values.bfloat16(), features.lengths, "none").save(tmp_path / "b.npz")
    with pytest.raises(ValueError, match=r"must end in \.safetensors or \.npz"):
        features.save(tmp_path / "b.csv")


def test_a_failure_leaves_no_file(tmp_path):
    model = build("gpt2")
    calls = []

    def fail_later(*args):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("broken")

    model.base_model.register_forward_pre_hook(fail_later)
    with pytest.raises(RuntimeError, match="broken"):
        extract_features(model, tokenizer(), TEXTS, out=tmp_path / "f.safetensors", max_tokens=8)
    assert not list(tmp_path.iterdir())


def test_long_texts(caplog):
    model = make("bert")
    with pytest.raises(
        ValueError, match=r"texts\[1\] has 41 tokens, but .* holds 40; allowed: max_length of at most 40"
    ):
        extract_features(model, tokenizer(), ["a", "b" * 41])
    with caplog.at_level(logging.WARNING, "simctg_fast"):
        features = extract_features(model, tokenizer(), ["a", "b" * 41], max_length=40)
    assert features.truncated == (1,)
    assert "1 of 2 texts were cut" in caplog.text
    assert features.lengths.tolist() == [1, 40]
    with pytest.raises(ValueError, match="holds 39"):  # RoBERTa's first position is that behind its padding's
        extract_features(make("roberta"), tokenizer(), ["b" * 40])
    assert len(extract_features(make("roberta"), tokenizer(), ["b" * 39])) == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"pooling": "max"}, r"pooling must be one of .* got 'max'"),
        ({"layer": 3}, r"layer must be in \[-3, 3\) for this model, got 3"),
        ({"layer": -4}, r"layer must be in \[-3, 3\)"),
        ({"texts": {"one": 1}}, r"texts must be a string or a list of strings, got dict \{'one': 1\}"),
        ({"texts": []}, r"at least one text"),
        ({"texts": ["a", ""]}, r"texts\[1\] must have at least one token, got ''"),
        ({"max_length": 0}, r"max_length must be an integer of at least 1, got 0"),
        ({"max_tokens": 0}, r"max_tokens must be an integer of at least 1, got 0"),
        ({"dtype": torch.int8}, r"dtype must be one of .* torch\.int8"),
        ({"out": "f.npz"}, r"out must end in \.safetensors, got 'f\.npz'"),
    ],
)
def test_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        extract_features(build("gpt2"), tokenizer(), **({"texts": TEXTS} | arguments))


@pytest.mark.parametrize(
    ("texts", "text"),
    [
        (["a", 3], r"texts must be a string or a list of strings, but texts\[1\] is int 3"),
        (["a", "x\ud83d"], r"texts\[1\] must be text, got half of a surrogate pair"),
        ({"text": "a"}, "got dict"),
    ],
)
def test_what_is_no_text_is_named(texts, text):
    with pytest.raises(ValueError, match=text):
        extract_features(build("gpt2"), tokenizer(), texts)


def test_texts_however_they_are_given():
    model = build("gpt2")
    expected = extract_features(model, tokenizer(), TEXTS, pooling="mean").values
    for given in (tuple(TEXTS), iter(TEXTS), np.array(TEXTS)):
        assert torch.equal(extract_features(model, tokenizer(), given, pooling="mean").values, expected)
    one = extract_features(model, tokenizer(), TEXTS[2])
    assert len(one) == 1
    assert one.lengths.tolist() == [len(TEXTS[2])]


def test_a_tokenizer_that_cannot():
    def characters(texts, **options):
        if any("é" in text for text in texts):
            raise UnicodeError("no é")
        return tokenizer()(texts, **options)

    with pytest.raises(ValueError, match=r"texts\[1\] cannot be tokenized \(UnicodeError: no é\), got 'café'"):
        extract_features(build("gpt2"), characters, ["a", "café"])


def test_index_out_of_range():
    features = extract_features(build("gpt2"), tokenizer(), TEXTS)
    with pytest.raises(IndexError, match=r"index must be in \[-5, 5\), got 5"):
        features[5]


def test_features_are_shown_by_their_shape():
    features = extract_features(build("gpt2"), tokenizer(), TEXTS)
    assert repr(features) == f"Features(5 texts, values ({sum(map(len, TEXTS))}, 32) float32, pooling='none')"
    cut = extract_features(build("gpt2"), tokenizer(), TEXTS, pooling="mean", max_length=8, dtype=torch.float16)
    assert str(cut) == "Features(5 texts, values (5, 32) float16, pooling='mean', 2 truncated)"


# ---- nobody's file is lost -------------------------------------------------------------------------------------------


def small(pooling="mean"):
    rows = 3 if pooling == "none" else 2
    return Features(torch.arange(rows * 4.0).view(rows, 4), torch.tensor([1, 2]), pooling)


def writers(path):
    """The ways to write features to ``path``."""
    yield lambda: small().save(path)
    if path.suffix == ".safetensors":
        yield lambda: extract_features(build("gpt2"), tokenizer(), TEXTS, out=path)


def foreign(kind, path):
    if kind == "weights":
        save_file({"features": torch.ones(2, 4), "lengths": torch.ones(2)}, path, {"format": "pt"})
    elif kind == "npz":
        with path.open("wb") as file:
            np.savez(file, features=np.ones((2, 4)))
    elif kind == "npy":
        with path.open("wb") as file:
            np.save(file, np.ones(3))
    elif kind == "pooled otherwise":
        save_file({"features": torch.ones(2, 4), "lengths": torch.ones(2)}, path, {"pooling": "of water"})
    elif kind == "other tensors":
        save_file({"weight": torch.ones(2, 4)}, path, {"pooling": "mean"})
    elif kind == "torn":
        small().save(path)
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.write_bytes(b"" if kind == "empty" else b'{"text": "a"}')


FOREIGN = ["weights", "npz", "npy", "pooled otherwise", "other tensors", "torn", "empty", "text"]


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_other_files_are_left_alone(tmp_path, kind, suffix):
    path = tmp_path / f"file{suffix}"
    foreign(kind, path)
    before = path.read_bytes()
    (tmp_path / f"link{suffix}").symlink_to(path)
    for name in ("file", "link"):
        for write in writers(tmp_path / (name + suffix)):
            with pytest.raises(ValueError, match=rf"{name}\{suffix}' is there already and is no file of features"):
                write()
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ValueError, match=rf"file\{suffix}' holds no features of this library"):
        load_features(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_features_are_replaced_also_behind_a_link(tmp_path, suffix):
    path, link = tmp_path / f"file{suffix}", tmp_path / f"link{suffix}"
    link.symlink_to(path)
    small("none").save(link)
    path.chmod(0o600)
    assert link.is_symlink()
    for write in writers(link):
        write()
        assert link.is_symlink()
        assert path.stat().st_mode & 0o777 == 0o600, "as private as it was"
        assert len(load_features(path)) in (2, 5)
    assert {each.name for each in tmp_path.iterdir()} == {path.name, link.name}


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_features_are_saved_where_they_come_from(tmp_path, suffix):
    path = tmp_path / f"file{suffix}"
    small("none").save(path)
    features = load_features(path)
    features.save(path)
    features.save(path)
    assert torch.equal(features.values, small("none").values)
    assert torch.equal(load_features(path).values, features.values)


def test_places_that_hold_no_file(tmp_path):
    (tmp_path / "folder.npz").mkdir()
    os.mkfifo(tmp_path / "pipe.npz")
    (tmp_path / "text").write_text("a")
    for name, message in (("folder.npz", "is a folder"), ("pipe.npz", "is there already and is no file of features")):
        with pytest.raises(ValueError, match=message):
            small().save(tmp_path / name)
        with pytest.raises(ValueError, match="is not a file"):
            load_features(tmp_path / name)
    with pytest.raises(OSError, match="text"):
        small().save(tmp_path / "text" / "a.npz")
    with pytest.raises(FileNotFoundError, match=r"there is no file '.*a\.npz'"):
        load_features(tmp_path / "a.npz")


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_folders_are_made_and_homes_are_known(tmp_path, monkeypatch, suffix):
    monkeypatch.setenv("HOME", str(tmp_path))
    for write in writers(Path(f"~/a/b/file{suffix}")):
        write()
    assert (tmp_path / "a" / "b" / f"file{suffix}").is_file()
    assert load_features(f"~/a/b/file{suffix}").values.shape[-1] in (4, 32)


def test_what_is_named_partial_is_somebodys(tmp_path):
    for name in ("file.safetensors", "file.npz"):
        (tmp_path / f"{name}.partial").write_text("mine")
        small().save(tmp_path / name)
        assert (tmp_path / f"{name}.partial").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 4
    long = tmp_path / ("é" * 120 + ".npz")  # as long as a name may be, nearly
    small().save(long)
    assert len(load_features(long)) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing(tmp_path, monkeypatch, error):
    path = tmp_path / "file.safetensors"
    small().save(path)
    before = path.read_bytes()

    def interrupted(*args, **options):
        raise error

    with pytest.raises(error):
        extract_features(build("gpt2"), tokenizer(), TEXTS, out=path, on_progress=interrupted)
    for module, name in ((mmap, "mmap"), (torch, "frombuffer"), (os, "posix_fallocate")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, interrupted, raising=False)
            with pytest.raises(error):
                small().save(path)
    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(error):
        small().save(tmp_path / "file.npz")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_comes_meanwhile_is_kept_and_so_is_the_work(tmp_path):
    path = tmp_path / "file.safetensors"

    def somebody_writes(count):
        path.write_text("mine")

    with pytest.raises(ValueError, match=r"is there already .*; what was written is in '.*\.partial'"):
        extract_features(build("gpt2"), tokenizer(), TEXTS, out=path, on_progress=somebody_writes)
    assert path.read_text() == "mine"
    (kept,) = tmp_path.glob("*.partial")
    assert len(load_features(kept)) == len(TEXTS)


LIMITED = """
import resource, signal, sys, torch
from simctg_fast.cpu import modules
from simctg_fast.ops import _backends
from simctg_fast.reference.contrastive_search import true_float64
from simctg_fast.text.features import Features
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
features = Features(torch.ones(1 << 16, 64), torch.ones(1 << 16, dtype=torch.int64), "mean")
try:
    features.save(sys.argv[1])
except OSError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
def test_no_space(tmp_path, suffix):
    """The size of a file is limited in the child: the system refuses as a full disk does."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, tmp_path / f"a{suffix}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert "OSError [Errno 27] File too large" in done.stdout
    assert f"a{suffix}" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_so(tmp_path, monkeypatch, code):
    def full(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(
        OSError, match=rf"{os.strerror(code)} \([\d,]+ bytes are needed\): '.*a\.safetensors'"
    ) as caught:
        extract_features(build("gpt2"), tokenizer(), TEXTS, out=tmp_path / "a.safetensors")
    assert caught.value.errno == code
    assert not list(tmp_path.iterdir())
    (tmp_path / "in.txt").write_text("a")
    result = run(tmp_path / "in.txt", "-o", tmp_path / "a.safetensors")
    assert result.exit_code == 3
    assert os.strerror(code) in said(result)
    assert "model" not in said(result)


@pytest.mark.parametrize("way", ["unsupported", "absent"])
def test_a_system_that_cannot_reserve(tmp_path, monkeypatch, way):
    def unsupported(*args):
        raise OSError(errno.EOPNOTSUPP, "no")

    if way == "absent":
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    else:
        monkeypatch.setattr(os, "posix_fallocate", unsupported, raising=False)
    big = Features(torch.randn(3000, 200), torch.ones(3000, dtype=torch.int64), "mean")
    big.save(tmp_path / "a.safetensors")
    assert torch.equal(load_features(tmp_path / "a.safetensors").values, big.values)
    assert (tmp_path / "a.safetensors").stat().st_blocks * 512 >= 2_400_000


def test_what_a_file_cannot_hold(tmp_path):
    for metadata in ({"model": 3}, {"model": "x\ud83d"}, {4: "a"}):
        with pytest.raises(ValueError, match="metadata must be strings of UTF-8, got "):
            extract_features(build("gpt2"), tokenizer(), TEXTS, out=tmp_path / "a.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=r"features must be of one of .* got torch\.int8"):
        Features(torch.ones(2, 3, dtype=torch.int8), torch.ones(2, dtype=torch.int64), "mean").save(
            tmp_path / "a.safetensors"
        )
    assert not list(tmp_path.iterdir())


# ---- the command -----------------------------------------------------------------------------------------------------


def run(*arguments, **options):
    from simctg_fast.cli import app

    return CliRunner().invoke(app, ["features", *map(str, arguments)], **options)


def test_the_command(tmp_path):
    source, out = tmp_path / "in.jsonl", tmp_path / "out.safetensors"
    texts = ["The iterator protocol", "A dictionary", "Raises ValueError if the file is closed."]
    source.write_text("\n".join(json.dumps({"text": text, "id": index}) for index, text in enumerate(texts)))
    result = run(source, "-o", out, "--pooling", "mean", "--layer", 2)
    assert result.exit_code == 0, result.output
    assert "3 texts" in result.output
    model = transformers.AutoModel.from_pretrained(bundled_model_path()).eval()
    own = transformers.AutoTokenizer.from_pretrained(bundled_model_path())
    tensors = load_file(out)
    for index, text in enumerate(texts):
        with torch.no_grad():
            states = model(**own(text, return_tensors="pt"), output_hidden_states=True).hidden_states[2][0]
        torch.testing.assert_close(tensors["features"][index], states.mean(0), rtol=1e-4, atol=1e-4)
        assert tensors["lengths"][index] == len(states)


@pytest.mark.parametrize(
    ("content", "arguments", "text"),
    [
        ('{"text": "a"}\n{"txt": "b"}\n', (), "line 2: must be an object with a text"),
        ('{"text": "a"}\n{"text": \n', (), "line 2: not JSON"),
        ("\n\n", (), "holds no text"),
        ('{"text": "a"}', ("--pooling", "max"), "pooling must be one of"),
        ('{"text": "a"}', ("--dtype", "int8"), "--dtype must be"),
        ('{"text": "a"}', ("--model", "./nowhere"), "no model folder"),
    ],
)
def test_the_commands_errors(tmp_path, content, arguments, text):
    source = tmp_path / "in.jsonl"
    source.write_text(content)
    result = run(source, "-o", tmp_path / "out.safetensors", *arguments)
    assert result.exit_code == 2
    assert text in said(result)


def said(result):
    return " ".join(result.output.replace("│", " ").split())


def test_the_command_reads_standard_input(tmp_path):
    for content in ('{"text": "one"}\n{"text": "two"}', "\ufeffone\r\ntwo"):
        out = tmp_path / "new" / "out.safetensors"
        result = run("-", "-o", out, "--pooling", "mean", input=content.encode())
        assert result.exit_code == 0, result.output
        assert len(load_features(out)) == 2


def test_the_command_leaves_other_files_alone(tmp_path):
    """Its input among them, and before anything is read."""
    weights = tmp_path / "model.safetensors"
    foreign("weights", weights)
    (tmp_path / "in.txt").write_text("one")
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "in.txt")
    for out in (weights, tmp_path / "link.safetensors"):
        before = out.read_bytes()
        result = run(tmp_path / "in.txt", "-o", out, "--model", "./nowhere")
        assert result.exit_code == 2
        assert "is there already and is no file of features" in said(result)
        assert out.read_bytes() == before


def test_text_files(tmp_path):
    (tmp_path / "in.txt").write_text("one\n\n two \n")
    assert read_texts(tmp_path / "in.txt") == ["one", " two "]
    (tmp_path / "in.jsonl").write_text('{"text": "x"}\n{"text": "x\\ud83d"}')
    with pytest.raises(ValueError, match=r"in\.jsonl', line 2: text holds half of a surrogate pair, got 'x\\ud83d'"):
        read_texts(tmp_path / "in.jsonl")
    with pytest.raises(ValueError, match=r"must be a \.txt or \.jsonl file"):
        read_texts(__file__)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_texts(tmp_path / "nothing.txt")
