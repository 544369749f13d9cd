"""`simctg-fast eval`: from the names of files and models to a folder with texts, figures and a report."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..checks import is_integer, is_number, require
from ..loading import load_model
from ..text.texts import short
from .about import about, fingerprint
from .conclude import all_rows
from .evaluate import Evaluation, Options
from .measure import Scorer
from .output import PROMPTS, Folder, digest
from .prompts import documentation_prompts, read_prompts
from .settings import NAMES_BY_DEFAULT, Setting, parse_settings
from .writing import SLOTS, Written

PASSAGES = 100  # of documentation, where no file is given


@dataclass(frozen=True)
class Request:
    """What `simctg-fast eval` was asked; its help says what each is.

    Raises:
        ValueError: a value outside its range, or without another that it needs.
    """

    model: str
    prompts: str | None = None
    references: str | None = None
    strategies: str = ",".join(NAMES_BY_DEFAULT)
    alpha_grid: str | None = None
    k_grid: str | None = None
    max_new_tokens: int = 128
    limit: int | None = None
    scorer: str | None = None
    paper_compatible: bool = False
    embedder: str | None = None
    mauve: str | None = None
    out: str | None = None
    overwrite: bool = False
    seed: int = 0
    slots: int = SLOTS
    device: str | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        require(self.limit is None or is_integer(self.limit, 1), "limit", self.limit, "an integer of at least 1")
        if self.references is not None and self.prompts is None:
            raise ValueError(f"references is {self.references!r}, but no file of prompts is given")
        if (self.alpha_grid is None) != (self.k_grid is None):
            given, missing = ("alpha_grid", "k_grid") if self.k_grid is None else ("k_grid", "alpha_grid")
            raise ValueError(f"{given} is {getattr(self, given)!r}, but {missing} is not given: a grid needs both")

    @property
    def grid(self) -> tuple[tuple[float, ...], tuple[int, ...]] | None:
        """Values of penalty_alpha and of top_k, as they were given."""
        if self.alpha_grid is None or self.k_grid is None:
            return None
        alphas = _numbers("alpha_grid", self.alpha_grid, float, lambda v: is_number(v, 0, 1), "numbers in [0, 1]")
        ks = _numbers("k_grid", self.k_grid, int, lambda v: is_integer(v, 1), "integers of at least 1")
        return tuple(alphas), tuple(ks)

    @property
    def loading(self) -> list[str]:
        """How the model is loaded, as options of the command line."""
        given = {"--device": self.device, "--dtype": None if self.dtype == "auto" else self.dtype}
        words = [word for option, value in given.items() if value is not None for word in (option, value)]
        return [*words, *["--trust-remote-code"] * self.trust_remote_code]

    @property
    def folder(self) -> str:
        """Where it goes: by default beside where the command runs, by the last part of the model's name."""
        return self.out or f"eval-{Path(self.model).name or 'model'}"


def run(
    request: Request,
    loading: AbstractContextManager[Any],
    writing: Callable[[int], AbstractContextManager[Callable[[], None]]],
) -> tuple[dict[str, Any], Path]:
    """Evaluates and writes the folder; goes on where the same run was interrupted, setting by setting.

    Args:
        loading: entered while models are loaded.
        writing: entered while so many texts are written; its value is called after each.

    Returns:
        What `Evaluation.run` does, with where and how it was made; and the folder.

    Raises:
        ValueError: of an argument, a file or the folder (`read_prompts`, `parse_settings`, `Folder` …).
        ModelError, OSError: a model, a file or the folder cannot be had.
    """
    settings = parse_settings(request.strategies)
    options = Options(
        request.max_new_tokens,
        request.seed,
        request.slots,
        request.grid,
        request.paper_compatible,
        request.embedder,
        request.mauve,
    )
    prompts = None if request.prompts is None else read_prompts(request.prompts, request.references)
    folder = Folder(request.folder, overwrite=request.overwrite)
    folder.spare(prompts=request.prompts, references=request.references)
    load = partial(load_model, device=request.device, trust_remote_code=request.trust_remote_code)
    with loading:
        model, tokenizer = load(request.model, dtype=request.dtype)
        scorer = None if request.scorer is None else Scorer(*load(request.scorer), request.scorer)
        if prompts is None:
            prompts = documentation_prompts(tokenizer, request.limit or PASSAGES, request.max_new_tokens)
        evaluation = Evaluation(model, tokenizer, prompts[: request.limit], settings, options, scorer=scorer)
        ready = evaluation.prompts
        asked = digest(request.model, fingerprint(model), ready, options.max_new_tokens, options.seed, options.slots)
        evaluation.kept = folder.begin(asked, ready, model.get_input_embeddings().num_embeddings)

    def keep(setting: Any, written: Written) -> None:
        texts = [
            None if ids is None else evaluation.continuation(prompt, ids)
            for prompt, ids in zip(ready, written.token_ids, strict=True)
        ]
        folder.add(setting, ready, written, texts)

    evaluation.on_written = keep
    with writing(evaluation.total) as advance:
        evaluation.on_text = advance
        found = evaluation.run()
    made = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    found = {
        "model": request.model,
        "created": made,
        "scorer": request.scorer or request.model,
        **about(model),
        **found,
    }
    to_copy = partial(
        Setting.command,
        model=request.model,
        max_new_tokens=request.max_new_tokens,
        seed=request.seed,
        prompts=str(folder.path / PROMPTS),
        loading=request.loading,
    )
    commands = {setting.name: to_copy(setting) for setting in evaluation.settings}
    for row in all_rows(found):
        row["command"] = commands.get(row["strategy"], "")
    folder.finish(found, ready)
    return found, folder.path


def _numbers(name: str, text: str, kind: Any, allowed: Callable[[Any], bool], what: str) -> list[Any]:
    """Numbers separated by commas, each once."""
    values = []
    for part in text.split(","):
        try:
            value = kind(part)
        except ValueError:
            value = None
        if value is None or not allowed(value) or value in values:
            raise ValueError(
                f"{name} must be {what}, separated by commas, each once, got {short(part)} in {short(text)}"
            )
        values.append(value)
    return values
