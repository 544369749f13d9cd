"""Texts as people give them: what they surely mean is taken, what else is refused by name."""

from __future__ import annotations

import collections
import enum
import gzip
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from simctg_fast.text.texts import read_lines, short, text_list, tokenized


class Colour(str, enum.Enum):
    RED = "red"


def test_texts_of_every_make():
    pandas = pytest.importorskip("pandas")
    two = ["a", "b c"]
    assert text_list("one text") == ["one text"]
    assert text_list("") == [""]
    assert text_list([]) == []
    for given in (two, tuple(two), (text for text in two), np.array(two), np.array(two, dtype=object)):
        assert text_list(given) == two
    for given in (pandas.Series(two), pandas.Series(two, index=[7, 3]), pandas.Index(two), pandas.array(two)):
        assert text_list(given) == two
    for given in ({"a": 1, "b c": 2}.keys(), {1: "a", 2: "b c"}.values(), collections.deque(two)):
        assert text_list(given) == two
    assert {type(text) for text in text_list(np.array(two))} == {str}
    assert text_list([Colour.RED]) == ["red"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"text": "a"}, r"texts must be a string or a list of strings, got dict \{'text': 'a'\}"),
        (collections.UserDict(text="a"), "got UserDict"),
        ({"a", "b"}, "got set"),
        (b"bytes", "got bytes b'bytes'"),
        (None, "got NoneType None"),
        (3, "got int 3"),
        (Path("a.txt"), "got PosixPath"),
        (io.StringIO("a\nb\n"), "got StringIO"),
        (np.array("a"), "got ndarray"),
        (np.array([["a", "b"]]), r"got ndarray \[\['a', 'b'\]\]|got ndarray array"),
        (np.array([1, 2]), r"but texts\[0\] is int64"),
        (["a", 3], r"but texts\[1\] is int 3"),
        (["a", None], r"but texts\[1\] is NoneType None"),
        (["a", ["b"]], r"but texts\[1\] is list \['b'\]"),
        ([b"a"], r"but texts\[0\] is bytes b'a'"),
        ([{"role": "user", "content": "a"}], r"but texts\[0\] is dict"),
        (("a", ("b", "c")), r"but texts\[1\] is tuple"),
        (["a", "x\ud83d"], r"texts\[1\] must be text, got half of a surrogate pair in 'x\\ud83d'"),
        ("x\udcff", r"texts\[0\] must be text"),
        (iter([float("nan")]), r"texts\[0\] is float nan"),
    ],
)
def test_what_is_no_text_is_named(given, message):
    with pytest.raises(ValueError, match=message):
        text_list(given)


def test_tables_are_no_texts():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(ValueError, match="got DataFrame") as caught:
        text_list(pandas.DataFrame({"text": ["a"]}))
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"but texts\[1\] is float nan|NAType|NoneType"):
        text_list(pandas.Series(["a", None], dtype=object))


def test_what_a_generator_raises_is_its_own():
    def broken():
        yield "a"
        raise RuntimeError("the database is gone")

    with pytest.raises(RuntimeError, match="the database is gone"):
        text_list(broken())


def ids(texts):
    return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def raising(texts, **options):
    if "bad" in texts:
        raise KeyError("no such piece")
    return ids(texts)


def without(result):
    return lambda texts, **options: result(texts) if "bad" in texts else ids(texts)


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (raising, r"KeyError: 'no such piece'"),
        (without(lambda texts: None), "the tokenizer returned None"),
        (without(lambda texts: {}), "KeyError: 'input_ids'"),
        (without(lambda texts: {"input_ids": None}), "input_ids of None in place of 1 texts"),
        (without(lambda texts: {"input_ids": []}), "input_ids of 0 in place of 1 texts"),
        (without(lambda texts: {"input_ids": [None] * len(texts)}), "returned no list of input_ids"),
        (without(lambda texts: {"input_ids": [1] * len(texts)}), "returned no list of input_ids"),
        (without(lambda texts: 3), "TypeError"),
    ],
)
def test_tokenizers_that_cannot(tokenizer, reason):
    assert tokenized(tokenizer, ["a", "b"]) == ids(["a", "b"])
    with pytest.raises(ValueError, match=rf"texts\[2\] cannot be tokenized \(.*{reason}.*\), got 'bad'"):
        tokenized(tokenizer, ["a", "b", "bad", "c"])


def test_tokenizers_that_can_but_not_together():
    def one_at_a_time(texts, **options):
        if len(texts) > 1:
            raise NotImplementedError("batches")
        return ids(texts)

    with pytest.raises(ValueError, match="takes each of the 2 texts, but not all together: batches"):
        tokenized(one_at_a_time, ["a", "b"])
    with pytest.raises(ValueError, match="input_ids of 1 in place of 2 texts"):
        tokenized(lambda texts: ids(texts[:1]), ["a", "b"])
    with pytest.raises(ValueError, match=r"texts\[1\] must have at least one token, got ''"):
        tokenized(lambda texts: ids(texts), ["a", ""])


def test_short():
    assert short("a\nb") == r"'a\nb'"
    assert len(short("a" * 500)) == 80


# ---- files -----------------------------------------------------------------------------------------------------------

OBJECTS = '\ufeff{"text": "a"}\r\n\r\n{"text": "é"}'


def texts(path, **options):
    return [line if record is None else record["text"] for _, line, record in read_lines(path, "texts", **options)]


@pytest.mark.parametrize("pack", ["", ".gz", ".zst"])
def test_files_of_lines(tmp_path, monkeypatch, pack):
    for name, content in (
        ("a.jsonl", OBJECTS),
        ("b.TXT", "\ufeffa\r \r\né"),
        ("c.jsonl", OBJECTS.replace("\r\n", "\r")),
    ):
        data = content.encode()
        if pack == ".zst":
            data = pytest.importorskip("zstandard").ZstdCompressor().compress(data)
        (tmp_path / (name + pack)).write_bytes(gzip.compress(data) if pack == ".gz" else data)
        assert texts(tmp_path / (name + pack)) == ["a", "é"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert texts("~/a.jsonl" + pack) == ["a", "é"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl', line 2: not UTF-8, got b'.*\\xff"),
        (b'{"text": "a"}\n{"text"', r"line 2: not JSON"),
        (b"[1]", r"line 1: must be an object, got '\[1\]'"),
        (b'"text"', "line 1: must be an object"),
        (b'{"text": "a", "n": ' + b"9" * 5000 + b"}", "line 1: not JSON .*5000 digits|line 1: not JSON .*limit"),
        (b'\n{"text": ' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}", "line 2: JSON that is nested too deeply"),
    ],
)
def test_bad_lines_are_named(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        texts(tmp_path / "a.jsonl")
    assert len(str(caught.value)) < 500


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\ncaf\xe9\n")
    with pytest.raises(ValueError, match=r"a\.txt', line 2: not UTF-8"):
        texts(tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a.csv", "a", "a.csv.gz", "a.json"])
def test_other_endings(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"a") if name.endswith("gz") else b"a")
    with pytest.raises(ValueError, match=rf"the texts must be a \.txt or \.jsonl file, got '.*{name}'"):
        texts(tmp_path / name)


def test_other_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file '.*a\.txt'"):
        texts(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="is a folder"):
        texts(tmp_path)
    with pytest.raises(ValueError, match="is a device"):
        texts("/dev/null")


SHOW = """
import sys, json
from simctg_fast.text.texts import read_lines
try:
    print(json.dumps([(place, record or line) for place, line, record in read_lines(sys.argv[1], "texts")]))
except ValueError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.parametrize("name", ["-", "/dev/stdin", "/dev/fd/0"])
def test_pipes_are_what_they_begin_with(name, tmp_path):
    def shown(content, **options):
        done = subprocess.run([sys.executable, "-c", SHOW, name], input=content, capture_output=True, **options)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout)
        return found if isinstance(found, str) else [line for _, line in found]

    assert shown(OBJECTS.encode()) == [{"text": "a"}, {"text": "é"}]
    assert shown(b"a\r\n\r\n b") == ["a", " b"]
    assert shown(b"[1]\n{}") == ["[1]", "{}"]
    assert shown(b"{not json}\n{}") == ["{not json}", "{}"]
    assert shown(b"") == []
    assert "line 2: not JSON" in shown(b'{"text": "a"}\nb\n')
    assert "line 1: JSON that is nested too deeply" in shown(b'{"text": ' + b"[" * 1_000_000)
    assert "line 2: not UTF-8" in shown(b"a\n\xff\n")
    # Where it is a file.
    (tmp_path / "file").write_bytes(OBJECTS.encode())
    with (tmp_path / "file").open("rb") as file:
        done = subprocess.run([sys.executable, "-c", SHOW, name], stdin=file, capture_output=True)
    assert [line for _, line in json.loads(done.stdout)] == [{"text": "a"}, {"text": "é"}]


@pytest.mark.parametrize(("name", "expected"), [("pipe", [{"text": "a"}]), ("pipe.txt", ['{"text": "a"}'])])
def test_named_pipes(tmp_path, name, expected):
    os.mkfifo(tmp_path / name)
    writer = threading.Thread(target=lambda: (tmp_path / name).write_text('{"text": "a"}'))
    writer.start()
    assert [record or line for _, line, record in read_lines(tmp_path / name, "texts")] == expected
    writer.join()


def test_only_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    for path in ("-", tmp_path / "pipe.txt"):
        with pytest.raises(ValueError, match=r"the texts must be a \.txt or \.jsonl file, got the pipe '.*': twice"):
            texts(path, only_files="twice")
