"""Jobs in files: killed, interrupted, continued, and all that can go wrong on the way, with real processes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from ..engine_jobs import JobServer, read_records, save_model, sorted_lines, wait_for_records, write_lines
from ..processes import started

SETTINGS = ("--slots", 8, "--max-new-tokens", 24, "--quiet")


@pytest.fixture(scope="module")
def server(tmp_path_factory, model):
    made = JobServer(tmp_path_factory.mktemp("jobs"), model)
    yield made
    made.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def requests(count: int) -> list[dict]:
    draw = random.Random(0)
    return [
        {
            "id": f"request-{i}",
            "prompt": "".join(draw.choices("abcdefgh .,", k=draw.randint(3, 60))),
            "max_new_tokens": draw.randint(4, 32),
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def many(tmp_path_factory, server, model):
    """The input of 200 requests, and what an uninterrupted run makes of it."""
    folder = tmp_path_factory.mktemp("many")
    source = write_lines(folder / "in.jsonl", requests(200))
    began = time.monotonic()
    assert server.run("run", source, "-m", model, "-o", folder / "whole.jsonl", *SETTINGS) == 0
    many_seconds = time.monotonic() - began
    assert server.summary["generated_tokens"] > 2000
    return source, sorted_lines(folder / "whole.jsonl"), many_seconds


def kill_and_resume(server, model, many, tmp_path, kills: int, seed: int) -> None:
    source, expected, seconds = many
    out = tmp_path / "out.jsonl"
    draw = random.Random(seed)
    before = b""
    for _ in range(kills):
        pid = server.start("run", source, "-m", model, "-o", out, *SETTINGS)
        time.sleep(draw.uniform(0, 1.5 * seconds / kills))
        os.kill(pid, signal.SIGKILL)
        server.wait(pid)
        now = out.read_bytes() if out.exists() else b""
        assert now.startswith(before), "a line that was written has changed"
        before = now[: now.rfind(b"\n") + 1]
    assert server.run("run", source, "-m", model, "-o", out, *SETTINGS) == 0, server.stderr
    assert out.read_bytes().startswith(before)
    assert sorted_lines(out) == expected


def test_killed_three_times(server, model, many, tmp_path):
    kill_and_resume(server, model, many, tmp_path, 3, seed=1)


@pytest.mark.full
@pytest.mark.parametrize("seed", [2, 3])
def test_killed_twenty_times(server, model, many, tmp_path, seed):
    kill_and_resume(server, model, many, tmp_path, 20, seed)


def test_killed_while_writing_a_line(server, model, many, tmp_path):
    """The last line torn at every kind of place."""
    source, expected, _ = many
    for cut in (1, 40, -1):
        out = tmp_path / f"out{cut}.jsonl"
        pid = server.start("run", source, "-m", model, "-o", out, *SETTINGS)
        wait_for_records(out, 150)
        os.kill(pid, signal.SIGKILL)
        server.wait(pid)
        lines = out.read_bytes().splitlines(keepends=True)[:150]
        out.write_bytes(b"".join(lines[:-1]) + lines[-1][:cut])
        assert server.run("run", source, "-m", model, "-o", out, *SETTINGS) == 0
        assert sorted_lines(out) == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_finish_what_is_in_work(server, model, many, tmp_path, number):
    source, expected, _ = many
    out = tmp_path / "out.jsonl"
    pid = server.start("run", source, "-m", model, "-o", out, *SETTINGS)
    wait_for_records(out, 20)
    os.kill(pid, number)
    assert server.wait(pid) == 128 + number
    assert "the same command goes on from here" in server.stderr
    count = len(read_records(out))
    assert 20 <= count < 200
    assert out.read_bytes().endswith(b"\n")
    assert server.summary["requests"] == count
    assert server.run("run", source, "-m", model, "-o", out, *SETTINGS) == 0
    assert server.summary["resumed"] == count
    assert sorted_lines(out) == expected


def test_a_second_interrupt_ends_at_once(server, model, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", [{"id": i, "prompt": "x", "max_new_tokens": 1000} for i in range(8)])
    source.open("a").write(json.dumps({"id": "short", "prompt": "x", "max_new_tokens": 2}) + "\n")
    out = tmp_path / "out.jsonl"
    pid = server.start("run", source, "-m", model, "-o", out, "--slots", 9, "--quiet")
    wait_for_records(out, 1)
    os.kill(pid, signal.SIGINT)
    time.sleep(0.2)
    os.kill(pid, signal.SIGINT)
    began = time.monotonic()
    assert server.wait(pid) == 130
    assert time.monotonic() - began < 2
    assert server.summary["stopped"] == "aborted"
    assert [record["id"] for record in read_records(out)] == ["short"]


def test_the_same_command_again_does_nothing(server, model, tmp_path):
    """It does not even load the model, so there is nothing to tell of an engine."""
    source = write_lines(tmp_path / "in.jsonl", requests(3))
    out = tmp_path / "out.jsonl"
    assert server.run("run", source, "-m", model, "-o", out, *SETTINGS) == 0
    written = out.read_bytes()
    assert server.summary["slots"] is not None
    assert server.run("run", source, "-m", model, "-o", out, *SETTINGS) == 0
    assert server.summary["slots"] is None
    assert out.read_bytes() == written
    assert server.summary["requests"] == 0
    assert server.summary["resumed"] == 3


def test_an_input_that_grows(server, model, tmp_path):
    lines = requests(6)
    source = write_lines(tmp_path / "in.jsonl", lines[:4])
    out = tmp_path / "out.jsonl"
    assert server.run("run", source, "-m", model, "-o", out, *SETTINGS) == 0
    first = out.read_bytes()
    with source.open("a") as file:
        file.write(json.dumps(lines[4]) + "\n" + json.dumps(lines[5])[:20])
    assert server.run("run", source, "-m", model, "-o", out, *SETTINGS) == 1, "half a line is not nothing"
    assert server.summary["unfinished_line"] == 6
    write_lines(source, lines)
    assert server.run("run", source, "-m", model, "-o", out, *SETTINGS) == 0
    assert out.read_bytes().startswith(first)
    assert len(read_records(out)) == 6


def test_openai_batch_lines(server, model, tmp_path):
    """Answered as such, beside others, with the same text; continued by their `custom_id`."""
    body = {"prompt": "abc abc", "max_tokens": 6}
    batch = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    plain = {"id": "b", "prompt": "abc abc", "max_new_tokens": 6}
    source = write_lines(tmp_path / "in.jsonl", [batch, plain])
    out = tmp_path / "out.jsonl"
    assert server.run("run", source, "-m", model, "-o", out, *SETTINGS) == 0
    answers = {record.get("custom_id") or record["id"]: record for record in read_records(out)}
    assert answers["a"]["response"]["status_code"] == 200
    choice = answers["a"]["response"]["body"]["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == (answers["b"]["text"], "length")
    write_lines(source, [batch, plain, batch | {"custom_id": "c"}])
    assert server.run("run", source, "-m", model, "-o", out, *SETTINGS) == 0
    assert (server.summary["requests"], server.summary["resumed"]) == (1, 2)


def test_a_processor_that_raises_on_one_request(server, model, tmp_path):
    """Its code is found beside the job; the request it fails on has an error record, the others their answers."""
    (tmp_path / "upset.py").write_text(
        "class Upset:\n"
        "    def __call__(self, input_ids, scores):\n"
        "        raise KeyError('not this one')\n"
        "def make(request, tokenizer):\n"
        "    return Upset() if request['id'] == 'request-1' else None\n"
    )
    source = write_lines(tmp_path / "in.jsonl", requests(4))
    command = ("run", source, "-m", model, *SETTINGS)
    assert server.run(*command, "-o", tmp_path / "plain.jsonl") == 0
    out = tmp_path / "out.jsonl"
    factory = ("--processor", "upset:make")
    assert server.run(*command, "-o", out, *factory, EXTRA_PATH=str(tmp_path)) == 1
    failed = {record["id"]: record["error"] for record in read_records(out)}
    assert failed.pop("request-1")["type"] == "processor_error"
    assert failed == {f"request-{i}": None for i in (0, 2, 3)}
    plain = [line for line in sorted_lines(tmp_path / "plain.jsonl") if b'"request-1"' not in line]
    assert [line for line in sorted_lines(out) if b'"request-1"' not in line] == plain


BAD_LINES = [
    ("{not json", "invalid_json"),
    ('["a list"]', "not_an_object"),
    ({"id": "none"}, "no_prompt"),
    ({"id": "empty", "prompt": " "}, "empty_prompt"),
    ({"id": "both", "prompt": "x", "messages": []}, "two_prompts"),
    ({"id": "key", "prompt": "x", "temprature": 1}, "unknown_key"),
    ({"id": "type", "prompt": ["x"]}, "invalid_type"),
    ({"id": "range", "prompt": "x", "penalty_alpha": 2}, "invalid_value"),
    ({"id": "long", "prompt": "x" * 1020}, "too_long"),
    ({"id": "good-0", "prompt": "again"}, "duplicate_id"),
    ({"id": [1], "prompt": "x"}, "invalid_id"),
    ({"id": "chat", "messages": [{"role": "user", "content": "x"}]}, "no_chat_template"),
    ({"custom_id": "openai", "body": {"prompt": "x", "n": 0}}, "invalid_value"),
]


def test_bad_lines_hurt_nobody(server, model, tmp_path):
    good = [{"id": f"good-{i}", "prompt": "abc " * (i + 1)} for i in range(len(BAD_LINES))]
    mixed = [line for pair in zip(good, (line for line, _ in BAD_LINES), strict=True) for line in pair]
    source = write_lines(tmp_path / "in.jsonl", mixed)
    with source.open("ab") as file:
        file.write(b'{"id": "\xff"}\n')
    out = tmp_path / "out.jsonl"
    assert server.run("run", source, "-m", model, "-o", out, *SETTINGS) == 1
    records = read_records(out)
    assert len(records) == len(mixed) + 1
    by_line = {}
    for record in records:
        if record["error"] is not None:
            by_line[record["error"]["line"]] = record["error"].get("type") or record["error"]["code"]
    assert by_line == {2 * i + 2: kind for i, (_, kind) in enumerate(BAD_LINES)} | {len(mixed) + 1: "invalid_utf8"}
    assert server.summary["errors"]["invalid_value"] == 2
    clean = write_lines(tmp_path / "clean.jsonl", good)
    assert server.run("run", clean, "-m", model, "-o", tmp_path / "clean.out", *SETTINGS) == 0
    assert sorted_lines(tmp_path / "clean.out") == sorted(
        (line for line in out.read_bytes().splitlines() if json.loads(line).get("error") is None),
        key=lambda line: json.dumps(json.loads(line)["id"]),
    )
    before = out.read_bytes()
    assert server.run("run", source, "-m", model, "-o", out, *SETTINGS) == 1, "still some errors"
    assert out.read_bytes() == before, "errors are answers: they are not asked again"


def test_a_changed_configuration_is_refused_with_the_difference(server, model, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", requests(2))
    out = tmp_path / "out.jsonl"
    assert server.run("run", source, "-m", model, "-o", out, *SETTINGS) == 0
    before = out.read_bytes()
    assert server.run("run", source, "-m", model, "-o", out, *SETTINGS, "--penalty-alpha", 0.5) == 2
    assert "penalty_alpha: 0.6 then, 0.5 now" in server.stderr
    other = save_model(tmp_path / "other", n_layer=1)
    assert server.run("run", source, "-m", other, "-o", out, *SETTINGS) == 2
    assert "model_fingerprint" in server.stderr
    assert out.read_bytes() == before


def test_two_runs_on_one_output(server, model, tmp_path):
    """The lock goes with the process that holds it."""
    lines = [{"id": i, "prompt": "x", "max_new_tokens": 1000} for i in range(8)]
    source = write_lines(tmp_path / "in.jsonl", [*lines, {"id": "short", "prompt": "x", "max_new_tokens": 2}])
    out = tmp_path / "out.jsonl"
    settings = ("--slots", 9, "--quiet")
    first = server.start("run", source, "-m", model, "-o", out, *settings)
    wait_for_records(out, 1)
    os.kill(first, signal.SIGSTOP)  # alive, and it will not end before the second one has looked
    assert server.run("run", source, "-m", model, "-o", out, *settings, COLUMNS="300") == 2
    assert "is being written by another run" in server.stderr
    os.kill(first, signal.SIGKILL)
    server.wait(first)
    source.write_text(json.dumps(lines[0] | {"max_new_tokens": 3}) + "\n")
    assert server.run("run", source, "-m", model, "-o", out, *settings) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.jsonl", "-o", "out"], "there is no file"),
        (["in.jsonl", "-o", "in.jsonl/folder/out"], "cannot be written: Not a directory"),
        (["in.jsonl", "-o", "."], "cannot be written: Is a directory"),
        (["in.jsonl"], "output is missing"),
        (["in.jsonl", "-o", "folder/"], "output must be the name of a file"),
        (["in.jsonl", "-o", "out", "--top-k", "0"], "top_k must be an integer of at least 1"),
        (
            ["in.jsonl", "-o", "out", "--seed", "1", "--num-shards", "2", "--shard-id", "2"],
            "shard_id must be from 0 to 1",
        ),
        (["in.jsonl", "-o", "out", "--processor", "nowhere:f"], "cannot be imported"),
        (["in.jsonl", "-o", "out", "--config", "run.yaml"], "unknown keys slot;"),
        (["in.jsonl", "-o", "foreign"], "line 1 of the output foreign is no record of a run"),
        (["in.jsonl", "-o", "orphan"], "orphan.manifest.json, which says how"),
    ],
)
def test_refused_to_start(server, model, tmp_path, arguments, words):
    write_lines(tmp_path / "in.jsonl", requests(1))
    (tmp_path / "run.yaml").write_text("slot: 4\n")
    (tmp_path / "foreign").write_text("my notes\n")
    (tmp_path / "orphan").write_text('{"id": 1, "text": "", "error": null}\n')
    paths = [a if a.startswith("-") or a in ("0", "1", "2", "nowhere:f") else f"{tmp_path}/{a}" for a in arguments]
    assert server.run("run", *paths, "-m", model, COLUMNS="400") == 2
    shown = server.stderr.replace(str(tmp_path) + "/", "")
    assert words in " ".join(shown.replace("│", " ").split())
    assert (tmp_path / "foreign").read_text() == "my notes\n"


def test_a_model_that_is_not_there(server, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", requests(1))
    assert server.run("run", source, "-m", tmp_path / "nowhere", "-o", tmp_path / "out") == 2
    assert not (tmp_path / "out.manifest.json").exists()


def test_an_output_without_permission(server, model, tmp_path):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    source = write_lines(tmp_path / "in.jsonl", requests(1))
    (tmp_path / "out").write_text("")
    (tmp_path / "out").chmod(0o400)
    assert server.run("run", source, "-m", model, "-o", tmp_path / "out") == 2
    assert "Permission denied" in server.stderr


def test_an_output_on_a_disk_that_is_read_only(server, model, tmp_path):
    """Not even root may write there."""
    source = write_lines(tmp_path / "in.jsonl", requests(1))
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=32k", "tmpfs", disk], capture_output=True).returncode
    ):
        pytest.skip("no right to mount a tmpfs")
    try:
        assert server.run("run", source, "-m", model, "-o", disk / "out.jsonl", COLUMNS="300") == 2
        assert "cannot be written: Read-only file system" in server.stderr
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_full_disk(server, model, many, tmp_path):
    """A file system of 32 KiB: the job ends, what is there is whole, and it goes on when there is room."""
    source, expected, _ = many
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", disk], capture_output=True).returncode
    ):
        pytest.skip("no right to mount a tmpfs")
    try:
        out = disk / "out.jsonl"
        assert server.run("run", source, "-m", model, "-o", out, *SETTINGS) == 3
        assert "No space left on device" in server.stderr
        written = out.read_bytes()
        assert written.endswith(b"\n")
        assert 10 < written.count(b"\n") < 200
        assert subprocess.run(["mount", "-o", "remount,size=10m", disk]).returncode == 0
        assert server.run("run", source, "-m", model, "-o", out, *SETTINGS) == 0
        assert out.read_bytes().startswith(written)
        assert sorted_lines(out) == expected
    finally:
        subprocess.run(["umount", disk], check=True)


def test_shards_and_their_merge(server, model, many, tmp_path):
    source, expected, _ = many
    outputs = [tmp_path / f"out-{shard}.jsonl" for shard in range(3)]
    for shard, out in enumerate(outputs):
        sharded = ("--num-shards", 3, "--shard-id", shard)
        assert server.run("run", source, "-m", model, "-o", out, *SETTINGS, *sharded) == 0
    launched = {"TORCHELASTIC_RUN_ID": "1", "RANK": "2", "WORLD_SIZE": "3"}
    named = ("run", source, "-m", model, "-o", tmp_path / "rank-{shard}.jsonl", *SETTINGS)
    assert server.run(*named, **launched) == 0
    assert (tmp_path / "rank-2.jsonl").read_bytes() == outputs[2].read_bytes(), "as torchrun starts it"
    assert server.run("run", source, "-m", model, "-o", tmp_path / "rank.jsonl", *SETTINGS, **launched) == 2
    assert server.run("merge", *outputs, "--into", tmp_path / "all.jsonl") == 0
    assert "200 records" in server.stdout
    assert sorted_lines(tmp_path / "all.jsonl") == expected
    assert server.run("merge", *outputs, "--into", tmp_path / "ordered.jsonl", "--order", source) == 0
    assert [r["id"] for r in read_records(tmp_path / "ordered.jsonl")] == [f"request-{i}" for i in range(200)]
    assert server.run("merge", *outputs, "--into", tmp_path / "all.jsonl") == 2


def test_a_configuration_file(server, model, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", requests(2))
    (tmp_path / "run.yaml").write_text(
        f"model: {model}\nstrategy: sample\ntop-p: 0.9\nslots: 2\nmax_new_tokens: 5\nstop: [x]\n"
    )
    config = ("--config", tmp_path / "run.yaml")
    assert server.run("run", source, "-o", tmp_path / "a", *config, "--max-new-tokens", 7, "--logprobs") == 0
    manifest = json.loads((tmp_path / "a.manifest.json").read_text())["config"]
    assert manifest["max_new_tokens"] == 7, "the line wins"
    assert (manifest["strategy"], manifest["top_p"], manifest["slots"], manifest["stop"]) == ("sample", 0.9, 2, ["x"])
    assert "logprobs" in read_records(tmp_path / "a")[0]


def test_a_common_prefix_is_copied_unless_a_run_says_otherwise(server, model, tmp_path):
    """The summary counts it, and the manifest keeps the setting."""
    source = write_lines(tmp_path / "in.jsonl", [{"id": i, "prompt": "abcdefgh" * 12 + "xyz"[i]} for i in range(3)])
    options = ("-m", model, "--slots", 3, "--max-new-tokens", 5)
    copied = {}
    for name, flags in {"a": (), "b": ("--no-share-prefixes",), "c": ("--share-prefixes",)}.items():
        assert server.run("run", source, "-o", tmp_path / name, *options, *flags) == 0
        copied[name] = server.summary["shared_tokens"]
        config = json.loads((tmp_path / f"{name}.manifest.json").read_text())["config"]
        assert config["share_prefixes"] is (name != "b")
    assert copied == {"a": 128, "b": 0, "c": 128}
    assert server.run("run", source, "-o", tmp_path / "a", *options, "--no-share-prefixes") == 2
    assert "share_prefixes: true then, false now" in server.stderr
    (tmp_path / "run.yaml").write_text("share-prefixes: false\n")
    assert server.run("run", source, "-o", tmp_path / "b", *options, "--config", tmp_path / "run.yaml") == 0


def test_what_a_person_sees(server, model, many, tmp_path):
    source, _, _ = many
    assert server.run("run", source, "-m", model, "-o", tmp_path / "a", "--slots", 8, "--max-new-tokens", 24) == 0
    assert server.stderr == "", "quiet where it is piped"
    assert len(server.stdout.splitlines()) == 1
    summary = server.summary
    assert summary["requests"] == 200
    assert summary["exit_code"] == 0
    assert set(summary["latency_seconds"]) == {"p50", "p90", "p99"}
    assert summary["slots_busy"] > 0.9
    assert server.run("run", source, "-m", model, "-o", tmp_path / "b", *SETTINGS[:-1], "--log-json") == 0
    events = [json.loads(line) for line in server.stderr.splitlines()]
    assert [event["event"] for event in events][:: len(events) - 1] == ["start", "end"]
    assert events[-1]["done"] == events[-1]["total"] == 200
    for line in (tmp_path / "a").read_bytes().splitlines():
        assert not {"time", "created", "host", "seconds"} & json.loads(line).keys()


def test_a_terminal_gets_a_bar(model, many, tmp_path, children):
    """On a pseudo-terminal: a bar with rates and slots, then the summary in words."""
    import fcntl
    import pty
    import struct
    import sys
    import termios

    from ..repository import INSTALLED

    source = many[0]
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    command = [sys.executable, "-m", "simctg_fast.cli", "run", str(source), "-m", str(model), "-o", str(tmp_path / "a")]
    environment = os.environ | {"PYTHONPATH": str(INSTALLED), "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    process = children.enter_context(started(command, stdout=slave, stderr=slave, env=environment))
    os.close(slave)
    shown = b""
    try:
        while chunk := os.read(master, 4096):
            shown += chunk
    except OSError:  # the other side is closed
        pass
    assert process.wait() == 0
    text = shown.decode()
    assert "200/200" in text
    assert "tok/s, slots " in text
    assert " left" in text
    assert "200 requests in " in text


@pytest.mark.full
def test_five_thousand_requests_in_flat_memory(server, model, tmp_path):
    source = write_lines(
        tmp_path / "in.jsonl",
        [{"id": i, "prompt": "ab" * (i % 7 + 1), "max_new_tokens": i % 5 + 2} for i in range(5000)],
    )
    out = tmp_path / "out.jsonl"
    pid = server.start("run", source, "-m", model, "-o", out, "--slots", 16, "--quiet")
    sizes = {}
    for count in (1500, 4800):
        wait_for_records(out, count, seconds=1200)
        status = Path(f"/proc/{pid}/status").read_text()
        sizes[count] = int(status.split("VmRSS:")[1].split()[0])
    assert server.wait(pid) == 0
    assert len(read_records(out)) == 5000
    assert sizes[4800] < sizes[1500] + 8 * 1024, sizes
