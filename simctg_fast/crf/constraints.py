"""Which tags may follow which, in the schemes that mark spans: the arguments `allowed_*` of `LinearChainCRF`.

    crf = LinearChainCRF(len(tags), **bio(tags))

A tag is a letter, and the type of the span behind a hyphen (`B-PER`), or the letter alone where spans have no types.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

__all__ = ["bilou", "bio", "bioes", "bmes"]


@dataclass(frozen=True)
class _Scheme:
    name: str
    letters: str
    begins: str  # letters that begin a span, the others carry one on
    ends: str  # letters that may be the last of a span
    open: str  # letters behind which a span may go on


_BIO = _Scheme("BIO", "BI", begins="B", ends="BI", open="BI")
_BIOES = _Scheme("BIOES", "BIES", begins="BS", ends="ES", open="BI")
_BILOU = _Scheme("BILOU", "BILU", begins="BU", ends="LU", open="BI")
_BMES = _Scheme("BMES", "BMES", begins="BS", ends="ES", open="BM")


def bio(tags: Sequence[str] | Mapping[int, str], *, outside: str | Iterable[str] = "O") -> dict[str, torch.Tensor]:
    """BIO (IOB2): a span is `B-x`, then any number of `I-x`.

    Args:
        tags: the names of all tags by index: a list, or a dictionary as a model's `config.id2label`.
        outside: the tags that stand outside of spans, beside `"O"` also special ones (`["O", "[PAD]"]`); they may not
            be all there.

    Returns:
        `{"allowed_transitions": (K, K), "allowed_start": (K,), "allowed_end": (K,)}`, bool.

    Raises:
        TypeError, ValueError: no tags; a tag that is no string, comes twice or is of another scheme; a span that could
            not be begun or ended for want of a tag (`I-x` without `B-x`).
    """
    return _constraints(_BIO, tags, outside)


def bioes(tags: Sequence[str] | Mapping[int, str], *, outside: str | Iterable[str] = "O") -> dict[str, torch.Tensor]:
    """BIOES (IOBES): a span is `S-x` alone, or `B-x`, any number of `I-x`, `E-x`. Otherwise as :func:`bio`."""
    return _constraints(_BIOES, tags, outside)


def bilou(tags: Sequence[str] | Mapping[int, str], *, outside: str | Iterable[str] = "O") -> dict[str, torch.Tensor]:
    """BILOU: a span is `U-x` alone, or `B-x`, any number of `I-x`, `L-x`. Otherwise as :func:`bio`."""
    return _constraints(_BILOU, tags, outside)


def bmes(tags: Sequence[str] | Mapping[int, str], *, outside: str | Iterable[str] = ()) -> dict[str, torch.Tensor]:
    """BMES, of word segmentation: a word is `S` alone, or `B`, any number of `M`, `E`. Otherwise as :func:`bio`."""
    return _constraints(_BMES, tags, outside)


def _constraints(scheme: _Scheme, tags, outside: str | Iterable[str]) -> dict[str, torch.Tensor]:
    names = _names(tags)
    if not isinstance(outside, Iterable):
        raise TypeError(f"outside is {outside!r:.80}, must be a tag or several")
    free = {outside} if isinstance(outside, str) else set(outside)
    parsed = [("", "") if name in free else _parse(scheme, name) for name in names]
    _check_spans(scheme, parsed)
    # A tag outside of spans has no letter: it begins, ends and is not gone on with.
    starts = torch.tensor([letter == "" or letter in scheme.begins for letter, _ in parsed])
    ends = torch.tensor([letter == "" or letter in scheme.ends for letter, _ in parsed])
    carries_on = [[a != "" and a in scheme.open and kind == other for _, other in parsed] for a, kind in parsed]
    allowed = torch.where(starts[None], ends[:, None], torch.tensor(carries_on))
    return {"allowed_transitions": allowed, "allowed_start": starts, "allowed_end": ends}


def _names(tags) -> list[str]:
    if isinstance(tags, Mapping):
        if sorted(tags) != list(range(len(tags))):
            raise ValueError(f"tags has the keys {sorted(tags)!r:.80}, must be the indices 0..{len(tags) - 1}")
        tags = [tags[i] for i in range(len(tags))]
    if isinstance(tags, str) or not isinstance(tags, Iterable):
        raise TypeError(f"tags is {tags!r:.80}, must be a sequence of names, or a dictionary of them by index")
    names = list(tags)
    if not names:
        raise ValueError("tags is empty, must hold at least one name")
    for i, name in enumerate(names):
        if not isinstance(name, str):
            raise TypeError(f"tags[{i}] is {name!r:.80}, must be a string")
        if name in names[:i]:
            raise ValueError(f"tags[{i}] is {name!r}, as tags[{names.index(name)}] is; a tag comes once")
    return names


def _parse(scheme: _Scheme, name: str) -> tuple[str, str]:
    letter, hyphen, kind = name.partition("-")
    if len(letter) != 1 or letter not in scheme.letters or bool(hyphen) != bool(kind):
        raise ValueError(
            f"tags holds {name!r}; a tag of {scheme.name} is one of {', '.join(scheme.letters)}, alone or with a type "
            "behind a hyphen, or one of outside"
        )
    return letter, kind


def _check_spans(scheme: _Scheme, parsed: list[tuple[str, str]]) -> None:
    """What carries a span on needs a tag that begins one, and what cannot end a span one that does."""
    for letter, kind in parsed:
        mates = {other for other, same in parsed if same == kind}
        openers = [x for x in scheme.letters if x in scheme.begins and x in scheme.open]
        closers = [x for x in scheme.letters if x in scheme.ends and x not in scheme.begins]
        for needed, of in ((openers, scheme.begins), (closers, scheme.ends)):
            if letter != "" and letter not in of and not mates & set(needed):
                suffix = f"-{kind}" if kind else ""
                wanted = " or ".join(repr(x + suffix) for x in needed)
                raise ValueError(f"tags holds {letter + suffix!r} but no {wanted}: no span of {scheme.name} has it")
