"""The output file, its lock and its manifest; input lines, shards and their merge."""

from __future__ import annotations

import gzip
import json
import os
import signal
import threading

import pytest

from simctg_fast.engine.job.inputs import BadLine, Changed, InputLines
from simctg_fast.engine.job.journal import Journal, JournalError, WriteError, id_key
from simctg_fast.engine.job.manifest import (
    ManifestError,
    check_manifest,
    manifest_path,
    model_fingerprint,
    write_manifest,
)
from simctg_fast.engine.job.merge import merge
from simctg_fast.engine.parameters import defaults
from simctg_fast.engine.requests import Request, parse_request
from simctg_fast.engine.results import error_result

from ..engine_jobs import write_lines


def line(request_id, text="x") -> bytes:
    return (json.dumps({"id": request_id, "text": text, "error": None}) + "\n").encode()


def parse(given, line, digest):
    return parse_request(given, defaults("contrastive"), "contrastive", line=line, digest=digest)


def test_append_and_reopen(tmp_path):
    with Journal(tmp_path / "out") as journal:
        journal.append(line("a"))
        journal.append(line(1))
        journal.append(error_result("invalid_json", "no", line=3).as_line())
    with Journal(tmp_path / "out") as journal:
        assert set(journal.done) == {id_key("a"), id_key(1), ("line", 3)}
        assert journal.failed == {("line", 3)}
        journal.append(line("1"))
    with Journal(tmp_path / "out") as journal:
        assert len(journal.done) == 4, "the id 1 and the id '1' are two"


@pytest.mark.parametrize("torn", [b'{"id": "b", "te', b"\xff", b"\0\0\0", b"{"])
def test_a_torn_last_line_is_cut(tmp_path, torn):
    path = tmp_path / "out"
    path.write_bytes(line("a") + torn)
    with Journal(path) as journal:
        assert set(journal.done) == {id_key("a")}
        assert journal.torn == len(torn)
        assert path.read_bytes() == line("a") + torn, "before anybody has said that it is a run's"
        journal.append(line("b"))
    assert path.read_bytes() == line("a") + line("b")


def test_a_last_record_that_lost_its_newline_is_kept(tmp_path):
    path = tmp_path / "out"
    path.write_bytes(line("a") + b"\n" + line("b")[:-1])
    with Journal(path) as journal:
        assert set(journal.done) == {id_key("a"), id_key("b")}
        journal.repair()
        journal.append(line("c"))
        journal.check()
    assert path.read_bytes() == line("a") + b"\n" + line("b") + line("c")


@pytest.mark.parametrize(
    "foreign", [b'{"prompt": "one line of somebody\'s"}', b"\x7fELF", b"a: 1", b'"x"', b"x" * 5000]
)
def test_a_file_of_somebody_else_is_not_touched(tmp_path, foreign):
    path = tmp_path / "out"
    path.write_bytes(foreign)
    with pytest.raises(JournalError, match=f"the output {path} is no file of a run"):
        Journal(path)
    assert path.read_bytes() == foreign


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.unlink(), "was deleted while the run was writing it: 3 of 3 records are missing"),
        (lambda path: path.rename(path.with_name("x")), "was deleted while"),
        (lambda path: os.truncate(path, 0), "was cut from .* to 0 bytes .*: 3 of 3 records are missing there"),
        (lambda path: os.truncate(path, len(line("a")) + 3), "2 of 3 records are missing there"),
        (lambda path: path.with_name("y").replace(path), "was replaced by another file"),
        (lambda path: path.open("ab").write(b"x"), "was written by something else: 1 bytes"),
    ],
)
def test_an_output_that_changes_under_a_run(tmp_path, change, words):
    path = tmp_path / "out"
    (tmp_path / "y").write_bytes(b"")
    with Journal(path) as journal:
        for request_id in "abc":
            journal.append(line(request_id))
        journal.check()
        change(path)
        with pytest.raises(WriteError, match=words):
            journal.append(line("d"))
        with pytest.raises(WriteError, match=words):
            journal.check()


def test_records_are_dropped_in_one_step(tmp_path):
    path = tmp_path / "out"
    with Journal(path) as journal:
        for request_id in "abc":
            journal.append(line(request_id))
        path.chmod(0o640)
        journal.drop({id_key("b")})
        assert path.read_bytes() == line("a") + line("c")
        assert path.stat().st_mode & 0o777 == 0o640
        with pytest.raises(JournalError, match="is being written by another run"):
            Journal(path)
        journal.append(line("d"))
        journal.check()
    assert path.read_bytes() == line("a") + line("c") + line("d")
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_an_output_behind_a_link_stays_there(tmp_path):
    (tmp_path / "folder").mkdir()
    link, path = tmp_path / "link", tmp_path / "folder" / "out"
    link.symlink_to(path)
    with Journal(link) as journal:
        for request_id in "ab":
            journal.append(line(request_id))
        journal.drop({id_key("a")})
        journal.append(line("c"))
        journal.check()
    assert link.is_symlink()
    assert path.read_bytes() == line("b") + line("c")


@pytest.mark.parametrize("name", ["fifo", "/dev/null", "/dev/full", "out.jsonl.gz"])
def test_an_output_is_a_regular_file(tmp_path, name):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(JournalError, match=r"is no regular file|choose a name without \.gz"):
        Journal(tmp_path / name)


@pytest.mark.parametrize(
    "foreign", [b"text\n", b"{}\n", b'{"id": null, "error": null}\n', b"[]\n", b"[" * 200000 + b"\n"]
)
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
    (tmp_path / "file").write_text("x")
    with pytest.raises(JournalError, match=r"cannot be written: (Not a directory|File exists)"):
        Journal(tmp_path / "file" / "out")
    Journal(tmp_path / "missing" / "folder" / "out").close()


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
    with pytest.raises(ManifestError, match=r"is not empty, but out\.manifest\.json"):
        check_manifest(out, {})


def test_a_manifest_from_before_a_setting_was_there(tmp_path):
    out = tmp_path / "out"
    write_manifest(out, {"top_k": 4}, {})
    check_manifest(out, {"top_k": 4, "share_prefixes": True})
    with pytest.raises(ManifestError, match="share_prefixes: true then, false now"):
        check_manifest(out, {"top_k": 4, "share_prefixes": False})


def test_a_manifest_of_another_version_is_named(tmp_path):
    out = tmp_path / "out"
    write_manifest(out, {"top_k": 4}, {"simctg_fast": "0.0.9"})
    path = manifest_path(out)
    path.write_text(path.read_text().replace('"format": 2', '"format": 1'))
    with pytest.raises(ManifestError, match=r"begun by another version of simctg_fast \(0\.0\.9\)"):
        check_manifest(out, {"top_k": 4})


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "null",
        "[]",
        "{}",
        '{"config": []}',
        '{"config": {}, "about": [1]}',
        '{"config": null}',
        "[" * 200000,
        "\xff",
    ],
)
def test_a_manifest_that_is_none_is_named_and_kept(tmp_path, content):
    out = tmp_path / "out"
    manifest_path(out).write_text(content, encoding="latin-1")
    for use in (check_manifest, lambda *given: write_manifest(*given, {})):
        with pytest.raises(ManifestError, match="is no manifest of a run") as caught:
            use(out, {})
        assert "\n" not in str(caught.value)
    assert manifest_path(out).read_text(encoding="latin-1") == content
    manifest_path(out).unlink()
    manifest_path(out).mkdir()
    with pytest.raises(ManifestError, match=r"is no manifest of a run: .*Is a directory"):
        write_manifest(out, {}, {})
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out.manifest.json"]


def test_a_fingerprint_sees_weights_trained_otherwise_and_templates(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(100_000))
    (tmp_path / "dangling.json").symlink_to(tmp_path / "nowhere")
    seen = {model_fingerprint(tmp_path)}
    (tmp_path / "model.safetensors").write_bytes(bytes(99_999) + b"\1")
    seen.add(model_fingerprint(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(bytes(50_000) + b"\1" * 50_000)
    seen.add(model_fingerprint(tmp_path))
    (tmp_path / "chat_template.jinja").write_text("a")
    seen.add(model_fingerprint(tmp_path))
    (tmp_path / "chat_template.jinja").write_text("b")
    seen.add(model_fingerprint(tmp_path))
    (tmp_path / "notes.txt").write_text("nothing to it")
    assert len(seen | {model_fingerprint(tmp_path)}) == 5


def requests(path, done=(), **shards):
    lines = InputLines(path, parse, done if isinstance(done, dict) else dict.fromkeys(done, ""), **shards)
    return [described(item) for item in lines], lines


def described(item):
    if isinstance(item, BadLine):
        return (item.error.kind, item.number)
    return item if isinstance(item, Changed) else item.id


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
    path.write_text('{"id": "a", "prompt": "x"}\n{"id": "b", "pro')
    os.utime(path, (1, 1))
    items, lines = requests(path)
    assert items == ["a", ("invalid_json", 2)], "nobody is writing it any more"
    assert lines.unfinished is None


@pytest.mark.parametrize("name", ["in.txt", "in.TXT", "in.txt.gz"])
def test_texts_are_prompts(tmp_path, name):
    path = tmp_path / name
    content = b"\xef\xbb\xbfone\r\n\ntwo \rthree\xff\nfour"
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    lines = list(InputLines(path, parse, {}))
    assert [each.prompt if isinstance(each, Request) else each.error.kind for each in lines] == [
        "one",
        "two ",
        "invalid_utf8",
        "four",
    ]
    assert [each.id for each in lines if isinstance(each, Request)] == ["line-1", "line-3", "line-5"]


def test_lines_that_changed_since_they_were_answered(tmp_path):
    path = write_lines(tmp_path / "in", [{"id": "a", "prompt": "x"}, {"prompt": "y"}, "{bad"])
    done = {}
    for item in InputLines(path, parse, {}):
        done[id_key(item.id) if isinstance(item, Request) else ("line", item.number)] = item.digest
    assert requests(path, done)[0] == []
    write_lines(path, ['{"prompt":"x",  "id":"a"}', {"prompt": "y"}, "{bad "])
    assert requests(path, done)[0] == [], "other white space and order of keys ask nothing else"
    write_lines(path, [{"id": "a", "prompt": "x"}, {"id": "new", "prompt": "z"}, {"prompt": "y"}, "{bad"])
    items, _ = requests(path, done)
    assert items == ["new", Changed(("line", 3), 3), ("invalid_json", 4)]
    write_lines(path, [{"id": "a", "prompt": "changed"}, {"prompt": "y"}, {"id": "b", "prompt": "mended"}])
    assert requests(path, done)[0] == [Changed(id_key("a"), 1), Changed(("line", 3), 3)]


def test_a_text_that_is_still_written(tmp_path):
    """Its last line is answered, unless somebody is seen to go on with it."""
    path = tmp_path / "in.txt"
    path.write_text("one\nt")
    assert requests(path)[0] == ["line-1", "line-2"]
    lines = InputLines(path, parse, {})
    items = iter(lines)
    assert next(items).id == "line-1"
    writer = threading.Timer(0.2, lambda: path.open("a").write("wo\n"))
    path.touch()
    writer.start()
    assert list(items) == []
    writer.join()
    assert lines.unfinished == 2


@pytest.mark.parametrize("when", ["deleted", "future"])
def test_a_last_line_that_is_none(tmp_path, when):
    path = tmp_path / "in"
    path.write_text('{"id": "a", "prompt": "x"}\n{"id": "b", "pro')
    os.utime(path, (1, 1) if when == "deleted" else (2**32, 2**32))
    lines = InputLines(path, parse, {})
    items = iter(lines)
    next(items)
    if when == "deleted":
        path.unlink()
    assert [described(item) for item in items] == [("invalid_json", 2)]


def test_a_line_put_in_front_is_seen_by_every_shard(tmp_path):
    path = write_lines(tmp_path / "in", [{"id": i, "prompt": "x"} for i in range(4)])
    answered = [{id_key(i): "" for i in requests(path, num_shards=2, shard_id=shard)[0]} for shard in range(2)]
    write_lines(path, [{"id": "new", "prompt": "x"}] + [{"id": i, "prompt": "x"} for i in range(4)])
    for shard in range(2):
        items, _ = requests(path, answered[shard], num_shards=2, shard_id=shard)
        assert {item.key for item in items if isinstance(item, Changed)} == set(answered[shard])


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
    with pytest.raises(FileNotFoundError, match="there is no file"):
        merge([tmp_path / "none"], tmp_path / "of none")
    assert not (tmp_path / "of none").exists()


def test_merge_refuses_different_settings(tmp_path):
    for shard, alpha in ((0, 0.5), (1, 0.6)):
        (tmp_path / str(shard)).write_bytes(line(shard))
        write_manifest(tmp_path / str(shard), {"shard_id": shard, "penalty_alpha": alpha}, {})
    with pytest.raises(ValueError, match="different settings"):
        merge([tmp_path / "0", tmp_path / "1"], tmp_path / "all")
