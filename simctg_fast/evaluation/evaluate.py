"""One model, several strategies, the same prompts: what each writes, and what it is worth."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checks import is_integer, require
from ..metrics import diversity, embedding_coherence, mauve, repeated_tokens
from ..metrics.models.embeddings import folder_embedder
from ..metrics.models.mauve_score import folder_features
from ..text.continuation import continuation_pieces, continuation_text
from .conclude import conclusions
from .measure import METRICS, Scorer, figures, of_texts, single
from .prompts import Prompt
from .recommend import Candidate, Recommendation, recommend
from .settings import Setting
from .states import isotropy_of_layers, similarity
from .writing import SLOTS, Tokenized, Writer, Written, tokenize

SHOWN_TEXTS = 8  # evenly from all prompts, whatever was written
LAYER_TEXTS = 16
HUMAN = "human"


@dataclass(frozen=True)
class Options:
    """How an evaluation writes and measures.

    Args:
        max_new_tokens: the longest continuation; references are cut to it.
        seed: of the draws, and of the intervals.
        slots: texts that are written at a time.
        grid: penalty_alpha and top_k of contrastive search to try, each with each.
        paper_compatible: also the diversity of the published script, of words, pooled over the texts.
        embedder: of `embedding_coherence`: a folder, or a callable; None: without that coherence.
        mauve: the folder of the model whose features MAUVE compares; None: without MAUVE.
    """

    max_new_tokens: int = 128
    seed: int = 0
    slots: int = SLOTS
    grid: tuple[tuple[float, ...], tuple[int, ...]] | None = None
    paper_compatible: bool = False
    embedder: Any = None
    mauve: str | None = None

    def __post_init__(self) -> None:
        require(is_integer(self.max_new_tokens, 1), "max_new_tokens", self.max_new_tokens, "an integer of at least 1")
        require(is_integer(self.seed, 0), "seed", self.seed, "an integer of at least 0")
        require(is_integer(self.slots, 1), "slots", self.slots, "an integer of at least 1")
        is_once = all(len(set(values)) == len(values) for values in self.grid or ())
        require(is_once, "grid", self.grid, "values of penalty_alpha and of top_k, each once")


class Evaluation:
    """Runs ``settings`` on ``prompts`` and measures what they write.

    Args:
        model, tokenizer: as `load_model` returns them.
        scorer: says how probable texts are; by default ``model`` itself.
        kept: what an earlier run wrote, by the name of its setting.
        on_text: called after each text; `total` says how many there will be.
        on_written: called with a setting and what it wrote, when it is complete.

    Raises:
        ValueError: none of the prompts can be continued, a value outside its range, a folder that holds no model.
        ImportError: MAUVE without `mauve-text`.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        settings: Sequence[Setting],
        options: Options = Options(),
        *,
        scorer: Scorer | None = None,
        kept: Mapping[str, Written] | None = None,
        on_text: Callable[[], None] = lambda: None,
        on_written: Callable[[Setting, Written], None] = lambda setting, written: None,
    ) -> None:
        self.model, self.tokenizer, self.options = model, tokenizer, options
        grid = _grid_settings(options)
        self.settings, self.grid_names = [*settings, *grid], {setting.name for setting in grid}
        self.scorer = scorer or Scorer(model)
        self.kept = dict(kept or {})
        self.on_text, self.on_written = on_text, on_written
        self.embedder, self.features = self._metrics_by_models()
        self.prompts, self.refused = tokenize(model, tokenizer, prompts, options.max_new_tokens)
        if not self.prompts:
            name, reason = next(iter(self.refused.items()), ("", "there are none"))
            raise ValueError(f"none of the {len(prompts)} prompts can be continued; {name!r}: {reason}")
        self.before = [self._text_of(each) for each in self.prompts]
        most = options.max_new_tokens
        self.references = [each.prompt.reference_ids(tokenizer, most) or None for each in self.prompts]
        self.rows: list[dict[str, Any]] = []
        self.texts: dict[str, list[list[int] | None]] = {}
        self.human: dict[str, dict[str, float | None]] | None = None
        self.human_features: Any = None

    @property
    def total(self) -> int:
        """Texts that will be written."""
        return len(self.prompts) * len([each for each in self.settings if each.name not in self.kept])

    def run(self) -> dict[str, Any]:
        """Everything that was found, as JSON values (`report.render` shows it); errors are part of it."""
        if any(self.references):
            self.rows.append(_row(HUMAN, "people", {}))
            self._fill(self.rows[-1], Written(self.references))
            self.human = self.rows[-1]["figures"]
        for setting in self.settings:
            self._run(setting)
        grid = self._grid()
        rows = [row for row in self.rows if row["strategy"] not in self.grid_names]
        chosen = self._recommend([row for row in rows if row["strategy"] != HUMAN])
        best = None if chosen.best is None else chosen.best.name
        return {
            "prompts": len(self.prompts),
            "max_new_tokens": self.options.max_new_tokens,
            "seed": self.options.seed,
            "metrics": self._metrics(),
            "rows": rows,
            "texts": self._shown(rows),
            "similarity": self._similarity(rows),
            "isotropy": self._isotropy(),
            "grid": grid,
            "conclusion": conclusions(rows, best, chosen.reason, grid),
            "recommended": {"strategy": best, "reason": chosen.reason},
            "refused": [{"id": key, "message": message} for key, message in self.refused.items()],
        }

    # ---- writing and measuring ------------------------------------------------------------------------------------

    def _run(self, setting: Setting) -> None:
        row = _row(setting.name, setting.label, {}, setting.shown)
        row["python"] = setting.python(self.options.max_new_tokens, self.options.seed)
        self.rows.append(row)
        written = self.kept.get(setting.name)
        if written is None:
            try:
                writer = Writer(
                    self.model,
                    self.tokenizer,
                    setting,
                    max_new_tokens=self.options.max_new_tokens,
                    seed=self.options.seed,
                    slots=self.options.slots,
                )
                written = writer(self.prompts, self.on_text)
            except (ValueError, NotImplementedError, TypeError) as error:  # this model cannot be decoded so
                row["note"], row["missing"] = f"not run: {' '.join(str(error).split())}", len(self.prompts)
                return
            self.on_written(setting, written)
        self._fill(row, written)

    def _fill(self, row: dict[str, Any], written: Written) -> None:
        row["figures"], unscored = self._measure(row["strategy"], written.token_ids)
        if written.tokens and written.seconds:
            row["figures"]["tokens_per_second"] = single(written.tokens / written.seconds)
        row["note"], row["missing"] = self._note(written, unscored), len(written.errors) + len(unscored)

    def _note(self, written: Written, unscored: Mapping[int, str]) -> str:
        notes = []
        without = f"have no log-probability by {self.scorer.name}"
        for what, errors in (("failed", written.errors), (without, unscored)):
            if errors:
                number, message = next(iter(errors.items()))
                which = self.prompts[number].prompt.id
                notes.append(f"{len(errors)} of {len(self.prompts)} texts {what}; {which}: {message}")
        empty = sum(ids == [] for ids in written.token_ids)
        if empty:
            notes.append(f"{empty} of {len(self.prompts)} texts are empty, without diversity and probability")
        return "; ".join(notes)

    def _measure(
        self, name: str, token_ids: Sequence[list[int] | None]
    ) -> tuple[dict[str, dict[str, float | None]], dict[int, str]]:
        """Figures; and by the prompts' numbers why texts have no log-probability."""
        self.texts[name] = list(token_ids)
        there = [number for number, ids in enumerate(token_ids) if ids is not None]
        if not there:
            return {}, {}
        ids = [token_ids[number] or [] for number in there]
        prompts, before = [self.prompts[n] for n in there], [self.before[n] for n in there]
        texts = [self.continuation(prompt, row) for prompt, row in zip(prompts, ids, strict=True)]
        log_probs, unscored = self.scorer(prompts, ids, before, texts)
        values = of_texts(ids, texts, log_probs)
        if self.embedder is not None:
            values["embedding_coherence"] = embedding_coherence(before, texts, self.embedder)
        found = figures(values, self.options.seed)
        tokens = sum(map(len, log_probs))
        if tokens:
            mean = math.fsum(value for row in log_probs for value in row) / tokens
            found["perplexity"] = single(math.exp(min(-mean, 700.0)))
        if self.options.paper_compatible:
            found["published_diversity"] = single(diversity(texts, paper_compatible=True))  # in percent
        if self.features is not None and sum(map(bool, texts)) > 1:
            if name == HUMAN:
                self.human_features = self.features(texts)
            elif self.human_features is not None:
                found["mauve"] = single(mauve(self.human_features, self.features(texts)))
        return found, {there[place]: message for place, message in unscored.items()}

    def _metrics_by_models(self) -> tuple[Any, Callable[[Sequence[str]], Any] | None]:
        """An embedder, and what makes MAUVE's features. They are tried: what is wrong with them is said now, not when
        all texts are written."""
        embedder, features = self.options.embedder, None
        if embedder is not None:
            embedder = embedder if callable(embedder) else folder_embedder(embedder)
            embedding_coherence(["one"], ["two"], embedder)
        if self.options.mauve is not None:
            features = folder_features(self.options.mauve, self.options.max_new_tokens)
            mauve(features(["one", "two"]), features(["three", "four"]))
        return embedder, features

    # ---- parts of what was found ----------------------------------------------------------------------------------

    def _metrics(self) -> dict[str, Any]:
        present = {name for row in self.rows for name in row["figures"]}
        return {name: vars(metric) for name, metric in METRICS.items() if name in present}

    def _shown(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        count = min(SHOWN_TEXTS, len(self.prompts))
        shown = []
        for number in (index * len(self.prompts) // count for index in range(count)):
            written = {}
            for row in rows:
                ids = self.texts.get(row["strategy"], [None] * len(self.prompts))[number]
                if ids is not None:
                    written[row["strategy"]] = self._as_shown(number, ids)
            shown.append({"id": self.prompts[number].prompt.id, "prompt": self.before[number], "written": written})
        return shown

    def _as_shown(self, number: int, ids: list[int]) -> dict[str, Any]:
        value = of_texts([ids], [""], [[]])["diversity"][0]
        pieces = list(self._pieces(number, ids))
        return {"pieces": pieces, "repeated": repeated_tokens(ids, 4), "tokens": len(ids), "diversity": value}

    def _pieces(self, number: int, ids: list[int]) -> Iterator[str]:
        return continuation_pieces(self.tokenizer, self._context(self.prompts[number]), ids)

    def _similarity(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Of the first prompt that is shown."""
        maps = []
        for row in rows:
            ids = self.texts.get(row["strategy"], [None])[0]
            if ids:
                try:
                    found = similarity(self.model, self.prompts[0], ids)
                except ValueError:  # no picture of states that are none
                    return []
                pieces = [*continuation_pieces(self.tokenizer, [], self.prompts[0].ids), *self._pieces(0, ids)]
                maps.append({"strategy": row["strategy"], "text": 0, "pieces": pieces, **found})
        return maps

    def _isotropy(self) -> dict[str, Any] | None:
        name = HUMAN if self.human is not None else next((n for n, ids in self.texts.items() if any(ids)), None)
        if name is None:
            return None
        chosen = [(p, ids) for p, ids in zip(self.prompts, self.texts[name], strict=True) if ids][:LAYER_TEXTS]
        whose = "people" if name == HUMAN else name
        try:
            layers = isotropy_of_layers(self.model, chosen)
        except ValueError:
            return None
        return {"of": f"{len(chosen)} texts of {whose}", "layers": layers}

    def _grid(self) -> dict[str, Any] | None:
        if self.options.grid is None:
            return None
        alphas, ks = self.options.grid
        rows = {row["strategy"]: row for row in self.rows}
        cells = {(a, k): rows[_grid_setting(a, k).name] for a in alphas for k in ks}

        def means(metric: str) -> list[list[float | None]]:
            return [[_mean(cells[a, k], metric) for k in ks] for a in alphas]

        found = self._recommend(list(cells.values()))
        best = next((pair for pair, row in cells.items() if found.best and row["strategy"] == found.best.name), None)
        return {
            "penalty_alpha": list(alphas),
            "top_k": list(ks),
            "diversity": means("diversity"),
            "coherence": means("coherence"),
            "log_prob_per_byte": means("log_prob_per_byte"),
            "recommended": None if best is None else {"penalty_alpha": best[0], "top_k": best[1]},
            "reason": found.reason,
            "rows": list(cells.values()),
        }

    def _recommend(self, rows: Sequence[Mapping[str, Any]]) -> Recommendation:
        people = [] if self.human is None else [_row(HUMAN, "", self.human)]
        if measured := _candidates(people):
            return recommend(_candidates(rows), measured[0])
        if not people:
            return recommend([], None)
        is_short = "diversity" not in people[0]["figures"]
        lack = "diversity: they are all shorter than 4 tokens" if is_short else "log-probability"
        return recommend([], None, f"human continuations have no {lack}")

    # ---- texts ----------------------------------------------------------------------------------------------------

    def _context(self, prompt: Tokenized) -> list[int]:
        """What the continuation is read behind: an encoder-decoder's and an answer are texts of their own."""
        return [] if prompt.source is not None or "messages" in prompt.prompt.content else prompt.ids

    def continuation(self, prompt: Tokenized, ids: Sequence[int]) -> str:
        return continuation_text(self.tokenizer, self._context(prompt), ids)

    def _text_of(self, prompt: Tokenized) -> str:
        content = prompt.prompt.content
        given = content.get("prompt", content.get("source"))
        return given if isinstance(given, str) else str(self.tokenizer.decode(prompt.given, skip_special_tokens=True))


def _row(name: str, label: str, found: dict[str, Any], settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    return {
        "strategy": name,
        "label": label,
        "settings": dict(settings or {}),
        "command": "",
        "python": "",
        "figures": found,
        "note": "",
        "missing": 0,
    }


def _grid_setting(alpha: float, k: int) -> Setting:
    given = {"penalty_alpha": alpha, "top_k": k}
    return Setting(f"grid {alpha} {k}", f"contrastive search, α {alpha}, k {k}", "contrastive", given)


def _grid_settings(options: Options) -> list[Setting]:
    alphas, ks = options.grid or ((), ())
    return [_grid_setting(alpha, k) for alpha in alphas for k in ks]


def _mean(row: Mapping[str, Any], metric: str) -> float | None:
    return row["figures"].get(metric, {}).get("mean")


def _candidates(rows: Sequence[Mapping[str, Any]]) -> list[Candidate]:
    found = []
    for row in rows:
        diverse, log_prob = _mean(row, "diversity"), _mean(row, "log_prob_per_byte")
        if diverse is not None and log_prob is not None:
            found.append(Candidate(row["strategy"], diverse, log_prob))
    return found
