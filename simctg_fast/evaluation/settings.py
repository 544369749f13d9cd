"""The strategies that an evaluation compares, by name, each with its settings and how to have it elsewhere."""

from __future__ import annotations

import json
import re
import shlex
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from ..checks import require
from ..engine.parameters import NAMES, run_defaults
from ..strategy_names import RANDOM
from ..text.texts import short

# By the name of the evaluation: what it is called, the engine's strategy, and what is set for it beside the defaults.
KNOWN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "greedy": ("greedy search", "greedy", {}),
    "beam": ("beam search", "", {"num_beams": 4}),
    "nucleus": ("nucleus sampling", "sample", {"top_p": 0.95}),
    "typical": ("typical sampling", "sample", {"typical_p": 0.95}),
    "contrastive": ("contrastive search", "contrastive", {}),
    "centered": ("centred contrastive search", "contrastive", {"center": True}),
    "adaptive": ("adaptive contrastive search", "adaptive", {}),
    "fsd": ("FSD by n-grams", "fsd", {}),
    "fsd-vec": ("FSD by vectors", "fsd-vec", {}),
    "guard": ("GUARD", "guard", {}),
    "dry": ("greedy search with DRY", "greedy", {"dry_multiplier": 0.8}),
}
NAMES_BY_DEFAULT = tuple(KNOWN)

# Of each strategy of the engine the settings that a reader wants to see, though nobody has said them.
_SHOWN = {
    "contrastive": ("penalty_alpha", "top_k"),
    "adaptive": ("adaptive_q", "adaptive_k_range"),
    "fsd": ("penalty_alpha", "top_k", "fsd_n", "fsd_beta"),
    "fsd-vec": ("penalty_alpha", "top_k", "fsd_n"),
    "guard": ("guard_window", "guard_decay", "temperature"),
}
_SEARCHES = {
    "contrastive": ("ContrastiveSearch", {"penalty_alpha": "penalty_alpha", "top_k": "top_k", "center": "center"}),
    "adaptive": ("AdaptiveContrastiveSearch", {"adaptive_q": "q", "adaptive_k_range": "k_range"}),
    "fsd": ("FSD", {"penalty_alpha": "alpha", "top_k": "k", "fsd_n": "n", "fsd_beta": "beta"}),
    "fsd-vec": ("FSD", {"penalty_alpha": "alpha", "top_k": "k", "fsd_n": "n"}),
    "guard": ("GUARD", {"guard_window": "window", "guard_decay": "decay"}),
}
_DRY = "dry_"
# What a setting may say: how a token is chosen. Lengths, seeds and records are the evaluation's.
_ALLOWED = tuple(
    name
    for name in NAMES
    if name in ("penalty_alpha", "top_k", "center", "temperature", "top_p", "min_p", "typical_p")
    or name.startswith(("fsd_", "adaptive_", "guard_", _DRY))
)
_OPTIONS = {
    "adaptive_k_range": "--adaptive-k",
    "dry_sequence_breakers": "--dry-sequence-breaker",
    "fsd_stop_tokens": "--fsd-stop-token",
}


@dataclass(frozen=True)
class Setting:
    """One row of the table: ``name`` as it was asked for, ``label`` for people, the engine's ``strategy`` (empty: beam
    search, which is transformers'), and ``given``, the parameters that differ from its defaults."""

    name: str
    label: str
    strategy: str
    given: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_beam(self) -> bool:
        return not self.strategy

    @property
    def shown(self) -> dict[str, Any]:
        """The settings that say what was run, defaults included."""
        if self.is_beam:
            return dict(self.given)
        parameters = run_defaults(self.strategy, self.given)[self.strategy]
        names = dict.fromkeys((*_SHOWN.get(self.strategy, ()), *self.given))
        values = {name: getattr(parameters, name) for name in names}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @property
    def draws(self) -> bool:
        return self.strategy in RANDOM and run_defaults(self.strategy, self.given)[self.strategy].temperature != 0

    def seed(self, seed: int) -> int:
        """Of the engine, where the evaluation's is ``seed``: two ways of sampling would draw the same numbers."""
        return (zlib.crc32(self.name.encode()) + seed) % 2**63

    def command(
        self,
        model: str,
        max_new_tokens: int,
        *,
        seed: int = 0,
        prompts: str = "prompts.jsonl",
        loading: Sequence[str] = (),
    ) -> str:
        """``simctg-fast run`` that writes the same, into a file of the setting's name; empty where there is none.

        Args:
            seed: of the evaluation.
            prompts: a file of them, by the ids of the evaluation.
            loading: options of how the model is loaded.
        """
        shown = self.shown
        if self.is_beam or [] in shown.values():  # an option cannot be given no value
            return ""
        out = re.sub(r"[^\w.=-]+", "-", self.name).strip("-") + ".jsonl"
        words = ["simctg-fast", "run", model, prompts, "-o", out, "--strategy", self.strategy]
        for name, value in shown.items():
            words += _option(name, value)
        words += ["--max-new-tokens", str(max_new_tokens)]
        words += ["--seed", str(self.seed(seed))] if self.draws else []
        return shlex.join([*words, *loading])

    def python(self, max_new_tokens: int, seed: int = 0) -> str:
        """``model.generate`` with it; empty where its settings are the engine's alone. Draws are others than the
        engine's, but the same each time."""
        shown = self.shown
        if self.strategy == "guard" and shown["temperature"] not in (0, 1):
            return ""
        arguments = [f"max_new_tokens={max_new_tokens}"]
        if self.strategy in _SEARCHES:
            name, spelled = _SEARCHES[self.strategy]
            inner = ['"vector"'] if self.strategy == "fsd-vec" else []
            inner += [f"{spelled[key]}={_literal(value)}" for key, value in shown.items() if key in spelled]
            if self.strategy == "guard" and shown["temperature"] == 0:
                inner.append("sample=False")
            arguments.insert(0, f"custom_generate={name}({', '.join(inner)})")
        elif self.strategy == "sample":
            arguments[:0] = ["do_sample=True", "top_k=0"]
        else:
            arguments.insert(0, "do_sample=False")
        dry = {key.removeprefix(_DRY): value for key, value in shown.items() if key.startswith(_DRY)}
        if dry:
            inner = [*(f"{key}={_literal(value)}" for key, value in dry.items()), "tokenizer=tokenizer"]
            arguments.append(f"logits_processor=[DRYLogitsProcessor({', '.join(inner)})]")
        if self.strategy not in _SEARCHES:
            arguments += [f"{key}={_literal(v)}" for key, v in shown.items() if not key.startswith(_DRY)]
        begin = f"torch.manual_seed({self.seed(seed)})\n" if self.draws else ""
        return f"{begin}model.generate(**inputs, {', '.join(arguments)})"


def parse_settings(names: str, contrastive: Mapping[str, Any] = MappingProxyType({})) -> list[Setting]:
    """``"greedy,contrastive,contrastive:penalty_alpha=0.4:top_k=6"``: names of `KNOWN`, each with parameters of the
    engine behind colons, values as in JSON. ``contrastive``: settings of contrastive search that names do not say.

    Raises:
        ValueError: an unknown name, one that comes twice, a parameter that it does not use or a value not allowed.
    """
    require(isinstance(names, str) and names.strip() != "", "strategies", names, f"some of {', '.join(KNOWN)}")
    settings: dict[str, Setting] = {}
    for text in (part.strip() for part in re.split(r",(?![^\[]*\])", names)):  # no comma within brackets
        setting = _parse(text, contrastive)
        if setting.name in settings:
            raise ValueError(f"strategies names {short(text)} twice")
        settings[setting.name] = setting
    return list(settings.values())


def _parse(text: str, contrastive: Mapping[str, Any]) -> Setting:
    name, *options = text.split(":")
    require(name in KNOWN, "strategies", name, f"some of {', '.join(KNOWN)}, separated by commas")
    label, strategy, given = KNOWN[name]
    allowed = _ALLOWED if strategy else ("num_beams",)
    base = contrastive if strategy == "contrastive" else {}
    added = {}
    for option in options:
        key, is_pair, value = option.partition("=")
        if not is_pair or key not in allowed:
            names = ", ".join(allowed)
            raise ValueError(f"strategies has {short(option)} in {short(text)}, must be NAME=VALUE, one of {names}")
        added[key] = _value(value)
    setting = Setting(
        text, ", ".join([label, *(o.replace("=", " ") for o in options)]), strategy, {**base, **given, **added}
    )
    if setting.is_beam:
        beams = setting.given["num_beams"]
        require(type(beams) is int and 2 <= beams <= 64, "num_beams", beams, "an integer from 2 to 64")
    else:
        run_defaults(strategy, setting.given)  # raises where it does not use one
    return setting


def _value(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return tuple(value) if isinstance(value, list) else value


def _option(name: str, value: Any) -> list[str]:
    """A parameter as `simctg-fast run` takes it."""
    option = _OPTIONS.get(name, "--" + name.replace("_", "-"))
    if isinstance(value, bool):
        return [option] * value
    if not isinstance(value, list):
        return [] if value is None else [option, str(value)]
    values = list(map(str, value))
    return [option, *values] if name == "adaptive_k_range" else [word for v in values for word in (option, v)]


def _literal(value: Any) -> str:
    return repr(tuple(value)) if isinstance(value, list) else repr(value)
