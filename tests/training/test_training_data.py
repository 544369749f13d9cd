"""Files of training data as they are in the world."""

from __future__ import annotations

import gzip
import os

import pytest

from simctg_fast.training.data import Example, read_examples

PAIR = '{"source": "b", "target": "c"}'


@pytest.mark.parametrize("pack", ["", ".gz", ".zst"])
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "\ufeffa\r\n\r\n é ", [Example("a"), Example("é")]),
        ("a.TXT", "a\rb", [Example("a"), Example("b")]),
        ("a.txt", '{"text": "a"}', [Example('{"text": "a"}')]),
        ("a.jsonl", f'\ufeff{{"text": " a"}}\r\n{PAIR}', [Example(" a"), Example("c", "b")]),
        ("a.JSONL", f"{PAIR}\r{PAIR}", [Example("c", "b")] * 2),
        ("a.jsonl", '{"text": "x", "source": 3, "target": "y"}', [Example("x")]),
    ],
)
def test_files(tmp_path, monkeypatch, pack, name, content, expected):
    data = content.encode()
    if pack == ".zst":
        data = pytest.importorskip("zstandard").ZstdCompressor().compress(data)
    (tmp_path / (name + pack)).write_bytes(gzip.compress(data) if pack == ".gz" else data)
    assert read_examples(tmp_path / (name + pack)) == expected
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_examples(f"~/{name}{pack}") == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": "caf\xe9"}', r"a\.jsonl', line 2: not UTF-8"),
        (b'{"text": "x\\ud83d"}', r"line 1: text holds half of a surrogate pair, got 'x\\ud83d'"),
        (b'{"source": "x\\ud83d", "target": "y"}', "line 1: source holds half"),
        (b'{"prompt": "x", "completion": "\\udc00y"}', "line 1: completion holds half"),
        (b"[" * 1_000_000, "line 1: JSON that is nested too deeply"),
        (b'{"text": ' + b"9" * 5000 + b"}", "line 1: not JSON"),
        (b'{"source": "a"}', "line 1: must be an object with text, source and target"),
    ],
)
def test_bad_lines(tmp_path, content, message):
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_examples(tmp_path / "a.jsonl")


def test_no_pipes(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in ("-", tmp_path / "pipe.jsonl"):
        with pytest.raises(
            ValueError, match=r"the data must be .* got the pipe '.*': training reads its data more than"
        ):
            read_examples(path)
    with pytest.raises(ValueError, match="is a device"):
        read_examples("/dev/null")
    with pytest.raises(ValueError, match="is a folder"):
        read_examples(tmp_path)
