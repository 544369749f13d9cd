"""`simctg-fast train`: files in, a model out, and a run that survives kill -9."""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("accelerate", reason="accelerate is not installed (simctg_fast[train])")

from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from simctg_fast.cli import app
from simctg_fast.training import TrainingOptions, last_checkpoint, train
from simctg_fast.training.data import Collator, Example, encode, read_examples

from ..processes import LIMIT, started
from ..repository import INSTALLED
from ..training_models import EOS, PAD, VOCABULARY, tiny_model

WORDS = [f"w{i}" for i in range(3, VOCABULARY)]


def save_tokenizer(folder: pathlib.Path, *, ends: bool) -> PreTrainedTokenizerFast:
    """One token a word; `ends`: writes the end-of-sequence token itself, as T5's does."""
    vocabulary = {"<pad>": PAD, "</s>": EOS, "<unk>": 2, **{word: i + 3 for i, word in enumerate(WORDS)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends:
        words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def text(length: int, generator: torch.Generator) -> str:
    return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (length,), generator=generator))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> pathlib.Path:
    """A tiny GPT-2 and a tiny T5 with dropout, a text file and a file of pairs."""
    place = tmp_path_factory.mktemp("train")
    for name in ("gpt2", "t5"):
        tiny_model(name, dropout=0.1, dtype=torch.float32).save_pretrained(place / name)
        save_tokenizer(place / name, ends=name == "t5")
    generator = torch.Generator().manual_seed(0)
    texts = [text(5 + i % 7, generator) for i in range(24)]
    (place / "texts.txt").write_text("\n\n".join(texts) + "\n")
    pairs = [{"source": text(4, generator), "target": text(3 + i % 5, generator)} for i in range(24)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return place


def log_lines(folder: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


class TestData:
    def test_text_files(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_text("one\n\n  two words \n\n")
        assert read_examples(path) == [Example("one"), Example("two words")]

    def test_jsonl(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text(
            '{"text": "a"}\n\n{"source": "b", "target": "c"}\n{"prompt": "d", "completion": "e"}\n{"text": " "}\n'
        )
        assert read_examples(path) == [Example("a"), Example("c", "b"), Example("e", "d")]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.csv", "x", r"must be a .txt or .jsonl file, got '.*a.csv'"),
            ("a.txt", " \n\n", "holds no text"),
            ("a.jsonl", '{"text": "a"}\n{"text": ', r"a.jsonl', line 2: not JSON"),
            (
                "a.jsonl",
                '{"text": "a"}\n{"txt": "b"}',
                r"line 2: must be an object with text.*got '\{\"txt\": \"b\"\}'",
            ),
            ("a.jsonl", '{"text": 3}', "line 1: must be an object"),
            ("a.jsonl", "[1]", "line 1: must be an object"),
        ],
    )
    def test_bad_files(self, name, content, message, tmp_path):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=message):
            read_examples(tmp_path / name)
        with pytest.raises(FileNotFoundError, match="there is no file"):
            read_examples(tmp_path / "other.txt")

    def test_a_long_text_is_cut_into_pieces(self, tmp_path):
        tokenizer = save_tokenizer(tmp_path, ends=False)
        rows = encode([Example("w3 w4 w5 w6 w7 w8")], tokenizer, 4, is_encoder_decoder=False)
        assert [row["input_ids"] for row in rows] == [[3, 4, 5, 6], [7, 8, EOS]]
        assert all(row["input_ids"] == row["labels"] for row in rows)
        rows = encode([Example("w3 w4 w5 w6")], tokenizer, 4, is_encoder_decoder=False)
        assert [row["input_ids"] for row in rows] == [[3, 4, 5, 6]], "a single token predicts nothing"
        with pytest.raises(ValueError, match="at least two tokens"):
            encode([Example("")], tokenizer, 4, is_encoder_decoder=False)

    def test_packing(self, tmp_path):
        tokenizer = save_tokenizer(tmp_path, ends=False)
        rows = encode([Example("w3 w4"), Example("w5")], tokenizer, 3, is_encoder_decoder=False, pack=True)
        assert [row["input_ids"] for row in rows] == [[3, 4, EOS], [5, EOS]]
        with pytest.raises(ValueError, match="pairs cannot be packed"):
            encode([Example("w3", "w4")], tokenizer, 3, is_encoder_decoder=False, pack=True)

    def test_pairs(self, tmp_path):
        tokenizer = save_tokenizer(tmp_path, ends=False)
        pair = [Example("w6 w7", "w3 w4 w5")]
        assert encode(pair, tokenizer, 16, is_encoder_decoder=False) == [
            {"input_ids": [3, 4, 5, 6, 7, EOS], "labels": [-100, -100, -100, 6, 7, EOS]}
        ]
        assert encode(pair, tokenizer, 4, is_encoder_decoder=False) == [
            {"input_ids": [5, 6, 7, EOS], "labels": [-100, 6, 7, EOS]}
        ]
        tokenizer = save_tokenizer(tmp_path, ends=True)
        assert encode(pair, tokenizer, 16, is_encoder_decoder=True) == [
            {"input_ids": [3, 4, 5, EOS], "labels": [6, 7, EOS]}
        ]
        with pytest.raises(ValueError, match="trained on pairs"):
            encode([Example("w3")], tokenizer, 4, is_encoder_decoder=True)

    def test_collator(self):
        batch = Collator(7)([{"input_ids": [1, 2], "labels": [2]}, {"input_ids": [3], "labels": [4, 5]}])
        assert batch["input_ids"].tolist() == [[1, 2], [3, 7]]
        assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]
        assert batch["labels"].tolist() == [[2, -100], [4, 5]]


class TestCommand:
    def test_a_decoder(self, place, tmp_path):
        out = tmp_path / "run"
        command = [
            "train",
            str(place / "gpt2"),
            "--data",
            str(place / "texts.txt"),
            "--out",
            str(out),
            "--margin",
            "0.9",
        ]
        command += ["--validation", str(place / "texts.txt"), "--steps", "12", "--learning-rate", "3e-3"]
        command += [
            "--batch-size",
            "4",
            "--accumulate",
            "2",
            "--log-every",
            "2",
            "--save-every",
            "8",
            "--max-length",
            "32",
        ]
        result = CliRunner().invoke(app, [*command, "--device", "cpu"])
        assert result.exit_code == 0, result.output
        assert "12 steps, isotropy" in result.stdout
        lines = [line for line in log_lines(out) if "loss" in line]
        assert [line["step"] for line in lines] == [2, 4, 6, 8, 10, 12]
        for line in lines:
            assert line["loss"] == pytest.approx(line["mle_loss"] + line["contrastive_loss"], rel=1e-5)
            assert 0 < line["isotropy"] < 1.5
        assert lines[-1]["loss"] < lines[0]["loss"]
        assert any("eval_contrastive_loss" in line for line in log_lines(out))
        card = (out / "README.md").read_text()
        assert "| margin | 0.9 |" in card
        assert "before" in card
        # What is written is a model like any other.
        written = CliRunner().invoke(app, ["generate", str(out), "w3 w4 w5", "-n", "4", "--device", "cpu"])
        assert written.exit_code == 0, written.output

        again = CliRunner().invoke(app, [*command, "--device", "cpu"])
        assert "is finished" in again.output
        other = CliRunner(env={"COLUMNS": "400"}).invoke(app, [*command, "--device", "cpu", "--seed", "3"])
        assert other.exit_code == 2
        assert "was started with seed 0, now 3; name another folder" in other.output

    def test_an_encoder_decoder(self, place, tmp_path):
        options = TrainingOptions(margin=0.9, steps=6, batch_size=4, learning_rate=3e-3, max_length=32)
        summary = train(place / "t5", place / "pairs.jsonl", tmp_path / "run", options, device="cpu", log_every=1)
        lines = [line for line in log_lines(tmp_path / "run") if "loss" in line]
        assert len(lines) == summary.steps == 6
        assert lines[-1]["loss"] < lines[0]["loss"]
        assert lines[0]["contrastive_loss"] > 0

    def test_restart(self, place, tmp_path):
        def steps(**changes):
            options = TrainingOptions(steps=2, batch_size=4, max_length=32, **changes)
            folder = tmp_path / "run"
            train(
                place / "gpt2", place / "texts.txt", folder, options, device="cpu", log_every=1, restart=bool(changes)
            )
            return [line["loss"] for line in log_lines(folder)]

        first = steps()
        second = steps(seed=1)
        assert len(first) == len(second) == 2
        assert first != second

    def test_contrastive_training_raises_isotropy(self, place, tmp_path):
        """Against the same run with the likelihood alone."""
        after = {}
        for weight in (0.0, 1.0):
            options = TrainingOptions(
                margin=0.9, contrastive_weight=weight, steps=20, batch_size=8, learning_rate=3e-3, max_length=32
            )
            summary = train(place / "gpt2", place / "texts.txt", tmp_path / f"run{weight}", options, device="cpu")
            after[weight] = summary.isotropy_after
        assert after[1.0] > after[0.0] + 0.02

    @pytest.mark.parametrize(
        ("settings", "shown", "hidden"),
        [
            (["--loss", "contraclm", "--temperature", "0.1"], ["| temperature | 0.1 |", "Jain et al."], "| margin"),
            (["--loss", "cosreg"], ["| loss | cosreg |", "Gao et al. 2019"], "| temperature"),
        ],
    )
    def test_other_losses(self, settings, shown, hidden, place, tmp_path):
        out = tmp_path / "run"
        command = ["train", str(place / "gpt2"), "--data", str(place / "texts.txt"), "--out", str(out), "--steps", "20"]
        command += ["--validation", str(place / "texts.txt"), "--batch-size", "8", "--learning-rate", "3e-3"]
        command += ["--max-length", "32", "--log-every", "1", "--device", "cpu", *settings]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        term = f"{settings[1]}_loss"
        lines = [line for line in log_lines(out) if "loss" in line]
        assert [line["step"] for line in lines] == list(range(1, 21))
        for line in lines:
            assert line["loss"] == pytest.approx(line["mle_loss"] + line[term], rel=1e-5)
        assert lines[-1][term] < lines[0][term]
        assert any(f"eval_{term}" in line for line in log_lines(out))
        card = (out / "README.md").read_text()
        assert all(text in card for text in shown)
        assert hidden not in card

        refused = CliRunner(env={"COLUMNS": "400"}).invoke(app, [*command, "--contrastive-weight", "2"])
        assert refused.exit_code == 2
        assert "was started with contrastive_weight 1.0, now 2.0" in refused.output
        if "--temperature" in settings:
            command[command.index("--temperature") + 1] = "0.2"
            refused = CliRunner(env={"COLUMNS": "400"}).invoke(app, command)
            assert "was started with temperature 0.1, now 0.2" in refused.output

    def test_a_record_without_the_losses(self, place, tmp_path):
        """As versions wrote it that had one loss: it is continued as that, and not as another."""
        options = {"steps": 2, "batch_size": 4, "max_length": 32}
        where = (place / "gpt2", place / "texts.txt", tmp_path / "run")
        train(*where, TrainingOptions(**options), device="cpu")
        path = tmp_path / "run" / "simctg_training.json"
        record = json.loads(path.read_text())
        assert (record["options"].pop("loss"), record["options"].pop("temperature")) == ("simctg", None)
        path.write_text(json.dumps(record))
        assert train(*where, TrainingOptions(**options), device="cpu").steps == 2
        with pytest.raises(ValueError, match=r"started with margin 0\.5, now None; reduction pairs, now seq.*; loss"):
            train(*where, TrainingOptions(**options, loss="contraclm"), device="cpu")

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--margin", "2"], "margin is 2.0, must lie in [-1, 1]"),
            (["--steps", "0"], "steps must be an integer of at least 1, got 0"),
            (["--max-length", "65"], "max_length is 65, the model's context holds 64"),
            (["--reduction", "dense", "--accumulate", "2"], "reduction='dense' takes no accumulation, got 2"),
            (["--loss", "simcse"], "loss is 'simcse', must be one of 'simctg', 'contraclm', 'cosreg'"),
            (["--loss", "contraclm", "--margin", "0.5"], "margin is 0.5, must be left out with loss='contraclm'"),
            (["--temperature", "0.1"], "temperature is 0.1, must be left out with loss='simctg'"),
            (["--loss", "contraclm", "--temperature", "-1"], "temperature is -1.0, must be positive"),
            (["--save-every", "0"], "save_every must be an integer of at least 1, got 0"),
            (["--device", "tpu"], "device must be cpu or cuda, got 'tpu'"),
        ],
    )
    def test_bad_values(self, arguments, message, place, tmp_path):
        command = ["train", str(place / "gpt2"), "--data", str(place / "texts.txt"), "--out", str(tmp_path / "run")]
        result = CliRunner(env={"COLUMNS": "400"}).invoke(app, command + arguments)
        assert result.exit_code == 2, result.output
        assert message in result.output
        assert not (tmp_path / "run").exists(), "the same folder can be named again with the right value"

    def test_a_folder_of_something_else_is_left_alone(self, place, tmp_path):
        (tmp_path / "thesis.tex").write_text("mine")
        with pytest.raises(ValueError, match="is not empty and holds no run"):
            train(place / "gpt2", place / "texts.txt", tmp_path, restart=True)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("steps", "log_every", "logged"), [(1, 10, [1]), (3, 10, [3]), (5, 2, [2, 4, 5]), (4, 2, [2, 4])]
)
def test_the_last_step_is_logged(steps, log_every, logged, place, tmp_path):
    options = TrainingOptions(steps=steps, batch_size=4, max_length=32)
    train(place / "gpt2", place / "texts.txt", tmp_path / "run", options, device="cpu", log_every=log_every)
    assert [line["step"] for line in log_lines(tmp_path / "run")] == logged
    assert all(line["loss"] > 0 for line in log_lines(tmp_path / "run"))


def test_paths_below_home(place, tmp_path, monkeypatch):
    """From the first step to the last in one folder: half of a run under another name would begin again when killed."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(place / "texts.txt", tmp_path / "texts.txt")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    options = TrainingOptions(steps=2, batch_size=4, max_length=32)
    summary = train(place / "gpt2", "~/texts.txt", "~/a/run", options, validation="~/texts.txt", device="cpu")
    assert summary.folder == tmp_path / "a" / "run"
    assert last_checkpoint("~/a/run") == tmp_path / "a" / "run" / "checkpoint-2"
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    "record",
    [
        "null",
        "[]",
        "3",
        '"text"',
        "{}",
        '{"options": []}',
        '{"options": {}}',
        '{"finished": true}',
        "{half",
        "",
        '{"options": {}, "model": "m", "data": {}, "validation": null, "isotropy_before": 1.0}',
    ],
)
@pytest.mark.parametrize("restart", [False, True])
def test_a_record_of_somebody_else_is_left_alone(record, restart, place, tmp_path):
    (tmp_path / "simctg_training.json").write_text(record)
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-7" / "thesis.tex").write_text("mine")
    (tmp_path / "train_log.jsonl").write_text("mine")
    command = ["train", str(place / "gpt2"), "--data", str(place / "texts.txt"), "--out", str(tmp_path)]
    result = CliRunner(env={"COLUMNS": "400"}).invoke(app, command + ["--restart"] * restart)
    assert result.exit_code == 2, result.output
    assert "simctg_training.json' is no record of this command, nothing is changed" in result.output
    assert (tmp_path / "checkpoint-7" / "thesis.tex").read_text() == "mine"
    assert (tmp_path / "train_log.jsonl").read_text() == "mine"
    assert (tmp_path / "simctg_training.json").read_text() == record


OTHER_LINES = [b"null", b'{"step": "3"}', b"\xff"]
MORE_LINES = [b"[]", b"mine", b'{"loss": 1}']


@pytest.mark.parametrize("line", [*OTHER_LINES, *(pytest.param(line, marks=pytest.mark.full) for line in MORE_LINES)])
def test_a_line_of_the_log_of_somebody_else_is_left_alone(line, place, tmp_path):
    options = TrainingOptions(steps=6, batch_size=4, max_length=32)
    out = tmp_path / "run"
    train(place / "gpt2", place / "texts.txt", out, options, device="cpu", save_every=2, log_every=1, keep=9)
    record = json.loads((out / "simctg_training.json").read_text())
    del record["finished"]
    (out / "simctg_training.json").write_text(json.dumps(record))
    shutil.rmtree(out / "checkpoint-6")
    log = (out / "train_log.jsonl").read_bytes()
    (out / "train_log.jsonl").write_bytes(line + b"\n" + log)
    with pytest.raises(ValueError, match=r"train_log.jsonl', line 1: is not of a training log"):
        train(place / "gpt2", place / "texts.txt", out, options, device="cpu")
    assert (out / "train_log.jsonl").read_bytes() == line + b"\n" + log
    assert (out / "checkpoint-4").is_dir()
    (out / "train_log.jsonl").write_bytes(log + line)
    train(place / "gpt2", place / "texts.txt", out, options, device="cpu", log_every=1)
    assert [entry["step"] for entry in log_lines(out)] == [1, 2, 3, 4, 5, 6]


def test_killed_while_the_record_was_first_written(place, tmp_path):
    (tmp_path / "simctg_training.json.tmp").write_text("{")
    options = TrainingOptions(steps=1, batch_size=4, max_length=32)
    assert train(place / "gpt2", place / "texts.txt", tmp_path, options, device="cpu").steps == 1


def test_a_file_whose_name_is_not_text(place, tmp_path):
    name = os.fsencode(tmp_path) + b"/t\xff.txt"
    shutil.copy(place / "texts.txt", name)
    options = TrainingOptions(steps=1, batch_size=4, max_length=32)
    summary = train(place / "gpt2", os.fsdecode(name), tmp_path / "run", options, device="cpu")
    assert "t\\udcff.txt" in (summary.folder / "README.md").read_text()


def test_a_checkpoint_that_was_cut_short_is_passed_over(tmp_path):
    for number, state in ((5, "{}"), ("²", "{}"), (11, "[]"), (10, '{"global_st'), (9, "{}"), (12, None)):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert last_checkpoint(tmp_path / "nothing") is None


@pytest.mark.parametrize("loss", ["simctg", "contraclm"])
def test_a_run_whose_last_checkpoint_was_cut_short(loss, place, tmp_path):
    """As if killed while the checkpoint of step 12 was written: it goes on from step 8, to the same weights and log."""
    options = TrainingOptions(steps=14, batch_size=4, max_length=32, learning_rate=1e-3, loss=loss)
    out = tmp_path / "run"

    def run():
        return train(place / "gpt2", place / "texts.txt", out, options, device="cpu", save_every=4, log_every=1, keep=9)

    assert run().resumed_from == 0
    weights = load_file(out / "model.safetensors")
    curve = [(line["step"], line["loss"]) for line in log_lines(out)]
    shutil.rmtree(out / "checkpoint-14")
    (out / "checkpoint-12" / "trainer_state.json").unlink()
    (out / "checkpoint-12" / "model.safetensors").write_bytes(b"half")
    (out / "model.safetensors").unlink()
    with (out / "train_log.jsonl").open("a") as log:
        log.write('{"step": 1')
    record = json.loads((out / "simctg_training.json").read_text())
    (out / "simctg_training.json").write_text(json.dumps({k: v for k, v in record.items() if k != "finished"}))

    assert run().resumed_from == 8
    again = load_file(out / "model.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in weights.items())
    assert [(line["step"], line["loss"]) for line in log_lines(out)] == curve


@pytest.mark.full
def test_a_killed_run_ends_with_the_same_weights(place, tmp_path, children):
    """kill -9 in the middle, twice: with the process gone, the same command goes on, and nothing shows it."""

    def start(out: pathlib.Path) -> subprocess.Popen:
        command = [sys.executable, "-m", "simctg_fast.cli", "train", str(place / "gpt2"), "--data"]
        command += [
            str(place / "texts.txt"),
            "--out",
            str(out),
            "--steps",
            "60",
            "--batch-size",
            "4",
            "--accumulate",
            "2",
        ]
        command += ["--save-every", "4", "--log-every", "1", "--max-length", "32", "--device", "cpu"]
        environment = {**os.environ, "PYTHONPATH": str(INSTALLED), "OMP_NUM_THREADS": "1"}
        return children.enter_context(
            started(command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        )

    def finish(process: subprocess.Popen) -> str:
        notes = process.communicate(timeout=LIMIT)[1]
        assert process.returncode == 0, notes
        return notes

    def kill_behind(step: int) -> None:
        process = start(tmp_path / "killed")
        deadline = time.monotonic() + LIMIT
        while True:
            found = last_checkpoint(tmp_path / "killed")
            if found is not None and int(found.name.rpartition("-")[2]) >= step:
                break
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "no checkpoint came"
            time.sleep(0.02)
        process.kill()
        process.communicate()
        assert process.returncode == -9, "the run was over before it could be killed"

    whole = start(tmp_path / "whole")
    kill_behind(4)
    kill_behind(16)
    notes = finish(start(tmp_path / "killed"))
    finish(whole)
    assert "going on from step" in notes
    assert int(notes.split("going on from step ")[1].split()[0]) >= 16
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
    curves = [[(line["step"], line["loss"]) for line in log_lines(tmp_path / name)] for name in ("whole", "killed")]
    assert len(curves[0]) == 60
    assert curves[0] == curves[1]
    assert len(list((tmp_path / "killed").glob("checkpoint-*"))) <= 3
