"""What an evaluation measures, keeps and writes, against figures made again from its texts."""

from __future__ import annotations

import copy
import csv
import importlib
import json
import math
import shlex
import sys
import types
from contextlib import nullcontext

import pytest
import torch
from typer.testing import CliRunner

from simctg_fast.assets import bundled_model_path
from simctg_fast.cli import app
from simctg_fast.evaluation import writing
from simctg_fast.evaluation.about import fingerprint
from simctg_fast.evaluation.console import is_complete
from simctg_fast.evaluation.console import notes as console_notes
from simctg_fast.evaluation.evaluate import Evaluation, Options
from simctg_fast.evaluation.measure import Scorer
from simctg_fast.evaluation.output import Folder, digest
from simctg_fast.evaluation.prompts import Prompt
from simctg_fast.evaluation.run import Request, run
from simctg_fast.evaluation.settings import parse_settings
from simctg_fast.loading import load_model
from simctg_fast.metrics import diversity, mauve

from ..decoding_models import build
from ..decoding_models import tokenizer as characters

NEW = 24


@pytest.fixture(scope="module")
def loaded():
    return load_model("bundled", "cpu")


def evaluate(request):
    return run(request, nullcontext(), lambda total: nullcontext(lambda: None))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    request = Request(
        "bundled", strategies="greedy,beam:num_beams=2,contrastive,fsd", alpha_grid="0.2,0.6", k_grid="3", limit=5,
        max_new_tokens=NEW, out=str(folder / "out"),
    )  # fmt: skip
    return request, *evaluate(request)


def distinct(ids, n):
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams)


def texts_of(folder):
    records = [json.loads(line) for line in (folder / "texts.jsonl").read_text("utf-8").splitlines()]
    return [record for record in records if "token_ids" in record]


def test_figures_of_the_texts(made, loaded):
    """Each from the tokens that were kept: n-grams counted here, probabilities by a forward of one text in float64."""
    _, found, folder = made
    model, tokenizer = loaded
    rows = {row["strategy"]: row["figures"] for row in found["rows"]}
    kept = texts_of(folder)
    prompts = {p["id"]: p for p in found["texts"]}
    for name in ("greedy", "contrastive", "beam:num_beams=2"):
        mine = [record for record in kept if record["strategy"] == name]
        assert len(mine) == 5
        lengths = [len(record["token_ids"]) for record in mine]
        assert rows[name]["tokens"]["mean"] == sum(lengths) / 5
        each = [100 * math.prod(distinct(record["token_ids"], n) for n in (2, 3, 4)) for record in mine]
        assert rows[name]["diversity"]["mean"] == pytest.approx(sum(each) / 5)
        assert rows[name]["diversity"]["low"] <= rows[name]["diversity"]["mean"] <= rows[name]["diversity"]["high"]
        assert rows[name]["rep_4"]["mean"] == pytest.approx(
            sum(100 * (1 - distinct(record["token_ids"], 4)) for record in mine) / 5
        )
        sums = []
        for record in mine:
            prompt = tokenizer(prompts[record["id"]]["prompt"], add_special_tokens=False)["input_ids"]
            ids = torch.tensor([prompt + record["token_ids"]])
            with torch.no_grad():
                logits = model(ids).logits[0, len(prompt) - 1 : -1].double()
            sums.append(logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum().item())
        a_byte = [total / len(record["text"].encode()) for total, record in zip(sums, mine, strict=True)]
        assert rows[name]["log_prob_per_byte"]["mean"] == pytest.approx(sum(a_byte) / 5, rel=1e-4)
        assert rows[name]["perplexity"]["mean"] == pytest.approx(math.exp(-sum(sums) / sum(lengths)), rel=1e-4)
        assert rows[name]["tokens_per_second"]["mean"] > 0


def test_the_rows(made):
    _, found, folder = made
    assert [row["strategy"] for row in found["rows"]] == ["human", "greedy", "beam:num_beams=2", "contrastive", "fsd"]
    assert all(row["note"] == "" for row in found["rows"])
    assert "tokens_per_second" not in found["rows"][0]["figures"]
    assert found["rows"][3]["command"].startswith(f"simctg-fast run bundled {folder}/prompts.jsonl ")
    assert list(found["metrics"])[:2] == ["tokens", "diversity"]


def test_the_grid(made):
    """Each value is that of a setting run by itself."""
    request, found, _ = made
    grid = found["grid"]
    assert (grid["penalty_alpha"], grid["top_k"]) == ([0.2, 0.6], [3])
    alone = Request(
        "bundled", strategies="contrastive:penalty_alpha=0.6:top_k=3", limit=5, max_new_tokens=NEW,
        out=f"{request.out}-alone",
    )  # fmt: skip
    figures = evaluate(alone)[0]["rows"][1]["figures"]
    assert grid["diversity"][1][0] == pytest.approx(figures["diversity"]["mean"])
    assert grid["coherence"][1][0] == pytest.approx(figures["coherence"]["mean"])
    assert grid["diversity"][0][0] < grid["diversity"][1][0]
    assert grid["recommended"] in ({"penalty_alpha": 0.6, "top_k": 3}, {"penalty_alpha": 0.2, "top_k": 3})


def test_the_grid_is_told(made):
    """In words, and with all figures of each setting in the table of figures, but not among the strategies."""
    _, found, folder = made
    best = found["grid"]["recommended"]
    chosen = f"penalty_alpha {best['penalty_alpha']}, top_k {best['top_k']}"
    assert found["conclusion"][-1] == f"Of the grid begin with {chosen}: {found['grid']['reason']}."
    with (folder / "figures.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["strategy"] for row in rows[5:]] == ["grid 0.2 3", "grid 0.6 3"]
    for alpha, row in enumerate(rows[5:]):
        assert json.loads(row["settings"])["top_k"] == 3
        assert float(row["diversity"]) == pytest.approx(found["grid"]["diversity"][alpha][0], rel=1e-5)
        assert float(row["tokens_per_second"]) > 0
    assert "--penalty-alpha 0.2 --top-k 3" in found["grid"]["rows"][0]["command"]


def test_values_of_the_grid_that_are_nearly_the_same(loaded):
    """Each is a setting of its own, with figures of its own; one value is not tried twice."""
    alphas = (0.1234561, 0.1234562)
    options = Options(4, grid=(alphas, (3,)))
    found = Evaluation(*loaded, [Prompt("a", {"prompt": "This module"})], [], options).run()
    assert [row["settings"]["penalty_alpha"] for row in found["grid"]["rows"]] == list(alphas)
    assert len({row["strategy"] for row in found["grid"]["rows"]}) == 2
    assert len({row["label"] for row in found["grid"]["rows"]}) == 2
    for twice in (((0.5, 0.5), (3,)), ((0.5,), (3, 4, 3))):
        with pytest.raises(ValueError, match="grid must be values of penalty_alpha and of top_k, each once"):
            Options(grid=twice)


def test_a_setting_of_the_grid_that_fails(tmp_path):
    """It counts as what is missing, and is named in the terminal, the table and the report."""
    given = ["eval", "bundled", "-n", "4", "--limit", "2", "-s", "greedy", "-o", str(tmp_path)]
    result = CliRunner().invoke(app, [*given, "--alpha-grid", "0.2", "--k-grid", "3,9999"])
    assert result.exit_code == 1, result.output
    note = "not run: top_k must be at most the vocabulary size 3072"
    assert f"note: grid 0.2 9999: {note}" in " ".join(result.stderr.split())
    assert "Of the grid begin with penalty_alpha 0.2, top_k 3: " in result.stdout
    for file in ("figures.csv", "report.html"):
        assert note in (tmp_path / file).read_text("utf-8")
    alone = CliRunner().invoke(app, [*given, "--overwrite", "--alpha-grid", "0.2", "--k-grid", "9999"])
    assert alone.exit_code == 1, alone.output
    said = " ".join(alone.stdout.split())
    assert "No setting of the grid can be recommended: none has texts that can be measured: human texts" in said


def test_what_is_shown(made):
    _, found, folder = made
    kept = {(record["strategy"], record["id"]): record for record in texts_of(folder)}
    assert len(found["texts"]) == 5
    for text in found["texts"]:
        assert set(text["written"]) == {row["strategy"] for row in found["rows"]}
        for name in ("greedy", "fsd"):
            shown = text["written"][name]
            assert "".join(shown["pieces"]) == kept[name, text["id"]]["text"]
            assert len(shown["pieces"]) == len(shown["repeated"]) == shown["tokens"]
    for each in found["similarity"]:
        matrix = torch.tensor(each["cosines"])
        assert len(matrix) == len(each["pieces"]) > each["prompt_tokens"] == 32
        assert torch.equal(matrix, matrix.T)
        assert (matrix.diagonal() - 1).abs().max() < 1e-3
        count = len(matrix)
        mean = (matrix.double().sum() - count) / (count * (count - 1))
        assert each["isotropy"] == pytest.approx(1 - mean.item(), abs=1e-3)
    assert len(found["isotropy"]["layers"]) == 8


def test_the_files(made):
    _, found, folder = made
    assert sorted(path.name for path in folder.iterdir()) == [
        "evaluation.json", "figures.csv", "prompts.jsonl", "report.html", "texts.jsonl",
    ]  # fmt: skip
    assert json.loads((folder / "evaluation.json").read_text("utf-8")) == json.loads(json.dumps(found))
    with (folder / "figures.csv").open(encoding="utf-8", newline="") as file:
        rows = {row["strategy"]: row for row in csv.DictReader(file)}
    greedy = found["rows"][1]["figures"]
    assert float(rows["greedy"]["diversity"]) == pytest.approx(greedy["diversity"]["mean"], rel=1e-5)
    assert float(rows["greedy"]["diversity_high"]) == pytest.approx(greedy["diversity"]["high"], rel=1e-5)
    assert rows["human"]["tokens_per_second"] == ""
    page = (folder / "report.html").read_text("utf-8")
    assert f"{greedy['diversity']['mean']:.1f}" in page


class Stop(Exception):
    pass


def test_an_interrupted_run_goes_on(loaded, tmp_path, monkeypatch):
    """Settings that were through are not written again; the rest, and all figures, are those of a run in one go."""

    def request(out):
        return Request("bundled", strategies="nucleus,greedy,fsd", limit=3, max_new_tokens=8, out=str(tmp_path / out))

    whole = evaluate(request("whole"))[0]
    calls = []
    original = writing.Writer.__call__

    def once(self, prompts, on_text):
        calls.append(self.setting.name)
        if len(calls) == 2:
            raise Stop
        return original(self, prompts, on_text)

    monkeypatch.setattr(writing.Writer, "__call__", once)
    with pytest.raises(Stop):
        evaluate(request("parts"))
    texts = tmp_path / "parts" / "texts.jsonl"
    torn = texts.read_text("utf-8") + '{"strategy": "greedy", "id": "docu'
    texts.write_text(torn, "utf-8")
    found = evaluate(request("parts"))[0]
    assert calls == ["nucleus", "greedy", "greedy", "fsd"]
    for before, after in zip(whole["rows"], found["rows"], strict=True):
        for figures in (before["figures"], after["figures"]):
            figures.pop("tokens_per_second", None)
        assert after["command"] == before["command"].replace("/whole/", "/parts/")
        assert before == after | {"command": before["command"]}
    lines = [json.loads(line) for line in texts.read_text("utf-8").splitlines()]
    assert sum("complete" in line for line in lines) == 3


def test_another_evaluations_folder(tmp_path):
    first = Request("bundled", strategies="greedy", limit=2, max_new_tokens=4, out=str(tmp_path))
    evaluate(first)
    other = Request("bundled", strategies="greedy", limit=2, max_new_tokens=5, out=str(tmp_path))
    with pytest.raises(ValueError, match=r"texts.jsonl' holds texts of another evaluation"):
        evaluate(other)
    evaluate(Request(**{**vars(other), "overwrite": True}))
    assert all(len(record["token_ids"]) <= 5 for record in texts_of(tmp_path))
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="must be a folder, or not there yet, and is a file"):
        Folder(tmp_path / "file")


TWO = [writing.Tokenized(Prompt(name, {"prompt": "x"}), [7], None) for name in ("a", 2)]
GREEDY = parse_settings("greedy")[0]


def begun(path, **options):
    folder = Folder(path, **options)
    return folder, folder.begin("run", TWO, 100)


@pytest.mark.parametrize("name", ["texts.jsonl", "report.html", "evaluation.json", "figures.csv", "prompts.jsonl"])
def test_files_of_others_are_left_alone(name, tmp_path):
    """By the names that an evaluation writes, and as they may be: of one's own, or a line of texts."""
    where = "texts.jsonl', line 1: is not what an" if name == "texts.jsonl" else f"{name}' is there, but no texts of an"
    for content in ("# my own\n", '{"text": "mine"}\n', "[]\n", "\xff\n", "null\nmore\n", "[" * 9999):
        (tmp_path / name).write_text(content, "latin-1")
        with pytest.raises(ValueError, match=rf"{where} evaluation.*--overwrite"):
            begun(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [name]
        assert (tmp_path / name).read_text("latin-1") == content
    (tmp_path / "texts.jsonl").write_text("")
    if name != "texts.jsonl":
        with pytest.raises(ValueError, match="is there, but"):
            begun(tmp_path)
    assert begun(tmp_path, overwrite=True)[1] == {}
    assert begun(tmp_path)[1] == {}, "now it is an evaluation's"


@pytest.mark.parametrize("name", ["prompts.jsonl", "texts.jsonl"])
def test_files_that_are_read_are_not_written_over(name, tmp_path):
    """Not even where the rest of the folder may be."""
    file = tmp_path / name
    file.write_text('{"id": "a", "prompt": "x"}\n', "utf-8")
    (tmp_path / "r.jsonl").symlink_to(file)
    for read in ({"prompts": str(file)}, {"prompts": str(tmp_path / "r.jsonl")}):
        with pytest.raises(ValueError, match=f"prompts is '{read['prompts']}', which would be written over"):
            evaluate(Request("bundled", **read, out=str(tmp_path), overwrite=True))
    with pytest.raises(ValueError, match=r"references is .*, which would be written over"):
        Folder(tmp_path).spare(prompts="-", references=str(file))
    assert file.read_text("utf-8") == '{"id": "a", "prompt": "x"}\n'


def same_texts(folder, monkeypatch):
    """Of each command that the evaluation gives to copy, run as it stands: whether it writes the evaluation's texts."""
    monkeypatch.chdir(folder.parent)
    found = json.loads((folder / "evaluation.json").read_text("utf-8"))
    kept = texts_of(folder)
    same = {}
    for row in [*found["rows"], *(found["grid"] or {"rows": []})["rows"]]:
        if row["command"]:
            program, *words = shlex.split(row["command"])
            assert program == "simctg-fast"
            result = CliRunner().invoke(app, words)
            assert result.exit_code == 0, result.output
            out = folder.parent / words[words.index("-o") + 1]
            records = {r["id"]: r["token_ids"] for r in map(json.loads, out.read_text("utf-8").splitlines())}
            mine = {each["id"]: each["token_ids"] for each in kept if each["strategy"] == row["strategy"]}
            same[row["strategy"]] = records == mine
    return same


@pytest.mark.parametrize(
    "options", [(), ("--dtype", "bfloat16", "--device", "cpu", "--seed", "3")], ids=["default", "as asked"]
)
def test_commands_to_copy(options, tmp_path, monkeypatch):
    """They run on the prompts that were evaluated, which have references, ids of both kinds and a name of their own."""
    lines = [
        {"id": "a", "prompt": "This module provides", "reference": " a way"},
        {"id": 7, "prompt": "If the name"},
        {"id": "far too long", "prompt": "word " * 600},
    ]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    given = ["eval", "bundled", "--prompts", str(tmp_path / "mine.jsonl"), "-n", "8", "-o", str(tmp_path / "out")]
    strategies = ["-s", "nucleus,guard" if options else "nucleus,guard,beam,centered"]
    result = CliRunner().invoke(app, [*given, *options, *strategies, "--alpha-grid", "0.3", "--k-grid", "3"])
    assert result.exit_code == 1, "one prompt is too long"
    assert "prompts.jsonl" in result.stdout
    same = same_texts(tmp_path / "out", monkeypatch)
    assert all(same.values()), same
    assert len(same) == (3 if options else 4), "all but beam search, and the grid's"


def test_commands_to_copy_without_a_file_of_prompts(tmp_path, monkeypatch):
    evaluate(Request("bundled", strategies="nucleus,fsd", limit=2, max_new_tokens=8, out=str(tmp_path / "out")))
    assert same_texts(tmp_path / "out", monkeypatch) == {"nucleus": True, "fsd": True}


def test_the_command_leaves_files_of_others_alone(tmp_path):
    (tmp_path / "texts.jsonl").write_text("# my own\n")
    given = ["eval", "bundled", "-n", "4", "--limit", "2", "-s", "greedy", "-o", str(tmp_path)]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2
    assert "line 1: is not what an evaluation writes" in " ".join(result.stderr.split())
    assert (tmp_path / "texts.jsonl").read_text() == "# my own\n"


@pytest.mark.parametrize(
    ("number", "changes", "message"),
    [
        (4, {"seconds": ...}, "line 4: is not what"),
        (4, {"seconds": "1"}, "line 4: is not what"),
        (4, {"seconds": -1}, "line 4: is not what"),
        (4, {"seconds": math.inf}, "line 4: is not what"),
        (4, {"strategy": ...}, "line 4: is not what"),
        (2, {"id": ["x"]}, "line 2: is not what"),
        (2, {"id": None}, "line 2: is not what"),
        (2, {"token_ids": ...}, "line 2: is not what"),
        (2, {"token_ids": "x"}, "line 2: is not what"),
        (2, {"token_ids": [1, "x"]}, "line 2: is not what"),
        (2, {"token_ids": [99, 100]}, "line 2: is not what"),
        (3, {"error": 3}, "line 3: is not what"),
        (3, {"id": "another"}, "line 4: is not behind all texts"),
        (3, None, "line 3: is not behind all texts"),
        (2, b"\xff\xfe", "line 2: is not what"),
        (2, b"{", "line 2: is not what"),
        (1, {"run": ["x"]}, "line 1: is not what"),
    ],
)
def test_a_damaged_file_of_texts(number, changes, message, tmp_path):
    """It is named with the line, and left as it is."""
    folder, _ = begun(tmp_path)
    folder.add(GREEDY, TWO, writing.Written([[5, 6], None], {1: "failed"}, 0.5), ["text", None])
    file = tmp_path / "texts.jsonl"
    lines = file.read_bytes().splitlines()
    if changes is None:
        del lines[number - 1]
    elif isinstance(changes, bytes):
        lines[number - 1] = changes
    else:
        record = {key: value for key, value in (json.loads(lines[number - 1]) | changes).items() if value is not ...}
        lines[number - 1] = json.dumps(record).encode()
    content = b"\n".join([*lines, b"{"])  # and half a line, as where a run was killed
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"texts.jsonl', {message}.*--overwrite"):
        begun(tmp_path)
    assert file.read_bytes() == content


def test_a_folder_keeps_what_was_written(tmp_path):
    """Errors, and times that are short, too."""
    written = writing.Written([[5, 6], None], {1: "failed"}, 0.0004)
    begun(tmp_path)[0].add(GREEDY, TWO, written, ["text", None])
    assert begun(tmp_path)[1] == {"greedy": written}


@pytest.mark.parametrize("seconds", [0.0, 0.0004])
def test_texts_that_took_no_time(seconds, loaded):
    """As a clock may say."""
    kept = {"greedy": writing.Written([[5, 6, 7]], {}, seconds)}
    prompts = [Prompt("a", {"prompt": "This module"})]
    figures = Evaluation(*loaded, prompts, [GREEDY], Options(4), kept=kept).run()["rows"][0]["figures"]
    assert figures.get("tokens_per_second", {}).get("mean") == (3 / seconds if seconds else None)


def test_digests():
    def of(*changes):
        prompt = writing.Tokenized(Prompt("a", {"prompt": "x"}), [1, 2], None)
        given = ["m", "f", [prompt], 8, 0, 16]
        for place, value in changes:
            given[place] = value
        return digest(*given)

    other = writing.Tokenized(Prompt("a", {"prompt": "x"}), [1, 3], None)
    assert of() == of()
    changed = [(0, "n"), (1, "g"), (2, [other]), (2, []), (3, 9), (4, 1), (5, 8)]
    assert len({of(), *map(of, changed)}) == 8


def test_fingerprints():
    """The same of the same model, another for anything that may change what it writes."""

    def of(change=lambda model: None, **options):
        model = build("t5", **options)
        change(model)
        return fingerprint(model)

    def one_weight(model):
        with torch.no_grad():
            model.lm_head.weight[3, 5] += 1e-6

    changes = [
        one_weight,
        lambda model: model.to(torch.bfloat16),
        lambda model: model.lm_head.to(torch.bfloat16),
        lambda model: setattr(model.config, "relative_attention_max_distance", 64),
        lambda model: setattr(model.generation_config, "repetition_penalty", 1.5),
    ]
    assert of() == of()
    assert len({of(), of(seed=1), *map(of, changes)}) == 7


@pytest.mark.parametrize("other", ["dtype", "weights", "slots"])
def test_texts_of_two_models_in_one_folder(other, tmp_path):
    """Of one name, and with what was written by the first."""
    for part in (build("gpt2"), characters()):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "p.txt").write_text("two\n", "utf-8")
    given = {
        "model": str(tmp_path / "model"), "prompts": str(tmp_path / "p.txt"), "strategies": "greedy",
        "max_new_tokens": 4, "out": str(tmp_path / "out"),
    }  # fmt: skip
    evaluate(Request(**given))
    kept = (tmp_path / "out" / "texts.jsonl").read_bytes()
    evaluate(Request(**given))
    if other == "weights":
        build("gpt2", seed=1).save_pretrained(tmp_path / "model")
    given |= {"dtype": {"dtype": "bfloat16"}, "slots": {"slots": 2}, "weights": {}}[other]
    with pytest.raises(ValueError, match=r"holds texts of another evaluation .*weights, dtype"):
        evaluate(Request(**given))
    assert (tmp_path / "out" / "texts.jsonl").read_bytes() == kept


def test_what_cannot_be_done_is_said(loaded):
    """A prompt that is too long, a strategy that the model refuses, an empty text: none ends the evaluation."""
    model, tokenizer = loaded
    prompts = [Prompt("long", {"prompt": "word " * 600}), Prompt("ok", {"prompt": "This module provides"})]
    settings = parse_settings("contrastive:top_k=6,contrastive:top_k=3073,greedy")
    found = Evaluation(model, tokenizer, prompts, settings, Options(6)).run()
    assert [each["id"] for each in found["refused"]] == ["long"]
    assert "more than the model's 512" in found["refused"][0]["message"]
    notes = {row["strategy"]: row["note"] for row in found["rows"]}
    assert notes["contrastive:top_k=6"] == notes["greedy"] == ""
    assert notes["contrastive:top_k=3073"].startswith("not run: top_k must be at most the vocabulary size 3072")
    assert [row["missing"] for row in found["rows"]] == [0, 1, 0]
    assert not is_complete(found)
    assert len(console_notes(found)) == 2
    assert found["prompts"] == 1
    assert found["recommended"]["strategy"] is None, "nobody knows how people go on"
    with pytest.raises(ValueError, match="none of the 1 prompts can be continued; 'long': "):
        Evaluation(model, tokenizer, prompts[:1], settings, Options(6))


class Characters:
    """Not the writer's tokens: as many as a text has characters."""

    def __call__(self, text, **options):
        return {"input_ids": [3 + ord(character) % 64 for character in text]}


def test_texts_that_the_scorer_cannot_take(tmp_path):
    """They have no probability, and are named with the scorer; the others are scored as without them."""
    lines = [
        {"id": "short", "prompt": "two", "reference": " and"},
        {"id": "long", "prompt": "two " * 9, "reference": "."},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    for part in (build("gpt2", n_positions=24), characters()):
        part.save_pretrained(tmp_path / "scorer")
    given = ["eval", "bundled", "--prompts", str(tmp_path / "p.jsonl"), "-n", "4", "-s", "greedy"]
    scored = ["--scorer", str(tmp_path / "scorer")]
    result = CliRunner().invoke(app, [*given, *scored, "-o", str(tmp_path / "both")])
    assert result.exit_code == 1, result.output
    said = " ".join(result.stderr.split())
    for name, size in (("human", 37), ("greedy", None)):
        note = f"note: {name}: 1 of 2 texts have no log-probability by {tmp_path}/scorer; long: it has {size or ''}"
        assert note in said
    assert "rows[" not in said
    alone = CliRunner().invoke(app, [*given, *scored, "--limit", "1", "-o", str(tmp_path / "one")])
    assert alone.exit_code == 0, alone.output
    both, one = (json.loads((tmp_path / out / "evaluation.json").read_text("utf-8")) for out in ("both", "one"))
    for mine, theirs in zip(both["rows"], one["rows"], strict=True):
        for metric in ("log_prob_per_byte", "coherence", "perplexity"):
            assert mine["figures"][metric]["mean"] == pytest.approx(theirs["figures"][metric]["mean"], rel=1e-5)
        assert (mine["missing"], theirs["missing"]) == (1, 0)
    assert both["rows"][1]["figures"]["tokens"]["mean"] == 4, "of both texts"


@pytest.mark.parametrize("weights", ["nan", "impossible"])
def test_a_scorer_without_finite_probabilities(weights, loaded):
    scorer = build("gpt2")
    with torch.no_grad():
        if weights == "nan":
            scorer.lm_head.weight.fill_(math.nan)
        else:
            scorer.lm_head.bias = torch.nn.Parameter(torch.full((98,), -math.inf))
            scorer.lm_head.bias[3] = 0.0
    prompts = [Prompt(name, {"prompt": "This module"}, " is a way to read the names of files") for name in "abc"]
    scorer = Scorer(scorer, Characters(), "theirs")
    found = Evaluation(*loaded, prompts, parse_settings("greedy"), Options(4), scorer=scorer).run()
    message = {"nan": "it must have a probability, but", "impossible": "it has a token of probability 0"}[weights]
    for row in found["rows"]:
        assert row["note"].startswith(f"3 of 3 texts have no log-probability by theirs; a: {message}")
        assert row["missing"] == 3
        assert not row["figures"].keys() & {"log_prob_per_byte", "coherence", "perplexity"}
    assert found["recommended"] == {"strategy": None, "reason": "human continuations have no log-probability"}
    assert json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("reference", [" yes", None])
def test_why_nothing_is_recommended(reference, loaded):
    """People's row is there, but of texts too short for a diversity; or there are no people."""
    settings = parse_settings("greedy")
    prompts = [Prompt("a", {"prompt": "This module"}, reference)]
    found = Evaluation(*loaded, prompts, settings, Options(4, grid=((0.5,), (3,)))).run()
    assert [row["strategy"] for row in found["rows"]] == (["human", "greedy"] if reference else ["greedy"])
    reason = {
        " yes": "human continuations have no diversity: they are all shorter than 4 tokens",
        None: "without human continuations there is no measure of it",
    }[reference]
    assert found["recommended"] == {"strategy": None, "reason": reason}
    assert found["grid"]["reason"] == reason
    assert (f"No strategy can be recommended: {reason}." in found["conclusion"]) == (reference is not None)
    assert f"No setting of the grid can be recommended: {reason}." in found["conclusion"]


def test_a_model_whose_own_probabilities_are_not_finite(tmp_path):
    model = build("gpt2")
    with torch.no_grad():
        model.transformer.wte.weight.fill_(math.nan)
    for part in (model, characters()):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "two", "reference": " three"}) + "\n", "utf-8")
    found, _ = evaluate(
        Request(str(tmp_path / "model"), str(tmp_path / "p.jsonl"), strategies="greedy", max_new_tokens=4,
                out=str(tmp_path / "out"))
    )  # fmt: skip
    assert found["rows"][0]["note"].startswith("1 of 1 texts have no log-probability by the model itself; line-1: it ")
    assert not is_complete(found)


def test_an_empty_text_has_no_diversity(loaded):
    model, tokenizer = loaded
    evaluation = Evaluation(model, tokenizer, [Prompt("a", {"prompt": "x"}), Prompt("b", {"prompt": "y"})], [])
    figures, unscored = evaluation._measure("greedy", [[], [5, 6, 7, 8, 9]])
    assert unscored == {}
    assert figures["tokens"]["mean"] == 2.5
    assert figures["diversity"] == {"mean": 100.0, "low": None, "high": None}, "of the one text that has some"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"limit": 0}, "limit must be an integer of at least 1, got 0"),
        ({"references": "r.txt"}, "references is 'r.txt', but no file of prompts is given"),
        ({"alpha_grid": "0.5"}, "alpha_grid is '0.5', but k_grid is not given"),
        ({"k_grid": "4"}, "k_grid is '4', but alpha_grid is not given"),
    ],
)
def test_requests_that_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Request("bundled", **given)


@pytest.mark.parametrize(
    ("alphas", "ks", "message"),
    [
        ("0.5,2", "4", r"alpha_grid must be numbers in \[0, 1\], separated by commas, each once, got '2' in '0.5,2'"),
        ("0.5,,0.6", "4", "alpha_grid must be .* got ''"),
        ("0.5,0.50", "4", "alpha_grid must be .* each once, got '0.50'"),
        ("0.5", "4,5,04", "k_grid must be .* each once, got '04'"),
        ("0.5,0.5", "4", "alpha_grid must be .* each once, got '0.5'"),
        ("nan", "4", "alpha_grid must be"),
        ("0.5", "4,0", "k_grid must be integers of at least 1, .* got '0'"),
        ("0.5", "4.5", "k_grid must be integers"),
    ],
)
def test_grids_that_are_refused(alphas, ks, message):
    with pytest.raises(ValueError, match=message):
        _ = Request("bundled", alpha_grid=alphas, k_grid=ks).grid


TEMPLATE = "{% for m in messages %}<bos>{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"


@pytest.mark.parametrize(
    ("name", "lines", "read"),
    [
        ("t5", [{"source": "one two three"}, {"prompt": "two"}], 1),  # the decoder's start
        ("bart", [{"source": "one two three"}, {"prompt": "two"}], 1),
        ("gpt2", [{"messages": [{"role": "user", "content": "hi"}]}, {"prompt": "two"}], 4),
        ("t5", [{"messages": [{"role": "user", "content": "hi"}]}, {"source": "two"}], 1),
    ],
)
def test_what_a_continuation_is_a_text_of_its_own_behind(name, lines, read, tmp_path):
    """Sources and chats, whose answers do not go on with the prompt's text, from the file to the report."""
    tokenizer = copy.deepcopy(characters())
    tokenizer.chat_template = TEMPLATE
    for part in (build(name), tokenizer):
        part.save_pretrained(tmp_path / "model")
    lines = [line | {"reference": "three two"} for line in lines]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    request = Request(
        str(tmp_path / "model"), str(tmp_path / "p.jsonl"), strategies="greedy,beam:num_beams=2,contrastive",
        max_new_tokens=6, out=str(tmp_path / "out"),
    )  # fmt: skip
    found, folder = evaluate(request)
    assert [row["note"] for row in found["rows"]] == [""] * 4
    assert found["rows"][0]["figures"]["coherence"]["mean"] < 0
    kept = {(record["strategy"], record["id"]): record for record in texts_of(folder)}
    for each in found["similarity"]:
        assert each["prompt_tokens"] == read
        written = each["pieces"][read:]
        if each["strategy"] == "human":
            assert "".join(written) == "three two"[:6]
        else:
            assert "".join(written) == kept[each["strategy"], "line-1"]["text"]
        assert len(each["cosines"]) == len(each["pieces"])
    if name == "gpt2":
        assert found["similarity"][0]["pieces"][:read] == ["", "h", "i", ":"], "a special token has no text"
    assert [len(text["written"]) for text in found["texts"]] == [4, 4]
    assert json.loads((folder / "evaluation.json").read_text("utf-8")) == json.loads(json.dumps(found))
    page = (folder / "report.html").read_text("utf-8")
    assert page.count('<figure class="map"') == len(found["similarity"]) == 4
    with (folder / "figures.csv").open(encoding="utf-8", newline="") as file:
        assert [row["strategy"] for row in csv.DictReader(file)] == [row["strategy"] for row in found["rows"]]


def test_the_command(tmp_path):
    prompts = tmp_path / "p.jsonl"
    lines = [{"prompt": f"This module provides {word}", "reference": " for it, and more"} for word in ("a", "some")]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    out = tmp_path / "o"
    given = ["eval", "bundled", "--prompts", str(prompts), "-s", "greedy,contrastive", "-n", "8", "-o", str(out)]
    result = CliRunner().invoke(app, [*given, "--paper-compatible"])
    assert result.exit_code == 0, result.output
    for word in ("human", "greedy", "contrastive", "diversity", "log p a byte", "tokens/s"):
        assert word in result.stdout
    assert "report.html" in result.stdout
    found = json.loads((out / "evaluation.json").read_text("utf-8"))
    written = [record["text"] for record in texts_of(out) if record["strategy"] == "greedy"]
    published = found["rows"][1]["figures"]["published_diversity"]
    assert published == {"mean": diversity(written, paper_compatible=True), "low": None, "high": None}
    refused = CliRunner().invoke(app, [*given, "--limit", "0"])
    assert refused.exit_code == 2


def test_metrics_that_cannot_be_had_are_refused_before_anything_is_written(loaded, tmp_path):
    prompts = [Prompt("a", {"prompt": "x"})]
    with pytest.raises(ValueError, match="embedder"):
        Evaluation(*loaded, prompts, parse_settings("greedy"), Options(embedder=str(tmp_path / "nowhere")))
    with pytest.raises((ValueError, ImportError), match=r"mauve|model"):
        Evaluation(*loaded, prompts, parse_settings("greedy"), Options(mauve=str(tmp_path / "nowhere")))


def test_an_embedder(loaded):
    """Prompts and continuations in one space: here by the length of the text."""
    found = Evaluation(
        *loaded, [Prompt("a", {"prompt": "This module"}, "provides it")], parse_settings("greedy"),
        Options(4, embedder=lambda texts: [[len(text), 1.0] for text in texts]),
    ).run()  # fmt: skip
    prompt, reference = torch.tensor([len("This module"), 1.0]), torch.tensor([len("provides it"), 1.0])
    human = found["rows"][0]["figures"]["embedding_coherence"]["mean"]
    assert human == pytest.approx(torch.cosine_similarity(prompt, reference, 0).item(), abs=1e-3)


def test_models_of_metrics_are_loaded_once(loaded, monkeypatch):
    """The embedder's folder, and MAUVE's, which makes features of people's texts once; each strategy is compared with
    those."""
    asked = []
    module = types.ModuleType("mauve")
    module.compute_mauve = lambda **given: asked.append(given) or types.SimpleNamespace(mauve=0.5)
    monkeypatch.setitem(sys.modules, "mauve", module)
    loads = []
    for name in ("embeddings", "mauve_score"):
        place = importlib.import_module(f"simctg_fast.metrics.models.{name}")
        load = place.folder_model
        monkeypatch.setattr(place, "folder_model", lambda path, what, load=load: loads.append(what) or load(path, what))
    folder = str(bundled_model_path())
    prompts = [Prompt("a", {"prompt": "This module"}, " provides it"), Prompt("b", {"prompt": "The file"}, " is one")]
    evaluation = Evaluation(*loaded, prompts, parse_settings("greedy,fsd"), Options(4, embedder=folder, mauve=folder))
    found = evaluation.run()
    assert sorted(loads) == ["embedder", "model"]
    assert "mauve" not in found["rows"][0]["figures"]
    for row, given in zip(found["rows"][1:], asked[1:], strict=True):  # the first call tries it
        assert row["figures"]["mauve"]["mean"] == 0.5
        written = zip(evaluation.prompts, evaluation.texts[row["strategy"]], strict=True)
        texts = [evaluation.continuation(*each) for each in written]
        mauve([" provides it", " is one"], texts, folder, max_length=4)
        for features in ("p_features", "q_features"):
            assert (given[features] == asked[-1][features]).all()


def test_states_that_are_not_finite_cost_the_pictures_alone(loaded, monkeypatch):
    model, tokenizer = loaded
    monkeypatch.setattr(model, "forward", model.forward)  # put back
    forward = model.forward

    def overflowing(*args, output_hidden_states=False, **kwargs):
        out = forward(*args, output_hidden_states=output_hidden_states, **kwargs)
        if output_hidden_states:
            out.hidden_states[-1].fill_(math.inf)
        return out

    monkeypatch.setattr(model, "forward", overflowing)
    settings = parse_settings("beam:num_beams=2")
    found = Evaluation(model, tokenizer, [Prompt("a", {"prompt": "This module"})], settings, Options(4)).run()
    assert found["similarity"] == []
    assert found["isotropy"] is None
    assert json.dumps(found, allow_nan=False)


def test_the_published_setting_in_little(tmp_path):
    """Prefixes, references, a scoring model and the papers' diversity, all from local folders."""
    folder = str(bundled_model_path())
    lines = [
        {"prompt": "This module provides", "reference": " a class."},
        {"prompt": "Return the", "reference": " name."},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    given = ["eval", folder, "--prompts", str(tmp_path / "p.jsonl"), "-n", "12", "-s", "greedy,contrastive"]
    scored = ["--scorer", folder, "--paper-compatible", "-o", str(tmp_path / "scored")]
    for arguments in ([*given, "-o", str(tmp_path / "own")], [*given, *scored]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
    own, other = (json.loads((tmp_path / out / "evaluation.json").read_text("utf-8")) for out in ("own", "scored"))
    assert other["scorer"] == folder
    for mine, theirs in zip(own["rows"], other["rows"], strict=True):
        # The same model over the texts, whose tokens are made anew: of people's they are the same.
        expected = mine["figures"]["log_prob_per_byte"]["mean"]
        tolerance = 1e-4 if mine["strategy"] == "human" else 0.2
        assert theirs["figures"]["log_prob_per_byte"]["mean"] == pytest.approx(expected, rel=tolerance)
        assert 0 <= theirs["figures"]["published_diversity"]["mean"] <= 100
