"""The output file, its lock and its manifest; input lines, shards and their merge."""

from __future__ import annotations

import json
import os
import signal

import pytest

from simctg_fast.engine.inputs import InputLines
from simctg_fast.engine.journal import Journal, JournalError, id_key
from simctg_fast.engine.manifest import ManifestError, check_manifest, manifest_path, write_manifest
from simctg_fast.engine.merge import merge
from simctg_fast.engine.parameters import defaults
from simctg_fast.engine.requests import parse_request
from simctg_fast.engine.results import error_result

from .engine_jobs import write_lines


def line(request_id, text="x") -> bytes:
    return (json.dumps({"id": request_id, "text": text, "error": None}) + "\n").encode()


def parse(given, line):
    return parse_request(given, defaults("contrastive"), "contrastive", line=line)


def test_append_and_reopen(tmp_path):
    with Journal(tmp_path / "out") as journal:
        journal.append(line("a"))
        journal.append(line(1))
        journal.append(error_result("invalid_json", "no", line=3).as_line())
    with Journal(tmp_path / "out") as journal:
        assert journal.done == {id_key("a"), id_key(1), ("line", 3)}
        assert journal.errors == 1
        journal.append(line("1"))
    with Journal(tmp_path / "out") as journal:
        assert len(journal.done) == 4, "the id 1 and the id '1' are two"


@pytest.mark.parametrize("torn", [b'{"id": "b", "te', b"\xff", b'{"id": "b", "text": "", "error": null}'])
def test_a_torn_last_line_is_cut(tmp_path, torn):
    path = tmp_path / "out"
    path.write_bytes(line("a") + torn)
    with Journal(path) as journal:
        assert journal.done == {id_key("a")}
        assert journal.cut == len(torn)
        journal.append(line("b"))
    assert path.read_bytes() == line("a") + line("b")


@pytest.mark.parametrize("foreign", [b"text\n", b"{}\n", b'{"id": null, "error": null}\n', b"[]\n"])
def test_a_line_that_is_no_record_is_refused(tmp_path, foreign):
    (tmp_path / "out").write_bytes(line("a") + foreign)
    with pytest.raises(JournalError, match="line 2 of the output"):
        Journal(tmp_path / "out")


def test_an_output_with_an_id_twice_is_refused(tmp_path):
    (tmp_path / "out").write_bytes(line("a") * 2)
    with pytest.raises(JournalError, match='repeats id "a"'):
        Journal(tmp_path / "out")


def test_two_runs_on_one_output(tmp_path):
    """The lock is the system's: it goes with its owner, killed or not."""
    reading, writing = os.pipe()
    other = os.fork()
    if other == 0:
        journal = Journal(tmp_path / "out")
        os.write(writing, b"open" if journal.size == 0 else b"full")
        signal.pause()
    try:
        assert os.read(reading, 4) == b"open"
        with pytest.raises(JournalError, match="is being written by another run"):
            Journal(tmp_path / "out")
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
    Journal(tmp_path / "out").close()


def test_an_output_that_cannot_be_written(tmp_path):
    with pytest.raises(JournalError, match="Is a directory"):
        Journal(tmp_path)
    with pytest.raises(JournalError, match="No such file or directory"):
        Journal(tmp_path / "missing" / "out")


def test_a_failed_write_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "out"
    journal = Journal(path)
    journal.append(line("a"))
    real = os.write
    chunks = []

    def short(file, data):
        if chunks:
            raise OSError(28, "No space left on device")
        chunks.append(real(file, data[:5]))
        return chunks[0]

    monkeypatch.setattr(os, "write", short)
    with pytest.raises(OSError, match="No space left"):
        journal.append(line("b"))
    monkeypatch.undo()
    journal.append(line("c"))
    journal.close()
    assert path.read_bytes() == line("a") + line("c")


def test_the_manifest_names_every_difference(tmp_path):
    out = tmp_path / "out"
    write_manifest(out, {"top_k": 4, "stop": []}, {"torch": "2"})
    check_manifest(out, {"top_k": 4, "stop": []})
    with pytest.raises(ManifestError) as caught:
        check_manifest(out, {"top_k": 5, "stop": [], "seed": 1})
    assert "top_k: 4 then, 5 now" in str(caught.value)
    assert "seed: null then, 1 now" in str(caught.value)
    assert "stop" not in str(caught.value)
    manifest_path(out).unlink()
    with pytest.raises(ManifestError, match=r"holds records, but out\.manifest\.json"):
        check_manifest(out, {})
    manifest_path(out).write_text("{")
    with pytest.raises(ManifestError, match="cannot be read"):
        check_manifest(out, {})


def requests(path, done=(), **shards):
    lines = InputLines(path, parse, set(done), **shards)
    items = [item.id if not isinstance(item, tuple) else (item[0].kind, item[1]) for item in lines]
    return items, lines


def test_input_lines(tmp_path):
    path = write_lines(
        tmp_path / "in", [{"id": "a", "prompt": "x"}, "{bad", "", {"prompt": "x"}, {"id": "a", "prompt": "y"}]
    )
    items, lines = requests(path)
    assert items == ["a", ("invalid_json", 2), "line-4", ("duplicate_id", 5)]
    assert lines.total == 4
    items, lines = requests(path, [id_key("a"), ("line", 5)])
    assert items == [("invalid_json", 2), "line-4"]
    assert lines.skipped == 2


def test_an_unfinished_last_line_waits_for_the_next_run(tmp_path):
    path = tmp_path / "in"
    path.write_text('{"id": "a", "prompt": "x"}\n{"id": "b", "pro')
    items, lines = requests(path)
    assert items == ["a"]
    assert lines.unfinished == 2
    path.write_text('{"id": "a", "prompt": "x"}\n{"id": "b", "prompt": "y"}')
    assert requests(path)[0] == ["a", "b"], "whole, though without its newline"


def test_shards_share_out_every_line_once(tmp_path):
    path = write_lines(tmp_path / "in", [{"id": i % 9, "prompt": "x"} for i in range(10)])
    shards = [requests(path, num_shards=3, shard_id=i)[0] for i in range(3)]
    assert shards == [[0, 3, 6, ("duplicate_id", 10)], [1, 4, 7], [2, 5, 8]], "duplicates are seen across shards"


def test_merge(tmp_path):
    source = write_lines(tmp_path / "in", [{"id": i, "prompt": "x"} for i in ("c", "a", "b")])
    (tmp_path / "0").write_bytes(line("b") + line("c"))
    (tmp_path / "1").write_bytes(line("a"))
    assert merge([tmp_path / "0", tmp_path / "1"], tmp_path / "all") == 3
    assert (tmp_path / "all").read_bytes() == line("a") + line("b") + line("c")
    merge([tmp_path / "0", tmp_path / "1"], tmp_path / "ordered", source)
    assert (tmp_path / "ordered").read_bytes() == line("c") + line("a") + line("b")
    with pytest.raises(FileExistsError):
        merge([tmp_path / "0"], tmp_path / "all")
    with pytest.raises(ValueError, match='repeats id "a"'):
        merge([tmp_path / "1", tmp_path / "all"], tmp_path / "twice")
    (tmp_path / "1").write_bytes(line("a")[:-1])
    with pytest.raises(ValueError, match="torn"):
        merge([tmp_path / "1"], tmp_path / "torn")


def test_merge_refuses_different_settings(tmp_path):
    for shard, alpha in ((0, 0.5), (1, 0.6)):
        (tmp_path / str(shard)).write_bytes(line(shard))
        write_manifest(tmp_path / str(shard), {"shard_id": shard, "penalty_alpha": alpha}, {})
    with pytest.raises(ValueError, match="different settings"):
        merge([tmp_path / "0", tmp_path / "1"], tmp_path / "all")
