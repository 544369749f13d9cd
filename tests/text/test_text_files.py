"""Files of lines as they are in the world, and text that must not steer a terminal."""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import sys

import pytest

from simctg_fast.checks import user_path
from simctg_fast.printable import json_text, printable
from simctg_fast.text.files import ReadError, TextLines, content_suffix, is_utf8, made_parent


def lines(path) -> list[str]:
    found = list(TextLines(path))
    assert [number for number, _ in found] == list(range(1, len(found) + 1))
    return [line for _, line in found]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []),
        (b"\xef\xbb\xbf", []),
        (b"one", ["one"]),
        (b"\xef\xbb\xbfone\n", ["one\n"]),
        (b"one\r\ntwo\r\n", ["one\n", "two\n"]),
        (b"one\rtwo\rthree", ["one\n", "two\n", "three"]),
        (b"one\n\n\r\ntwo", ["one\n", "\n", "\n", "two"]),
        ("a\u2028b\x0bc\x0cd\x85e\n".encode(), ["a\u2028b\x0bc\x0cd\x85e\n"]),
        (b"a\x00b\n", ["a\x00b\n"]),
    ],
)
@pytest.mark.parametrize("pack", ["", ".gz", ".zst"])
def test_marks_and_line_ends(tmp_path, content, expected, pack):
    path = tmp_path / f"file.txt{pack}"
    if pack == ".zst":
        content = pytest.importorskip("zstandard").ZstdCompressor().compress(content)
    path.write_bytes(gzip.compress(content) if pack == ".gz" else content)
    assert lines(path) == expected
    assert content_suffix(path) == ".txt"


def test_bytes_that_are_no_text_stay_in_their_line(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"good\nb\xffd\n" + "é\n".encode())
    assert [is_utf8(line) for line in lines(path)] == [True, False, True]


def test_position_and_size(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"line\n" * 20000)
    reader = TextLines(path)
    positions = [reader.position for _ in reader]
    assert 0 < positions[0] < positions[-1] == reader.size == 100000


@pytest.mark.parametrize(
    "name", ["folder", "null", "socket", "utf16", "text.gz", "torn.gz", "text.zst", "torn.zst", "none"]
)
def test_what_cannot_be_read_is_named(tmp_path, name):
    path = tmp_path / name
    (tmp_path / "folder").mkdir()
    (tmp_path / "utf16").write_bytes("one".encode("utf-16"))
    (tmp_path / "text.gz").write_bytes(b"not packed")
    (tmp_path / "torn.gz").write_bytes(gzip.compress(os.urandom(5000))[:-9])
    if name.endswith(".zst"):
        packed = pytest.importorskip("zstandard").ZstdCompressor().compress(os.urandom(5000))
        path.write_bytes(b"not packed" if name == "text.zst" else packed[:-9])
    words = {"folder": "is a folder", "utf16": "is UTF-16, not UTF-8", "none": "there is no file"}
    if name == "null":
        path = "/dev/null"
    if name == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    with pytest.raises((ReadError, FileNotFoundError), match=words.get(name, "is a device|cannot be read")) as caught:
        lines(path)
    assert str(path) in str(caught.value)


def test_zstd_frames_one_behind_the_other(tmp_path):
    pack = pytest.importorskip("zstandard").ZstdCompressor().compress
    path = tmp_path / "several.zst"
    path.write_bytes(pack(b"one\ntw") + pack(b"o\n") + pack(b"x" * 300_000 + b"\nend"))
    assert lines(path) == ["one\n", "two\n", "x" * 300_000 + "\n", "end"]
    path.write_bytes(path.read_bytes() + b"something else")
    with pytest.raises(ReadError, match="cannot be read behind line"):
        lines(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_that_is_damaged_far_inside_is_read_up_to_there(tmp_path, suffix):
    path = tmp_path / f"torn{suffix}"
    content = b"".join(b"%d\n" % i for i in range(200000))
    pack = gzip.compress if suffix == ".gz" else pytest.importorskip("zstandard").ZstdCompressor().compress
    path.write_bytes(pack(content)[:-9])
    reader, seen = TextLines(path), []
    with pytest.raises(ReadError, match="cannot be read behind line"):
        seen.extend(number for number, _ in reader)
    assert len(seen) > 100000


def test_pipes():
    code = "from simctg_fast.text.files import TextLines; import sys; print([*TextLines(sys.argv[1])])"
    for name in ("-", "/dev/stdin"):
        done = subprocess.run([sys.executable, "-c", code, name], input=b"\xef\xbb\xbfa\r\nb", capture_output=True)
        assert done.stdout == b"[(1, 'a\\n'), (2, 'b')]\n", done.stderr


def test_home_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/x/y") == tmp_path / "x" / "y"
    assert user_path("x~/y").as_posix() == "x~/y"
    with pytest.raises(ValueError, match="'~nobody-of-that-name/x' begins with ~"):
        user_path("~nobody-of-that-name/x")
    assert made_parent("~/a/b/c.txt").parent.is_dir()
    with pytest.raises(ValueError, match="'~/d/' is the name of a folder"):
        made_parent("~/d/")


def test_control_characters_are_shown():
    text = "a\x1b]0;title\x07b\x9b31m\rc\x7f\u202ed\ud800\n\té\U0001f600"
    assert printable(text) == "a\\x1b]0;title\\x07b\\x9b31m\\x0dc\\x7f\\u202ed\\ud800\n\té\U0001f600"
    marks = "\u061c\u200e\u200f\u202a\u202c\u2066\u2069"
    assert printable(marks) == marks.encode("unicode_escape").decode()


def test_json_steers_nothing():
    """It reads as what was given, and is left as it is where that steers nothing."""
    value = {"text": "a\x1b\x9b31m\x7f\u061c\u202ed\u2066é\U0001f600\n", "\u202e": [1.5, None]}
    line = json_text(value)
    assert json.loads(line) == value
    assert line == printable(line)
    assert "é\U0001f600" in line
    assert line.isprintable()
