"""The command line as a person uses it: in a terminal, in a pipe, with mistakes."""

from __future__ import annotations

import io
import json
import os
import re
import sys

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from simctg_fast.assets import bundled_model_path
from simctg_fast.cli import app
from simctg_fast.evaluation import demo
from simctg_fast.evaluation.demo import Comparison, Continuation
from simctg_fast.loading import fitting_threads
from simctg_fast.ops import backend_info
from simctg_fast.strategy_names import RANDOM
from simctg_fast.text.continuation import continuation_pieces

from ..processes import run_child
from ..repository import INSTALLED


def run(*arguments: str, stdin: str | None = None):
    return CliRunner().invoke(app, list(arguments), input=stdin)


def said(result) -> str:
    """Everything printed, without the frame that rich draws around errors and its line breaks."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", text).split())


def lines(result) -> list[dict]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]


def subprocess_environment(**changes: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(INSTALLED), "PYTHONIOENCODING": "utf-8", **changes}


class TestGenerate:
    def test_continues_the_prompt(self) -> None:
        result = run("generate", "bundled", "Return the", "--max-new-tokens", "12")
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith("Return the ")
        assert len(result.stdout) > len("Return the ") + 12
        assert "\x1b" not in result.stdout

    def test_dry(self) -> None:
        prompt = ("generate", "bundled", "The return value of", "-n", "16", "-k", "1")
        plain, with_dry = run(*prompt), run(*prompt, "--dry-multiplier", "9", "--dry-allowed-length", "1")
        assert with_dry.exit_code == 0, with_dry.output
        assert with_dry.stdout.startswith("The return value of")
        assert with_dry.stdout != plain.stdout
        # Words with their spaces, in tokens that hold a break.
        free = [word for value in ("the", " ", "return") for word in ("--dry-sequence-breaker", value)]
        assert run(*prompt, "--dry-multiplier", "9", "--dry-allowed-length", "1", *free).stdout == plain.stdout
        assert run(*prompt, "--dry-base", "1.5").stdout == plain.stdout, "off without a multiplier"
        for option, value in (("--dry-base", "0"), ("--dry-multiplier", "nan"), ("--dry-penalty-range", "-2")):
            result = run(*prompt, option, value)
            assert result.exit_code == 2
            assert f"{option[2:].replace('-', '_')} must be" in said(result)

    def test_equals_generate_from_python(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from simctg_fast import ContrastiveSearch

        tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
        model = AutoModelForCausalLM.from_pretrained(bundled_model_path()).eval()
        inputs = tokenizer("If the file", return_tensors="pt")
        search = ContrastiveSearch(penalty_alpha=0.4, top_k=6)
        ids = model.generate(**inputs, custom_generate=search, max_new_tokens=20)[0, inputs["input_ids"].shape[1] :]
        (line,) = lines(run("generate", "bundled", "If the file", "-n", "20", "-a", "0.4", "-k", "6", "--json"))
        assert line == {"prompt": "If the file", "text": tokenizer.decode(ids, skip_special_tokens=True), "tokens": 20}

    def test_a_batch_writes_what_each_prompt_gets_alone(self) -> None:
        prompts = ["This", "Return a list of the names of the", "If the argument is"]
        together = lines(run("generate", "bundled", *prompts, "-n", "16", "--json"))
        alone = [lines(run("generate", "bundled", p, "-n", "16", "--json"))[0] for p in prompts]
        assert together == alone
        assert [line["prompt"] for line in together] == prompts

    def test_prompts_from_stdin_one_a_line(self) -> None:
        piped = run("generate", "bundled", "-n", "8", "--json", "--batch-size", "1", stdin="One\n\n  \nTwo words\r\n")
        assert [line["prompt"] for line in lines(piped)] == ["One", "Two words"]

    def test_stream_writes_the_same_text_prompt_included(self) -> None:
        (line,) = lines(run("generate", "bundled", "The file", "-n", "16", "--json"))
        streamed = run("generate", "bundled", "The file", "-n", "16", "--stream")
        assert streamed.exit_code == 0, streamed.output
        assert streamed.stdout.rstrip("\n") == ("The file" + line["text"]).rstrip("\n")

    def test_alpha_zero_is_greedy_and_the_options_arrive(self) -> None:
        greedy, plain = (
            lines(run("generate", "bundled", "This is", "-n", "24", "--json", *more))[0]["text"]
            for more in (["-a", "0"], ["-k", "1"])
        )
        searched = lines(run("generate", "bundled", "This is", "-n", "24", "--json"))[0]["text"]
        assert greedy == plain != searched

    def test_temperature_draws_and_seed_repeats(self) -> None:
        def text(seed: str) -> str:
            options = ["-n", "16", "--temperature", "0.8", "--seed", seed, "--json"]
            return lines(run("generate", "bundled", "This is", *options))[0]["text"]

        first = text("1")
        assert text("1") == first
        assert text("2") != first

    @pytest.mark.parametrize("strategy", RANDOM)
    def test_whatever_draws_takes_a_seed(self, strategy) -> None:
        options = ["-n", "8", "--strategy", strategy, "--seed", "1", "--json"]
        first, again = (lines(run("generate", "bundled", "This is", *options))[0]["text"] for _ in range(2))
        assert first == again

    def test_stop_text(self) -> None:
        (whole,) = lines(run("generate", "bundled", "The value", "-n", "30", "--json"))
        stop = re.search(r"\s(\w+)\s", whole["text"])[1]
        (stopped,) = lines(run("generate", "bundled", "The value", "-n", "30", "--json", "--stop", stop))
        assert stopped["tokens"] < whole["tokens"]
        assert stopped["text"] == whole["text"][: whole["text"].index(stop)], "up to it, as `run` has it"
        streamed = run("generate", "bundled", "The value", "-n", "30", "--stop", stop, "--stream")
        assert streamed.stdout == f"The value{stopped['text']}\n"

    def test_prompts_that_cannot_be_continued_are_named_and_the_others_are(self) -> None:
        good = lines(run("generate", "bundled", "This is", "-n", "8", "--json"))
        result = run("generate", "bundled", "word " * 600, "This is", "bad \ud83d", "-n", "8", "--json")
        assert result.exit_code == 1, result.output
        first, second, third = (json.loads(line) for line in result.stdout.splitlines() if line.startswith("{"))
        assert "601 prompt tokens and max_new_tokens=8 are more than the model's 512" in first["error"]
        assert second == good[0]
        assert "the tokenizer refused it" in third["error"]
        assert "prompt 1: 601 prompt tokens" in said(result)

    def test_lines_of_stdin_that_are_no_text(self) -> None:
        stdin = b"\xef\xbb\xbfOne\r\ncaf\xe9\r\nTwo words"
        result = CliRunner().invoke(app, ["generate", "bundled", "-n", "4", "--json"], input=stdin)
        assert result.exit_code == 1
        written = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
        assert [line["prompt"] for line in written] == ["One", "Two words"]
        assert "line 2 of standard input: it is not UTF-8" in said(result)

    def test_the_model_as_an_option(self) -> None:
        expected = lines(run("generate", "bundled", "This is", "-n", "4", "--json"))
        assert lines(run("generate", "-m", "bundled", "This is", "-n", "4", "--json")) == expected
        assert "no model" in said(run("generate"))

    def test_the_end_of_the_context_is_kept_and_said(self) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
        prompt = tokenizer.decode(tokenizer("one word " * 300)["input_ids"][:504])
        room = 512 - len(tokenizer(prompt)["input_ids"])
        result = run("generate", "bundled", prompt, "-n", "900", "--json")
        assert 0 < lines(result)[0]["tokens"] <= room < 20
        assert f"the model's context ends at 512 tokens; at most {room} are written behind {512 - room}" in said(result)

    def test_encoder_decoder(self, tmp_path) -> None:
        from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

        tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
        tokenizer.save_pretrained(tmp_path)
        torch.manual_seed(0)
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": len(tokenizer)}
        T5ForConditionalGeneration(
            T5Config(**sizes, decoder_start_token_id=1, pad_token_id=1, eos_token_id=0)
        ).save_pretrained(tmp_path)
        first, second = lines(run("generate", str(tmp_path), "A question", "More words in it", "-n", "9", "--json"))
        assert (first["prompt"], second["prompt"]) == ("A question", "More words in it")
        assert first["tokens"] == 9
        assert lines(run("generate", str(tmp_path), "A question", "-n", "9", "--json")) == [first]

    def test_weights_of_fewer_bits(self, tmp_path) -> None:
        """Rounded ones write a text of their own sooner or later; those that lose nothing never do."""
        prompt, tokens = "The committee will decide", ["-n", "40", "--json"]
        plain = lines(run("generate", "bundled", prompt, *tokens))
        lossless = lines(run("generate", "bundled", prompt, *tokens, "--weights", "lossless"))
        rounded = run("generate", "bundled", prompt, *tokens, "--weights", "int8")
        assert lossless == plain
        assert lines(rounded)[0]["tokens"] == 40
        (source := tmp_path / "in.txt").write_text(prompt + "\n")
        out = tmp_path / "out.jsonl"
        written = run("run", "bundled", str(source), "-o", str(out), "-n", "40", "--weights", "int8")
        assert written.exit_code == 0, written.output
        assert json.loads(out.read_text())["text"] == lines(rounded)[0]["text"]
        refused = run("run", "bundled", str(source), "-o", str(out), "-n", "40")
        assert refused.exit_code == 2
        assert 'weights: "int8" then, null now' in said(refused)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["bundled", "x", "--penalty-alpha", "1.5"], "--penalty-alpha must be between 0 and 1, got 1.5"),
            (["bundled", "x", "--penalty-alpha", "nan"], "--penalty-alpha must be between 0 and 1, got nan"),
            (["bundled", "x", "--top-k", "0"], "--top-k must be at least 1, got 0"),
            (["bundled", "x", "--top-k", "5000"], "top_k must be at most the vocabulary size 3072, got 5000"),
            (["bundled", "x", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
            (["bundled", "x", "--batch-size", "0"], "--batch-size must be at least 1, got 0"),
            (["bundled", "x", "--temperature", "-1"], "--temperature must be at least 0, got -1.0"),
            (["bundled", "x", "--temperature", "nan"], "--temperature must be at least 0, got nan"),
            (["bundled", "x", "--temperature", "inf"], "temperature must be a finite number of at least 0, got inf"),
            (["bundled", "x", "--temperature", "1", "--seed", str(2**63)], "--seed must be from 0 to 2**63 - 1, got"),
            (["bundled", "x", "--stop", ""], "--stop must be a text, got ''"),
            (["bundled", "x", "--seed", "3"], "--seed must be given together with --temperature or --strategy"),
            (["bundled", "x", "--strategy", "fsd,guard", "--seed", "3"], "--seed must be given together with"),
            (["bundled", "x", "--dtype", "int8"], "--dtype must be float32, float16, bfloat16 or auto, got int8"),
            (["bundled", "x", "--weights", "int4"], "--weights must be int8 or lossless, got int4"),
            (["bundled", "x", "--device", "abacus"], "device must be one that this torch can use, got 'abacus'"),
            (["bundled", "x", "--stream", "--json"], "cannot be combined with --json"),
            (["bundled"], "every prompt is empty"),
            (["bundled", " "], "every prompt is empty"),
            (["./nowhere", "x"], "there is no model folder './nowhere'; give a local folder, a hub name or 'bundled'"),
            (["two words", "x"], "must be a local folder, a hub name (owner/name) or 'bundled'; got 'two words'"),
            (["nobody/nothing-of-the-kind", "x"], "the model cannot be loaded"),
        ],
    )
    def test_mistakes_are_named_and_end_in_code_2(self, arguments: list[str], message: str) -> None:
        result = run("generate", *arguments, stdin="")
        assert result.exit_code == 2, result.output
        assert message in said(result)
        assert "Traceback" not in said(result)


class TestDemo:
    def test_greedy_loops_and_contrastive_search_does_not(self) -> None:
        result = run("demo", "--max-new-tokens", "64")
        assert result.exit_code == 0, result.output
        for prompt in demo.PROMPTS:
            assert f"{prompt} …" in result.stdout
        assert len(re.findall(r"rep-4 \d\.\d\d  diversity \d\.\d\d  \d+ tokens/s", result.stdout)) == 3 * 6
        assert re.search(
            r"Greedy search loops in 3 of 3 texts .*; no loops by .* contrastive search \(rep", said(result)
        )
        assert 'simctg-fast generate bundled "' in result.stdout
        assert "\x1b" not in result.stdout

    def test_mistakes(self) -> None:
        assert "got -0.1" in said(run("demo", "-a", "-0.1"))
        assert run("demo", "--model", "./nowhere").exit_code == 2

    @pytest.mark.parametrize(
        ("greedy", "contrastive", "start"),
        [
            (
                [7] * 40,
                list(range(40)),
                "Greedy search loops in 1 of 1 texts (rep-4 0.97); no loops by nucleus sampling (rep-4 0.00) and "
                "contrastive search (rep-4 0.00).",
            ),
            (
                [7] * 40,
                [1, 2, 3] * 14,
                "Greedy search loops in 1 of 1 texts (rep-4 0.97) and contrastive search loops in 1 of 1 texts (rep-4 "
                "0.92); no loops by nucleus sampling (rep-4 0.00).",
            ),
            (list(range(40)), list(range(40)), "No loops by greedy search (rep-4 0.00), nucleus sampling"),
            (
                [],
                [7] * 3,
                "No loops by nucleus sampling (rep-4 0.00); greedy search wrote fewer than 8 tokens in 1 of 1 texts "
                "and contrastive search wrote fewer than 8 tokens in 1 of 1 texts, too few to tell.",
            ),
            ([*range(8)], list(range(40)), "No loops by greedy search (rep-4 0.00), nucleus sampling"),
        ],
    )
    def test_the_verdict_follows_the_figures(self, greedy, contrastive, start) -> None:
        assert demo.verdict([comparison(greedy=greedy, contrastive=contrastive)]).startswith(start)

    def test_a_text_too_short_to_judge_counts_for_nothing(self) -> None:
        brief, looping = continuation("greedy", [7, 7, 7]), continuation("greedy", [7] * 40)
        assert (brief.repetition, brief.diversity, brief.loops) == (None, None, False)
        found = demo.verdict([Comparison("a", (brief,)), Comparison("b", (looping,))])
        assert found == (
            "Greedy search loops in 1 of 2 texts (rep-4 0.97); greedy search wrote fewer than 8 tokens in 1 of 2 texts"
            ", too few to tell."
        )
        nothing = demo.verdict([Comparison("a", (continuation("greedy", []),))])
        assert nothing == "Greedy search wrote fewer than 8 tokens in 1 of 1 texts, too few to tell."

    @pytest.mark.parametrize("terminal", [True, False])
    def test_a_text_without_tokens_is_shown_without_figures(self, terminal) -> None:
        console = Console(force_terminal=terminal, width=100, file=io.StringIO(), color_system=None)
        demo.render([comparison(greedy=[], contrastive=list(range(12)))], console)
        shown = console.file.getvalue()
        assert shown.count("rep-4 -") == shown.count("diversity -") == 1
        assert shown.count("diversity 1.00") == 2

    def test_strategies_by_choice(self) -> None:
        result = run("demo", "-n", "8", "-s", "greedy,contrastive:top_k=2,beam")
        assert result.exit_code == 0, result.output
        assert len(re.findall(r"rep-4 \d\.\d\d", result.stdout)) == 3 * 3 + 3
        assert "contrastive:top_k=2" in result.stdout
        assert "strategies must be some of greedy" in said(run("demo", "-s", "loud"))

    def test_figures_of_a_text(self) -> None:
        text = continuation("greedy", [1, 2, 3, 4, 5, 1, 2, 3, 4, 9], seconds=0.5)
        assert text.repetition == pytest.approx(1 / 7)
        assert text.diversity == pytest.approx((6 / 9) * (6 / 8) * (6 / 7))
        assert text.tokens_per_second == pytest.approx(20.0)
        assert text.repeated() == [False] * 5 + [True] * 4 + [False]
        assert not text.loops

    def test_rows_on_a_terminal_mark_what_repeats(self) -> None:
        console = Console(force_terminal=True, width=120, record=True, color_system="standard", file=io.StringIO())
        demo.render([comparison(greedy=[7] * 12, contrastive=list(range(12)))], console)
        drawn = console.export_text(styles=True)
        plain = re.sub(r"\x1b\[[0-9;]*m", "", drawn)
        assert plain.index("greedy") < plain.index("nucleus") < plain.index("contrastive")
        red = "".join(re.findall(r"\x1b\[31m([^\x1b]*)\x1b", drawn))
        assert "t7" in red
        assert "t8" not in red

    def test_a_character_of_several_tokens_comes_out_whole(self) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
        text = "漢字 🙂 naïve"
        ids = tokenizer(text)["input_ids"]
        pieces = list(continuation_pieces(tokenizer, [], ids))
        assert len(pieces) == len(ids) > len(text)
        assert "".join(pieces) == text


def continuation(method: str, tokens: list[int], seconds: float = 1.0) -> Continuation:
    pieces = tuple(f" t{token}" for token in tokens)
    return Continuation(method, "".join(pieces), tuple(tokens), pieces, seconds)


def comparison(greedy: list[int], contrastive: list[int]) -> Comparison:
    texts = {"greedy": greedy, "nucleus": list(range(50, 60)), "contrastive": contrastive}
    return Comparison("A prompt", tuple(continuation(*item) for item in texts.items()))


def test_a_small_model_runs_on_one_thread_and_the_setting_returns(monkeypatch) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(bundled_model_path())
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with fitting_threads(model):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
        with pytest.raises(KeyError), fitting_threads(model):
            raise KeyError
        assert torch.get_num_threads() == 2
        monkeypatch.setattr(model, "num_parameters", lambda: 10**8)
        with fitting_threads(model):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


class TestEnv:
    def test_versions_and_backends(self) -> None:
        result = run("env")
        assert result.exit_code == 0, result.output
        shown = dict(line.split(maxsplit=1) for line in result.stdout.splitlines())
        assert shown["torch"] == torch.__version__
        assert shown["python"] == ".".join(map(str, sys.version_info[:3]))
        present = {name for name, value in backend_info().items() if value is not None}
        assert {"simctg_fast", "transformers", "threads", "gpus"} <= present <= shown.keys()

    def test_shows_the_real_error_of_what_did_not_load(self) -> None:
        """A broken extension: the error that importing it raised is on the screen, and nothing else breaks."""
        code = (
            "import sys, types\n"
            "class Broken:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name == 'simctg_fast._C': raise ImportError('undefined symbol: _ZN3fooE')\n"
            "sys.meta_path.insert(0, Broken())\n"
            "from simctg_fast.cli import app; app(['env'])"
        )
        done = run_child(
            [sys.executable, "-c", code],
            env=subprocess_environment(),
        )
        assert done.returncode == 0, done.stderr
        assert re.search(r"^extension +none$", done.stdout, re.MULTILINE)
        assert re.search(r"^extension_error +ImportError: undefined symbol: _ZN3fooE$", done.stdout, re.MULTILINE)


def test_importing_the_command_line_loads_nothing_heavy() -> None:
    code = "import sys, simctg_fast.cli; print({'torch', 'transformers', 'triton', 'numpy'} & set(sys.modules))"
    done = run_child([sys.executable, "-c", code], env=subprocess_environment(), check=True)
    assert done.stdout.strip() == "set()"


def test_as_a_program_in_a_pipe() -> None:
    done = run_child(
        [sys.executable, "-m", "simctg_fast.cli", "generate", "bundled", "-n", "6"],
        input="Return the name\nGrüße\n",
        env=subprocess_environment(),
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Return the name")
    assert "\n\nGrüße" in done.stdout
    assert "\x1b" not in done.stdout
    assert done.stderr == ""
