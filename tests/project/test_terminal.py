"""How the commands end: full disks, closed pipes and streams, signals, hostile arguments, other people's text."""

from __future__ import annotations

import errno
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import simctg_fast
from simctg_fast import cli, terminal
from simctg_fast.cli import app
from simctg_fast.terminal import FAULT, OUTPUT, REFUSED, OutputError, explained

from ..processes import LIMIT, run_child, started
from ..repository import INSTALLED

PROGRAM = [sys.executable, "-m", "simctg_fast.cli"]
ESCAPE = "\x1b]0;title\x07"


def environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(INSTALLED), "OMP_NUM_THREADS": "1", **changes}


def shell(line: str, place: Path, **changes: str) -> subprocess.CompletedProcess:
    """`line` in bash, where `$S` is the program; the exit code is that of the first command of a pipe."""
    command = ["bash", "-c", line + "; exit ${PIPESTATUS[0]}"]
    done = run_child(command, env=environment(S=" ".join(PROGRAM), **changes), cwd=place, errors="replace")
    assert "Traceback" not in done.stderr + done.stdout, done.stderr
    return done


@pytest.fixture
def texts(tmp_path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text("Return the name of the file.\nIf the file is not there, None is returned.\n" * 8)
    return path


def read_until(terminal: int, words: str) -> str:
    """What a terminal shows, to `words` or to its end."""
    shown, deadline = "", time.monotonic() + LIMIT
    while words not in shown:
        assert time.monotonic() < deadline, shown
        try:
            piece = os.read(terminal, 65536).decode(errors="replace")
        except OSError:
            break
        if not piece:
            break
        shown += piece
    return shown


# ------------------------------------------------------------------------------------------------- pipes and full disks


def also(*values):
    """Of the full set: the same path as another case of the fast one, by another command."""
    return [pytest.param(value, marks=pytest.mark.full) for value in values]


@pytest.mark.parametrize(
    "what", ["env", "-h", "generate bundled x -n 2", *also("--version", "train -h", "", "demo -n 2")]
)
def test_a_full_disk_behind_standard_output(what, tmp_path):
    done = shell(f"$S {what} > /dev/full", tmp_path)
    assert done.returncode == 3
    assert done.stderr == "Error: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize("what", ["env", "generate bundled x -n 40 --stream", *also("demo -n 2", "train -h")])
def test_who_reads_standard_output_may_go(what, tmp_path):
    done = shell(f"$S {what} | true", tmp_path)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("what", ["env", *also("demo -n 2")])
def test_without_a_standard_output_what_was_to_be_shown_is_lost_aloud(what, tmp_path):
    done = shell(f"$S {what} >&-", tmp_path)
    assert (done.returncode, done.stderr) == (3, "Error: standard output cannot be written: it is closed\n")


def test_without_a_standard_error(tmp_path):
    done = shell("$S env 2>&-", tmp_path)
    assert done.returncode == 0
    assert "torch" in done.stdout
    assert shell("$S demo --top-k 0 2>&-", tmp_path).returncode == 2
    assert shell("$S demo --top-k 0 2>/dev/full", tmp_path).returncode == 2


@pytest.mark.parametrize("closed", [">&- 2>&- <&-", *also("2>/dev/full")])
def test_work_into_files_needs_no_streams(closed, texts, tmp_path):
    """And a file that is opened does not get the number of a stream, with that stream's text in it."""
    from simctg_fast.text.features import load_features

    done = shell(f"$S features texts.txt -o new/folder/f.safetensors {closed}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(load_features(tmp_path / "new/folder/f.safetensors")) == 16
    pytest.importorskip("accelerate", reason="accelerate is not installed (simctg_fast[train])")
    done = shell(f"$S train bundled --data texts.txt --out run --steps 2 --log-every 1 {closed}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run/simctg_training.json").read_text())["finished"]
    assert len((tmp_path / "run/train_log.jsonl").read_text().splitlines()) == 2


def test_a_disk_that_fills_up_in_training(texts, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed (simctg_fast[train])")
    done = shell("ulimit -f 1000; $S train bundled --data texts.txt --out run --steps 2 --save-every 1", tmp_path)
    assert done.returncode == 3, done.stderr
    assert re.search(r"^Error: the output.* cannot be written: File too large$", done.stderr, re.MULTILINE)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (OSError(errno.ENOSPC, "…", "a/b"), OUTPUT, "the output 'a/b' cannot be written: No space left on device"),
        (OSError(errno.EDQUOT, "…"), OUTPUT, "the output cannot be written: Disk quota exceeded"),
        (Exception("I/O error: File too large (os error 27)"), OUTPUT, "the output cannot be written: File too large"),
        (RuntimeError("[enforce fail at x] . PytorchStreamWriter failed writing file"), OUTPUT, "is the disk full"),
        (PermissionError(errno.EACCES, "Permission denied", "a"), REFUSED, "'a': Permission denied"),
        (FileNotFoundError("there is no file 'a'"), REFUSED, "there is no file 'a'"),
        (ValueError("top_k must be 1"), REFUSED, "top_k must be 1"),
        (ImportError("needs peft: pip install peft"), REFUSED, "needs peft"),
        (KeyError("a"), FAULT, "KeyError: 'a'"),
        (RuntimeError("one\ntwo"), FAULT, "RuntimeError: one two"),
        (AssertionError(), FAULT, "AssertionError"),
    ],
)
def test_errors_and_their_codes(error, code, text):
    found, line = explained(error)
    assert found == code
    assert text in line
    assert "\n" not in line


def test_a_full_disk_behind_another_error():
    error = RuntimeError("saving failed")
    assert explained(error)[0] == FAULT
    error.__cause__ = OSError(errno.ENOSPC, "full")
    assert explained(error)[0] == OUTPUT


def test_an_unforeseen_error_is_one_line_with_a_way_to_see_more(monkeypatch):
    def broken(**options: object) -> None:
        raise KeyError("a\x1b[31m")

    monkeypatch.setattr("simctg_fast.ops._backends.backend_info", broken)
    result = CliRunner().invoke(app, ["env"])
    assert result.exit_code == 70
    assert result.output.startswith("Error: KeyError: ")
    assert "SIMCTG_FAST_TRACEBACK=1" in result.output
    monkeypatch.setenv("SIMCTG_FAST_TRACEBACK", "1")
    assert isinstance(CliRunner().invoke(app, ["env"]).exception, KeyError)


def test_who_passes_over_oserrors_does_not_hide_that_output_was_lost():
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OutputError):
        terminal._Output(Full(), False).write("x")
    terminal._Notes(Full()).write("x")


# ------------------------------------------------------------------------------------------------------------- mistakes

BAD = "missing\x1b]0;x\x07"
HOSTILE = {
    "no command": ["frobnicate"],
    "no option": ["env", "--frobnicate"],
    "a control character": ["demo", "--\x1b[31m"],
    "no number": ["demo", "-k", "\x1b[31m"],
    "env: argument": ["env", "x"],
    "demo: model": ["demo", f"./{BAD}"],
    "demo: two models": ["demo", "bundled", "-m", "gpt2"],
    "demo: seed": ["demo", "--seed", "-1"],
    "demo: huge": ["demo", "-k", "9" * 400],
    "train: nothing": ["train"],
    "train: no model": ["train", "--data", "x", "--out", "y"],
    "train: data": ["train", "bundled", "--data", f"{BAD}.txt", "--out", "run"],
    "train: folder as data": ["train", "bundled", "--data", ".", "--out", "run"],
    "train: file as out": ["train", "bundled", "--data", "texts.txt", "--out", "texts.txt"],
    "train: file in out": ["train", "bundled", "--data", "texts.txt", "--out", "texts.txt/run"],
    "train: home of nobody": ["train", "bundled", "--data", "~nobody-of-this-name/x", "--out", "run"],
    "train: nan": ["train", "bundled", "--data", "texts.txt", "--out", "run", "--learning-rate", "nan"],
    "features: folder": ["features", ".", "-o", "f.safetensors"],
    "features: binary": ["features", "bytes.txt", "-o", "f.safetensors"],
    "features: out": ["features", "texts.txt", "-o", "texts.txt/f.safetensors"],
    "features: ending": ["features", "texts.txt", "-o", "f.txt"],
    "features: three": ["features", "a", "b", "c", "-o", "f.safetensors"],
    "features: empty name": ["features", "", "-o", "f.safetensors"],
    "features: layer": ["features", "texts.txt", "-o", "f.safetensors", "--layer", "99"],
    "merge: nothing": ["merge", "-o", "x"],
    "merge: missing": ["merge", f"{BAD}.jsonl", "-o", "x"],
    "merge: folder": ["merge", ".", "-o", "x"],
    "merge: binary": ["merge", "bytes.txt", "-o", "x"],
    "merge: into a file": ["merge", "texts.txt", "-o", "texts.txt/x"],
    "merge: there": ["merge", "texts.txt", "-o", "texts.txt"],
    "run: nothing": ["run"],
    "run: config": ["run", "texts.txt", "--config", "bytes.txt"],
    "generate: model": ["generate", f"./{BAD}", "x"],
}


@pytest.mark.parametrize("case", HOSTILE)
def test_mistakes_end_in_code_2(case, texts, monkeypatch):
    monkeypatch.chdir(texts.parent)
    Path("bytes.txt").write_bytes(b"\xff\xfe\x00\x80\n" * 3)
    before = sorted(Path().iterdir())
    result = CliRunner().invoke(app, HOSTILE[case])
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert "\x1b" not in result.output
    assert "\x07" not in result.output
    assert sorted(Path().iterdir()) == before
    assert texts.read_text().count("\n") == 16


@pytest.mark.parametrize("case", ["a control character", "demo: model", *also("no command", "merge: binary")])
def test_mistakes_in_a_real_process_on_a_terminal(case, texts):
    (texts.parent / "bytes.txt").write_bytes(b"\xff\xfe\x00\x80\n" * 3)
    leader, follower = pty.openpty()
    with started(PROGRAM + HOSTILE[case], cwd=texts.parent, env=environment(), stderr=follower, stdout=follower) as job:
        os.close(follower)
        shown = read_until(leader, "\0never")
        assert job.wait(LIMIT) == 2
    os.close(leader)
    assert "Traceback" not in shown
    assert "\x1b]" not in shown
    assert "\x07" not in shown


def test_help_and_version_everywhere():
    version = CliRunner().invoke(app, ["--version"])
    assert (version.exit_code, version.output) == (0, f"simctg-fast {simctg_fast.__version__}\n")
    for command in ("generate", "run", "merge", "features", "demo", "train", "eval", "isotropy", "compare", "env"):
        short, long = (CliRunner().invoke(app, [command, option]) for option in ("-h", "--help"))
        assert short.exit_code == 0
        assert short.output == long.output


@pytest.mark.parametrize(
    ("argument", "option", "chosen"),
    [("a", None, "a"), (None, "a", "a"), ("a", "a", "a"), (None, None, "bundled")],
)
def test_the_model_as_an_argument_or_an_option(argument, option, chosen):
    assert cli._the_model(argument, option, "bundled") == chosen
    given = ["file"] if argument is None else [argument, "file"]
    assert cli._model_before(given, option, "bundled") == (chosen, "file")


def test_the_model_is_spelled_alike(texts, monkeypatch):
    monkeypatch.chdir(texts.parent)
    for given in (["bundled", "texts.txt"], ["texts.txt"], ["texts.txt", "-m", "bundled"]):
        result = CliRunner().invoke(app, ["features", *given, "-o", "f.safetensors", "--pooling", "mean"])
        assert result.exit_code == 0, result.output
    for given in ([], ["bundled"], ["-m", "bundled"], ["bundled", "--model", "bundled"]):
        result = CliRunner().invoke(app, ["demo", *given, "-n", "2"])
        assert result.exit_code == 0, result.output
    result = CliRunner().invoke(app, ["train", "-m", "./nowhere", "--data", "texts.txt", "--out", "run"])
    assert "./nowhere" in result.output


# -------------------------------------------------------------------------------------------------------------- signals


SIGNALLED = [
    (["demo"], "loading the model"),
    (["features", "texts.txt", "-o", "f.safetensors"], "loading the model"),
    (["train", "bundled", "--data", "texts.txt", "--out", "run"], "loading"),
    (["merge", "pipe", "-o", "all.jsonl"], None),
    (["generate", "bundled", "x", "-n", "400"], None),
    (["env"], None),
]


@pytest.mark.parametrize(
    ("command", "words", "number"),
    [
        *((*case, signal.SIGINT) for case in SIGNALLED),
        (*SIGNALLED[0], signal.SIGTERM),
        (*SIGNALLED[3], signal.SIGTERM),
        *(pytest.param(*SIGNALLED[index], signal.SIGTERM, marks=pytest.mark.full) for index in (1, 2, 4, 5)),
    ],
)
def test_a_signal_ends_a_command_with_a_word(command, words, number, texts):
    os.mkfifo(texts.parent / "pipe")
    for delay in (1.0, 0.7, 0.4):
        leader, follower = pty.openpty()
        with started(PROGRAM + command, cwd=texts.parent, env=environment(), stderr=follower, stdout=follower) as job:
            os.close(follower)
            shown = read_until(leader, words) if words else time.sleep(delay) or ""
            job.send_signal(number)
            shown += read_until(leader, "\0never")
            code = job.wait(LIMIT)
        os.close(leader)
        if code != 0 or words:
            break  # else it had ended: on a machine under load a second may be long
    # Python ends by SIGINT itself where that came while it ran code from a string: a shell sees the same.
    assert code in ((130, -2) if number == signal.SIGINT else (143,)), shown
    assert "stopped" in shown
    assert "Traceback" not in shown


@pytest.mark.parametrize("number", [signal.SIGTERM, *also(signal.SIGINT)])
def test_training_says_from_which_step_it_goes_on(number, texts, tmp_path):
    pytest.importorskip("accelerate", reason="accelerate is not installed (simctg_fast[train])")
    command = [*PROGRAM, "train", "bundled", "--data", "texts.txt", "--out", "run", "--log-every", "1"]
    command += ["--save-every", "1", "--batch-size", "2", "--device", "cpu"]
    with started(
        [*command, "--epochs", "90"], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    ) as job:
        before = ""
        while "step 3/" not in before:
            before = job.stderr.readline()
            assert before, "it ended"
        job.send_signal(number)
        notes = job.stderr.read()
        assert job.wait(LIMIT) in (128 + number, -number)
    step = int(re.search(r"stopped; the same command goes on from step (\d+)\n$", notes)[1])
    assert step >= 2
    assert (tmp_path / "run" / f"checkpoint-{step}").is_dir()
    with started(
        [*command, "--epochs", "90"], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    ) as job:
        while f"going on from step {step}\n" not in before:
            before = job.stderr.readline()
            assert before, "it does not go on"


def test_a_signal_of_which_another_error_is_left(monkeypatch):
    """Extension modules that are interrupted while they are imported raise what they like."""

    def broken(**options: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("numpy failed to import") from None

    monkeypatch.setattr("simctg_fast.ops._backends.backend_info", broken)
    before = signal.getsignal(signal.SIGINT)
    result = CliRunner().invoke(app, ["env"])
    assert (result.exit_code, result.output) == (130, "stopped\n")
    assert signal.getsignal(signal.SIGINT) is before
    assert terminal.signal_code(terminal.Stopped()) == 143


def test_a_signal_that_was_to_be_ignored_is(tmp_path):
    """Of a command in the background of a script SIGTERM may be ignored; the handler is not ours then."""
    code = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "from simctg_fast.terminal import guarded\n"
        "with guarded(): print(signal.getsignal(signal.SIGTERM) == signal.SIG_IGN)"
    )
    assert run_child([sys.executable, "-c", code], env=environment(), check=True).stdout == "True\n"


# ----------------------------------------------------------------------------------------------------- text of others


def test_text_is_shown_without_power_over_a_terminal_and_piped_as_it_is():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert cli.shown(f"a{ESCAPE}b", Terminal()) == "a\\x1b]0;title\\x07b"
    assert cli.shown(f"a{ESCAPE}b", io.StringIO()) == f"a{ESCAPE}b"


@pytest.mark.parametrize("terminal", [True, False])
def test_answers(terminal):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, highlight=False, markup=False, color_system=None, width=200)
    cli._show(console, f"prompt{ESCAPE}", f"text{ESCAPE}", True, False)
    assert (ESCAPE in out.getvalue()) == (not terminal)
    assert ("\\x1b]0;title\\x07" in out.getvalue()) == terminal


@pytest.mark.parametrize("width", [20, 50, 79, 80, 120])
@pytest.mark.parametrize("terminal", [True, False])
def test_the_demo_keeps_to_the_width(terminal, width):
    from simctg_fast.evaluation import demo

    pieces = (
        "a" + ESCAPE,
        " long",
        " text",
        "\n",
        *[" and more words"] * 40,
        " " + "漢字" * 12,
    )
    tokens = tuple(range(len(pieces)))
    texts = [demo.Continuation(n, "".join(pieces), tokens, pieces, 1.0) for n in demo.STRATEGIES.split(",")]
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, color_system=None)
    demo.render([demo.Comparison("A prompt that is longer than a narrow terminal is wide", tuple(texts))], console)
    from rich.cells import cell_len

    assert max(cell_len(line) for line in out.getvalue().splitlines()) <= width
    assert "\x07" not in out.getvalue()


def test_the_demo_explains_its_numbers_and_wraps(tmp_path):
    done = shell("$S demo -n 24", tmp_path, COLUMNS="60")
    assert done.returncode == 0, done.stderr
    *lines, last = done.stdout.splitlines()
    assert max(map(len, lines)) <= 60
    assert last.startswith("Next: simctg-fast generate ")
    text = " ".join(done.stdout.split())
    assert "rep-4: share of four-token runs seen before, best 0; diversity: share of short runs that are new" in text


def test_an_output_that_is_not_unicode(tmp_path):
    ascii_only = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    done = shell("echo 'Grüße ' | PYTHONIOENCODING=utf-8 $S generate bundled -n 2", tmp_path)
    assert done.stdout.startswith("Grüße")
    done = shell("$S demo ./Grüße", tmp_path, **ascii_only)
    assert done.returncode == 2
    assert "no model folder" in done.stderr
    code = "from simctg_fast.terminal import guarded\nwith guarded(): print('Gr\\xfc\\xdfe \\udc80')"
    done = run_child([sys.executable, "-c", code], env=environment(**ascii_only), check=True)
    assert done.stdout == "Gr\\xfc\\xdfe \\udc80\n"


# ---------------------------------------------------------------------------------------------------------------- paths


def test_home_is_home_in_every_path(texts, tmp_path, monkeypatch):
    """`--out=~/x` reaches the program as it is: no shell expands it."""
    from simctg_fast.text.features import load_features

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = CliRunner().invoke(app, ["features", "~/texts.txt", "--out=~/new/f.safetensors"])
    assert result.exit_code == 0, result.output
    assert len(load_features(tmp_path / "new" / "f.safetensors")) == 16
    (tmp_path / "a.jsonl").write_text('{"id": "a", "text": "x", "error": null}\n')
    result = CliRunner().invoke(app, ["merge", "~/a.jsonl", "--into=~/made/all.jsonl", "--order=~/a.jsonl"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "made" / "all.jsonl").is_file()
    pytest.importorskip("accelerate", reason="accelerate is not installed (simctg_fast[train])")
    options = ["--data=~/texts.txt", "--validation=~/texts.txt", "--out=~/deep/run", "--steps=2", "--device=cpu"]
    result = CliRunner().invoke(app, ["train", "bundled", *options])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "deep" / "run" / "model.safetensors").is_file()
    assert (tmp_path / "deep" / "run" / "checkpoint-2").is_dir()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_warnings_have_no_power_over_a_terminal():
    code = "import logging; from simctg_fast.terminal import guarded\n"
    code += "with guarded(): logging.getLogger('simctg_fast').warning('%s is torn', 'a\\x1b]0;title\\x07')"
    done = run_child([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(INSTALLED)})
    assert done.stderr == "a\\x1b]0;title\\x07 is torn\n"
