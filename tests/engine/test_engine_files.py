"""Files of jobs as people have them: nothing of theirs is lost, changes are seen, every form of input is read."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from ..engine_jobs import JobServer, read_records, save_model, sorted_lines, wait_for_records, write_lines
from ..processes import run_child, started

SETTINGS = ("--slots", 8, "--max-new-tokens", 6, "--quiet")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("model"))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if messages[0]['content'] == 'raise' %}{{ raise_exception('not this one') }}{% endif %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory, model):
    made = JobServer(tmp_path_factory.mktemp("jobs"), model)
    yield made
    made.close()


def lines(count: int, text: str = "abc") -> list[dict]:
    return [{"id": f"r{i}", "prompt": f"{text} {i}"} for i in range(count)]


# ---- what is not the run's -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b'{"id": "a", "prompt": "x"}', b"penalty_alpha: 0.5", os.urandom(5000), b"\n\n{"])
def test_a_file_of_somebody_is_not_touched(server, model, tmp_path, content):
    out = tmp_path / "theirs"
    out.write_bytes(content)
    source = write_lines(tmp_path / "in.jsonl", lines(1))
    assert server.run("run", source, "-m", model, "-o", out, *SETTINGS, COLUMNS="300") == 2
    assert out.read_bytes() == content
    assert sorted(each.name for each in tmp_path.iterdir()) == ["in.jsonl", "theirs"]


@pytest.mark.parametrize("link", ["same", "symlink", "hard link", "manifest", "stdin"])
def test_the_input_is_not_the_output(server, model, tmp_path, link):
    source = tmp_path / "p.jsonl"
    source.write_text('{"id": "a", "prompt": "one line without a newline"}')
    out, given = tmp_path / "out.jsonl", str(source)
    if link == "same":
        out = source
    elif link == "symlink":
        out.symlink_to(source)
    elif link == "hard link":
        os.link(source, out)
    elif link == "manifest":
        out, source = tmp_path / "x", source.rename(tmp_path / "x.manifest.json")
        given = str(source)
    before = source.read_bytes()
    if link == "stdin":
        command = [sys.executable, "-m", "simctg_fast.cli", "run", "-", "-m", str(model), "-o", str(source)]
        with source.open() as file:
            done = subprocess.run(
                command, stdin=file, capture_output=True, text=True, env=os.environ | {"COLUMNS": "300"}
            )
        code, said = done.returncode, done.stderr
    else:
        code = server.run("run", given, "-m", model, "-o", out, *SETTINGS, COLUMNS="300")
        said = server.stderr
    assert code == 2
    assert "is the input" in said
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    "stream", ["> {out}", "-o /dev/stdout > {out}", pytest.param("2> {out}", marks=pytest.mark.full)]
)
def test_a_stream_is_not_the_output(model, tmp_path, stream):
    source, out = write_lines(tmp_path / "in.jsonl", lines(1)), tmp_path / "out"
    program = f"{sys.executable} -m simctg_fast.cli run {source} -m {model} -o {out}"
    done = run_child(["sh", "-c", f"{program} {stream.format(out=out)}"], env=os.environ | {"COLUMNS": "300"})
    assert done.returncode == 2
    assert "is standard" in done.stderr + out.read_text()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["in.jsonl", "out"]


def test_whole_records_and_a_torn_line_without_a_manifest_stay(server, model, tmp_path):
    out = tmp_path / "out"
    source = write_lines(tmp_path / "in.jsonl", lines(3))
    assert server.run("run", source, "-m", model, "-o", out, *SETTINGS) == 0
    torn = out.read_bytes()[:-5]
    out.write_bytes(torn)
    manifest = tmp_path / "out.manifest.json"
    kept = manifest.read_bytes()
    manifest.unlink()
    assert server.run("run", source, "-m", model, "-o", out, *SETTINGS) == 2
    assert out.read_bytes() == torn
    manifest.write_bytes(kept)
    assert server.run("run", source, "-m", model, "-o", out, *SETTINGS, "--penalty-alpha", 0.1) == 2
    assert out.read_bytes() == torn
    assert server.run("run", source, "-m", model, "-o", out, *SETTINGS) == 0
    assert len(read_records(out)) == 3


@pytest.mark.parametrize("how", ["delete", "truncate", "replace"])
def test_an_output_that_changes_while_the_job_runs(server, model, tmp_path, how):
    source = write_lines(tmp_path / "in.jsonl", [line | {"max_new_tokens": 60} for line in lines(100)])
    out = tmp_path / "out.jsonl"
    pid = server.start("run", source, "-m", model, "-o", out, "--slots", 4, "--quiet")
    wait_for_records(out, 5)
    os.kill(pid, signal.SIGSTOP)
    if how == "truncate":
        os.truncate(out, 0)
    elif how == "delete":
        out.unlink()
    else:
        write_lines(tmp_path / "other", []).replace(out)
    os.kill(pid, signal.SIGCONT)
    assert server.wait(pid) == 3
    assert {"delete": "was deleted", "truncate": "was cut from", "replace": "was replaced"}[how] in server.stderr
    assert "records are missing" in server.stderr
    assert server.summary["exit_code"] == 3


# ---- what has changed ------------------------------------------------------------------------------------------------


def answers(path) -> dict:
    return {record["id"]: record["token_ids"] for record in read_records(path)}


def test_prompts_that_were_edited_are_noticed(server, model, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", lines(6))
    out = tmp_path / "out.jsonl"
    command = ("run", source, "-m", model, "-o", out, *SETTINGS)
    assert server.run(*command) == 0
    first = out.read_bytes()
    edited = lines(6)
    edited[2]["prompt"], edited[4]["max_new_tokens"] = "another question", 3
    write_lines(source, edited)
    assert server.run(*command, COLUMNS="300") == 2
    assert "line 3 of" in server.stderr
    assert 'under id "r2"' in server.stderr
    assert "(2 lines have changed)" in server.stderr
    assert out.read_bytes() == first
    assert server.run(*command, "--changed", "keep") == 0
    assert out.read_bytes() == first
    assert server.run(*command, "--changed", "again") == 0
    assert server.summary["requests"] == 2
    fresh = tmp_path / "fresh.jsonl"
    assert server.run("run", source, "-m", model, "-o", fresh, *SETTINGS) == 0
    assert sorted_lines(out) == sorted_lines(fresh)
    assert server.run(*command) == 0, "and now nothing differs"
    assert server.run(*command, "--changed", "perhaps") == 2


def test_a_line_put_in_front_is_noticed(server, model, tmp_path):
    source = tmp_path / "in.txt"
    source.write_text("one\ntwo\n")
    out = tmp_path / "out.jsonl"
    command = ("run", source, "-m", model, "-o", out, *SETTINGS)
    assert server.run(*command) == 0
    source.write_text("zero\none\ntwo\n")
    assert server.run(*command, COLUMNS="300") == 2
    assert "is not what" in server.stderr
    assert server.run(*command, "--changed", "again") == 0
    write_lines(tmp_path / "in.jsonl", [{"prompt": text} for text in ("zero", "one", "two")])
    assert server.run("run", tmp_path / "in.jsonl", "-m", model, "-o", tmp_path / "fresh", *SETTINGS) == 0
    assert answers(out) == answers(tmp_path / "fresh")


def test_errors_are_tried_again_on_request(server, model, tmp_path):
    bad = ["{bad", {"id": "long", "prompt": "x" * 1030}, {"prompt": "line 3", "top_k": -1}]
    source = write_lines(tmp_path / "in.jsonl", [*lines(3), *bad])
    out = tmp_path / "out.jsonl"
    command = ("run", source, "-m", model, "-o", out, *SETTINGS)
    assert server.run(*command) == 1
    assert server.run(*command) == 1
    assert server.summary["errors_before"] == 3
    write_lines(source, [*lines(3), {"prompt": "mended"}, bad[1], {"prompt": "line 3"}])
    assert server.run(*command, COLUMNS="300") == 2
    assert "--retry-errors" in server.stderr
    assert server.run(*command, "--retry-errors") == 1, "one is still too long"
    records = read_records(out)
    assert len(records) == 6
    assert [record["id"] for record in records if record["error"]] == ["long"]
    assert {"line-4", "line-6"} < answers(out).keys()
    write_lines(source, lines(3))
    before = out.read_bytes()
    assert server.run(*command, "--retry-errors") == 1
    assert out.read_bytes() == before, "a record whose line is gone has nothing to take its place"


# ---- how files are in the world --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.jsonl", '{"prompt": "one"}\n{"prompt": "two"}\n'),
        ("bom.jsonl", '\ufeff{"prompt": "one"}\n{"prompt": "two"}\n'),
        ("crlf.jsonl", '{"prompt": "one"}\r\n{"prompt": "two"}\r\n'),
        ("cr.jsonl", '{"prompt": "one"}\r{"prompt": "two"}'),
        ("last.jsonl", '{"prompt": "one"}\n{"prompt": "two"}'),
        ("packed.jsonl.gz", '{"prompt": "one"}\n{"prompt": "two"}\n'),
        ("packed.jsonl.zst", '{"prompt": "one"}\n{"prompt": "two"}\n'),
        ("text.txt", "one\ntwo\n"),
        ("text.txt.gz", "\ufeffone\r\ntwo"),
    ],
)
def test_forms_of_input(server, model, tmp_path, name, content):
    data = content.encode()
    if name.endswith(".zst"):
        data = pytest.importorskip("zstandard").ZstdCompressor().compress(data)
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    out = tmp_path / "made" / "of" / "folders" / "out.jsonl"
    assert server.run("run", tmp_path / name, "-m", model, "-o", out, *SETTINGS) == 0, server.stderr
    reference = tmp_path / "reference.jsonl"
    write_lines(tmp_path / "in.jsonl", [{"prompt": "one"}, {"prompt": "two"}])
    assert server.run("run", tmp_path / "in.jsonl", "-m", model, "-o", reference, *SETTINGS) == 0
    assert sorted_lines(out) == sorted_lines(reference)
    assert server.run("run", tmp_path / name, "-m", model, "-o", out, *SETTINGS) == 0
    assert (server.summary["requests"], server.summary["resumed"]) == (0, 2)


@pytest.mark.parametrize("name", ["folder", "/dev/null", "torn.gz", "utf16"])
def test_inputs_that_cannot_be_read(server, model, tmp_path, name):
    (tmp_path / "folder").mkdir()
    (tmp_path / "torn.gz").write_bytes(gzip.compress(b"x" * 99)[:-9])
    (tmp_path / "utf16").write_bytes("x".encode("utf-16"))
    out = tmp_path / "out"
    assert server.run("run", tmp_path / name, "-m", model, "-o", out, *SETTINGS) == 2
    assert "Traceback" not in server.stderr
    assert not out.exists()


def test_an_input_that_breaks_off(server, model, tmp_path):
    """What was read is answered; that there was more is said, and the exit code says it too."""
    source = tmp_path / "in.jsonl.gz"
    packed = b"".join(json.dumps({"id": i, "prompt": f"{i * 7919}"}).encode() + b"\n" for i in range(3000))
    source.write_bytes(gzip.compress(packed)[:-2000])
    out = tmp_path / "out.jsonl"
    assert server.run("run", source, "-m", model, "-o", out, "--slots", 64, "--max-new-tokens", 1, "--quiet") == 3
    assert "the input" in server.stderr
    assert "cannot be read behind line" in server.stderr
    whole = sorted_lines(out)
    assert len(whole) > 500
    torn = b"".join(line + b"\n" for line in out.read_bytes().splitlines()[:100])
    out.write_bytes(torn)
    assert server.run("run", source, "-m", model, "-o", out, "--slots", 64, "--max-new-tokens", 1, "--quiet") == 3
    assert sorted_lines(out) == whole, "gone on with, it answers as much"


def test_home_folders(server, model, tmp_path):
    write_lines(tmp_path / "in.jsonl", lines(2))
    (tmp_path / "run.yaml").write_text(f"model: {model}\nslots: 8\nmax-new-tokens: 6\n")
    command = ("run", "~/in.jsonl", "--output=~/made/out.jsonl", "--config=~/run.yaml", "--quiet")
    assert server.run(*command, HOME=str(tmp_path)) == 0, server.stderr
    assert len(read_records(tmp_path / "made" / "out.jsonl")) == 2


# ---- pipes -----------------------------------------------------------------------------------------------------------


def child(model, *arguments, **options):
    command = [sys.executable, "-m", "simctg_fast.cli", "run", "-m", str(model), *map(str, (*SETTINGS, *arguments))]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return started(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, **options
    )


def test_answers_flow_while_the_pipe_stays_open(model, children):
    """A program that waits for an answer before it asks again, and SIGTERM while nothing is asked."""
    process = children.enter_context(child(model, "-", "-o", "-"))
    embedding = {"custom_id": 3, "url": "/v1/embeddings", "body": {"input": "abc"}}
    asked = [{"id": 0, "prompt": "abc"}, {"id": 1, "prompt": "x\ud83d"}, {"id": 2, "prompt": ""}, embedding]
    for number, line in enumerate([*asked, {"id": 4, "prompt": "abc"}]):
        process.stdin.write(json.dumps(line).encode() + b"\n")
        process.stdin.flush()
        answer = json.loads(process.stdout.readline())
        assert (answer["custom_id"] if number == 3 else answer["id"]) == number
    process.send_signal(signal.SIGTERM)
    out, said = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert out == b""
    assert b"stopped by SIGTERM; standard output cannot be gone on from" in said


def test_stdin_to_stdout_equals_files(server, model, tmp_path, children):
    source = write_lines(tmp_path / "in.jsonl", [*lines(5), "{bad"])
    out = tmp_path / "out.jsonl"
    assert server.run("run", source, "-m", model, "-o", out, *SETTINGS) == 1
    process = children.enter_context(child(model, "-", "-o", "-"))
    written, said = process.communicate(source.read_bytes())
    assert process.returncode == 1
    (tmp_path / "written").write_bytes(written)
    assert sorted_lines(tmp_path / "written") == sorted_lines(out)
    assert json.loads(said.splitlines()[-1])["errors"] == {"invalid_json": 1}


@pytest.mark.full
def test_plain_text_in_a_pipe(server, model, tmp_path, children):
    """One prompt a line, as `generate` and `features` take it; not where it is JSON that lost its beginning."""
    (tmp_path / "in.txt").write_text("one\ntwo\n")
    out = tmp_path / "out.jsonl"
    assert server.run("run", tmp_path / "in.txt", "-m", model, "-o", out, *SETTINGS) == 0
    process = children.enter_context(child(model, "-", "-o", "-"))
    written, _ = process.communicate(b"\xef\xbb\xbfone\r\ntwo")
    assert process.returncode == 0
    assert sorted(written.splitlines()) == sorted(out.read_bytes().splitlines())
    process = children.enter_context(child(model, "-", "-o", "-"))
    torn = 'ost its beginning"}\n' + json.dumps({"id": "b", "prompt": "x"}) + "\n"
    written, _ = process.communicate(torn.encode())
    assert process.returncode == 1
    errors = [json.loads(line)["error"] for line in written.splitlines()]
    assert [error["type"] for error in errors if error] == ["wrong_content"]


def test_whoever_reads_has_had_enough(model, tmp_path, children):
    source = write_lines(tmp_path / "in.jsonl", lines(300))
    process = children.enter_context(child(model, source, "-o", "-"))
    process.stdout.readline()
    process.stdout.close()
    assert process.wait() == 141
    assert b"Traceback" not in process.stderr.read()


def test_a_pipe_by_name_into_a_file_that_goes_on(server, model, tmp_path):
    pipe, out = tmp_path / "pipe", tmp_path / "out.jsonl"
    os.mkfifo(pipe)
    for asked, new in ((3, 3), (5, 2)):
        content = "".join(json.dumps(line) + "\n" for line in lines(asked))
        writer = threading.Thread(target=pipe.write_text, args=(content,))
        writer.start()
        assert server.run("run", pipe, "-m", model, "-o", out, *SETTINGS) == 0, server.stderr
        writer.join()
        assert server.summary["requests"] == new
    edited = json.dumps({"id": "r0", "prompt": "other"}) + "\n"
    writer = threading.Thread(target=pipe.write_text, args=(edited,))
    writer.start()
    assert server.run("run", pipe, "-m", model, "-o", out, *SETTINGS, COLUMNS="300") == 2
    writer.join()
    assert 'under id "r0"' in server.stderr
    for option in (("--changed", "again"), ("--retry-errors",)):
        assert server.run("run", pipe, "-m", model, "-o", out, *SETTINGS, *option, COLUMNS="300") == 2
        assert "read twice" in server.stderr


@pytest.mark.parametrize(
    "closed", [">&- 2>&- <&-", pytest.param(">/dev/full", marks=pytest.mark.full), "2>/dev/full --log-json"]
)
def test_every_answer_is_written_whatever_the_streams_are(model, tmp_path, closed):
    """And nothing else is: a file that is opened does not get the number of a stream, with its text in it."""
    source = write_lines(tmp_path / "in.jsonl", [*lines(12), "{bad"])
    program = f"{sys.executable} -m simctg_fast.cli run {source} -m {model} -o {tmp_path}/out.jsonl --slots 4 -n 4"
    done = run_child(["sh", "-c", f"{program} {closed}"])
    assert done.returncode == (3 if closed == ">/dev/full" else 1), done.stderr
    assert len(read_records(tmp_path / "out.jsonl")) == 13
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("size", ["4k", "8k"])
def test_a_disk_that_is_full_before_the_first_line(server, model, tmp_path, size):
    source = write_lines(tmp_path / "in.jsonl", lines(40))
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        shutil.which("mount") is None
        or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True).returncode
    ):
        pytest.skip("no right to mount a tmpfs")
    try:
        (disk / "filler").write_bytes(bytes(4096 * (int(size[0]) // 4)))
        out = disk / "out.jsonl"
        assert server.run("run", source, "-m", model, "-o", out, *SETTINGS) == 3
        assert "the output cannot be written: No space left on device" in server.stderr
        assert [each.name for each in disk.iterdir()] == ["filler"]
        (disk / "filler").unlink()
        code = server.run("run", source, "-m", model, "-o", out, *SETTINGS)
        assert code == 3, "there is room for the manifest and some lines"
        assert subprocess.run(["mount", "-o", "remount,size=10m", disk]).returncode == 0
        assert server.run("run", source, "-m", model, "-o", out, *SETTINGS) == 0
        assert len(read_records(out)) == 40
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_s_own_code_is_not_run(model, tmp_path):
    """Whatever standard input says."""
    folder = shutil.copytree(model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "theirs", "auto_map": names}))
    (folder / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    source = write_lines(tmp_path / "in.jsonl", lines(1))
    command = [sys.executable, "-m", "simctg_fast.cli", "run", source, "-m", folder, "-o", tmp_path / "out"]
    done = run_child(list(map(str, command)), input="yes\n" * 20)
    assert done.returncode == 2
    assert "--trust-remote-code" in done.stderr
    assert not (tmp_path / "ran").exists()


# ---- hostile lines ---------------------------------------------------------------------------------------------------


def hostile(draw: random.Random, number: int) -> str:
    name = f"bad-{number}"
    deep = draw.choice([985, 40_000])

    def raw(rest: str, prefix: str = "") -> str:
        return '{"id": "' + prefix + name + '", ' + rest + "}"

    made = [
        lambda: raw('"prompt": "x\\ud83d"'),
        lambda: raw('"prompt": "\\udc00 lone"', "\\ud83d"),
        lambda: json.dumps({"id": name, "messages": [{"role": "user", "content": "raise"}]}),
        lambda: raw('"messages": [{"role": "user", "content": "\\ud83d"}]'),
        lambda: json.dumps({"id": name, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
        lambda: json.dumps({"id": draw.choice([None, True, [1], {"a": 1}, 1.5, "", " "]), "prompt": "x"}),
        lambda: '{"id": 1e999, "prompt": "x"}',
        lambda: raw('"prompt": "x", "penalty_alpha": ' + "9" * 400),
        lambda: raw('"prompt": "x", "penalty_alpha": ' + "9" * 5000),
        lambda: raw(f'"prompt": "x", "max_new_tokens": {2**63 + draw.randrange(9)}'),
        lambda: raw('"prompt": "x", "metadata": ' + "[" * deep + "]" * deep),
        lambda: "[" * deep,
        lambda: raw('"prompt": "first", "prompt": "second"'),
        lambda: raw('"prompt": "unfini')[:-1],
        lambda: json.dumps({"id": name, "prompt": "x" * draw.randint(1020, 5000)}),
        lambda: json.dumps({"id": name, "prompt": [10**9]}),
        lambda: json.dumps({"id": name, "prompt": [draw.choice([-1, 2**70, "a", None])]}),
        lambda: json.dumps({"id": name, "prompt": ""}),
        lambda: json.dumps({"id": name, "source": "x"}),
        lambda: json.dumps({"id": name, "prompt": "x", "stop": draw.choice(["", [""], [1], {}])}),
        lambda: json.dumps({"id": name, "prompt": "x", "stop_token_ids": [98 + draw.randrange(2**20)]}),
        lambda: json.dumps({"id": name, "prompt": "x", "temperature": 0.7}),
        lambda: json.dumps({"id": name, "prompt": "x", "top_logprobs": draw.choice([3, -1, 99, "a"])}),
        lambda: json.dumps({"custom_id": name, "body": {"prompt": "x", "tools": [{"type": "function"}]}}),
        lambda: json.dumps({"custom_id": name, "url": "/v1/images", "body": {"prompt": "x"}}),
        lambda: json.dumps({"custom_id": name, "body": draw.choice([None, [], 7, "x"])}),
        lambda: json.dumps({"id": name, "prompt": "x" * 40, "x" * 100_000: 1}),
        lambda: draw.choice(["null", "7", '"text"', "[]", "NaN", "{", "}", '{"id"}', "\x00", "\x1b]0;owned\x07"]),
        lambda: "bytes that are no text \udcff\udcfe",
        lambda: json.dumps({"id": f"good-{draw.randrange(number + 1)}", "prompt": "again"}) + " ",
    ]
    return made[number % len(made)]()


def test_two_thousand_lines_good_and_bad_killed_and_resumed(server, model, tmp_path):
    """Every good line is answered as in a run without the bad ones, every bad one is an error record."""
    draw = random.Random(15)
    good, mixed, seen = [], [], set()
    for number in range(2000):
        if number % 2:
            mixed.append(hostile(draw, number // 2))
            continue
        prompt = "".join(draw.choices("abcdefgh .,", k=draw.randint(2, 30)))
        line = {"id": f"good-{number // 2}", "prompt": prompt, "max_new_tokens": draw.randint(1, 6)}
        good.append(line)
        mixed.append(json.dumps(line))
    source = tmp_path / "in.jsonl"
    source.write_bytes("".join(line + "\n" for line in mixed).encode("utf-8", "surrogateescape"))
    clean = write_lines(tmp_path / "clean.jsonl", good)
    settings = ("-m", model, "--slots", 16, "--quiet")
    began = time.monotonic()
    assert server.run("run", clean, *settings, "-o", tmp_path / "clean.out") == 0
    seconds = time.monotonic() - began
    out = tmp_path / "out.jsonl"
    for _ in range(5):
        pid = server.start("run", source, *settings, "-o", out)
        time.sleep(draw.uniform(0.1, seconds / 4))
        os.kill(pid, signal.SIGKILL)
        server.wait(pid)
        is_begun = (tmp_path / "out.jsonl.manifest.json").exists()
        if is_begun and out.read_bytes()[-1:] in (b"", b"\n"):
            with out.open("ab") as file:  # and the last line torn, as one line is
                file.write(b'{"id": "torn'[: draw.randrange(12)])
    assert server.run("run", source, *settings, "-o", out) == 1, server.stderr
    assert server.run("run", source, *settings, "-o", out) == 1, server.stderr
    assert server.summary["requests"] == 0, "nothing is answered twice, errors are answers"
    records = read_records(out)
    assert len(records) == 2000
    for record in records:
        error = record["error"]
        if error is not None:
            assert error.get("message"), record
            seen.add(error.get("type") or error["code"])
    assert [line for line in sorted_by_id(out) if b'"error": null' in line] == sorted_by_id(tmp_path / "clean.out")
    assert sum(record["error"] is not None for record in records) == 1000
    assert len(seen) > 12
    first = out.read_bytes()
    assert server.run("run", source, *settings, "-o", tmp_path / "whole.jsonl") == 1
    assert sorted(first.splitlines()) == sorted((tmp_path / "whole.jsonl").read_bytes().splitlines())


def sorted_by_id(path) -> list[bytes]:
    return sorted(path.read_bytes().splitlines(), key=lambda line: str(json.loads(line).get("id")))


def test_many_slots_for_few_requests(server, model, tmp_path):
    """They would take more memory than there is."""
    source = write_lines(tmp_path / "in.jsonl", lines(3))
    out = tmp_path / "out.jsonl"
    command = ("run", source, "-m", model, "-o", out, "--slots", 100_000, "--max-new-tokens", 6, "--quiet")
    pid = server.start(*command)
    highest = 0
    while True:
        try:
            with open(f"/proc/{pid}/status") as status:
                found = [line for line in status if line.startswith("VmHWM:")]
        except OSError:
            break
        if not found:
            break
        highest = max(highest, int(found[0].split()[1]))
        time.sleep(0.02)
    assert server.wait(pid) == 0, server.stderr
    assert highest < 2 * 2**20
    assert server.summary["slots"] == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("slots: 2\nslots: 3\n", "a key stands there twice"),
        ("max_new_tokens: 2\nmax-new-tokens: 3\n", "gives a key twice"),
        ("input: 1\n", "input must be text, got 1"),
        ("model: [x]\n", "model must be text, got ['x']"),
        ("output: true\n", "output must be text, got True"),
        ("logprobs: 'no'\n", "logprobs must be true or false, got 'no'"),
        ("device: 0\n", "device must be text, got 0"),
        ("trace: 1\n", "trace must be true or false, got 1"),
        ("processor: 5\n", "processor must be text, got 5"),
        ("a: [" * 20000, "is nested too deeply"),
        ("[1]", "must map options to values"),
    ],
)
def test_configurations_that_are_none(server, model, tmp_path, text, words):
    write_lines(tmp_path / "in.jsonl", lines(1))
    settings = {"input": tmp_path / "in.jsonl", "model": model, "output": tmp_path / "out"}
    given = "".join(f"{name}: {value}\n" for name, value in settings.items() if f"{name}:" not in text)
    (tmp_path / "run.yaml").write_text(text if text[0] == "[" else given + text)
    assert server.run("run", "--config", tmp_path / "run.yaml", "--quiet", COLUMNS="400") == 2
    assert words in " ".join(server.stderr.replace("│", " ").split())
    assert not (tmp_path / "out").exists()
