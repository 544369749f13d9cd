"""DRY in the engine: what its lines set, and that it is the processor of `generate`."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict

import pytest
import torch
from transformers import LogitsProcessor

from simctg_fast import ContrastiveSearch, DRYLogitsProcessor, Engine
from simctg_fast.engine.job import manifest
from simctg_fast.engine.job.job import JobOptions
from simctg_fast.engine.parameters import Parameters, check
from simctg_fast.engine.requests import parse_request
from simctg_fast.text.explain import explained

from ..decoding_models import PAD, build, prompt, shared, tokenizer
from ..engine_jobs import JobServer, read_records, save_model, write_lines

NEW = 24
STRONG = {"dry_multiplier": 3.0, "dry_base": 2.0, "dry_allowed_length": 1, "dry_sequence_breakers": ["a", "xy"]}
LINES = [  # of one run: on and off, and each setting of its own
    STRONG,
    {},
    STRONG | {"dry_sequence_breakers": [40, "bc"], "dry_penalty_range": 20},
    STRONG | {"dry_multiplier": 0},
    STRONG | {"dry_allowed_length": 2, "dry_base": 1, "dry_sequence_breakers": []},
]


def alone(model, ids, settings, **options) -> list[int]:
    """What `generate` writes behind ``ids`` with the processor of these settings."""
    given = {name.removeprefix("dry_"): value for name, value in settings.items()}
    processors = [DRYLogitsProcessor(tokenizer=tokenizer(), **given)] if given.get("multiplier") else []
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW,
        pad_token_id=PAD,
        logits_processor=processors,
        **options,
    )
    return out[0, -NEW:].tolist()


@pytest.mark.parametrize("batching", ["slots", "static"])
@pytest.mark.parametrize("strategy", ["contrastive", "greedy"])
def test_lines_with_settings_of_their_own(strategy, batching):
    """Rows side by side, each with its own settings, one after another in two slots."""
    model = build("gpt2", std=0.2)
    rows = [prompt(1, 9, seed) for seed in range(len(LINES))]
    options = {"custom_generate": ContrastiveSearch(0.1, 4)} if strategy == "contrastive" else {"do_sample": False}
    expected = [alone(model, ids, line, **options) for ids, line in zip(rows, LINES, strict=True)]
    settings = {"penalty_alpha": 0.1} if strategy == "contrastive" else {}
    engine = Engine(model, tokenizer(), slots=2, strategy=strategy, batching=batching, max_new_tokens=NEW, **settings)
    requests = [{"prompt": ids[0].tolist(), **line} for ids, line in zip(rows, LINES, strict=True)]
    found = [result.token_ids for result in engine.generate(requests, ordered=True)]
    assert found == expected
    plain = [alone(model, ids, {}, **options) for ids in rows]
    assert [a == b for a, b in zip(found, plain, strict=True)][:4] == [False, True, False, True]


@pytest.mark.parametrize("strategy", ["sample", "stochastic-contrastive"])
def test_random_strategies(strategy):
    """A price no token pays: after `a b` comes no `c` a second time."""
    model = shared("gpt2")
    settings = {"dry_multiplier": 1e6, "dry_base": 1, "dry_allowed_length": 1, "dry_sequence_breakers": []}
    engine = Engine(model, tokenizer(), slots=3, strategy=strategy, max_new_tokens=90, seed=1, **settings)
    (result,) = engine.generate({"prompt": prompt(1, 9)[0].tolist(), "n": 3})
    for choice in result.all_choices:
        tokens = prompt(1, 9)[0].tolist() + choice.token_ids
        pairs = list(itertools.pairwise(tokens))
        assert len(set(pairs)) == len(pairs)


def test_an_encoder_decoder():
    model = build("t5", std=0.2)
    source = prompt(1, 9)
    engine = Engine(model, tokenizer(), slots=2, max_new_tokens=NEW, **STRONG)
    (result,) = engine.generate({"source": tokenizer().decode(source[0])})
    expected = alone(model, source, STRONG, custom_generate=ContrastiveSearch(0.6, 4))
    assert result.token_ids == expected


def test_it_comes_before_the_processors_of_the_user():
    seen = []

    class Look(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(scores.clone())
            return scores

    settings = {"dry_multiplier": 1e6, "dry_base": 1, "dry_allowed_length": 1, "dry_sequence_breakers": []}
    engine = Engine(
        shared("gpt2"),
        tokenizer(),
        slots=1,
        max_new_tokens=1,
        processor=lambda *_: Look(),
        strategy="greedy",
        **settings,
    )
    next(iter(engine.generate({"prompt": [5, 6, 5]})))
    assert (seen[0][0] < -1e5).nonzero().flatten().tolist() == [6]


def test_breakers_are_resolved_once(monkeypatch):
    from simctg_fast.decoding import dry

    made = []
    resolve = dry.Breakers
    monkeypatch.setattr(dry, "Breakers", lambda *given: made.append(given) or resolve(*given))
    engine = Engine(shared("gpt2"), tokenizer(), slots=2, max_new_tokens=2, strategy="greedy", dry_multiplier=0.8)
    lines = [{"prompt": [5, 6]}, {"prompt": [7, 6]}, {"prompt": [5, 6], "dry_sequence_breakers": ["b"]}]
    assert all(result.error is None for result in engine.generate(lines))
    assert len(made) == 2


def test_lines():
    defaults = Parameters()
    line = {"id": "a", "prompt": "x", **STRONG, "dry_penalty_range": 0}
    got = parse_request(line, defaults, "greedy").parameters
    assert (got.dry_multiplier, got.dry_sequence_breakers, got.dry_penalty_range) == (3.0, ("a", "xy"), 0)
    body = {"prompt": "x", "dry_multiplier": 0.5, "dry_sequence_breakers": None}
    got = parse_request({"custom_id": "a", "body": body}, defaults, "contrastive").parameters
    assert (got.dry_multiplier, got.dry_sequence_breakers) == (0.5, ("\n", ":", '"', "*"))
    assert check("dry_sequence_breakers", "\n") == ("\n",)
    assert check("dry_sequence_breakers", 7) == (7,)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("dry_multiplier", -1, "0 (off) or a number from 1e-30 to 1e30"),
        ("dry_base", 0.5, "a finite number of at least 1"),
        ("dry_allowed_length", 0, "an integer from 1 to"),
        ("dry_penalty_range", -2, "an integer of at least 1, or 0 or -1 for the whole text"),
        ("dry_sequence_breakers", [""], "a list of token ids and texts of 1 to 63 bytes"),
        ("dry_sequence_breakers", ["x" * 64], "a list of token ids and texts of 1 to 63 bytes"),
        ("dry_sequence_breakers", [True], "a list of token ids and texts of 1 to 63 bytes"),
    ],
)
def test_settings_that_mean_nothing(name, value, allowed):
    engine = Engine(shared("gpt2"), tokenizer(), slots=1, max_new_tokens=2)
    (result,) = engine.generate({"prompt": "x", name: value})
    assert result.error["type"] == "invalid_value"
    assert f"{name} must be {allowed}" in result.error["message"]
    with pytest.raises(ValueError, match=f"{name} must be"):
        Engine(shared("gpt2"), tokenizer(), **{name: value})


def test_a_breaker_that_the_model_does_not_know():
    engine = Engine(shared("gpt2"), tokenizer(), slots=1, max_new_tokens=2, dry_multiplier=1)
    (result,) = engine.generate({"prompt": "x", "dry_sequence_breakers": [5, 98]})
    assert result.error["type"] == "token_out_of_range"
    assert "dry_sequence_breakers has token 98, the model knows 0 … 97" in result.error["message"]


def test_runs_that_began_before_it_go_on(tmp_path):
    """Their manifests do not name it: it was off."""
    later = {name: value for name, value in manifest._LATER.items() if name.startswith("dry_")}
    names = [name for name in asdict(Parameters()) if name.startswith("dry_")]
    defaults = {name: getattr(Parameters(), name) for name in names}
    assert later == defaults | {"dry_sequence_breakers": list(defaults["dry_sequence_breakers"])}
    folder = save_model(tmp_path / "model", n_layer=1)
    options = JobOptions(input="in", output="out", model=str(folder), device="cpu")
    old = {name: value for name, value in options.config().items() if not name.startswith("dry_")}
    manifest.write_manifest(tmp_path / "out", old, {"simctg_fast": "0"})
    manifest.check_manifest(tmp_path / "out", options.config())
    on = JobOptions(input="in", output="out", model=str(folder), device="cpu", parameters={"dry_multiplier": 0.8})
    with pytest.raises(manifest.ManifestError, match=r"dry_multiplier: 0.0 then, 0.8 now"):
        manifest.check_manifest(tmp_path / "out", on.config())


@pytest.mark.full
def test_on_the_command_line(tmp_path):
    folder = save_model(tmp_path / "model", n_layer=1)
    (tmp_path / "jobs").mkdir()
    server = JobServer(tmp_path / "jobs", folder)
    try:
        source = write_lines(tmp_path / "in.jsonl", [{"id": 0, "prompt": "abcab"}])
        out = tmp_path / "out.jsonl"
        run = ("run", source, "-m", folder, "-o", out, "--quiet", "--max-new-tokens", 9, "--strategy", "greedy")
        given = ("--dry-multiplier", 3, "--dry-base", 2, "--dry-allowed-length", 1, "--dry-penalty-range", 50)
        given += ("--dry-sequence-breaker", "a", "--dry-sequence-breaker", "xy")
        assert server.run(*run, *given) == 0
        (record,) = read_records(out)
        ids = tokenizer()("abcab", return_tensors="pt")["input_ids"]
        engine = Engine(build("gpt2", n_layer=1), tokenizer(), strategy="greedy", max_new_tokens=9, **STRONG)
        (expected,) = engine.generate({"prompt": ids[0].tolist()})
        assert record["token_ids"] == expected.token_ids
        kept = json.loads(manifest.manifest_path(out).read_text())["config"]
        assert (kept["dry_base"], kept["dry_sequence_breakers"], kept["dry_penalty_range"]) == (2.0, ["a", "xy"], 50)
        assert server.run(*run, *given[:-2]) == 2
        assert 'dry_sequence_breakers: ["a", "xy"] then, ["a"] now' in server.stderr
        assert server.run(*run, "--dry-base", 0.5) == 2
        assert "dry_base must be a finite number of at least 1" in server.stderr
    finally:
        server.close()


# ---- why a token did not come ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batching", ["slots", "static"])
@pytest.mark.parametrize("strategy", ["greedy", "fsd", "contrastive"])
def test_the_trace_says_what_was_held_back(strategy, batching):
    """Tokens that would be above the chosen one: by the model's own logits and penalties counted by hand."""
    model = build("gpt2", std=0.2)
    rows = []  # one token again and again, and behind it most others
    for often, most in ((7, 90), (40, 70), (60, 80)):
        rows.append([token for other in range(10, most) for token in (often, other)] + [often])
    settings = {"dry_multiplier": 5.0, "dry_base": 1.5, "dry_allowed_length": 1, "dry_sequence_breakers": []}
    engine = Engine(model, tokenizer(), strategy=strategy, batching=batching, trace=True, max_new_tokens=2, **settings)
    held = 0
    for result in engine.generate([{"id": i, "prompt": row} for i, row in enumerate(rows)]):
        ids = list(rows[result.id])
        for step in result.trace:
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1].tolist()
            repeats = {}
            for place in range(1, len(ids)):
                count = 0
                while count < place and ids[place - 1 - count] == ids[len(ids) - 1 - count]:
                    count += 1
                repeats[ids[place]] = max(repeats.get(ids[place], 0), count)
            costs = {token: 5.0 * 1.5 ** (count - 1) for token, count in repeats.items() if count}
            chosen = logits[step["token_id"]] - costs.get(step["token_id"], 0.0)
            expected = {t: cost for t, cost in costs.items() if logits[t] > chosen and t != step["token_id"]}
            found = {each["token_id"]: each["penalty"] for each in step.get("dry", ())}
            assert found == pytest.approx(expected)
            for each in step.get("dry", ()):
                position, count = each["because"]["position"], repeats[each["token_id"]]
                assert ids[position] == each["because"]["token_id"] == each["token_id"]
                assert ids[position - count : position] == ids[len(ids) - count :]
                assert each["because"]["ngram"] == tokenizer().decode(ids[position - count : position + 1])
            held += len(found)
            ids.append(step["token_id"])
    assert held > 4


def test_explain_shows_what_was_held_back():
    step = {"token_id": 4, "token": " b", "candidates": [{"token_id": 4, "token": " b", "probability": 0.5}]}
    because = {"position": 3, "token_id": 5, "token": " \x9bc", "ngram": " a \x9bc"}
    dry = [{"token_id": 5, "token": " \x9bc", "penalty": 1.4, "because": because}]
    lines = list(explained([step | {"dry": dry}, step]))
    assert len(lines) == 4
    assert lines[2].plain.split() == ["'", "\\x9bc'", "1.4000", "DRY", "'", "a", "\\x9bc'", "at", "3"]
    assert str(lines[2].style) == "red"
